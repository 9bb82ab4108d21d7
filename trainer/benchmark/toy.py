"""The suite `toy`: held-out prompts of the toy world, judged by the reader that nothing is trained or searched by."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from maskunet_core.judges.frechet import Gaussian
from maskunet_core.judges.pictures import levels
from maskunet_core.judges.toy import verdict_of
from maskunet_core.toy.captions import parse
from maskunet_core.toy.judge import read
from maskunet_core.toy.model import load_reader

from ..toy.held_out import TABLE, held_out_prompts, real_pictures
from .columns import REASON, SEEN, seen_as_text, to_column
from .real import Real
from .suites import PictureJudge, Prompt


@cache
def prompts(_: Path | None) -> list[Prompt]:
    return [Prompt(str(caption), caption.kind) for caption in held_out_prompts(200, TABLE)]


def judges(_: Path | None) -> list[PictureJudge]:
    return [ToyPictureJudge()]


@cache
def _real() -> Real:
    return Real(Gaussian.of(read(load_reader("reader_b"), real_pictures(1000)).features))


class ToyPictureJudge:
    name = "reader"
    record = {"judge": "reader_b", "version": 1}

    def __init__(self):
        self.reader = load_reader("reader_b")

    @property
    def real(self) -> Real:
        return _real()

    def __call__(self, pictures: Sequence[Image], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        reading = read(self.reader, torch.stack([levels(picture) for picture in pictures]) / 255)
        both = enumerate(zip(pictures, prompts))
        verdicts = [verdict_of(reading, n, parse(prompt.text), picture.size) for n, (picture, prompt) in both]
        return {
            "right": torch.tensor([verdict.score for verdict in verdicts]),
            "features": reading.features,
            REASON: to_column(["; ".join(verdict.faults) for verdict in verdicts]),
            SEEN: to_column([seen_as_text(verdict.seen) for verdict in verdicts]),
        }
