"""Small reward files in the layouts of the published ones, with random weights."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from maskunet_core.rewards.clip_layout import ClipLayout

PUBLISHED = Path(__file__).parent / "core" / "published"
"""Files and scores that the original packages' code made: see the metadata of the golden files."""
WRONGLY_DECODED = "mojibake: cafÃ©"
"""The one prompt of `tokens_golden.json` that the package `ftfy` is needed for."""
IMAGE_REWARD_HEADS, HPS_LAYOUT = (4, 4), ClipLayout(quick=False, image_heads=4, text_heads=4)
"""Of the image and the text encoder in `ImageReward_tiny.pt` and `HPS_tiny.pt`; files do not tell."""
HPS_DESCRIPTION = {
    "model_cfg": {"vision_cfg": {"width": 80, "head_width": 20}, "text_cfg": {"width": 32, "heads": 4}},
}
"""The same as OpenCLIP writes it beside the weights."""


def image_reward_tensors() -> dict[str, Tensor]:
    return torch.load(PUBLISHED / "ImageReward_tiny.pt", weights_only=True)


def hps_tensors() -> dict[str, Tensor]:
    return torch.load(PUBLISHED / "HPS_tiny.pt", weights_only=True)["state_dict"]


def describe(path: Path, description: dict | None = None) -> Path:
    """Write a description beside a file of weights; by default that of `HPS_tiny.pt`."""
    path.with_suffix(".json").write_text(json.dumps(HPS_DESCRIPTION if description is None else description))
    return path


def put_hps(path: Path) -> Path:
    """`HPS_tiny.pt` with its description under another name."""
    shutil.copy(PUBLISHED / "HPS_tiny.pt", path)
    return describe(path)


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


def clip_description() -> dict:
    """What transformers writes beside the weights of `clip_model`."""
    return json.loads(clip_model().config.to_json_string())


def as_openai_released(model):
    """Weights rounded to half precision, as OpenAI's are."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def shallow_clip(width: int, heads: int, act: str, patch: int, pixels: int, text_width: int):
    """transformers' CLIPModel in the shape of a published one, a single layer deep; another act gives other scores."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shape = {"intermediate_size": 128, "num_hidden_layers": 1, "hidden_act": act, "projection_dim": 32}
    image = shape | {"hidden_size": width, "num_attention_heads": heads, "image_size": pixels, "patch_size": patch}
    text = shape | {"hidden_size": text_width, "num_attention_heads": text_width // 64}
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=32))
    model = model.to_empty(device="cpu").eval()
    for name, parameter in model.named_parameters():
        reach = 2.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
        torch.nn.init.uniform_(parameter, -reach, reach)
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
    torch.nn.init.constant_(model.logit_scale, 2.6592)
    for part in (model.text_model.embeddings, model.vision_model.embeddings):
        places = part.position_embedding.num_embeddings
        part.register_buffer("position_ids", torch.arange(places)[None], persistent=False)
    return model.requires_grad_(False)


def clip_l_image_model(embedding: int = 24, pixels: int = 224):
    """transformers' image half of CLIP as OpenAI's ViT-L/14 is, with its quick GELU, but a single layer deep."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 16}
    config = CLIPVisionConfig(
        **shape, hidden_act="quick_gelu", image_size=pixels, patch_size=14, projection_dim=embedding
    )
    return as_openai_released(CLIPVisionModelWithProjection(config).eval())


def aesthetic_head(embedding: int = 24) -> dict[str, Tensor]:
    torch.manual_seed(1)
    widths = {0: (embedding, 32), 2: (32, 16), 4: (16, 8), 6: (8, 4), 7: (4, 1)}
    layers = {index: torch.nn.Linear(*width) for index, width in widths.items()}
    return {f"layers.{i}.{name}": value for i, layer in layers.items() for name, value in layer.state_dict().items()}
