"""Gradients through a transformer: a block keeps what enters it, and runs once more in the backward pass.

The host's blocks write into their inputs, which recomputation by PyTorch's `checkpoint` would take for what came in.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .fused import gradients_of
from .gradients import kept_weights, of_this_call, run_again
from .shadow import Shadowed

Leaves = Callable[[], Sequence[Tensor]]
"""Gives what is learned in a block, or what that is computed from; called once the block is entered."""


def recomputed_blocks(blocks: Iterable[tuple[nn.Module, Leaves]], width: int) -> Shadowed:
    """Inside the block these blocks keep their streams alone for the backward pass, and run once more in it.

    They run as they did, see `recomputed`. blocks: (block, its leaves). width: channels of the streams; what else a
    block is given must not change, and passes no gradients on. Both passes must lie inside of `saved.writable`.
    """
    return Shadowed(
        (block, {"forward": partial(_recomputed, block, block.forward, leaves, width)}) for block, leaves in blocks
    )


def _recomputed(block: nn.Module, forward: Callable, leaves: Leaves, width: int, *args, **kwargs) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    places = len(args)
    given = {n: of_this_call(argument) for n, argument in enumerate(args)}
    given |= {name: of_this_call(argument) for name, argument in kwargs.items()}
    streams = [name for name, value in given.items() if isinstance(value, Tensor) and _is_stream(value, width)]

    def compute(values: Sequence[Tensor]) -> Any:
        found = given | dict(zip(streams, values))
        in_places = [found.pop(n) for n in range(places)]
        return forward(*in_places, **found)

    entering = [given[name] for name in streams]
    for name in streams:
        # What was given lives on here until the backward pass.
        given[name] = None
    run = _Run(block, compute, run_again(block), _autocast_of_now(entering[0].device))
    return _Recomputed.apply(run, len(streams), *entering, *leaves())


def _is_stream(tensor: Tensor, width: int) -> bool:
    return tensor.ndim >= 3 and tensor.shape[-1] == width


@dataclass(frozen=True)
class _Run:
    """block: what runs. compute: its results from its streams. once_more: see `run_again`. autocast: of the forward
    pass."""

    block: nn.Module
    compute: Callable[[Sequence[Tensor]], Any]
    once_more: Callable[[], contextlib.AbstractContextManager]
    autocast: Callable[[], contextlib.AbstractContextManager]


def _autocast_of_now(device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return partial(torch.autocast, kind, dtype=dtype, enabled=enabled)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: _Run, count: int, *tensors):
        ctx.run, ctx.leaves = run, tensors[count:]
        ctx.streams = [stream.clone() for stream in tensors[:count]]
        ctx.set_materialize_grads(False)
        return run.compute(tensors[:count])

    @staticmethod
    def backward(ctx, *gradients):
        run, count = ctx.run, len(ctx.streams)
        streams, ctx.streams = ctx.streams, None
        of_streams = ctx.needs_input_grad[2 : 2 + count]
        moving = [stream.requires_grad_() for stream, needed in zip(streams, of_streams) if needed]
        with torch.enable_grad(), run.once_more(), kept_weights([run.block]):
            with run.autocast():
                # The block may write into what it gets, which a leaf does not allow.
                results = run.compute([stream.clone() for stream in streams])
            results = results if isinstance(results, tuple) else (results,)
            found = gradients_of(results, gradients, [*moving, *ctx.leaves])
        own = iter(found)
        return None, None, *(next(own) if needed else None for needed in of_streams), *own
