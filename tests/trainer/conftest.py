"""Fixtures of the trainer's tests."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from maskunet_core.files import checkpoint, mask_file
from tests.builders import make_generator
from tests.recording import random_masks
from trainer.base import load_toy_base
from trainer.config import Config
from trainer.methods import FullMethod, LoraMethod


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """accelerate keeps precision and processes for a whole process, of which every test is a part."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def files_of_methods(tmp_path_factory, toy_structure) -> Path:
    """A generator, masks, a LoRA and a full fine-tune for the toy model, which all do something."""
    folder = tmp_path_factory.mktemp("methods")
    checkpoint.save(folder / "g.safetensors", make_generator(toy_structure, lively=True), "decoder attention", {})
    mask_file.save(folder / "m.safetensors", random_masks(toy_structure, keep=0.8))
    for name, kind in (("lora", LoraMethod), ("full", FullMethod)):
        method = kind(load_toy_base(), Config(method=name))
        torch.manual_seed(1)
        for parameter in method.module.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        method.save(folder / f"{name}.safetensors", {})
    return folder


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
