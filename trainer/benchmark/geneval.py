"""The suite `geneval`: its prompts, and its judges."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from maskunet_core.judges.files import CLIP_L, DETECTOR, DETECTOR_STAND_IN
from maskunet_core.judges.geneval import Colours, by_class, judge, kept
from maskunet_core.judges.mask2former import Mask2Former
from maskunet_core.judges.objects import seen_of
from maskunet_core.judges.pictures import levels
from maskunet_core.judges.rules import THINGS

from .clip_score import ClipScore
from .columns import REASON, SEEN, seen_as_text, to_column
from .files import PromptList, find, loaded
from .suites import PictureJudge, Prompt

_SOURCE = "https://github.com/djghosh13/geneval"
PROMPTS = PromptList(
    "evaluation_metadata.jsonl",
    f"{_SOURCE}/blob/main/prompts/evaluation_metadata.jsonl",
    {"5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13": "GenEval's 553"},
    "0.1 MB",
)
NOT_ITS_DETECTOR = "geneval-other-detector"
"""The judge's name where another training of the same network stands in: its scores are no GenEval scores."""


def prompts(data: Path | None) -> list[Prompt]:
    """Raises BadSuite."""
    lines = [json.loads(line) for line in PROMPTS.read(data).splitlines() if line.strip()]
    return [Prompt(facts.pop("prompt"), facts.pop("tag"), facts) for facts in lines]


def judges(_: Path | None) -> list[PictureJudge]:
    """Raises BadSuite."""
    stands_in = find(DETECTOR) is None and find(DETECTOR_STAND_IN) is not None
    (detector, of_detector), (clip, of_clip) = loaded(DETECTOR_STAND_IN if stands_in else DETECTOR), loaded(CLIP_L)
    found = GenevalJudge(detector, Colours(clip), {"detector": of_detector, "clip": of_clip})
    if stands_in:
        found.name = NOT_ITS_DETECTOR
    return [found, ClipScore("clip-l14", clip, of_clip)]


class GenevalJudge:
    """Detects objects, and tells whether they are those of the prompt."""

    name = "geneval"
    real = None

    def __init__(self, detector: Mask2Former, colours: Colours, files: dict[str, str]):
        self.detector, self.colours = detector, colours
        self.record: dict[str, Any] = {"rules": 1, **files}

    def _look(self, picture: Image, prompt: Prompt) -> tuple[str, str]:
        """What is wrong, in GenEval's words, and what was seen."""
        objects = kept(by_class(self.detector.detect(levels(picture)), THINGS), prompt.task)
        faults = judge(objects, prompt.facts, self.colours.of(picture))
        return "; ".join(fault.published for fault in faults), seen_as_text(seen_of(objects, prompt.facts))

    def __call__(self, pictures: Sequence[Image], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        reasons, seen = zip(*(self._look(picture, prompt) for picture, prompt in zip(pictures, prompts)))
        right = torch.tensor([0.0 if reason else 1.0 for reason in reasons])
        return {"right": right, REASON: to_column(reasons), SEEN: to_column(seen)}
