"""The low-rank mask generator: a code per block from timestep and sample, logits per layer from the code."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.structure import Block, Layer, Structure
from .gumbel import logistic_noise
from .linear import MaskLogits
from .quantise import PackedLogits, PackedMatrix

BIASES = ("weight", "row_column", "group")
GROUP = 8
"""Neighbouring inputs of a row that share a logit of a bias per group."""
CODES = ("block", "layer")


def key_of(name: str) -> str:
    """A layer's name as a module name: module names cannot hold dots."""
    return name.replace(".", "/")


@dataclass(frozen=True)
class LowRankSettings:
    """Hyper-parameters of `LowRankGenerator`, as the checkpoint holds them.

    rank: of the dynamic part of a layer's logits; 0 makes a static mask, the same for every step and sample. width:
    channels of z' and of the hidden layers. bias: `weight` (one logit per weight), `row_column` (one per row plus one
    per column), or `group` (one for each 8 neighbouring inputs of a row). start: logit at which every weight begins,
    above the threshold. tau, delta: temperature and threshold on the probability (Eq. 5); the lower tau, the more the
    gradient is that of weights near the threshold. use_time, use_sample: the inputs of Eq. 3, for ablations. codes: a
    network for every `block`, or for every `layer`.
    """

    rank: int = 8
    width: int = 64
    bias: str = "weight"
    start: float = 1.0
    tau: float = 0.2
    delta: float = 0.5
    use_time: bool = True
    use_sample: bool = True
    codes: str = "block"

    def __post_init__(self):
        if self.bias not in BIASES:
            raise ValueError(f"bias is '{self.bias}', but must be one of {', '.join(BIASES)}")
        if self.codes not in CODES:
            raise ValueError(f"codes is '{self.codes}', but must be one of {', '.join(CODES)}")
        if not (self.rank >= 0 and self.width >= 1 and 0 < self.delta < 1 and 0 < self.tau < math.inf):
            raise ValueError(
                "rank must not be negative, width at least 1, tau above 0 and finite, and delta between 0 and 1"
            )
        if self.rank and not (self.use_time or self.use_sample):
            raise ValueError("a dynamic mask needs use_time or use_sample; a static one has rank 0")


class _Code(nn.Module):
    """Condition and code of `layers` layers of one block (Eqs. 3 and 4).

    z' = FC(t_emb) + P GAP(h): both are normalised to unit variance first and meet in `width` channels, so that the
    generator stays small and does not depend on the scale of a base model's features.
    """

    def __init__(self, block: Block, embedding: int, settings: LowRankSettings, layers: int):
        super().__init__()
        width = settings.width
        self.time_norm = nn.LayerNorm(embedding, elementwise_affine=False)
        self.sample_norm = nn.LayerNorm(block.channels, elementwise_affine=False)
        self.time = nn.Linear(embedding, width) if settings.use_time else None
        self.sample = nn.Linear(block.channels, width, bias=not settings.use_time) if settings.use_sample else None
        self.mlp = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, layers * settings.rank),
        )

    def forward(self, features: Tensor, t_emb: Tensor) -> Tensor:
        """features: [B, C, H, W], t_emb: [B, E]. Returns [B, layers * rank]."""
        like = self.mlp[0].weight
        condition = 0.0
        if self.time is not None:
            condition = condition + self.time(self.time_norm(t_emb.to(like)))
        if self.sample is not None:
            pooled = features.float().mean(dim=(2, 3)).to(like)
            condition = condition + self.sample(self.sample_norm(pooled))
        return self.mlp(condition)


