"""What the seam needs to know of a kind of diffusion model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

Span = Callable[[int, int], tuple[int, int]]
"""First row or column and the one after the last, from the whole weight's (out, in)."""
Embed = Callable[[int], Tensor]
"""Embedding of a call's noise level for so many samples, where the model hands none to its blocks."""


@dataclass(frozen=True)
class Target:
    """A layer that is masked in each block.

    ending: of its name. part: the name of a part of a fused layer, which computes several things at once; empty where
    the whole layer is masked. rows, columns: where the part lies in the weight, None for all.
    """

    ending: str
    part: str = ""
    rows: Span | None = None
    columns: Span | None = None


@dataclass(frozen=True)
class Stage:
    """Modules whose masks share a condition, see `structure.Block`.

    third: one of THIRDS. prefixes: of the names of its modules. channels: of the features that enter the anchor.
    """

    name: str
    third: str
    anchor: str
    prefixes: tuple[str, ...]
    channels: int


class Family(ABC):
    """A kind of diffusion model.

    marks: attributes by which its models are known, lacks: attributes that they do not have. names: what people call
    them, by the class of the host's configuration. attention, feed_forward: what can be masked. wrapper: the kind of
    the host's wrappers that surround a call of the model (`WrappersMP`).
    """

    marks: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    names: Mapping[str, str]
    attention: tuple[Target, ...]
    feed_forward: tuple[Target, ...]
    wrapper: str = "DIFFUSION_MODEL"

    def knows(self, diffusion_model: nn.Module) -> bool:
        has = [hasattr(diffusion_model, name) for name in self.marks]
        return all(has) and not any(hasattr(diffusion_model, name) for name in self.lacks)

    @abstractmethod
    def embedding(self, diffusion_model: nn.Module) -> int:
        """Channels of `t_emb`."""

    @abstractmethod
    def stages(self, diffusion_model: nn.Module) -> Iterator[Stage]:
        """In the order of execution."""

    def is_idle(self, diffusion_model: nn.Module, layer: str) -> bool:
        """Whether a layer that looks like a target is none: what it computes is not used, or cannot be masked."""
        return False

    @abstractmethod
    def conditions(self, args: tuple, kwargs: Mapping, embed: Embed) -> tuple[Tensor, Tensor]:
        """(features [B, C, H, W], t_emb [B, E]) from what the host hands to the anchor of a stage."""
