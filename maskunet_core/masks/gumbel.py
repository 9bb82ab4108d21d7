"""From logits to binary masks (Eq. 5). All masks of the project come from `binary_mask`."""

import math

import torch
from torch import Tensor

_TINY = 1e-7


def threshold_of(tau: float, delta: float) -> float:
    """The logit at which `sigmoid(logit / tau)` is delta."""
    return tau * math.log(delta / (1 - delta))


def binary_mask(logits: Tensor, threshold: float, noise: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Eq. 5: True where `logits (+ noise)` lie above the threshold, see `threshold_of`: these weights are kept.

    logits: [..., out, in]. noise: of the same shape, see `logistic_noise`; None takes the likelier decision. out: bool
    tensor to write into.
    """
    return torch.gt(logits if noise is None else logits + noise, threshold, out=out)


def straight_through(logits: Tensor, threshold: float, tau: float = 1.0) -> Tensor:
    """`binary_mask` as zeros and ones of the dtype of `logits`; the gradient is that of `sigmoid(logits / tau)`.

    Layers whose masks are learned compute the same without keeping it: `linear.thresholded_linear`.
    """
    probability = torch.sigmoid(logits / tau)
    return binary_mask(logits, threshold).to(logits.dtype) + (probability - probability.detach())


def gumbel_noise(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Samples of the standard Gumbel distribution, on the generator's device."""
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return (-(-uniform.clamp(_TINY, 1 - _TINY).log()).log()).to(dtype)


def logistic_noise(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """The difference of two Gumbel samples, which is logistic: P(l + g > 0) = sigmoid(l)."""
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return torch.logit(uniform, eps=_TINY).to(dtype)
