"""All suites, and what is asked of one."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from maskunet_core.judges.files import BLIP_VQA, CLIP_L, DETECTOR, INCEPTION

from ..choices import TOY_RESOLUTION
from ..config import Base
from ..config_file import base_named
from ..host import drawing_names
from ..pictures import base_digest
from ..reward_compare.stage import Sampling
from . import coco, geneval, t2i_compbench, toy
from .files import BadSuite
from .folder import Unit, units_of
from .suites import Prompt, Suite

SMOKE = 4
"""Prompts of each task that are drawn to see that it works."""
OF_THE_PAPER = Sampling(15, 7.5, "dpmpp_2m", "sgm_uniform")
"""Diffusers' DPM-Solver with 15 steps, by which the paper draws for T2I-CompBench and GenEval. The host's `normal` ends
at another noise level."""
OF_THE_PAPERS_COCO = Sampling(50, 7.5, "ddim", "ddim_uniform")
"""Diffusers' DDIM with 50 steps: these are its timesteps."""


def _coco(year: int, count: int) -> Suite:
    prompts, judges, others = coco.of_year(year, count)
    files = (coco.captions_of(year),), (INCEPTION,)
    return Suite(f"coco{year}", prompts, judges, 1, OF_THE_PAPERS_COCO, 512, 4, *files, coco.OPTIONAL, others=others)


SUITES = {
    suite.name: suite
    for suite in (
        Suite("toy", toy.prompts, toy.judges, 4, Sampling(), TOY_RESOLUTION, 25),
        Suite(
            "geneval",
            geneval.prompts,
            geneval.judges,
            4,
            OF_THE_PAPER,
            512,
            4,
            (geneval.PROMPTS,),
            (DETECTOR, CLIP_L),
        ),
        Suite(
            "t2i-compbench",
            t2i_compbench.prompts,
            t2i_compbench.judges,
            t2i_compbench.IMAGES,
            OF_THE_PAPER,
            512,
            4,
            tuple(t2i_compbench.LISTS.values()),
            (BLIP_VQA,),
            notes=(t2i_compbench.OTHER_CATEGORIES,),
        ),
        _coco(2014, 30_000),
        _coco(2017, 5_000),
    )
}


@dataclass(frozen=True)
class Plan:
    """base: see `base_named`. images: of a prompt; batch, side: see Suite; steps, cfg, sampler, scheduler: see
    Sampling. 0 and "" for the suite's, None for its cfg. Raises BadSuite where the host has no such
    sampler or scheduler.

    smoke: the first prompts of each task alone.
    """

    suite: Suite
    data: Path | None
    base: str
    seed: int = 0
    images: int = 0
    batch: int = 0
    smoke: bool = False
    side: int = 0
    cfg: float | None = None
    steps: int = 0
    sampler: str = ""
    scheduler: str = ""

    def __post_init__(self) -> None:
        for what, names in drawing_names().items():
            name = getattr(self, what)
            if name and name not in names:
                raise BadSuite(f"ComfyUI has no {what} '{name}': choose among {', '.join(names)}.")

    @property
    def sampling(self) -> Sampling:
        """The suite's, but for what is said."""
        said = {name: getattr(self, name) or None for name in ("steps", "sampler", "scheduler")} | {"cfg": self.cfg}
        return replace(self.suite.sampling, **{name: value for name, value in said.items() if value is not None})

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Raises BadSuite where their list is missing."""
        prompts = self.suite.prompts(self.data)
        if not self.smoke:
            return prompts
        tasks = dict.fromkeys(prompt.task for prompt in prompts)
        return [one for task in tasks for one in [prompt for prompt in prompts if prompt.task == task][:SMOKE]]

    @cached_property
    def units(self) -> list[Unit]:
        return units_of(len(self.prompts), self.images or self.suite.images, self.batch or self.suite.batch)

    @cached_property
    def base_settings(self) -> Base:
        """The files that the base is of."""
        return base_named(self.base)

    @property
    def dtype(self) -> torch.dtype:
        """Of the U-Net: half precision on cards, as everybody draws."""
        import comfy.model_management as management

        half = management.should_use_fp16(management.get_torch_device())
        return torch.float16 if half else torch.float32

    def settings(self, drawn: bool = True) -> dict[str, Any]:
        """What all methods of a run share. The number of images is not among it: more may be drawn later.

        drawn: here, not by others, of whose pictures less is known.
        """
        suite = self.suite
        found = {"suite": suite.name, "version": suite.version, "lists": suite.versions(self.data), "seed": self.seed}
        found["batch"] = self.batch or suite.batch
        if not drawn:
            return found | {"base": "", "sampling": None}
        return found | {
            "base": Path(self.base).name,
            "base digest": base_digest(self.base_settings),
            "dtype": str(self.dtype).removeprefix("torch."),
            "sampling": asdict(self.sampling),
            "side": self.side or suite.side,
        }
