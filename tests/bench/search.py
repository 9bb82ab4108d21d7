"""What an iteration of the reward sampler costs beside the direct loop, on SD 1.5's shapes with random weights."""

import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from maskunet_core.rewards.reward import BoundReward, value_and_gradient
from maskunet_core.search.decoder import latent_decoder
from maskunet_core.search.judge import Judge
from maskunet_core.search.masks import SearchedMasks
from maskunet_core.search.sampling import RewardSearch
from maskunet_core.search.settings import PRESETS, SMALL_SIDE, SearchSettings
from maskunet_core.training.cost import MB, PeakMemory
from tests.bench.models import random_base, random_rewards, random_vae
from trainer.reward_compare.costs import Operations

STEPS, CFG = 15, 7.5
DIRECT, EXACT, SMALL = "direct loop", "exact", "exact, TAESD"
LEAN, LEAN_SMALL = "positive branch, small picture", "positive branch, small picture, TAESD"
_ONE = SearchSettings(iterations=1, optimiser="AdamW", lr=1e-2)
_LEAN = replace(_ONE, branches="positive", small_decode=True)
WHOLE_IMAGES = (("fast", STEPS, CFG), ("quality", STEPS, CFG), ("few_step", 4, 1.0), ("few_step", 1, 1.0))
"""(preset, steps, cfg)."""


@dataclass(frozen=True)
class Scene:
    """Everything that a search works on, at one size of pictures."""

    model: Any
    vae: SimpleNamespace
    small_vae: SimpleNamespace
    reward: BoundReward
    pixels: int

    @classmethod
    def build(cls, pixels: int) -> "Scene":
        return cls(
            random_base(small=True).patcher, random_vae(small=False), random_vae(small=True), random_rewards(), pixels
        )

    def decode(self, small: bool = False) -> Callable[[Tensor], Tensor]:
        return latent_decoder(self.small_vae if small else self.vae, self.model.get_model_object("latent_format"))

    def judge(self, small_vae: bool, settings: SearchSettings) -> Judge:
        side = SMALL_SIDE if settings.small_decode else 0
        return Judge(self.decode(small_vae), lambda pictures: value_and_gradient(self.reward, pictures), side)

    @torch.no_grad()
    def one_step(self, model: Any, cfg: float = CFG) -> Tensor:
        """The sampler's step in the middle of a run."""
        import comfy.sample

        stream = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 4, self.pixels // 8, self.pixels // 8, generator=stream)
        positive, negative = ([[torch.randn(1, 77, 768, generator=stream), {}]] for _ in range(2))
        parts = (model, noise, STEPS, cfg, "euler", "normal", positive, negative, torch.zeros_like(noise))
        options = {"start_step": STEPS // 2, "last_step": STEPS // 2 + 1, "seed": 0, "disable_pbar": True}
        return comfy.sample.sample(*parts, **options)


@dataclass
class Iteration:
    """gradients: folder of those of the logits, a file for each layer. seconds: of the processor. peak: bytes, beyond
    those before."""

    gradients: Path
    seconds: float
    operations: int
    peak: int


class _Enough(Exception):
    pass


class _Watch:
    """Ends a step after its second look. What lies between the first and the second is an iteration: the update,
    the prediction and the judgement, with the encoder's features at hand where they are kept."""

    def __init__(self, counted: Operations, gradients: Path):
        self.began = self.seconds = 0.0
        self.counted, self.gradients, self.updated = counted, gradients, 0

    def look(self, masks: SearchedMasks) -> None:
        if not self.began:
            self.masks = masks
            self.counted.__enter__()
            self.began = time.process_time()
            return
        self.seconds = time.process_time() - self.began
        self.counted.__exit__(None, None, None)
        raise _Enough

    def before_update(self, optimiser: torch.optim.Optimizer, *_) -> None:
        # On the disk, because in memory they would count. An optimiser has all layers, or one after the other has one.
        for slope in (leaf.grad for group in optimiser.param_groups for leaf in group["params"]):
            layer = list(self.masks.logits)[self.updated]
            torch.save(slope.view_as(self.masks.logits[layer]), self.gradients / layer)
            self.updated += 1


class _DirectLoop:
    """Algorithm 1 as it is written: everything in one graph, the encoder and both branches in every iteration."""

    def __init__(self, scene: Scene, watch: _Watch):
        from comfy.patcher_extension import WrappersMP

        from maskunet_core.seam.attach import structure_of, with_masks

        self.scene, self.watch = scene, watch
        self.structure = structure_of(scene.model, "decoder attention")
        self.model = with_masks(scene.model)
        self.model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "direct loop", self._predict_noise)

    def _predict_noise(self, executor, x, timestep, model_options, seed):
        from maskunet_core.seam.attach import Attachment, with_attachment

        masks = SearchedMasks(self.structure, len(x), _ONE.start, x.device)
        leaves = list(masks.logits.values())
        optimiser = torch.optim.AdamW(leaves, lr=_ONE.lr)
        options = with_attachment(model_options, Attachment(masks))
        decode = self.scene.decode()
        while True:
            with torch.enable_grad():
                score = self.scene.reward(decode(executor(x, timestep, options, seed)))
                (-score.sum()).backward()
            self.watch.look(masks)
            optimiser.step()
            optimiser.zero_grad()


