"""The host in this process, on the tests' device, set up as its own main.py sets itself up; there is no web server."""

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# Nothing here may import torch before the host has chosen torch's allocator.
from trainer.host import find_host


class NoDynamicVram(Exception):
    """Dynamic VRAM does not work here; the message says why."""


def enter(dynamic: bool = False) -> None:
    """Makes the host importable. dynamic: with dynamic VRAM, as on NVIDIA cards by default. Raises NoDynamicVram."""
    name = os.environ.get("MASKUNET_TEST_DEVICE", "cpu")
    sys.path.insert(0, str(find_host()))
    from comfy.cli_args import args

    args.cpu = name == "cpu"
    args.disable_dynamic_vram = not dynamic
    if dynamic:
        if name != "cuda":
            raise NoDynamicVram("needs a card of NVIDIA or AMD")
        _begin_dynamic_vram(args)
    import cuda_malloc  # noqa: F401 - chooses the allocator

    from tests import device

    if device.NAME == "imitated":
        device.use_in_host()
    if dynamic:
        _finish_dynamic_vram(args)


def _begin_dynamic_vram(args: Any) -> None:
    import comfy_aimdo.control

    try:
        begun = comfy_aimdo.control.init(simple_vram_headroom=None, nvml_pressure=not args.disable_nvml_pressure)
    except TypeError:
        begun = comfy_aimdo.control.init()
    if not begun:
        raise NoDynamicVram("comfy_aimdo found no library for this card")


def _finish_dynamic_vram(args: Any) -> None:
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control

    devices = [device.index for device in comfy.model_management.get_all_torch_devices()]
    try:
        begun = comfy_aimdo.control.init_devices((index, int(args.vram_headroom * 1024**3)) for index in devices)
    except TypeError:
        begun = comfy_aimdo.control.init_devices(devices)
    if not begun:
        raise NoDynamicVram("comfy_aimdo could not set up this card")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


@dataclass(frozen=True)
class Memory:
    """Bytes on the device. allocated: by torch; used: by everything, dynamic VRAM among it (0 where not told)."""

    allocated: int
    used: int


def memory() -> Memory:
    """Of the card as it is; nothing on other devices."""
    import torch

    if not torch.cuda.is_available():
        return Memory(0, 0)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return Memory(torch.cuda.memory_allocated(), total - free)


def empty() -> Memory:
    """Unloads all models; what is then still in use."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    comfy.model_management.soft_empty_cache()
    return memory()


def extension() -> Callable[[str], ModuleType]:
    """The extension, imported as the host imports it: `extension()("generator").MaskUNetLoader`."""
    import importlib

    from tests.host.extension import NAME, load_extension

    load_extension()
    importlib.import_module(f"{NAME}.nodes.folders").register()
    return lambda name: importlib.import_module(f"{NAME}.nodes.{name}")
