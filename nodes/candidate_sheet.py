"""The candidates of a search, side by side: what was paid for, and what was chosen."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .legend import captioned
from .pictures import reduced

LARGEST = 256
"""Side in pixels to which pictures of candidates are scaled down, and to a half of which small ones are scaled up."""
_FRAME = 6
Colour = tuple[float, float, float]
CHOSEN, PAPER = (0.13, 0.77, 0.37), 24 / 255
NONE = "No candidates were judged: set candidates to 2 or more."


def small(pictures: Tensor) -> Tensor:
    """Pictures `[N, 3, H, W]` as bytes on the CPU, no larger than LARGEST: what is kept of a candidate."""
    return (reduced(pictures, LARGEST).clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def candidate_sheets(pictures: list[Tensor], scores: list[Tensor], seeds: list[int], chosen: Tensor) -> Tensor:
    """`[N, H, W, 3]`, a sheet for each image of the batch: every candidate with its seed and score, the best framed.

    pictures: `[N, 3, h, w]` of each candidate, by `small`; scores: `[N]` of each; chosen: `[N]`, numbers of candidates.
    """
    if not pictures:
        return captioned(torch.full((len(chosen), LARGEST // 2, LARGEST, 3), PAPER), [[NONE]] * len(chosen))
    factor = math.ceil(LARGEST / 2 / max(pictures[0].shape[-2:]))
    large = [picture.repeat_interleave(factor, -1).repeat_interleave(factor, -2) for picture in pictures]
    tiles = torch.stack(large, 1).movedim(2, -1).float() / 255
    lines = [
        [f"seed {seed}", f"{float(score[n]):.3f}"] for n in range(len(tiles)) for seed, score in zip(seeds, scores)
    ]
    tiles = captioned(tiles.flatten(0, 1), lines).unflatten(0, tiles.shape[:2])
    return torch.stack([sheet_of(row, {int(best): CHOSEN}) for row, best in zip(tiles, chosen)])


def sheet_of(tiles: Tensor, frames: Mapping[int, Colour]) -> Tensor:
    """`[H, W, 3]` of tiles `[C, h, w, 3]`, row by row, about as wide as high. frames: colours of some."""
    count, height, width = tiles.shape[:3]
    columns = min(count, max(1, round(math.sqrt(count * height / width) + 0.25)))
    rows, high, wide = -(-count // columns), height + 2 * _FRAME, width + 2 * _FRAME
    sheet = torch.full((rows * high, columns * wide, 3), PAPER)
    for n, tile in enumerate(tiles):
        top, left = n // columns * high, n % columns * wide
        if n in frames:
            sheet[top : top + high, left : left + wide] = torch.tensor(frames[n])
        sheet[top + _FRAME : top + _FRAME + height, left + _FRAME : left + _FRAME + width] = tile
    return sheet
