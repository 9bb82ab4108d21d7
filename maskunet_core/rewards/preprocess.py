"""From pictures of any size to the square that a model looks at. Differentiable; nothing is clamped."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)


def fit(images: Tensor, size: int) -> Tensor:
    """Short side to `size` (bicubic, antialiased), then the central square: torchvision's Resize and CenterCrop.

    images: [B, 3, H, W] in fp32 (the CPU resizes nothing else). A picture that already fits stays as it is.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    height, width = (size if side == short else int(size * side / short) for side in (height, width))
    top, left = (round((side - size) / 2) for side in (height, width))
    return _resize(images, height, width)[:, :, top : top + size, left : left + size]


def letterbox(images: Tensor, size: int) -> Tensor:
    """Longest side to `size`, black bars around: what HPSv2's published scores were made with."""
    height, width = images.shape[2:]
    scale = size / max(height, width)
    # A picture far longer than wide still has a line of pixels.
    height, width = (max(1, round(side * scale)) for side in (height, width))
    across, down = size - width, size - height
    bars = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(_resize(images, height, width), bars)


@cache
@torch.inference_mode(False)
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[3, 1, 1]`. Kept: to send them anew would make a device wait at every call."""
    mean, std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (_MEAN, _STD))
    return mean, std


def normalise(pictures: Tensor) -> Tensor:
    """CLIP's mean and standard deviation, which all published rewards here share."""
    mean, std = _statistics(pictures.device)
    return (pictures - mean) / std
