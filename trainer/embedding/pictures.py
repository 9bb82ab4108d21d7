"""Pictures to learn a word from, encoded once, each with the texts that may describe it."""

import dataclasses

import torch
from torch import Tensor

from maskunet_core.training.base import BaseModel
from maskunet_core.training.data import EncodedPictures

from ..config import Config
from ..pictures import encoded, picture_sizes
from .texts import scan_texts

ROW = "row"


def described_pictures(config: Config, base: BaseModel) -> "DescribedPictures":
    """The configured pictures, their latents encoded and kept. Raises BadData."""
    data = dataclasses.replace(config.data, flip=config.mirrors)
    found = encoded(
        scan_texts(config).require(),
        picture_sizes(config),
        dataclasses.replace(config, data=data),
        base,
        # Texts are encoded in each step: the word in them changes.
        encode_text=lambda text: {"none": torch.zeros(1)},
    )
    return DescribedPictures(found, config.mirrors, bool(config.of_weights))


class DescribedPictures:
    """Cached pictures, each with texts; the objective draws one of them in each step.

    mirrors: whether latents of mirrored pictures are there; drops: whether the empty text ever takes a text's place,
    from which no word is learned.
    """

    def __init__(self, data: EncodedPictures, mirrors: bool, drops: bool):
        self.data, self.mirrors, self.drops = data, mirrors, drops
        self.digests, self.buckets = data.digests, data.buckets
        self.texts = [caption.split("\n") for caption in data.captions]

    def __len__(self) -> int:
        return len(self.data)

    def latents(self, rows: Tensor, flips: Tensor | None = None) -> Tensor:
        return self.data.latents(rows, flips if self.mirrors else None)

    def conditions(self, rows: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """`row` [B], of which the text is to be drawn; -1 where the empty text takes its place."""
        return {ROW: torch.where(dropped & self.drops, -1, rows)}

    def split(self, held_out: int, seed: int) -> tuple["DescribedPictures", "DescribedPictures"]:
        parts = self.data.split(held_out, seed)
        return tuple(DescribedPictures(part, self.mirrors, self.drops) for part in parts)
