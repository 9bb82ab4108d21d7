"""The suite `t2i-compbench`: attribute binding, judged by BLIP's answers about each thing that a prompt names."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from maskunet_core.judges.blip_vqa import BlipVqa
from maskunet_core.judges.files import BLIP_VQA

from .columns import REASON, to_column
from .files import PromptList, loaded
from .noun_chunks import noun_chunks, parsers
from .suites import PictureJudge, Prompt

_SOURCE = "https://github.com/Karine-Huang/T2I-CompBench/blob/main/examples/dataset"
IMAGES = 10
"""Pictures of a prompt."""
LISTS = {
    "colour": PromptList(
        "color_val.txt",
        f"{_SOURCE}/color_val.txt",
        {
            "1e37a12c1861bf6b11623eaffb0bf6d6eeea9702caf45b95d040f1721bba7f4f": "until 2 September 2025",
            "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d": "since 3 September 2025",
        },
        "12 kB",
    ),
    "texture": PromptList(
        "texture_val.txt",
        f"{_SOURCE}/texture_val.txt",
        {"fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f": "T2I-CompBench's 300"},
        "14 kB",
    ),
    "shape": PromptList(
        "shape_val.txt",
        f"{_SOURCE}/shape_val.txt",
        {"37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae": "T2I-CompBench's 300"},
        "16 kB",
    ),
}
OTHER_CATEGORIES = (
    "Of T2I-CompBench attribute binding alone is judged (colour, texture, shape). UniDet, its detector, is missing for "
    "the categories spatial, 3D spatial (a depth network, too), numeracy and complex; non-spatial is a CLIP score."
)


def prompts(data: Path | None) -> list[Prompt]:
    """Raises BadSuite."""
    found = []
    for task, chosen in LISTS.items():
        texts = [line.strip() for line in chosen.read(data).splitlines()]
        for text, of_parsers in zip(texts, noun_chunks(chosen.name, texts)):
            questions, others = ([f"{chunk}?" for chunk in chunks] for chunks in of_parsers)
            found.append(Prompt(text, task, {"questions": questions, "other questions": others}))
    return found


def judges(_: Path | None) -> list[PictureJudge]:
    """Raises BadSuite."""
    return [CompbenchJudge(*loaded(BLIP_VQA))]


class CompbenchJudge:
    """How probable it is that a picture shows all that its prompt names, each with its attribute.

    Columns: the product of the answers; the same as T2I-CompBench prints it; the product by the other parser's chunks.
    """

    name = "blip-vqa"
    real = None

    def __init__(self, blip: BlipVqa, digest: str):
        self.blip = blip
        self.record = {"blip": digest, "chunks": parsers(), "version": 1}

    def __call__(self, pictures: Sequence[Image], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        answered = [self._answers(picture, prompt) for picture, prompt in zip(pictures, prompts)]
        rows = [_scores(answers, prompt) for answers, prompt in zip(answered, prompts)]
        columns = dict(zip(("score", "as published", "by other chunks"), torch.tensor(rows).T))
        reasons = ["; ".join(f"{question} {answer:.2f}" for question, answer in one.items()) for one in answered]
        return columns | {REASON: to_column(reasons)}

    def _answers(self, picture: Image, prompt: Prompt) -> dict[str, float]:
        asked = list(dict.fromkeys([*prompt.facts["questions"], *prompt.facts["other questions"]]))
        return dict(zip(asked, self.blip.answers(picture, asked)))


def _scores(answers: Mapping[str, float], prompt: Prompt) -> tuple[float, float, float]:
    mine, others = ([answers[one] for one in prompt.facts[key]] for key in ("questions", "other questions"))
    return math.prod(mine), as_published(mine), math.prod(others)


def as_published(answers: Sequence[float]) -> float:
    """Their product as T2I-CompBench makes it: four decimals of each and of the product, in single precision."""
    rounded = torch.tensor([float(f"{answer:.4f}") for answer in answers])
    return float(f"{float(math.prod(rounded)):.4f}")
