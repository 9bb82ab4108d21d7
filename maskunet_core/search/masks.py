"""Mask logits that are searched for: a set of their own for each image of a batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..masks.gumbel import logistic_noise
from ..masks.linear import MaskLogits, thresholded_linear
from ..masks.sources import Call, noise_generator
from ..models.structure import Structure

THRESHOLD = 0.0


class SearchedMasks:
    """A LearningSource of free logits `[images, out, in]` per layer, the same for both branches of guidance.

    start: logit that every weight begins with. seed: of Gumbel noise, which `draw` makes anew; None for no noise.
    """

    learning = True

    def __init__(self, structure: Structure, images: int, start: float, device: torch.device, seed: int | None = None):
        self.structure, self.images, self.start, self.seed = structure, images, start, seed
        self._order = {name: index for index, name in enumerate(structure.layers)}
        self._drawn = 0
        self.logits = {
            name: torch.full((images, layer.out_features, layer.in_features), start, device=device).requires_grad_()
            for name, layer in structure.layers.items()
        }

    @torch.no_grad()
    def restart(self, carry: float) -> None:
        """Back to the start, but for the share `carry` of the way that the logits have gone."""
        for logits in self.logits.values():
            logits.sub_(self.start).mul_(carry).add_(self.start)

    def draw(self) -> None:
        """Other noise from now on."""
        self._drawn += 1

    def _noise(self, layer: str) -> Callable[[torch.Size], Tensor] | None:
        if self.seed is None:
            return None
        device, key = self.logits[layer].device, (self.seed, self._order[layer], float(self._drawn))
        return lambda shape: logistic_noise(shape, noise_generator(device, *key))

    @torch.no_grad()
    def bits(self) -> dict[str, Tensor]:
        """The masks of now: True keeps a weight, `[images, out, in]` per layer."""
        found = {}
        for layer, logits in self.logits.items():
            noise = self._noise(layer)
            found[layer] = (logits if noise is None else logits + noise(logits.shape)) > THRESHOLD
        return found

    def begin(self, call: Call) -> Callable[[str, Tensor, Tensor, Tensor | None], Tensor]:
        batch: list[int] = []
        call.on_block.append(lambda block, features, t_emb: batch.append(len(features)))

        def linear(layer: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            chunks = batch[-1] // self.images
            terms = MaskLogits(self.logits[layer])
            return thresholded_linear(x, weight, bias, terms, THRESHOLD, noise=self._noise(layer), chunks=chunks)

        return linear
