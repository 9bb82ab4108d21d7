"""What a look of a search asks beside the reward: nothing, or how attention follows the words of the prompt."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attention.guidance import Loss, losses_of
from ..attention.maps import MapReader
from ..errors import MaskUNetError


class RewardAlone:
    """A look of which the reward is all that counts."""

    weight = 0.0

    def joined(self, estimate: Tensor, seen: Tensor, sigma: Tensor) -> Tensor:
        """The estimate `[N, ...]` with what else is asked of `seen`, the latent that the model saw at `sigma` `[N]`."""
        return estimate

    def parted(self, joined: Tensor) -> tuple[Tensor, Tensor | None]:
        """The estimate, and losses `[N]` where they are asked for."""
        return joined, None

    def scored(self, rewards: Tensor, slope: Tensor | None, losses: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scores `[N]`, and the gradient of their sum in what `joined` gives. slope: of the rewards in the estimate."""
        return rewards, slope


class RewardAndAttention(RewardAlone):
    """A look that subtracts `weight` times the losses of attention from the reward.

    An estimate and its losses travel together as `[N, D + 1]`, so that one backward pass serves both. options: of the
    sampler's call, with the masks that are searched for. before: called before attention is read. lent: see MapReader.
    """

    def __init__(
        self,
        losses: list[Loss],
        weight: float,
        guider: Any,
        options: dict[str, Any],
        before: Callable[[], None],
        lent: bool,
    ):
        self.weight, self._losses, self._options, self._before = weight, losses, options, before
        self._positive = guider.conds.get("positive") or []
        self._reader = MapReader(guider.inner_model, lent)

    def joined(self, estimate: Tensor, seen: Tensor, sigma: Tensor) -> Tensor:
        """Raises NoAttentionMaps."""
        self._shape = estimate.shape[1:]
        self._before()
        maps = self._reader.read(self._positive, seen, sigma, self._options)
        # Where the prompt does not act there is nothing to follow.
        losses = estimate.new_zeros(len(estimate)) if maps is None else sum(loss(maps) for loss in self._losses)
        return torch.cat([estimate.flatten(1), losses[:, None].to(estimate)], 1)

    def parted(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        return joined[:, :-1].unflatten(1, self._shape), joined[:, -1]

    def scored(self, rewards: Tensor, slope: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor | None]:
        scores = rewards - self.weight * losses.to(rewards)
        if slope is None:
            return scores, None
        return scores, torch.cat([slope.flatten(1), slope.new_full((len(slope), 1), -self.weight)], 1)


def losses_to_follow(model: Any, weight: float) -> list[Loss]:
    """Of the attention guidance that a MODEL carries; none for a weight of 0. Raises MaskUNetError without guidance."""
    losses = losses_of(model) if weight else []
    if weight and not losses:
        raise MaskUNetError(
            f"attention_weight is {weight:g}, but the connected model carries no attention guidance. Put MaskUNet "
            "Attention Guidance, with a step and a guided_share above 0, before the sampler, or set attention_weight "
            "to 0."
        )
    return losses
