"""Random tensors that are the same numbers everywhere, so that no file of them has to be kept."""

import math
import zlib

import numpy as np
import torch
from torch import Tensor


def drawn(name: str, *shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    """Nearly normal values of that mean and standard deviation, in float64; each name has a stream of its own.

    Golden numbers were computed by other people's code from these values, so no version and no machine may draw others.
    numpy promises the raw integers of PCG64 for ever (not what its Generator makes of them; torch promises none of its
    streams). The rest is a sum of integers, a product and a sum, which IEEE 754 defines to the bit: no logarithm, no
    cosine, as other ways to a normal distribution have.
    """
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    parts = raw.astype("<u8").view("<u2").reshape(-1, 4)
    total = parts.sum(axis=1, dtype=np.int64)
    # A sum of four 16-bit integers has the mean 2 * 65535 and the standard deviation 65536 / sqrt(3).
    return torch.from_numpy((total - 2 * 65535) * (scale * math.sqrt(3) / 65536) + mean).reshape(shape)


def embedding(name: str, *shape: int) -> dict[str, Tensor]:
    return {name: drawn(name, *shape, scale=0.3)}


def matrix(name: str, *shape: int) -> dict[str, Tensor]:
    """shape: outputs first. Keeps the variance of its input."""
    return {name: drawn(name, *shape, scale=1 / math.sqrt(math.prod(shape[1:])))}


def linear(name: str, *shape: int, bias: float = 0.1) -> dict[str, Tensor]:
    """Weight and bias of a linear layer or a convolution. bias: the standard deviation of its bias."""
    return matrix(f"{name}.weight", *shape) | {f"{name}.bias": drawn(f"{name}.bias", shape[0], scale=bias)}


def norm(name: str, width: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": drawn(f"{name}.weight", width, mean=1.0, scale=0.1),
        f"{name}.bias": drawn(f"{name}.bias", width, scale=0.1),
    }
