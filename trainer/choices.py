"""Names in configurations and commands. It imports nothing, so that `--help` answers at once."""

TOY = "toy"
TOY_RESOLUTION = 64
"""Side of the pictures that the toy model draws, in pixels."""
OF_WEIGHTS = ("maskunet", "static_mask", "lora", "full")
"""Methods that change the U-Net."""
METHODS = (*OF_WEIGHTS, "embedding", *(f"embedding+{method}" for method in OF_WEIGHTS))
KINDS = ("object", "style", "relation")
PARTS = {"diffusion_model": "diffusion_models", "text_encoders": "text_encoders", "vae": "vae"}
"""Keys of a base from separate files, and ComfyUI's folders of such files."""
BODIES = ("unet", "transformer")
OBJECTIVES = ("diffusion", "reward")
PRECISIONS = ("fp32", "bf16", "fp16")
