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
from maskunet_core.judges.pictures import levels

from .clip_score import ClipScore
from .files import PromptList, find, loaded
from .suites import PictureJudge, Prompt

_SOURCE = "https://github.com/djghosh13/geneval"
PROMPTS = PromptList(
    "evaluation_metadata.jsonl",
    f"{_SOURCE}/blob/main/prompts/evaluation_metadata.jsonl",
    {"5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13": "GenEval's 553"},
)
NAMES = PromptList(
    "object_names.txt",
    f"{_SOURCE}/blob/main/evaluation/object_names.txt",
    {"608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd": "GenEval's 80 classes"},
)


NOT_ITS_DETECTOR = "geneval-other-detector"
"""The judge's name where another training of the same network stands in: its scores are no GenEval scores."""


def prompts(data: Path | None) -> list[Prompt]:
    """Raises BadSuite."""
    lines = [json.loads(line) for line in PROMPTS.read(data).splitlines() if line.strip()]
    return [Prompt(facts.pop("prompt"), facts.pop("tag"), facts) for facts in lines]


def judges(data: Path | None) -> list[PictureJudge]:
    """Raises BadSuite."""
    names = NAMES.read(data).split("\n")[:80]
    stands_in = find(DETECTOR) is None and find(DETECTOR_STAND_IN) is not None
    (detector, of_detector), (clip, of_clip) = loaded(DETECTOR_STAND_IN if stands_in else DETECTOR), loaded(CLIP_L)
    found = GenevalJudge(detector, Colours(clip), names, {"detector": of_detector, "clip": of_clip})
    if stands_in:
        found.name = NOT_ITS_DETECTOR
    return [found, ClipScore("clip-l14", clip, of_clip)]


class GenevalJudge:
    """Detects objects, and tells whether they are those of the prompt. Column `reason`: bytes of what is wrong."""

    name = "geneval"
    real = None

    def __init__(self, detector: Mask2Former, colours: Colours, names: Sequence[str], files: dict[str, str]):
        self.detector, self.colours, self.names = detector, colours, names
        self.record: dict[str, Any] = {"rules": 1, **files}

    def wrong(self, picture: Image, prompt: Prompt) -> list[str]:
        found = by_class(self.detector.detect(levels(picture)), self.names)
        faults = judge(kept(found, prompt.task), prompt.facts, self.colours.of(picture))
        return [fault.published for fault in faults]

    def __call__(self, pictures: Sequence[Image], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        reasons = ["; ".join(self.wrong(picture, prompt)).encode() for picture, prompt in zip(pictures, prompts)]
        longest = max(len(reason) for reason in reasons)
        rows = [list(reason.ljust(longest)) for reason in reasons]
        return {
            "right": torch.tensor([0.0 if reason else 1.0 for reason in reasons]),
            "reason": torch.tensor(rows, dtype=torch.uint8),
        }
