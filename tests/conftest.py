"""Fixtures that several folders of tests share."""

import contextlib
import os
import sys

import pytest

from tests import device  # isort: skip - chooses the cards that torch sees
from maskunet_core.models.structure import Structure, inspect_model
from maskunet_core.seam.attach import structure_of
from maskunet_core.toy.model import load_toy_model
from tests.builders import sd15_unet
from tests.host.browser import HOW, REQUIRED, find_browser
from tests.host.memory import any_card, scarce  # noqa: F401 - fixtures
from tests.schedule import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401 - hooks
from trainer.host import PROJECT, enter_host


def pytest_configure(config):
    """ComfyUI becomes importable; the project stays in front, because the host has a folder `tests` too."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    enter_host()
    device.use_in_host()
    sys.path.insert(0, str(PROJECT))


@pytest.fixture
def on_device():
    """Tensors and layers are made on the tests' device."""
    with device.DEVICE:
        yield


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
    # It needs aiohttp, which tests without a server do without.
    from tests.host.server import Server

    with Server(other_nodes=(PROJECT / "tests" / "host" / "faulty_reward.py",)) as running:
        yield running


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where the browser lies."""
    found = find_browser()
    if found is None:
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(HOW)
    return found


@pytest.fixture
def streamed_in(monkeypatch):
    """A block in which the host loads diffusion models as where memory is scarce: weights come as they are used."""
    import comfy.model_management
    from comfy.model_patcher import ModelPatcher

    whole = ModelPatcher.load

    def piece_by_piece(patcher, device_to=None, *_, **__):
        whole(patcher, device_to, lowvram_model_memory=1)

    @contextlib.contextmanager
    def block():
        comfy.model_management.unload_all_models()
        with monkeypatch.context() as patch:
            patch.setattr(ModelPatcher, "load", piece_by_piece)
            yield
            comfy.model_management.unload_all_models()

    return block
