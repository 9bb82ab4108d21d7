"""Patchers for modules of plain torch layers, which cannot run from two devices: the host moves them whole or not."""

import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn


class _WholePatcher(comfy.model_patcher.ModelPatcher):
    """Moves its module as a whole, and outside of inference mode, because weights that move inside it can no longer
    take part in a backward pass."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        with torch.inference_mode(False):
            super().load(device_to, force_patch_weights=force_patch_weights, full_load=True)

    def partially_unload(self, *arguments, **options) -> int:
        return 0


class _DynamicWholePatcher(comfy.model_patcher.ModelPatcherDynamic):
    """The same among models that stream their weights. What has none of the host's layers is loaded whole by this class
    of the host, as ordinary tensors that nothing evicts; and the host does not fall back to unloading the models that
    stream, as it does where one of another class is loaded beside them."""

    def load(self, *arguments, **options):
        # The host copies the weights anew at each load: those on the device stay, and whoever holds them need not care.
        if not self.loaded_whole():
            with torch.inference_mode(False):
                super().load(*arguments, **options)

    def loaded_whole(self) -> bool:
        return bool(self.backup or self.backup_buffers)


def whole_patcher(module: nn.Module, dynamic: bool = True) -> comfy.model_patcher.ModelPatcher:
    """A patcher by which the host loads a module of plain torch layers to its device, or unloads it.

    dynamic: of the class that streams weights, where the host has chosen it for all models.
    """
    device = comfy.model_management.get_torch_device()
    # The host decides at its start. For a CPU its dynamic class makes patchers of the plain one.
    dynamic &= issubclass(comfy.model_patcher.CoreModelPatcher, comfy.model_patcher.ModelPatcherDynamic)
    kind = _DynamicWholePatcher if dynamic and not comfy.model_management.is_device_cpu(device) else _WholePatcher
    return kind(module, device, comfy.model_management.unet_offload_device())
