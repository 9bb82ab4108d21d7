"""Masks to replay: recorded while the host samples, as a search for masks does, or made by chance."""

import torch

from maskunet_core.masks.call import Call
from maskunet_core.masks.sources import MaskSource
from maskunet_core.models.structure import Structure
from maskunet_core.records.recorded import RecordedMasks


class Recording:
    """Gives what `source` gives, but one mask per image for both branches of CFG, and keeps it.

    The branch that is computed first decides: its rows come first in a call, or its call comes first at a sigma.
    """

    learning = False

    def __init__(self, source: MaskSource, images: int):
        self.source = source
        self.structure = source.structure
        self.images = images
        self.found: dict[float, dict[str, torch.Tensor]] = {}

    def masks(self) -> RecordedMasks:
        recorded = RecordedMasks(self.structure, self.images)
        for sigma, step in self.found.items():
            recorded.add(sigma, step)
        return recorded

    def begin(self, call: Call):
        mask_of = self.source.begin(call)
        found = self.found.setdefault(call.sigma, {})
        rows = []
        call.on_block.append(lambda block, features, t_emb: rows.append(len(features)))

        def mask(layer, weight):
            if layer not in found:
                both = mask_of(layer, weight)
                found[layer] = both[: self.images] if both.ndim == 3 else both.expand(self.images, -1, -1)
            own = found[layer]
            if own.all():
                return None
            return own[0] if self.images == 1 else own.repeat(rows[-1] // self.images, 1, 1)

        return mask


def random_masks(structure: Structure, images: int = 1, keep: float = 0.97, **options) -> RecordedMasks:
    """Three steps; the last layer is kept whole."""
    stream = torch.Generator().manual_seed(0)
    masks = RecordedMasks(structure, images, **options)
    for sigma in (14.6, 3.0, 0.5):
        step = {
            name: torch.rand(images, layer.out_features, layer.in_features, generator=stream) < keep
            for name, layer in list(structure.layers.items())[:-1]
        }
        masks.add(sigma, step)
    return masks