@dataclass(frozen=True)
class _Variant:
    """settings: of the product's search; None is the direct loop."""

    settings: SearchSettings | None
    small_vae: bool = False


VARIANTS = {
    DIRECT: _Variant(None),
    EXACT: _Variant(_ONE),
    SMALL: _Variant(_ONE, small_vae=True),
    LEAN: _Variant(_LEAN),
    LEAN_SMALL: _Variant(_LEAN, small_vae=True),
}


def _model(scene: Scene, variant: _Variant, watch: _Watch) -> Any:
    """A MODEL whose sampler's step is the variant's."""
    if variant.settings is None:
        return _DirectLoop(scene, watch).model
    settings = replace(variant.settings, iterations=2)
    search = RewardSearch(
        scene.model, settings, scene.judge(variant.small_vae, settings), 1, report=lambda *_: watch.look(search._masks)
    )
    return search.searching(scene.model)


class Imagined(Operations):
    """Counts operations without executing them: their results are zeros."""

    def execute(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return tree_map_only(Tensor, lambda like: torch.zeros_like(like, device="cpu"), function(*args, **kwargs))


def iterate(scene: Scene, name: str, counted: Operations, folder: Path) -> Iteration:
    gradients = folder / "gradients"
    gradients.mkdir()
    watch, before = _Watch(counted, gradients), psutil.Process().memory_info().rss
    model = _model(scene, VARIANTS[name], watch)
    hook = register_optimizer_step_pre_hook(watch.before_update)
    try:
        with PeakMemory(torch.device("cpu")) as memory, contextlib.suppress(_Enough):
            scene.one_step(model)
    finally:
        hook.remove()
    return Iteration(gradients, watch.seconds, watch.counted.total, memory.peak - before)


def _alone(scene: Scene, name: str, folder: Path) -> Iteration:
    """`iterate` in a process of its own, which finds the models in memory and nothing that others have left there."""
    folder.mkdir(parents=True)
    path = folder / "iteration.pt"

    def run() -> None:
        torch.save(iterate(scene, name, Operations(), folder), path)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"the process of '{name}' ended with {child.exitcode}")
    return torch.load(path, weights_only=False)


def difference(ours: Iteration, other: Iteration) -> float:
    """Norm of the gradients' difference over the other's norm, all layers together."""
    slopes, direct = (
        {path.name: torch.load(path) for path in iteration.gradients.iterdir()} for iteration in (ours, other)
    )
    apart = sum(float((slopes[name] - direct[name]).double().square().sum()) for name in direct)
    return (apart / sum(float(slope.double().square().sum()) for slope in direct.values())) ** 0.5


