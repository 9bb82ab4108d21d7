"""What recorded masks did: how much they keep where and when, what changes between steps, what tells two runs apart."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..choices import GUIDANCE
from ..errors import MaskUNetError
from ..models.structure import Layer
from .recorded import EACH, IncompatibleMasks, RecordedMasks, count_ones, pack_bits, unpack_bits

_DECADES, _BINS_PER_DECADE = 4, 12


class NoSuchImage(MaskUNetError):
    """An image that the batch does not have; the message says which it has."""


class ImageMasks:
    """The masks of one image in one branch of guidance.

    image: counted from 0. branch: one of `recorded.GUIDANCE`. name: of the masks in messages. Raises NoSuchImage.
    """

    def __init__(self, masks: RecordedMasks, image: int = 0, branch: str = "positive", name: str = "masks"):
        if not 0 <= image < masks.images:
            raise NoSuchImage(
                f"There is no image {image} in '{name}': they were recorded for a batch of {masks.images}. "
                f"Its images have the numbers 0 to {masks.images - 1}."
            )
        self.recorded = masks
        self.layers = masks.layers
        self.sigmas = masks.sigmas
        number = GUIDANCE.index(branch)
        self._row = image + number * masks.images if masks.branches == EACH else image
        self._acts = number == 0 or masks.branches != "positive"

    def packed(self, sigma: float, layer: str) -> Tensor | None:
        """[1, ceil(out * in / 8)] of the nearest recorded step, or None where everything is kept."""
        found = self.recorded.nearest(sigma).get(layer)
        return None if found is None or not self._acts else found[self._row : self._row + 1]

    def removed(self, sigma: float, layer: Layer, device: torch.device) -> Tensor | None:
        """[out, in] bool, True where a weight is removed, or None where everything is kept."""
        packed = self.packed(sigma, layer.name)
        return None if packed is None else ~unpack_bits(packed.to(device), layer)[0]


def _weights(layer: Layer) -> int:
    return layer.out_features * layer.in_features


def _whole(layer: Layer) -> Tensor:
    return pack_bits(torch.ones(1, layer.out_features, layer.in_features, dtype=torch.bool))


def _differing(one: Tensor | None, other: Tensor | None, layer: Layer) -> int:
    """In how many weights two packed masks differ."""
    if one is None and other is None:
        return 0
    if one is None or other is None:
        return _weights(layer) - count_ones(other if one is None else one)
    return count_ones(one ^ other)


@dataclass(frozen=True)
class MaskStatistics:
    """Counts by layer and step, [L, S] int64, for one image.

    layers: L, in the order of the model, each with its block's name in `blocks`. sigmas: S, the noisiest first.
    removed: weights that are removed. flipped: weights whose bit differs from the step before; the first step has none.
    differing: weights whose bit differs from other masks, None where there are none.
    """

    layers: tuple[Layer, ...]
    blocks: tuple[str, ...]
    sigmas: tuple[float, ...]
    removed: Tensor
    flipped: Tensor
    differing: Tensor | None

    @property
    def weights(self) -> Tensor:
        """[L]: of each layer."""
        return torch.tensor([_weights(layer) for layer in self.layers])

    def share(self, counts: Tensor) -> Tensor:
        """[L, S] counts as a share of each layer's weights."""
        return counts.double() / self.weights[:, None]

    def share_of_blocks(self, counts: Tensor) -> dict[str, Tensor]:
        """[S] counts as a share of each block's weights, in the order of the model."""
        found = {}
        for block in dict.fromkeys(self.blocks):
            rows = torch.tensor([name == block for name in self.blocks])
            found[block] = counts[rows].sum(0).double() / self.weights[rows].sum()
        return found

    def share_of_all(self, counts: Tensor) -> Tensor:
        """[S] counts as a share of all weights."""
        return counts.sum(0).double() / self.weights.sum()


def mask_statistics(masks: ImageMasks, other: ImageMasks | None = None) -> MaskStatistics:
    """Counts of one image's masks, compared with `other` at the nearest noise levels.

    Raises IncompatibleMasks where there is no step, or `other` has other layers.
    """
    if other is not None:
        _require_comparable(masks.recorded, other.recorded)
    if not masks.sigmas:
        raise IncompatibleMasks("The connected masks hold no step. Record them again with at least one step.")
    structure, sigmas = masks.recorded.structure, masks.sigmas
    layers = tuple(structure.layers.values())
    shape = len(layers), len(sigmas)
    removed, flipped, differing = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for row, layer in enumerate(layers):
        before = None
        for step, sigma in enumerate(sigmas):
            packed = masks.packed(sigma, layer.name)
            removed[row, step] = _differing(packed, None, layer)
            flipped[row, step] = _differing(packed, before, layer) if step else 0
            if other is not None:
                differing[row, step] = _differing(packed, other.packed(sigma, layer.name), layer)
            before = packed
    blocks = tuple(block.name for block in structure.blocks for _ in block.layers)
    return MaskStatistics(layers, blocks, tuple(sigmas), removed, flipped, None if other is None else differing)


def _require_comparable(masks: RecordedMasks, other: RecordedMasks) -> None:
    if not other.steps:
        raise IncompatibleMasks("The masks at 'other_masks' hold no step. Record them again with at least one step.")
    difference = masks.structure.difference(other.structure) or other.structure.difference(masks.structure)
    if difference:
        raise IncompatibleMasks(
            f"'masks' were recorded on {masks.structure.family} with the targets '{masks.targets}', 'other_masks' on "
            f"{other.structure.family} with '{other.targets}', so they cannot be compared: {difference}. Connect two "
            "recordings of the same model with the same targets."
        )


