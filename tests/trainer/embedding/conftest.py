"""Fixtures of the tests of learned words."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from trainer.base import load_toy_base


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).with_name("words_golden.safetensors"))


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """ComfyUI's folder of embeddings."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


@pytest.fixture
def base(folder):
    return load_toy_base()
