"""Masks that were found for one sampling run: kept as bits, and replayed in other runs."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choices import BRANCHES, TARGETS
from ..errors import MaskUNetError
from ..masks.call import NEGATIVE, POSITIVE, Call
from ..masks.linear import shared_by_all_samples
from ..masks.sources import MaskOf
from ..models.structure import Layer, Structure

EACH = "each"
"""Each branch of guidance has a mask of its own; beside BRANCHES."""


def occurrence_key(entry: str, occurrence: int) -> str:
    """Of a conditioning's place in its run, and how often it was computed before at the same sigma."""
    return f"{entry}#{occurrence}"


class IncompatibleMasks(MaskUNetError):
    """Recorded masks that do not fit the connected model, or the batch that is sampled."""


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def packed_size(layer: Layer) -> int:
    """Bytes of one image's mask of a layer."""
    return (layer.out_features * layer.in_features + 7) // 8


def pack_bits(mask: Tensor) -> Tensor:
    """[N, out, in] bool to [N, ceil(out * in / 8)] uint8: row by row, the first weight in the lowest bit."""
    flat = mask.flatten(1).to(torch.uint8)
    bytewise = F.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bytewise * (1 << _shifts(mask.device))).sum(dim=2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, layer: Layer) -> Tensor:
    """Inverse of `pack_bits`, on the device of `packed`."""
    bits = ((packed[:, :, None] >> _shifts(packed.device)) & 1).flatten(1)
    weights = bits[:, : layer.out_features * layer.in_features]
    return weights.view(torch.bool).unflatten(1, (layer.out_features, layer.in_features))


def all_kept(layer: Layer) -> Tensor:
    """[1, ceil(out * in / 8)]: the packed mask that keeps all weights of a layer."""
    packed = torch.full((1, packed_size(layer)), 255, dtype=torch.uint8)
    packed[:, -1] >>= -layer.out_features * layer.in_features % 8
    return packed


