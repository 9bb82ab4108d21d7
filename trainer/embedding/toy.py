"""What the toy model learns words for: a word of its vocabulary that captions lack, and a relation without a word."""

import io
import math
from functools import partial

import torch
from torch import Tensor

from maskunet_core.toy.judge import fully_right
from maskunet_core.toy.readers import Reading
from maskunet_core.toy.vocabulary import COLOURS, SHAPES, SIZES
from maskunet_core.training.seeds import seeded

from ..config import Config
from ..data.decoding import Record
from ..sheets import to_image
from ..toy.world import CELL, PIXELS, PLACES, Caption, Scenes, describe, render, sample_scenes
from .word import MARK

DIAGONAL = "diagonal"
"""The relation: the first object lies above the second and left of it, as far as above."""
TAUGHT = (*COLOURS, *SHAPES, *SIZES, DIAGONAL)
STEEP, FLAT = math.radians(65), math.radians(25)
"""Angles between which two objects count as diagonal. The toy world's own pairs lie within 25 degrees of an axis."""


def text_of(caption: Caption, taught: str) -> str:
    """The caption with `{}` in the place of the word that is taught."""
    if taught == DIAGONAL:
        first, second = caption.phrases
        return f"{first} {MARK} {second}"
    return " ".join(MARK if word == taught else word for word in str(caption).split())


def _diagonal(count: int, stream: torch.Generator) -> Scenes:
    scenes = sample_scenes(count, stream, two_objects=1.0)
    distance = 3 + (torch.rand(count, 1, generator=stream) * 2).long().clamp_max(1)
    first = (torch.rand(count, 2, generator=stream) * (PLACES - distance)).long()
    margin = PIXELS / 2 - CELL * (PLACES - 1) / 2
    places = torch.stack([first, first + distance], 1)
    scenes.centre = margin + CELL * places + 2 * torch.rand(count, 2, 2, generator=stream) - 1
    return scenes


def lesson(taught: str, count: int, stream: torch.Generator, held_out: bool = False) -> tuple[Scenes, list[Caption]]:
    """Scenes that show what is taught, with captions that say it, of the held-out fifth or of the others."""
    parts: list[Scenes] = []
    captions: list[Caption] = []
    while len(captions) < count:
        scenes = _diagonal(256, stream) if taught == DIAGONAL else sample_scenes(256, stream)
        found = describe(scenes, stream)
        if taught == DIAGONAL:
            # In the order of the objects: the relation has a direction.
            found = [Caption(_in_order(caption, pair), None) for caption, pair in zip(found, scenes.pair.tolist())]
        fit = [
            n for n, caption in enumerate(found) if caption.held_out == held_out and MARK in text_of(caption, taught)
        ]
        fit = fit[: count - len(captions)]
        parts.append(scenes[torch.tensor(fit, dtype=torch.long)])
        captions += [found[n] for n in fit]
    merged = {name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    return Scenes(**merged), captions


def _in_order(caption: Caption, pairs: list[int]) -> tuple:
    return tuple(sorted(caption.phrases, key=lambda phrase: pairs.index(phrase.pair)))


def rendered(config: Config) -> list[Record]:
    """`data.pictures` pictures as files, each with its text."""
    taught, stream = config.embedding.toy, seeded(27, config.seed)
    scenes, captions = lesson(taught, config.data.pictures, stream)
    pictures = render(scenes, stream).movedim(1, -1)
    return [
        Record(f"{number:05d}.png", text_of(caption, taught), partial(_png, picture))
        for number, (picture, caption) in enumerate(zip(pictures, captions))
    ]


def _png(picture: Tensor) -> bytes:
    file = io.BytesIO()
    to_image(picture).save(file, format="PNG")
    return file.getvalue()


def shows(reading: Reading, captions: list[Caption], taught: str) -> Tensor:
    """`[N]` bool: whether pictures show just the objects of their captions, and of the relation where those stand."""
    right = fully_right(reading, captions)
    if taught != DIAGONAL:
        return right
    pairs = torch.tensor([[phrase.pair for phrase in caption.phrases] for caption in captions])
    first, second = reading.position[torch.arange(len(pairs))[:, None], pairs].unbind(1)
    across, down = (second - first).unbind(1)
    angle = torch.atan2(down, across)
    return right & (angle > FLAT) & (angle < STEEP)
