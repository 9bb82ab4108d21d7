"""The held-out loss while training: fixed pictures, noises and timesteps, paired with the base's."""

import math
from typing import Any

import torch
from torch import Tensor

from .seeds import seeded
from .texts import by_length

DRAWS = 4
"""Noises and timesteps per held-out picture."""


def stratified_timesteps(count: int, timesteps: int, stream: torch.Generator) -> Tensor:
    """`[count]` integers, each from a stratum of its own."""
    return ((torch.arange(count) + torch.rand(count, generator=stream)) * timesteps / count).long()


def told_gain(best: dict[str, float] | None) -> str:
    """Whether a run helped, in a sentence. best: what its validator measured, with the `step`, or None."""
    if best is None:
        return "No picture was held out, so that it was not measured whether it helped."
    if "reward" in best:
        what, now, further, gain = "the reward of held-out prompts", best["reward"], "higher", best["change"]
    else:
        what, now, further, gain = "the held-out loss", best["loss"], "lower", -best["change"]
    before, change, error = now - best["change"], best["change"], best["error"]
    told = f"{what} was {before:.4f} before"
    if best["step"] == 0:
        return f"It did not help: {told} and at no step {further}. The file is that of step 0, which changes nothing."
    # Of a loss the share is of interest; a reward may have any zero.
    size = f"{change:+.4f} ± {error:.4f}" if "reward" in best else f"{change / before:+.1%} ± {error / before:.1%}"
    sentence = f"{told} and is {now:.4f} at the best step, {best['step']} ({size})"
    if gain < 2 * error:
        return f"It may have helped, but by less than can be told from chance: {sentence}."
    return f"It helped: {sentence}."


class Validator:
    """Measures a run's method on `held_out`. stale: validations since the last better one."""

    columns = ("loss", "change", "error")

    def __init__(self, run: Any, held_out: Any):
        self.run, self.held_out = run, held_out
        self.stale = 0
        count = DRAWS * len(held_out)
        stream = seeded(33, run.config.seed)
        order = torch.randperm(count, generator=stream)
        self._timesteps = stratified_timesteps(count, run.base.timesteps, stream)[order]
        self._base: Tensor | None = None

    @torch.no_grad()
    def _losses(self, acting: bool) -> Tensor:
        losses = []
        turns = [(bucket, turn) for bucket in self.held_out.buckets for turn in range(DRAWS)]
        done = 0
        for bucket, turn in self.run.shown(turns, "validate"):
            for rows in bucket.split(self._batch):
                timesteps = self._timesteps[done : done + len(rows)]
                losses.append(self._loss(rows, timesteps, seeded(34, self.run.config.seed, turn, done), acting))
                done += len(rows)
        return torch.cat(losses).cpu()

    def _loss(self, rows: Tensor, timesteps: Tensor, stream: torch.Generator, acting: bool) -> Tensor:
        run = self.run
        clean = self.held_out.latents(rows, None)
        noise = torch.randn(clean.shape, generator=stream)
        with run.method.acting(training=False) if acting else run.method.idle():
            losses = torch.empty(len(clean), device=run.device)
            for part, conditions in by_length(self._conditions(rows, stream)):
                conditions = {key: value.to(run.device) for key, value in conditions.items()}
                drawn = (value[part].to(run.device) for value in (timesteps, noise))
                with run.accelerator.autocast():
                    losses[part] = run.base.diffusion_loss(clean[part].to(run.device), conditions, *drawn).float()
            return losses

    def _conditions(self, rows: Tensor, stream: torch.Generator) -> dict[str, Tensor]:
        return self.held_out.conditions(rows, torch.zeros(len(rows), dtype=torch.bool))

    @property
    def _batch(self) -> int:
        return max(1, self.run.config.loop.batch // self.run.config.loop.accumulate)

    @staticmethod
    def better(found: dict[str, float], best: dict[str, float] | None) -> bool:
        """Whether the first is a better result of `measure`; NaN, where no held-out loss is finite, is never."""
        return found["change"] < (math.inf if best is None else best["change"])

    def measure(self) -> dict[str, float]:
        """{"loss", "change": mean difference to the base on the same pairs, "error": its standard error}.

        Pairs in which one of the two losses is not finite are left out, and a warning says how many; all three are
        NaN where none is left.
        """
        if self._base is None:
            self._base = self._losses(acting=False)
        losses = self._losses(acting=True)
        finite = losses.isfinite() & self._base.isfinite()
        if not finite.all():
            self.run.warn(
                f"Validation at step {self.run.step}: {int((~finite).sum())} of {len(finite)} held-out losses are not "
                "finite and left out."
            )
        losses, difference = losses[finite], (losses - self._base)[finite]
        error = (difference.std() / len(difference) ** 0.5).item() if len(difference) > 1 else 0.0
        return {"loss": losses.mean().item(), "change": difference.mean().item(), "error": error}
