"""Full-size models with random weights."""

import torch

from tests.builders import sd15_unet
from trainer.base import BaseModel


def random_unet() -> torch.nn.Module:
    """SD 1.5's U-Net in memory, fp32 on the CPU, with small random weights."""
    unet = sd15_unet().to_empty(device="cpu").requires_grad_(False).eval()
    torch.manual_seed(0)
    for parameter in unet.parameters():
        parameter.normal_(std=0.02)
    return unet


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
