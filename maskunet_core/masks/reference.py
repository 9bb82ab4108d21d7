"""The authors' generator and adapters: for files that were trained with their code, and to train beside ours.

A generator per up-block maps GAP(cat[h, skip]) + W_t t_emb through two convolutions, each followed by a ReLU, to a
small map S; an adapter per layer widens S to the weight's shape, first over the rows, then over the columns.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..models.families.unet import anchor_channels
from ..models.structure import Block, Layer, Structure
from .generator import key_of
from .gumbel import gumbel_noise
from .linear import MaskLogits

MAP_SHARE, MAP_HIDDEN = 4, 64


def authors_maps(structure: Structure, diffusion_model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """(rows, columns, hidden channels) of S per block, as the authors size it: a quarter of the anchor's channels."""
    maps = {}
    for block in structure.blocks:
        rows, columns = anchor_channels(diffusion_model, block.anchor)
        maps[block.name] = (rows // MAP_SHARE, columns // MAP_SHARE, MAP_HIDDEN)
    return maps


class _Map(nn.Module):
    """S of one block: `[B, map_rows, map_columns]`."""

    def __init__(self, block: Block, embedding: int, rows: int, columns: int, hidden: int):
        super().__init__()
        self.shape = (rows, columns)
        self.time = nn.Linear(embedding, block.channels, bias=False)
        self.first = nn.Linear(block.channels, hidden)
        self.second = nn.Linear(hidden, rows * columns)

    def forward(self, features: Tensor, t_emb: Tensor) -> Tensor:
        like = self.first.weight
        condition = features.float().mean(dim=(2, 3)).to(like) + self.time(t_emb.to(like))
        return self.second(self.first(condition).relu()).relu().unflatten(1, self.shape)


class _Adapter(nn.Module):
    """l = (A S + a) B^T + b, with a over the rows and b over the columns."""

    def __init__(self, layer: Layer, rows: int, columns: int):
        super().__init__()
        self.rows = nn.Linear(rows, layer.out_features)
        self.columns = nn.Linear(columns, layer.in_features)

    def forward(self, small: Tensor) -> MaskLogits:
        return MaskLogits(self.columns.bias, self.rows(small.transpose(1, 2)).transpose(1, 2), self.columns.weight)


class ReferenceGenerator(nn.Module):
    """Architecture `reference`; the interface is that of `LowRankGenerator`.

    The authors keep one Gumbel sample at inference, so P(keep) = 1 - exp(-exp(l)), and the likelier decision is to
    keep where l > ln ln 2. maps: (rows, columns, hidden channels) of S, per block.
    """

    architecture = "reference"
    tau = 1.0
    threshold = math.log(math.log(2))
    noisy_threshold = 0.0

    def __init__(self, structure: Structure, maps: dict[str, tuple[int, int, int]]):
        super().__init__()
        self.structure = structure
        self.maps = {name: tuple(int(n) for n in shape) for name, shape in maps.items()}
        self.generators, self.adapters = nn.ModuleDict(), nn.ModuleDict()
        for block in structure.blocks:
            rows, columns, hidden = self.maps[block.name]
            self.generators[key_of(block.name)] = _Map(block, structure.embedding, rows, columns, hidden)
            for layer in block.layers:
                self.adapters[key_of(layer.name)] = _Adapter(layer, rows, columns)

    def start_training(self, start: float, freed: bool) -> None:
        """Set the initial values that differ from torch's default.

        As released, the last convolution of a map is zero: in front of its ReLU, where no gradient passes, it stays
        zero for ever. `freed` leaves it at torch's default, and the map learns. start: added to the columns' bias:
        logits begin about there, as those of `LowRankGenerator` do, and not about 0.
        """
        with torch.no_grad():
            for adapter in self.adapters.values():
                adapter.columns.bias.add_(start)
            for small in () if freed else self.generators.values():
                small.second.weight.zero_()
                small.second.bias.zero_()

    def static_parameters(self) -> list[nn.Parameter]:
        """The adapters' biases."""
        return [p for name, p in self.adapters.named_parameters() if name.endswith(".bias")]

    def hyper_parameters(self) -> dict[str, Any]:
        return {"maps": self.maps}

    @classmethod
    def from_hyper_parameters(cls, structure: Structure, values: dict[str, Any]) -> "ReferenceGenerator":
        """Raises TypeError, KeyError or ValueError where a value is unknown or missing."""
        return cls(structure, **values)

    def condition(self, block: Block, features: Tensor, t_emb: Tensor) -> dict[str, Tensor]:
        small = self.generators[key_of(block.name)](features, t_emb)
        return {layer.name: small for layer in block.layers}

    def layer_logits(self, layer: str, condition: Tensor) -> MaskLogits:
        return self.adapters[key_of(layer)](condition)

    def noise(self, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return gumbel_noise(shape, generator, dtype)
