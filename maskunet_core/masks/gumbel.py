"""From logits to binary masks."""

import math

import torch
from torch import Tensor

_TINY = 1e-7


def gumbel_sigmoid(logits: Tensor, *, tau: float = 1.0, delta: float = 0.5, noise: Tensor | None = None) -> Tensor:
    """Binary mask with a straight-through gradient (Eq. 5).

    logits: [..., out, in]. noise: of the same shape, see `logistic_noise`; None takes the likelier decision.
    Returns zeros and ones of the dtype of `logits`; the gradient is that of the sigmoid.
    """
    if noise is not None:
        logits = logits + noise
    return straight_through(logits, tau * math.log(delta / (1 - delta)), tau)


def straight_through(logits: Tensor, threshold: float, tau: float = 1.0) -> Tensor:
    """1 where `logits > threshold`, else 0; the gradient is that of `sigmoid(logits / tau)`.

    Layers whose masks are learned compute the same without keeping it: `linear.thresholded_linear`.
    """
    probability = torch.sigmoid(logits / tau)
    return (logits > threshold).to(logits.dtype) + (probability - probability.detach())


def gumbel_noise(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Samples of the standard Gumbel distribution, on the generator's device."""
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return (-(-uniform.clamp(_TINY, 1 - _TINY).log()).log()).to(dtype)


def logistic_noise(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """The difference of two Gumbel samples, which is logistic: P(l + g > 0) = sigmoid(l)."""
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return torch.logit(uniform, eps=_TINY).to(dtype)
