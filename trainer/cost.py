"""What a training step takes: peak memory and seconds, from a forward and backward pass of one and of two samples."""

import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

from .base import BaseModel, load_for_training
from .config import Config

MB = 2**20


class PeakMemory:
    """Peak of the GPU's memory inside the block, or of the process's where there is no GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self._peak = 0

    @property
    def peak(self) -> int:
        """Bytes, so far."""
        if self.device.type == "cuda":
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self.device))
        return self._peak

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while not self._stop.is_set():
            self._peak = max(self._peak, process.memory_info().rss)
            self._stop.wait(0.005)

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return
        self._stop.set()
        self._thread.join()


@dataclass(frozen=True)
class Cost:
    """peak: bytes; seconds: of a step on one process. parameters: trained ones."""

    peak: int
    seconds: float
    parameters: int


def _pass(base: BaseModel, method: Any, accelerator: Any, device: torch.device, count: int, size: tuple[int, int]):
    """One forward and backward pass of `count` samples of noise; (peak bytes, seconds)."""
    stream = torch.Generator().manual_seed(0)
    channels = base.model.latent_format.latent_channels
    clean, noise = torch.randn(2, count, channels, size[1] // 8, size[0] // 8, generator=stream).to(device)
    empty = base.encode_text("")
    conditions = {key: value.expand(count, *value.shape).to(device) for key, value in empty.items()}
    timesteps = torch.linspace(100, 900, count).long().to(device)
    load_for_training(base)
    began = time.monotonic()
    with PeakMemory(device) as memory, method.acting():
        with accelerator.autocast():
            loss = base.diffusion_loss(clean, conditions, timesteps, noise).mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return memory.peak, time.monotonic() - began


def estimate(base: BaseModel, method: Any, config: Config, accelerator: Any, size: tuple[int, int]) -> Cost:
    """The cost of a step at the configured batch, extrapolated from passes of one and of two samples.

    size: (width, height) of the pictures in pixels. Nothing is updated; gradients are dropped.
    """
    device = load_for_training(base)
    method.module.to(device)
    parameters = list(method.module.parameters())
    trained = sum(p.numel() for p in parameters)
    # The first pass sets up kernels and buffers and leaves the gradients, which stay.
    _pass(base, method, accelerator, device, 1, size)
    (one, first), (two, second) = (_pass(base, method, accelerator, device, count, size) for count in (1, 2))
    for parameter in parameters:
        parameter.grad = None
    count = config.loop.batch // accelerator.num_processes // config.loop.accumulate
    extra = 4 * trained * (2 + (config.loop.ema > 0))
    peak = one + (count - 1) * max(0, two - one) + extra
    seconds = config.loop.accumulate * (first + (count - 1) * max(0.0, second - first))
    return Cost(peak, seconds, trained)
