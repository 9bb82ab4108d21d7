"""The toy world for training on rewards: its prompts, and a reward whose scale suits them."""

import torch
from torch import Tensor, nn

from maskunet_core.rewards.reward import BoundModel, BoundReward, Reward
from maskunet_core.rewards.toy import SIZE, log_probability
from maskunet_core.toy.captions import parse
from maskunet_core.toy.judge import fully_right
from maskunet_core.toy.model import load_reader
from maskunet_core.training.seeds import seeded

from ..toy.held_out import TUNING, held_out_prompts
from ..toy.world import sample_captioned

SINGLE = 0.1
"""Share of prompts with one object, which the model draws well already."""
FLOOR = -10.0
"""Log-probabilities below it count as this much: how wrong a picture is that shows nothing of its prompt is chance."""


class ToyJudgement(Reward):
    """1 for a picture that is fully right, plus a twentieth of the log-probability that it is, by reader A."""

    name = "toy"

    def __init__(self):
        self.reader = load_reader("reader_a")

    def bind(self, prompt: str) -> BoundReward:
        """Raises UnreadablePrompt for what is no sentence of the toy world."""
        caption = parse(prompt)

        def score(pictures: Tensor) -> Tensor:
            reading = self.reader(pictures)
            right = fully_right(reading, [caption] * len(pictures)).to(pictures)
            return right + log_probability(reading, caption).clamp_min(FLOOR) / 20

        return BoundModel(self.name, SIZE, self.reader, score)

    def modules(self) -> list[nn.Module]:
        return [self.reader]


class ToyReferee:
    """Whether pictures are right, by the reader that no training sees."""

    def __init__(self):
        self.reader = load_reader("reader_b")

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """pictures: `[N, 3, H, W]` in [0, 1]. Returns `[N]` of 0 and 1."""
        return fully_right(self.reader(pictures), [parse(prompt) for prompt in prompts]).float()


def toy_prompts(count: int = 6000, held_out: int = 400) -> tuple[list[str], list[str]]:
    """(to train on, held out): of two objects and of relations, and some of one; the second are those that settings are
    chosen by, without single objects."""
    _, captions = sample_captioned(5 * count, seeded(61))
    different = list(dict.fromkeys(captions))
    single = [str(caption) for caption in different if caption.kind == "one"]
    pairs = [str(caption) for caption in different if caption.kind != "one"]
    wanted = round(SINGLE * count)
    texts = single[:wanted] + pairs[: count - wanted]
    return texts, [str(caption) for caption in held_out_prompts(held_out, TUNING)]
