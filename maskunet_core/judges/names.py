"""Tensors of one layout under the names of another."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..rewards.layers import BadTensors


def renamed(tensors: Mapping[str, Tensor], patterns: Mapping[str, str | Callable]) -> dict[str, Tensor]:
    """By regular expressions, applied one after the other."""
    found = {}
    for name, value in tensors.items():
        for old, new in patterns.items():
            name = re.sub(old, new, name)
        found[name] = value
    return found


def joined(tensors: Mapping[str, Tensor], groups: Iterable[Sequence[str]]) -> dict[str, Tensor]:
    """groups: parts of names of tensors that are kept apart, and in the last place that of all of them in one.

    Raises BadTensors where one is missing.
    """
    found = dict(tensors)
    for *apart, whole in groups:
        for name in [name for name in found if f".{apart[0]}" in name]:
            parts = [name.replace(apart[0], part) for part in apart]
            for part in parts:
                if part not in found:
                    raise BadTensors(f"lacks the tensor {part}")
            found[name.replace(apart[0], whole)] = torch.cat([found.pop(part) for part in parts])
    return found
