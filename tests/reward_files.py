"""Small reward files in the layouts of the published ones, with random weights."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from maskunet_core.rewards.clip_layout import ClipLayout
from tests.drawn import drawn, embedding, linear, matrix, norm

PUBLISHED = Path(__file__).parent / "core" / "published"
"""What the original packages' code computed: `python -m tests.parity.golden` makes the scores and gradients anew."""
WRONGLY_DECODED = "mojibake: cafÃ©"
"""The one prompt of `tokens_golden.json` that the package `ftfy` is needed for."""
IMAGE_REWARD_HEADS, HPS_LAYOUT = (4, 4), ClipLayout(quick=False, image_heads=4, text_heads=4)
"""Of the image and the text encoder of `image_reward_tensors` and `hps_tensors`; files do not tell."""
HPS_DESCRIPTION = {
    "model_cfg": {"vision_cfg": {"width": 80, "head_width": 20}, "text_cfg": {"width": 32, "heads": 4}},
}
"""The same as OpenCLIP writes it beside the weights."""
GOLDEN_PIXELS = {"ImageReward": 32, "HPSv2.1": 28}
"""Width and height of the pictures that each reward takes."""


def golden_pictures(reward: str) -> Tensor:
    """Three pictures that leave [0, 1]: a clamp would show."""
    pixels = GOLDEN_PIXELS[reward]
    return drawn(f"{reward} pictures", 3, 3, pixels, pixels, mean=0.5, scale=0.3).float()


def _drawn_once(draw: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """Each call gets copies in single precision, which it may change."""

    @functools.cache
    def tensors() -> dict[str, Tensor]:
        return {name: value.float() if value.is_floating_point() else value for name, value in draw().items()}

    @functools.wraps(draw)
    def copies() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in tensors().items()}

    return copies


def _bert_attention(name: str, source: int) -> dict[str, Tensor]:
    """source: the width of what keys and values are made of."""
    tensors = linear(f"{name}.self.query", 48, 48)
    tensors |= linear(f"{name}.self.key", 48, source) | linear(f"{name}.self.value", 48, source)
    return tensors | linear(f"{name}.output.dense", 48, 48) | norm(f"{name}.output.LayerNorm", 48)


@_drawn_once
def image_reward_tensors() -> dict[str, Tensor]:
    """An image encoder of 3 layers for 32x32 pixels, a text encoder of 2 layers, and the head."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    tensors = embedding(f"{vision}.cls_token", 1, 1, 64) | embedding(f"{vision}.pos_embed", 1, 5, 64)
    tensors |= linear(f"{vision}.patch_embed.proj", 64, 3, 16, 16) | norm(f"{vision}.norm", 64)
    for n in range(3):
        block = f"{vision}.blocks.{n}"
        tensors |= norm(f"{block}.norm1", 64) | norm(f"{block}.norm2", 64)
        tensors |= linear(f"{block}.attn.qkv", 192, 64) | linear(f"{block}.attn.proj", 64, 64)
        tensors |= linear(f"{block}.mlp.fc1", 256, 64) | linear(f"{block}.mlp.fc2", 64, 256)
    tensors |= embedding(f"{text}.embeddings.word_embeddings.weight", 30524, 48)
    tensors |= embedding(f"{text}.embeddings.position_embeddings.weight", 64, 48)
    tensors |= norm(f"{text}.embeddings.LayerNorm", 48)
    tensors[f"{text}.embeddings.position_ids"] = torch.arange(64)[None]
    for n in range(2):
        layer = f"{text}.encoder.layer.{n}"
        tensors |= _bert_attention(f"{layer}.attention", 48) | _bert_attention(f"{layer}.crossattention", 64)
        tensors |= linear(f"{layer}.intermediate.dense", 96, 48)
        tensors |= linear(f"{layer}.output.dense", 48, 96) | norm(f"{layer}.output.LayerNorm", 48)
    tensors |= linear("blip.vision_proj", 256, 64) | linear("blip.text_proj", 256, 48)
    widths = {0: (1024, 48), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    for index, width in widths.items():
        tensors |= linear(f"mlp.layers.{index}", *width)
    return tensors


def _clip_layers(name: str, count: int, width: int) -> dict[str, Tensor]:
    tensors = {}
    for n in range(count):
        block = f"{name}.resblocks.{n}"
        tensors |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
        tensors |= matrix(f"{block}.attn.in_proj_weight", 3 * width, width)
        tensors[f"{block}.attn.in_proj_bias"] = drawn(f"{block}.attn.in_proj_bias", 3 * width, scale=0.1)
        tensors |= linear(f"{block}.attn.out_proj", width, width)
        tensors |= linear(f"{block}.mlp.c_fc", 4 * width, width) | linear(f"{block}.mlp.c_proj", width, 4 * width)
    return tensors


@_drawn_once
def hps_tensors() -> dict[str, Tensor]:
    """An image encoder of 3 layers for 28x28 pixels and a text encoder of 2 layers."""
    tensors = embedding("visual.class_embedding", 80) | embedding("visual.positional_embedding", 5, 80)
    tensors |= matrix("visual.conv1.weight", 80, 3, 14, 14) | norm("visual.ln_pre", 80) | norm("visual.ln_post", 80)
    tensors |= _clip_layers("visual.transformer", 3, 80)
    tensors |= embedding("token_embedding.weight", 49408, 32) | embedding("positional_embedding", 77, 32)
    tensors |= _clip_layers("transformer", 2, 32) | norm("ln_final", 32)
    # Unlike a linear layer's weight, these have the inputs first.
    tensors["visual.proj"] = drawn("visual.proj", 80, 32, scale=1 / math.sqrt(80))
    tensors["text_projection"] = drawn("text_projection", 32, 32, scale=1 / math.sqrt(32))
    return tensors | {"logit_scale": torch.tensor(math.log(100))}


def write_image_reward(path: Path) -> Path:
    torch.save(image_reward_tensors(), path)
    return path


def write_hps(path: Path) -> Path:
    """With its description beside it."""
    torch.save({"state_dict": hps_tensors()}, path)
    return describe(path)


def describe(path: Path, description: dict | None = None) -> Path:
    """Write a description beside a file of weights; by default that of `hps_tensors`."""
    path.with_suffix(".json").write_text(json.dumps(HPS_DESCRIPTION if description is None else description))
    return path


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
