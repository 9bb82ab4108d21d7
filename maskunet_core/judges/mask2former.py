"""Mask2Former (arXiv 2112.01527) on Swin, as mmdetection trained and runs it: GenEval's detector of COCO's 80 classes.

Parameters have the names of mmdetection 2's files; `mask2former_names` has those of others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..rewards.layers import attend, depth_of, fill
from .swin import Swin, feed_forward, through

_LEVELS, _POINTS = 3, 4
"""Of the deformable attention: feature maps, and samples of each per head."""
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_LONG, _SHORT, _GREY = 1333, 800, 128
"""Sides in pixels that a picture is scaled to, and the level of the border that brings it to multiples of 32."""
_KEPT = 100
"""Detections of a picture, at most."""


@dataclass(frozen=True)
class Detections:
    """The N surest of a picture, by class and score. classes: `[N]`; scores: `[N]`; boxes: `[N, 4]` as x0, y0, x1, y1
    in pixels, 0 where the mask is empty; masks: `[N, H, W]` bool."""

    classes: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor


class Mask2Former(nn.Module):
    """tensors: under mmdetection 2's names, for their shapes."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.backbone, self.panoptic_head = Swin(tensors), _Head(tensors, "panoptic_head.")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> "Mask2Former":
        """Raises BadTensors."""
        with torch.device("meta"):
            model = cls(tensors)
        return fill(model, tensors, dtype)

    @property
    def classes(self) -> int:
        return self.panoptic_head.cls_embed.out_features - 1

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of classes `[B, Q, 81]`, the last for nothing, and of masks `[B, Q, H / 4, W / 4]`.

        pictures: as `prepare` gives them.
        """
        return self.panoptic_head(self.backbone(pictures))

    @torch.no_grad()
    def detect(self, picture: Tensor, kept: int = _KEPT) -> Detections:
        """picture: `[3, H, W]` grey levels. Of one query several classes may be among the `kept` surest."""
        pixels, size = prepare(picture)
        weight = next(self.parameters())
        classes, masks = (x[0].float().cpu() for x in self(pixels.to(weight)))
        return _detections(classes, masks, (pixels.shape[-2:], size, picture.shape[-2:]), kept)


def prepare(picture: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The network's input `[1, 3, H', W']` of a picture `[3, H, W]` of grey levels, and the size without the border."""
    height, width = picture.shape[-2:]
    scale = min(_LONG / max(height, width), _SHORT / min(height, width))
    height, width = (int(side * scale + 0.5) for side in (height, width))
    scaled = resize_as_opencv(picture, height, width).float()
    padded = F.pad(scaled, (0, -width % 32, 0, -height % 32), value=_GREY)
    mean, std = (torch.tensor(values, device=picture.device).view(3, 1, 1) for values in (_MEAN, _STD))
    return ((padded - mean) / std)[None], (height, width)


def resize_as_opencv(picture: Tensor, height: int, width: int) -> Tensor:
    """Grey levels `[3, H, W]` to `[3, height, width]`, bilinear in fixed point, as OpenCV's `resize` rounds them.

    Each of two rows is rounded on its own, also where both are the same one at the picture's edge.
    """
    rows, columns = (_taps(old, new) for old, new in zip(picture.shape[-2:], (height, width)))
    across = sum(picture.int()[..., at] * weight for at, weight in columns)
    down = sum((weight[:, None] * (across[..., at, :] >> 4)) >> 16 for at, weight in rows)
    return ((down + 2) >> 2).clamp(0, 255).to(torch.uint8)


def _taps(old: int, new: int) -> list[tuple[Tensor, Tensor]]:
    """Two neighbours of each new pixel along one axis, with weights that add up to 2048."""
    places = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).float()
    first = places.floor()
    weight = (2048 * (places - first)).round().int()
    return [((first.long() + n).clamp(0, old - 1), part) for n, part in enumerate((2048 - weight, weight))]


def _detections(classes: Tensor, masks: Tensor, sizes: Sequence[tuple[int, int]], kept: int) -> Detections:
    """classes: `[Q, 81]`; masks: `[Q, h, w]`; sizes: of the network's input, without its border, of the picture."""
    padded, scaled, original = sizes
    scores, order = classes.softmax(-1)[:, :-1].flatten().topk(kept)
    queries, labels = order // (classes.shape[-1] - 1), order % (classes.shape[-1] - 1)
    masks = F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)[:, :, : scaled[0], : scaled[1]]
    masks = F.interpolate(masks, original, mode="bilinear", align_corners=False)[0, queries]
    inside = masks > 0
    sure = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    return Detections(labels, scores * sure, _boxes(inside), inside)


