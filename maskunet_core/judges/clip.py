"""Pictures as CLIP embeds them, resized by Pillow as its references do."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from ..rewards.clip import ClipReward
from ..rewards.preprocess import normalise
from .pictures import levels, square


@torch.no_grad()
def embedded(clip: ClipReward, pictures: Sequence[Image], framed: Callable[[Image, int], Image] = square) -> Tensor:
    """`[N, E]`, of length 1, on the CPU. framed: a picture as the square of that side that CLIP sees."""
    tower = clip.image
    pixels = torch.stack([levels(framed(picture, tower.size)) for picture in pictures]).float() / 255
    pixels = normalise(pixels.to(tower.conv1.weight.device))
    return F.normalize(tower(pixels).float(), dim=-1).cpu()
