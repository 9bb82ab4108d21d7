"""What every judge of single pictures offers: whether a picture shows what a prompt names, and what it saw.

bound = judge.bind("a photo of two clocks")
verdict = bound.look(picture)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from PIL.Image import Image
from torch import nn


@dataclass(frozen=True)
class Seen:
    """An object in a picture. box: x0, y0, x1, y1 in pixels, y downward. asked: whether the prompt names its kind."""

    name: str
    box: tuple[float, float, float, float]
    asked: bool


@dataclass(frozen=True)
class Verdict:
    """faults: what is wrong, each in a few words; none where the picture is right."""

    faults: tuple[str, ...]
    seen: tuple[Seen, ...]

    @property
    def score(self) -> float:
        return 0.0 if self.faults else 1.0

    def __str__(self) -> str:
        return f"no: {'; '.join(self.faults)}" if self.faults else "yes"


@dataclass(frozen=True)
class BoundJudge:
    """A judge for one prompt. unread: words of the prompt that it knows nothing of."""

    look: Callable[[Image], Verdict]
    unread: tuple[str, ...] = ()


class PromptJudge(ABC):
    """A judge for any prompt that it can read. `name` is for people."""

    name: str

    @abstractmethod
    def bind(self, prompt: str) -> BoundJudge:
        """Raises MaskUNetError for a prompt that it cannot read."""

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """What must lie on one device when pictures are judged."""
