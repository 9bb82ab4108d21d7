"""Files of recorded masks: one `.safetensors` each, with metadata that tells for which model and how they were found.

Metadata (strings; JSON where it is more than a word): `format` "maskunet_masks", `format_version` "1", or "2" where the
conditionings of a branch differ or parts of layers are masked alone, `base_model` (a `Structure`), `targets`,
`branches` (of guidance: "both", "positive", "each"), `images`, `sigmas` (descending), `stored` (for each sigma a digit
per layer, in the order of `base_model`: 1 where a tensor holds its bits, 0 where everything is kept), `record` (how
they were found). Tensors: `{step}.{layer}`, uint8 [images, ceil(out * in / 8)], laid out by `pack_bits`; with the
branches "each" twice as many rows, first those of the positive branch. May be absent: `apart` (names of layers that
were computed sample by sample). Version 2 adds `others` (for each sigma an object: for each conditioning that differs
from the first of its branch, by its key, digits as in `stored`), tensors `{step}.{key}.{layer}` [images,
ceil(out * in / 8)], and for a part of a layer in `base_model` `module`, and `rows` or `columns`.
"""

import json
import math
import re
from pathlib import Path

import torch

from ..errors import MaskUNetError
from ..models.structure import Structure
from ..records.recorded import RecordedMasks, packed_size
from ..tensor_file import Expected, FileKind


class BadMaskFile(MaskUNetError):
    """A file that holds no usable masks; the message names the file and says what to do."""


KIND = FileKind(
    format="maskunet_masks",
    version="1",
    later=("2",),
    noun="file of recorded masks",
    error=BadMaskFile,
    place="Put files of recorded masks into models/maskunet_masks.",
    choose="Choose a file that MaskUNet Save Masks wrote.",
    unreadable="copy or save it again.",
    again="Copy or save it again.",
)


def save(path: Path, masks: RecordedMasks) -> None:
    """Write the file under a temporary name beside `path`, then rename it. Raises OSError."""
    sigmas = masks.sigmas
    steps = [masks.steps[sigma] for sigma in sigmas]
    metadata = {
        "base_model": json.dumps(masks.structure.to_dict()),
        "targets": masks.targets,
        "branches": masks.branches,
        "images": json.dumps(masks.images),
        "sigmas": json.dumps(sigmas),
        "stored": json.dumps([_digits(masks, step) for step in steps]),
        "record": json.dumps(masks.record),
    }
    tensors = {f"{n}.{layer}": packed for n, step in enumerate(steps) for layer, packed in step.items()}
    if masks.apart:
        metadata["apart"] = json.dumps(sorted(masks.apart))
    if masks.others or masks.structure.has_parts:
        others = [masks.others.get(sigma, {}) for sigma in sigmas]
        metadata["format_version"] = KIND.later[0]
        metadata["others"] = json.dumps(
            [{key: _digits(masks, found) for key, found in step.items()} for step in others]
        )
        for n, step in enumerate(others):
            for key, found in step.items():
                tensors |= {f"{n}.{key}.{layer}": packed.contiguous() for layer, packed in found.items()}
    KIND.write(path, tensors, metadata)


def _digits(masks: RecordedMasks, stored: dict[str, torch.Tensor]) -> str:
    return "".join(str(int(layer in stored)) for layer in masks.layers)


def _stored_layers(digits: list[str], layers: list[str]) -> list[list[str]]:
    """The names of the layers that each step stores. Raises ValueError."""
    for of_step in digits:
        if len(of_step) != len(layers) or set(of_step) - set("01"):
            raise ValueError("stored must hold a digit 0 or 1 per layer for each step")
    return [[layer for layer, digit in zip(layers, of_step) if digit == "1"] for of_step in digits]


def _others(metadata: dict[str, str], steps: int, layers: list[str]) -> list[dict[str, list[str]]]:
    """For each step the layers that are stored for further conditionings. Raises KeyError, TypeError or ValueError."""
    if metadata["format_version"] == KIND.version:
        return [{} for _ in range(steps)]
    others = json.loads(metadata["others"])
    if len(others) != steps or not all(re.fullmatch(r"\w+\.\d+#\d+", key) for step in others for key in step):
        raise ValueError("others must name conditionings for each step")
    return [dict(zip(step, _stored_layers(list(step.values()), layers))) for step in others]


def _build(path: Path, metadata: dict[str, str]) -> tuple[RecordedMasks, list[float], list, list]:
    """Masks without steps, the sigmas, and the layers that are stored for each of them, also for conditionings."""
    try:
        structure = Structure.from_dict(json.loads(metadata["base_model"]))
        images, record = json.loads(metadata["images"]), json.loads(metadata["record"])
        if type(images) is not int or not isinstance(record, dict):
            raise TypeError("images must be a whole number and record an object")
        masks = RecordedMasks(structure, images, record, metadata["targets"], metadata["branches"])
        sigmas = [float(sigma) for sigma in json.loads(metadata["sigmas"])]
        stored = _stored_layers(json.loads(metadata["stored"]), list(masks.layers))
        if sigmas != sorted(set(sigmas), reverse=True) or not all(0 < sigma < math.inf for sigma in sigmas):
            raise ValueError("sigmas must be positive, finite and descending")
        if len(sigmas) != len(stored):
            raise ValueError(f"there are {len(sigmas)} sigmas, but stored has {len(stored)} steps")
        others = _others(metadata, len(sigmas), list(masks.layers))
        masks.apart = frozenset(json.loads(metadata.get("apart", "[]")))
        if not masks.apart <= masks.layers.keys():
            raise ValueError("apart names layers that base_model does not have")
    except (KeyError, AttributeError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise KIND.damaged_metadata(path, error) from None
    return masks, sigmas, stored, others


def load(path: Path) -> RecordedMasks:
    """Read and check a file of recorded masks. Raises BadMaskFile."""
    masks, sigmas, stored, others = _build(path, KIND.read_metadata(path))
    expected: Expected = {
        f"{n}.{layer}": (torch.uint8, (masks.rows, packed_size(masks.layers[layer])))
        for n, layers in enumerate(stored)
        for layer in layers
    }
    expected |= {
        f"{n}.{key}.{layer}": (torch.uint8, (masks.images, packed_size(masks.layers[layer])))
        for n, step in enumerate(others)
        for key, layers in step.items()
        for layer in layers
    }
    tensors = KIND.read_tensors(path, expected)
    for n, (sigma, layers) in enumerate(zip(sigmas, stored)):
        # Copies: what the file gives is mapped, and the file may be written over while the masks are in use.
        masks.steps[sigma] = {layer: tensors[f"{n}.{layer}"].clone() for layer in layers}
        if others[n]:
            masks.others[sigma] = {
                key: {layer: tensors[f"{n}.{key}.{layer}"].clone() for layer in found}
                for key, found in others[n].items()
            }
    return masks
