"""The methods, their settings, and the jobs that they come to.

Methods cost about as much as 4 or 16 plain images, or less, but for the schedules of the paper and its authors. What
each costs is measured, and stands in the table. Settings were chosen on the prompts of TUNING, the table is made on
those of TABLE.
"""

import copy
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from maskunet_core.attention.guidance import AttentionGuidance, GuidanceSettings
from maskunet_core.attention.words import read, sets_in
from maskunet_core.files import checkpoint
from maskunet_core.masks.sources import GeneratorMasks
from maskunet_core.seam.attach import attach
from maskunet_core.search.run import search_images
from maskunet_core.search.settings import PRESETS, SearchSettings
from maskunet_core.toy.captions import Caption
from maskunet_core.toy.model import WEIGHTS
from maskunet_core.training.base import FLOW_SAMPLER

from ..toy.bodies import TRANSFORMER_CFG, TRANSFORMER_STEPS
from .rivals import drawn_plainly, optimised_noise, steered
from .stage import Sampling, Stage

Draw = Callable[[Stage, list[Caption], int], Tensor]
"""Latents `[N, ...]` of a batch of prompts, from a stage and a seed."""


def searched(settings: SearchSettings) -> Draw:
    """The reward sampler with these settings."""

    def draw(stage: Stage, captions: list[Caption], seed: int) -> Tensor:
        found = search_images(
            model=stage.base.patcher,
            sample=lambda model, noise, number: stage.sample(model, captions, noise, seed=seed),
            peek=lambda noise, number, steps: stage.estimate(captions, noise, steps, seed=seed),
            noise=lambda number: stage.noise(captions, seed, number),
            settings=settings,
            judge=stage.judge(captions),
            score=lambda latents: stage.rewards(latents, captions),
            steps=stage.sampling.steps,
            seed=seed,
        )
        return found.latents

    return draw


def with_base(stage: Stage, patcher: Any) -> Stage:
    """The stage that draws with this MODEL."""
    other = copy.copy(stage)
    other.base = replace(stage.base, patcher=patcher)
    return other


def guided(method: str, draw: Draw) -> Draw:
    """Attention guidance by a method of `maskunet_core.attention.guidance`, under another method."""
    settings = GuidanceSettings(method, step=5.0, share=0.5)

    def drawn(stage: Stage, captions: list[Caption], seed: int) -> Tensor:
        prompts = [read(stage.base.clip, str(caption)) for caption in captions]
        words = [replace(prompt, sets=sets_in(prompt.words)) for prompt in prompts]
        # The stage's sampler looks at each step once.
        guidance = AttentionGuidance(words, settings, lambda *_: True)
        return draw(with_base(stage, guidance.guiding(stage.base.patcher)), captions, seed)

    return drawn


def generated(name: str, draw: Draw) -> Draw:
    """A generator that ships, under another method."""

    @functools.cache
    def masks() -> GeneratorMasks:
        return GeneratorMasks(checkpoint.load(WEIGHTS.with_name("generators") / name).generator)

    def drawn(stage: Stage, captions: list[Caption], seed: int) -> Tensor:
        return draw(with_base(stage, attach(stage.base.patcher, masks(), 1.0, 0.0, 1.0)), captions, seed)

    return drawn


def with_sampling(draw: Draw, **changes: Any) -> Draw:
    """A method with changes of the stage's `Sampling`."""

    def drawn(stage: Stage, captions: list[Caption], seed: int) -> Tensor:
        other = copy.copy(stage)
        other.sampling = replace(stage.sampling, **changes)
        return draw(other, captions, seed)

    return drawn


def unguided(draw: Draw) -> Draw:
    """A method at CFG 1: a step looks at the prompt alone."""
    return with_sampling(draw, cfg=1.0)


def best_of(count: int) -> Draw:
    return searched(SearchSettings(masks=False, candidates=count))


_QUALITY = PRESETS["quality"]
_EARLY = _QUALITY.candidate_percent
_MASKS_FAST = replace(_QUALITY, candidates=5, iterations=1, start_percent=0.6, end_percent=0.73, lr=3e-2, views=0)
_FOLLOWS = "toy_follows.safetensors"
_ONE_NOISE = replace(_QUALITY, candidates=1)
_LATENTS = replace(_QUALITY, masks=False, latent_lr=0.03, iterations=3, views=0)

