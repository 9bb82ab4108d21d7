"""What distances need of real pictures, in files."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskunet_core.judges.frechet import Gaussian
from maskunet_core.replacing import replacing

KEPT = 5000
"""Of each set of pictures, for distances that look at all pairs."""


@dataclass(frozen=True)
class Real:
    """gaussian: of all pictures' features. kept: the features `[M, F]` of some, None where just the former is known."""

    gaussian: Gaussian
    kept: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> "Real":
        """features: `[N, F]`; of more than KEPT every second, third and so on is kept."""
        return cls(Gaussian.of(features), features[:: -(-len(features) // KEPT)])


def write_real(path: Path, real: Real) -> None:
    of_all = real.gaussian
    tensors = {"mean": of_all.mean, "covariance": of_all.covariance, "count": torch.tensor(of_all.count)}
    if real.kept is not None:
        tensors["features"] = real.kept.contiguous()
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def read_real(path: Path) -> Real | None:
    """None where there is no such file."""
    if not path.is_file():
        return None
    tensors = load_file(path)
    of_all = Gaussian(tensors["mean"], tensors["covariance"], int(tensors["count"]))
    return Real(of_all, tensors.get("features"))
