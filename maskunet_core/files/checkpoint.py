"""Generator files: one `.safetensors` each, with metadata that tells what it is and for which model.

Format version 1, or 2 where parts of layers are masked alone (a layer of `base_model` then has `module`, and `rows`
or `columns`), or 3 where the bias is one per group. Metadata (strings; JSON where it is more than a word): `format`
"maskunet", `format_version`, `architecture`, `base_model` (a `Structure`), `targets`, `hyper_parameters`, `training`.
Tensors: the parameters of the architecture's module by name, fp16; a bias per weight or group `X.bias` is stored as
`X.bias.packed` (two 4-bit levels per byte) and `X.bias.step`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MaskUNetError
from ..masks.generator import LowRankGenerator
from ..masks.quantise import PackedMatrix, pack, packed_size
from ..masks.reference import ReferenceGenerator
from ..models.structure import Structure
from ..tensor_file import Expected, FileKind

ARCHITECTURES = {cls.architecture: cls for cls in (LowRankGenerator, ReferenceGenerator)}


class BadCheckpoint(MaskUNetError):
    """A file that is no usable generator; the message names the file and says what to do."""


KIND = FileKind(
    format="maskunet",
    version="1",
    later=("2", "3"),
    noun="MaskUNet generator",
    error=BadCheckpoint,
    place="Put generator files into models/maskunet.",
    choose="Choose a file that `python -m trainer train` or `convert` wrote.",
    unreadable="copy or download it again. The authors' .pth files are converted by `python -m trainer convert`.",
    again="Download or export it again.",
)


class IncompatibleGenerator(MaskUNetError):
    """A generator that was made for another model than the one connected."""


@dataclass(frozen=True)
class GeneratorFile:
    """A generator as it was read: frozen, biases per weight still packed.

    name: for messages; targets: name of its target set; training: how it was made.
    """

    name: str
    generator: nn.Module
    targets: str
    training: dict[str, Any]

    @property
    def structure(self) -> Structure:
        return self.generator.structure

    def require_fit(self, model: Structure) -> None:
        """Raises IncompatibleGenerator unless a model of this structure holds everything that is masked."""
        difference = self.structure.difference(model)
        if difference:
            raise IncompatibleGenerator(
                f"'{self.name}' was trained for {self.structure.family}, but the connected model is {model.family}: "
                f"{difference}. Connect a model of the family it was trained for, or choose another file in "
                "MaskUNet Loader."
            )


def _is_packed(key: str, generator: nn.Module) -> bool:
    return isinstance(generator, LowRankGenerator) and key.endswith(".bias") and key.startswith("logits.")


def to_tensors(generator: nn.Module) -> dict[str, Tensor]:
    """The tensors of the file."""
    tensors = {}
    for key, value in generator.named_parameters():
        if _is_packed(key, generator):
            tensors[f"{key}.packed"], tensors[f"{key}.step"] = pack(value)
        else:
            tensors[key] = value.detach().to("cpu", torch.float16).contiguous()
    for key, matrix in generator.named_modules():
        if isinstance(matrix, PackedMatrix):
            tensors[f"{key}.packed"], tensors[f"{key}.step"] = matrix.packed, torch.tensor(matrix.step)
    return {key: value.cpu() for key, value in tensors.items()}


def file_size(generator: nn.Module) -> int:
    """Bytes that the tensors of a generator that learns take on disk; works on the meta device."""
    size = 0
    for key, value in generator.named_parameters():
        size += packed_size(tuple(value.shape)) + 4 if _is_packed(key, generator) else 2 * value.numel()
    return size


def save(path: Path, generator: nn.Module, targets: str, training: dict[str, Any]) -> None:
    """Write the file under a temporary name beside `path`, then rename it."""
    metadata = {
        "architecture": generator.architecture,
        "base_model": json.dumps(generator.structure.to_dict()),
        "targets": targets,
        "hyper_parameters": json.dumps(generator.hyper_parameters()),
        "training": json.dumps(training),
    }
    if generator.hyper_parameters().get("bias") == "group":
        # Older versions say that it is newer, not that it is damaged.
        metadata["format_version"] = "3"
    elif generator.structure.has_parts:
        metadata["format_version"] = "2"
    KIND.write(path, to_tensors(generator), metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """The file's metadata, after the checks that need no tensor. Raises BadCheckpoint."""
    metadata = KIND.read_metadata(path)
    if metadata.get("architecture") not in ARCHITECTURES:
        raise BadCheckpoint(
            f"'{path.name}' has the architecture '{metadata.get('architecture')}', which this extension does not know "
            f"(it knows {', '.join(ARCHITECTURES)}). Update ComfyUI-MaskUNet."
        )
    return metadata


