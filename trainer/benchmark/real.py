"""Statistics of real pictures, in files."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from maskunet_core.judges.frechet import Gaussian

from ..files import replacing


def write_real(path: Path, real: Gaussian) -> None:
    with replacing(path) as temporary:
        save_file({"mean": real.mean, "covariance": real.covariance, "count": torch.tensor(real.count)}, temporary)


def read_real(path: Path) -> Gaussian | None:
    """None where there is no such file."""
    if not path.is_file():
        return None
    tensors = load_file(path)
    return Gaussian(tensors["mean"], tensors["covariance"], int(tensors["count"]))
