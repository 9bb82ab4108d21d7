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


def inception_weights(convolutions: Mapping[str, list[int]], narrower: int = 1) -> dict[str, Tensor]:
    """Of Inception's layout. narrower: by what all widths are divided."""
    layout: dict[str, list[int]] = {"fc.bias": [1008], "fc.weight": [1008, 2048 // narrower]}
    for name, (outputs, inputs, *kernel) in convolutions.items():
        outputs, inputs = outputs // narrower, inputs if inputs == 3 else inputs // narrower
        layout[f"{name}.conv.weight"] = [outputs, inputs, *kernel]
        for part in ("weight", "bias", "running_mean", "running_var"):
            layout[f"{name}.bn.{part}"] = [outputs]
    stream, found = np.random.Generator(np.random.Philox(71)), {}
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
