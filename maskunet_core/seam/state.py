"""What other nodes remember from one call of a model to the next: running averages, caches, random numbers."""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_OURS = __name__.rpartition(".")[0].rpartition(".")[0]
_NOT_OF_NODES = {"torch", "numpy", "server", "execution", "app", _OURS.partition(".")[0], *sys.stdlib_module_names}
"""Packages whose objects serve more than the run of one sampler."""


class CallState:
    """The state in which a call of the sampler finds the functions in its options, so that other calls before it can
    begin with the same, and leave none of their own.

    Known are variables that functions close over, attributes of objects, entries of lists and dicts, and torch's
    random numbers. Tensors are taken for values, which are replaced and not written into.
    """

    def __init__(self, options: dict[str, Any], device: torch.device):
        self._restores: list[Callable[[], None]] = []
        self._seen: list[Any] = []
        self._devices = [] if device.type == "cpu" else [device]
        self._random = torch.get_rng_state()
        self._random_of = [torch.get_device_module(d).get_rng_state(d) for d in self._devices]
        self._keep(options)

    def restore(self) -> None:
        torch.set_rng_state(self._random)
        for device, state in zip(self._devices, self._random_of):
            torch.get_device_module(device).set_rng_state(state, device)
        for restore in self._restores:
            restore()

    def _keep(self, options: dict[str, Any]) -> None:
        known, to_see = set(), [options]
        while to_see:
            value = to_see.pop()
            if id(value) not in known:
                known.add(id(value))
                # What was looked at must live on, or something else would get its id.
                self._seen.append(value)
                to_see += self._parts(value)

    def _parts(self, value: Any) -> Iterator[Any]:
        if type(value) is dict:
            self._restores.append(functools.partial(_refill_dict, value, dict(value)))
            yield from value.values()
        elif type(value) is list:
            self._restores.append(functools.partial(value.__setitem__, slice(None), list(value)))
            yield from value
        elif type(value) in (tuple, set, frozenset):
            yield from value
        elif isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords)
        elif isinstance(value, types.MethodType):
            yield from (value.__func__, value.__self__)
        elif isinstance(value, types.FunctionType):
            if not _is_ours(value):
                for cell in value.__closure__ or ():
                    yield from self._cell(cell)
        elif _is_of_a_node(value):
            yield value.__dict__

    def _cell(self, cell: types.CellType) -> Iterator[Any]:
        try:
            contents = cell.cell_contents
        except ValueError:
            # Not assigned yet.
            return
        self._restores.append(functools.partial(setattr, cell, "cell_contents", contents))
        yield contents


def _refill_dict(found: dict, before: dict) -> None:
    found.clear()
    found.update(before)


def _is_ours(function: Any) -> bool:
    return str(function.__module__).startswith(_OURS)


def _is_of_a_node(value: Any) -> bool:
    """Whether it is an object that a node may have made to remember something."""
    if isinstance(value, (type, types.ModuleType, Tensor, nn.Module)) or not hasattr(value, "__dict__"):
        return False
    # Models as nodes hand them on, and what samples with them.
    if any(hasattr(value, name) for name in ("patcher", "model_patcher", "model_options")):
        return False
    return type(value).__module__.partition(".")[0] not in _NOT_OF_NODES
