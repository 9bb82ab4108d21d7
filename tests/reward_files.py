"""Small reward files in the layouts of the published ones, with random weights."""

from pathlib import Path

import torch
from torch import Tensor

PUBLISHED = Path(__file__).parent / "core" / "published"
"""Files and scores that the original packages' code made: see the metadata of the golden files."""
WRONGLY_DECODED = "mojibake: cafÃ©"
"""The one prompt of `tokens_golden.json` that the package `ftfy` is needed for."""
IMAGE_REWARD_HEADS, HPS_HEADS = (4, 4), (4, 4)
"""Heads of the image and the text encoder in `ImageReward_tiny.pt` and `HPS_tiny.pt`; files do not tell."""


def image_reward_tensors() -> dict[str, Tensor]:
    return torch.load(PUBLISHED / "ImageReward_tiny.pt", weights_only=True)


def hps_tensors() -> dict[str, Tensor]:
    return torch.load(PUBLISHED / "HPS_tiny.pt", weights_only=True)["state_dict"]


def redrawn(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Other random weights in the same layout, of the same spread."""
    stream, fresh = torch.Generator().manual_seed(seed), {}
    for name, value in tensors.items():
        if value.is_floating_point() and value.ndim:
            noise = torch.randn(value.shape, generator=stream)
            value = value.mean() + max(float(value.std(correction=0)), 0.02) * noise
        fresh[name] = value
    return fresh


def clip_model(width: int = 64, embedding: int = 24):
    """transformers' CLIPModel in PickScore's layout, for pictures of 28x28."""
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    shape |= {"hidden_act": "gelu", "projection_dim": embedding}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=shape, vision_config=shape | {"image_size": 28, "patch_size": 14}, projection_dim=embedding
    )
    return CLIPModel(config).eval()


def clip_l_image_model(embedding: int = 24, pixels: int = 224):
    """transformers' image half of CLIP with OpenAI's ViT-L width and quick GELU, a single layer deep."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 16}
    config = CLIPVisionConfig(
        **shape, hidden_act="quick_gelu", image_size=pixels, patch_size=32, projection_dim=embedding
    )
    return CLIPVisionModelWithProjection(config).eval()


def aesthetic_head(embedding: int = 24) -> dict[str, Tensor]:
    torch.manual_seed(1)
    widths = {0: (embedding, 32), 2: (32, 16), 4: (16, 8), 6: (8, 4), 7: (4, 1)}
    layers = {index: torch.nn.Linear(*width) for index, width in widths.items()}
    return {f"layers.{i}.{name}": value for i, layer in layers.items() for name, value in layer.state_dict().items()}
