"""What a learned word is trained by: a text for each picture of a step, and what relations take besides."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskunet_core.training.batches import Batch
from maskunet_core.training.objective import DiffusionObjective
from maskunet_core.training.seeds import seeded
from maskunet_core.training.validate import Validator

from .pictures import ROW, DescribedPictures
from .relation import Steering, importance
from .word import LearnedWord


class TextIds:
    """Token ids of the texts of pictures, as the word gives them."""

    def __init__(self, word: LearnedWord, data: DescribedPictures):
        self._empty = word.ids("")
        self._rows = [[word.ids(text) for text in texts] for texts in data.texts]

    def drawn(self, rows: Tensor, stream: torch.Generator) -> dict[str, Tensor]:
        """[B, T] by encoder: one of the texts of each picture, the empty text for row -1."""
        shares = torch.rand(len(rows), generator=stream).tolist()
        chosen = [
            self._empty if row < 0 else self._rows[row][int(share * len(self._rows[row]))]
            for row, share in zip(rows.tolist(), shares)
        ]
        return {key: torch.stack([ids[key] for ids in chosen]) for key in self._empty}


@dataclass
class DescribedBatch(Batch):
    """`Batch` whose conditions are empty until `prepared`. ids, positives: [B, T] by encoder."""

    ids: dict[str, Tensor]
    positives: dict[str, Tensor]


class EmbeddingObjective(DiffusionObjective):
    """run: a Run whose method is an EmbeddingMethod; training: what it learns from."""

    def __init__(self, run: Any, training: DescribedPictures):
        super().__init__(run, training, None)
        self.word, settings = run.method.word, run.config.embedding
        self.texts = TextIds(self.word, training)
        relation = settings.relation if settings.kind == "relation" else None
        self._chances = importance(run.base.timesteps, relation.alpha) if relation else None
        self.steering = Steering(self.word, relation) if relation and relation.weight else None
        self._steered = math.nan

    def draw(self, step: int) -> DescribedBatch:
        found, stream = super().draw(step), seeded(26, self.run.config.seed, step)
        ids = self.texts.drawn(found.conditions[ROW], stream)
        count, timesteps = len(found.clean), found.timesteps
        if self._chances is not None:
            timesteps = torch.multinomial(self._chances, count, replacement=True, generator=stream)
        positives = self.steering.drawn(count, stream) if self.steering else {}
        return DescribedBatch(found.clean, {}, timesteps, found.noise, found.weights, ids, positives)

    def draw_part(self, step: int, index: int, parts: int) -> DescribedBatch:
        return self.draw(step).part(index, parts)

    def prepared(self, part: DescribedBatch) -> DescribedBatch:
        part.conditions = self.word.encode(part.ids)
        return part

    def losses(self, part: DescribedBatch) -> Tensor:
        found = super().losses(part)
        if self.steering is None:
            return found
        steered = self.steering(part.ids, part.positives)
        self._steered = steered.item()
        return found + self.run.config.embedding.relation.weight * steered

    def told(self) -> dict[str, float]:
        return self.word.told() | ({"steering": self._steered} if self.steering else {})

    def validator(self, held_out: DescribedPictures) -> "EmbeddingValidator":
        return EmbeddingValidator(self.run, held_out)


class EmbeddingValidator(Validator):
    """The held-out loss with the word, paired with that of its start."""

    def __init__(self, run: Any, held_out: DescribedPictures):
        super().__init__(run, held_out)
        self._texts = TextIds(run.method.word, held_out)

    def _conditions(self, rows: Tensor, stream: torch.Generator) -> dict[str, Tensor]:
        return self.run.method.word.encode(self._texts.drawn(rows, stream))