def measure(pixels: int, repetitions: int) -> list[dict]:
    """A row per variant, in turns: medians, and the medians of the ratios to the direct loop's within a turn."""
    scene = Scene.build(pixels)
    with tempfile.TemporaryDirectory() as folder:
        turns = [
            {name: _alone(scene, name, Path(folder) / f"{turn} {name}") for name in VARIANTS}
            for turn in range(repetitions)
        ]
        apart = difference(turns[0][EXACT], turns[0][DIRECT])
    if not apart < 1e-3:
        raise AssertionError(f"the gradients of {EXACT} differ by {apart:.2g} from those of the {DIRECT}")
    first, rows = turns[0], []
    for name in VARIANTS:
        peak = statistics.median(turn[name].peak for turn in turns)
        rows.append(
            {
                "pixels": pixels,
                "iteration": name,
                "CPU s": round(statistics.median(turn[name].seconds for turn in turns), 1),
                "time ratio": _over_direct(turns, name, "seconds"),
                "GFLOP": round(first[name].operations / 1e9),
                "operations ratio": _over_direct(turns[:1], name, "operations"),
                "peak MB beyond the models": round(peak / MB),
                "memory ratio": _over_direct(turns, name, "peak"),
                "gradient's difference": f"{apart:.1g}" if name == EXACT else "",
            }
        )
    return rows


def _over_direct(turns: list[dict[str, Iteration]], name: str, what: str) -> float:
    return round(statistics.median(getattr(turn[name], what) / getattr(turn[DIRECT], what) for turn in turns), 3)


def _counted(run: Callable[[], Any]) -> int:
    with Imagined() as counted:
        run()
    return counted.total


def measure_images(pixels: int) -> list[dict]:
    """A row per preset: counted operations of a whole image, beside plain images and the best of several."""
    scene = Scene.build(pixels)
    latents = torch.zeros(1, 4, pixels // 8, pixels // 8)
    final = _counted(lambda: scene.judge(False, SearchSettings()).scores(latents))
    decode = _counted(lambda: scene.judge(False, SearchSettings()).pictures(latents))
    rows = []
    for preset, steps, cfg in WHOLE_IMAGES:
        settings = PRESETS[preset]
        step = _counted(lambda cfg=cfg: scene.one_step(scene.model, cfg))
        total = _searched(scene, settings, steps, cfg, step, final)
        plain, judged = steps * step + decode, steps * step + final
        rows.append(
            {
                "pixels": pixels,
                "preset": preset,
                "steps": steps,
                "cfg": cfg,
                "candidates": settings.candidates,
                "updates": settings.total_iterations(steps),
                "TFLOP": round(total / 1e12, 1),
                "in plain images": round(total / plain, 2),
                "as best of": round(total / judged, 2),
            }
        )
    return rows


def _searched(scene: Scene, settings: SearchSettings, steps: int, cfg: float, step: int, final: int) -> int:
    """Operations of an image: each part is counted once, and the parts are added up as the settings say."""
    judge = scene.judge(False, settings)
    latents = torch.zeros(1, 4, scene.pixels // 8, scene.pixels // 8)
    looks = settings.candidate_steps(steps)
    candidate = looks * step + (_counted(lambda: judge.scores(latents)) if looks < steps else final)

    def with_updates(updates: int) -> int:
        everywhere = replace(settings, iterations=updates, start_percent=0.0, end_percent=1.0, patience=0)
        return _counted(
            lambda: scene.one_step(RewardSearch(scene.model, everywhere, judge, 1).searching(scene.model), cfg)
        )

    one, two = with_updates(1), with_updates(2)
    updates = [settings.iterations_at(number, steps) for number in range(steps)]
    improved = sum(one + (count - 1) * (two - one) if count else step for count in updates)
    return (settings.candidates if settings.candidates > 1 else 0) * candidate + improved + final