def _boxes(masks: Tensor) -> Tensor:
    boxes = torch.zeros(len(masks), 4)
    for number, mask in enumerate(masks):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if len(rows):
            boxes[number] = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return boxes


class _Head(nn.Module):
    """Feature maps to logits of classes and masks. tensors: of the file, for their shapes."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str):
        super().__init__()
        queries, width = tensors[prefix + "query_feat.weight"].shape
        classes = len(tensors[prefix + "cls_embed.bias"])
        hidden = len(tensors[prefix + "transformer_decoder.layers.0.ffns.0.layers.0.0.bias"])
        self.pixel_decoder = _PixelDecoder(tensors, prefix + "pixel_decoder.", width)
        depth, heads = depth_of(tensors, prefix + "transformer_decoder.layers."), self.pixel_decoder.heads
        layers = nn.ModuleList(_DecoderLayer(width, hidden, heads) for _ in range(depth))
        self.transformer_decoder = nn.ModuleDict({"layers": layers, "post_norm": nn.LayerNorm(width)})
        self.query_feat, self.query_embed = nn.Embedding(queries, width), nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(_LEVELS, width)
        self.cls_embed = nn.Linear(width, classes)
        self.mask_embed = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        pixels, levels = self.pixel_decoder(maps)
        x = self.query_feat.weight.expand(len(pixels), -1, -1)
        places = [_positions(level).flatten(2).transpose(1, 2) for level in levels]
        cells = [
            level.flatten(2).transpose(1, 2) + own for level, own in zip(levels, self.level_embed.weight.unbind(0))
        ]
        classes, masks = self._predict(x, pixels)
        for number, layer in enumerate(self.transformer_decoder["layers"]):
            level = number % _LEVELS
            seen = _looked_at(masks, levels[level].shape[-2:])
            x = layer(x, self.query_embed.weight, cells[level], places[level], seen)
            classes, masks = self._predict(x, pixels)
        return classes, masks

    def _predict(self, x: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.transformer_decoder["post_norm"](x)
        return self.cls_embed(x), torch.einsum("bqc,bchw->bqhw", self.mask_embed(x), pixels)


def _looked_at(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """`[B, 1, Q, cells]` bool: a query looks where its mask was last; everywhere, where that is nowhere."""
    inside = F.interpolate(masks, size, mode="bilinear", align_corners=False).flatten(2).sigmoid() >= 0.5
    return (inside | ~inside.any(-1, keepdim=True))[:, None]


def _positions(like: Tensor) -> Tensor:
    """`[1, C, h, w]`: sines and cosines of the place of each cell in a map `[B, C, h, w]`."""
    channels, height, width = like.shape[1:]
    half = channels // 2
    steps = 10000 ** (2 * (torch.arange(half, device=like.device) // 2) / half)

    def along(count: int) -> Tensor:
        """`[count, half]`."""
        angles = torch.arange(1, count + 1, device=like.device) / (count + 1e-6) * 2 * math.pi
        angles = angles[:, None] / steps
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], -1).flatten(1)

    down = along(height)[:, None].expand(-1, width, -1)
    across = along(width)[None].expand(height, -1, -1)
    return torch.cat([down, across], -1).movedim(-1, 0)[None].to(like.dtype)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        of_file = self.attn
        parts = zip((query, key, value), of_file.in_proj_weight.chunk(3), of_file.in_proj_bias.chunk(3))
        return of_file.out_proj(attend(*(F.linear(*part) for part in parts), of_file.num_heads, seen=seen))


class _DecoderLayer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.attentions = nn.ModuleList(_Attention(width, heads) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.ffns = nn.ModuleList([feed_forward(width, hidden, nn.ReLU())])

    def forward(self, x: Tensor, places: Tensor, cells: Tensor, cell_places: Tensor, seen: Tensor) -> Tensor:
        """x: `[B, Q, C]`; cells: `[B, N, C]`; places, cell_places: added to queries and keys."""
        of_cells, of_queries = self.attentions
        x = self.norms[0](x + of_cells(x + places, cells + cell_places, cells, seen))
        x = self.norms[1](x + of_queries(x + places, x + places, x))
        return self.norms[2](x + through(self.ffns[0], x))


class _PixelDecoder(nn.Module):
    """Four feature maps to that of the masks, at 1/4, and three others, from coarse to fine."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, width: int):
        super().__init__()
        hidden = len(tensors[prefix + "encoder.layers.0.ffns.0.layers.0.0.bias"])
        offsets = len(tensors[prefix + "encoder.layers.0.attentions.0.sampling_offsets.bias"])
        self.heads = offsets // (2 * _LEVELS * _POINTS)
        widths = [tensors[f"{prefix}input_convs.{n}.conv.weight"].shape[1] for n in range(_LEVELS)]
        finest = tensors[prefix + "lateral_convs.0.conv.weight"].shape[1]
        self.input_convs = nn.ModuleList(_convolution(inputs, width) for inputs in widths)
        layers = (
            _EncoderLayer(width, hidden, self.heads) for _ in range(depth_of(tensors, prefix + "encoder.layers."))
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.level_encoding = nn.Embedding(_LEVELS, width)
        self.lateral_convs = nn.ModuleList([_convolution(finest, width, bias=False)])
        self.output_convs = nn.ModuleList([_convolution(width, width, 3, bias=False)])
        self.mask_feature = nn.Conv2d(width, width, 1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        finest, *coarser = maps
        levels = [_normed(conv, level) for conv, level in zip(self.input_convs, coarser[::-1])]
        sizes = [level.shape[-2:] for level in levels]
        x = torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)
        places = [_positions(level) + own.view(1, -1, 1, 1) for level, own in zip(levels, self.level_encoding.weight)]
        places = torch.cat([place.flatten(2) for place in places], 2).transpose(1, 2)
        points = torch.cat([_centres(*size, x.device) for size in sizes]).to(x.dtype)
        for layer in self.encoder["layers"]:
            x = layer(x, places, points, sizes)
        parts = x.split([height * width for height, width in sizes], 1)
        levels = [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes)]
        finest = _normed(self.lateral_convs[0], finest)
        finest = finest + F.interpolate(levels[-1], finest.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_feature(_normed(self.output_convs[0], finest).relu()), levels


def _convolution(inputs: int, width: int, side: int = 1, bias: bool = True) -> nn.ModuleDict:
    conv = nn.Conv2d(inputs, width, side, padding=side // 2, bias=bias)
    return nn.ModuleDict({"conv": conv, "gn": nn.GroupNorm(32, width)})


def _normed(convolution: nn.ModuleDict, x: Tensor) -> Tensor:
    return convolution["gn"](convolution["conv"](x))


def _centres(height: int, width: int, device: torch.device) -> Tensor:
    """`[height * width, 2]`: x, y of each cell's centre, in [0, 1]."""
    y, x = ((torch.arange(count, device=device) + 0.5) / count for count in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)


class _EncoderLayer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.attentions = nn.ModuleList([_DeformableAttention(width, heads)])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.ffns = nn.ModuleList([feed_forward(width, hidden, nn.ReLU())])

    def forward(self, x: Tensor, places: Tensor, points: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        x = self.norms[0](x + self.attentions[0](x + places, x, points, sizes))
        return self.norms[1](x + through(self.ffns[0], x))


class _DeformableAttention(nn.Module):
    """Each cell looks at a few points of all maps, which it chooses itself (arXiv 2010.04159)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        samples = heads * _LEVELS * _POINTS
        self.sampling_offsets, self.attention_weights = nn.Linear(width, 2 * samples), nn.Linear(width, samples)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, cells: Tensor, points: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """query, cells: `[B, N, C]`; points: `[N, 2]`, around which offsets are reckoned; sizes: of the maps."""
        batch, count, _ = query.shape
        offsets = self.sampling_offsets(query).view(batch, count, self.heads, _LEVELS, _POINTS, 2)
        weights = self.attention_weights(query).view(batch, count, self.heads, -1).softmax(-1)
        weights = weights.view(batch, count, self.heads, _LEVELS, _POINTS)
        values = self.value_proj(cells).split([height * width for height, width in sizes], 1)
        found = 0
        for level, (height, width) in enumerate(sizes):
            pixels = values[level].transpose(1, 2).unflatten(1, (self.heads, -1)).flatten(0, 1)
            pixels = pixels.unflatten(2, (height, width))
            at = points[:, None, None] + offsets[:, :, :, level] / offsets.new_tensor([width, height])
            grid = (2 * at - 1).transpose(1, 2).flatten(0, 1)
            sampled = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            found = found + (sampled * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        return self.output_proj(found.unflatten(0, (batch, self.heads)).flatten(1, 2).transpose(1, 2))
