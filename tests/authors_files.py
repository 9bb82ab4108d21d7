"""Small files in the layout of the authors' `mask_generators.pth` and `adapters.pth`, with random weights.

They belong to a U-Net with `block_out_channels` (320, 320), `layers_per_block` 1 and attention in the first down block
and the last up-block, which is the one that is masked.
"""

from pathlib import Path

import torch
from torch import Tensor

from tests.drawn import drawn, linear, matrix

GOLDEN = Path(__file__).parent / "core" / "authors" / "logits_golden.safetensors"
"""What the authors' classes made of `inputs`: see tests/parity/authors.py."""
BLOCK, ATTENTIONS, MAP = 1, 2, (80, 160)
"""The masked up-block, the number of its attentions, and rows and columns of the small map S."""
GOLDEN_LAYERS = (
    "attentions_0_transformer_blocks_0_attn1_to_q",
    "attentions_1_transformer_blocks_0_attn2_to_k",
    "attentions_1_transformer_blocks_0_attn2_to_out_0",
)
STEP = 160
"""Of golden logits every so manieth row is kept whole, and every so manieth column."""
MAP_STEP = 16
"""The same of the small map S."""


def inputs() -> dict[str, Tensor]:
    """h and skip `[3, 320, 4, 4]`, t_emb `[3, 1280]`, float64."""
    shapes = {"h": (3, 320, 4, 4), "skip": (3, 320, 4, 4), "t_emb": (3, 1280)}
    return {name: drawn(f"authors' {name}", *shape) for name, shape in shapes.items()}


def kept(logits: Tensor, step: int = STEP) -> Tensor:
    """What golden files hold of logits `[B, out, in]`, in a row: each row and each column is met."""
    return torch.cat([logits[:, ::step].flatten(), logits[:, :, ::step].flatten()])


def _convolution(name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
    return linear(name, outputs, inputs, 1, 1, bias=0.02)


def _halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half() for name, value in tensors.items()}


def generators() -> dict[str, Tensor]:
    """One per up-block, also of the one that has no attention."""
    tensors = {}
    for block in range(2):
        tensors |= _convolution(f"{block}.conv_kernel_mask.0", 64, 640)
        tensors |= _convolution(f"{block}.conv_kernel_mask.2", MAP[0] * MAP[1], 64)
        tensors |= matrix(f"{block}.proj_temb.weight", 640, 1280)
    return _halved(tensors)


def adapters() -> dict[str, Tensor]:
    tensors = {}
    for attention in range(ATTENTIONS):
        for kind, context in (("attn1", 320), ("attn2", 768)):
            for part, width in (("to_q", 320), ("to_k", context), ("to_v", context), ("to_out_0", 320)):
                name = f"{BLOCK}.attentions_{attention}_transformer_blocks_0_{kind}_{part}"
                tensors |= _convolution(f"{name}.conv_in", 320, MAP[0])
                tensors |= _convolution(f"{name}.conv_out", width, MAP[1])
    return _halved(tensors)


def write(folder: Path) -> tuple[Path, Path]:
    """The two files in `folder`: generators and adapters."""
    paths = folder / "mask_generators.pth", folder / "adapters.pth"
    for path, tensors in zip(paths, (generators(), adapters())):
        torch.save(tensors, path)
    return paths
