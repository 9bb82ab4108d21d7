"""What the search is measured against: steering by particles, and gradients through the starting noise."""

import itertools

import torch
from torch import Tensor

from maskunet_core.seam.gradients import LeanGraph
from maskunet_core.seam.sampling import step_of
from maskunet_core.toy.captions import Caption
from maskunet_core.training.seeds import seeded

from ..toy.transformer import norms_on_copies
from .stage import Stage

KEY = "reward_compare"


class Steering:
    """Feynman-Kac steering (arXiv 2501.06848), potential "max": particles are resampled by exp(scale * reward).

    Each image has `particles` neighbouring rows in the batch. At every `every`-th step the rewards of the estimates
    choose who goes on; only a sampler that adds noise makes copies differ again.
    """

    def __init__(self, stage: Stage, captions: list[Caption], particles: int, scale: float, every: int, seed: int):
        from comfy.patcher_extension import WrappersMP

        self.particles, self.scale, self.every = particles, scale, every
        self.judge = stage.judge([caption for caption in captions for _ in range(particles)])
        self.stream = seeded(74, seed)
        self.best: Tensor | None = None
        self.model = stage.base.patcher.clone()
        self.model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self._predict_noise)

    def _predict_noise(self, executor, x: Tensor, timestep: Tensor, model_options: dict, seed: int | None) -> Tensor:
        estimate = executor(x, timestep, model_options, seed)
        step, steps = step_of(float(timestep.max()), model_options)
        if step == 0 or step % self.every or step == steps - 1:
            return estimate
        scores = self.judge.scores(estimate)
        best = scores if self.best is None else torch.maximum(self.best, scores)
        weights = (self.scale * best).unflatten(0, (-1, self.particles)).softmax(1)
        chosen = torch.multinomial(weights, self.particles, replacement=True, generator=self.stream)
        rows = (chosen + self.particles * torch.arange(len(chosen))[:, None]).flatten()
        self.best = best[rows]
        # In place: the sampler goes on from the chosen particles.
        x.copy_(x[rows])
        return estimate[rows]


def steered(
    stage: Stage, captions: list[Caption], particles: int, seed: int, scale: float = 2.0, every: int = 3
) -> Tensor:
    """Latents of the best particle of each prompt, by its final reward."""
    steering = Steering(stage, captions, particles, scale, every, seed)
    repeated = [caption for caption in captions for _ in range(particles)]
    noise = torch.stack([stage.noise(captions, seed, number) for number in range(particles)], 1).flatten(0, 1)
    latents = stage.sample(steering.model, repeated, noise, sampler="euler_ancestral", seed=seed)
    best = stage.rewards(latents, repeated).unflatten(0, (-1, particles)).argmax(1)
    return latents.unflatten(0, (-1, particles))[torch.arange(len(captions)), best]


def _chain(stage: Stage, noise: Tensor, context: Tensor, steps: int) -> Tensor:
    """The host's Euler sampler with guidance, differentiable in the starting noise. Latents inside the model."""
    import comfy.samplers

    sampling = stage.base.patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, stage.sampling.scheduler, steps)
    x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), max_denoise=True)
    both = torch.cat([context, stage.empty[0][0].expand(len(noise), -1, -1)])
    for now, after in itertools.pairwise(sigmas):
        positive, negative = stage.base.model.apply_model(
            torch.cat([x, x]), now.expand(2 * len(x)), c_crossattn=both
        ).chunk(2)
        clean = negative + stage.sampling.cfg * (positive - negative)
        x = x + (x - clean) / now * (after - now)
    return x


def optimise_noise(
    stage: Stage, captions: list[Caption], seed: int, iterations: int, lr: float, steps: int
) -> tuple[Tensor, list[Tensor]]:
    """The starting noise whose short chain had the best reward, `[N, 4, 8, 8]`, and the rewards `[N]` on the way."""
    judge, context = stage.judge(captions), stage.conditioning(captions)[0][0]
    noise = stage.noise(captions, seed).requires_grad_()
    optimiser = torch.optim.Adam([noise], lr=lr)
    best, seen = noise.detach().clone(), []
    hooks = norms_on_copies(stage.base.unet)
    for _ in range(iterations):
        with torch.enable_grad(), LeanGraph():
            clean = _chain(stage, noise, context, steps)
        scores, gradient = judge.scores_and_gradient(clean.detach())
        better = scores >= torch.stack([*seen, scores]).max(0).values
        best = torch.where(better[:, None, None, None], noise.detach(), best)
        seen.append(scores)
        size = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
        noise.grad = torch.autograd.grad(clean, noise, -gradient / size)[0]
        optimiser.step()
        with torch.no_grad():
            norms = noise.flatten(1).norm(dim=1)[:, None, None, None]
            noise.mul_((noise[0].numel() - 1) ** 0.5 / norms)
    for hook in hooks:
        hook.remove()
    return best, seen


def optimised_noise(
    stage: Stage, captions: list[Caption], seed: int, iterations: int = 14, lr: float = 0.03, steps: int = 5
) -> Tensor:
    """ReNO's idea (arXiv 2406.04312) for a sampler of many steps: the starting noise follows the reward's gradient.

    Gradients go through a chain of a few steps; the noise whose short chain had the best reward starts the full one.
    The pull towards likely noises is ReNO's: the norm stays at its mode.
    """
    best, _ = optimise_noise(stage, captions, seed, iterations, lr, steps)
    return stage.sample(stage.base.patcher, captions, best, seed=seed)


def drawn_plainly(
    stage: Stage, captions: list[Caption], seed: int, number: int = 0, steps: int | None = None
) -> Tensor:
    return stage.sample(stage.base.patcher, captions, stage.noise(captions, seed, number), steps=steps, seed=seed)
