"""Progress of a training on its node: bar, loss, time left."""

import math
import time

import comfy.utils

from .node_text import tell

_RECENT = 20
"""Steps whose mean loss is told."""
_APART = 0.5
"""Seconds between two texts."""


class TrainingProgress:
    """steps: of the whole training. node_id: None where nobody looks."""

    def __init__(self, steps: int, node_id: str | None):
        self.node_id = node_id
        self.plan(steps)
        self._notes: list[str] = []
        self._began: tuple[int, float] | None = None
        self._told = -math.inf

    def plan(self, steps: int) -> None:
        """So many steps from now on."""
        self.steps = steps
        self.bar = comfy.utils.ProgressBar(steps)

    def show(self, preview: tuple) -> None:
        """A preview as the host's bars take them."""
        self.bar.update_absolute(self.bar.current, preview=preview)

    def note(self, line: str) -> None:
        """A line that stands below that of each step, too."""
        self._notes.append(line)
        self.tell(*self._notes)

    def tell(self, *lines: str) -> None:
        tell("\n".join(lines), self.node_id)

    def step(self, done: int, losses: list[float]) -> None:
        """done: steps of the whole training. losses: of all of them."""
        now = time.monotonic()
        began, since = self._began = self._began or (done - 1, now)
        self.bar.update_absolute(done)
        if now - self._told < _APART and done < self.steps:
            return
        self._told = now
        recent = [loss for loss in losses[-_RECENT:] if math.isfinite(loss)]
        loss = f"loss {sum(recent) / len(recent):.4f}" if recent else "no finite loss"
        left = (now - since) / max(1, done - 1 - began) * (self.steps - done)
        remaining = f", {in_words(left)} left" if done - 1 > began else ""
        self.tell(f"step {done} of {self.steps}: {loss}{remaining}", *self._notes)


def in_words(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
