"""Pictures as the judges' references read them: by Pillow, to the grey level."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def levels(picture: Image.Image) -> Tensor:
    """`[3, H, W]` grey levels 0 to 255, uint8."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0)


def central_square(picture: Image.Image, side: int) -> Image.Image:
    """The central square, then bicubic to `side`."""
    width, height = picture.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    picture = picture.convert("RGB").crop((left, top, left + short, top + short))
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def square(picture: Image.Image, side: int) -> Image.Image:
    """Short side to `side` (bicubic), then the central square: as CLIP sees a picture."""
    width, height = picture.size
    short = min(width, height)
    size = tuple(side if length == short else int(side * length / short) for length in (width, height))
    picture = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)
    return picture.crop((left, top, left + side, top + side))
