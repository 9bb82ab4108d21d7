"""The blocks of a U-Net that come before all masks run once and serve many calls with the same input."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .shadow import Shadowed

_MOST_KEPT = 16
"""Inputs whose features are kept: more come from nodes that cut the picture into many parts."""


class Prefix:
    """Features of the first blocks of ComfyUI's UNetModel, by what they were computed from.

    Meant for one step of a sampler. What acts between the blocks (ControlNet's residuals) still acts in every call.
    """

    def __init__(self, blocks: Sequence[nn.Sequential]):
        self.blocks = blocks
        self._known: list[tuple[list[Tensor], list[Tensor]]] = []

    @contextlib.contextmanager
    def serving(self, *inputs: Any) -> Iterator[None]:
        """For one call with these inputs, of which all tensors count. Inputs that were seen before are not computed."""
        tensors = list(_tensors(inputs))
        features = next((features for known, features in self._known if same(known, tensors)), None)
        if features is not None:
            with self._serve(features):
                yield
            return
        features = [torch.empty(0)] * len(self.blocks)
        with self._record(features):
            yield
        if len(self._known) < _MOST_KEPT:
            self._known.append((tensors, features))

    def _record(self, features: list[Tensor]) -> Shadowed:
        def forward_of(layer: nn.Module, index: int):
            compute = layer.forward

            def forward(*args: Any, **kwargs: Any) -> Tensor:
                result = compute(*args, **kwargs)
                # The host adds ControlNet's residuals in place: both sides keep a tensor of their own.
                features[index] = result.detach().clone()
                return result

            return forward

        return Shadowed((block[-1], {"forward": forward_of(block[-1], n)}) for n, block in enumerate(self.blocks))

    def _serve(self, features: list[Tensor]) -> Shadowed:
        shadows = []
        for block, result in zip(self.blocks, features):
            shadows += [(layer, {"forward": _unchanged}) for layer in list(block)[:-1]]
            shadows.append((block[-1], {"forward": lambda *_, result=result, **__: result.clone()}))
        return Shadowed(shadows)


def _unchanged(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether two lists hold tensors of the same shapes and values."""
    if len(some) != len(others) or any(a.shape != b.shape for a, b in zip(some, others)):
        return False
    return all(a is b or torch.equal(a, b) for a, b in zip(some, others))
