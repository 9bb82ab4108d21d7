"""Tensors that autograd keeps for the backward pass, where a model or other nodes write into them.

`torch.autograd.graph.allow_mutation_on_saved_tensors` is for this, too. It tells tensors apart by Python's id and by
address. Both come to stand for others: in torch 2.14 some gradients are then, without an error, those of other tensors,
and a write into a slice goes unseen. Here a tensor is known by its memory, which it holds.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


class _Saved:
    """What the graph holds in the place of a tensor; gone with it."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor):
        self.take(tensor)

    def take(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError("A tensor that the backward pass needs was written into where no copy of it was made.")
        return self.tensor

    @property
    def place(self) -> tuple:
        return self.tensor.data_ptr(), self.tensor.shape, self.tensor.stride(), self.tensor.dtype


class _Memory:
    """All saved tensors, by the memory that they lie in."""

    def __init__(self):
        self._saved: dict[int, WeakSet[_Saved]] = {}

    def save(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._saved.setdefault(_memory_of(tensor), WeakSet()).add(saved)
        return saved

    def before_write(self, tensor: Tensor) -> None:
        """What is saved of this memory becomes a copy."""
        copies: dict[tuple, Tensor] = {}
        for saved in self._saved.pop(_memory_of(tensor), ()):
            place = saved.place
            if place not in copies:
                copies[place] = saved.tensor.clone()
            saved.take(copies[place])


def _memory_of(tensor: Tensor) -> int:
    """The same for tensors that share memory, and no other's as long as one of them is there."""
    return tensor.untyped_storage()._cdata


class _Writes(TorchDispatchMode):
    def __init__(self, memory: _Memory):
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for place, name in _written(function):
            value = args[place] if place < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor):
                    self._memory.before_write(tensor)
        return function(*args, **kwargs)


@cache
def _written(function: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that an operation writes into."""
    arguments = enumerate(function._schema.arguments)
    return tuple((n, each.name) for n, each in arguments if each.alias_info is not None and each.alias_info.is_write)


@contextlib.contextmanager
def writable() -> Iterator[None]:
    """Around forward and backward pass: before anything is written into what autograd keeps, autograd gets a copy.

    The backward pass raises RuntimeError where something was written in a way that torch does not dispatch.
    """
    memory = _Memory()
    with saved_tensors_hooks(memory.save, _Saved.get), _Writes(memory):
        yield
