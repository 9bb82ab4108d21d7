"""What a method costs in operations, counted as torch executes them, forward and backward."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _attention(query: Any, key: Any, value: Any, *_, **__) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_, **__) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


COUNTED = {**flop_registry, _ATTENTION: _attention, _ATTENTION_BACKWARD: _attention_backward}
"""Functions of (arguments, out_val) by operation; torch's own table lacks the CPU's fused attention."""


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of products and convolutions inside the block: `total`."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        count = COUNTED.get(function._overloadpacket)
        if count is None:
            # In inference mode linear layers and convolutions arrive whole.
            with self:
                result = function.decompose(*args, **kwargs)
            return function(*args, **kwargs) if result is NotImplemented else result
        result = self.execute(function, args, kwargs)
        self.total += count(*args, **kwargs, out_val=result)
        return result

    def execute(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A counted operation's result."""
        return function(*args, **kwargs)
