"""Small real models for tests."""

import torch

from maskunet_core.families import Structure
from maskunet_core.generator import LowRankGenerator, LowRankSettings


def make_generator(structure: Structure, seed: int = 0, lively: bool = False, **settings) -> LowRankGenerator:
    """A generator on `structure`; `lively` ones flip many bits, and other bits for every sample and step."""
    torch.manual_seed(seed)
    generator = LowRankGenerator(structure, LowRankSettings(**settings))
    if lively:
        with torch.no_grad():
            for name, parameter in generator.logits.named_parameters():
                if name.endswith((".u", ".v")):
                    parameter.mul_(4)
                elif name.endswith(".bias"):
                    parameter.mul_(0.6).add_(0.3 * torch.randn_like(parameter))
    return generator.eval().requires_grad_(False)


def sd15_unet(**changes) -> torch.nn.Module:
    """ComfyUI's U-Net in SD 1.5's shapes on the meta device: structure without memory."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "context_dim": 768,
        "num_heads": 8,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "legacy": False,
    }
    return UNetModel(**config | changes, device="meta", operations=comfy.ops.manual_cast)
