"""What holds for a search with gradients on every family, each a column of the table."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maskunet_core.masks.call import Call
from maskunet_core.models.structure import Structure
from maskunet_core.records.recorded import RecordedSource
from maskunet_core.seam.attach import Attachment, structure_of, with_attachment
from maskunet_core.search.judge import Judge
from maskunet_core.search.sampling import RewardSearch
from maskunet_core.search.settings import SearchSettings
from tests.families.checks import ATTENTION, EVERYWHERE, World, assert_same, snapshot
from tests.families.gradients import Found, Look, inside_a_step, weights_of
from tests.families.models import CPU, conditioning, load, lora, noises
from tests.host.memory import CARD, SCARCE

DIRECT = {"recompute": False, "lent": False}


def look(world: World, model: Any = None, targets: str = ATTENTION, seeds: tuple = (5, 6), **options: Any) -> Found:
    model = model or world.model
    found = Look(structure_of(model, targets), images=len(seeds), **options)
    return inside_a_step(model, world.tiny, found, seeds)


class _Given:
    """Masks of numbers, which act on all samples of a branch alike."""

    def __init__(self, structure: Structure, masks: dict[str, Tensor]):
        self.structure, self.masks = structure, masks

    def begin(self, call: Call) -> Callable:
        return lambda layer, weight: self.masks[layer]


def gradients(world: World) -> None:
    """Along each layer's own gradient, and the latent's, the estimate changes as differences say."""
    seeds, step = (5,), 1e-2
    masks = Look(world.structure, images=1).masks.logits
    kept = {name: (logits.detach() > 0).float()[0] for name, logits in masks.items()}
    found = look(world, seeds=seeds, fixed=False, **DIRECT)

    def value(executor, x, timestep, model_options, seed, layer="", way: Tensor | float = 0.0) -> float:
        given = kept if not layer else kept | {layer: kept[layer] + way}
        options = with_attachment(model_options, Attachment(_Given(world.structure, given)))
        estimate = executor(x if layer else x + way, timestep, options, seed)
        return float((estimate.double() * weights_of(estimate)).sum())

    def slope(layer: str, way: Tensor) -> float:
        """By central differences."""
        ends = [
            inside_a_step(world.model, world.tiny, partial(value, layer=layer, way=s * way), seeds) for s in (1, -1)
        ]
        return (ends[0] - ends[1]) / 2

    for layer, gradient in found.gradients.items():
        probability = masks[layer].detach().sigmoid()
        of_mask = (gradient / (probability * (1 - probability)))[0]
        way = step * of_mask / of_mask.norm() * kept[layer].numel() ** 0.25
        assert abs(slope(layer, way) / float((of_mask * way).sum()) - 1) < 1e-2, layer
    way = step * found.of_latent / found.of_latent.norm()
    assert abs(slope("", way) / float((found.of_latent * way).sum()) - 1) < 1e-2


@functools.cache
def of_whole_graph(world: World) -> Found:
    return look(world, **DIRECT)


def blockwise(world: World) -> None:
    """Block by block gradients are those of the whole graph, bit for bit, also where weights are inference tensors."""
    with torch.inference_mode():
        model = load(world.tiny)
    blocks = look(world, model)
    assert of_whole_graph(world).equals(blocks)
    assert all(gradient.abs().max() > 0 for gradient in blocks.gradients.values())
    for options in ({"targets": EVERYWHERE, "seeds": (5,)}, {"seeds": (5,), "fixed": False}):
        assert look(world, model, **options, **DIRECT).equals(look(world, model, **options)), options


def streamed(world: World) -> None:
    """So are those of weights that pass through buffers which are used again, with a LoRA and in 8 bits, too."""
    layers = {layer.module_name for layer in world.structure.layers.values()}

    def adapted(device: torch.device) -> Any:
        import comfy.sd

        tensors = lora(world.model, layers)
        return comfy.sd.load_lora_for_models(load(world.tiny, device=device), None, tensors, 1.0, 0.0)[0]

    for way, change in (("dynamic", partial(load, world.tiny, None)), ("streamed", adapted)):
        whole = of_whole_graph(world) if way == "dynamic" else look(world, change(CPU), **DIRECT)
        with SCARCE[way]():
            with torch.inference_mode():
                model = change(CARD)
            assert whole.equals(look(world, model)), way
            kept = look(world, model, **DIRECT)
            assert not all(gradient.isfinite().all() for gradient in kept.gradients.values()), way


def quantised(world: World) -> None:
    """And those of layers in 8 bits, which a block that runs again takes dequantised. The estimate is that of the
    picture as it is drawn; int8 rounds what enters a layer, and the gradients differ by what that changes."""
    for kind in ("fp8", "int8"):
        with torch.inference_mode():
            model = load(world.tiny, kind)
        whole = look(world, model, **DIRECT)
        with SCARCE["streamed"]():
            with torch.inference_mode():
                model = load(world.tiny, kind, CARD)
            found = look(world, model)
        assert torch.equal(found.estimate, whole.estimate), kind
        if kind == "fp8":
            assert whole.equals(found)
        else:
            assert relative_difference(found, whole) < 0.05


def relative_difference(found: Found, whole: Found) -> float:
    """Norm of the gradients' difference over the whole graph's norm, all layers together."""
    pairs = [(gradient, whole.gradients[name]) for name, gradient in found.gradients.items()]
    apart = sum(float((one - other).double().square().sum()) for one, other in pairs)
    return (apart / sum(float(other.double().square().sum()) for _, other in pairs)) ** 0.5


def cached(world: World) -> None:
    """What comes before all masks runs once for all looks at a step, which changes no bit of the later ones."""
    blocks = {block.name: world.model.model.diffusion_model.get_submodule(block.name) for block in _blocks(world)}
    before = list(blocks)[: list(blocks).index(world.structure.blocks[0].name)]
    whole = of_whole_graph(world)
    with _counted(blocks) as runs:
        assert whole.equals(look(world, looks=2))
    # The first step is a plain one; in each look masked blocks run forward, and once more to go back.
    once = runs[before[0]]
    assert {runs[name] for name in before} == {once}
    assert {runs[name] for name in blocks if name not in before} == {once // 2 * 5}


def _blocks(world: World) -> tuple:
    return world.structure_of(EVERYWHERE).blocks


@contextlib.contextmanager
def _counted(blocks: dict[str, torch.nn.Module]) -> Iterator[Counter]:
    """How often a layer in each block computes."""
    runs: Counter = Counter()
    handles = []
    for name, block in blocks.items():
        linear = next(part for part in block.modules() if isinstance(part, torch.nn.Linear))
        handles.append(linear.register_forward_hook(lambda *_, name=name: runs.update([name])))
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def search(world: World) -> None:
    """Inside the stock sampler a search raises its reward, a replay draws the same, and the model is as before."""
    settings = SearchSettings(iterations=3, start_percent=1.0, lr=0.3, branches="positive")
    before = snapshot(world.model)

    def score(latents: Tensor) -> tuple[Tensor, Tensor]:
        wanted = weights_of(latents[:1]).expand_as(latents)
        return (latents * wanted).flatten(1).sum(1), wanted

    def draw(model: Any) -> Tensor:
        import comfy.sample

        noise, texts = noises(world.tiny, (5, 6)), [conditioning(world.tiny, seed) for seed in (3, 4)]
        parts = (model, noise, 2, 3.0, "euler", "simple", *texts, torch.zeros_like(noise))
        with torch.no_grad():
            return comfy.sample.sample(*parts, disable_pbar=True, seed=5)

    def searching() -> RewardSearch:
        return RewardSearch(world.model, settings, Judge(lambda latents: latents, score), 2)

    reward = searching()
    latents = draw(reward.searching(world.model))
    scores = torch.stack([seen.scores for seen in reward.history])
    assert (scores.amax(0) > scores[0]).all()
    assert torch.equal(draw(world.masked(RecordedSource(reward.recorded))), latents)
    assert not torch.equal(latents, world.stock)
    assert_same(world.model, before)

    def interrupt(*_: Any) -> None:
        # Where a block runs again.
        if torch.is_grad_enabled():
            raise KeyboardInterrupt

    layer = list(world.structure.layers.values())[-1].module_name
    hook = world.model.model.diffusion_model.get_submodule(layer).register_forward_hook(interrupt)
    try:
        draw(searching().searching(world.model))
    except KeyboardInterrupt:
        hook.remove()
    assert_same(world.model, before)


SEARCHES: dict[str, Callable[[World], None]] = {
    "gradients": gradients,
    "block by block": blockwise,
    "streamed": streamed,
    "in 8 bits": quantised,
    "cached": cached,
    "search": search,
}
