"""Texts among what judges say of pictures: files of rows hold tensors alone."""

import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from maskunet_core.judges.verdict import Seen

REASON, SEEN = "reason", "seen"
"""Columns: what is wrong with a picture, or why it has its score; the objects in it."""


def to_column(texts: Sequence[str]) -> Tensor:
    """`[N, L]` bytes, with spaces behind the shorter ones."""
    rows = [text.encode() for text in texts]
    longest = max(len(row) for row in rows)
    return torch.tensor([list(row.ljust(longest)) for row in rows], dtype=torch.uint8)


def is_text(row: Tensor) -> bool:
    return row.dtype == torch.uint8 and row.ndim == 1


def to_text(row: Tensor) -> str:
    return bytes(row.tolist()).decode().rstrip(" ")


def seen_as_text(seen: Iterable[Seen]) -> str:
    return json.dumps([[one.name, [round(float(side), 1) for side in one.box], one.asked] for one in seen])


def seen_from_text(text: str) -> list[Seen]:
    return [Seen(name, tuple(box), asked) for name, box, asked in json.loads(text)]
