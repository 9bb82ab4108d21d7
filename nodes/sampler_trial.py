"""What a sampler of the host does with a batch and with its latent, found out by running it without the network."""

import logging
from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

_FACTOR = 1.5
_STEPS = 6

Estimate = Callable[[Tensor], Tensor]
"""What stands for the network: the clean latent as a linear function of the noisy one."""


def nothing(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def no_noise(x: Tensor) -> Tensor:
    return x.clone()


def mixed(x: Tensor) -> Tensor:
    """Each value of the estimate depends on all of the same image's latent, as a network's does."""
    return (x + x.mean(tuple(range(1, x.ndim)), keepdim=True)) / 2


class _Patched:
    """A MODEL's network with the object patches of its patcher, which need not be loaded."""

    def __init__(self, model: Any):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return self._model.get_model_object(name)


class _Guider(comfy.samplers.CFGGuider):
    """In the place of the host's guider. changed: the latent of this noise level, counted from 0, is multiplied in
    place when it is first seen. levels: that were asked for; last: the latent when it was last seen."""

    def __init__(self, model: Any, estimate: Estimate, changed: int | None):
        super().__init__(model)
        self.inner_model, self.levels, self.last = _Patched(model), [], torch.zeros(())
        self._estimate, self._changed = estimate, changed

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict, seed: int | None) -> Tensor:
        level, self.last = float(sigma.max()), x.double()
        if level not in self.levels:
            if self._changed == len(self.levels):
                x.mul_(_FACTOR)
            self.levels.append(level)
        clean = self._estimate(x)
        # Samplers of CFG++ learn of the unguided estimate by these functions.
        args = {"denoised": clean, "cond_denoised": clean, "uncond_denoised": clean, "input": x, "sigma": sigma}
        args |= {"cond": [], "uncond": [], "cond_scale": 1.0, "model": self.inner_model, "model_options": model_options}
        for function in model_options.get("sampler_post_cfg_function", []):
            clean = function(args | {"denoised": clean})
        return clean


class SamplerTrial:
    """Nothing is loaded and no conditioning is looked at: a trial takes milliseconds on the CPU.

    model: the MODEL, for its noise levels. sampling: sampler_name, scheduler, steps and denoise, as KSampler has them.
    latents: `[N, C, h, w]`, of which images of a batch are drawn; mask: for inpainting, as the host prepares it. A
    sampler of another extension that needs more of its model than is here has none of the properties asked for.
    """

    def __init__(self, model: Any, sampling: dict[str, Any], latents: Tensor, mask: Tensor | None = None):
        self._model, self._sampling = model, sampling
        self._latents = latents.detach().cpu().float()
        self._mask = None if mask is None else mask.cpu().float()

    def _sigmas(self, steps: int) -> Tensor:
        options = {"scheduler": self._sampling["scheduler"], "denoise": self._sampling["denoise"]}
        name = self._sampling["sampler_name"]
        return comfy.samplers.KSampler(self._model, steps, torch.device("cpu"), sampler=name, **options).sigmas

    def _run(
        self, noise: Tensor, estimate: Estimate, sigmas: Tensor, seed: int = 0, changed: int | None = None
    ) -> tuple[Tensor, _Guider]:
        """(the end of a run, what stood for the guider)"""
        guider = _Guider(self._model, estimate, changed)
        sigmas = sigmas.clone()  # uni_pc writes into them.
        extra = {"model_options": {"transformer_options": {"sample_sigmas": sigmas}}, "seed": seed}
        sampler = comfy.samplers.sampler_object(self._sampling["sampler_name"])
        latents, mask = self._latents[: len(noise)], None if self._mask is None else self._mask[: len(noise)]
        end = sampler.sample(guider, sigmas, extra, None, noise, latents, mask, disable_pbar=True)
        return end.double(), guider

    def _noise(self, seed: int, images: int) -> Tensor:
        return torch.randn((images, *self._latents.shape[1:]), generator=torch.Generator().manual_seed(seed))

    def draws_each_alone(self) -> bool:
        """Whether an image of a batch depends on its own starting noise alone, not on the seed or on other images."""
        sigmas = self._sigmas(self._sampling["steps"])
        one, other = self._noise(0, len(self._latents)), self._noise(1, len(self._latents))
        other[0] = one[0]
        return _or_false(
            lambda: torch.equal(self._run(one, mixed, sigmas)[0][0], self._run(other, mixed, sigmas, seed=1)[0][0])
        )

    def takes_up_changes(self) -> bool:
        """Whether a latent that is changed in place, when the model sees it, is the latent that is sampled on from.

        Of two runs whose noises differ, the difference then grows by what it was multiplied by. What samplers remember
        of earlier steps must not hide that: it is zero for those that remember estimates where the estimate is, and
        for those that remember slopes where the estimate is the latent itself.
        """
        sigmas = self._sigmas(min(self._sampling["steps"], _STEPS))
        return _or_false(lambda: self._grows(no_noise, sigmas, True) or self._grows(nothing, sigmas, False))

    def _grows(self, estimate: Estimate, sigmas: Tensor, at_end: bool) -> bool:
        """at_end: whether to look at the end, or at the latent as it is last seen: of the estimate of nothing the end
        is nothing."""
        noise = self._noise(0, 1)

        def difference(changed: int | None = None) -> tuple[Tensor, int]:
            runs = [self._run(start, estimate, sigmas, changed=changed) for start in (noise, -noise)]
            one, other = (end if at_end else guider.last for end, guider in runs)
            return one - other, len(runs[0][1].levels) - (not at_end)

        stock, levels = difference()
        size = float(stock.abs().max())
        close = {"rtol": 1e-2, "atol": 1e-3 * size}
        return (
            size > 0
            and levels > 0
            and all(torch.allclose(difference(level)[0], _FACTOR * stock, **close) for level in range(levels))
        )


def _or_false(answer: Callable[[], bool]) -> bool:
    try:
        return answer()
    except Exception:
        logging.debug("MaskUNet: a sampler could not be tried out.", exc_info=True)
        return False
