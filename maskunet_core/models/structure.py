"""What can be masked in which model. The one place that knows ComfyUI's models, by structure and never by class.

Another family joins here: write a function like `_unet_blocks` and let `inspect_model` choose it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..errors import MaskUNetError


class NothingToMask(MaskUNetError):
    """The model has no layer that the target set names, or one that cannot be masked; the message says which."""


@dataclass(frozen=True)
class Layer:
    """A linear layer that is masked: its name inside the diffusion model, its weight's shape."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Block:
    """Layers that share a condition: the feature map that enters the block's first ResBlock, the anchor.

    name: `up.0` is the deepest level of the decoder, as diffusers counts; `down.0` the first of the encoder; `mid`.
    channels: of the feature map that enters the anchor (in the decoder: with its skip connection).
    """

    name: str
    anchor: str
    channels: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Structure:
    """The masked part of a model. family: for people to read; embedding: channels of `t_emb`."""

    family: str
    embedding: int
    blocks: tuple[Block, ...]

    @property
    def layers(self) -> dict[str, Layer]:
        return {layer.name: layer for block in self.blocks for layer in block.layers}

    @property
    def masked_weights(self) -> int:
        return sum(layer.out_features * layer.in_features for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Structure":
        """Inverse of `to_dict`.

        Raises KeyError, TypeError, ValueError or OverflowError where a field is missing or of another kind, and
        ValueError where two blocks or two layers have one name.
        """
        blocks = tuple(
            Block(
                name=str(block["name"]),
                anchor=str(block["anchor"]),
                channels=int(block["channels"]),
                layers=tuple(
                    Layer(str(layer["name"]), int(layer["out_features"]), int(layer["in_features"]))
                    for layer in block["layers"]
                ),
            )
            for block in data["blocks"]
        )
        for names in ([block.name for block in blocks], [layer.name for block in blocks for layer in block.layers]):
            if len(set(names)) < len(names):
                raise ValueError(f"it names {max(names, key=names.count)} more than once")
        return cls(family=str(data["family"]), embedding=int(data["embedding"]), blocks=blocks)

    def difference(self, other: "Structure") -> str | None:
        """The first thing in which a model of structure `other` does not hold what this one needs, or None."""
        if self.embedding != other.embedding:
            return f"its timestep embedding has {self.embedding} channels, the model's has {other.embedding}"
        theirs = {block.name: block for block in other.blocks}
        for block in self.blocks:
            if block.name not in theirs:
                return f"it masks block {block.name}, which the model does not have"
            if block.channels != theirs[block.name].channels:
                return f"block {block.name} has {block.channels} channels in it and {theirs[block.name].channels} there"
            layers = {layer.name: layer for layer in theirs[block.name].layers}
            for layer in block.layers:
                if layers.get(layer.name) != layer:
                    return f"layer {layer.name} of {layer.out_features}x{layer.in_features} is not in the model"
        return None


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


_TEMPORAL = ".time_stack."
"""Layers of video models in which a row is a place in the picture, seen over time: rows of a sample lie apart."""


def _is_attention(name: str) -> bool:
    return (".attn1." in name or ".attn2." in name) and name.endswith(_ATTENTION)


def _is_feed_forward(name: str) -> bool:
    return name.endswith(_FEED_FORWARD)


TARGETS: dict[str, tuple[tuple[str, ...], Callable[[str], bool]]] = {
    "decoder attention": (("up",), _is_attention),
    "decoder attention and feed-forward": (("up",), lambda name: _is_attention(name) or _is_feed_forward(name)),
    "all attention": (("down", "mid", "up"), _is_attention),
}
"""Target sets by name: the parts of the U-Net, and which of their layers (matched by name)."""

_FAMILIES = {
    "SD15": "SD 1.5",
    "SD15_instructpix2pix": "SD 1.5",
    "SD20": "SD 2.x",
    "SD21UnclipL": "SD 2.x",
    "SD21UnclipH": "SD 2.x",
    "SDXL": "SDXL",
    "SDXL_instructpix2pix": "SDXL",
    "SDXLRefiner": "SDXL refiner",
    "MaskUNetToy": "the MaskUNet toy model",
}


def family_name(model: nn.Module) -> str:
    """What people call the model that a MODEL holds (the host's BaseModel)."""
    name = type(getattr(model, "model_config", model)).__name__
    return _FAMILIES.get(name, name)


def _is_unet(diffusion_model: nn.Module) -> bool:
    parts = ("input_blocks", "output_blocks", "num_res_blocks", "time_embed")
    return all(hasattr(diffusion_model, part) for part in parts)


def _unet_blocks(unet: nn.Module) -> Iterator[tuple[str, str, list[str]]]:
    """(block name, anchor, prefixes of its modules) of ComfyUI's UNetModel, in the order of execution."""
    first = 1
    for level, count in enumerate(unet.num_res_blocks):
        yield f"down.{level}", f"input_blocks.{first}.0", [f"input_blocks.{first + n}." for n in range(count)]
        first += count + 1
    if unet.middle_block is not None:
        yield "mid", "middle_block.0", ["middle_block."]
    first = 0
    for level, count in enumerate(reversed(unet.num_res_blocks)):
        yield f"up.{level}", f"output_blocks.{first}.0", [f"output_blocks.{first + n}." for n in range(count + 1)]
        first += count + 1


def execution_order(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of ComfyUI's UNetModel: the host goes through the layers of a block one by one."""
    encoder = [(f"input_blocks.{n}", block) for n, block in enumerate(unet.input_blocks)]
    middle = [] if unet.middle_block is None else [("middle_block", unet.middle_block)]
    decoder = [(f"output_blocks.{n}", block) for n, block in enumerate(unet.output_blocks)]
    return [*encoder, *middle, *decoder]


def _require_maskable(name: str, module: nn.Module) -> None:
    methods = [getattr(type(module), method, None) for method in ("forward", "forward_comfy_cast_weights")]
    if not all(getattr(method, "__module__", "").startswith("comfy.") for method in methods):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise NothingToMask(
            f"Layer {name} is a {kind}, which computes with its weight in a way of its own, so no mask can reach it. "
            "Load the model from a .safetensors file with Load Checkpoint or Load Diffusion Model instead."
        )


def anchor_channels(diffusion_model: nn.Module, block: Block) -> tuple[int, int]:
    """(out, in) channels of the first convolution of a block's anchor, which diffusers calls `conv1`."""
    convolution = diffusion_model.get_submodule(block.anchor).in_layers[2]
    return convolution.out_channels, convolution.in_channels


def inspect_model(diffusion_model: nn.Module, targets: str, family: str) -> Structure:
    """The masked part of `diffusion_model` (ComfyUI's UNetModel) for a target set of TARGETS.

    Raises NothingToMask where the model is of another kind, no layer matches, or a layer cannot be masked.
    """
    if not _is_unet(diffusion_model):
        raise NothingToMask(
            f"The connected model ({family}, {type(diffusion_model).__name__}) is not a U-Net that MaskUNet knows. "
            "Connect an SD 1.5, SD 2.x or SDXL model, or bypass the MaskUNet node: it has no masks for this kind."
        )
    parts, matches = TARGETS[targets]
    modules = dict(diffusion_model.named_modules())
    blocks = []
    for name, anchor, prefixes in _unet_blocks(diffusion_model):
        if name.split(".")[0] not in parts:
            continue
        found = [
            n
            for n, m in modules.items()
            if n.startswith(tuple(prefixes)) and hasattr(m, "weight") and matches(n) and _TEMPORAL not in n
        ]
        for layer in found:
            _require_maskable(layer, modules[layer])
        if found:
            layers = tuple(Layer(n, modules[n].out_features, modules[n].in_features) for n in found)
            blocks.append(Block(name, anchor, modules[anchor].channels, layers))
    if not blocks:
        raise NothingToMask(
            f"No layer of the connected model ({family}) belongs to the target set '{targets}'. Choose another set in "
            "'targets', or connect another model."
        )
    return Structure(family, diffusion_model.time_embed[2].out_features, tuple(blocks))
