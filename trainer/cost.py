"""What a training step takes: peak memory and seconds, from forward and backward passes of few samples."""

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


LARGEST = 8
"""Samples of the largest pass of an estimate."""


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total


@dataclass(frozen=True)
class _Line:
    """Through the two largest of the measured passes. passes: (samples, peak bytes, seconds) each, in rising order."""

    passes: list[tuple[int, int, float]]

    def _at(self, count: int, index: int) -> float:
        end = self.passes[-1]
        if len(self.passes) == 1:
            return end[index]
        before = self.passes[-2]
        return end[index] + (count - end[0]) * max(0.0, end[index] - before[index]) / (end[0] - before[0])

    def peak(self, count: int) -> int:
        return round(self._at(count, 1))

    def seconds(self, count: int) -> float:
        return self._at(count, 2)


def estimate(base: BaseModel, method: Any, config: Config, accelerator: Any, size: tuple[int, int]) -> Cost:
    """The cost of a step at the configured batch, from passes of 1, 2, 4 and 8 samples as far as those fit.

    size: (width, height) of the pictures in pixels. Nothing is updated; gradients are dropped.
    """
    device = load_for_training(base)
    method.module.to(device)
    parameters = list(method.module.parameters())
    trained = sum(p.numel() for p in parameters)
    count = config.loop.batch // accelerator.num_processes // config.loop.accumulate
    # The first pass sets up kernels and buffers and leaves the gradients, which stay.
    _pass(base, method, accelerator, device, 1, size)
    line = _Line([(1, *_pass(base, method, accelerator, device, 1, size))])
    room = 0.8 * _total_memory(device)
    while (measured := line.passes[-1][0]) < min(count, LARGEST):
        wider = min(2 * measured, count, LARGEST)
        if measured > 1 and line.peak(wider) > room:
            break
        line = _Line([*line.passes, (wider, *_pass(base, method, accelerator, device, wider, size))])
    for parameter in parameters:
        parameter.grad = None
    extra = 4 * trained * (2 + (config.loop.ema > 0))
    return Cost(line.peak(count) + extra, config.loop.accumulate * line.seconds(count), trained)
