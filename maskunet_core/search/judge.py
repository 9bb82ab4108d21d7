"""From the estimate of a clean latent to rewards, and back to the latent's gradient."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..seam.gradients import LeanGraph

Score = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pictures `[N, 3, H, W]` in [0, 1] to scores `[N]` and the gradient of their sum, shaped as the pictures."""


class Decode(Protocol):
    """Latents `[N, C, h, w]` of the model to pictures `[N, 3, H, W]` in about [0, 1], not clamped, differentiable."""

    def __call__(self, latents: Tensor) -> Tensor: ...


View = Callable[[Tensor], Tensor]
"""Pictures to pictures of the same shape that show the same, differentiable."""


def views_of(count: int, seed: int) -> list[View]:
    """`count` ways to look at pictures: each shifts by up to 1/16 of the side, blurs a little, and adds faint noise."""
    return [lambda pictures, key=seed * 1009 + index: _view(pictures, key) for index in range(count)]


def _view(pictures: Tensor, seed: int) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    reach = max(1, pictures.shape[-1] // 16)
    top, left = torch.randint(-reach, reach + 1, (2,), generator=stream).tolist()
    padded = F.pad(pictures, (reach, reach, reach, reach), mode="replicate")
    height, width = pictures.shape[2:]
    shifted = padded[:, :, reach + top : reach + top + height, reach + left : reach + left + width]
    blurred = F.avg_pool2d(F.pad(shifted, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(pictures.shape, generator=stream).to(pictures)
    return torch.lerp(shifted, blurred, 0.5) + 0.02 * noise


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that both exist are the same numbers because they are the same memory."""
    return (one.data_ptr(), one.shape, one._version) == (other.data_ptr(), other.shape, other._version)


class Judge:
    """Scores latents. Two stages, which is exact: first the reward's gradient in the picture, then the decoder's.

    small_side: the decoder sees latents scaled down so that pictures have about this many pixels a side, 0 for full
    size. pixels_per_cell: the decoder's scale, 8 for SD. finish: what the sampler will still do to latents, at full
    size, such as putting back what an inpainting mask keeps.
    """

    def __init__(
        self,
        decode: Decode,
        score: Score,
        small_side: int = 0,
        pixels_per_cell: int = 8,
        finish: Callable[[Tensor], Tensor] | None = None,
    ):
        self.decode, self.score = decode, score
        self.small_side, self.pixels_per_cell, self.finish = small_side, pixels_per_cell, finish
        self._last: tuple[Tensor, Tensor] | None = None

    def _decoded(self, latents: Tensor) -> Tensor:
        if self.finish is not None:
            latents = self.finish(latents)
        size = self.decoded_size(*latents.shape[-2:])
        if size != tuple(latents.shape[-2:]):
            # Of clips all frames.
            smaller = F.interpolate(latents.flatten(0, -4), size=size, mode="area")
            latents = smaller.reshape(*latents.shape[:-2], *size)
        return self.decode(latents)

    def decoded_size(self, height: int, width: int) -> tuple[int, int]:
        """In cells, of what the decoder gets for latents of `height` x `width` cells."""
        side = min(height, width) * self.pixels_per_cell
        if not self.small_side or side <= self.small_side:
            return height, width
        return round(height * self.small_side / side), round(width * self.small_side / side)

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """What the latents show; those that were judged last are not decoded again."""
        if self._last is None or not same_memory(self._last[0], latents):
            self._last = latents, self._decoded(latents)
        return self._last[1]

    @property
    def last_pictures(self) -> Tensor:
        """`[N, 3, H, W]`: what was looked at last."""
        return self._last[1]

    def scores(self, latents: Tensor, views: list[View] | tuple[()] = ()) -> Tensor:
        """`[N]`, averaged over the picture and its views."""
        pictures = self.pictures(latents)
        seen = [pictures, *(view(pictures) for view in views)]
        return sum(self.score(picture)[0] for picture in seen) / len(seen)

    def scores_and_gradient(self, latents: Tensor, views: list[View] | tuple[()] = ()) -> tuple[Tensor, Tensor]:
        """`scores`, and the gradient of their sum in the latents."""
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            with LeanGraph():
                pictures = self._decoded(leaf)
            self._last = latents, pictures.detach()
            scores, gradient = self.score(pictures.detach())
            for view in views:
                seen = pictures.detach().requires_grad_()
                viewed = view(seen)
                more, slope = self.score(viewed.detach())
                scores = scores + more
                gradient = gradient + torch.autograd.grad(viewed, seen, slope)[0]
            (of_latents,) = torch.autograd.grad(pictures, leaf, gradient / (1 + len(views)))
        return scores / (1 + len(views)), of_latents
