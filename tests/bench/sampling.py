"""What masks cost in sampling, what they cannot cost less than, and what the host's FreeU and PAG cost beside them."""

import contextlib
import gc
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from maskunet_core.masks.reference import ReferenceGenerator, authors_maps
from maskunet_core.masks.sources import GeneratorMasks, RandomMasks
from maskunet_core.models.structure import Structure
from maskunet_core.records.recorded import RecordedMasks, RecordedSource
from maskunet_core.seam.attach import attach, structure_of
from maskunet_core.training.base import BaseModel
from maskunet_core.training.cost import MB, PeakMemory
from tests.bench.allocator import freed_at_once, keep_freed_memory
from tests.bench.clock import seconds
from tests.bench.models import random_base
from tests.builders import make_generator
from trainer.base import load_toy_base
from trainer.reward_compare.costs import Operations

UNMASKED, OURS = "unmasked", "MaskUNet"
CFG = 7.5
FAMILIES = {"SD 1.5": (768, 77), "SDXL": (2048, 77), "toy": (128, 16)}
"""Width and number of the text tokens."""


@dataclass(frozen=True)
class Size:
    """What is drawn: `images` pictures of `pixels` a side, two samples each where `cfg` is not 1.

    turns: after a first step of each variant, which counts itself where there is no other.
    """

    model: str
    pixels: int
    images: int
    turns: int
    variants: tuple[str, ...]
    targets: str = "decoder attention"
    cfg: float = CFG

    def prompt(self, stream: torch.Generator) -> list:
        width, tokens = FAMILIES[self.model]
        return [[torch.randn(1, tokens, width, generator=stream), {"pooled_output": torch.randn(1, 1280)}]]


@dataclass(frozen=True)
class Variant:
    """A patched MODEL, and the bytes of what patches it."""

    model: Any
    bytes: int = 0


