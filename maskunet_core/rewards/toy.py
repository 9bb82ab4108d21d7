"""The bundled toy reward: reader A's log-probability that a picture shows just what a prompt of the toy world says."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..toy.captions import Caption, parse
from ..toy.model import load_reader
from ..toy.readers import Reading
from ..toy.vocabulary import unknown_words
from .reward import BoundModel, BoundReward, Reward

SIZE = 64
"""Side in pixels of the pictures that the readers were trained on."""
_SLOPE = 16.0
"""Of the relation's logit. Neighbours in the toy world are about 0.3 of a picture further apart along the relation's
axis than across it: a logit near 5."""
_SMOOTH = 0.02
"""Below this distance across the axis, in picture widths, the absolute value is rounded off."""


class ToyReward(Reward):
    """Scores are at most 0, near 0 where all is right; each thing that is wrong costs about its logit. Always fp32."""

    name = "toy reward"

    def __init__(self):
        self.reader = load_reader("reader_a")

    def bind(self, prompt: str) -> BoundReward:
        """Raises UnreadablePrompt for what is no sentence of the toy world."""
        caption = parse(prompt)
        unread = tuple(unknown_words(prompt))
        return BoundModel(
            self.name, SIZE, self.reader, lambda pictures: log_probability(self.reader(pictures), caption), unread
        )

    def modules(self) -> list[nn.Module]:
        return [self.reader]


def log_probability(reading: Reading, caption: Caption) -> Tensor:
    """`[B]`: the objects that the caption names and no others, in the sizes and in the relation that it says."""
    pairs = [phrase.pair for phrase in caption.phrases]
    sign = -torch.ones_like(reading.presence[0])
    sign[pairs] = 1.0
    result = F.logsigmoid(sign * reading.presence).sum(1)
    for phrase in caption.phrases:
        if phrase.size is not None:
            result = result + F.logsigmoid((2 * phrase.size - 1) * reading.size[:, phrase.pair])
    if caption.relation is not None:
        result = result + F.logsigmoid(_SLOPE * _margin(caption.relation, *reading.position[:, pairs].unbind(1)))
    return result


def _margin(relation: int, first: Tensor, second: Tensor) -> Tensor:
    """How much further the two are apart along the relation's axis, in its direction, than across it. `[B]`"""
    dx, dy = (second - first).unbind(-1)
    along, across = ((dx, dy), (-dx, dy), (dy, dx), (-dy, dx))[relation]
    return along - (across.square() + _SMOOTH**2).sqrt()
