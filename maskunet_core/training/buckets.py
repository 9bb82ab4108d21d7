"""Aspect-ratio buckets: the sizes, how a picture is brought to one, and which rows make up the batch of a step."""

import math

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .seeds import seeded

Size = tuple[int, int]  # (width, height), as Pillow has it


def bucket_sizes(resolution: int, step: int = 64, limit: float = 2.0) -> list[Size]:
    """(width, height) of every bucket, from tall to wide: for each long side, the largest short one.

    Sides are multiples of `step`, no area exceeds resolution², and no side is more than `limit` times the other; with
    a limit of 1 there is the one square. Raises ValueError where not even that fits.
    """
    square = resolution // step * step
    if square == 0:
        raise ValueError(f"A resolution of {resolution} is below the step of buckets, {step}: choose a higher one.")
    sizes = set()
    for long in range(square, resolution * resolution // step + 1, step):
        short = min(long, resolution * resolution // long // step * step)
        if long <= limit * short:
            sizes |= {(long, short), (short, long)}
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))


def nearest_bucket(width: int, height: int, sizes: list[Size]) -> Size:
    """The size whose aspect ratio is nearest on a logarithmic scale; of equally near ones the largest."""

    def distance(size: Size) -> tuple[float, int]:
        return round(abs(math.log(width * size[1] / (height * size[0]))), 9), -size[0] * size[1]

    return min(sizes, key=distance)


def fit(image: Image.Image, size: Size) -> Tensor:
    """The middle of an RGB picture, scaled to cover (width, height): [3, height, width] in [0, 1]."""
    fitted = ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous().float() / 255


class Epoch:
    """One epoch in random order: batches of `batch` rows, each from one bucket; made up when they are asked for.

    buckets: the rows of each, [N]. Every row comes up. A bucket's last batch is filled with other rows of the bucket,
    which come up twice then; a batch holds a row twice only where its bucket has fewer rows than a batch.
    """

    def __init__(self, buckets: list[Tensor], batch: int, generator: torch.Generator):
        self._shuffled = [rows[torch.randperm(len(rows), generator=generator)] for rows in buckets]
        self._batch = batch
        counts = [math.ceil(len(rows) / batch) for rows in buckets]
        self._ends = np.cumsum(counts)
        self._order = torch.randperm(sum(counts), generator=generator)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> Tensor:
        """[batch]"""
        number = int(self._order[place])
        bucket = int(np.searchsorted(self._ends, number, side="right"))
        first = number - (int(self._ends[bucket - 1]) if bucket else 0)
        rows = self._shuffled[bucket]
        return rows[torch.arange(first * self._batch, (first + 1) * self._batch) % len(rows)]


class Order:
    """Which rows make up the batch of a step: a function of seed and step alone, so that a run can be resumed."""

    def __init__(self, buckets: list[Tensor], batch: int, seed: int):
        self.buckets, self.batch, self.seed = buckets, batch, seed
        self.steps_per_epoch = sum(math.ceil(len(rows) / batch) for rows in buckets)
        self._latest: tuple[int, Epoch] | None = None

    def rows(self, step: int) -> Tensor:
        """[batch] row indices of one bucket, for steps counted from 0."""
        number, place = divmod(step, self.steps_per_epoch)
        latest = self._latest
        if latest is None or latest[0] != number:
            # Threads that read ahead may both make it; either is the same.
            latest = self._latest = number, Epoch(self.buckets, self.batch, seeded(40, self.seed, number))
        return latest[1][place]
