"""Mask logits that are searched for: a set of their own for each image of a batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..masks.call import POSITIVE, Call
from ..masks.gumbel import binary_mask, logistic_noise
from ..masks.linear import LearnedMask, MaskLogits, UnknownRows
from ..masks.sources import MaskOf, noise_generator
from ..models.structure import Structure
from ..records.recorded import pack_bits

THRESHOLD = 0.0


class SearchedMasks:
    """A mask source of free logits `[images, out, in]` per layer.

    start: logit that every weight begins with. seed: of Gumbel noise, which `draw` makes anew; None for no noise.
    positive_only: whether they act on the positive branch of guidance alone, or on all. dtype: of the logits.
    from_start: `logits` holds the way that they have gone from the start. Half precision tells apart ways that are
    short; of logits near 1 it loses steps of less than 0.002.
    """

    def __init__(
        self,
        structure: Structure,
        images: int,
        start: float,
        device: torch.device,
        seed: int | None = None,
        positive_only: bool = False,
        dtype: torch.dtype = torch.float32,
        from_start: bool = False,
    ):
        self.structure, self.images, self.seed = structure, images, seed
        self.positive_only = positive_only
        self._order = {name: index for index, name in enumerate(structure.layers)}
        self._drawn = 0
        self._added, self._first = (start, 0.0) if from_start else (0.0, start)
        self.logits = {
            name: torch.full(
                (images, layer.out_features, layer.in_features), self._first, device=device, dtype=dtype
            ).requires_grad_()
            for name, layer in structure.layers.items()
        }

    @torch.no_grad()
    def restart(self, carry: float) -> None:
        """Back to the start, but for the share `carry` of the way that the logits have gone."""
        for logits in self.logits.values():
            if carry:
                logits.sub_(self._first).mul_(carry).add_(self._first)
            else:
                logits.fill_(self._first)

    def draw(self) -> None:
        """Other noise from now on."""
        self._drawn += 1

    def _noise(self, layer: str) -> Callable[[torch.Size], Tensor] | None:
        if self.seed is None:
            return None
        device, key = self.logits[layer].device, (self.seed, self._order[layer], float(self._drawn))
        return lambda shape: logistic_noise(shape, noise_generator(device, *key)).to(device)

    @torch.no_grad()
    def bits(self) -> dict[str, Tensor]:
        """The masks of now, packed: `[images, ceil(out * in / 8)]` per layer."""
        masks, threshold = {}, THRESHOLD - self._added
        for layer, logits in self.logits.items():
            noise = self._noise(layer)
            masks[layer] = pack_bits(binary_mask(logits, threshold, None if noise is None else noise(logits.shape)))
        return masks

    def _samples(self, call: Call) -> tuple[int | None, ...] | None:
        """The image of each row of a call, None for a row that keeps everything; None where one mask is for all."""
        if self.images == 1 and not self.positive_only:
            return None
        if call.images != self.images:
            raise UnknownRows(
                "Another node has cut the picture into parts and sent them as one batch, so the search cannot tell "
                "which rows belong to which image and branch. Remove that node (Tiled Diffusion), or set masks to off."
            )
        masked = [chunk.branch == POSITIVE or not self.positive_only for chunk in call.chunks]
        return tuple(image if acts else None for acts in masked for image in range(self.images))

    def begin(self, call: Call) -> MaskOf:
        samples = self._samples(call)

        def mask(layer: str, weight: Tensor) -> LearnedMask | None:
            if samples is not None and set(samples) == {None}:
                return None
            noise = self._noise(layer)
            logits = MaskLogits(self.logits[layer])
            return LearnedMask(logits, THRESHOLD, noise=noise, samples=samples, start=self._added)

        return mask
