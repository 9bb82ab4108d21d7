"""What a number is sure to. A benchmark's unit is the prompt: pictures of one prompt are no independent draws. Where
one prompt alone is asked about, the unit is the seed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.05
"""A difference is told where chance alone would give one so large less often."""
FEWEST = 6
"""Differences of one sign have a chance of 2 in 2^N: with fewer of them that is never below LEVEL."""
_FLIPS, _FLIPPED_BY = 10_000, 82
"""Draws of signs, and their seed."""
_FARTHEST, _HALVINGS = 1000, 40
"""How far ends of an interval are looked for, in spreads of the flipped differences, and how often it is halved."""
_SHOWN = 1.96 + 0.84
"""Standard errors of the smallest difference that is found four times in five."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` units, with its standard error."""

    mean: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}" if self.count > 1 else f"{self.mean:.3f}"

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by Student's t."""
        from scipy.stats import t

        reach = float(t.ppf(1 - LEVEL / 2, max(1, self.count - 1))) * self.error
        return self.mean - reach, self.mean + reach

    @property
    def smallest_shown(self) -> float:
        """The smallest difference that a comparison with this error finds four times in five."""
        return _SHOWN * self.error


def of_prompts(values: Tensor) -> Tensor:
    """`[P]` means over the pictures of each prompt, of `[P, I]` with NaN where a picture was not judged."""
    return values.nanmean(1)


def diversity(features: Tensor) -> Tensor:
    """`[P]` mean distances between two of a prompt's pictures. features: `[I, P, F]`, two pictures of each at least."""
    return torch.stack([(a - b).norm(dim=-1) for n, a in enumerate(features) for b in features[:n]]).mean(0)


def estimate(values: Tensor) -> Estimate:
    """Of one number per unit `[P]`; those that are NaN are left out."""
    values = values[values.isfinite()].double()
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), error, len(values))


def mean_of_tasks(values: Tensor, tasks: list[Tensor]) -> Estimate:
    """The mean of the tasks' means, whatever their sizes; tasks: rows of each, `[P]` bool."""
    found = [estimate(values[rows]) for rows in tasks]
    error = sum(one.error**2 for one in found) ** 0.5 / len(found)
    return Estimate(sum(one.mean for one in found) / len(found), error, sum(one.count for one in found))


class PairedTest:
    """A permutation test, two-sided: how often flipping the signs of the units' differences at random gives a mean of
    the tasks' means at least as far from 0."""

    def __init__(self, differences: Tensor, tasks: list[Tensor]):
        """differences: `[P]`, NaN where one is not known. tasks: rows of each, `[P]` bool."""
        known = differences.isfinite()
        # Each unit counts by its task's size, as in the mean of the tasks' means.
        weights = sum((rows & known) / (rows & known).sum().clamp_min(1) for rows in tasks).double()
        terms = weights[known] * differences[known].double()
        stream = torch.Generator().manual_seed(_FLIPPED_BY)
        signs = torch.randint(0, 2, (_FLIPS, len(terms)), generator=stream, dtype=torch.int8).double() * 2 - 1
        self._sums = float(terms.sum()), float(weights.sum())
        self._flipped = signs @ terms, signs @ weights[known]

    def p(self, shift: float = 0.0) -> float:
        """Where `shift` is taken from all differences."""
        (seen, weight), (flipped, weights) = self._sums, self._flipped
        as_far = (flipped - shift * weights).abs() >= abs(seen - shift * weight) * (1 - 1e-12)
        return float((as_far.sum() + 1) / (_FLIPS + 1))

    @property
    def interval(self) -> tuple[float, float]:
        """95 %: the shifts that the test does not tell from the differences, 0 among them just where it tells nothing.
        Infinite where these are too few to tell anything."""
        return self._end(-1), self._end(1)

    def _end(self, side: int) -> float:
        seen, weight = self._sums
        if not weight:
            return side * math.inf
        # Differences that are all 0 are told from any shift.
        middle, spread = seen / weight, float(self._flipped[0].std()) / weight or 1.0
        inside, outside = 0.0, spread
        while self.p(middle + side * outside) >= LEVEL:
            if outside > _FARTHEST * spread:
                return side * math.inf
            inside, outside = outside, 2 * outside
        for _ in range(_HALVINGS):
            between = (inside + outside) / 2
            inside, outside = (between, outside) if self.p(middle + side * between) >= LEVEL else (inside, between)
        return middle + side * inside


def holm(chances: list[float]) -> list[float]:
    """The same for several questions at once (Holm, 1979)."""
    order = sorted(range(len(chances)), key=chances.__getitem__)
    found, worst = [0.0] * len(chances), 0.0
    for place, index in enumerate(order):
        worst = max(worst, min(1.0, (len(chances) - place) * chances[index]))
        found[index] = worst
    return found


def from_to(ends: tuple[float, float]) -> str:
    """An interval of differences."""
    if not all(map(math.isfinite, ends)):
        return "not known"
    # What rounds to zero has no sign.
    return " to ".join(f"{round(end, 3) + 0.0:+.3f}" for end in ends)


def in_words(difference: Estimate, p: float) -> str:
    """Whether a difference is one."""
    if p >= LEVEL:
        # By few units a difference may be larger than what many with this spread would find, and still be chance.
        larger = abs(difference.mean) >= difference.smallest_shown
        shown = "" if larger else f" (shown would be {difference.smallest_shown:.3f})"
        return f"cannot be told apart at this size{shown}"
    return "higher" if difference.mean > 0 else "lower"
