"""Batches of coming steps, made while a step is computed."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .batches import Batch

THREADS = 2
AHEAD = 4
"""Steps."""


class ReadAhead:
    """draw: the batch of a step; steps: of the run, beyond which nothing is drawn; threaded: whether threads draw, for
    data on disk; else the batch of the next step is drawn where `look_ahead` is called.

    waited: seconds in which nothing but the next batch was waited for, of `taken` batches; the first is not among them.
    """

    def __init__(self, draw: Callable[[int], Batch], steps: int, threaded: bool):
        self._draw, self._steps = draw, steps
        self._pool = ThreadPoolExecutor(THREADS, "batches") if threaded else None
        self._drawn: dict[int, Future | Batch] = {}
        self.waited, self.taken = 0.0, -1

    def take(self, step: int) -> Batch:
        """Raises what drawing raises."""
        began = time.monotonic()
        for other in [other for other in self._drawn if not step <= other <= step + AHEAD]:
            del self._drawn[other]
        if self._pool:
            for coming in range(step, min(step + AHEAD + 1, self._steps)):
                if coming not in self._drawn:
                    self._drawn[coming] = self._pool.submit(self._draw, coming)
        found = self._drawn.pop(step, None)
        batch = found.result() if isinstance(found, Future) else found or self._draw(step)
        if self.taken >= 0:
            self.waited += time.monotonic() - began
        self.taken += 1
        return batch

    def look_ahead(self, step: int) -> None:
        """Draws the batch of a step, where no thread does."""
        if self._pool is None and step < self._steps:
            self._drawn[step] = self._draw(step)

    def close(self) -> None:
        """Threads end after the batch that they are at."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = ThreadPoolExecutor(THREADS, "batches")
            self._drawn.clear()
