"""Fixtures of the trainer's tests."""

import subprocess
import sys
import threading

import pytest


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """accelerate keeps precision and processes for a whole process, of which every test is a part."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def command(monkeypatch, capsys):
    """`python -m trainer ...` in this process, which has imported already what takes a new one seconds."""
    from trainer.__main__ import main

    # Which the command replaces.
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["trainer", *arguments])
        code = main()
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run
