"""What a step of training sees: a function of seed and step number alone, whoever computes which part of it."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskUNetError
from .buckets import Order
from .seeds import seeded
from .settings import Settings
from .texts import by_length, joined


class UnfitPrior(MaskUNetError):
    """Class pictures that cannot share batches with the pictures trained on."""


@dataclass
class Batch:
    """Samples of a step, or a part of them.

    clean, noise: [B, C, h, w]; conditions: each [B, ...]; timesteps: [B]. weights: [B], of the samples' losses, so that
    the mean of the weighted losses over the whole batch is what is minimised.
    """

    clean: Tensor
    conditions: dict[str, Tensor]
    timesteps: Tensor
    noise: Tensor
    weights: Tensor

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(
            *(
                {k: change(v) for k, v in value.items()} if isinstance(value, dict) else change(value)
                for value in values
            )
        )

    def pinned(self) -> "Batch":
        """In page-locked memory, from where `part` copies to a GPU while the CPU goes on."""
        return self._each(Tensor.pin_memory)

    def part(self, index: int, parts: int, device: torch.device | None = None) -> "Batch":
        """Part `index` of `parts` equal ones, moved to `device` where one is named."""
        size = len(self.clean) // parts
        rows = slice(index * size, (index + 1) * size)
        if device is None:
            return self._each(lambda value: value[rows])
        return self._each(lambda value: value[rows].to(device, non_blocking=value.is_pinned()))

    def chosen(self, which: list[bool]) -> "Batch":
        """The samples for which `which` says so."""
        rows = torch.tensor(which).nonzero()[:, 0]
        return self._each(lambda value: value[rows.to(value.device)])

    def by_length(self) -> list[tuple[Tensor | slice, "Batch"]]:
        """The rows whose texts are equally long, and a batch of each."""
        groups = by_length(self.conditions)
        return [(rows, replace(self._each(itemgetter(rows)), conditions=group)) for rows, group in groups]


class Batches:
    """The batches of a run, on the CPU.

    data: what is trained on. prior: pictures of the class (DreamBooth's prior preservation), with a bucket for each
    shape of latents in `data`; None for none. Raises UnfitPrior.
    """

    def __init__(self, data: Any, config: Settings, timesteps: int, prior: Any = None):
        self.data, self.prior, self.config, self.timesteps = data, prior, config, timesteps
        batch = config.loop.batch
        self._of_class = 0
        self._class_orders: dict[torch.Size, Order] = {}
        if prior is not None:
            if batch < 2:
                raise UnfitPrior("A batch holds class pictures and others: raise loop.batch to 2 or more.")
            self._of_class = min(max(1, round(config.prior.share * batch)), batch - 1)
            self._class_orders = {
                _shape(prior, rows): Order([rows], self._of_class, config.seed) for rows in prior.buckets
            }
            missing = {_shape(data, rows) for rows in data.buckets} - set(self._class_orders)
            if missing:
                raise UnfitPrior(
                    f"The class pictures lack latents of the shape {tuple(min(missing))}, which is among those trained "
                    "on: make them in the same sizes."
                )
        self._order = Order(data.buckets, batch - self._of_class, config.seed)

    def draw(self, step: int, index: int = 0, parts: int = 1) -> Batch:
        """The batch of a step, counted from 0, in which class pictures come last; of several equal parts that with this
        index, for which no more is read."""
        rows = self._order.rows(step)
        count = len(rows) + self._of_class
        mine = slice(index * count // parts, (index + 1) * count // parts)
        stream = seeded(20, self.config.seed, step)
        drawn = torch.randint(self.timesteps, (count,), generator=stream)
        dropped = torch.rand(count, generator=stream) < self.config.data.caption_dropout
        flips = torch.rand(count, generator=stream) < 0.5 if self.config.data.flip else None
        sources = [(self.data, rows)]
        if self.prior is not None:
            sources.append((self.prior, self._class_orders[_shape(self.data, rows)].rows(step)))
        found, first = [], 0
        for data, of_source in sources:
            chosen = slice(max(mine.start - first, 0), max(mine.stop - first, 0))
            if len(own := of_source[chosen]):
                there = slice(max(mine.start, first), max(mine.start, first) + len(own))
                found.append(_read(data, own, dropped[there], None if flips is None else flips[there]))
            first += len(of_source)
        clean = torch.cat([latents for latents, _ in found])
        conditions = found[0][1] if len(found) == 1 else joined(*(conditions for _, conditions in found))
        noise = torch.randn(count, *clean.shape[1:], generator=stream)
        return Batch(clean, conditions, drawn[mine], noise[mine], self._weights(len(rows))[mine])

    def _weights(self, count: int) -> Tensor:
        """The loss is the mean over `count` pictures, plus prior.weight times the mean over class pictures."""
        whole = count + self._of_class
        weights = torch.full((whole,), whole / count)
        if self._of_class:
            weights[count:] = self.config.prior.weight * whole / self._of_class
        return weights


def _shape(data: Any, rows: Tensor) -> torch.Size:
    return data.latents(rows[:1]).shape[1:]


def _read(data: Any, rows: Tensor, dropped: Tensor, flips: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    return data.latents(rows, flips), data.conditions(rows, dropped)
