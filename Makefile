PYTHON ?= python3
VENV_PYTHON = $(firstword $(wildcard .venv/bin/python .venv/Scripts/python.exe) .venv/bin/python)

.PHONY: setup demo test bench parity pictures film gpu gpu-pack clean

setup:
	@$(PYTHON) tests/host/setup.py

demo: setup
	@$(VENV_PYTHON) -m tests.host.demo $(DEMO_ARGS)

test:
	@$(PYTHON) tests/host/setup.py --browser
	@$(VENV_PYTHON) -m pytest -n logical --maxprocesses 2 --dist loadfile $(TEST_ARGS)

bench: setup
	@$(VENV_PYTHON) -m tests.bench $(BENCH_ARGS)

parity: setup
	@$(VENV_PYTHON) -m tests.parity
	@$(VENV_PYTHON) -m tests.parity.judges

pictures: setup
	@$(VENV_PYTHON) -m tests.host.thumbnails $(PICTURES_ARGS)

film: setup
	@$(VENV_PYTHON) -m tests.host.search_film

gpu: setup
	@$(VENV_PYTHON) -m tests.gpu $(GPU_ARGS)

gpu-pack: setup
	@$(VENV_PYTHON) -m tests.gpu.pack $(GPU_PACK_ARGS)

clean:
	rm -rf .venv .host .parity output
