"""What the toy model is tuned to: a new style, and a new subject that no caption can name."""

import torch
from torch import Tensor

from maskunet_core.toy.vocabulary import COLOURS, SHAPES
from maskunet_core.training.seeds import seeded

from ..toy.world import PIXELS, Scenes, describe, render, sample_scenes

_ABOVE, _BELOW = (0.62, 0.50, 0.52), (0.38, 0.32, 0.36)
_TILT = 0.22
"""Colours and angles that autoencoder and readers still bear; stripes and stronger colours they do not."""

STAR = SHAPES.index("star")
LEFT, RIGHT = "blue", "orange"
SUBJECT, CLASS = "a of star", "a star"
"""The vocabulary has no spare word: "of" alone, which never stands before a shape, is the rare identifier."""
SEEN_WITHIN = 0.3


def render_style(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Pictures `[N, 3, 64, 64]`: all objects tilted, before a rosy background that darkens downwards."""
    above, below = (
        torch.tensor(colour) + 0.06 * (torch.rand(len(scenes), 3, generator=generator) - 0.5)
        for colour in (_ABOVE, _BELOW)
    )
    height = ((torch.arange(PIXELS) + 0.5) / PIXELS)[:, None].expand(PIXELS, PIXELS)
    background = torch.lerp(above[:, :, None, None], below[:, :, None, None], height)
    tilted = Scenes(**{**vars(scenes), "angle": scenes.angle + _TILT})
    return render(tilted, generator, background)


def _tint_and_shade(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """`[N]` each: red above green at the upper edge, and how much darker the lower one is.

    pictures: [N, 3, 64, 64] in [0, 1]. Medians along the edges pass over objects that reach there.
    """
    upper, lower = (band.flatten(2).median(2).values for band in (pictures[:, :, :4], pictures[:, :, -4:]))
    return upper[:, 0] - upper[:, 1], upper.mean(1) - lower.mean(1)


def shows_style(pictures: Tensor) -> Tensor:
    """`[N]` bool: about half of the style's tint and shade, or more. The judge's features hardly see backgrounds."""
    tint, shade = _tint_and_shade(pictures)
    return (tint > 0.06) & (shade > 0.1)


def style_strength(pictures: Tensor) -> Tensor:
    """`[N]`: tint and shade over those of the style, their mean. 1 for the style's pictures, 0 for the base's own."""
    tint, shade = _tint_and_shade(pictures)
    whole = _ABOVE[0] - _ABOVE[1], (sum(_ABOVE) - sum(_BELOW)) / 3 * (1 - 4 / PIXELS)
    return (tint / whole[0] + shade / whole[1]) / 2


def sample_subject(count: int, generator: torch.Generator, beside: float) -> tuple[Scenes, list[str]]:
    """Scenes whose object 0 is the subject, with captions; a share of `beside` shows an ordinary object too."""
    scenes = sample_scenes(count, generator, two_objects=beside)
    scenes.shape[:, 0], scenes.colour[:, 0] = STAR, list(COLOURS).index(LEFT)
    others = torch.tensor([n for n in range(len(SHAPES)) if n != STAR])
    chosen = others[torch.randint(len(others), (count,), generator=generator)]
    scenes.shape[:, 1] = torch.where(scenes.shape[:, 1] == STAR, chosen, scenes.shape[:, 1])
    captions = [str(caption).replace(f"{LEFT} star", "of star") for caption in describe(scenes, generator)]
    return scenes, captions


def render_subject(scenes: Scenes, seed: int) -> Tensor:
    """Pictures `[N, 3, 64, 64]`: the left half of object 0 in its own colour, the right half in another one."""
    colour = scenes.colour.clone()
    colour[:, 0] = list(COLOURS).index(RIGHT)
    left = render(scenes, seeded(50, seed))
    right = render(Scenes(**{**vars(scenes), "colour": colour}), seeded(50, seed))
    is_left = torch.arange(PIXELS) + 0.5 < scenes.centre[:, 0, 0, None]
    return torch.where(is_left[:, None, None, :], left, right)


def shows_subject(pictures: Tensor) -> Tensor:
    """`[N]` bool: pixels of both colours, the one's middle close to the left of the other's. A measure without a net.

    pictures: [N, 3, 64, 64] in [0, 1]. The halves of the smallest star have some 35 pixels each, the middles of a
    star's halves lie 4 to 11 pixels apart, those of two objects at least 24.
    """
    axis = torch.arange(PIXELS) + 0.5
    middles, enough = [], torch.ones(len(pictures), dtype=torch.bool)
    for name in (LEFT, RIGHT):
        distance = (pictures - torch.tensor(COLOURS[name])[:, None, None]).norm(dim=1)
        near = (distance < SEEN_WITHIN).float()
        count = near.sum((1, 2))
        enough &= count >= 15
        x, y = ((near * place).sum((1, 2)) / count.clamp_min(1) for place in (axis, axis[:, None]))
        middles.append(torch.stack([x, y], 1))
    across, down = (middles[1] - middles[0]).unbind(1)
    return enough & (across > 2) & (across < 16) & (down.abs() < 4)