def _weights(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _generator(structure: Structure, base: BaseModel, lively: bool = True) -> torch.nn.Module:
    """Of our architecture; its bits differ between samples: what all samples share would be cheaper."""
    return make_generator(structure, lively=lively).to(base.patcher.load_device, base.unet.dtype)


Build = Callable[[BaseModel, str], Variant]
"""From a base and the name of a target set."""


def _attached(
    source: Callable[[BaseModel, Structure], tuple[Any, int]], strength: float = 1.0, start: float = 0.0
) -> Build:
    def build(base: BaseModel, targets: str) -> Variant:
        made, size = source(base, structure_of(base.patcher, targets))
        return Variant(attach(base.patcher, made, strength, start, 1.0), size)

    return build


def _ours(base: BaseModel, structure: Structure) -> tuple[Any, int]:
    generator = _generator(structure, base)
    return GeneratorMasks(generator), _weights(generator)


def _authors(base: BaseModel, structure: Structure) -> tuple[Any, int]:
    torch.manual_seed(0)
    generator = ReferenceGenerator(structure, authors_maps(structure, base.unet)).eval().requires_grad_(False)
    generator = generator.to(base.patcher.load_device, base.unet.dtype)
    return GeneratorMasks(generator), _weights(generator)


def _random(base: BaseModel, structure: Structure) -> tuple[Any, int]:
    return RandomMasks(structure, 0.99, 0, per_step=True), 0


def _recorded(base: BaseModel, structure: Structure) -> tuple[Any, int]:
    masks, stream = RecordedMasks(structure, images=1), torch.Generator().manual_seed(0)
    shapes = {name: (1, layer.out_features, layer.in_features) for name, layer in structure.layers.items()}
    masks.add(10.0, {name: torch.rand(shape, generator=stream) < 0.95 for name, shape in shapes.items()})
    return RecordedSource(masks), masks.bytes


def _by_host(module: str, node: str, *values: float) -> Build:
    def build(base: BaseModel, targets: str) -> Variant:
        cls = getattr(importlib.import_module(f"comfy_extras.{module}"), node)
        return Variant(cls.execute(base.patcher, *values).args[0])

    return build


VARIANTS: dict[str, Build] = {
    UNMASKED: lambda base, targets: Variant(base.patcher),
    "strength 0": _attached(_ours, strength=0.0),
    "outside the window": _attached(_ours, start=0.9),
    OURS: _attached(_ours),
    "authors' networks": _attached(_authors),
    "random masks": _attached(_random),
    "recorded masks": _attached(_recorded),
    "FreeU": _by_host("nodes_freelunch", "FreeU", 1.1, 1.2, 0.9, 0.2),
    "PAG": _by_host("nodes_pag", "PerturbedAttentionGuidance", 3.0),
}
MASKS = (UNMASKED, OURS)
SIZES = (
    Size("SD 1.5", 256, 1, 4, tuple(VARIANTS)),
    Size("SD 1.5", 512, 1, 3, MASKS),
    Size("SD 1.5", 256, 1, 1, MASKS, "decoder attention and feed-forward"),
    Size("SD 1.5", 256, 1, 1, MASKS, "all attention"),
    Size("SD 1.5", 256, 4, 1, MASKS),
    Size("SD 1.5", 512, 4, 0, MASKS),
    Size("SD 1.5", 256, 16, 1, MASKS, cfg=1.0),
    Size("SD 1.5", 1024, 1, 0, MASKS, cfg=1.0),
    Size("SDXL", 256, 1, 1, MASKS),
    Size("toy", 64, 1, 20, tuple(VARIANTS)),
    Size("toy", 64, 4, 20, MASKS),
)
ON_CUDA = Size("SD 1.5", 512, 1, 10, tuple(VARIANTS))
"""Besides: a CPU would take minutes for it."""
TURNS_ON_CUDA = 5
"""At least: what a first step warms up is much of its time there."""
FEW = (UNMASKED, "strength 0", OURS, "authors' networks", "PAG")
QUICK = (Size("SD 1.5", 256, 1, 1, FEW), Size("toy", 64, 1, 5, tuple(VARIANTS)))


def _step(size: Size, model: Any) -> None:
    """A run of one step, as the host's sampler node makes it."""
    import comfy.sample

    stream = torch.Generator().manual_seed(0)
    noise = torch.randn(size.images, 4, size.pixels // 8, size.pixels // 8, generator=stream)
    positive, negative = size.prompt(stream), size.prompt(stream)
    with torch.inference_mode():
        comfy.sample.sample(
            model, noise, 1, size.cfg, "euler", "normal", positive, negative, noise, disable_pbar=True, seed=0
        )


@dataclass(frozen=True)
class Speed:
    """What this machine reaches: operations and bytes (read and written) per second."""

    operations: float
    bytes: float

    def floor(self, operations: float, size: float) -> float:
        """Seconds that so many operations and bytes take at least: both may go on at once."""
        return max(operations / self.operations, size / self.bytes)

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> "Speed":
        side = 4096 if device.type == "cuda" else 1536
        left, right = torch.randn(2, side, side, device=device).to(dtype)
        source = torch.empty(64 * MB, dtype=torch.uint8, device=device).fill_(1)
        target = torch.empty_like(source)
        product = min(seconds(lambda: torch.mm(left, right)) for _ in range(10))
        copy = min(seconds(lambda: target.copy_(source)) for _ in range(10))
        return cls(2 * side**3 / product, 2 * source.numel() / copy)


@dataclass(frozen=True)
class First:
    """A step that also warms up, on fresh pages. operations: floating-point; peak: of memory, in bytes."""

    seconds: float
    operations: int
    peak: int

    @classmethod
    def of(cls, size: Size, model: Any, device: torch.device) -> "First":
        with freed_at_once(), PeakMemory(device) as memory, Operations() as counter:
            took = seconds(partial(_step, size, model))
        return cls(took, counter.total, memory.peak)


def _say(text: str) -> None:
    print(f"[bench] {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _same_free_memory(device: torch.device) -> Iterator[None]:
    """The host splits attention by the memory that is free; where that differs between steps, so do peaks, by GBs."""
    import comfy.model_management

    free = comfy.model_management.get_free_memory(device)

    def get_free_memory(dev: Any = None, torch_free_too: bool = False) -> Any:
        return (free, free) if torch_free_too else free

    with mock.patch.object(comfy.model_management, "get_free_memory", get_free_memory):
        yield


def _rows(size: Size, base: BaseModel, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row per variant: steps in turns, medians, and ratios to the unmasked step of the same turn.

    Of the first steps the unmasked one is the last, so that what a size sets up does not count against it.
    """
    device = base.patcher.load_device
    speed = Speed.of(device, dtype)
    variants = {name: VARIANTS[name](base, size.targets) for name in size.variants}
    first = {name: First.of(size, variants[name].model, device) for name in reversed(size.variants)}
    turns = [
        {name: seconds(partial(_step, size, variant.model)) for name, variant in variants.items()}
        for _ in range(size.turns)
    ] or [{name: step.seconds for name, step in first.items()}]
    unmasked = statistics.median(turn[UNMASKED] for turn in turns)
    rows = []
    for name, variant in variants.items():
        ratios = [turn[name] / turn[UNMASKED] for turn in turns]
        operations, peak = first[name].operations, first[name].peak
        extra = speed.floor(operations - first[UNMASKED].operations, variant.bytes)
        rows.append(
            {
                "model": size.model,
                "dtype": str(dtype).removeprefix("torch."),
                "pixels": size.pixels,
                "images": size.images,
                "cfg": size.cfg,
                "targets": size.targets,
                "variant": name,
                "s per step": round(statistics.median(turn[name] for turn in turns), 3),
                "ratio": round(statistics.median(ratios), 3),
                "from": round(min(ratios), 3),
                "to": round(max(ratios), 3),
                "floor of ratio": round(1 + extra / unmasked, 3),
                "floor s": round(speed.floor(operations, _weights(base.unet) + variant.bytes), 3),
                "GFLOP": round(operations / 1e9, 1),
                "extra peak MB": round((peak - first[UNMASKED].peak) / MB),
                "patch MB": round(variant.bytes / MB, 1),
            }
        )
        _say(f"{name}: {rows[-1]['s per step']} s, {rows[-1]['ratio']} of the unmasked step")
    return rows


def measure(sizes: tuple[Size, ...]) -> list[dict[str, Any]]:
    """The table of all sizes; a GPU measures each in fp16 and bf16."""
    import comfy.model_management

    keep_freed_memory()
    device = comfy.model_management.get_torch_device()
    dtypes = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]
    if torch.cuda.is_available():
        sizes = (ON_CUDA, *(replace(size, turns=max(size.turns, TURNS_ON_CUDA)) for size in sizes))
    rows = []
    for model in dict.fromkeys(size.model for size in sizes):
        for dtype in dtypes if model != "toy" else [torch.float32]:
            base = load_toy_base() if model == "toy" else random_base(model, dtype, device)
            mine = [size for size in sizes if size.model == model]
            _step(mine[0], base.patcher)
            for size in mine:
                _say(f"{model}, {size.pixels} pixels, {size.images} images, CFG {size.cfg}, {size.targets}, {dtype}")
                with _same_free_memory(device):
                    rows += _rows(size, base, dtype)
            del base
            gc.collect()
    return rows
