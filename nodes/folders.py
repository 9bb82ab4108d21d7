"""Where files lie: generators in `models/maskunet` (beside those that the extension brings along), rewards in
`models/reward`."""

from pathlib import Path

import folder_paths

MASKUNET, REWARD = "maskunet", "reward"
BUNDLED = Path(__file__).resolve().parent.parent / "maskunet_core" / "toy" / "generators"


def register() -> None:
    """Adds the model folders; paths that extra_model_paths.yaml gave stay in front."""
    _add(MASKUNET, {".safetensors"}, BUNDLED)
    _add(REWARD, folder_paths.supported_pt_extensions)


def _add(name: str, extensions: set[str], *more: Path) -> None:
    own = Path(folder_paths.models_dir) / name
    own.mkdir(parents=True, exist_ok=True)
    for folder in (own, *more):
        folder_paths.add_model_folder_path(name, str(folder))
    paths, _ = folder_paths.folder_names_and_paths[name]
    folder_paths.folder_names_and_paths[name] = (paths, set(extensions))
