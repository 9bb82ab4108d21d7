"""What ReVersion (Huang et al., arXiv 2303.13495) adds for relations: timesteps by importance, and a steering loss."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Relation
from ..files import user_path
from .texts import LISTS, lines_of
from .word import BadText, LearnedWord

_NONE = -1
"""Fills the rows of positives, which have different lengths."""


def importance(timesteps: int, alpha: float) -> Tensor:
    """[timesteps], of sum 1: the chance of each timestep, (1 - alpha cos(pi t / T)) / T; layout is decided late."""
    t = torch.arange(timesteps, dtype=torch.float64)
    chances = 1 - alpha * torch.cos(math.pi * t / timesteps)
    return (chances / chances.sum()).float()


def steering_loss(vectors: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE with several positives, the mean over the vectors.

    vectors: [v, d]; positives: [P, d]; negatives: [N, d].
    """
    near, far = (
        F.normalize(vectors, dim=-1) @ F.normalize(others, dim=-1).T / temperature for others in (positives, negatives)
    )
    return (torch.cat([near, far], 1).logsumexp(1) - near.logsumexp(1)).mean()


def negative_ids(ids: Tensor, excluded: Tensor) -> Tensor:
    """[N]: what of the texts' ids describes the things: neither vectors of the word nor excluded ids."""
    return ids[(ids >= 0) & ~torch.isin(ids, excluded)]


class Steering:
    """Draws positives and computes the loss in the text encoders' input, without gradients for other words' vectors.

    Raises BadText where the base knows no word of the list.
    """

    def __init__(self, word: LearnedWord, settings: Relation):
        self.word, self.settings = word, settings
        words = lines_of(user_path(settings.words) if settings.words else LISTS / "relations.txt")
        self._words = [ids for ids in map(word.inner_ids, words) if all(ids.values())]
        if not self._words:
            raise BadText("embedding.relation.words: the text encoder knows no word of the list: name another list.")
        stop = [word.inner_ids(line) for line in [*lines_of(LISTS / "stop.txt"), *words]]
        self._excluded = {
            encoder.key: torch.tensor([*encoder.special_ids, *(i for ids in stop for i in ids[encoder.key])])
            for encoder in word.encoders
        }

    def drawn(self, count: int, stream: torch.Generator) -> dict[str, Tensor]:
        """[count, P] ids by encoder: of `positives` different words for each picture."""
        each = min(self.settings.positives, len(self._words))
        chosen = [torch.randperm(len(self._words), generator=stream)[:each].tolist() for _ in range(count)]
        found = {}
        for key in self._excluded:
            rows = [torch.tensor([i for n in places for i in self._words[n][key]]) for places in chosen]
            found[key] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_NONE)
        return found

    def __call__(self, ids: dict[str, Tensor], positives: dict[str, Tensor]) -> Tensor:
        """The mean over the encoders, of the texts `ids` [B, T] and `positives` [B, P] of a batch."""
        losses = []
        for encoder in self.word.encoders:
            key = encoder.key
            near = positives[key][positives[key] != _NONE]
            far = negative_ids(ids[key], self._excluded[key].to(ids[key].device))
            vectors = self.word.vectors[key]
            rows = (encoder.table[found.to(encoder.table.device)].to(vectors) for found in (near, far))
            losses.append(steering_loss(vectors, *rows, self.settings.temperature))
        return torch.stack(losses).mean()
