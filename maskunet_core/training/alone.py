"""One process without the package accelerate."""

import contextlib
from typing import Any

import torch
from torch import Tensor


class Alone:
    """What a `Training` that clips no gradients asks of an Accelerator, for one process.

    computing: the dtype that the model computes in; the loss is scaled where that is fp16.
    """

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device, computing: torch.dtype):
        self._device, self._computing = device, computing
        self.scaler = torch.amp.GradScaler(device.type) if computing == torch.float16 else None

    def autocast(self) -> contextlib.AbstractContextManager:
        if self._computing == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._computing)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def prepare_optimizer(self, optimiser: torch.optim.Optimizer, device_placement: bool = False) -> Any:
        return optimiser if self.scaler is None else _Scaled(optimiser, self.scaler)


class _Scaled:
    """An optimiser of gradients of a scaled loss: a step in which they overflow lowers the scale, and does no more."""

    def __init__(self, optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
        self._optimiser, self._scaler = optimiser, scaler
        self.zero_grad, self.state_dict = optimiser.zero_grad, optimiser.state_dict
        self.load_state_dict = optimiser.load_state_dict

    def step(self) -> None:
        self._scaler.step(self._optimiser)
        self._scaler.update()
