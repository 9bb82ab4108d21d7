"""What all diffusion transformers (DiT) have in common: stacks of blocks that tokens run through."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

from ...choices import THIRDS
from .family import Embed, Family, Stage, Target

EMBEDDING = 256
"""Channels of `t_emb`."""


def time_embedding(sigmas: Tensor | None, rows: int) -> Tensor:
    """Sinusoidal embedding `[rows, 256]` of 1000 times sigma.

    The same for all transformers: some blocks get no embedding of the host's, and with reference pictures others get
    one of twice the batch. sigmas: of the images of a call, which may hold them several times; None outside a sampler.
    """
    if sigmas is None:
        sigmas = torch.zeros(1)
    times = 1000.0 * sigmas.float().flatten()
    times = times.repeat(rows // len(times)) if rows % len(times) == 0 else times.max().expand(rows)
    half = EMBEDDING // 2
    frequencies = torch.exp(torch.arange(half, device=times.device) * (-math.log(10_000.0) / half))
    angles = times[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def layers(*endings: str) -> tuple[Target, ...]:
    return tuple(map(Target, endings))


@dataclass(frozen=True)
class Transformer(Family):
    """A row of the table: one kind of transformer of the host.

    stacks: lists of blocks, in the order of execution. tokens: name and place of the argument of a block that holds the
    picture's tokens [B, ..., C]. width: attribute of the model that tells C. idle: endings of layers whose results the
    last block does not use. prelude: lists of blocks that prepare the tokens, before all of the stacks. patch:
    attribute of the model that tells the side of a token in cells, or its sides.
    """

    marks: tuple[str, ...]
    names: Mapping[str, str]
    stacks: tuple[str, ...]
    tokens: tuple[str, int]
    width: str
    attention: tuple[Target, ...]
    feed_forward: tuple[Target, ...]
    idle: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    wrapper: str = "DIFFUSION_MODEL"
    prelude: tuple[str, ...] = ()
    patch: str = "patch_size"

    def embedding(self, diffusion_model: nn.Module) -> int:
        return EMBEDDING

    def blocks(self, diffusion_model: nn.Module) -> list[str]:
        """Names, in the order of execution."""
        return [f"{stack}.{n}" for stack in self.stacks for n in range(len(diffusion_model.get_submodule(stack)))]

    def channels(self, diffusion_model: nn.Module) -> int:
        """Of the tokens that run through the blocks."""
        return attrgetter(self.width)(diffusion_model)

    def cells_per_token(self, diffusion_model: nn.Module) -> int:
        sides = attrgetter(self.patch)(diffusion_model)
        return sides**2 if isinstance(sides, int) else math.prod(sides)

    def stages(self, diffusion_model: nn.Module) -> Iterator[Stage]:
        """Each block is one. The last third of them takes the place of a U-Net's decoder."""
        blocks, channels = self.blocks(diffusion_model), self.channels(diffusion_model)
        for n, name in enumerate(blocks):
            yield Stage(name, THIRDS[3 * n // len(blocks)], name, (f"{name}.",), channels)

    def is_idle(self, diffusion_model: nn.Module, layer: str) -> bool:
        last = self.blocks(diffusion_model)[-1]
        return layer.startswith(f"{last}.") and layer.endswith(self.idle)

    def conditions(self, args: tuple, kwargs: Mapping, embed: Embed) -> tuple[Tensor, Tensor]:
        """Tokens take the place of a feature map's pixels."""
        name, place = self.tokens
        tokens = kwargs[name] if name in kwargs else args[place]
        return tokens.flatten(1, -2).movedim(-1, 1)[..., None], embed(len(tokens)).to(tokens.device)
