"""Gradients of what is searched for: found leaf by leaf, measured image by image, and kept small until they act."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..seam.latent import per_image

_LEVELS = 127


@dataclass(frozen=True)
class Slope:
    """The gradient of one leaf `[N, ...]`.

    values: of the leaf's dtype; of a leaf in half precision int8, in units of a 127th of each row's largest. unit:
    `[N, ..., 1]`, None where the values are whole. squares: `[N]`, each image's sum of squares, before any rounding.
    """

    values: Tensor
    unit: Tensor | None
    squares: Tensor

    @classmethod
    def of(cls, gradient: Tensor) -> "Slope":
        if gradient.dtype == torch.float32:
            return cls(gradient, None, gradient.flatten(1).square().sum(1))
        squares = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float32).square()
        unit = gradient.abs().amax(-1, keepdim=True).float().clamp_min(1e-30) / _LEVELS
        return cls((gradient / unit).round_().to(torch.int8), unit, squares)

    def times(self, factors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
        """The gradient, each image's times its share of all factors `[N]`; whole values are changed in place."""
        if self.unit is None:
            for factor in factors:
                self.values.mul_(per_image(factor.to(self.values.device), self.values))
            return self.values.to(dtype)
        unit = self.unit
        for factor in factors:
            unit = unit * per_image(factor.to(unit.device), unit)
        return self.values.float().mul_(unit).to(dtype)


def norms(slopes: Sequence[Slope]) -> Tensor:
    """`[N]`: each image's norm over all leaves."""
    return sum(slope.squares for slope in slopes).clamp_min(1e-30).sqrt()


def size_of(slopes: Sequence[Slope]) -> Tensor:
    """`[N]`: each image's root mean square over all leaves."""
    return norms(slopes) / sum(slope.values[0].numel() for slope in slopes) ** 0.5


def slopes_of(result: Tensor, gradient: Tensor, leaves: Sequence[Tensor]) -> list[Slope]:
    """The gradients of all leaves, from that of `result`. Where they are rounded, one at a time is whole."""
    found: dict[int, Slope] = {}

    def keep(leaf: Tensor) -> None:
        found[id(leaf)] = Slope.of(leaf.grad)
        leaf.grad = None

    hooks = [leaf.register_post_accumulate_grad_hook(keep) for leaf in leaves]
    try:
        torch.autograd.backward(result, gradient, inputs=list(leaves))
    finally:
        for hook in hooks:
            hook.remove()
    return [found[id(leaf)] if id(leaf) in found else Slope.of(torch.zeros_like(leaf)) for leaf in leaves]
