"""What a method costs in operations, counted as torch executes them, forward and backward."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of products and convolutions inside the block: `total`."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result
