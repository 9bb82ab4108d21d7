"""What autograd keeps between forward and backward pass."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class KeptByAutograd:
    """Counts what is saved for backward passes inside the block, while all of it lives."""

    def __init__(self):
        self._kept: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def bytes(self, besides: Iterable[Tensor]) -> int:
        """What is kept besides tensors that are there anyway, such as weights."""
        known = {tensor.untyped_storage().data_ptr() for tensor in besides}
        return sum(size for pointer, size in self._kept.items() if pointer not in known)

    def __enter__(self) -> "KeptByAutograd":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
