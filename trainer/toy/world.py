"""Renders the toy world: pictures of one or two coloured shapes, with captions.

Everything is vectorised over scenes and seeded by the generator that is passed in.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maskunet_core.toy.captions import Caption, Phrase
from maskunet_core.toy.vocabulary import COLOURS, SHAPES

PIXELS = 64
CELL, PLACES = 8, 5
"""Objects sit near the points of a lattice of PLACES x PLACES, CELL pixels apart, in the middle of the picture."""
RADII = ((7.8, 8.4), (12.0, 12.6))
"""Ranges of the radius in pixels, small and large."""


@dataclass
class Scenes:
    """N scenes of at most two objects.

    present: [N, 2] bool; colour, shape, size: [N, 2] indices; centre: [N, 2, 2] pixels, x then y;
    radius, angle: [N, 2], pixels and radians. Object 0 is always present; object pairs never share colour and shape.
    """

    present: Tensor
    colour: Tensor
    shape: Tensor
    size: Tensor
    centre: Tensor
    radius: Tensor
    angle: Tensor

    def __len__(self) -> int:
        return len(self.present)

    def __getitem__(self, index) -> "Scenes":
        return Scenes(**{name: value[index] for name, value in vars(self).items()})

    @property
    def pair(self) -> Tensor:
        """[N, 2] index of the colour-shape pair, as the readers count them."""
        return self.colour * len(SHAPES) + self.shape


def sample_scenes(
    count: int, generator: torch.Generator, two_objects: float = 0.5, rotation: float = 0.1, jitter: float = 1.0
) -> Scenes:
    """Random scenes; a share of `two_objects` holds two, side by side or one above the other.

    rotation: range of the angles in radians, around upright. jitter: how far, in pixels along each axis, a centre may
    lie from its point of the lattice (1.5 at most, or objects may touch).
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def choice(options: int | Tensor, *shape: int) -> Tensor:
        return (uniform(*shape) * options).long()

    colour, shape, size = (choice(options, count, 2) for options in (len(COLOURS), len(SHAPES), len(RADII)))
    same = (colour[:, 0] == colour[:, 1]) & (shape[:, 0] == shape[:, 1])
    shift = 1 + choice(len(SHAPES) - 1, count)
    shape[:, 1] = torch.where(same, (shape[:, 1] + shift) % len(SHAPES), shape[:, 1])
    low, high = torch.tensor(RADII)[size].unbind(-1)

    # One object: anywhere. Two: apart along one axis (two large ones further), close to level along the other.
    anywhere = choice(PLACES, count, 2, 2)
    distance = 3 + size.amin(1)
    before = choice(PLACES - distance, count)
    after = before + distance + choice(PLACES - distance - before, count)
    level = choice(PLACES, count)
    across = torch.stack([level, (level + choice(3, count) - 1).clamp(0, PLACES - 1)], 1)
    apart = torch.stack([torch.stack([before, after], 1), across], -1)
    apart = torch.where(uniform(count, 1, 1) < 0.5, apart.flip(-1), apart)

    two = uniform(count) < two_objects
    place = torch.where(two[:, None, None], apart, anywhere)
    margin = PIXELS / 2 - CELL * (PLACES - 1) / 2
    return Scenes(
        present=torch.stack([torch.ones_like(two), two], 1),
        colour=colour,
        shape=shape,
        size=size,
        centre=margin + CELL * place + jitter * (2 * uniform(count, 2, 2) - 1),
        radius=low + (high - low) * uniform(count, 2),
        angle=(uniform(count, 2) - 0.5) * rotation,
    )


def _circle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.hypot(x, y) - radius


