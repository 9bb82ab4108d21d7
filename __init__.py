"""ComfyUI-MaskUNet: learned masks on the weights of a diffusion model, per timestep and per sample."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "nodes/web"
"""What the front end loads: a script for the look of the nodes, and in `docs` the help page of each."""

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
