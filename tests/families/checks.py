"""What holds for masks on every family, each a column of a table; `python -m tests.families` prints it."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskunet_core.choices import TARGETS
from maskunet_core.files import checkpoint, mask_file
from maskunet_core.masks.call import Call
from maskunet_core.masks.sources import GeneratorMasks, MaskSource, RandomMasks
from maskunet_core.models.structure import Structure
from maskunet_core.records.recorded import RecordedMasks, RecordedSource, count_ones
from maskunet_core.records.recorder import masks_of_run, recording
from maskunet_core.seam.attach import attach, structure_of
from tests.builders import make_generator
from tests.families.models import TINY, load, lora, sample

ATTENTION, WIDER, EVERYWHERE = TARGETS


class Constant:
    """Masks that a check chooses: `value(layer, weight)`."""

    def __init__(self, structure: Structure, value: Callable[[str, Tensor], Tensor | None]):
        self.structure, self.value = structure, value

    def begin(self, call: Call):
        return self.value


def ones(layer: str, weight: Tensor) -> Tensor:
    return torch.ones_like(weight, dtype=torch.bool)


class World:
    """A tiny model of a family, and what it draws without masks."""

    def __init__(self, name: str):
        self.tiny = TINY[name]
        self.model = load(self.tiny)
        self.stock = self.draw(self.model)
        self.structure = self.structure_of(ATTENTION)

    def draw(self, model: Any, **options: Any) -> Tensor:
        return sample(model, self.tiny, **options)

    def structure_of(self, targets: str, model: Any = None) -> Structure:
        return structure_of(model or self.model, targets)

    def masked(self, source: MaskSource, model: Any = None, strength: float = 1.0) -> Any:
        return attach(model or self.model, source, strength, 0.0, 1.0)

    def random(self, targets: str = ATTENTION, seed: int = 1, keep: float = 0.8) -> RandomMasks:
        return RandomMasks(self.structure_of(targets), keep, seed, per_step=True)

    @functools.cached_property
    def generated(self) -> Any:
        """A MODEL with a lively generator's masks: others for each image, branch and step."""
        return self.masked(GeneratorMasks(make_generator(self.structure, lively=True, rank=4, width=16)))

    @functools.cached_property
    def recorded(self) -> tuple[Tensor, RecordedMasks]:
        latents = self.draw(recording(self.generated))
        return latents, masks_of_run(latents)


def differs(some: Tensor, other: Tensor) -> bool:
    return bool(some.isfinite().all()) and float((some - other).abs().max()) > 1e-3


def snapshot(model: Any) -> tuple:
    """All weights, and every instance attribute and hook of every module."""
    modules = dict(model.model.named_modules())
    weights = {name: value.clone() for name, value in model.model.state_dict().items() if isinstance(value, Tensor)}
    hooks = {name: (len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs)) for name, m in modules.items()}
    # What the host itself notes: the patcher that was loaded last, and what it has loaded. It may unload between tests.
    notes = {"current_patcher", "comfy_patched_weights"}
    return weights, {name: sorted(set(m.__dict__) - notes) for name, m in modules.items()}, hooks


def assert_same(model: Any, before: tuple) -> None:
    weights, attributes, hooks = snapshot(model)
    differing = {n: set(attributes[n]) ^ set(before[1][n]) for n in attributes if attributes[n] != before[1][n]}
    assert not differing, differing
    assert hooks == before[2]
    changed = [name for name, value in before[0].items() if not torch.equal(weights[name], value)]
    assert not changed, changed


def off(world: World) -> None:
    """Masks of None and masks at strength 0 draw what the stock model draws."""
    nothing = Constant(world.structure_of(EVERYWHERE), lambda layer, weight: None)
    assert torch.equal(world.draw(world.masked(nothing)), world.stock)
    assert torch.equal(world.draw(world.masked(world.random(), strength=0.0)), world.stock)


def all_ones(world: World) -> None:
    """So do shared masks of ones, on each target set."""
    for targets in (WIDER, EVERYWHERE):
        masked = world.masked(Constant(world.structure_of(targets), ones))
        assert torch.equal(world.draw(masked), world.stock), targets


def random(world: World) -> None:
    """Each layer of each target set is reached, and its masks act; two nodes act alike in either order."""
    reached: set[str] = set()

    def watched(layer: str, weight: Tensor) -> None:
        assert weight.shape == shapes[layer]
        reached.add(layer)

    for targets in TARGETS:
        structure = world.structure_of(targets)
        shapes = {layer.name: (layer.out_features, layer.in_features) for layer in structure.layers.values()}
        reached.clear()
        world.draw(world.masked(Constant(structure, watched)), steps=1)
        assert reached == shapes.keys()
    wider, quick = world.structure_of(WIDER), {"seeds": (5,), "steps": 1}
    plain = world.draw(world.model, **quick)
    for layer in wider.layers:
        one = Constant(wider, lambda name, weight, only=layer: weight > 0 if name == only else None)
        assert differs(world.draw(world.masked(one), **quick), plain), layer
    first, second = world.random(), world.random(WIDER, seed=2)
    orders = [world.draw(world.masked(b, world.masked(a))) for a, b in ((first, second), (second, first))]
    assert torch.equal(*orders)
    assert differs(orders[0], world.draw(world.masked(first)))


