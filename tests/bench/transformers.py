"""What masks and the search for them cost on transformers of the host's own classes, with random weights.

Each number stands beside its goal. Steps and updates are measured in turns with plain ones, within one process.
"""

import gc
import itertools
import statistics
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskunet_core.masks.sources import GeneratorMasks, MaskSource, RandomMasks
from maskunet_core.models.families import family_of
from maskunet_core.records.recorded import RecordedMasks, RecordedSource
from maskunet_core.seam.attach import Attachment, attach, structure_of, with_attachment
from maskunet_core.seam.gradients import LeanGraph, ordinary_tensors
from maskunet_core.seam.sampling import mutable
from maskunet_core.search.graph import TransformerGraph
from maskunet_core.search.judge import Judge
from maskunet_core.search.masks import SearchedMasks
from maskunet_core.search.sampling import RewardSearch
from maskunet_core.search.settings import SearchSettings
from maskunet_core.training.cost import MB
from tests.bench import starting, z_image
from tests.bench.allocator import keep_freed_memory
from tests.bench.clock import now, seconds
from tests.bench.middle import middle
from tests.builders import make_generator
from tests.families.gradients import inside_a_step
from tests.families.models import TINY, Tiny, conditioning, load, noises

STEP_OF = ("Z-Image", "Flux.1")
"""Families whose masked steps are measured."""
LARGER = ("Qwen-Image", "Cosmos-Predict2", "Wan 2.1", "LTX-Video")
"""Families whose updates are measured at more tokens, too: they miss the goal where few tokens meet many masks."""
GOALS = {
    "shared masks": 1.02,
    "random masks": 1.10,
    "generator, masks per sample": 1.10,
    "update": 1.3,
    "kept": 0.15,
    "images": 20.0,
    "room": 5.5,
    "state": 6.0,
    "import": 50.0,
}
IMAGES = 2
TARGETS = "decoder attention"


def _row(what: str, model: str, value: float, goal: float, unit: str, **more: Any) -> dict[str, Any]:
    return {"what": what, "model": model, "measured": value, "unit": unit, "goal": goal, "met": value <= goal} | more


# A step ---------------------------------------------------------------------------------------------------------------


def _recorded(model: Any) -> MaskSource:
    structure, stream = structure_of(model, TARGETS), torch.Generator().manual_seed(0)
    masks = RecordedMasks(structure, images=1)
    shapes = {name: (1, layer.out_features, layer.in_features) for name, layer in structure.layers.items()}
    masks.add(1e9, {name: torch.rand(shape, generator=stream) < 0.95 for name, shape in shapes.items()})
    return RecordedSource(masks)


def _generator(model: Any) -> MaskSource:
    """Its bits differ between samples."""
    return GeneratorMasks(make_generator(structure_of(model, TARGETS), lively=True))


_SOURCES: dict[str, Callable[[Any], MaskSource]] = {
    "shared masks": _recorded,
    "random masks": lambda model: RandomMasks(structure_of(model, TARGETS), 0.95, 0, per_step=True),
    "generator, masks per sample": _generator,
}


def _step(model: Any, tiny: Tiny) -> None:
    """As the host's sampler node makes it, without guidance."""
    import comfy.sample

    noise = noises(tiny, tuple(range(IMAGES)))
    with torch.inference_mode():
        texts = conditioning(tiny, 3), conditioning(tiny, 4)
        settings = (1, 1.0, "euler", "simple", *texts, torch.zeros_like(noise))
        comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=5)


def _steps(name: str, tokens: int, turns: int) -> list[dict[str, Any]]:
    """Pairs of a plain and a masked step; medians of the ratios within a pair."""
    tiny = middle(name, tokens)
    model, rows = load(tiny), []
    _step(model, tiny)
    for what, source in _SOURCES.items():
        masked = attach(model, source(model), 1.0, 0.0, 1.0)
        _step(masked, tiny)
        ratios = []
        for turn in range(turns):
            pair = {"plain": model, "masked": masked}
            order = list(pair) if turn % 2 else list(reversed(pair))
            took = {kind: seconds(partial(_step, pair[kind], tiny)) for kind in order}
            ratios.append(took["masked"] / took["plain"])
        spread = {"from": round(min(ratios), 3), "to": round(max(ratios), 3)}
        told, ratio = f"{name}, {tokens**2} tokens", round(statistics.median(ratios), 3)
        rows.append(_row(f"step, {what}", told, ratio, GOALS[what], "plain steps", **spread))
    return rows


# An update ------------------------------------------------------------------------------------------------------------


class _Timed(RewardSearch):
    """Takes the time of each look, and of a plain call after it.

    looks: when each was reached, and when the plain call was done. No list, whose entries the search would put back as
    those of other nodes that remember something.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, report=self._between, **options)
        self.looks: deque[tuple[float, float]] = deque()
        self._plain: Callable[[], Any] | None = None

    def _predict_noise(self, executor, *arguments: Any) -> Tensor:
        self._plain = partial(executor, *arguments)
        return super()._predict_noise(executor, *arguments)

    @torch.no_grad()
    def _between(self, evaluation: Any, estimate: Tensor) -> None:
        reached = now()
        self._plain()
        self.looks.append((reached, now()))


def _linear_reward(latents: Tensor) -> tuple[Tensor, Tensor]:
    """It costs nothing: what a judge takes is not the masks'."""
    wanted = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
    return (latents * wanted).flatten(1).sum(1), wanted


