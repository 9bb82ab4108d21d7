"""The Frechet distance (FID) between two sets of features, each row a picture's, in float64."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_FLOOR = 1e-10
"""Of the largest eigenvalue: smaller ones count as this much where they are divided by."""


@dataclass(frozen=True)
class Gaussian:
    """The set that others are held against. mean: `[F]`; covariance: `[F, F]`, divided by N - 1; count: N."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> "Gaussian":
        """features: `[N, F]`."""
        features = features.double()
        return cls(features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1), len(features))

    @cached_property
    def root(self) -> Tensor:
        """`[F, F]`: of the covariance. Computed once."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(features: Tensor, reference: Gaussian) -> float:
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2 of features `[N, F]`."""
    own = Gaussian.of(features)
    middle = torch.linalg.eigvalsh(reference.root @ own.covariance @ reference.root)
    return _distance(own, reference, middle)


def _distance(own: Gaussian, reference: Gaussian, middle: Tensor) -> float:
    """middle: eigenvalues of S2^1/2 S1 S2^1/2, whose root has the trace of (S1 S2)^1/2."""
    traces = own.covariance.trace() + reference.covariance.trace() - 2 * middle.clamp_min(0).sqrt().sum()
    return float((own.mean - reference.mean).square().sum() + traces)


def frechet_influence(features: Tensor, reference: Gaussian) -> tuple[float, Tensor]:
    """The distance of features `[N, F]`, and what each picture does to it, `[N]`: the influence function.

    Its standard deviation over the root of N is the distance's standard error, the reference taken as given; that of
    the difference of two methods' influences, picture by picture, is the error of the difference of their distances.
    Resampling would add the bias of small samples once more.
    """
    own = Gaussian.of(features)
    values, vectors = torch.linalg.eigh(reference.root @ own.covariance @ reference.root)
    floored = values.clamp_min(_FLOOR * values.max()).clamp_min(torch.finfo(values.dtype).tiny)
    half = reference.root @ vectors / floored**0.25
    centred = features.double() - own.mean
    shift = 2 * centred @ (own.mean - reference.mean)
    spread = centred.square().sum(1) - (centred @ half).square().sum(1)
    expected = own.covariance.trace() - ((half.T @ own.covariance) * half.T).sum()
    return _distance(own, reference, values), shift + spread - expected
