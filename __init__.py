"""ComfyUI-MaskUNet: learned masks on the weights of a diffusion model, per timestep and per sample."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "nodes/web"
"""Its folder `docs` holds the help page of each node."""

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
