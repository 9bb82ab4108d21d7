"""Distances between a method's pictures, all together, and real ones. Each comes with its influence `[N]`: what each of
the method's pictures does to it, by which its error and that of a paired difference are told."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from maskunet_core.judges.frechet import frechet_influence
from maskunet_core.judges.kernel import SCALE, cmmd, kid

from .real import KEPT, Real

FRECHET = "Frechet distance"


@dataclass(frozen=True)
class Distance:
    """column: of a judge's rows, the features that it is of. influence: of features `[N, F]`, the distance and its
    influence. of_pairs: whether it looks at all pairs of pictures."""

    name: str
    column: str
    influence: Callable[[Tensor, Real], tuple[float, Tensor]]
    of_pairs: bool = False

    def can_tell(self, real: Real | None) -> bool:
        return real is not None and (real.kept is not None or not self.of_pairs)


def _scaled(distance: Callable[[Tensor, Tensor], tuple[float, Tensor]]) -> Callable:
    """Of the first KEPT pictures, against the real ones that are kept."""

    def influence(features: Tensor, real: Real) -> tuple[float, Tensor]:
        value, of_each = distance(features[:KEPT], real.kept)
        return SCALE * value, SCALE * of_each

    return influence


def _frechet(features: Tensor, real: Real) -> tuple[float, Tensor]:
    return frechet_influence(features, real.gaussian)


DISTANCES = (
    Distance(FRECHET, "features", _frechet),
    Distance(f"KID x {SCALE}", "features", _scaled(kid), of_pairs=True),
    Distance(FRECHET, "class token", _frechet),
    Distance("CMMD", "embedding", _scaled(cmmd), of_pairs=True),
)
"""CMMD bears the factor by its definition."""
COLUMNS = {distance.column for distance in DISTANCES}
