"""What every reward offers: `bind` a prompt, score pictures, take gradients.

    bound = reward.bind("a red circle")
    scores, gradient = value_and_gradient(bound, images)

Pictures are `[B, 3, H, W]` in [0, 1], of any floating dtype and device, and are not clamped: a clamp would take the
gradient from saturated pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .preprocess import fit

WORK = 48 << 20
"""Bytes that a reward's layers need for a picture, without gradients: less than this in all published ones, in fp32."""
HALF_SCALE = 1024.0
"""gradient_scale of modules in fp16, which round small gradients to zero."""


class BoundReward(ABC):
    """A reward for one prompt. `bound(images)` gives `[B]` scores in fp32, differentiable in the images."""

    name: str
    unread: tuple[str, ...] = ()
    """Words of the prompt that the reward knows nothing of."""
    gradient_scale: float = 1.0
    """By what a loss is multiplied before the backward pass, for the sake of numbers in half precision."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor: ...

    def parts(self) -> list[tuple[float, "BoundReward"]]:
        """(weight, member) of what the score is the weighted sum of: just itself, unless it is a combination."""
        return [(1.0, self)]


class Reward(ABC):
    """A reward for any prompt. `name` is for people: it stands under pictures and in tables."""

    name: str

    @abstractmethod
    def bind(self, prompt: str) -> BoundReward:
        """The reward for one prompt; whatever depends on the prompt alone is computed here, once."""

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """What must lie on one device when pictures are scored."""


class BoundModel(BoundReward):
    """A single model's reward.

    size: side in pixels of the square that the model looks at; model: where the work is done, for device and dtype;
    score: pictures `[B, 3, size, size]` in fp32 on the model's device to `[B]`.
    """

    def __init__(
        self,
        name: str,
        size: int,
        model: nn.Module,
        score: Callable[[Tensor], Tensor],
        unread: tuple[str, ...] = (),
    ):
        self.name, self.size, self.unread = name, size, unread
        self._model, self._score = model, score

    @property
    def gradient_scale(self) -> float:
        return HALF_SCALE if _first(self._model).dtype == torch.float16 else 1.0

    def __call__(self, images: Tensor) -> Tensor:
        pictures = images.to(_first(self._model).device, torch.float32)
        return self._score(fit(pictures, self.size)).float().to(images.device)


class CombinedReward(Reward):
    """Weighted sum of rewards, each of which may be a combination itself."""

    def __init__(self, members: list[tuple[float, Reward]]):
        self.members = members
        self.name = " + ".join(f"{weight:g} x ({reward.name})" for weight, reward in members)

    def bind(self, prompt: str) -> BoundReward:
        return BoundSum(self.name, [(weight, reward.bind(prompt)) for weight, reward in self.members])

    def modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(module for _, reward in self.members for module in reward.modules()))


class BoundSum(BoundReward):
    """The weighted sum of rewards that are bound already. A weight of zero leaves its reward out: it is not asked."""

    def __init__(self, name: str, members: list[tuple[float, BoundReward]]):
        self.name, self._members = name, members

    def __call__(self, images: Tensor) -> Tensor:
        scores = torch.zeros(len(images), device=images.device)
        for weight, bound in self.parts():
            if weight:
                scores = scores + weight * bound(images)
        return scores

    def parts(self) -> list[tuple[float, BoundReward]]:
        return [(outer * inner, part) for outer, bound in self._members for inner, part in bound.parts()]


def value_and_gradient(bound: BoundReward, images: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `[B]` of the pictures, and the gradient of their sum, shaped as `images` and in their dtype.

    The parts of a combination run one after the other, and each one's graph is freed before the next begins: what the
    caller gets back can be fed to `images.backward(gradient)`, which is exact. Works under inference mode, too.
    Scores are as the reward gives them, NaN or infinite as well. A picture whose gradient is not finite has NaN in all
    of it; the other pictures of the batch have theirs.
    """
    with torch.inference_mode(False), torch.enable_grad():
        scores = torch.zeros(len(images), device=images.device)
        gradient = torch.zeros(images.shape, device=images.device)
        for weight, part in bound.parts():
            if weight:
                score, slope = _of_part(part, images)
                scores += weight * score
                gradient += weight * slope
        gradient = gradient.to(images.dtype)
        return scores, torch.where(_finite(gradient), gradient, torch.nan)


def _of_part(part: BoundReward, images: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and slopes of one model, each picture's slope at the largest scale of the loss at which it is finite."""
    first = scale = part.gradient_scale
    score = slope = None
    while True:
        leaf = images.detach().to(torch.float32, copy=True).requires_grad_()
        now = part(leaf)
        (found,) = torch.autograd.grad(scale * now.sum(), leaf)
        found /= scale
        if slope is None:
            score, slope = now.detach(), found
        else:
            slope = torch.where(_finite(slope), slope, found)
        if scale <= 1.0 / first:
            return score, slope
        # Where there is no score no scale helps; elsewhere the slope may be too much for half precision.
        if bool((_finite(slope).flatten() | ~score.isfinite()).all()):
            return score, slope
        scale /= 32


def _finite(slopes: Tensor) -> Tensor:
    """[B, 1, 1, 1] bool: whether all of a picture's slopes `[B, C, H, W]` are numbers."""
    return slopes.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)


def _first(module: nn.Module) -> Tensor:
    return next(module.parameters())
