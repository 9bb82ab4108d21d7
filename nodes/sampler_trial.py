"""What a sampler of the host does with a batch and with its latent, found out by running it without the network."""

import logging
from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..maskunet_core.seam.latent import SamplerLatent, before_each_call, untouched

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
    """In the place of the host's guider. changed: the latent of this noise level, counted from 0, is multiplied where
    the sampler holds it when it is first asked about. levels: that were asked for; last: the latent when it was last
    seen."""

    def __init__(self, model: Any, estimate: Estimate, changed: int | None):
        super().__init__(model)
        self.inner_model, self.levels, self.last = _Patched(model), [], torch.zeros(())
        self._estimate, self._changed = estimate, changed

    def before(self, latent: SamplerLatent) -> None:
        level = float(latent.sigma.max())
        self.last = latent.value.double()
        if level not in self.levels:
            if self._changed == len(self.levels):
                latent.value.mul_(_FACTOR)
            self.levels.append(level)

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict, seed: int | None) -> Tensor:
        clean = self._estimate(x)
        # Samplers of CFG++ learn of the unguided estimate by these functions.
        args = {"denoised": clean, "cond_denoised": clean, "uncond_denoised": clean, "input": x, "sigma": sigma}
        args |= {"cond": [], "uncond": [], "cond_scale": 1.0, "model": self.inner_model, "model_options": model_options}
        for function in model_options.get("sampler_post_cfg_function", []):
            clean = function(args | {"denoised": clean})
        return clean


def _run(
    model: Any,
    sampler: Any,
    sigmas: Tensor,
    start: tuple[Tensor, Tensor, Tensor | None],
    estimate: Estimate,
    seed: int = 0,
    changed: int | None = None,
) -> tuple[Tensor, _Guider]:
    """(the end of a run, what stood for the guider). start: noise, latents, and an inpainting mask or None."""
    guider = _Guider(model, estimate, changed)
    sigmas = sigmas.clone()  # uni_pc writes into them.
    extra = {"model_options": {"transformer_options": {"sample_sigmas": sigmas}}, "seed": seed}
    sampler = untouched(sampler)
    with before_each_call(sampler, guider.before):
        return sampler.sample(guider, sigmas, extra, None, *start, disable_pbar=True).double(), guider


def takes_up_changes(model: Any, sampler: Any, sigmas: Tensor) -> bool:
    """Whether the host's sampler goes on from a latent that is changed as it asks its model, at any of these levels.

    model: the MODEL. Of two runs whose noises differ, the difference then grows by what it was multiplied by. What
    samplers remember of earlier steps must not hide that: it is zero for those that remember estimates where the
    estimate is, and for those that remember slopes where the estimate is the latent itself. An inpainting mask acts
    after the change, so it makes no difference.
    """
    few = sigmas if len(sigmas) <= _STEPS + 1 else sigmas[torch.linspace(0, len(sigmas) - 1, _STEPS + 1).long()]

    def grows(estimate: Estimate, at_end: bool) -> bool:
        """at_end: whether to look at the end, or at the latent as it is last seen: of the estimate of nothing the end
        is nothing."""
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(sigmas)

        def difference(changed: int | None = None) -> tuple[Tensor, int]:
            starts = [(start, torch.zeros_like(start), None) for start in (noise, -noise)]
            runs = [_run(model, sampler, few, start, estimate, changed=changed) for start in starts]
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

    return _or_false(lambda: grows(no_noise, True) or grows(nothing, False))


class SamplerTrial:
    """Nothing is loaded and no conditioning is looked at: a trial takes milliseconds on the CPU.

    model: the MODEL, for its noise levels. sampler: the host's object; sigmas: `[steps + 1]`, that it is run with.
    latents: `[N, C, h, w]`, of which images of a batch are drawn; mask: for inpainting, as the host prepares it. A
    sampler of another extension that needs more of its model than is here has none of the properties asked for.
    """

    def __init__(self, model: Any, sampler: Any, sigmas: Tensor, latents: Tensor, mask: Tensor | None = None):
        self._model, self._sampler, self._sigmas = model, sampler, sigmas.cpu()
        self._latents = latents.detach().cpu().float()
        self._mask = None if mask is None else mask.cpu().float()

    def _noise(self, seed: int) -> Tensor:
        return torch.randn(self._latents.shape, generator=torch.Generator().manual_seed(seed))

    def draws_each_alone(self) -> bool:
        """Whether an image of a batch depends on its own starting noise alone, not on the seed or on other images."""
        one, other = self._noise(0), self._noise(1)
        other[0] = one[0]

        def first_image(noise: Tensor, seed: int) -> Tensor:
            start = noise, self._latents, self._mask
            return _run(self._model, self._sampler, self._sigmas, start, mixed, seed)[0][0]

        return _or_false(lambda: torch.equal(first_image(one, 0), first_image(other, 1)))

    def takes_up_changes(self) -> bool:
        """See the function of this name."""
        return takes_up_changes(self._model, self._sampler, self._sigmas)


def _or_false(answer: Callable[[], bool]) -> bool:
    try:
        return answer()
    except Exception:
        logging.debug("MaskUNet: a sampler could not be tried out.", exc_info=True)
        return False
