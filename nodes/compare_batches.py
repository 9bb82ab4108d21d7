"""Two batches of the same seeds, scored and compared picture by picture."""

import json
import textwrap
from dataclasses import dataclass

import torch
from comfy_api.latest import io
from torch import Tensor

from ..maskunet_core.errors import MaskUNetError
from ..maskunet_core.judges.statistics import FEWEST, LEVEL, PairedTest, estimate, from_to, in_words
from .boxes import boxed
from .candidate_sheet import CHOSEN, LARGEST, PAPER, Colour, sheet_of
from .judges import LoadedJudge, lines_of, unread_words
from .legend import captioned
from .node_text import tell, words_in_a_line
from .pictures import brought_to, coloured, padded
from .rewards import CROP, LoadedReward, for_json, scored, total
from .types import JudgeType, RewardType

_WORSE: Colour = (0.94, 0.27, 0.27)
_SHOWN, _LINE = 48, 50
"""Pairs on the sheet, at most, and letters in a line under it."""


@dataclass(frozen=True)
class ScoredBatch:
    """scores: `[B]`; pictures: `[h, w, 3]` each, as they are shown; lines: of text under each; unread: a sentence about
    words of the prompt, or none."""

    scores: Tensor
    pictures: list[Tensor]
    lines: list[list[str]]
    unread: str


class MaskUNetCompareBatches(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetCompareBatches",
            display_name="MaskUNet Compare Batches",
            category="MaskUNet/judge",
            description="Tells whether batch B is better than batch A, or whether chance alone could have made the "
            "difference: pictures of the same seed are compared, and the mean difference comes with its 95 % interval.",
            search_aliases=["a/b test", "compare images", "statistics", "significance", "benchmark", "side by side"],
            inputs=[
                io.Image.Input("images_a", tooltip="The batch that is compared with, such as the stock sampler's."),
                io.Image.Input(
                    "images_b", tooltip="The other one, drawn with the same seed and batch size, such as with masks."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="What all pictures should show, as the judge or the reward reads it.",
                ),
                io.MultiType.Input(
                    "judge",
                    types=[JudgeType, RewardType],
                    tooltip="A judge from MaskUNet Judge Loader, which finds pictures right or wrong, or a reward from "
                    "MaskUNet Reward Loader or Combine. Take one that no sampler of the graph follows.",
                ),
            ],
            outputs=[
                io.Float.Output("difference", tooltip="Mean score of B minus that of A."),
                io.Image.Output(
                    "sheet",
                    tooltip="A and B of each seed side by side: framed green where B is better, red where A.",
                ),
                io.String.Output("verdict", tooltip="In words: which is better, by how much, and how sure that is."),
                io.String.Output("table", tooltip="All numbers as JSON: both scores of each pair, interval and p."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, images_a: Tensor, images_b: Tensor, prompt: str, judge: LoadedJudge | LoadedReward
    ) -> io.NodeOutput:
        batches = [coloured(images_a, "images_a"), coloured(images_b, "images_b")]
        if len(images_a) != len(images_b):
            raise MaskUNetError(
                f"Batch A holds {len(images_a)} pictures and batch B {len(images_b)}, but each picture is compared "
                "with that of the same seed: draw both with the same seed and batch size."
            )
        with torch.inference_mode(False), torch.no_grad():
            a, b = (_scored(judge, images, prompt) for images in batches)
        differences = b.scores - a.scores
        if not differences.isfinite().any():
            raise MaskUNetError("No pair has two scores: the pictures hold no numbers, or the reward gives none.")
        verdict, numbers = told(differences)
        tell("\n".join(line for line in (verdict, b.unread) if line), cls.hidden.unique_id)
        table = {"prompt": prompt, "a": for_json(a.scores.tolist()), "b": for_json(b.scores.tolist()), **numbers}
        text = json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False)
        return io.NodeOutput(numbers["difference"], _sheet(a, b, verdict), verdict, text)


def _scored(judge: LoadedJudge | LoadedReward, images: Tensor, prompt: str) -> ScoredBatch:
    if isinstance(judge, LoadedReward):
        bound, parts = scored(judge, images, prompt, CROP)
        scores = total(parts)
        lines = [[f"{score:.3f}"] for score in scores.tolist()]
        return ScoredBatch(scores, list(images), lines, words_in_a_line(bound))
    bound, verdicts = judge.verdicts(images, prompt)
    return ScoredBatch(
        torch.tensor([verdict.score for verdict in verdicts], dtype=torch.float64),
        [boxed(picture, verdict, LARGEST, LARGEST) for picture, verdict in zip(images, verdicts)],
        [lines_of(verdict) for verdict in verdicts],
        "\n".join(unread_words(bound, judge.judge.name)),
    )


def told(differences: Tensor) -> tuple[str, dict[str, float | int | list[float]]]:
    """What paired differences `[B]`, B minus A, are sure to tell: in words, and in numbers."""
    found, test = estimate(differences), PairedTest(differences, [torch.ones(len(differences), dtype=torch.bool)])
    p, ends = test.p(), test.interval
    numbers = {"difference": found.mean, "interval": for_json(ends), "p": p, "pairs": found.count}
    pairs = f"{found.count} pair{'' if found.count == 1 else 's'}"
    # Without spread, or of few, there is no interval to tell.
    interval = f", interval {from_to(ends)}" if found.error and found.count >= FEWEST else ""
    shown = f"difference {found.mean:+.3f}{interval}, p {p:.3f}, {pairs}"
    if not found.error and not found.mean:
        return f"A and B score alike: {pairs}", numbers
    if found.count < FEWEST:
        return f"A and B cannot be told apart by fewer than {FEWEST} pairs: {shown}", numbers
    words = in_words(found, p)
    return f"B scores {words} than A: {shown}" if p < LEVEL else f"A and B {words}: {shown}", numbers


def _sheet(a: ScoredBatch, b: ScoredBatch, verdict: str) -> Tensor:
    """`[1, H, W, 3]`."""
    count = min(len(a.pictures), _SHOWN)
    halves = [brought_to(picture, LARGEST, LARGEST) for one in (a, b) for picture in one.pictures[:count]]
    lines = [[f"{name}  {first}", *more] for name, one in zip("AB", (a, b)) for first, *more in one.lines[:count]]
    tiles = captioned(padded(halves, PAPER), lines)
    tiles = torch.cat([tiles[:count], tiles[count:]], 2)
    better = (b.scores - a.scores)[:count].tolist()
    frames = {n: CHOSEN if change > 0 else _WORSE for n, change in enumerate(better) if change > 0 or change < 0}
    return captioned(sheet_of(tiles, frames)[None], [textwrap.wrap(verdict, _LINE)])