def _square(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.85 * radius


def _triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - 0.55 * radius


def _star(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    tip, notch, tenth = 1.15, 0.48, math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + tenth, 2 * tenth) - tenth
    length = torch.hypot(x, y)
    edge_x, edge_y = notch * math.cos(tenth) - tip, notch * math.sin(tenth)
    across = edge_y * (length * angle.cos() - tip * radius) - edge_x * length * angle.sin().abs()
    return across / math.hypot(edge_x, edge_y)


def _ring(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.76 * radius).abs() - 0.24 * radius


def _cross(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    ax, ay, bar = x.abs(), y.abs(), 0.34 * radius
    return torch.minimum(torch.maximum(ax - radius, ay - bar), torch.maximum(ay - radius, ax - bar))


_DISTANCES = (_circle, _square, _triangle, _star, _ring, _cross)
"""Signed distance to the outline (pixels, negative inside), in the order of SHAPES."""


def ordinary_background(count: int, generator: torch.Generator) -> Tensor:
    """`[N, 3, 64, 64]`: tinted grey with a slight ramp."""
    axis = torch.arange(PIXELS) + 0.5
    grey = 0.42 + 0.22 * torch.rand(count, 1, generator=generator)
    tint = 0.06 * (torch.rand(count, 3, generator=generator) - 0.5)
    shade = 0.08 * (torch.rand(count, 2, generator=generator) - 0.5)
    ramp = shade[:, 0, None, None] * (axis / PIXELS - 0.5) + shade[:, 1, None, None] * (axis / PIXELS - 0.5)[:, None]
    return (grey + tint)[:, :, None, None] + ramp[:, None]


def render(scenes: Scenes, generator: torch.Generator, background: Tensor | None = None) -> Tensor:
    """Pictures `[N, 3, 64, 64]` in [0, 1]: flat shapes before a background (None: the ordinary one)."""
    count = len(scenes)
    axis = torch.arange(PIXELS) + 0.5
    pictures = ordinary_background(count, generator) if background is None else background
    palette = torch.tensor(list(COLOURS.values()))
    for k in range(2):
        cos, sin = scenes.angle[:, k].cos()[:, None, None], scenes.angle[:, k].sin()[:, None, None]
        dx = axis[None, None, :] - scenes.centre[:, k, 0, None, None]
        dy = axis[None, :, None] - scenes.centre[:, k, 1, None, None]
        x, y, radius = cos * dx + sin * dy, cos * dy - sin * dx, scenes.radius[:, k, None, None]
        distance = torch.empty_like(x)
        for index, signed_distance in enumerate(_DISTANCES):
            these = scenes.shape[:, k] == index
            distance[these] = signed_distance(x[these], y[these], radius[these])
        cover = (0.5 - distance).clamp(0, 1) * scenes.present[:, k, None, None]
        jitter = 0.06 * (torch.rand(count, 3, generator=generator) - 0.5)
        colour = palette[scenes.colour[:, k]] + jitter
        pictures = torch.lerp(pictures, colour[:, :, None, None], cover[:, None])
    return pictures.clamp(0, 1)


def _relation(first: Tensor, second: Tensor) -> int:
    dx, dy = (second - first).tolist()
    if abs(dx) > abs(dy):
        return 0 if dx > 0 else 1
    return 2 if dy > 0 else 3


def describe(scenes: Scenes, generator: torch.Generator) -> list[Caption]:
    """True captions: sizes are said half of the time, half of the pairs are told by their relation."""
    coins = torch.rand(len(scenes), 4, generator=generator).tolist()
    fields = zip(scenes.present[:, 1].tolist(), scenes.colour.tolist(), scenes.shape.tolist(), scenes.size.tolist())
    captions = []
    for n, (two, colour, shape, size) in enumerate(fields):
        phrases = [Phrase(colour[k], shape[k], size[k] if coins[n][k] < 0.5 else None) for k in range(1 + two)]
        order = (1, 0) if two and coins[n][2] < 0.5 else tuple(range(1 + two))
        relation = None
        if two and coins[n][3] < 0.5:
            relation = _relation(scenes.centre[n, order[0]], scenes.centre[n, order[1]])
        captions.append(Caption(tuple(phrases[k] for k in order), relation))
    return captions


def misdescribe(caption: Caption, generator: torch.Generator) -> Caption:
    """A web-like wrong caption: another colour or shape, an object left out, or the relation turned round."""
    kind, which, shift = torch.randint(1 << 30, (3,), generator=generator).tolist()
    options = ["colour", "shape"] + (["missing"] if len(caption.phrases) == 2 else [])
    options += ["relation"] if caption.relation is not None else []
    wrong = options[kind % len(options)]
    phrases, relation = list(caption.phrases), caption.relation
    k = which % len(phrases)
    if wrong == "colour":
        colour = (phrases[k].colour + 1 + shift % (len(COLOURS) - 1)) % len(COLOURS)
        phrases[k] = Phrase(colour, phrases[k].shape, phrases[k].size)
    elif wrong == "shape":
        shape = (phrases[k].shape + 1 + shift % (len(SHAPES) - 1)) % len(SHAPES)
        phrases[k] = Phrase(phrases[k].colour, shape, phrases[k].size)
    elif wrong == "missing":
        del phrases[k]
        relation = None
    else:
        relation ^= 1
    return Caption(tuple(phrases), relation)


def sample_captioned(
    count: int, generator: torch.Generator, caption_noise: float = 0.0, held_out: bool = False
) -> tuple[Scenes, list[Caption]]:
    """Scenes with captions, all of them inside (`held_out`) or outside the held-out set.

    caption_noise: share of captions that `misdescribe` makes wrong.
    """
    parts, captions = [], []
    while len(captions) < count:
        scenes = sample_scenes(max(256, (count - len(captions)) * (6 if held_out else 2)), generator)
        found = describe(scenes, generator)
        wrong = (torch.rand(len(found), generator=generator) < caption_noise).tolist()
        found = [misdescribe(c, generator) if bad else c for c, bad in zip(found, wrong)]
        keep = [n for n, caption in enumerate(found) if caption.held_out == held_out][: count - len(captions)]
        parts.append(scenes[torch.tensor(keep, dtype=torch.long)])
        captions += [found[n] for n in keep]
    merged = {name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    return Scenes(**merged), captions
