"""Converts the authors' two files, `mask_generators.pth` and `adapters.pth`, to one generator file."""

import re
from pathlib import Path

from torch import Tensor

from maskunet_core.errors import MaskUNetError
from maskunet_core.files import checkpoint
from maskunet_core.masks.generator import key_of
from maskunet_core.masks.reference import ReferenceGenerator
from maskunet_core.models.structure import Block, Layer, Structure
from maskunet_core.torch_file import Damaged, read_torch


class BadReference(MaskUNetError):
    """A file that is not in the authors' layout; the message says which and what is wrong."""


_ADAPTER = re.compile(
    r"(\d+)\.attentions_(\d+)_transformer_blocks_(\d+)_(attn[12])_(to_[qkv]|to_out_0)\.conv_in\.weight"
)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors = read_torch(path)
    except FileNotFoundError:
        raise BadReference(f"'{path}' does not exist.") from None
    except Damaged as error:
        raise BadReference(f"'{path}' is not a file of tensors ({error.reason}).") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise BadReference(f"'{path}' holds something other than a dictionary of tensors.")
    return {key: value.float() for key, value in tensors.items()}


def convert_reference(generators: dict[str, Tensor], adapters: dict[str, Tensor], family: str) -> ReferenceGenerator:
    """The authors' tensors as a ReferenceGenerator.

    Layer names become the host's: attention j of up-block i is `output_blocks.{i * n + j}.1`, where n is the number
    of attentions in an up-block that has any. Up-blocks without adapters mask nothing and are left out. Raises
    BadReference where a tensor is missing or no adapter is found.
    """
    found = [match for key in adapters if (match := _ADAPTER.fullmatch(key))]
    if not found:
        raise BadReference("The adapters' file holds no key such as 1.attentions_0_transformer_blocks_0_attn1_to_q.")
    per_block = 1 + max(int(match[2]) for match in found)
    layers: dict[int, list[tuple[Layer, str]]] = {}
    for match in found:
        block, attention, depth, kind, part = match.groups()
        index = int(block) * per_block + int(attention)
        name = f"output_blocks.{index}.1.transformer_blocks.{depth}.{kind}.{part.replace('out_0', 'out.0')}"
        prefix = match[0].removesuffix(".conv_in.weight")
        layer = Layer(name, len(adapters[match[0]]), len(adapters[f"{prefix}.conv_out.weight"]))
        layers.setdefault(int(block), []).append((layer, prefix))

    blocks, maps, state = [], {}, {}
    try:
        for index, members in sorted(layers.items()):
            time = generators[f"{index}.proj_temb.weight"]
            block = Block(
                f"up.{index}", f"output_blocks.{index * per_block}.0", len(time), tuple(layer for layer, _ in members)
            )
            blocks.append(block)
            first, second = (f"{index}.conv_kernel_mask.{n}" for n in (0, 2))
            rows, columns = (adapters[f"{members[0][1]}.{part}.weight"].shape[1] for part in ("conv_in", "conv_out"))
            maps[block.name] = (rows, columns, len(generators[f"{first}.weight"]))
            target = f"generators.{key_of(block.name)}"
            state[f"{target}.time.weight"] = time
            for name, source in (("first", first), ("second", second)):
                state[f"{target}.{name}.weight"] = generators[f"{source}.weight"].flatten(1)
                state[f"{target}.{name}.bias"] = generators[f"{source}.bias"]
            for layer, prefix in members:
                for name, source in (("rows", "conv_in"), ("columns", "conv_out")):
                    target = f"adapters.{key_of(layer.name)}.{name}"
                    state[f"{target}.weight"] = adapters[f"{prefix}.{source}.weight"].flatten(1)
                    state[f"{target}.bias"] = adapters[f"{prefix}.{source}.bias"]
        generator = ReferenceGenerator(Structure(family, time.shape[1], tuple(blocks)), maps)
        generator.load_state_dict(state)
    except KeyError as error:
        raise BadReference(f"The generators' or adapters' file lacks the tensor {error}.") from None
    except RuntimeError as error:
        raise BadReference(f"The two files do not belong together: {str(error).splitlines()[-1].strip()}") from None
    return generator.eval().requires_grad_(False)


def convert(generators: Path, adapters: Path, output: Path, family: str) -> Path:
    """From the two `.pth` files (read with `weights_only=True`) to a file that MaskUNet Loader reads."""
    generator = convert_reference(_read(generators), _read(adapters), family)
    record = {"converted_from": [generators.name, adapters.name]}
    checkpoint.save(output, generator, "decoder attention", record)
    return output
