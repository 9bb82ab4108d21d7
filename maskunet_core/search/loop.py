"""The search at one step of the sampler: propose masks, look at the estimate of the clean image, improve."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..seam.latent import per_image
from .settings import SearchSettings
from .slopes import Slope, norms, size_of, slopes_of


@dataclass(frozen=True)
class Evaluation:
    """One look at the estimates of a step. scores: `[N]`; watched: the held-out reward's, where there is one.

    losses: of attention, `[N]`, where the search follows it, too: the scores are the rewards less `weight` times these.
    """

    step: int
    iteration: int
    scores: Tensor
    watched: Tensor | None = None
    losses: Tensor | None = None
    weight: float = 0.0

    @property
    def rewards(self) -> Tensor:
        return self.scores if self.losses is None else self.scores + self.weight * self.losses


class Group:
    """Leaves `[N, ...]` with an optimiser of their own. Images whose turn it is not stay exactly where they are.

    optimiser: made for a list of tensors. normalised: whether it gets gradients of root mean square 1.
    """

    def __init__(
        self, leaves: list[Tensor], optimiser: Callable[[list[Tensor]], torch.optim.Optimizer], normalised: bool
    ):
        self.leaves, self.normalised = leaves, normalised
        # Moments and weight decay move what has a gradient of zeros, and leave alone what has none.
        self._of_images = [list(leaf.detach()) for leaf in leaves]
        # One for each leaf, so that no more than one gradient is whole at a time.
        self._optimisers = [optimiser(parts) for parts in self._of_images]

    def step(self, slopes: Sequence[Slope], factors: Sequence[Tensor], images: Sequence[bool]) -> None:
        """One step downhill for the images that are named. slopes: as the leaves; factors: `[N]`, of all of them."""
        for parts, optimiser, slope in zip(self._of_images, self._optimisers, slopes):
            gradient = slope.times(factors, parts[0].dtype)
            for n, part in enumerate(parts):
                part.grad = gradient[n] if images[n] else None
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


class Best:
    """For each image the best score so far, and the tensors `[N, ...]` that belong to it. A score that is no finite
    number is worse than any other."""

    def __init__(self):
        self.scores: Tensor | None = None
        self.items: dict[str, Tensor] = {}

    def offer(self, scores: Tensor, items: Callable[[], dict[str, Tensor]], always: bool) -> Tensor:
        """Take what is better, or everything; returns `[N]`, True where it was better."""
        known = None if self.scores is None else comparable(self.scores)
        better = torch.ones_like(scores, dtype=torch.bool) if known is None else comparable(scores) > known
        taken = torch.ones_like(better) if always else better
        if taken.all():
            self.items = items()
        elif taken.any():
            for name, new in items().items():
                self.items[name] = torch.where(per_image(taken.to(new.device), new), new, self.items[name])
        self.scores = scores if self.scores is None else torch.where(taken, scores, self.scores)
        return better


def comparable(scores: Tensor) -> Tensor:
    """Scores in which what is no finite number is worse than any other."""
    return torch.where(scores.isfinite(), scores, -torch.inf)


def search_step(
    *,
    groups: Sequence[Group],
    redraw: Callable[[], None],
    predict: Callable[[], Tensor],
    current: Callable[[], dict[str, Tensor]],
    judge: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]],
    iterations: int,
    settings: SearchSettings,
    report: Callable[[int, Tensor, Tensor], bool],
    skipped: Callable[[int], None] = lambda count: None,
) -> Best:
    """Up to `iterations` updates at a step; returns the best that was seen.

    groups: what is improved. redraw: called before each look, for fresh noise. predict: the estimate of the clean
    latent `[N, ...]` with the leaves of now. current: what a step would be taken with now, `[N, ...]` tensors by name.
    judge: scores `[N]` of an estimate and, if asked, the gradient of their sum in it. report: called with (iteration,
    scores, estimate) of each look; False ends the search. skipped: called with the number of images whose update was
    left out because a number in it was not finite. Exceptions pass through.
    """
    best, stale = Best(), None
    for iteration in range(iterations + 1):
        final = iteration == iterations
        redraw()
        with torch.set_grad_enabled(not final):
            estimate = predict()
        scores, gradient = judge(estimate.detach(), not final)
        better = best.offer(scores, current, always=not settings.keep_best)
        stale = torch.zeros_like(scores) if stale is None else torch.where(better, 0.0, stale + 1)
        moving = torch.ones_like(scores, dtype=torch.bool)
        if settings.patience:
            moving &= stale < settings.patience
        if settings.target is not None:
            moving &= ~(best.scores >= settings.target)
        go_on = report(iteration, scores, estimate.detach())
        # Where no conditioning is active nothing that is searched for reaches the estimate.
        if final or not go_on or not moving.any() or not estimate.requires_grad:
            break
        moved = _update(estimate, gradient, moving & scores.isfinite(), groups, settings.clip)
        if moved < int(moving.sum()):
            skipped(int(moving.sum()) - moved)
    return best


def _update(estimate: Tensor, gradient: Tensor, moving: Tensor, groups: Sequence[Group], clip_to: float) -> int:
    """One update uphill for the images that are moving (`[N]` bool); returns how many of them could be moved."""
    # At size 1 the gradient passes half precision unharmed; its own size comes back where it counts.
    size = size_of([Slope.of(gradient.float())])
    gradient = gradient * per_image(1 / size, gradient)
    usable = moving.to(size.device) & size.isfinite()
    # A product with 0 would not end what is not finite.
    gradient[~usable] = 0
    leaves = [leaf for group in groups for leaf in group.leaves]
    slopes = slopes_of(estimate, -gradient.to(estimate.dtype), leaves)
    usable &= norms(slopes).to(usable.device).isfinite()
    images = usable.tolist()
    for group in groups:
        mine = [slopes.pop(0) for _ in group.leaves]
        factors = [1 / size_of(mine) if group.normalised else size]
        if clip_to:
            norm = norms(mine)
            factors.append((clip_to / (norm * factors[0].to(norm.device))).clamp_max(1.0))
        group.step(mine, factors, images)
    return sum(images)
