"""The reward of held-out prompts while training: fixed noises, paired with the base's."""

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from maskunet_core.training.base import load_for_training
from maskunet_core.training.seeds import seeded

from .drawing import Drawing
from .prompts import Prompts
from .scorer import Scorer


class RewardValidator:
    """Draws a picture of each held-out prompt as training draws them, with the averaged parameters.

    stale: validations since the last better one. Of the toy world a second reader, which no training sees, says how
    many pictures are right.
    """

    columns = ("reward", "change", "error", "right")

    def __init__(self, run: Any, held_out: Prompts, drawing: Drawing, scorer: Scorer):
        self.run, self.prompts = run, held_out.texts
        self.drawing, self.scorer = drawing, scorer
        self.stale = 0
        self._base: Tensor | None = None
        self._referee = None
        if run.config.is_toy and "toy" in run.config.reward.models:
            from .toy import ToyReferee

            self._referee = ToyReferee()

    def _pictures(self, model: Any, what: str) -> Tensor:
        shape = (len(self.prompts), *self.drawing.shape)
        noise = torch.randn(shape, generator=seeded(65, self.run.config.seed))
        self.drawing.read(self.prompts)
        shown = self.run.accelerator.is_main_process
        with tqdm(total=len(noise), desc=what, leave=False, mininterval=1, disable=not shown) as bar:
            latents = self.drawing.latents(model, self.prompts, noise, 0, bar.update)
        return self.drawing.pictures(latents)

    @staticmethod
    def better(found: dict[str, float], best: dict[str, float] | None) -> bool:
        """Whether the first is a better result of `measure`."""
        return found["change"] > (-math.inf if best is None else best["change"])

    def measure(self) -> dict[str, float]:
        """{"reward": mean, "change": mean difference to the base on the same noises, "error": its standard error}, and
        "right": the share of right pictures, of the toy world.

        Prompts for which one of the two rewards is not finite are left out; the three are NaN where none is left.
        """
        if self._base is None:
            self._base = self.scorer(self._pictures(self.run.base.patcher, "validate the base"), self.prompts)
        with self.run.method.sampling() as model:
            pictures = self._pictures(model, "validate")
        rewards = self.scorer(pictures, self.prompts)
        load_for_training(self.run.base)
        finite = rewards.isfinite() & self._base.isfinite()
        rewards, gain = rewards[finite], (rewards - self._base)[finite]
        error = (gain.std() / len(gain) ** 0.5).item() if len(gain) > 1 else 0.0
        found = {"reward": rewards.mean().item(), "change": gain.mean().item(), "error": error}
        if self._referee is not None:
            found["right"] = self._referee(pictures, self.prompts).mean().item()
        return found
