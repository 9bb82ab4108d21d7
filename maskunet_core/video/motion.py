"""How the frames of a video begin: one noisy latent, moved by a step for each frame, with fresh noise.

A latent is the sampler's own, `[1, C, h, w]`, whose noise has the standard deviation sigma.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choices import MOTION_SIDE
from ..masks.sources import noise_generator

_SHOWN_THROUGH = 0.6
"""How much of the first frame a smoothed background takes, as published."""
_GROWN = 5
"""Cells of the square by which a foreground grows, as published."""


@dataclass(frozen=True)
class Motion:
    """Of the picture from one frame to the next, in pixels of a picture with sides of MOTION_SIDE.

    Content moves to the left for x > 0 and up for y > 0.
    """

    x: float = 12.0
    y: float = 12.0


def source_cells(cells: int, pixels: float) -> Tensor:
    """For each of so many cells in a row the one whose content it gets, when all is moved by `pixels`.

    Beyond its ends the row is mirrored. Published as the sampling of a picture by a field of motion that is resized
    to the latent; this is its closed form.
    """
    # In float32 and in this order, as published: at halves of a cell it decides which cell is taken.
    place = torch.arange(cells, dtype=torch.float32) + (pixels - 0.5) * cells / MOTION_SIDE
    place = torch.remainder(place + 0.5, 2 * cells)
    mirrored = torch.minimum(place, 2 * cells - place) - 0.5
    return mirrored.round().long().clamp(0, cells - 1)


def moved(latent: Tensor, motion: Motion, frame: int) -> Tensor:
    """`[..., h, w]`: the frame of this number, of which `latent` is number 0."""
    height, width = latent.shape[-2:]
    rows = source_cells(height, motion.y * frame).to(latent.device)
    columns = source_cells(width, motion.x * frame).to(latent.device)
    return latent[..., rows[:, None], columns]


def later_frames(latent: Tensor, frames: int, motion: Motion, noise: float, seed: int) -> Tensor:
    """Starts `[frames - 1, C, h, w]` of all frames but the first, made of a latent of the first `[1, C, h, w]`.

    noise: standard deviation of what is added. A frame's noise is drawn from the seed and its number alone, so it does
    not depend on how many frames there are, or which are drawn together.
    """
    starts = [latent[:0]]
    for frame in range(1, frames):
        stream = noise_generator(torch.device("cpu"), seed, frame, None)
        added = torch.randn(latent.shape, generator=stream)
        starts.append(moved(latent, motion, frame) + noise * added.to(latent))
    return torch.cat(starts)


def foregrounds(masks: Tensor, frames: int, motion: Motion, height: int, width: int) -> Tensor:
    """`[frames, h, w]` bool, grown a little. masks: `[frames, H, W]` in [0, 1], or `[1, H, W]`, which moves along."""
    cells = F.interpolate(masks[:, None].float(), size=(height, width), mode="area") > 0.5
    if len(cells) == 1:
        cells = torch.cat([moved(cells, motion, frame) for frame in range(frames)])
    return F.max_pool2d(cells.float(), _GROWN, stride=1, padding=_GROWN // 2)[:, 0] > 0


def smoothed_background(starts: Tensor, foreground: Tensor, motion: Motion) -> Tensor:
    """Starts of all frames `[frames, C, h, w]` whose backgrounds are mostly the first frame's, moved.

    foreground: `[frames, h, w]` bool. What the first frame's covers is nowhere taken for a background.
    """
    frames = []
    for frame, (start, own) in enumerate(zip(starts, foreground)):
        background = ~(own | moved(foreground[0], motion, frame))
        mixed = (1 - _SHOWN_THROUGH) * start + _SHOWN_THROUGH * moved(starts[0], motion, frame)
        frames.append(torch.where(background, mixed, start))
    return torch.stack(frames)