STUDENT_METHODS: dict[str, Draw] = {
    "4 steps": drawn_plainly,
    "4 steps, few_step": searched(PRESETS["few_step"]),
    "4 steps, best of 4": best_of(4),
    "4 steps, best of 23": best_of(23),
}
"""Of a few-step student of the toy model: see `student`."""
FEW_STEPS_METHODS: dict[str, Draw] = {
    "8 steps": with_sampling(drawn_plainly, steps=8),
    "8 steps, few_step": with_sampling(searched(PRESETS["few_step"]), steps=8),
    "8 steps, best of 18": with_sampling(best_of(18), steps=8),
}
"""Of the transformer itself, which has no student: a flow's pictures bear fewer steps."""
METHODS: dict[str, Draw] = {
    "base": drawn_plainly,
    "best of 4": best_of(4),
    "best of 16": best_of(16),
    "fast": searched(PRESETS["fast"]),
    "quality": searched(_QUALITY),
    "5 candidates, and masks": searched(_MASKS_FAST),
    "28 candidates, judged early": searched(SearchSettings(iterations=0, candidates=28, candidate_percent=_EARLY)),
    "quality, noisy latents for masks": searched(_LATENTS),
    "FK steering, 4 particles": lambda stage, captions, seed: steered(stage, captions, 4, seed),
    "FK steering, 16 particles": lambda stage, captions, seed: steered(stage, captions, 16, seed),
    "masks alone": searched(replace(_QUALITY, candidates=1, iterations=14)),
    "noisy latents alone": searched(replace(_LATENTS, candidates=1, iterations=7)),
    "quality, and noisy latents": searched(replace(_LATENTS, masks=True, iterations=2)),
    "starting noise": optimised_noise,
    "base, 60 steps": lambda stage, captions, seed: drawn_plainly(stage, captions, seed, steps=60),
    "best of 2": best_of(2),
    "best of 8": best_of(8),
    "reference": searched(PRESETS["reference"]),
    "paper": searched(PRESETS["paper"]),
    **STUDENT_METHODS,
    **FEW_STEPS_METHODS,
    "Attend-and-Excite": guided("attend-and-excite", drawn_plainly),
    "SynGen": guided("syngen", drawn_plainly),
    "Attend-and-Excite, best of 3": guided("attend-and-excite", best_of(3)),
    "SynGen, best of 3": guided("syngen", best_of(3)),
    "SynGen, and fast": guided("syngen", searched(PRESETS["fast"])),
    "Attend-and-Excite, and quality": guided("attend-and-excite", searched(_QUALITY)),
    "SynGen, and quality": guided("syngen", searched(_QUALITY)),
    "CFG 1": unguided(drawn_plainly),
    "CFG 1, a generator": unguided(generated(_FOLLOWS, drawn_plainly)),
    "CFG 1, best of 2": unguided(best_of(2)),
    "CFG 1, fast": unguided(searched(PRESETS["fast"])),
    "CFG 1, a generator, and fast": unguided(generated(_FOLLOWS, searched(PRESETS["fast"]))),
    "SynGen, and masks": guided("syngen", searched(_ONE_NOISE)),
    "SynGen, and masks by attention, too": guided("syngen", searched(replace(_ONE_NOISE, attention_weight=1.0))),
    "CFG 1, Attend-and-Excite": unguided(guided("attend-and-excite", drawn_plainly)),
    "CFG 1, SynGen": unguided(guided("syngen", drawn_plainly)),
    "CFG 1, Attend-and-Excite, and a generator": unguided(
        generated(_FOLLOWS, guided("attend-and-excite", drawn_plainly))
    ),
    "CFG 1, SynGen, and a generator": unguided(generated(_FOLLOWS, guided("syngen", drawn_plainly))),
    "a generator": generated(_FOLLOWS, drawn_plainly),
    "Attend-and-Excite, and a generator": generated(_FOLLOWS, guided("attend-and-excite", drawn_plainly)),
    "SynGen, and a generator": generated(_FOLLOWS, guided("syngen", drawn_plainly)),
}
"""In the order of their jobs: what the others are held against comes first."""
BODIES = {
    "unet": Sampling(),
    "transformer": Sampling(TRANSFORMER_STEPS, TRANSFORMER_CFG, *FLOW_SAMPLER),
}
"""How each body of the toy model draws, at an equal number of operations per picture."""
ON_TRANSFORMER = (
    "base",
    "best of 4",
    "best of 16",
    "fast",
    "quality",
    "28 candidates, judged early",
    "FK steering, 4 particles",
    "FK steering, 16 particles",
    "masks alone",
    "starting noise",
    *FEW_STEPS_METHODS,
)
"""What is measured there, with the settings that were chosen on the U-Net."""
SLOW = ("paper", "reference")
"""Far above the budget of the others: measured on the first prompts alone."""
PAIRS = (
    ("fast", "best of 4"),
    ("fast", "5 candidates, and masks"),
    ("fast", "FK steering, 4 particles"),
    ("fast", "paper"),
    ("quality", "best of 16"),
    ("quality", "28 candidates, judged early"),
    ("quality", "FK steering, 16 particles"),
    ("quality", "starting noise"),
    ("quality", "noisy latents alone"),
    ("quality", "quality, noisy latents for masks"),
    ("quality", "paper"),
    ("4 steps, few_step", "4 steps, best of 23"),
    ("8 steps, few_step", "8 steps, best of 18"),
    ("8 steps, few_step", "fast"),
    ("Attend-and-Excite", "base"),
    ("SynGen", "base"),
    ("Attend-and-Excite, best of 3", "best of 4"),
    ("SynGen, best of 3", "best of 4"),
    ("SynGen, and fast", "fast"),
    ("SynGen, and quality", "quality"),
    ("Attend-and-Excite, and quality", "quality"),
    ("SynGen, and masks", "SynGen"),
    ("SynGen, and masks by attention, too", "SynGen, and masks"),
    ("Attend-and-Excite, and a generator", "Attend-and-Excite"),
    ("Attend-and-Excite, and a generator", "a generator"),
    ("SynGen, and a generator", "SynGen"),
    ("SynGen, and a generator", "a generator"),
    ("a generator", "base"),
    ("CFG 1, Attend-and-Excite", "CFG 1"),
    ("CFG 1, SynGen", "CFG 1"),
    ("CFG 1, Attend-and-Excite, and a generator", "CFG 1, a generator"),
    ("CFG 1, SynGen, and a generator", "CFG 1, a generator"),
    ("CFG 1, a generator", "CFG 1"),
    ("CFG 1, a generator, and fast", "CFG 1, fast"),
    ("CFG 1, a generator, and fast", "best of 2"),
)
"""Compared prompt by prompt."""
SHOWN = ("base", "paper", "best of 4", "fast", "best of 16", "FK steering, 16 particles", "quality")
"""Whose pictures are shown side by side."""