class _LayerLogits(nn.Module):
    """l = b + U diag(code) V^T of one layer."""

    def __init__(self, layer: Layer, settings: LowRankSettings):
        super().__init__()
        rows, columns, rank = layer.out_features, layer.in_features, settings.rank
        self.columns, self.grouped = columns, settings.bias == "group"
        if rank:
            # Small enough that no weight starts below the threshold, large enough that all gradients are alive.
            spread = 0.35 / rank**0.25
            self.u = nn.Parameter(spread * torch.randn(rows, rank))
            self.v = nn.Parameter(spread * torch.randn(columns, rank))
        if settings.bias == "weight":
            self.bias = nn.Parameter(torch.full((rows, columns), settings.start))
        elif settings.bias == "group":
            self.bias = nn.Parameter(torch.full((rows, math.ceil(columns / GROUP)), settings.start))
        else:
            self.row = nn.Parameter(torch.full((rows, 1), settings.start))
            self.column = nn.Parameter(torch.zeros(1, columns))

    def hold_packed(self, bias: PackedMatrix) -> None:
        """The bias per weight or group stays at four bits per value from now on, and no longer learns."""
        del self.bias
        self.bias = bias

    def forward(self, code: Tensor) -> MaskLogits:
        """code: [B, rank]. B masks; one where the rank is 0. The static part is what all steps and samples share."""
        dynamic = (self.u * code[:, None, :], self.v) if code.shape[1] else ()
        static = self.bias if hasattr(self, "bias") else self.row + self.column
        if self.grouped:
            groups = static.whole() if isinstance(static, PackedMatrix) else static
            static = groups.repeat_interleave(GROUP, dim=1)[:, : self.columns]
        return (PackedLogits if isinstance(static, PackedMatrix) else MaskLogits)(static, *dynamic)


class LowRankGenerator(nn.Module):
    """Architecture `low_rank`. Attributes that every architecture has:

    structure: what it masks. tau: temperature. threshold: the logit above which a weight is kept when nothing is drawn;
    noisy_threshold: the same for logits plus `noise`.
    """

    architecture = "low_rank"

    def __init__(self, structure: Structure, settings: LowRankSettings | None = None):
        super().__init__()
        self.structure = structure
        self.settings = settings or LowRankSettings()
        self.tau = self.settings.tau
        self.threshold = self.settings.tau * math.log(self.settings.delta / (1 - self.settings.delta))
        self.noisy_threshold = self.threshold
        self.codes = nn.ModuleDict()
        for block in structure.blocks if self.settings.rank else ():
            for name, layers in self._networks(block).items():
                self.codes[key_of(name)] = _Code(block, structure.embedding, self.settings, len(layers))
        self.logits = nn.ModuleDict(
            {key_of(layer.name): _LayerLogits(layer, self.settings) for layer in structure.layers.values()}
        )

    def static_parameters(self) -> list[nn.Parameter]:
        """The static bias: what carries logits across the threshold, and learns faster than the rest."""
        endings = (".bias", ".row", ".column")
        return [p for name, p in self.logits.named_parameters() if name.endswith(endings)]

    def hyper_parameters(self) -> dict[str, Any]:
        return asdict(self.settings)

    @classmethod
    def from_hyper_parameters(cls, structure: Structure, values: dict[str, Any]) -> "LowRankGenerator":
        """Raises TypeError or ValueError where a value is unknown, missing or out of range."""
        return cls(structure, LowRankSettings(**values))

    def _networks(self, block: Block) -> dict[str, tuple[Layer, ...]]:
        """Which layers of a block share a network, by the network's name."""
        if self.settings.codes == "layer":
            return {layer.name: (layer,) for layer in block.layers}
        return {block.name: block.layers}

    def condition(self, block: Block, features: Tensor, t_emb: Tensor) -> dict[str, Tensor]:
        """Once per block and call: the code `[B, rank]` of each of its layers, by layer name."""
        if not self.settings.rank:
            return {layer.name: features.new_empty(1, 0) for layer in block.layers}
        found = {}
        for name, layers in self._networks(block).items():
            codes = self.codes[key_of(name)](features, t_emb).split(self.settings.rank, dim=1)
            found.update(zip((layer.name for layer in layers), codes))
        return found

    def layer_logits(self, layer: str, condition: Tensor) -> MaskLogits:
        """Logits of one layer for B masks, from what `condition` gave for it."""
        return self.logits[key_of(layer)](condition)

    def parameters_of(self, layer: str) -> list[nn.Parameter]:
        """What `layer_logits` takes besides the condition."""
        return list(self.logits[key_of(layer)].parameters())

    def noise(self, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return logistic_noise(shape, generator, dtype)
