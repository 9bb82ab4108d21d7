"""Records the masks that act during an ordinary sampling run of the host, whatever they come from.

The record belongs to its run: it lies on the tensor of latents that the run gives, is found as long as the host keeps
these latents, and goes with them. Nothing of it is held by the model.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..choices import TARGETS
from ..errors import MaskUNetError
from ..masks.call import Call
from ..models.structure import NothingToMask
from ..seam.attach import OPTION, RECORDER, Attachment, structure_of, with_masks, with_options
from ..seam.layers import Observer
from .recorded import EACH, RecordedMasks, all_kept, occurrence_key, on_the_cpu, pack_bits

_KEY = "maskunet_record"
"""Of the wrapper on the MODEL, and of the record on the latents."""


class NothingRecorded(MaskUNetError):
    """Latents without recorded masks; the message says why and what to do."""


class CannotRecord(MaskUNetError):
    """A run whose masks cannot be told apart; the message says why and what to do."""


class Recorder:
    """Masks of one run by sigma, conditioning and layer: [N, ceil(out * in / 8)].

    A conditioning is known by `occurrence key`: its place in the run, and how often it was computed before at this
    sigma (perturbed attention, windows, and samplers that look twice compute it more than once).
    """

    def __init__(self) -> None:
        self.images = 0
        self.apart: set[str] = set()
        self.steps: dict[float, dict[tuple[int, str], dict[str, Tensor]]] = {}

    @contextlib.contextmanager
    def recording(self, call: Call) -> Iterator[Observer]:
        """For one call of the model; gives what is called with (layer, mask)."""
        masks: dict[str, Tensor] = {}

        def observe(layer: str, mask: Tensor) -> None:
            if mask.ndim == 3:
                self.apart.add(layer)
            packed = pack_bits(mask[None] if mask.ndim == 2 else mask)
            # Several sources on a layer keep what all of them keep.
            masks[layer] = masks[layer] & packed if layer in masks else packed

        yield observe
        images = call.images
        if images is None and any(len(packed) > 1 for packed in masks.values()):
            raise CannotRecord(
                "Another node has cut the picture into parts and sent them as one batch, so masks of single images "
                "cannot be told apart. Remove MaskUNet Record Masks, or that node (Tiled Diffusion)."
            )
        self.images = images or 1
        step = self.steps.setdefault(call.sigma, {})
        places = [(c.branch, occurrence_key(c.entry, n)) for c, n in zip(call.chunks, call.occurrences())]
        packed = on_the_cpu(masks)
        for chunk, place in enumerate(places):
            part = slice(chunk * self.images, (chunk + 1) * self.images)
            step[place] = {
                layer: (rows if len(rows) == 1 else rows[part]).expand(self.images, -1)
                for layer, rows in packed.items()
            }

    def masks(self, record: RecordedMasks) -> RecordedMasks:
        """Writes the steps into `record`, which has no step yet; `branches` becomes EACH where the two differ."""
        bases = {sigma: self._bases(step) for sigma, step in self.steps.items()}
        if any(self._differ(*base.values()) for base in bases.values() if len(base) == 2):
            record = RecordedMasks(record.structure, record.images, record.record, record.targets, EACH)
        record.apart = frozenset(self.apart & record.layers.keys())
        everything = _Everything(record)
        for sigma, step in self.steps.items():
            base = bases[sigma]
            branches = [base.get(0, {}), base.get(1, {})] if record.branches == EACH else [next(iter(base.values()))]
            record.steps[sigma] = {
                layer: torch.cat([found.get(layer, everything[layer]) for found in branches])
                for layer in record.layers
                if any(layer in found and not torch.equal(found[layer], everything[layer]) for found in branches)
            }
            others = {place: masks for (branch, place), masks in step.items() if self._differ(masks, base[branch])}
            if others:
                record.others[sigma] = {
                    place: {layer: m for layer, m in masks.items() if not torch.equal(m, everything[layer])}
                    for place, masks in others.items()
                }
        return record

    @staticmethod
    def _bases(step: dict[tuple[int, str], dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """The first masks of each branch."""
        bases: dict[int, dict[str, Tensor]] = {}
        for (branch, _), masks in step.items():
            bases.setdefault(branch, masks)
        return bases

    @staticmethod
    def _differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        if one is other:
            return False
        return one.keys() != other.keys() or any(not torch.equal(one[layer], other[layer]) for layer in one)


class _Everything(dict):
    """Packed masks by layer that keep all weights of all images."""

    def __init__(self, masks: RecordedMasks):
        super().__init__()
        self._masks = masks

    def __missing__(self, name: str) -> Tensor:
        self[name] = all_kept(self._masks.layers[name]).expand(self._masks.images, -1)
        return self[name]


def recording(model: Any) -> Any:
    """A clone of a MODEL whose sampling runs leave their masks on the latents that they give; see `masks_of_run`."""
    from comfy.patcher_extension import WrappersMP

    patched = with_masks(model)
    if not patched.get_wrappers(WrappersMP.OUTER_SAMPLE, _KEY):
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, _record_run)
    return patched


def without_recording(model: Any) -> Any:
    """A clone of a MODEL whose runs are not recorded."""
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, _KEY)
    return clone


def masks_of_run(latents: Tensor) -> RecordedMasks:
    """What a run of a recording MODEL left on the latents that it gave. Raises NothingRecorded."""
    if not hasattr(latents, _KEY):
        raise NothingRecorded(
            "This latent holds no recorded masks. Put MaskUNet Record Masks in front of the sampler, let it make steps "
            "(denoise above 0), and connect the sampler's own latent: nodes that change a latent drop the record, and "
            "so does loading one from a file. "
            "MaskUNet Reward Sampler has an output of its own for its masks."
        )
    masks = getattr(latents, _KEY)
    if masks is None:
        raise NothingRecorded(
            "The sampler ran without masks, so there is nothing to look at. Put MaskUNet Apply, MaskUNet Random Mask "
            "or MaskUNet Apply Masks in front of it, at a strength other than 0."
        )
    return masks


def _record_run(executor, *args, **kwargs):
    """OUTER_SAMPLE wrapper. The guider's options are the run's own: the host puts the model's back afterwards."""
    guider = executor.class_obj
    options = guider.model_options.get("transformer_options", {})
    attachments: tuple[Attachment, ...] = options.get(OPTION, ())
    if not attachments:
        return _with_record(executor(*args, **kwargs), None)
    layers = {layer for attachment in attachments for layer in attachment.source.structure.layers}
    targets = _smallest_targets(guider.model_patcher, layers)
    recorder = Recorder()
    guider.model_options = with_options(guider.model_options, {RECORDER: recorder})
    latents = executor(*args, **kwargs)
    if not recorder.steps:
        return _with_record(latents, None)
    about = {"sources": [type(attachment.source).__name__ for attachment in attachments]}
    about |= {"strengths": [attachment.strength for attachment in attachments]}
    seed = inspect.signature(guider.outer_sample).bind(*args, **kwargs).arguments.get("seed")
    if seed is not None:
        about["seeds"] = [seed] * recorder.images
    structure = structure_of(guider.model_patcher, targets)
    return _with_record(latents, recorder.masks(RecordedMasks(structure, recorder.images, about, targets)))


def _with_record(latents: Tensor, masks: RecordedMasks | None) -> Tensor:
    """The latents, where and as the host keeps them between nodes: what it has no reason to copy keeps the record."""
    import comfy.model_management as management

    dtype = management.intermediate_dtype() if hasattr(management, "intermediate_dtype") else latents.dtype
    kept = latents.to(device=management.intermediate_device(), dtype=dtype)
    setattr(kept, _KEY, masks)
    return kept


def _smallest_targets(model: Any, layers: set[str]) -> str:
    """The name of the first target set that has all these layers. Raises MaskUNetError where none has."""
    for targets in TARGETS:
        try:
            if layers <= structure_of(model, targets).layers.keys():
                return targets
        except NothingToMask:
            continue
    raise MaskUNetError(
        "The masks on this model act on layers that no single target set holds, so they cannot be recorded together. "
        "Remove MaskUNet Record Masks, or give the masking nodes the same targets."
    )
