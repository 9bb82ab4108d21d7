"""GenEval's judge for any text that its rules can read: a detector of COCO's things, and CLIP for their colours."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import nn

from ..errors import MaskUNetError
from ..rewards.clip import ClipReward
from .files import CLIP_L, DETECTOR
from .geneval import Colours, Found, by_class, judge, kept
from .mask2former import Mask2Former
from .pictures import levels
from .rules import THINGS, parse
from .verdict import BoundJudge, PromptJudge, Seen, Verdict

WORK = 1 << 30
"""Bytes that the detector's layers need for a picture."""


def seen_of(objects: Mapping[str, Sequence[Found]], facts: Mapping[str, Any]) -> list[Seen]:
    """objects: of `kept`. facts: GenEval's of a prompt."""
    asked = {wanted["class"] for key in ("include", "exclude") for wanted in facts.get(key, ())}
    return [Seen(name, one.box, name in asked) for name, group in objects.items() for one in group]


class BadJudgeFile(MaskUNetError):
    """A file that is no judge; the message names it and says which file is expected where."""


class ObjectJudge(PromptJudge):
    """clip: OpenAI's ViT-L/14, None where it is not there: prompts that name colours are then refused."""

    def __init__(self, name: str, detector: Mask2Former, clip: ClipReward | None):
        self.name, self.detector, self.clip = name, detector, clip
        self.colours = Colours(clip) if clip else None

    def bind(self, prompt: str) -> BoundJudge:
        """Raises MaskUNetError."""
        facts, task = parse(prompt)
        coloured = any("color" in wanted for wanted in facts["include"])
        if coloured and self.colours is None:
            raise MaskUNetError(
                f'"{prompt}" names a colour, and colours are told by CLIP, which was not found: put {CLIP_L.name} '
                f"({CLIP_L.size}, {CLIP_L.address}) into models/judges or models/clip_vision, or ask for no colours."
            )

        def look(picture: Image) -> Verdict:
            objects = kept(by_class(self.detector.detect(levels(picture)), THINGS), task)
            faults = judge(objects, facts, self.colours.of(picture) if coloured else None)
            return Verdict(tuple(fault.plain for fault in faults), tuple(seen_of(objects, facts)))

        return BoundJudge(look)

    def modules(self) -> list[nn.Module]:
        return [self.detector, *(self.clip.modules() if self.clip else [])]


def load(path: Path, others: Iterable[Path] = ()) -> ObjectJudge:
    """The judge whose detector is in a published file, on the CPU, named after the file.

    others: files among which CLIP may be. Raises MaskUNetError.
    """
    if DETECTOR.find([path]) is None:
        raise BadJudgeFile(f"'{path.name}' is not GenEval's detector, or is damaged. Put this file there: {DETECTOR}.")
    detector = DETECTOR.load(path)
    classes = detector.classes
    if classes != len(THINGS):
        raise BadJudgeFile(
            f"'{path.name}' is a Mask2Former of {classes} classes, not of COCO's {len(THINGS)} things. Put this file "
            f"there: {DETECTOR}."
        )
    clip = CLIP_L.find(others)
    return ObjectJudge(path.stem, detector, CLIP_L.load(clip) if clip else None)


def files_of(path: Path, others: Iterable[Path] = ()) -> list[Path]:
    """The files that a judge is made of, with CLIP's description where there is one. Of content nothing is read."""
    clip = CLIP_L.find(others)
    found = [path, *([clip, clip.with_suffix(".json")] if clip else [])]
    return [file for file in found if file.is_file()]
