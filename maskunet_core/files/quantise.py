"""Four bits per logit on disk, for generators with a bias per weight."""

import torch
from torch import Tensor

LEVELS = 16


def pack(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two values per byte: `[ceil(N / 2)]` uint8 and the step (fp32 scalar).

    The levels lie half a step beside zero and symmetric around it, so that no value changes its sign.
    """
    flat = values.detach().float().flatten()
    step = flat.abs().max().clamp_min(1e-12) / (LEVELS / 2 - 0.5)
    level = (torch.floor(flat / step) + LEVELS // 2).clamp(0, LEVELS - 1).to(torch.uint8)
    if len(level) % 2:
        level = torch.cat([level, level.new_zeros(1)])
    return level[0::2] | (level[1::2] << 4), step


def unpack(packed: Tensor, step: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack`, to within half a step; fp32."""
    levels = torch.stack([packed & 15, packed >> 4], dim=1).flatten()
    count = 1
    for size in shape:
        count *= size
    return ((levels[:count].float() - (LEVELS // 2 - 0.5)) * step).reshape(shape)


def packed_size(shape: tuple[int, ...]) -> int:
    """Bytes that `pack` makes of a tensor of this shape."""
    return (torch.Size(shape).numel() + 1) // 2
