"""Where files lie: generators in `models/maskunet`, recorded masks in `models/maskunet_masks`, and what comes along."""

from pathlib import Path

import folder_paths

MASKUNET = "maskunet"
MASKS = "maskunet_masks"
BUNDLED = Path(__file__).resolve().parent.parent / "maskunet_core" / "toy" / "generators"
SAVED_MASKS = "masks"
"""Folder inside the output folder that MaskUNet Save Masks writes to unless told otherwise."""


def register() -> None:
    """Adds the model folders; paths that extra_model_paths.yaml gave stay in front."""
    _register(MASKUNET, BUNDLED)
    _register(MASKS, Path(folder_paths.get_output_directory()) / SAVED_MASKS)


def _register(name: str, other: Path) -> None:
    """`models/{name}` and another folder whose files are listed beside it."""
    own = Path(folder_paths.models_dir) / name
    own.mkdir(parents=True, exist_ok=True)
    for folder in (own, other):
        folder_paths.add_model_folder_path(name, str(folder))
    paths, _ = folder_paths.folder_names_and_paths[name]
    folder_paths.folder_names_and_paths[name] = (paths, {".safetensors"})
