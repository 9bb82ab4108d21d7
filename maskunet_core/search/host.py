"""Gradients inside the host: models loaded whole, weights that autograd may keep, a differentiable decoder."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import MaskUNetError


class NoRoomForGradients(MaskUNetError):
    """The models do not lie on the device as a whole, or what a search needs beside them would not fit."""


def outside_inference_mode(value: Any) -> Any:
    """`value` with copies of its inference tensors, which autograd refuses, also those in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (list, tuple):
        return type(value)(outside_inference_mode(item) for item in value)
    if type(value) is dict:
        return {key: outside_inference_mode(item) for key, item in value.items()}
    return value


def _make_constant(module: nn.Module) -> None:
    """The same values, in tensors that autograd may keep and asks no gradients of."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference():
                part._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            elif parameter is not None:
                parameter.requires_grad_(False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()


def load_for_gradients(patchers: Sequence[Any]) -> None:
    """Load the host's ModelPatchers, and what is patched into their models, whole and together, for backward passes.

    Call it outside inference mode. A part of a model that is streamed in for each use would be overwritten before the
    backward pass reads it, and the gradient would be wrong without a word: raises NoRoomForGradients instead.
    """
    import comfy.model_management as management

    nested = [[p, *p.model_patches_models(), *p.get_nested_additional_models()] for p in patchers]
    every = list({id(patcher): patcher for group in nested for patcher in group}.values())
    management.load_models_gpu(every, force_full_load=True)
    for patcher in every:
        missing = patcher.model_size() - patcher.loaded_size()
        if missing > 0 or getattr(patcher.model, "lowvram_patch_counter", 0):
            raise NoRoomForGradients(
                f"{type(patcher.model).__name__} does not fit on {patcher.load_device} beside the others "
                f"({missing / 2**20:,.0f} MB are missing), and gradients need the models there as a whole. Set "
                "dtype to fp16 in MaskUNet Reward Loader, connect a small decoder (TAESD) to gradient_vae, close other "
                "programs that use the device, or start ComfyUI without --lowvram."
            )
        _make_constant(patcher.model)


def static_clone(model: Any) -> Any:
    """A clone of a MODEL that the host loads as a whole; some hosts stream weights by default."""
    clone = model.clone()
    return clone.get_non_dynamic_delegate() if getattr(clone, "is_dynamic", lambda: False)() else clone


def latent_decoder(vae: Any, latent_format: Any) -> Callable[[Tensor], Tensor]:
    """Latents of the diffusion model to pictures `[N, 3, H, W]` in about [0, 1], differentiable.

    vae: the host's VAE, KL or TAESD. The host's own `decode` may unload other models, tiles, and clamps.
    """
    network, dtype, device = vae.first_stage_model, vae.vae_dtype, vae.device

    def decode(latents: Tensor) -> Tensor:
        pictures = network.decode(latent_format.process_out(latents).to(device, dtype))
        return (pictures[:, :3].to(latents) + 1.0) / 2.0

    return decode
