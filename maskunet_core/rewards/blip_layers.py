"""BLIP's architecture (arXiv 2201.12086): an image encoder, and BERT whose blocks look at what that saw.

Parameters have the names of BLIP's own files. tensors: of the file, for their shapes.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import attend, depth_of, run


class ImageEncoder(nn.Module):
    """Normalised pictures `[B, 3, size, size]` to `[B, patches + 1, width]`."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, heads: int):
        super().__init__()
        _, positions, width = tensors[prefix + "pos_embed"].shape
        patch = tensors[prefix + "patch_embed.proj.weight"].shape[-1]
        hidden = len(tensors[prefix + "blocks.0.mlp.fc1.bias"])
        self.size = math.isqrt(positions - 1) * patch
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, positions, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        depth, scaled = depth_of(tensors, prefix + "blocks."), prefix + "blocks.0.ls1.gamma" in tensors
        self.blocks = nn.ModuleList(_ImageBlock(width, hidden, heads, scaled) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def positions(self, rows: int, columns: int) -> Tensor:
        """`[1, patches + 1, width]`, for pictures of so many patches."""
        return self.pos_embed

    def forward(self, pixels: Tensor, checkpointing: bool = False) -> Tensor:
        patches = self.patch_embed["proj"](pixels.to(self.cls_token.dtype))
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        x = x + self.positions(*patches.shape[-2:])
        return self.norm(run(self.blocks, x, checkpointing=checkpointing))


class _ImageBlock(nn.Module):
    """scaled: whether what is added is multiplied by a learned number for each channel, as in DINOv2."""

    def __init__(self, width: int, hidden: int, heads: int, scaled: bool = False):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.ls1, self.ls2 = (_Scale(width) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn["proj"](attend(*self.attn["qkv"](self.norm1(x)).chunk(3, -1), self.heads)))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class _Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TextEncoder(nn.Module):
    """BERT that looks at something else, too: ids `[B, N]` and what is seen `[B, M, width]` to `[B, N, width]`."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, heads: int):
        super().__init__()
        words, width = tensors[prefix + "embeddings.word_embeddings.weight"].shape
        positions = len(tensors[prefix + "embeddings.position_embeddings.weight"])
        seen = tensors[prefix + "encoder.layer.0.crossattention.self.key.weight"].shape[1]
        hidden = len(tensors[prefix + "encoder.layer.0.intermediate.dense.bias"])
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(words, width),
                "position_embeddings": nn.Embedding(positions, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        depth = depth_of(tensors, prefix + "encoder.layer.")
        layers = nn.ModuleList(_TextBlock(width, seen, hidden, heads) for _ in range(depth))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, ids: Tensor, seen: Tensor, checkpointing: bool = False) -> Tensor:
        words, places = self.embeddings["word_embeddings"](ids), self.embeddings["position_embeddings"].weight
        x = self.embeddings["LayerNorm"](words + places[: ids.shape[1]])
        return run(self.encoder["layer"], x, seen, checkpointing=checkpointing)


class _TextBlock(nn.Module):
    def __init__(self, width: int, seen: int, hidden: int, heads: int):
        super().__init__()
        self.attention = _TextAttention(width, width, heads)
        self.crossattention = _TextAttention(width, seen, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _residual(hidden, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = self.attention(x, x)
        x = self.crossattention(x, seen)
        inner = F.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](inner))


class _TextAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        query, key, value = nn.Linear(width, width), nn.Linear(context, width), nn.Linear(context, width)
        self.self = nn.ModuleDict({"query": query, "key": key, "value": value})
        self.output = _residual(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        heard = attend(self.self["query"](x), self.self["key"](context), self.self["value"](context), self.heads)
        return self.output["LayerNorm"](x + self.output["dense"](heard))


def _residual(inputs: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})
