"""The blocks of a model that come before all masks run once and serve many calls with the same input."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .shadow import Shadowed

_MOST_KEPT = 16
"""Inputs whose features are kept: more come from nodes that cut the picture into many parts."""


class Prefix(ABC):
    """Features of the first blocks of a model, by what they were computed from.

    Meant for one step of a sampler. What acts between the blocks (ControlNet's residuals) still acts in every call.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self.blocks = blocks
        self._known: list[tuple[list[Tensor], list[Any]]] = []

    @contextlib.contextmanager
    def serving(self, *inputs: Any) -> Iterator[None]:
        """For one call with these inputs, of which all tensors count. Inputs that were seen before are not computed."""
        tensors = list(_tensors(inputs))
        features = next((features for known, features in self._known if same(known, tensors)), None)
        if features is not None:
            with self._serve(features):
                yield
            return
        features = [None] * len(self.blocks)
        with self._record(features):
            yield
        if len(self._known) < _MOST_KEPT:
            self._known.append((tensors, features))

    @abstractmethod
    def _record(self, features: list[Any]) -> Shadowed:
        """Inside the block the blocks compute, and their features are put into the list."""

    @abstractmethod
    def _serve(self, features: list[Any]) -> Shadowed:
        """Inside the block the blocks give these features without computing."""


def _recording(layer: nn.Module, keep: Callable[[Any], None]) -> tuple[nn.Module, dict[str, Any]]:
    compute = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        keep(result)
        return result

    return layer, {"forward": forward}


class UNetPrefix(Prefix):
    """Of ComfyUI's UNetModel, whose decoder takes the features of each block. blocks: `nn.Sequential`."""

    def _record(self, features: list[Tensor]) -> Shadowed:
        def keep(index: int, result: Tensor) -> None:
            # The host adds ControlNet's residuals in place: both sides keep a tensor of their own.
            features[index] = result.detach().clone()

        return Shadowed(_recording(block[-1], partial(keep, n)) for n, block in enumerate(self.blocks))

    def _serve(self, features: list[Tensor]) -> Shadowed:
        shadows = []
        for block, result in zip(self.blocks, features):
            shadows += [(layer, {"forward": _unchanged}) for layer in list(block)[:-1]]
            shadows.append((block[-1], {"forward": lambda *_, result=result, **__: result.clone()}))
        return Shadowed(shadows)


class TransformerPrefix(Prefix):
    """Of a transformer. The last block's results serve all others, of which the shapes alone are kept.

    blocks: in the order of execution, also those that prepare the tokens.
    """

    def _record(self, features: list[Any]) -> Shadowed:
        def keep(index: int, result: Any) -> None:
            last = index == len(self.blocks) - 1
            features[index] = _each(result, _own_copy if last else _blank)

        return Shadowed(_recording(block, partial(keep, n)) for n, block in enumerate(self.blocks))

    def _serve(self, features: list[Any]) -> Shadowed:
        # The host may write into what it gets.
        return Shadowed(
            (block, {"forward": lambda *_, result=result, **__: _each(result, torch.clone)})
            for block, result in zip(self.blocks, features)
        )


def _each(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's result with its tensors changed; some blocks give several, or None in one's place."""
    if isinstance(result, tuple):
        return tuple(_each(part, change) for part in result)
    return change(result) if isinstance(result, Tensor) else result


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _blank(tensor: Tensor) -> Tensor:
    """Zeros of its shape, which take no memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


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