def _update(model: Any, tiny: Tiny, turns: int) -> list[float]:
    """An update and the look after it, over the plain calls before and after it. The first and the last look are none
    of a run's many: one computes what serves all, the other takes no gradient."""
    import comfy.sample

    settings = SearchSettings(iterations=turns + 1, start_percent=1.0, lr=1e-2, branches="positive")
    search = _Timed(model, settings, Judge(lambda latents: latents, _linear_reward), 1)
    noise = noises(tiny, (5,))
    texts = (ordinary_tensors(conditioning(tiny, seed)) for seed in (3, 4))
    parts = (search.searching(model), noise, 1, 1.0, "euler", "simple", *texts, torch.zeros_like(noise))
    with torch.inference_mode(False), torch.no_grad():
        comfy.sample.sample(*parts, disable_pbar=True, seed=5)
    looks = list(search.looks)[: turns + 1]
    plain = [done - reached for reached, done in looks]
    updates = [later[0] - earlier[1] for earlier, later in itertools.pairwise(looks)]
    return [2 * took / (before + after) for took, before, after in zip(updates, plain, plain[1:])]


class _Alive(TorchDispatchMode):
    """Bytes of all tensors that were made inside the block and still exist."""

    def __init__(self):
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            # A view of weights is none of its own.
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    @property
    def bytes(self) -> int:
        gc.collect()
        return sum(size for reference, size in self._made.values() if not reference.expired())


def _kept(model: Any, tiny: Tiny, direct: bool) -> int:
    """Bytes that lie between the forward and the backward pass of a second look, what serves all looks among them."""
    masks = SearchedMasks(structure_of(model, TARGETS), 1, 1.0, torch.device("cpu"))

    def look(executor, x: Tensor, timestep: Tensor, model_options: dict, seed: int) -> int:
        transformer = executor.class_obj.inner_model.diffusion_model
        parts = (family_of(transformer), transformer, masks.structure, masks.logits)
        graph = TransformerGraph(*parts, fixed=not direct, recompute=not direct, lent=False)
        options = with_attachment(graph.options(model_options), Attachment(masks))
        with mutable(options, graph.writes_in_place), _Alive() as alive:
            for _ in range(2):
                # The one before goes first.
                estimate = None
                with torch.enable_grad(), LeanGraph():
                    estimate = executor(x, timestep, options, seed)
            assert estimate.requires_grad
            return alive.bytes - estimate.nbytes

    return inside_a_step(model, tiny, look, seeds=(5,), cfg=1.0)


def _searched(name: str, tokens: int, turns: int) -> list[dict[str, Any]]:
    tiny, fewer = middle(name, tokens), middle(name, tokens // 2)
    model, told = load(tiny), f"{name}, {tokens**2} tokens"
    ratios = _update(model, tiny, turns)
    # What is kept grows with the tokens in either way.
    lean, direct = (_kept(model, fewer, direct) for direct in (False, True))
    spread = {"from": round(min(ratios), 3), "to": round(max(ratios), 3)}
    kept = {"MB": round(lean / MB), "directly MB": round(direct / MB)}
    return [
        _row("update", told, round(statistics.median(ratios), 3), GOALS["update"], "plain forwards", **spread),
        _row("kept for the backward pass", told, round(lean / direct, 3), GOALS["kept"], "direct way", **kept),
    ]


def _on_paper() -> list[dict[str, Any]]:
    told, model = z_image.on_paper(), "Z-Image, 1024x1024, on paper"
    return [
        _row("few_step", model, told["images"], GOALS["images"], "plain images"),
        _row("update", model, told["update"], GOALS["update"], "plain forwards"),
        _row("room beside the model", model, told["room"], GOALS["room"], "GB", **told["parts"]),
        _row("state of a masked weight", model, told["state"], GOALS["state"], "bytes"),
    ]


def _import(repetitions: int) -> dict[str, Any]:
    [taken] = [row for row in starting.measure(repetitions) if row["what"] == "import of the extension"]
    return _row(taken["what"], "", taken["ms"], GOALS["import"], "ms", **{key: taken[key] for key in ("from", "to")})


def measure(quick: bool) -> list[dict[str, Any]]:
    """A row per number and model. quick: fewer turns, families and tokens."""
    torch.manual_seed(0)
    keep_freed_memory()
    tokens, turns = (16, 2) if quick else (32, 3)
    jobs: list[Callable[[], list[dict[str, Any]]]] = [
        *(partial(_steps, name, tokens, 3 * turns) for name in (STEP_OF[:1] if quick else STEP_OF)),
        *(partial(_searched, name, tokens, turns) for name in (STEP_OF if quick else TINY)),
        *(partial(_searched, name, 48, turns) for name in (() if quick else LARGER)),
        _on_paper,
        lambda: [_import(1 if quick else 3)],
    ]
    rows = []
    for job in jobs:
        rows += job()
        print(*rows[-1:], sep="\n", flush=True)
    return rows
