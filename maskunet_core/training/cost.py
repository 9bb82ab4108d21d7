"""What a training step takes: peak memory and seconds, from forward and backward passes of few samples."""

import threading
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from .base import BaseModel, OutOfMemory, fitting
from .settings import Settings

MB = 2**20


def _counters(device: torch.device) -> Any:
    """torch's module of a kind of device that counts its peak itself (`torch.cuda`, `torch.xpu`), or None."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "max_memory_allocated") else None


class PeakMemory:
    """Peak of the device's memory inside the block; of the process's where the device has none of its own or does not
    count."""

    def __init__(self, device: torch.device):
        self.device = device
        self._counters = _counters(device)
        self._process = psutil.Process()
        self._peak = 0

    @property
    def peak(self) -> int:
        """Bytes, so far."""
        if self._counters is not None:
            self._peak = max(self._peak, self._counters.max_memory_allocated(self.device))
        return self._peak

    @property
    def now(self) -> int:
        """Bytes in use."""
        if self._counters is not None:
            return self._counters.memory_allocated(self.device)
        return self._process.memory_info().rss

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, self.now)
            self._stop.wait(0.005)

    def __enter__(self) -> "PeakMemory":
        if self._counters is not None:
            self._counters.reset_peak_memory_stats(self.device)
            return self
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._counters is not None:
            self._counters.synchronize(self.device)
            return
        self._stop.set()
        self._thread.join()


@dataclass(frozen=True)
class Cost:
    """peak: bytes; seconds: of a step on one process; forward: of its forward passes. parameters: trained ones.
    too_many: samples at once for which the device has too little memory, 0 where those of the configuration fit."""

    peak: int
    seconds: float
    forward: float
    parameters: int
    too_many: int = 0


def _pass(base: BaseModel, method: Any, accelerator: Any, device: torch.device, count: int, size: tuple[int, int]):
    """One forward and backward pass of `count` samples of noise; (peak bytes, seconds, those of the forward pass)."""
    stream = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, count, *base.latent_shape(*size), generator=stream).to(device)
    conditions = {key: value.to(device) for key, value in method.example(count).items()}
    timesteps = torch.linspace(100, 900, count).long().to(device)
    base.load()
    began = time.monotonic()
    with PeakMemory(device) as memory, method.acting():
        with accelerator.autocast():
            loss = base.diffusion_loss(clean, conditions, timesteps, noise).mean()
        # Waits for the device as well.
        loss.item()
        forward = time.monotonic() - began
        loss.backward()
        next(method.module.parameters()).grad.flatten()[0].item()
    return memory.peak, time.monotonic() - began, forward


LARGEST = 8
"""Samples of the largest pass of an estimate."""


def total_memory(device: torch.device) -> int:
    """Bytes of the device, or of the machine where it shares the machine's."""
    import comfy.model_management

    return comfy.model_management.get_total_memory(device)


@dataclass(frozen=True)
class _Line:
    """Through the two largest of the measured passes. passes: (samples, peak bytes, seconds, of which forward) each, in
    rising order, at least two."""

    passes: list[tuple[int, int, float, float]]

    def _at(self, count: int, index: int) -> float:
        before, end = self.passes[-2:]
        return end[index] + (count - end[0]) * max(0.0, end[index] - before[index]) / (end[0] - before[0])

    def peak(self, count: int) -> int:
        return round(self._at(count, 1))

    def seconds(self, count: int) -> float:
        return self._at(count, 2)

    def forward(self, count: int) -> float:
        """Seconds."""
        return self._at(count, 3)


def estimate(
    base: BaseModel, method: Any, config: Settings, accelerator: Any, size: tuple[int, int], guided: int = 1
) -> Cost:
    """The cost of a step at the configured batch, from passes of 1, 2, 4 and 8 samples as far as those fit.

    size: (width, height) of the pictures in pixels. guided: predictions of a sample. Nothing is updated; gradients are
    dropped.
    """
    device = base.load()
    method.module.to(device)
    parameters = list(method.module.parameters())
    trained = sum(p.numel() for p in parameters)
    count = guided * config.loop.batch // accelerator.num_processes // config.loop.accumulate
    # The first pass sets up kernels and buffers and leaves the gradients, which stay.
    _pass(base, method, accelerator, device, 1, size)
    line = _Line([(0, PeakMemory(device).now, 0.0, 0.0), (1, *_pass(base, method, accelerator, device, 1, size))])
    room, too_many = 0.8 * total_memory(device), 0
    while (measured := line.passes[-1][0]) < min(count, LARGEST):
        wider = min(2 * measured, count, LARGEST)
        if line.peak(wider) > room:
            break
        try:
            with fitting(f"A step of {wider} pictures", device, "see below"):
                line = _Line([*line.passes, (wider, *_pass(base, method, accelerator, device, wider, size))])
        except OutOfMemory:
            too_many = wider
            break
    for parameter in parameters:
        parameter.grad = None
    extra = 4 * trained * (2 + (config.loop.ema > 0))
    peak = line.peak(count) + extra
    if not too_many and peak > total_memory(device):
        too_many = count
    turns = config.loop.accumulate
    return Cost(peak, turns * line.seconds(count), turns * line.forward(count), trained, too_many)
