"""The search at one step of the sampler: propose masks, look at the estimate of the clean image, improve."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .settings import SearchSettings


@dataclass(frozen=True)
class Evaluation:
    """One look at the estimates of a step. scores: `[N]`; watched: the held-out reward's, where there is one."""

    step: int
    iteration: int
    scores: Tensor
    watched: Tensor | None = None


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """`[N]`: each image's norm over all tensors `[N, ...]`."""
    return sum(t.flatten(1).float().square().sum(1) for t in tensors).clamp_min(1e-30).sqrt()


def _scale(tensors: Sequence[Tensor], factors: Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(_per_image(factors.to(tensor.device), tensor))


def normalise(tensors: Sequence[Tensor]) -> Tensor:
    """Divide each image's share of all tensors `[N, ...]` by its root mean square, in place; returns that, `[N]`."""
    size = _norms(tensors) / sum(t[0].numel() for t in tensors) ** 0.5
    _scale(tensors, 1 / size)
    return size


def clip(tensors: Sequence[Tensor], limit: float) -> None:
    """Bound each image's norm over all tensors, in place."""
    _scale(tensors, (limit / _norms(tensors)).clamp_max(1.0))


class Group:
    """Leaves `[N, ...]` with an optimiser of their own. Images whose turn it is not stay exactly where they are.

    optimiser: made for a list of tensors. normalised: whether it gets gradients of root mean square 1.
    """

    def __init__(
        self, leaves: list[Tensor], optimiser: Callable[[list[Tensor]], torch.optim.Optimizer], normalised: bool
    ):
        self.leaves, self.normalised = leaves, normalised
        # Moments and weight decay move what has a gradient of zeros, and leave alone what has none.
        self._of_images = [[leaf.detach()[n] for leaf in leaves] for n in range(len(leaves[0]))]
        self._optimiser = optimiser([part for parts in self._of_images for part in parts])

    def step(self, slopes: Sequence[Tensor], images: Sequence[bool]) -> None:
        """One step downhill for the images that are named. slopes: as the leaves."""
        for n, (parts, moves) in enumerate(zip(self._of_images, images)):
            for part, slope in zip(parts, slopes):
                part.grad = slope[n] if moves else None
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)


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
                self.items[name] = torch.where(_per_image(taken.to(new.device), new), new, self.items[name])
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
    gradient = gradient.clone()
    size = normalise([gradient])
    usable = moving.to(size.device) & size.isfinite()
    # A product with 0 would not end what is not finite.
    gradient[~usable] = 0
    leaves = [leaf for group in groups for leaf in group.leaves]
    found = torch.autograd.grad(estimate, leaves, -gradient.to(estimate.dtype), allow_unused=True)
    slopes = [torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(leaves, found)]
    usable &= _norms(slopes).to(usable.device).isfinite()
    images = usable.tolist()
    for group in groups:
        mine = [slopes.pop(0) for _ in group.leaves]
        if group.normalised:
            normalise(mine)
        else:
            _scale(mine, size)
        if clip_to:
            clip(mine, clip_to)
        group.step(mine, images)
    return sum(images)
