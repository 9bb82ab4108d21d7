"""Finds ComfyUI and makes it importable: the trainer loads models through the host's own loaders."""

import logging
import os
import sys
from pathlib import Path

from maskunet_core.errors import MaskUNetError

from .files import user_path

PROJECT = Path(__file__).resolve().parent.parent
PINNED_HOST = PROJECT / ".host" / "ComfyUI"
REWARD, JUDGES, GENERATORS, MASKS = "reward", "judges", "maskunet", "maskunet_masks"
"""The project's own folders in ComfyUI's folder of models, as the nodes name them, too."""
_SHIPPED = PROJECT / "maskunet_core" / "toy"
NAMED = 10
"""Files named in a message; further ones are counted."""


class HostNotFound(MaskUNetError):
    """No ComfyUI where one is looked for; the message says what to do."""


class MissingPackage(MaskUNetError):
    """The trainer needs a package that ComfyUI does not bring."""


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy" / "model_patcher.py").is_file()


def find_host() -> Path:
    """COMFYUI_PATH; the folder two levels up, where the extension lies in `custom_nodes`; or the pinned host."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        if not is_comfyui(user_path(named)):
            raise HostNotFound(
                f"COMFYUI_PATH is '{named}', which holds no ComfyUI (main.py and the folder comfy are missing). "
                "Set it to the folder that holds ComfyUI's main.py, or unset it."
            )
        return user_path(named).resolve()
    # Not resolved: the extension may be a link inside custom_nodes.
    for folder in (Path(__file__).absolute().parents[3], PINNED_HOST):
        if is_comfyui(folder):
            return folder
    raise HostNotFound(
        "ComfyUI was not found. Set COMFYUI_PATH to the folder that holds its main.py, "
        "or run `make setup` in the project's folder, which fetches one."
    )


def _sees_a_gpu() -> bool:
    """Whether torch has a device besides the CPU: CUDA, ROCm, XPU, MPS, or what a plug-in of torch brings."""
    import torch

    if hasattr(torch, "accelerator"):
        return torch.accelerator.is_available()
    return torch.cuda.is_available() or torch.backends.mps.is_available()  # torch before 2.6


def cpu_has_bf16() -> bool:
    """Whether this CPU computes in bf16. Others convert number by number: a convolution took 58 times fp32's time."""
    import torch

    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def enter_host(cpu: bool = False) -> Path:
    """Put ComfyUI on the import path. Returns its folder.

    The host chooses the device, as it does for the nodes; the CPU where torch sees no other, where `accelerate launch
    --cpu` says so, or where `cpu`: the toy world's own measurements are small, and the same everywhere. To be called
    before anything of the host is imported.
    """
    folder = find_host()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    from comfy.cli_args import args

    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if cpu or told or not _sees_a_gpu():
        args.cpu = True
    logging.getLogger().setLevel(logging.WARNING)
    add_extra_folders(folder)
    import folder_paths

    for kind in (REWARD, JUDGES, GENERATORS, MASKS):
        folder_paths.add_model_folder_path(kind, str(models_folder() / kind))
    # As the nodes list them.
    folder_paths.add_model_folder_path(GENERATORS, str(_SHIPPED / "generators"))
    folder_paths.add_model_folder_path(MASKS, str(_SHIPPED / "masks"))
    return folder


def add_extra_folders(host: Path) -> None:
    """The model folders of `extra_model_paths.yaml`, which ComfyUI's main.py reads."""
    file = host / "extra_model_paths.yaml"
    if file.is_file():
        from utils.extra_config import load_extra_path_config

        load_extra_path_config(str(file))


def models_folder() -> Path:
    """ComfyUI's folder `models`."""
    import folder_paths

    return Path(folder_paths.models_dir)


def drawing_names() -> dict[str, list[str]]:
    """What ComfyUI has to draw by: names of each `sampler` and each `scheduler`."""
    import comfy.samplers

    return {"sampler": comfy.samplers.SAMPLER_NAMES, "scheduler": comfy.samplers.SCHEDULER_NAMES}


def model_file(kind: str, name: str) -> Path | None:
    """The file of a path, else of a name in ComfyUI's folders of a kind (`checkpoints`, `loras`), else None."""
    import folder_paths

    if Path(name).is_file():
        return Path(name)
    # Also as seen from ComfyUI's folder: `models/checkpoints/NAME`.
    inside = Path(folder_paths.base_path) / name
    found = folder_paths.get_full_path(kind, name)
    return Path(found) if found else inside if inside.is_file() else None


def model_choice(kind: str) -> str:
    """What lies in ComfyUI's folders of a kind, for a message."""
    import folder_paths

    names, (folders, _) = folder_paths.get_filename_list(kind), folder_paths.folder_names_and_paths[kind]
    if not names:
        return f"'{folders[0]}' holds none"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"ComfyUI's folder '{kind}' holds {', '.join(names[:NAMED])}{more}"
