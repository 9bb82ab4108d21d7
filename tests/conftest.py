"""Fixtures that several folders of tests share."""

import os
import sys

import pytest

from maskunet_core.families import Structure, inspect_model
from maskunet_core.patch import structure_of
from maskunet_core.toy.model import load_toy_model
from tests.builders import sd15_unet
from tests.host.server import Server
from trainer.host import PROJECT, enter_host


def pytest_configure(config):
    """ComfyUI becomes importable; the project stays in front, because the host has a folder `tests` too."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    enter_host()
    sys.path.insert(0, str(PROJECT))


@pytest.fixture
def toy():
    """(MODEL, CLIP, VAE), fresh."""
    return load_toy_model()


@pytest.fixture(scope="session")
def toy_structure() -> Structure:
    return structure_of(load_toy_model()[0], "decoder attention")


@pytest.fixture(scope="session")
def sd15_structure() -> Structure:
    return inspect_model(sd15_unet(), "decoder attention", "SD 1.5")


@pytest.fixture(scope="session")
def server():
    """A running ComfyUI with the extension, and a reward that fails on demand, for all tests of the session."""
    with Server(other_nodes=(PROJECT / "tests" / "host" / "faulty_reward.py",)) as running:
        yield running
