"""Where files lie: `models/maskunet` for generators, `models/maskunet_masks` for recorded masks, `models/reward`
and `models/judges`."""

import contextlib
import os
from pathlib import Path

import folder_paths

MASKUNET = "maskunet"
MASKS = "maskunet_masks"
REWARD = "reward"
JUDGES = "judges"
TRAININGS = "maskunet_training"
"""Folder inside the output folder for trainings that were begun and are not finished."""
_TOY = Path(__file__).resolve().parent.parent / "maskunet_core" / "toy"
BUNDLED = _TOY / "generators"
BUNDLED_MASKS = _TOY / "masks"
SAVED_MASKS = "masks"
"""Folder inside the output folder that MaskUNet Save Masks writes to unless told otherwise."""


def register() -> None:
    """Adds the model folders; paths that extra_model_paths.yaml gave stay in front."""
    _register(MASKUNET, {".safetensors"}, BUNDLED)
    _register(MASKS, {".safetensors"}, Path(folder_paths.get_output_directory()) / SAVED_MASKS, BUNDLED_MASKS)
    _register(REWARD, folder_paths.supported_pt_extensions)
    _register(JUDGES, folder_paths.supported_pt_extensions)


def _register(name: str, extensions: set[str], *others: Path) -> None:
    """`models/{name}`, and other folders whose files are listed beside it."""
    own = Path(folder_paths.models_dir) / name
    # A folder that cannot be made (models may be read-only) holds no files, and is no reason to do without the nodes.
    with contextlib.suppress(OSError):
        own.mkdir(parents=True, exist_ok=True)
    for folder in (own, *others):
        folder_paths.add_model_folder_path(name, str(folder))
    paths, _ = folder_paths.folder_names_and_paths[name]
    folder_paths.folder_names_and_paths[name] = (paths, set(extensions))


def fingerprint(*paths: str | Path) -> list[list[int]]:
    """What changes with the files: modification time in nanoseconds and size of each. For `fingerprint_inputs`.

    The time alone would miss a file that was replaced by one with the same time, as tools that keep times do.
    """
    return [[status.st_mtime_ns, status.st_size] for status in map(os.stat, paths)]