def generator(world: World) -> None:
    """A generator's file draws, other masks for each step and image, which do not depend on the rest of the batch."""
    made = make_generator(world.structure, lively=True, rank=4, width=16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "generator.safetensors")
        checkpoint.save(path, made, ATTENTION, {})
        version = checkpoint.read_metadata(path)["format_version"]
        loaded = checkpoint.load(path)
    assert version == ("2" if world.structure.has_parts else "1")
    loaded.require_fit(world.structure)
    masked = world.masked(GeneratorMasks(loaded.generator))
    together = world.draw(masked)
    assert differs(together, world.stock)
    both, masks = world.recorded
    for image, seed in enumerate((5, 6)):
        latents = world.draw(recording(world.generated), seeds=(seed,))
        own = masks_of_run(latents)
        # Bits at the threshold may fall to the other side where the model's own numbers differ by a rounding.
        assert (latents[0] - both[image]).abs().mean() < 0.1 * (both - world.stock).abs().mean()
        for step, of_batch in zip(own.steps.values(), masks.steps.values()):
            flipped = sum(count_ones(step[name] ^ of_batch[name][image::2]) for name in step)
            assert flipped < 1e-3 * 2 * world.structure.masked_weights
    steps = list(world.recorded[1].steps.values())
    assert any(not torch.equal(steps[0][layer], steps[1][layer]) for layer in steps[0])
    assert any(not torch.equal(rows[0], rows[1]) for rows in steps[0].values())


def record(world: World) -> None:
    """Recording changes nothing, and a file of recorded masks comes back as it was."""
    latents, masks = world.recorded
    assert torch.equal(latents, world.draw(world.generated))
    assert masks.targets == ATTENTION
    assert masks.structure == world.structure
    assert len(masks.steps) == 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "masks.safetensors")
        mask_file.save(path, masks)
        assert mask_file.KIND.read_metadata(path)["format_version"] == ("2" if world.structure.has_parts else "1")
        loaded = mask_file.load(path)
    assert loaded.structure == masks.structure
    for sigma, step in masks.steps.items():
        assert step.keys() == loaded.steps[sigma].keys()
        assert all(torch.equal(packed, loaded.steps[sigma][layer]) for layer, packed in step.items())
    wider = masks_of_run(world.draw(recording(world.masked(world.random(WIDER), world.masked(world.random())))))
    assert wider.targets == WIDER


def replay(world: World) -> None:
    """Recorded masks draw the same picture again, bit for bit."""
    latents, masks = world.recorded
    masks.require_fit(world.structure)
    assert torch.equal(world.draw(world.masked(RecordedSource(masks))), latents)


def with_lora(world: World) -> None:
    """A LoRA before the masks and behind them gives the same bits."""
    import comfy.sd

    layers = {layer.module_name for layer in world.structure.layers.values()}

    def adapted(model: Any) -> Any:
        return comfy.sd.load_lora_for_models(model, None, lora(world.model, layers), 1.0, 0.0)[0]

    source = world.random()
    before = adapted(world.model)
    assert len(before.patches) == len(layers)
    drawn = world.draw(world.masked(source, before))
    assert torch.equal(drawn, world.draw(adapted(world.masked(source))))
    assert differs(drawn, world.draw(world.masked(source)))


@torch.inference_mode()
def quantised(world: World) -> None:
    """Layers in 8 bits: masked ones compute dequantised, which for fp8 changes no bit where the device has no fp8."""
    for kind in ("fp8", "int8"):
        model = load(world.tiny, kind)
        stock, before = world.draw(model), snapshot(model)
        structure = world.structure_of(ATTENTION, model)
        assert structure == world.structure
        nothing = Constant(structure, lambda layer, weight: None)
        removed = world.draw(world.masked(RandomMasks(structure, 0.8, 1, True), model))
        assert differs(removed, stock)
        kept = world.draw(world.masked(Constant(structure, ones), model))
        if kind == "fp8":
            assert torch.equal(world.draw(world.masked(nothing, model)), stock)
            assert torch.equal(kept, stock)
        else:
            assert (kept - stock).abs().mean() < 0.5 * (removed - stock).abs().mean()
        assert_same(model, before)


def restored(world: World) -> None:
    """After runs, errors and interrupts the model is bitwise as before, and so is its picture."""
    before, masked = snapshot(world.model), world.generated
    world.draw(masked)
    assert_same(world.model, before)
    last = list(world.structure.layers)[-1]
    for error in (RuntimeError("inside the model"), torch.OutOfMemoryError("full"), KeyboardInterrupt()):

        def fail(layer: str, weight: Tensor, error: BaseException = error) -> None:
            if layer == last:
                raise error

        try:
            world.draw(world.masked(Constant(world.structure, fail), masked))
        except type(error):
            assert_same(world.model, before)
        else:
            raise AssertionError(f"{error!r} was lost")
    assert torch.equal(world.draw(world.model), world.stock)


COLUMNS: dict[str, Callable[[World], None]] = {
    "off": off,
    "ones": all_ones,
    "random": random,
    "generator": generator,
    "record": record,
    "replay": replay,
    "LoRA": with_lora,
    "quantised": quantised,
    "restored": restored,
}