@dataclass(frozen=True)
class Scale:
    """prompts: of two objects and of relations, in turn; slow_prompts: for SLOW. batch: prompts drawn at once.

    draws: of the base, by which a prompt's difficulty is told. real_pictures: that drawn ones are held against.
    body: of BODIES. student_pictures, student_steps: of the student's training.
    """

    prompts: int = 200
    slow_prompts: int = 50
    seeds: int = 3
    batch: int = 25
    draws: int = 16
    real_pictures: int = 1000
    body: str = "unet"
    student_pictures: int = 3000
    student_steps: int = 2500

    @classmethod
    def of(cls, body: str, prompts: int | None = None, seeds: int | None = None) -> "Scale":
        """prompts, seeds: another number of them."""
        whole = cls(body=body) if body == "unet" else cls(body=body, prompts=60, batch=30)
        return replace(whole, prompts=prompts or whole.prompts, seeds=seeds or whole.seeds)

    @classmethod
    def quick(cls, body: str = "unet") -> "Scale":
        few = {"prompts": 4, "slow_prompts": 2, "seeds": 1, "batch": 4, "draws": 4, "real_pictures": 40}
        return cls(**few, body=body, student_pictures=16, student_steps=2)

    @property
    def methods(self) -> tuple[str, ...]:
        if self.body == "transformer":
            return ON_TRANSFORMER
        return tuple(name for name in METHODS if name not in FEW_STEPS_METHODS)

    def prompts_of(self, method: str) -> int:
        return self.slow_prompts if method in SLOW else self.prompts


@dataclass(frozen=True)
class Job:
    """One method with one seed. Two are none: DIFFICULTY draws how often the base succeeds, STUDENT trains one."""

    name: str
    method: str
    seed: int = 0
    needs: tuple[str, ...] = ()


DIFFICULTY, STUDENT = "difficulty", "student"


def make_plan(scale: Scale, only: Collection[str] = ()) -> list[Job]:
    """All jobs, or those of some methods, seed by seed, so that what is done at any time makes a whole table.

    How hard prompts are, which costs as much as many methods, comes last where some are asked for.
    """
    jobs, hard = [], [Job(DIFFICULTY, DIFFICULTY)]
    for seed in range(scale.seeds):
        for method in (name for name in scale.methods if not only or name in only):
            needs = (STUDENT,) if method in STUDENT_METHODS else ()
            jobs.append(Job(f"{method}/seed-{seed}", method, seed, needs))
        if seed == 0:
            jobs += [] if only else hard
            jobs += [Job(STUDENT, STUDENT)] if any(job.needs for job in jobs) else []
    return jobs + (hard if only else [])
