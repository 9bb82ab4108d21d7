"""ComfyUI-MaskUNet: learned masks on the weights of a diffusion model, per timestep and per sample."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
