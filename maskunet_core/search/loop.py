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


@dataclass
class Group:
    """Leaves `[N, ...]` that are improved together. normalised: by gradients of root mean square 1."""

    leaves: list[Tensor]
    optimiser: torch.optim.Optimizer
    normalised: bool


class Best:
    """The best masks and latents seen at a step, image by image. items: `[N, ...]` tensors by name."""

    def __init__(self):
        self.scores: Tensor | None = None
        self.items: dict[str, Tensor] = {}

    def offer(self, scores: Tensor, items: Callable[[], dict[str, Tensor]], always: bool) -> Tensor:
        """Take what is better, or everything; returns `[N]`, True where it was better."""
        better = torch.ones_like(scores, dtype=torch.bool) if self.scores is None else scores > self.scores
        taken = torch.ones_like(better) if always else better
        if taken.all():
            self.items = items()
        elif taken.any():
            for name, new in items().items():
                self.items[name] = torch.where(_per_image(taken.to(new.device), new), new, self.items[name])
        self.scores = scores if self.scores is None else torch.where(taken, scores, self.scores)
        return better


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
) -> Best:
    """Up to `iterations` updates at a step; returns the best that was seen.

    groups: what is improved. redraw: called before each look, for fresh noise. predict: the estimate of the clean
    latent `[N, ...]` with the leaves of now. current: what a step would be taken with now, `[N, ...]` tensors by name.
    judge: scores `[N]` of an estimate and, if asked, the gradient of their sum in it. report: told (iteration, scores,
    estimate) of each look; False ends the search. Exceptions pass through.
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
        wanted = torch.ones_like(scores)
        if settings.patience:
            wanted *= stale < settings.patience
        if settings.target is not None:
            wanted *= best.scores < settings.target
        go_on = report(iteration, scores, estimate.detach())
        if final or not go_on or not wanted.any():
            break
        _update(estimate, gradient, wanted, groups, settings.clip)
    return best


def _update(estimate: Tensor, gradient: Tensor, wanted: Tensor, groups: Sequence[Group], clip_to: float) -> None:
    """One update uphill for the images that are wanted (`[N]`, 1 or 0)."""
    # At size 1 the gradient passes half precision unharmed; its own size comes back where it counts.
    gradient = gradient.clone()
    size = normalise([gradient])
    _scale([gradient], wanted)
    leaves = [leaf for group in groups for leaf in group.leaves]
    slopes = list(torch.autograd.grad(estimate, leaves, -gradient.to(estimate.dtype)))
    for group in groups:
        mine = [slopes.pop(0) for _ in group.leaves]
        if group.normalised:
            normalise(mine)
            _scale(mine, wanted)
        else:
            _scale(mine, size)
        if clip_to:
            clip(mine, clip_to)
        for leaf, slope in zip(group.leaves, mine):
            leaf.grad = slope
        group.optimiser.step()
        group.optimiser.zero_grad(set_to_none=True)
