"""Model folders of the extension, in the host's own process."""

import os
import shutil

import folder_paths
import pytest

from maskunet_core.files import mask_file
from tests.recording import random_masks


@pytest.fixture
def folders(extension, monkeypatch):
    """The extension's nodes.folders; the host's table of folders is put back afterwards."""
    table = {name: (list(paths), set(kinds)) for name, (paths, kinds) in folder_paths.folder_names_and_paths.items()}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return extension("folders")


@pytest.mark.parametrize(
    ("kind", "bundled"),
    [
        ("maskunet", {"toy_follows.safetensors", "toy_shapes.safetensors", "toy_transformer_style.safetensors"}),
        ("maskunet_masks", {"toy_example.safetensors"}),
        ("reward", set()),
        ("judges", set()),
    ],
)
def test_where_no_model_folder_can_be_made_the_bundled_files_are_still_listed(folders, monkeypatch, kind, bundled):
    """As where `models` is mounted read-only: the host would drop an extension that raises here."""
    monkeypatch.delitem(folder_paths.folder_names_and_paths, kind)
    # No folder can be made below this one, not even by root.
    monkeypatch.setattr(folder_paths, "models_dir", "/proc/models")
    folders.register()
    assert bundled <= set(folder_paths.get_filename_list(kind))
    assert folder_paths.get_folder_paths(kind)[0] == os.path.join("/proc/models", kind)


def test_a_model_folder_is_made_where_there_is_none(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    folders.register()
    assert {path.name for path in tmp_path.iterdir()} == {"maskunet", "maskunet_masks", "reward", "judges"}


def test_a_file_that_was_replaced_under_its_old_time_is_noticed(folders, extension, tmp_path, toy_structure):
    load = extension("masks").MaskUNetLoadMasks
    path = tmp_path / "a.safetensors"
    mask_file.save(path, random_masks(toy_structure))
    folder_paths.add_model_folder_path("maskunet_masks", str(tmp_path))
    before = load.fingerprint_inputs("a.safetensors")
    assert load.fingerprint_inputs("a.safetensors") == before
    status = path.stat()
    mask_file.save(path, random_masks(toy_structure, images=2))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load.fingerprint_inputs("a.safetensors") != before
    restored = tmp_path / "restored"
    shutil.copy2(path, restored)
    os.utime(restored, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert folders.fingerprint(restored) != folders.fingerprint(path)
