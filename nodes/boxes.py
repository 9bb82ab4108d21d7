"""What a judge saw, drawn into the picture."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..maskunet_core.judges.verdict import Seen, Verdict
from .pictures import brought_to, to_pillow

LEAST = 384
"""Side in pixels to which small pictures are enlarged: labels are readable there."""
_ASKED, _OTHER, _INK = (34, 197, 94), (245, 158, 11), (9, 9, 11)
Rectangle = tuple[float, float, float, float]


def boxed(picture: Tensor, verdict: Verdict, least: int = LEAST, most: float = math.inf) -> Tensor:
    """`[H, W, 3]`: boxes with names, green around what the prompt names, else amber.

    picture: `[h, w, 3]` in [0, 1]. least, most: of the longer side, to which small and large pictures are brought.
    """
    large = brought_to(picture, least, most)
    factor = large.shape[0] / picture.shape[0]
    canvas = to_pillow(large)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(14, max(canvas.size) // 36))
    boxes = [(seen, tuple(side * factor for side in seen.box)) for seen in verdict.seen]
    for seen, box in boxes:
        draw.rectangle(box, outline=_colour(seen), width=max(2, max(canvas.size) // 256))
    labels: list[Rectangle] = []
    for seen, box in boxes:
        labels.append(_label(canvas, draw, font, seen, box, labels))
    return torch.from_numpy(np.asarray(canvas, np.float32) / 255)


def _colour(seen: Seen) -> tuple[int, int, int]:
    return _ASKED if seen.asked else _OTHER


def _label(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    seen: Seen,
    box: Rectangle,
    others: list[Rectangle],
) -> Rectangle:
    """Draws a name above its box, or below or inside it where the picture ends or another name stands."""
    ascent, descent = font.getmetrics()
    wide, high = font.getlength(seen.name) + 6, ascent + descent
    left = max(0.0, min(box[0], canvas.width - wide))
    tops = (box[1] - high, box[3], box[1], box[3] - high)
    places = [(left, top, left + wide, top + high) for top in tops]
    inside = [place for place in places if place[1] >= 0 and place[3] <= canvas.height] or places[2:]
    chosen = next((place for place in inside if not any(_meet(place, other) for other in others)), inside[0])
    draw.rectangle(chosen, fill=_colour(seen))
    draw.text((chosen[0] + 3, chosen[1]), seen.name, _INK, font)
    return chosen


def _meet(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