@dataclass(frozen=True)
class WeightStatistics:
    """Magnitudes of the weights that are kept and removed.

    edges: [bins + 1] of the histogram over |w|, even on a logarithmic scale; what is smaller than the first counts in
    the first bin. kept, removed: [bins] numbers of weights, mean over the steps. mean_kept, mean_removed: [L, S] mean
    |w|, NaN where there are none.
    """

    edges: Tensor
    kept: Tensor
    removed: Tensor
    mean_kept: Tensor
    mean_removed: Tensor


def _exact_sum(values: Tensor) -> Tensor:
    """Of [out, in] values in fp32, in double precision on the CPU: there are devices without it."""
    return values.sum(1).cpu().double().sum()


def weight_statistics(masks: ImageMasks, weight_of: Callable[[str], Tensor]) -> WeightStatistics:
    """weight_of: a layer's weight [out, in] as the host presents it, on any device; asked twice for each layer."""
    layers, sigmas = list(masks.layers.values()), masks.sigmas
    largest = max((float(weight_of(layer.name).abs().max()) for layer in layers), default=0.0) or 1.0
    bins = _DECADES * _BINS_PER_DECADE
    edges = largest * torch.logspace(-_DECADES, 0, bins + 1, dtype=torch.float64)
    total, removed = torch.zeros(2, bins, dtype=torch.float64)
    mean_kept, mean_removed = torch.full((2, len(layers), len(sigmas)), float("nan"), dtype=torch.float64)
    for row, layer in enumerate(layers):
        magnitude = weight_of(layer.name).float().abs()
        everything, times = _exact_sum(magnitude), torch.zeros_like(magnitude, dtype=torch.int32)
        for step, sigma in enumerate(sigmas):
            gone = masks.removed(sigma, layer, magnitude.device)
            gone = torch.zeros_like(times, dtype=torch.bool) if gone is None else gone
            count, lost = gone.sum().cpu(), _exact_sum(magnitude * gone)
            # 0 / 0 is NaN: there is no mean of no weights.
            mean_kept[row, step] = (everything - lost) / (_weights(layer) - count)
            mean_removed[row, step] = lost / count
            times += gone
        place = torch.bucketize(magnitude.flatten(), edges[1:-1].float().to(magnitude.device), out_int32=True)
        # By bin and number of steps that remove a weight: whole numbers, which every device counts exactly.
        removals = len(sigmas) + 1
        counts = torch.bincount(place * removals + times.flatten(), minlength=bins * removals).cpu()
        counts = counts.view(bins, removals).double()
        total += counts.sum(1)
        removed += counts @ torch.arange(removals, dtype=torch.float64) / len(sigmas)
    return WeightStatistics(edges, total - removed, removed, mean_kept, mean_removed)


def places(masks: MaskStatistics) -> list[str]:
    """Where each layer lies, numbered as diffusers does: `up.1.0` is the first attention module of the block `up.1`,
    `up.1.0.2` the third transformer block in it, where it has several.
    """
    parts = [layer.name.split(".transformer_blocks.") for layer in masks.layers]
    modules = {block: [] for block in masks.blocks}
    for block, (module, *_) in zip(masks.blocks, parts):
        if module not in modules[block]:
            modules[block].append(module)
    found = [f"{block}.{modules[block].index(module)}" for block, (module, *_) in zip(masks.blocks, parts)]
    inner = [rest[0].split(".")[0] if rest else "0" for _, *rest in parts]
    deep = {place for place, number in zip(found, inner) if number != "0"}
    return [f"{place}.{number}" if place in deep else place for place, number in zip(found, inner)]


def short_name(layer: Layer) -> str:
    """What the layer is called there: `attn1 q`."""
    name = layer.name.split(".transformer_blocks.")[-1].partition(".")[2] or layer.name
    return name.replace("to_out.0", "out").replace("to_", "").replace(".", " ")


def to_table(masks: MaskStatistics, weights: WeightStatistics) -> str:
    """Values with a header, for people and for spreadsheets: a line per layer and step, columns of one width with tabs
    between them, shares from 0 to 1, empty where there is none. Layers are named as in the diagrams."""
    columns = ["step", "sigma", "block", "layer", "weights", "removed", "keep_ratio", "flipped", "differing"]
    columns += ["mean_kept", "mean_removed"]
    keep, flipped = 1 - masks.share(masks.removed), masks.share(masks.flipped)
    flipped[:, 0] = float("nan")
    differing = torch.full_like(keep, float("nan")) if masks.differing is None else masks.share(masks.differing)
    names = [f"{place} {short_name(layer)}" for place, layer in zip(places(masks), masks.layers)]
    lines = [columns]
    for step, sigma in enumerate(masks.sigmas):
        for row, (layer, block) in enumerate(zip(masks.layers, masks.blocks)):
            values = (keep, flipped, differing, weights.mean_kept, weights.mean_removed)
            shares = ["" if value[row, step].isnan() else f"{value[row, step]:.6f}" for value in values]
            counts = [str(_weights(layer)), str(int(masks.removed[row, step]))]
            lines.append([str(step + 1), f"{sigma:.4f}", block, names[row], *counts, *shares])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("\t".join(map(str.ljust, line, widths)) for line in lines)
