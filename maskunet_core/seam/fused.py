"""The host's fused operations, which have no gradients of their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PREFIX = "comfy_kitchen::"


def takes_no_gradient(function: Any, arguments: tuple) -> bool:
    """Whether `function` is a fused operation of the host that autograd would refuse with these arguments.

    Those that write into their arguments are left to autograd's refusal.
    """
    name = getattr(function, "_qualified_op_name", "")
    if not name.startswith(_PREFIX):
        return False
    in_graph = any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments)
    return in_graph and hasattr(_references(), name.removeprefix(_PREFIX))


def with_gradient(fused: Callable, arguments: tuple, named: dict[str, Any]) -> Any:
    """`fused(*arguments, **named)` as it is, whose backward pass is that of the host's eager code for the same."""
    reference = getattr(_references(), fused._qualified_op_name.removeprefix(_PREFIX))
    names = tuple(named)
    return _Referred.apply(fused, reference, names, *arguments, *named.values())


@functools.cache
def _references() -> Any:
    """Plain functions of the names of the operations."""
    from comfy_kitchen.backends.eager import rope

    return rope


def _called(function: Callable, names: tuple[str, ...], arguments: list) -> Any:
    places = len(arguments) - len(names)
    return function(*arguments[:places], **dict(zip(names, arguments[places:])))


class _Referred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, reference, names, *arguments):
        ctx.reference, ctx.names = reference, names
        ctx.save_for_backward(*(a for a in arguments if isinstance(a, Tensor)))
        ctx.others = [None if isinstance(a, Tensor) else (a,) for a in arguments]
        ctx.set_materialize_grads(False)
        return _called(fused, names, arguments)

    @staticmethod
    def backward(ctx, *gradients):
        tensors = iter(ctx.saved_tensors)
        arguments = [next(tensors).detach() if other is None else other[0] for other in ctx.others]
        leaves = [a.requires_grad_() for a, needed in zip(arguments, ctx.needs_input_grad[3:]) if needed]
        with torch.enable_grad():
            results = _called(ctx.reference, ctx.names, arguments)
        results = results if isinstance(results, tuple) else (results,)
        found = iter(gradients_of(results, gradients, leaves))
        return None, None, None, *(next(found) if needed else None for needed in ctx.needs_input_grad[3:])


def gradients_of(results: tuple, gradients: tuple, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Of the leaves, from those of some of the results: others take part in nothing, or are no tensors."""
    pairs = [(r, g) for r, g in zip(results, gradients) if g is not None and r.requires_grad]
    if not pairs:
        return (None,) * len(leaves)
    return torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
