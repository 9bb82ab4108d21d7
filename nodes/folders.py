"""Where generator files lie: `models/maskunet`, and what the extension brings along."""

from pathlib import Path

import folder_paths

MASKUNET = "maskunet"
BUNDLED = Path(__file__).resolve().parent.parent / "maskunet_core" / "toy" / "generators"


def register() -> None:
    """Adds the model folder; paths that extra_model_paths.yaml gave stay in front."""
    own = Path(folder_paths.models_dir) / MASKUNET
    own.mkdir(parents=True, exist_ok=True)
    for folder in (own, BUNDLED):
        folder_paths.add_model_folder_path(MASKUNET, str(folder))
    paths, _ = folder_paths.folder_names_and_paths[MASKUNET]
    folder_paths.folder_names_and_paths[MASKUNET] = (paths, {".safetensors"})
