"""Masks of a generator that all frames share: it looks at the first frame alone."""

from dataclasses import replace

from torch import Tensor

from ..masks.call import Call
from ..masks.sources import GeneratorMasks, MaskOf


class FirstFrameMasks:
    """A mask source that asks another one about the first image of each branch, and gives its masks to all images."""

    def __init__(self, source: GeneratorMasks):
        self.source, self.structure = source, source.structure

    def begin(self, call: Call) -> MaskOf:
        frames, chunks = call.images, len(call.chunks)
        if frames is None:
            # Another node has put the batch together in a way of its own, and frames cannot be told apart.
            return self.source.begin(call)
        of_first = replace(call, rows=chunks, on_block=[])
        masks = self.source.begin(of_first)

        def enter(block: str, features: Tensor, t_emb: Tensor) -> None:
            of_first.enter(block, features[::frames], t_emb[::frames])

        call.on_block.append(enter)

        def mask(layer: str, weight: Tensor) -> Tensor | None:
            found = masks(layer, weight)
            return found if found is None or found.ndim == 2 else found.repeat_interleave(frames, 0)

        return mask
