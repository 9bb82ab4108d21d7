"""How long work takes: seconds of one core on the CPU, whose clock on the wall tells as much of its other guests."""

import time
from collections.abc import Callable
from typing import Any

import torch


def now() -> float:
    """Of the processor where there is no GPU (torch should have one thread then: waiting threads count, too)."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(action: Callable[[], Any]) -> float:
    """What an action takes."""
    began = now()
    action()
    return now() - began