def on_the_cpu(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Packed masks by layer, waiting for their device once."""
    if not masks or next(iter(masks.values())).device.type == "cpu":
        return masks
    flat = torch.cat([packed.flatten() for packed in masks.values()]).cpu()
    parts = flat.split([packed.numel() for packed in masks.values()])
    return {layer: part.view(packed.shape).clone() for (layer, packed), part in zip(masks.items(), parts)}


def count_ones(packed: Tensor) -> int:
    """How many bits of packed masks are set: weights that are kept."""
    ones = torch.tensor([bin(byte).count("1") for byte in range(256)])
    return int(torch.bincount(packed.flatten(), minlength=256) @ ones)


class RecordedMasks:
    """Masks by sigma, layer and image, eight to a byte on the CPU.

    structure, targets: what is masked, and the name of its target set. images: N, the batch they were found for.
    branches: of guidance that share an image's mask, one of BRANCHES, or EACH. rows: R, the masks of a layer: N, or 2 N
    where each branch has its own, first those of the positive one. record: how they were found (prompt, reward, seed,
    settings), free JSON. steps: the packed masks [R, ceil(out * in / 8)] by sigma and layer; where a layer is missing,
    all its weights are kept in all images. others: by sigma and `occurrence_key`, the masks [N, ceil(out * in / 8)] of
    all layers for conditionings that differ from the first of their branch (regional prompts, windows). apart: layers
    that were computed sample by sample, also where all samples had the same bits: some devices then round otherwise.
    """

    def __init__(
        self,
        structure: Structure,
        images: int,
        record: dict[str, Any] | None = None,
        targets: str = "decoder attention",
        branches: str = "both",
    ):
        if images < 1:
            raise ValueError(f"masks are recorded for 1 image or more, not for {images}")
        if targets not in TARGETS:
            raise ValueError(f"there is no target set '{targets}'")
        if branches not in (*BRANCHES, EACH):
            raise ValueError(f"branches are one of {', '.join((*BRANCHES, EACH))}, not '{branches}'")
        self.structure = structure
        self.images = images
        self.targets = targets
        self.branches = branches
        self.rows = 2 * images if branches == EACH else images
        self.record = {} if record is None else record
        self.layers = structure.layers
        self.steps: dict[float, dict[str, Tensor]] = {}
        self.others: dict[float, dict[str, dict[str, Tensor]]] = {}
        self.apart: frozenset[str] = frozenset()

    @property
    def sigmas(self) -> list[float]:
        """The recorded steps, the noisiest first."""
        return sorted(self.steps, reverse=True)

    @property
    def bytes(self) -> int:
        """What the masks take in memory."""
        others = [masks for step in self.others.values() for masks in step.values()]
        return sum(packed.numel() for step in (*self.steps.values(), *others) for packed in step.values())

    def add(self, sigma: float, masks: dict[str, Tensor]) -> None:
        """Record a step; what was recorded for this very sigma before is replaced.

        masks: by layer, [R, out, in] bool (True keeps a weight) on any device. Raises ValueError where a sigma, layer
        or shape is impossible.
        """
        for name, mask in masks.items():
            layer = self.layers.get(name)
            if layer is None:
                raise ValueError(f"layer {name} is not in the structure")
            shape = (self.rows, layer.out_features, layer.in_features)
            if tuple(mask.shape) != shape or mask.dtype != torch.bool:
                raise ValueError(f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}, but should be bool {shape}")
        self.add_packed(sigma, {name: pack_bits(mask) for name, mask in masks.items()})

    def add_packed(self, sigma: float, masks: dict[str, Tensor]) -> None:
        """The same for masks by layer that `pack_bits` has packed, `[R, ceil(out * in / 8)]`."""
        if not 0 < sigma < math.inf:
            raise ValueError(f"a step's sigma is positive and finite, not {sigma}")
        self.steps[sigma] = {
            name: packed
            for name, packed in on_the_cpu(masks).items()
            if not torch.equal(packed, all_kept(self.layers[name]).expand_as(packed))
        }

    def keep_all(self, image: int) -> None:
        """From now on nothing is removed in one of the images."""
        for sigma in self.sigmas:
            masks = self.at(sigma)
            for mask in masks.values():
                mask[image :: self.images] = True
            self.add(sigma, masks)

    def nearest(self, sigma: float) -> dict[str, Tensor]:
        """The packed masks of the recorded step that is nearest to `sigma`, by the ratio of the two.

        Raises ValueError where nothing was recorded.
        """
        return self.steps[self.nearest_sigma(sigma)]

    def nearest_sigma(self, sigma: float) -> float:
        """That of the recorded step whose masks act at `sigma`."""
        if sigma in self.steps:
            return sigma
        target = math.log(max(sigma, 1e-12))
        return min(self.sigmas, key=lambda recorded: abs(math.log(recorded) - target))

    def at(self, sigma: float) -> dict[str, Tensor]:
        """The nearest step's masks [R, out, in] by layer; a layer that is missing keeps everything."""
        return {name: unpack_bits(packed, self.layers[name]) for name, packed in self.nearest(sigma).items()}

    def keep_ratio(self) -> list[float]:
        """Share of the masked weights that is kept, for each of `sigmas`, over all images."""
        total = self.rows * self.structure.masked_weights
        ratios = []
        for sigma in self.sigmas:
            removed = 0
            for name, packed in self.steps[sigma].items():
                layer = self.layers[name]
                removed += self.rows * layer.out_features * layer.in_features - count_ones(packed)
            ratios.append(1 - removed / total)
        return ratios

    def require_fit(self, model: Structure) -> None:
        """Raises IncompatibleMasks unless there is a step, and a model of this structure has all masked layers."""
        if not self.steps:
            raise IncompatibleMasks(
                "The connected masks hold no step: the search that recorded them made no update. Run MaskUNet Reward "
                "Sampler again with masks on and at least one iteration, or choose other masks."
            )
        difference = self.structure.difference(model)
        if difference:
            raise IncompatibleMasks(
                f"The masks were recorded on {self.structure.family}, but the connected model is {model.family}: "
                f"{difference}. Connect a model of the family they were recorded on, or choose other masks."
            )


class RecordedSource:
    """Replays recorded masks at the nearest recorded sigma.

    Masks of one image serve a batch of any size; masks of N images serve batches of N, or of a multiple that repeats
    them. A run that records, and takes its own steps through this source, is repeated bit for bit.
    """

    def __init__(self, masks: RecordedMasks):
        self.masks = masks
        self.structure = masks.structure

    def _require_batch(self, call: Call) -> None:
        if call.images is None:
            raise IncompatibleMasks(
                "Another node has cut the picture into parts and sent them as one batch, so the masks of single images "
                "and branches cannot be told apart. Remove that node (Tiled Diffusion), or MaskUNet Apply Masks."
            )
        if call.images % self.masks.images:
            raise IncompatibleMasks(
                f"The masks were recorded for a batch of {self.masks.images} images, but the batch that is sampled has "
                f"{call.images}. Set the batch size to {self.masks.images}, or use masks of one image, which fit any "
                "batch."
            )

    def _acts_on(self, branch: int) -> bool:
        return branch == POSITIVE or self.masks.branches != "positive"

    def begin(self, call: Call) -> MaskOf:
        sigma = self.masks.nearest_sigma(call.sigma)
        # All chunks of a call with the same masks, and nothing told apart: one mask serves rows of any order.
        plain = self.masks.images == 1 and self.masks.branches == "both" and sigma not in self.masks.others
        if not plain:
            self._require_batch(call)
        step, others = self.masks.steps[sigma], self.masks.others.get(sigma, {})
        of_chunks = []
        for chunk, occurrence in zip(call.chunks, call.occurrences() if others else [0] * len(call.chunks)):
            own = others.get(occurrence_key(chunk.entry, occurrence))
            second = own is None and chunk.branch == NEGATIVE and self.masks.branches == EACH
            rows = slice(self.masks.images, None) if second else slice(self.masks.images)
            of_chunks.append((step if own is None else own, rows, chunk.branch))
        device_copies = call.kept.setdefault(id(self), _DeviceCopies())

        def mask(layer: str, weight: Tensor) -> Tensor | None:
            # On the CPU masks with the same bits are shared whatever they come from.
            apart = layer in self.masks.apart and weight.device.type != "cpu"
            acting = [self._acts_on(branch) and layer in masks for masks, _, branch in of_chunks]
            if not any(acting) and not (apart and any(self._acts_on(branch) for *_, branch in of_chunks)):
                return None
            shape = self.masks.layers[layer]
            parts = []
            for acts, (masks, rows, _) in zip(acting, of_chunks):
                if acts:
                    packed = device_copies.of(masks, weight.device)[layer]
                    parts.append(unpack_bits(packed[rows], shape))
                else:
                    parts.append(weight.new_ones(self.masks.images, *weight.shape[-2:], dtype=torch.bool))
            if plain and not apart:
                return parts[0][0]
            repeats = 1 if call.images is None else call.images // self.masks.images
            if len(parts) * repeats * self.masks.images == 1:
                return parts[0][0]
            return shared_by_all_samples(torch.cat([part.repeat(repeats, 1, 1) for part in parts]))

        return mask


class _DeviceCopies:
    """Packed masks of the step at hand on a device: moved there together and once, and kept while the step lasts."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.device], tuple[Any, dict[str, Tensor]]] = {}

    def of(self, masks: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """masks: [R, bytes] by layer, on the CPU."""
        if device.type == "cpu" or not masks:
            return masks
        place = id(masks), device
        if place not in self._kept:
            if len(self._kept) > _STEPS_KEPT:
                self._kept.clear()
            together = torch.cat(list(masks.values()), dim=1)
            if device.type == "cuda":
                together = together.pin_memory()
            parts = together.to(device, non_blocking=True).split([p.shape[1] for p in masks.values()], dim=1)
            self._kept[place] = masks, dict(zip(masks, parts))
        return self._kept[place][1]


_STEPS_KEPT = 4
"""Sets of masks that stay on a device: those of the conditionings of one step, mostly two."""
