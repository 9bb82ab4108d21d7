"""Full-size models with random weights."""

import torch

from tests.builders import sd15_unet
from trainer.base import BaseModel

SDXL = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
"""What SDXL's U-Net has otherwise than SD 1.5's."""


def random_unet(**changes) -> torch.nn.Module:
    """SD 1.5's U-Net (or one with changes) in memory, fp32 on the CPU, with small random weights."""
    unet = sd15_unet(**changes).to_empty(device="cpu").requires_grad_(False).eval()
    torch.manual_seed(0)
    for parameter in unet.parameters():
        parameter.normal_(std=0.02)
    return unet


def random_base(family: str, dtype: torch.dtype) -> BaseModel:
    """SD 1.5 or SDXL to sample with, on the host's device; without text encoder and VAE."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    kind = {"SD 1.5": comfy.supported_models.SD15, "SDXL": comfy.supported_models.SDXL}[family]
    config = kind({"in_channels": 4, "adm_in_channels": 2816, "disable_unet_model_creation": True})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device="cpu")
    model.diffusion_model = random_unet(**(SDXL if family == "SDXL" else {})).to(dtype)
    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    patcher = comfy.model_patcher.ModelPatcher(model, *devices)
    return BaseModel(patcher, None, None, f"{family}, random weights")


def random_sd15() -> BaseModel:
    """A base for training whose U-Net is `random_unet`; without text encoder and VAE."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15({"in_channels": 4, "disable_unet_model_creation": True})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device="cpu")
    model.diffusion_model = random_unet()
    cpu = torch.device("cpu")
    return BaseModel(comfy.model_patcher.ModelPatcher(model, cpu, cpu), None, None, "SD 1.5, random weights")
