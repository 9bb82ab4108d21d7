"""Finds ComfyUI and makes it importable: the trainer loads models through the host's own loaders."""

import logging
import os
import sys
from pathlib import Path

from maskunet_core.errors import MaskUNetError

PROJECT = Path(__file__).resolve().parent.parent
PINNED_HOST = PROJECT / ".host" / "ComfyUI"


class HostNotFound(MaskUNetError):
    """No ComfyUI where one is looked for; the message says what to do."""


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy" / "model_patcher.py").is_file()


def find_host() -> Path:
    """COMFYUI_PATH; the folder two levels up, where the extension lies in `custom_nodes`; or the pinned host."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        if not is_comfyui(Path(named)):
            raise HostNotFound(
                f"COMFYUI_PATH is '{named}', which holds no ComfyUI (main.py and the folder comfy are missing). "
                "Set it to the folder that holds ComfyUI's main.py, or unset it."
            )
        return Path(named).resolve()
    # Not resolved: the extension may be a link inside custom_nodes.
    for folder in (Path(__file__).absolute().parents[3], PINNED_HOST):
        if is_comfyui(folder):
            return folder
    raise HostNotFound(
        "ComfyUI was not found. Set COMFYUI_PATH to the folder that holds its main.py, "
        "or run `make setup` in the project's folder, which fetches one."
    )


def enter_host() -> Path:
    """Put ComfyUI on the import path, on the CPU where torch has no CUDA. Returns its folder."""
    folder = find_host()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    import torch
    from comfy.cli_args import args

    if not torch.cuda.is_available():
        args.cpu = True
    logging.getLogger().setLevel(logging.WARNING)
    return folder
