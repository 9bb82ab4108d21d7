"""Weights and pictures that the judges' golden numbers were made with, drawn anew from seeds."""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Layout = list[tuple[str, list[int], str]]
"""Name, shape and dtype of each tensor."""


def weights(layout: Layout, seed: int, gain: float = 1.4) -> dict[str, Tensor]:
    """Of a scale that keeps activations alive, in the order of their names."""
    stream, found = np.random.Generator(np.random.Philox(seed)), {}
    for name, shape, dtype in sorted(layout):
        if dtype.removeprefix("torch.") != "float32":
            found[name] = torch.zeros(shape, dtype=torch.long)
            continue
        x = stream.standard_normal(shape).astype(np.float32)
        if name.endswith("bias"):
            x = np.float32(0.05) * x
        elif len(shape) <= 1:
            x = 1 + np.float32(0.1) * x
        elif any(word in name for word in ("embed", "query", "bias_table", "level")):
            x = np.float32(0.5) * x
        else:
            x = (x * gain / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        found[name] = torch.from_numpy(np.asarray(x))
    return found


def scaled(tensors: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
    """Tensors whose names hold a key are multiplied by its factor."""
    found = dict(tensors)
    for part, factor in factors.items():
        found |= {name: value * np.float32(factor) for name, value in found.items() if part in name}
    return found


def blobs(height: int, width: int, seed: int) -> Image.Image:
    stream = np.random.Generator(np.random.Philox(seed))
    small = stream.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def noise(height: int, width: int, seed: int) -> Image.Image:
    stream = np.random.Generator(np.random.Philox(seed))
    return Image.fromarray(stream.integers(0, 256, (height, width, 3), dtype=np.uint8))


def edges(height: int, width: int, _: int) -> Image.Image:
    """A chessboard beside stripes: what filters differ over."""
    y, x = np.mgrid[:height, :width]
    levels = np.where(x < width // 2, (x + y) % 2 * 255, (x % 7 < 3) * 255).astype(np.uint8)
    return Image.fromarray(np.stack([levels, 255 - levels, np.roll(levels, 1, 0)], -1))


def features(
    n: int, d: int, seed: int, mean: float = 0.0, scale: float = 1.0, decay: float = 0.0, rank: int = 0
) -> Tensor:
    """`[n, d]` in float64: the sets that distances were told of, with a spectrum that decays."""
    stream = np.random.Generator(np.random.Philox(seed))
    x = stream.standard_normal((n, rank or d))
    if rank:
        x = x @ stream.standard_normal((rank, d)) / np.sqrt(rank)
    return torch.from_numpy(x * scale * np.exp(-decay * np.arange(d) / d) + mean)


def inception_weights(convolutions: Mapping[str, list[int]], narrower: int = 1, seed: int = 71) -> dict[str, Tensor]:
    """Of Inception's layout. narrower: by what all widths are divided."""
    layout: dict[str, list[int]] = {"fc.bias": [1008], "fc.weight": [1008, 2048 // narrower]}
    for name, (outputs, inputs, *kernel) in convolutions.items():
        outputs, inputs = outputs // narrower, inputs if inputs == 3 else inputs // narrower
        layout[f"{name}.conv.weight"] = [outputs, inputs, *kernel]
        for part in ("weight", "bias", "running_mean", "running_var"):
            layout[f"{name}.bn.{part}"] = [outputs]
    stream, found = np.random.Generator(np.random.Philox(seed)), {}
    for name, shape in sorted(layout.items()):
        x = stream.standard_normal(shape).astype(np.float32)
        if name.endswith("running_var"):
            x = np.exp(np.float32(0.2) * x)
        elif name.endswith(("running_mean", "bias")):
            x = np.float32(0.05) * x
        else:
            x = 1 + np.float32(0.1) * x if len(shape) == 1 else (x * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
        found[name] = torch.from_numpy(x)
    counts = {f"{name}.bn.num_batches_tracked": torch.tensor(0) for name in convolutions}
    return found | counts


def _bert_layout(prefix: str, width: int) -> Layout:
    """Two layers, with attention to what is seen."""
    shapes = {
        "embeddings.position_ids": [1, 512],
        "embeddings.word_embeddings.weight": [30524, width],
        "embeddings.position_embeddings.weight": [512, width],
    }
    dense, norms = {}, ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{n}" for n in range(2)):
        for attention in ("attention", "crossattention"):
            parts = ("self.query", "self.key", "self.value", "output.dense")
            dense |= {f"{layer}.{attention}.{part}": [width, width] for part in parts}
            norms.append(f"{layer}.{attention}.output.LayerNorm")
        dense |= {f"{layer}.intermediate.dense": [2 * width, width], f"{layer}.output.dense": [width, 2 * width]}
        norms.append(f"{layer}.output.LayerNorm")
    return _layout(prefix, shapes, dense, norms, width)


def _layout(prefix: str, shapes: dict, dense: dict, norms: list[str], width: int) -> Layout:
    """dense: weights of layers with biases, by name."""
    shapes = shapes | {f"{name}.weight": shape for name, shape in dense.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in dense.items()}
    shapes |= {f"{name}.{part}": [width] for name in norms for part in ("weight", "bias")}
    return [(prefix + name, shape, "int64" if name.endswith("ids") else "float32") for name, shape in shapes.items()]


def blip_vqa_weights(seed: int, patches: int = 6, width: int = 32) -> dict[str, Tensor]:
    """Of BLIP's layout. patches: along each side of the picture."""
    vision = {"cls_token": [1, 1, width], "pos_embed": [1, patches**2 + 1, width]}
    dense = {"patch_embed.proj": [width, 3, 16, 16]}
    for block in (f"blocks.{n}" for n in range(2)):
        dense |= {f"{block}.attn.qkv": [3 * width, width], f"{block}.attn.proj": [width, width]}
        dense |= {f"{block}.mlp.fc1": [4 * width, width], f"{block}.mlp.fc2": [width, 4 * width]}
    norms = ["norm", *(f"blocks.{n}.norm{m}" for n in range(2) for m in (1, 2))]
    head = {"transform.dense": [width, width], "decoder": [30524, width]}
    layout = _layout("visual_encoder.", vision, dense, norms, width)
    layout += _bert_layout("text_encoder.", width) + _bert_layout("text_decoder.bert.", width)
    layout += _layout("text_decoder.cls.predictions.", {"bias": [30524]}, head, ["transform.LayerNorm"], width)
    found = weights(layout, seed)
    # BLIP ties the words that it reads and those that it writes.
    words, head = "text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions."
    return found | {f"{head}decoder.weight": found[words], f"{head}decoder.bias": found[f"{head}bias"]}


def dinov2_model(seed: int):
    """transformers' DINOv2 as wide as ViT-L, but a layer deep, for pictures of 3x3 patches."""
    from transformers import Dinov2Config, Dinov2Model

    shape = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 1, "mlp_ratio": 1}
    model = Dinov2Model(Dinov2Config(**shape, image_size=42, patch_size=14)).eval().requires_grad_(False)
    stream = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value += 0.1 * torch.randn(value.shape, generator=stream)
    return model
