"""The masked linear layer, with given masks (Eqs. 6 and 7), and with masks that are being learned."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_weight(weight: Tensor, mask: Tensor, strength: float = 1.0) -> Tensor:
    """`w * (1 - s * (1 - m))`: at strength 1 the paper's `w * m` (Eq. 6).

    weight, mask: [out, in] or [B, out, in]; the mask is bool or of the weight's dtype. Differentiable in both.
    """
    factor = mask.to(weight.dtype)
    if strength != 1.0:
        factor = 1.0 - strength * (1.0 - factor)
    if factor is mask or factor.ndim < weight.ndim:
        return weight * factor
    # Memory that is fresh costs more than the product itself.
    return factor.mul_(weight)


def shared_by_all_samples(mask: Tensor) -> Tensor:
    """`[B, out, in]` becomes `[out, in]` where all samples have the same bits; other masks come back as they are.

    Beyond the CPU bits are not looked at: to wait for them at every layer would leave the device without work.
    """
    if mask.ndim != 3 or mask.requires_grad:
        return mask
    looked_at = mask.device.type == "cpu" and all(torch.equal(mask[0], other) for other in mask[1:])
    return mask[0] if looked_at or len(mask) == 1 or mask.stride(0) == 0 else mask


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


BLOCK, DEVICE_BLOCK = 1 << 18, 1 << 24
"""Logits that are computed at once where only their signs are wanted: few enough to stay in a core's cache; on other
devices than the CPU enough that starting the work is not most of it, in 64 MB at most."""


@dataclass(frozen=True)
class MaskLogits:
    """l = static + left right^T of one layer, for M masks.

    static: [out, in] (or what broadcasts to it), or [M, out, in]. left: [M, out, rank], right: [in, rank], or neither.
    """

    static: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def full(self) -> Tensor:
        """[M, out, in]; M is 1 where nothing tells masks apart."""
        if self.left is None or self.right is None:
            return self.static if self.static.ndim == 3 else self.static[None]
        return torch.baddbmm(self.static, self.left, self.right.T.expand(len(self.left), -1, -1))

    def above(self, threshold: float) -> Tensor:
        """`full() > threshold` in blocks of rows, so that the logits, many times the bits' size, never exist."""
        if self.left is None or self.right is None:
            return self.full() > threshold
        masks, rows, columns = len(self.left), self.left.shape[1], len(self.right)
        static = self.static.expand(*self.static.shape[:-2], rows, columns)
        kept = self.left.new_empty(masks, rows, columns, dtype=torch.bool)
        block = BLOCK if kept.device.type == "cpu" else DEVICE_BLOCK
        step = max(1, block // (masks * columns))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            logits = MaskLogits(static[..., part, :], self.left[:, part], self.right).full()
            torch.gt(logits, threshold, out=kept[:, part])
        return kept


def thresholded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: MaskLogits,
    threshold: float,
    tau: float = 1.0,
    noise: Callable[[torch.Size], Tensor] | None = None,
    chunks: int = 1,
) -> Tensor:
    """A linear layer whose weight counts where `logits > threshold`, with the straight-through gradient (Eq. 5).

    x: [chunks * M * k, ..., in]: `chunks` runs through the M masks, k neighbouring rows per mask. weight: [out, in] or
    one for each of the chunks * M, frozen. noise: gives the same values, of the given shape, whenever it is called;
    they are added to the logits. Only `x` and the terms of the logits are kept for the backward pass: masks and masked
    weights, which are the size of all masked weights times M, are made anew in it.
    """
    if weight.ndim == 3 and chunks > 1:
        logits, chunks = MaskLogits(logits.full().repeat(chunks, 1, 1)), 1
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        masks = _count(logits)
        rows = x.to(dtype).reshape(chunks, masks, -1, x.shape[-1]).transpose(0, 1).reshape(masks, -1, x.shape[-1])
        options = (threshold, tau, noise)
        out = _ThresholdedProduct.apply(rows, weight.to(dtype), logits.static, logits.left, logits.right, options)
        if bias is not None:
            out = out + bias.to(dtype)
    out = out.reshape(masks, chunks, -1, out.shape[-1]).transpose(0, 1)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _count(logits: MaskLogits) -> int:
    if logits.left is not None:
        return len(logits.left)
    return len(logits.static) if logits.static.ndim == 3 else 1


class _ThresholdedProduct(torch.autograd.Function):
    """[M, R, in] times the masked weights: [M, R, out]."""

    @staticmethod
    def _logits(static, left, right, noise) -> Tensor:
        full = MaskLogits(static, left, right).full()
        return full if noise is None else full + noise(full.shape)

    @staticmethod
    def forward(ctx, rows, weight, static, left, right, options) -> Tensor:
        threshold, _, noise = ctx.options = options
        ctx.save_for_backward(rows, weight, static, left, right)
        kept = _ThresholdedProduct._logits(static, left, right, noise) > threshold
        return torch.bmm(rows, kept.to(weight.dtype).mul_(weight).transpose(1, 2))

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, static, left, right = ctx.saved_tensors
        threshold, tau, noise = ctx.options
        with torch.autocast(rows.device.type, enabled=False):
            gradient = gradient.to(rows.dtype)
            logits = _ThresholdedProduct._logits(static, left, right, noise)
            of_rows = None
            if ctx.needs_input_grad[0]:
                of_rows = torch.bmm(gradient, (logits > threshold).to(weight.dtype).mul_(weight))
            slope = torch.bmm(gradient.transpose(1, 2), rows).mul_(weight).to(logits.dtype)
            probability = (logits / tau).sigmoid_()
            torch.ops.aten.sigmoid_backward.grad_input(slope, probability, grad_input=slope)
            of_left = of_right = None
            if left is not None:
                of_left = (slope @ right).div_(tau)
                of_right = (slope.flatten(0, 1).T @ left.flatten(0, 1)).div_(tau)
            of_static = slope
            if static.ndim != 3:
                of_static = (slope[0] if len(slope) == 1 else slope.sum(0)).sum_to_size(static.shape)
        return of_rows, None, of_static.div_(tau), of_left, of_right, None
