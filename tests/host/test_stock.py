"""A clone inside `custom_nodes` of a ComfyUI that has its own requirements alone."""

import subprocess

import pytest

from tests.host.graph import load_workflow, to_prompt
from tests.host.server import Server
from tests.host.stock import link_stock_packages, required_by
from trainer.host import PROJECT


@pytest.fixture(scope="module")
def stock_server(tmp_path_factory):
    """A fresh clone of the repository in a stock ComfyUI, and the names of the packages that ComfyUI has."""
    clone, packages = tmp_path_factory.mktemp("clone") / "maskunet", tmp_path_factory.mktemp("packages")
    if not (PROJECT / ".git").exists():
        pytest.skip("This folder is no git repository, so it cannot be cloned.")
    subprocess.run(["git", "clone", "-q", str(PROJECT), str(clone)], check=True)
    names = link_stock_packages(packages)
    with Server(extension=clone, packages=packages) as server:
        yield server, names


def test_stock_comfyui_has_none_of_the_packages_that_only_we_use(stock_server):
    server, names = stock_server
    theirs = {"torch", "transformers", "safetensors", "aiohttp"}
    ours = {"accelerate", "datasets", "matplotlib", "tensorboard", "ftfy", "playwright", "pytest"}
    assert theirs <= names
    assert not names & ours
    python, environment = server.interpreter()
    script = (
        f"from importlib.util import find_spec; print([name for name in {sorted(theirs | ours)} if find_spec(name)])"
    )
    found = subprocess.run([*python, "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(sorted(theirs))


@pytest.mark.parametrize("name", ["generator_off_and_on", "reward_sampler", "replay_masks"])
def test_fresh_clone_draws_in_a_stock_comfyui(stock_server, name):
    server, _ = stock_server
    prompt = to_prompt(load_workflow(name), server.object_info())
    for node in prompt.values():
        # Masks that are replayed belong to their steps.
        if "steps" in node["inputs"] and name != "replay_masks":
            node["inputs"]["steps"] = 4
    outputs = server.run(prompt)
    assert any(output.get("images") for output in outputs.values())
    assert "IMPORT FAILED" not in server.log.read_text()


def test_requirements_are_followed_to_what_they_require():
    names = required_by(["transformers", "no-such-package"])
    assert {"transformers", "tokenizers", "huggingface-hub", "numpy"} <= names
    assert "no-such-package" not in names
    assert "pytest" not in names
