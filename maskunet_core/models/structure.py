"""What can be masked in a model of the host: blocks and layers by name and shape, as files describe them, too."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..choices import TARGETS
from ..errors import MaskUNetError
from .families import FAMILIES, family_of
from .families.family import Target


class NothingToMask(MaskUNetError):
    """The model has no layer that the target set names, or one that cannot be masked; the message says which."""


Span = tuple[int, int]
"""The first row or column, and the one after the last."""


@dataclass(frozen=True)
class Layer:
    """A linear layer that is masked: its name inside the diffusion model, its weight's shape.

    Of a layer that computes several things at once a part may be masked alone: `module` is then the layer's name, rows
    and columns say where the part lies in its weight (None for all), and name and shape are the part's own.
    """

    name: str
    out_features: int
    in_features: int
    module: str | None = None
    rows: Span | None = None
    columns: Span | None = None

    def __post_init__(self):
        for span, size in ((self.rows, self.out_features), (self.columns, self.in_features)):
            if span is not None and not (span[0] >= 0 and span[1] - span[0] == size):
                raise ValueError(f"{self.name} has the rows or columns {span}, but is {size} of them")

    @property
    def module_name(self) -> str:
        return self.module or self.name

    def part_of(self, weight: Tensor) -> Tensor:
        """A view of what is masked in the module's whole weight [..., out, in]."""
        if self.rows is not None:
            weight = weight[..., slice(*self.rows), :]
        return weight if self.columns is None else weight[..., slice(*self.columns)]


def _layer_from_dict(data: dict[str, Any]) -> Layer:
    """Raises as `Structure.from_dict` does."""

    def span(key: str) -> Span | None:
        if key not in data:
            return None
        start, stop = map(int, data[key])
        return start, stop

    module = str(data["module"]) if "module" in data else None
    shape = int(data["out_features"]), int(data["in_features"])
    return Layer(str(data["name"]), *shape, module, span("rows"), span("columns"))


@dataclass(frozen=True)
class Block:
    """Layers that share a condition: what enters the anchor, a U-Net level's first ResBlock or a transformer's block.

    name: in a U-Net `up.0` is the deepest level of the decoder, as diffusers counts; `down.0` the first of the encoder;
    `mid`. channels: of what enters the anchor (in a U-Net's decoder: with its skip connection).
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

    @property
    def has_parts(self) -> bool:
        """Whether parts of layers are masked alone."""
        return any(layer.module is not None for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """For files: what a layer does not have is left out."""
        return asdict(self, dict_factory=lambda items: {key: value for key, value in items if value is not None})

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
                layers=tuple(map(_layer_from_dict, block["layers"])),
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


def family_name(model: nn.Module) -> str:
    """What people call the model that a MODEL holds (the host's BaseModel)."""
    name = type(getattr(model, "model_config", model)).__name__
    return next((family.names[name] for family in FAMILIES if name in family.names), name)


def _require_maskable(name: str, module: nn.Module) -> None:
    methods = [getattr(type(module), method, None) for method in ("forward", "forward_comfy_cast_weights")]
    if not all(getattr(method, "__module__", "").startswith("comfy.") for method in methods):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise NothingToMask(
            f"Layer {name} is a {kind}, which computes with its weight in a way of its own, so no mask can reach it. "
            "Load the model from a .safetensors file with Load Checkpoint or Load Diffusion Model instead."
        )


def _layers(name: str, module: nn.Module, targets: tuple[Target, ...]) -> Iterator[Layer]:
    """What the targets name of a module: it, its parts, or nothing."""
    for target in targets:
        if not f".{name}".endswith(f".{target.ending}"):
            continue
        _require_maskable(name, module)
        shape = module.out_features, module.in_features
        if not target.part:
            yield Layer(name, *shape)
            continue
        rows, columns = (span and span(*shape) for span in (target.rows, target.columns))
        own = (whole if span is None else span[1] - span[0] for whole, span in zip(shape, (rows, columns)))
        yield Layer(f"{name}.{target.part}", *own, name, rows, columns)


def inspect_model(diffusion_model: nn.Module, targets: str, family: str) -> Structure:
    """The masked part of a diffusion model of the host for a target set of TARGETS. family: what people call it.

    Raises NothingToMask where the model is of an unknown kind, no layer matches, or a layer cannot be masked.
    """
    kind = family_of(diffusion_model)
    if kind is None:
        raise NothingToMask(
            f"The connected model ({family}, {type(diffusion_model).__name__}) is of a kind that MaskUNet has no masks "
            "for. Connect a U-Net (SD 1.5, SD 2.x, SDXL) or a transformer that it knows (Z-Image, Lumina 2, Flux, "
            "Chroma, HunyuanImage, Krea 2, Qwen-Image, Anima, SD 3), or use MaskUNet Reward Sampler without masks, "
            "which works with any model."
        )
    thirds, feed_forward = TARGETS[targets]
    wanted = kind.attention + (kind.feed_forward if feed_forward else ())
    modules = {name: module for name, module in diffusion_model.named_modules() if hasattr(module, "weight")}
    blocks = []
    for stage in kind.stages(diffusion_model):
        if stage.third not in thirds:
            continue
        inside = [n for n in modules if n.startswith(stage.prefixes) and not kind.is_idle(diffusion_model, n)]
        layers = tuple(layer for name in inside for layer in _layers(name, modules[name], wanted))
        if layers:
            blocks.append(Block(stage.name, stage.anchor, stage.channels, layers))
    if not blocks:
        raise NothingToMask(
            f"No layer of the connected model ({family}) belongs to the target set '{targets}'. Choose another set in "
            "'targets', or connect another model."
        )
    return Structure(family, kind.embedding(diffusion_model), tuple(blocks))
