"""The masked linear layer."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_weight(weight: Tensor, mask: Tensor, strength: float = 1.0) -> Tensor:
    """`w * (1 - s * (1 - m))`: at strength 1 the paper's `w * m` (Eq. 6).

    weight: [out, in]. mask: [out, in] or [B, out, in], bool or of the weight's dtype. Differentiable in both.
    """
    mask = mask.to(weight.dtype)
    if strength != 1.0:
        mask = 1.0 - strength * (1.0 - mask)
    return weight * mask


def shared_by_all_samples(mask: Tensor) -> Tensor:
    """`[B, out, in]` becomes `[out, in]` where all samples have the same bits; other masks come back as they are."""
    if mask.ndim == 3 and len(mask) == 1:
        return mask[0]
    if mask.ndim == 3 and not mask.requires_grad and bool((mask[1:] == mask[:1]).all()):
        return mask[0]
    return mask


def linear_per_sample(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose weight may differ per sample (Eq. 7).

    x: [N, ..., in], where N is a multiple of B and the rows of one sample are neighbours (hosts that cut feature maps
    into tiles multiply the batch). weight: [out, in], shared, or [B, out, in]. bias: [out]. Returns [N, ..., out].
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    rows = x.reshape(weight.shape[0], -1, x.shape[-1])
    products = torch.bmm(rows, weight.transpose(1, 2))
    if bias is not None:
        products = products + bias
    return products.reshape(*x.shape[:-1], weight.shape[1])


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, strength: float = 1.0) -> Tensor:
    """`x (m * w)^T + bias`, one product for all samples that share a mask; shapes as in `linear_per_sample`."""
    return linear_per_sample(x, masked_weight(weight, shared_by_all_samples(mask), strength), bias)
