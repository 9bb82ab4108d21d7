"""Prompts of the toy world that no training saw, for settings and for tables."""

import torch
from torch import Tensor

from maskunet_core.toy.captions import Caption
from maskunet_core.training.seeds import seeded

from .world import render, sample_captioned

KINDS = ("two", "relation")
TUNING, TABLE = 70, 71
"""Streams of prompts: settings are chosen on other prompts than those of the table."""


def held_out_prompts(count: int, stream: int) -> list[Caption]:
    """`count` different prompts that no training saw, of two objects and of relations in turn.

    Those of TUNING and of TABLE are disjoint.
    """
    _, captions = sample_captioned(40 * count + 4000, seeded(stream), held_out=True)
    mine = [caption for caption in dict.fromkeys(captions) if _half(caption) == stream % 2]
    of_kinds = zip(*([caption for caption in mine if caption.kind == kind] for kind in KINDS))
    return [caption for pair in of_kinds for caption in pair][:count]


def real_pictures(count: int) -> Tensor:
    """`[count, 3, 64, 64]` in [0, 1]: rendered pictures of the same kinds, which drawn ones are held against."""
    stream = seeded(73)
    scenes, captions = sample_captioned(2 * count, stream, held_out=True)
    rows = [n for n, caption in enumerate(captions) if caption.kind in KINDS][:count]
    return render(scenes[torch.tensor(rows)], stream)


def _half(caption: Caption) -> int:
    return sum(str(caption).encode()) % 2
