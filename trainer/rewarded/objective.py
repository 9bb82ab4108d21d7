"""Diffusion-NFT (Zheng et al., arXiv 2509.16117): a policy learns from its own pictures, good and bad ones.

Pictures are noised as in ordinary training. The error of a prediction that is better than the policy's own, by however
much the trained one differs from it, counts as far as the picture was good; that of one which is worse by as much
counts as far as it was bad. No gradient passes the sampler, the decoder or the reward.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskunet_core.training.base import load_for_training
from maskunet_core.training.batches import Batch
from maskunet_core.training.buckets import Order
from maskunet_core.training.seeds import seeded
from maskunet_core.training.texts import by_length

from .drawing import Drawing
from .prompts import Prompts
from .scorer import Scorer
from .validate import RewardValidator


@dataclass
class JudgedBatch(Batch):
    """`Batch` of pictures that the policy drew itself.

    goodness: [B] in [0, 1], 0.5 for a picture as good as others of its prompt. of_policy, of_base: [B, C, ..., h, w],
    what these predict as the clean latents, the second where `reward.pull` asks for it; empty until `prepared`.
    """

    goodness: Tensor
    of_policy: Tensor
    of_base: Tensor


@dataclass
class Round:
    """Pictures `[N, C, ..., h, w]` that the policy drew, their prompts, rewards `[N]`, and goodness `[N]`.

    spread: of the rewards, which goodness was scaled by.
    """

    number: int
    latents: Tensor
    prompts: list[str]
    rewards: Tensor
    goodness: Tensor
    spread: float


class RewardObjective:
    """run: a Run; training: what it may draw pictures of."""

    on_disk = False

    def __init__(self, run: Any, training: Prompts):
        self.run, self.prompts = run, training
        self.settings = run.config.reward
        loop = run.config.loop
        self.steps_per_round = self.settings.pictures * self.settings.passes // loop.batch
        self.drawing = Drawing(run.base, run.config, max(1, loop.batch // loop.accumulate))
        self.scorer = Scorer(self.settings.models, run.device)
        self.policy = [p.detach().clone() for p in run.module.parameters()]
        self.spread: float | None = None
        self._order = Order([torch.arange(len(training))], self.settings.prompts_per_round, run.config.seed)
        self._round: Round | None = None
        self._timesteps = self._of_the_sampler()

    def _of_the_sampler(self) -> Tensor:
        """Timesteps at which the model is asked when pictures are drawn."""
        import comfy.samplers

        sampling = self.run.base.model.model_sampling
        sigmas = comfy.samplers.calculate_sigmas(sampling, self.settings.scheduler, self.settings.steps)
        # The last is 0, where nothing is asked.
        return self.run.base.timesteps_at(sigmas[:-1])

    # Rounds -----------------------------------------------------------------------------------------------------

    def _drawn(self, number: int) -> Round:
        """The pictures of a round, by the policy, each process its share of them."""
        settings, run = self.settings, self.run
        rows = self._order.rows(number)
        prompts = [self.prompts.texts[row] for row in rows.tolist() for _ in range(settings.pictures_per_prompt)]
        noise = torch.randn(len(prompts), *self.drawing.shape, generator=seeded(62, run.config.seed, number))
        accelerator = run.accelerator
        size = len(prompts) // accelerator.num_processes
        mine = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
        self.drawing.read(prompts)
        with run.holding(self.policy), run.method.sampling() as model:
            latents = self.drawing.latents(model, prompts[mine], noise[mine], number)
        rewards = self.scorer(self.drawing.pictures(latents), prompts[mine])
        load_for_training(run.base)
        if accelerator.num_processes > 1:
            latents, rewards = (accelerator.gather(found.to(run.device)).cpu() for found in (latents, rewards))
        goodness, spread = self._compared(rewards)
        return Round(number, latents, prompts, rewards, goodness, spread)

    def _compared(self, rewards: Tensor) -> tuple[Tensor, float]:
        """How good pictures are beside others of their prompt, `[N]` in [0, 1], and the spread that says how far."""
        of_prompts = rewards.view(-1, self.settings.pictures_per_prompt)
        finite = of_prompts.isfinite()
        # A picture without a score is no example of anything.
        means = of_prompts.nan_to_num(0, 0, 0).sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp_min(1)
        beyond = torch.where(finite, of_prompts - means, 0.0)
        now = beyond.square().mean().sqrt().item()
        spread = now if self.spread is None else 0.9 * self.spread + 0.1 * now
        # Not centred again after the cut: where few are right, bad pictures weigh more than good ones. What a policy is
        # pushed away from is then also the mean of its own pictures, and centred it gained a quarter as much.
        return (0.5 + 0.5 * (beyond / max(spread, 1e-6)).clamp(-1, 1)).flatten(), spread

    # What the loop asks for -------------------------------------------------------------------------------------

    def draw(self, step: int) -> JudgedBatch:
        number, turn = divmod(step, self.steps_per_round)
        if self._round is None or self._round.number != number:
            self._round = self._drawn(number)
        found, batch = self._round, self.run.config.loop.batch
        stream = seeded(63, self.run.config.seed, number)
        order = torch.cat([torch.randperm(len(found.latents), generator=stream) for _ in range(self.settings.passes)])
        rows = order[turn * batch : (turn + 1) * batch]
        clean, stream = found.latents[rows], seeded(64, self.run.config.seed, step)
        conditions = self.drawing.conditions([found.prompts[row] for row in rows.tolist()])
        if self.settings.cfg != 1:
            unconditional = self.drawing.conditions([""] * batch)
            conditions |= {_NEGATIVE + key: value for key, value in unconditional.items()}
        timesteps = self._timesteps[torch.randint(len(self._timesteps), (batch,), generator=stream)]
        noise = torch.randn(clean.shape, generator=stream)
        empty = torch.empty(batch, 0)
        return JudgedBatch(
            clean, conditions, timesteps, noise, torch.ones(batch), found.goodness[rows], empty, empty.clone()
        )

    def draw_part(self, step: int, index: int, parts: int) -> JudgedBatch:
        return self.draw(step).part(index, parts)

    def known(self, step: int) -> bool:
        """Whether a step's batch can be drawn before the step in front of it has been made."""
        return step % self.steps_per_round != 0

    def prepared(self, part: JudgedBatch) -> JudgedBatch:
        with torch.no_grad(), self.run.accelerator.autocast():
            with self.run.holding(self.policy), self.run.method.acting(training=False):
                part.of_policy = self._predicted(part).float()
            if self.settings.pull:
                part.of_base = self._predicted(part).float()
        return part

    def _predicted(self, part: JudgedBatch) -> Tensor:
        """The clean latents by what the model is at the moment, guided where pictures are drawn guided."""
        base = self.run.base
        sigma = base.sigmas(part.clean, part.timesteps)
        noisy = base.noised(part.clean, sigma, part.noise)
        found = torch.empty_like(noisy)
        for rows, conditions in by_length(part.conditions):
            of_prompts = {key: value for key, value in conditions.items() if not key.startswith(_NEGATIVE)}
            predicted = base.denoised(noisy[rows], sigma[rows], of_prompts)
            if self.settings.cfg != 1:
                of_none = {key: conditions[_NEGATIVE + key] for key in of_prompts}
                without = base.denoised(noisy[rows], sigma[rows], of_none)
                predicted = without + self.settings.cfg * (predicted - without)
            found[rows] = predicted
        return found

    def losses(self, part: JudgedBatch) -> Tensor:
        """`[B]`, while the method acts."""
        beta, base = self.settings.beta, self.run.base
        unit = base.error_unit(base.sigmas(part.clean, part.timesteps), part.clean)
        predicted = self._predicted(part).float()
        step = beta * (predicted - part.of_policy)
        better, worse = (_relative((part.of_policy + turn * step - part.clean) / unit) for turn in (1, -1))
        found = part.goodness * better + (1 - part.goodness) * worse
        if self.settings.pull:
            found = found + self.settings.pull * ((predicted - part.of_base) / unit).square().flatten(1).mean(1)
        return found

    def stepped(self) -> None:
        """At the end of a round the policy follows."""
        if self._round is None or self.run.step % self.steps_per_round:
            return
        self.spread = self._round.spread
        torch._foreach_lerp_(self.policy, [p.detach() for p in self.run.module.parameters()], self.settings.follow)

    def told(self) -> dict[str, float]:
        """The mean reward of the round's pictures; NaN before the first."""
        return {"reward": self._round.rewards.nanmean().item() if self._round else math.nan}

    def validator(self, held_out: Prompts) -> RewardValidator:
        return RewardValidator(self.run, held_out, self.drawing, self.scorer)

    def state(self) -> dict[str, Any]:
        return {"policy": self.policy, "spread": self.spread}

    def load(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.policy, state["policy"])
        self.spread = state["spread"]


_NEGATIVE = "negative "
"""In front of the names of conditions of the empty prompt, in the batches of a guided policy."""


def _relative(error: Tensor) -> Tensor:
    """`[B]`: squared errors `[B, ...]` over their mean size: what has large errors everywhere counts for no more."""
    size = error.detach().abs().flatten(1).mean(1).clamp_min(1e-5)
    return error.square().flatten(1).mean(1) / size
