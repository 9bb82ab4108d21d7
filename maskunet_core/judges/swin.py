"""Swin Transformer (arXiv 2103.14030) as a backbone, with the parameters' names of mmdetection's files."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..rewards.layers import depth_of

_MASKED = -100.0


class Swin(nn.Module):
    """Pictures `[B, 3, H, W]` to four feature maps of 1/4, 1/8, 1/16 and 1/32 of their sides.

    tensors: of the file, for their shapes, with the prefix `backbone.`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "backbone."):
        super().__init__()
        width, _, self.patch, _ = tensors[prefix + "patch_embed.projection.weight"].shape
        projection = nn.Conv2d(3, width, self.patch, stride=self.patch)
        self.patch_embed = nn.ModuleDict({"projection": projection, "norm": nn.LayerNorm(width)})
        stages = depth_of(tensors, prefix + "stages.")
        self.stages = nn.ModuleList(_Stage(tensors, f"{prefix}stages.{n}.") for n in range(stages))
        for number, stage in enumerate(self.stages):
            setattr(self, f"norm{number}", nn.LayerNorm(stage.width))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        x = self.patch_embed["projection"](_to_multiple(pictures, self.patch)).movedim(1, -1)
        x = self.patch_embed["norm"](x)
        maps = []
        for number, stage in enumerate(self.stages):
            for block in stage.blocks:
                x = block(x)
            maps.append(getattr(self, f"norm{number}")(x).movedim(-1, 1))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps


def _to_multiple(x: Tensor, side: int) -> Tensor:
    """`[B, C, H, W]` with zeros below and on the right, to multiples of `side`."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % side, 0, -height % side))


class _Stage(nn.Module):
    def __init__(self, tensors: Mapping[str, Tensor], prefix: str):
        super().__init__()
        table = tensors[prefix + "blocks.0.attn.w_msa.relative_position_bias_table"]
        self.width = len(tensors[prefix + "blocks.0.norm1.weight"])
        window, heads = (math.isqrt(len(table)) + 1) // 2, table.shape[1]
        hidden = len(tensors[prefix + "blocks.0.ffn.layers.0.0.bias"])
        depth = depth_of(tensors, prefix + "blocks.")
        # Every second block looks at windows between those of the others.
        shifts = [0 if n % 2 == 0 else window // 2 for n in range(depth)]
        self.blocks = nn.ModuleList(_Block(self.width, hidden, heads, window, shift) for shift in shifts)
        narrower = tensors.get(prefix + "downsample.reduction.weight")
        self.downsample = None if narrower is None else _Merging(self.width, len(narrower))


class _Merging(nn.Module):
    """Four neighbouring cells become one, `[B, h, w, C]` to `[B, h / 2, w / 2, C']`."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = _to_multiple(x.movedim(-1, 1), 2)
        height, width = x.shape[-2:]
        cells = F.unfold(x, 2, stride=2).transpose(1, 2)
        return self.reduction(self.norm(cells)).unflatten(1, (height // 2, width // 2))


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, window: int, shift: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"w_msa": _WindowAttention(width, heads, window, shift)})
        self.ffn = feed_forward(width, hidden, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["w_msa"](self.norm1(x))
        return x + through(self.ffn, self.norm2(x))


def feed_forward(width: int, hidden: int, activation: nn.Module) -> nn.ModuleDict:
    """Under mmdetection's names, `layers.0.0` and `layers.1`."""
    first = nn.Sequential(nn.Linear(width, hidden), activation)
    return nn.ModuleDict({"layers": nn.Sequential(first, nn.Linear(hidden, width))})


def through(feed_forward: nn.ModuleDict, x: Tensor) -> Tensor:
    return feed_forward["layers"](x)


class _WindowAttention(nn.Module):
    """Attention inside of windows of a map `[B, h, w, C]`, which are moved by `shift` cells."""

    def __init__(self, width: int, heads: int, window: int, shift: int):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def _bias(self) -> Tensor:
        """`[heads, window^2, window^2]`: of two cells by their distance."""
        cells = torch.stack(torch.meshgrid(*2 * [torch.arange(self.window)], indexing="ij")).flatten(1)
        down, across = cells[:, :, None] - cells[:, None] + self.window - 1
        return self.relative_position_bias_table[down * (2 * self.window - 1) + across].movedim(-1, 0)

    def _windows(self, x: Tensor) -> Tensor:
        """`[B, h, w, C]` as `[B, windows, window^2, C]`."""
        x = x.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _strangers(self, height: int, width: int, device: torch.device) -> Tensor:
        """`[windows, 1, window^2, window^2]`: below 0 where a shifted window puts cells together that were apart."""
        regions = torch.zeros(1, height, width, 1, device=device)
        edges = (slice(-self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for down, rows in enumerate(edges):
            for across, columns in enumerate(edges):
                regions[:, rows, columns] = 3 * down + across
        regions = self._windows(regions)[0, :, :, 0]
        return _MASKED * (regions[:, None] != regions[:, :, None]).float()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = _to_multiple(x.movedim(-1, 1), self.window).movedim(1, -1)
        padded = x.shape[1:3]
        bias = self._bias()
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
            bias = bias + self._strangers(*padded, x.device)
        qkv = self.qkv(self._windows(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        found = F.scaled_dot_product_attention(*qkv, attn_mask=bias.expand(*qkv.shape[1:3], *bias.shape[-3:]))
        found = self.proj(found.transpose(-2, -3).flatten(-2))
        found = found.unflatten(2, (self.window, -1)).unflatten(1, (padded[0] // self.window, -1))
        found = found.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.shift:
            found = found.roll((self.shift, self.shift), (1, 2))
        return found[:, :height, :width]
