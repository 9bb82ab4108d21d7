"""Readers of the toy world: which coloured shapes a picture shows, where, and how large.

Reader A (convolutions) is a reward; reader B (self-attention) judges and is never optimised against.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vocabulary import PAIRS


@dataclass
class Reading:
    """What a reader saw. P is the number of colour-shape pairs.

    presence: [B, P] logits; position: [B, P, 2] in [0, 1], x then y; size: [B, P] logits, positive means large;
    features: [B, F], the pooled features that distances between sets of pictures are measured in.
    """

    presence: Tensor
    position: Tensor
    size: Tensor
    features: Tensor


class _Head(nn.Module):
    """Reads a feature map: each cell votes for what is centred there, a log-sum-exp gathers the votes."""

    def __init__(self, channels: int):
        super().__init__()
        self.votes = nn.Conv2d(channels, PAIRS, 1)
        self.sizes = nn.Conv2d(channels, PAIRS, 1)
        self.offsets = nn.Conv2d(channels, 2, 1)
        nn.init.constant_(self.votes.bias, -8.0)

    def forward(self, feature_map: Tensor) -> Reading:
        height, width = feature_map.shape[2:]
        votes = self.votes(feature_map).flatten(2)
        attention = votes.softmax(dim=2)
        ys = (torch.arange(height, device=votes.device) + 0.5) / height
        xs = (torch.arange(width, device=votes.device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij"))[[1, 0]].flatten(1)
        places = grid + self.offsets(feature_map).flatten(2).tanh() / 4
        return Reading(
            presence=votes.logsumexp(dim=2),
            position=torch.einsum("bpn,bcn->bpc", attention, places),
            size=(attention * self.sizes(feature_map).flatten(2)).sum(dim=2),
            features=feature_map.mean(dim=(2, 3)),
        )


class _ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.skip(x) + self.norm2(self.conv2(inner)))


class ConvolutionalReader(nn.Module):
    """Reader A. Pictures in [0, 1], `[B, 3, H, W]`."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            _ConvBlock(24, 48, 2),
            _ConvBlock(48, 96, 2),
            _ConvBlock(96, 128, 1),
            _ConvBlock(128, 128, 1),
        )
        self.head = _Head(128)

    def forward(self, pictures: Tensor) -> Reading:
        return self.head(self.trunk(pictures * 2 - 1))


class _AttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(x)
        x = x + self.attention(inner, inner, inner, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class AttentiveReader(nn.Module):
    """Reader B, the judge. Pictures in [0, 1], `[B, 3, H, W]`; positions are learned at 8x8 cells and resampled."""

    def __init__(self, width: int = 128, depth: int = 4, cells: int = 8):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Conv2d(64, width, 4, stride=2, padding=1),
        )
        self.places = nn.Parameter(torch.randn(1, width, cells, cells) * 0.02)
        self.blocks = nn.Sequential(*(_AttentionBlock(width, 4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = _Head(width)

    def forward(self, pictures: Tensor) -> Reading:
        cells = self.stem(pictures * 2 - 1)
        places = self.places
        if cells.shape[2:] != places.shape[2:]:
            places = F.interpolate(places, size=cells.shape[2:], mode="bilinear")
        tokens = (cells + places).flatten(2).transpose(1, 2)
        tokens = self.norm(self.blocks(tokens))
        return self.head(tokens.transpose(1, 2).unflatten(2, cells.shape[2:]))
