"""The part of a process in work that several do, each on a machine of its own or not."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """index: of this process, among `count`. wait: until all have come so far; it has a limit of time, so that it is
    for short whiles. sum_of: of a number of each process."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    sum_of: Callable[[float], float] = float

    @classmethod
    def of(cls, accelerator: Any) -> "Share":
        """accelerator: accelerate's."""

        def sum_of(number: float) -> float:
            return accelerator.reduce(torch.tensor([number], device=accelerator.device), reduction="sum").item()

        if accelerator.num_processes == 1:
            return cls()
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone, sum_of)

    @property
    def first(self) -> bool:
        return self.index == 0

    def mine(self, work: Sequence[T]) -> Sequence[T]:
        """Of work that every process sees alike."""
        return work[self.index :: self.count]

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process does the block before the others."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def agreed(self) -> int:
        """A number that all processes draw together; another each time."""
        return self.from_first(random.SystemRandom().randrange(2**60))

    def from_first(self, number: int) -> int:
        """The first process's number, of at most 60 bits."""
        # Sums are of fp32, which holds 24 bits.
        parts = (self.sum_of((number >> shift) % 2**20 if self.first else 0) for shift in (40, 20, 0))
        high, middle, low = (round(part) for part in parts)
        return (high << 40) + (middle << 20) + low

    def everywhere(self, holds: bool) -> bool:
        """Whether something holds in all processes."""
        return self.sum_of(holds) == self.count

    def sees(self, folder: Path) -> bool:
        """Whether every process finds the first one's files under this path; asked by all of them at once."""
        if self.count == 1:
            return True
        # Of this time: others may have been left by processes that were killed.
        mark = folder / f".seen-{self.agreed()}"
        if self.first:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        self.wait()
        everyone = self.everywhere(mark.exists())
        if self.first:
            mark.unlink()
        return everyone


ALONE = Share()
