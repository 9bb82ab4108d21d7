"""One call of a diffusion model, as mask sources see it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

POSITIVE, NEGATIVE = 0, 1
"""Branches of classifier-free guidance, by the number that the host gives them where there are two."""


@dataclass(frozen=True)
class Chunk:
    """The rows of a call that belong to one conditioning: all images of the batch.

    branch: POSITIVE, or NEGATIVE for whatever guidance leads away from. entry: the conditioning's place in the run,
    such as `positive.0`; the same settings give the same places again.
    """

    branch: int = POSITIVE
    entry: str = "positive.0"


@dataclass
class Call:
    """One call of the diffusion model.

    rows: samples in its batch, 0 where they are not known. chunks: what they belong to; the batch holds all images of
    the first, then all of the next. sigma_of: gives the noise level of this step. occurrences: gives, for each chunk,
    how often its conditioning was computed before at this noise level of the run. kept: what sources keep from call to
    call; it ends with the sampling run. sampling: the host's schedule that the run follows, where it is known. sigmas:
    noise levels of the images, on the device, where they are known.
    on_block: whoever wants to know what enters a block; called with the block's name, the feature map [B, C, H, W] and
    t_emb [B, E], before the block's layers ask for masks.
    leaves: of sources that learn; called with the name of a block that was entered, they give the tensors that its
    masks are computed from.
    """

    rows: int = 0
    chunks: tuple[Chunk, ...] = (Chunk(),)
    sigma_of: Callable[[], float | None] = lambda: None
    occurrences: Callable[[], tuple[int, ...]] | None = None
    kept: dict[Any, Any] = field(default_factory=dict)
    sampling: Any = None
    sigmas: Tensor | None = None
    on_block: list[Callable[[str, Tensor, Tensor], None]] = field(default_factory=list)
    leaves: list[Callable[[str], list[Tensor]]] = field(default_factory=list)
    tokens: int = 0

    @property
    def sigma(self) -> float | None:
        """Noise level of this step, None outside a sampler. It lies on the device: the first to ask waits for it."""
        return self.sigma_of()

    @property
    def images(self) -> int | None:
        """Of each chunk; None where another node has put the batch together in a way of its own."""
        return None if self.rows % len(self.chunks) else self.rows // len(self.chunks)

    def enter(self, block: str, features: Tensor, t_emb: Tensor) -> None:
        """A block is entered; `tokens` are those of its feature map from now on."""
        self.tokens = features.shape[2:].numel()
        for tell in self.on_block:
            tell(block, features, t_emb)
