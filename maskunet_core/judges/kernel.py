"""Kernel distances (squared maximum mean discrepancies) between two sets of features, each row a picture's, in float64:
KID (arXiv 1801.01401) of Inception's features, and CMMD (arXiv 2401.09603) of CLIP's."""

from collections.abc import Callable

import torch
from torch import Tensor

SCALE = 1000
"""By which both are multiplied where people read them."""
_SIGMA = 10.0
_ROWS = 1000
"""Of the kernel's matrix that are in memory at once."""
Kernel = Callable[[Tensor, Tensor], Tensor]
"""Of `[N, F]` and `[M, F]`, `[N, M]`."""


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """KID's."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """CMMD's."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return (-squares / (2 * _SIGMA**2)).exp()


def kernel_influence(features: Tensor, reference: Tensor, kernel: Kernel, biased: bool) -> tuple[float, Tensor]:
    """The distance of features `[N, F]` to a reference `[M, F]`, and what each picture does to it, `[N]`, as
    `frechet_influence` tells it of that distance.

    biased: whether a picture is held against itself, too.
    """
    features, reference = features.double(), reference.double()
    own, across = _among(features, kernel, biased), _means(features, reference, kernel)
    distance = own.mean() + _among(reference, kernel, biased).mean() - 2 * across.mean()
    return float(distance), 2 * (own - own.mean() - across + across.mean())


def kid(features: Tensor, reference: Tensor) -> tuple[float, Tensor]:
    return kernel_influence(features, reference, cubic, biased=False)


def cmmd(features: Tensor, reference: Tensor) -> tuple[float, Tensor]:
    """features, reference: of length 1."""
    return kernel_influence(features, reference, gaussian, biased=True)


def _means(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """`[N]`: of the kernel between each of `x` and all of `y`."""
    return torch.cat([kernel(rows, y).mean(1) for rows in x.split(_ROWS)])


def _among(x: Tensor, kernel: Kernel, biased: bool) -> Tensor:
    """`[N]`: of the kernel between each and all, or all others."""
    if biased:
        return _means(x, x, kernel)
    sums = []
    for start in range(0, len(x), _ROWS):
        block = kernel(x[start : start + _ROWS], x)
        sums.append(block.sum(1) - block.diagonal(start))
    return torch.cat(sums) / (len(x) - 1)
