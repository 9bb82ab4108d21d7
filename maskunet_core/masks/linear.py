"""The masked linear layer (Eqs. 6 and 7): masks that are given, and masks that are being learned."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MaskUNetError
from .gumbel import binary_mask


class UnknownRows(MaskUNetError):
    """Another node has rearranged a batch, so that masks of single images cannot follow; the message says where."""


def masked_weight(weight: Tensor, mask: Tensor, strength: float = 1.0) -> Tensor:
    """`w * (1 - s * (1 - m))`: at strength 1 the paper's `w * m` (Eq. 6).

    weight, mask: [out, in] or [B, out, in]; the mask is bool or of the weight's dtype. Differentiable in both.
    """
    if mask.dtype == torch.bool and strength == 1.0:
        # As bytes: bits that are first made numbers of the weight's kind take twice the passes over memory.
        return weight * mask.view(torch.uint8)
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


def require_neighbours(x: Tensor, samples: int, tokens: int, layer: str) -> None:
    """Raises UnknownRows unless the rows of a sample are neighbours in `x` `[N, ..., in]`.

    Of other batches than that of the call, those are known in which the same tokens were cut into tiles, sample by
    sample. tokens: of the feature map that entered the block, 0 where they are not known.
    """
    count = x.shape[:-1].numel()
    if len(x) == samples or (len(x) % samples == 0 and (not tokens or count == samples * tokens)):
        return
    raise UnknownRows(
        f"Another node's patch changes the batch inside the attention ({layer} gets {len(x)} rows for {samples} "
        "samples), so masks of single images cannot follow. Remove that patch (attention couple, regional attention), "
        "or use masks that all images share, such as MaskUNet Random Mask."
    )


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

    @property
    def count(self) -> int:
        """M; 1 where nothing tells masks apart."""
        if self.left is not None:
            return len(self.left)
        return len(self.static) if self.static.ndim == 3 else 1

    def full(self) -> Tensor:
        """[M, out, in]."""
        if self.left is None or self.right is None:
            return self.static if self.static.ndim == 3 else self.static[None]
        return torch.baddbmm(self.static, self.left, self.right.T.expand(len(self.left), -1, -1))

    def above(self, threshold: float) -> Tensor:
        """`binary_mask` of the full logits in blocks of rows, so that they, many times the bits' size, never exist."""
        if self.left is None or self.right is None:
            return binary_mask(self.full(), threshold)
        masks, rows, columns = len(self.left), self.left.shape[1], len(self.right)
        static = self.static.expand(*self.static.shape[:-2], rows, columns)
        kept = self.left.new_empty(masks, rows, columns, dtype=torch.bool)
        block = BLOCK if kept.device.type == "cpu" else DEVICE_BLOCK
        step = max(1, block // (masks * columns))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            logits = MaskLogits(static[..., part, :], self.left[:, part], self.right).full()
            binary_mask(logits, threshold, out=kept[:, part])
        return kept


@dataclass(frozen=True)
class LearnedMask:
    """A layer's masks that are being learned: what Eq. 5 makes of logits, with its straight-through gradient.

    logits: of M masks; start: what is added to all of them. noise: gives the same values, of the given shape, whenever
    it is called; they are added to the logits. samples: the mask of each sample of the batch, M in their order or this
    several times, None for a sample that keeps everything; by default the samples of the batch take the M masks in
    their order.
    """

    logits: MaskLogits
    threshold: float
    tau: float = 1.0
    noise: Callable[[torch.Size], Tensor] | None = None
    samples: tuple[int | None, ...] | None = None
    start: float = 0.0

    def __post_init__(self):
        acting = [] if self.samples is None else [n for n in self.samples if n is not None]
        count = self.logits.count
        if acting != list(range(count)) * (len(acting) // count):
            raise ValueError(f"samples {self.samples} do not run through {count} masks")


Mask = Tensor | LearnedMask
"""What acts on a layer: bool [out, in] where all samples share it, or [B, out, in]; or what is being learned."""


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, masks: Sequence[tuple[Mask, float]], tokens: int = 0, name: str = ""
) -> Tensor:
    """A linear layer under the product of masks (Eqs. 6 and 7).

    masks: (mask, strength); at most one of them is learned, at strength 1. tokens: of the feature map that entered the
    layer's block, see `require_neighbours`. name: of the layer, for messages.
    """
    learned = None
    for mask, strength in masks:
        if isinstance(mask, LearnedMask):
            learned = mask
        else:
            weight = masked_weight(weight, mask, strength)
    if weight.ndim == 3:
        require_neighbours(x, len(weight), tokens, name)
    if learned is None:
        return linear_per_sample(x, weight, bias)
    samples = learned.logits.count if learned.samples is None else len(learned.samples)
    if samples > 1:
        require_neighbours(x, samples, tokens, name)
    return thresholded_linear(x, weight, bias, learned)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Numbers keep their precision inside the block. Devices that know no autocast are left alone."""
    known = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def computing_dtype(x: Tensor) -> torch.dtype:
    """What a product with `x` is computed in: autocast's dtype inside of autocast."""
    device = x.device.type
    within = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if within else x.dtype


def thresholded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mask: LearnedMask) -> Tensor:
    """A linear layer whose weight counts where the mask keeps it, with the straight-through gradient (Eq. 5).

    x: [B * k, ..., in]: k neighbouring rows per sample. weight: [out, in], or one for each of the B, frozen. Only `x`
    and the terms of the logits are kept for the backward pass: masks and masked weights, which are the size of all
    masked weights times M, are made anew in it.
    """
    if mask.samples is not None and None in mask.samples:
        return _partly_masked(x, weight, bias, mask)
    logits = mask.logits
    count = logits.count
    samples = count if mask.samples is None else len(mask.samples)
    chunks = (len(weight) if weight.ndim == 3 else samples) // count
    if weight.ndim == 3 and chunks > 1:
        logits = MaskLogits(logits.full().repeat(chunks, 1, 1))
        count, chunks = count * chunks, 1
    dtype = computing_dtype(x)
    with without_autocast(x.device):
        rows = x.to(dtype).reshape(chunks, count, -1, x.shape[-1]).transpose(0, 1).reshape(count, -1, x.shape[-1])
        options = (mask.threshold, mask.tau, mask.noise, mask.start)
        out = _ThresholdedProduct.apply(rows, weight.to(dtype), logits.static, logits.left, logits.right, options)
        if bias is not None:
            out = out + bias.to(dtype)
    out = out.reshape(count, chunks, -1, out.shape[-1]).transpose(0, 1)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _partly_masked(x: Tensor, weight: Tensor, bias: Tensor | None, mask: LearnedMask) -> Tensor:
    """Neighbouring samples that have masks, or have none, are computed together."""
    per_sample = len(x) // len(mask.samples)
    results = []
    for acts, places in itertools.groupby(range(len(mask.samples)), lambda n: mask.samples[n] is not None):
        places = list(places)
        part = slice(places[0], places[-1] + 1)
        rows = x[part.start * per_sample : part.stop * per_sample]
        own = weight[part] if weight.ndim == 3 else weight
        if acts:
            results.append(thresholded_linear(rows, own, bias, replace(mask, samples=mask.samples[part])))
        else:
            results.append(linear_per_sample(rows, own, bias))
    return torch.cat(results)


