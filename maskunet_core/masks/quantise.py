"""Four bits per logit, on disk and in memory, for generators with a bias per weight."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .linear import BLOCK, DEVICE_BLOCK, MaskLogits

LEVELS = 16
_WORDS = {2: torch.int32, 4: torch.int64}
"""Integer type of two values, by the bytes of one."""


def pack(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two values per byte: `[ceil(N / 2)]` uint8 and the step (fp32 scalar).

    The levels lie half a step beside zero and symmetric around it, so that no value changes its sign.
    """
    flat = values.detach().float().flatten()
    step = flat.abs().max().clamp_min(1e-12) / (LEVELS / 2 - 0.5)
    level = (torch.floor(flat / step) + LEVELS // 2).clamp(0, LEVELS - 1).to(torch.uint8)
    if len(level) % 2:
        level = torch.cat([level, level.new_zeros(1)])
    return level[0::2] | (level[1::2] << 4), step


def packed_size(shape: tuple[int, ...]) -> int:
    """Bytes that `pack` makes of a tensor of this shape."""
    return (torch.Size(shape).numel() + 1) // 2


class PackedMatrix(nn.Module):
    """A frozen matrix [rows, columns] as `pack` left it, unpacked where its values are needed.

    packed: [ceil(rows * columns / 2)] uint8. step: scalar. Values are fp32 products of level and step, or what these
    become in the half precision that the module was cast to.
    """

    def __init__(self, packed: Tensor, step: Tensor, shape: tuple[int, int]):
        super().__init__()
        self.shape = torch.Size(shape)
        self.step = float(step)
        levels = (torch.arange(LEVELS, dtype=torch.float32) - (LEVELS // 2 - 0.5)) * step.float().cpu()
        self.register_buffer("packed", packed)
        # The two values of each of the 256 bytes. They are moved and cast with the module.
        pairs = torch.stack([levels.repeat(LEVELS), levels.repeat_interleave(LEVELS)], dim=1).flatten()
        self.register_buffer("pairs", pairs, persistent=False)

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, columns]."""
        columns = self.shape[1]
        first, last = start * columns, stop * columns
        packed, pairs = self.packed, self.pairs
        if stop - start < self.shape[0]:
            packed = packed[first // 2 : (last + 1) // 2]
        # Looked up as one word: on a CPU a fourth of the time of two values.
        values = pairs.view(_WORDS[pairs.element_size()]).index_select(0, packed.int()).view(pairs.dtype)
        if len(values) > last - first:
            values = values[first % 2 :][: last - first]
        return values.view(stop - start, columns)

    def whole(self) -> Tensor:
        """[rows, columns]."""
        return self.rows(0, self.shape[0])


@dataclass(frozen=True)
class PackedLogits(MaskLogits):
    """Mask logits whose static part is a `PackedMatrix`; they are compared with a threshold, not trained."""

    static: PackedMatrix

    def full(self) -> Tensor:
        return MaskLogits(self.static.whole(), self.left, self.right).full()

    def above(self, threshold: float) -> Tensor:
        """`full() > threshold` in blocks of rows: the static logits are never unpacked as a whole."""
        rows, columns = self.static.shape
        masks = 1 if self.left is None else len(self.left)
        device = self.static.packed.device
        step = max(1, (BLOCK if device.type == "cpu" else DEVICE_BLOCK) // (masks * columns))
        if step >= rows:
            return self.full() > threshold
        kept = torch.empty(masks, rows, columns, dtype=torch.bool, device=device)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            left = None if self.left is None else self.left[:, start:stop]
            logits = MaskLogits(self.static.rows(start, stop), left, self.right).full()
            torch.gt(logits, threshold, out=kept[:, start:stop])
        return kept
