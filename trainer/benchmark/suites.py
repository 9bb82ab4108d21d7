"""What a suite is: prompts, how they are drawn, and who judges the pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image
from torch import Tensor

from maskunet_core.judges.files import JudgeFile

from ..reward_compare.stage import Sampling
from .files import PromptList, find
from .real import Real


@dataclass(frozen=True)
class Prompt:
    """task: the table's column. facts: what a judge has to know besides the text."""

    text: str
    task: str
    facts: dict[str, Any] = field(default_factory=dict)


class PictureJudge(Protocol):
    """name: of its folder. record: what decides its scores, such as digests of its files. real: what features of drawn
    pictures (the column `features`, `embedding` of CLIP or `class token` of DINOv2) are held against, or None.
    """

    name: str
    record: dict[str, Any]

    @property
    def real(self) -> Real | None: ...

    def __call__(self, pictures: Sequence[Image], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """A row for each picture. Columns of single numbers are scores."""


@dataclass(frozen=True)
class Suite:
    """prompts, judges: of the user's folder of prompt lists, None where a suite needs none; they raise BadSuite.

    images: pictures of a prompt. side: in pixels. batch: prompts drawn together. lists, weights: files that are needed;
    optional: those that are used where they are there. version: counts changes of what a number means. notes: what
    people should know who want to run it. others: a line for each thing that is missing besides files. kept: pictures
    of each method that stay when they have been judged, None for all.
    """

    name: str
    prompts: Callable[[Path | None], list[Prompt]]
    judges: Callable[[Path | None], list[PictureJudge]]
    images: int
    sampling: Sampling
    side: int
    batch: int
    lists: tuple[PromptList, ...] = ()
    weights: tuple[JudgeFile, ...] = ()
    optional: tuple[JudgeFile, ...] = ()
    version: int = 1
    notes: tuple[str, ...] = ()
    others: Callable[[], list[str]] = list
    kept: int | None = None

    def missing(self, data: Path | None) -> list[str]:
        """A line for each thing that is not there."""
        files = [one for one in self.lists if not one.is_in(data)]
        files += [one for one in self.weights if not any(map(find, one.choices))]
        return [*map(str, files), *self.others()]

    def unused(self) -> list[str]:
        """A line for each file that would be used if it were there."""
        return [str(one) for one in self.optional if find(one) is None]

    def versions(self, data: Path | None) -> dict[str, str]:
        """Which version of each list is there."""
        return {one.name: one.version(data) for one in self.lists}