def _probability(logits: Tensor, start: float, tau: float) -> Tensor:
    """Sigmoid of (logits + start) / tau, in as few passes over memory as it takes."""
    scaled = logits + start if start else logits
    scaled = scaled if tau == 1.0 else scaled / tau
    return logits.sigmoid() if scaled is logits else scaled.sigmoid_()


class _ThresholdedProduct(torch.autograd.Function):
    """[M, R, in] times the masked weights: [M, R, out]."""

    @staticmethod
    def _logits(static, left, right, noise) -> Tensor:
        full = MaskLogits(static, left, right).full()
        return full if noise is None else full + noise(full.shape)

    @staticmethod
    def forward(ctx, rows, weight, static, left, right, options) -> Tensor:
        threshold, _, noise, start = ctx.options = options
        ctx.save_for_backward(rows, weight, static, left, right)
        kept = binary_mask(_ThresholdedProduct._logits(static, left, right, noise), threshold - start)
        return torch.bmm(rows, masked_weight(weight, kept).transpose(1, 2))

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, static, left, right = ctx.saved_tensors
        threshold, tau, noise, start = ctx.options
        with without_autocast(rows.device):
            gradient = gradient.to(rows.dtype)
            logits = _ThresholdedProduct._logits(static, left, right, noise)
            of_rows = None
            if ctx.needs_input_grad[0]:
                of_rows = torch.bmm(gradient, masked_weight(weight, binary_mask(logits, threshold - start)))
            slope = torch.bmm(gradient.transpose(1, 2), rows).mul_(weight).to(logits.dtype)
            slope = torch.ops.aten.sigmoid_backward(slope, _probability(logits, start, tau))
            of_left = of_right = None
            if left is not None:
                of_left = (slope @ right).div_(tau)
                of_right = (slope.flatten(0, 1).T @ left.flatten(0, 1)).div_(tau)
            of_static = slope
            if static.ndim != 3:
                of_static = (slope[0] if len(slope) == 1 else slope.sum(0)).sum_to_size(static.shape)
        of_static = of_static if tau == 1.0 else of_static.div_(tau)
        return of_rows, None, of_static, of_left, of_right, None
