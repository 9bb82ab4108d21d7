"""IMAGEs as the nodes that judge them take and show them."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..maskunet_core.errors import MaskUNetError


def coloured(images: Tensor, name: str) -> Tensor:
    """`[B, H, W, 3]`. A picture of one channel is grey; what comes after the third is transparency.

    name: of the input, for the message where it holds nothing.
    """
    if not len(images):
        raise MaskUNetError(f"The batch at '{name}' holds no picture to score. Connect one that does.")
    return images[..., :3] if images.shape[-1] >= 3 else images[..., :1].expand(*images.shape[:-1], 3)


def to_pillow(picture: Tensor) -> Image.Image:
    """`[H, W, 3]` in [0, 1], rounded to grey levels; what is no number is black."""
    levels = (picture.float().nan_to_num(0.0).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.numpy())


def enlarged(picture: Tensor, least: int) -> Tensor:
    """`[H, W, 3]`, each pixel as often as its longer side needs to be `least` long."""
    factor = max(1, -(-least // max(picture.shape[:2])))
    return picture.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def padded(pictures: list[Tensor], paper: float) -> Tensor:
    """`[N, H, W, 3]` of pictures `[h, w, 3]`, each in the middle of a ground as large as the largest of them needs."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    result = torch.full((len(pictures), height, width, 3), paper)
    for place, picture in zip(result, pictures):
        h, w = picture.shape[:2]
        top, left = (height - h) // 2, (width - w) // 2
        place[top : top + h, left : left + w] = picture
    return result


def reduced(pictures: Tensor, most: float) -> Tensor:
    """`[N, 3, H, W]` with longer sides of `most` pixels at most."""
    factor = most / max(pictures.shape[-2:])
    return F.interpolate(pictures.float(), scale_factor=factor, mode="area") if factor < 1 else pictures


def brought_to(picture: Tensor, least: int, most: float) -> Tensor:
    """`[H, W, 3]` with a longer side of at least so many pixels, as `enlarged`, and of at most so many."""
    return enlarged(reduced(picture.movedim(-1, 0)[None], most)[0].movedim(0, -1), least)
