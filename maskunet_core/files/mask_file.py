"""Files of recorded masks: one `.safetensors` each, with metadata that tells for which model and how they were found.

Format version 1. Metadata (strings; JSON where it is more than a word): `format` "maskunet_masks", `format_version`
"1", `base_model` (a `Structure`), `targets`, `branches` (of guidance: "both", "positive" or "each"), `images`, `sigmas`
(descending), `stored` (for each sigma a digit per layer, in the order of `base_model`: 1 where a tensor holds its bits,
0 where everything is kept), `record` (how they were found). Tensors: `{step}.{layer}`, uint8
[images, ceil(out * in / 8)], laid out by `pack_bits`; with the branches "each" twice as many rows, first those of the
positive branch.
"""

import json
import math
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
        "stored": json.dumps(["".join(str(int(layer in step)) for layer in masks.layers) for step in steps]),
        "record": json.dumps(masks.record),
    }
    tensors = {f"{n}.{layer}": packed for n, step in enumerate(steps) for layer, packed in step.items()}
    KIND.write(path, tensors, metadata)


def _stored_layers(digits: list[str], layers: list[str]) -> list[list[str]]:
    """The names of the layers that each step stores. Raises ValueError."""
    for of_step in digits:
        if len(of_step) != len(layers) or set(of_step) - set("01"):
            raise ValueError("stored must hold a digit 0 or 1 per layer for each step")
    return [[layer for layer, digit in zip(layers, of_step) if digit == "1"] for of_step in digits]


def _build(path: Path, metadata: dict[str, str]) -> tuple[RecordedMasks, list[float], list[list[str]]]:
    """Masks without steps, the sigmas, and the layers that are stored for each of them."""
    try:
        structure = Structure.from_dict(json.loads(metadata["base_model"]))
        images, record = json.loads(metadata["images"]), json.loads(metadata["record"])
        if type(images) is not int or not isinstance(record, dict):
            raise TypeError("images must be a whole number and record an object")
        if len(structure.layers) != sum(len(block.layers) for block in structure.blocks):
            raise ValueError("base_model names a layer twice")
        masks = RecordedMasks(structure, images, record, metadata["targets"], metadata["branches"])
        sigmas = [float(sigma) for sigma in json.loads(metadata["sigmas"])]
        stored = _stored_layers(json.loads(metadata["stored"]), list(masks.layers))
        if sigmas != sorted(set(sigmas), reverse=True) or not all(0 < sigma < math.inf for sigma in sigmas):
            raise ValueError("sigmas must be positive, finite and descending")
        if len(sigmas) != len(stored):
            raise ValueError(f"there are {len(sigmas)} sigmas, but stored has {len(stored)} steps")
    except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise KIND.damaged_metadata(path, error) from None
    return masks, sigmas, stored


def load(path: Path) -> RecordedMasks:
    """Read and check a file of recorded masks. Raises BadMaskFile."""
    masks, sigmas, stored = _build(path, KIND.read_metadata(path))
    expected: Expected = {
        f"{n}.{layer}": (torch.uint8, (masks.rows, packed_size(masks.layers[layer])))
        for n, layers in enumerate(stored)
        for layer in layers
    }
    tensors = KIND.read_tensors(path, expected)
    for n, (sigma, layers) in enumerate(zip(sigmas, stored)):
        # Copies: what the file gives is mapped, and the file may be written over while the masks are in use.
        masks.steps[sigma] = {layer: tensors[f"{n}.{layer}"].clone() for layer in layers}
    return masks