def describe(path: Path) -> dict[str, Any]:
    """What a generator file says of itself, for people. Raises BadCheckpoint."""
    loaded = load(path)
    structure, training = loaded.structure, loaded.training
    generator, _ = _build(path, read_metadata(path))
    parameters = sum(value.numel() for value in generator.parameters())
    return {
        "file": f"{path.name}, {path.stat().st_size / 1e6:.2f} MB",
        "architecture": f"{loaded.generator.architecture}, {parameters:,} parameters",
        "base model": structure.family,
        "targets": f"{loaded.targets}: {len(structure.layers)} layers, {structure.masked_weights:,} weights",
        "hyper-parameters": loaded.generator.hyper_parameters(),
        "training": training,
    }


def _build(path: Path, metadata: dict[str, str]) -> tuple[nn.Module, dict[str, Any]]:
    """The module on the meta device and the training record, from the metadata."""
    try:
        structure = Structure.from_dict(json.loads(metadata["base_model"]))
        values, training = json.loads(metadata["hyper_parameters"]), json.loads(metadata["training"])
        if "targets" not in metadata:
            raise KeyError("targets")
        if not isinstance(training, dict):
            raise TypeError(f"training is a {type(training).__name__}, but should be a record")
        with torch.device("meta"):
            generator = ARCHITECTURES[metadata["architecture"]].from_hyper_parameters(structure, values)
    # Numbers that are too large for torch or for an integer, and nesting that is too deep for the parser, among them.
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise KIND.damaged_metadata(path, error) from None
    return generator, training


def _finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """An fp32 copy. What comes from the file is a view of the file, which may be written over or replaced."""
    copied = tensor.to(torch.float32, copy=True)
    if not bool(torch.isfinite(copied).all()):
        raise BadCheckpoint(
            f"Tensor {name} of '{path.name}' holds values that are not finite: the training that made it diverged. "
            "Train again with a lower learning rate, or choose an earlier checkpoint."
        )
    return copied


@torch.inference_mode(False)
def load(path: Path) -> GeneratorFile:
    """Read and check a generator file. The generator comes in fp32 on the CPU, frozen. Raises BadCheckpoint.

    Its tensors are ordinary ones also where the host calls this in inference mode: they are moved outside of it, too.
    """
    metadata = read_metadata(path)
    generator, training = _build(path, metadata)
    parameters = {key: tuple(value.shape) for key, value in generator.named_parameters()}
    packed = [key for key in parameters if _is_packed(key, generator)]
    expected: Expected = {key: (None, shape) for key, shape in parameters.items() if key not in packed}
    for key in packed:
        expected[f"{key}.packed"] = (torch.uint8, (packed_size(parameters[key]),))
        expected[f"{key}.step"] = (None, ())
    tensors = KIND.read_tensors(path, expected)
    for key in packed:
        step = _finite(path, f"{key}.step", tensors.pop(f"{key}.step"))
        matrix = PackedMatrix(tensors.pop(f"{key}.packed").clone(), step, parameters[key])
        generator.get_submodule(key.removesuffix(".bias")).hold_packed(matrix)
    state = {key: _finite(path, key, tensor) for key, tensor in tensors.items()}
    state |= {key: value for key, value in generator.state_dict().items() if key.endswith(".packed")}
    generator.load_state_dict(state, assign=True)
    return GeneratorFile(path.name, generator.eval().requires_grad_(False), metadata["targets"], training)
