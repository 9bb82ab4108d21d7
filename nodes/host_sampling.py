"""The host's two ways to sample, as a search asks for them: KSampler's, and that of custom samplers with a guider."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
from torch import Tensor

from ..maskunet_core.errors import MaskUNetError
from ..maskunet_core.seam.gradients import ordinary_tensors

_SEEDS = 1 << 64


def _shown() -> dict[str, bool]:
    return {"disable_pbar": not comfy.utils.PROGRESS_BAR_ENABLED}


class HostSampling(ABC):
    """model: the MODEL. seed: of the first starting noise; others have those after it. name, sampler: of the sampler,
    and itself. sigmas: `[steps + 1]`, which for some schedulers are not as many as asked for. branches: of guidance,
    that are computed in a step. masks_one_branch: whether the model is asked for the positive branch first, as masks of
    this branch alone take for granted. record: what a file of masks tells of it; drawer: the node that it stands for.
    """

    drawer: str
    model: Any
    seed: int
    name: str
    sampler: Any
    sigmas: Tensor
    branches: int
    masks_one_branch: bool
    record: dict[str, Any]

    def seed_of(self, candidate: int) -> int:
        return (self.seed + candidate) % _SEEDS

    @abstractmethod
    def noise(self, latent: dict[str, Any], candidate: int) -> Tensor:
        """Starting noise for the `samples` of a LATENT."""

    @abstractmethod
    def draw(self, model: Any, noise: Tensor, latent: dict[str, Any], candidate: int, callback: Callable) -> Tensor:
        """Finished latents by a MODEL that this one was changed to."""


class KSampling(HostSampling):
    """As KSampler does it."""

    drawer, masks_one_branch = "KSampler", True

    def __init__(self, model: Any, positive: Any, negative: Any, settings: dict[str, Any]):
        self.model, self._settings = model, settings
        self._conditioning = ordinary_tensors(positive), ordinary_tensors(negative)
        self.seed, self.name = settings["seed"], settings["sampler_name"]
        self.sampler = comfy.samplers.sampler_object(self.name)
        self.branches = 1 if settings["cfg"] == 1.0 else 2
        self.record = settings
        options = {"sampler": self.name, "scheduler": settings["scheduler"], "denoise": settings["denoise"]}
        self.sigmas = comfy.samplers.KSampler(model, settings["steps"], model.load_device, **options).sigmas

    def noise(self, latent: dict[str, Any], candidate: int) -> Tensor:
        return comfy.sample.prepare_noise(latent["samples"], self.seed_of(candidate), latent.get("batch_index"))

    def draw(self, model: Any, noise: Tensor, latent: dict[str, Any], candidate: int, callback: Callable) -> Tensor:
        plan = (self._settings[name] for name in ("steps", "cfg", "sampler_name", "scheduler"))
        return comfy.sample.sample(
            model,
            noise,
            *plan,
            *self._conditioning,
            latent["samples"],
            denoise=self._settings["denoise"],
            noise_mask=latent.get("noise_mask"),
            seed=self.seed_of(candidate),
            callback=callback,
            **_shown(),
        )


class GuiderSampling(HostSampling):
    """As SamplerCustomAdvanced does it: by a GUIDER, SAMPLER, SIGMAS and NOISE of the host."""

    drawer = "the custom sampler"

    def __init__(self, noise: Any, guider: Any, sampler: Any, sigmas: Tensor):
        self.model, self.sampler, self.sigmas, self._noise = guider.model_patcher, sampler, sigmas.clone(), noise
        self._guider = copy.copy(guider)
        self._guider.original_conds = ordinary_tensors(guider.original_conds)
        self.seed = noise.seed
        # A SAMPLER of another extension may be of any class.
        function = getattr(sampler, "sampler_function", sampler)
        self.name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
        plain = comfy.samplers.CFGGuider
        self.masks_one_branch = type(guider).predict_noise is plain.predict_noise
        alone = self.masks_one_branch and (guider.cfg == 1.0 or "negative" not in guider.original_conds)
        self.branches = 1 if alone else max(2, len(guider.original_conds))
        steps = max(len(sigmas) - 1, 0)
        self.record = {"seed": self.seed, "steps": steps, "cfg": guider.cfg, "sampler_name": self.name}
        self.record |= {"guider": type(guider).__name__, "drawn_by": self.drawer}

    def noise(self, latent: dict[str, Any], candidate: int) -> Tensor:
        """Raises MaskUNetError where the NOISE has no seed on which it depends."""
        first = self._noise.generate_noise(latent)
        if not candidate:
            return first
        other = copy.copy(self._noise)
        try:
            other.seed = self.seed_of(candidate)
        except AttributeError:
            found = first
        else:
            found = other.generate_noise(latent)
        if found.equal(first):
            raise MaskUNetError(
                "The connected noise is the same for every seed, so all candidates would be one picture. Connect "
                "Random Noise, or set candidates to 1."
            )
        return found

    def draw(self, model: Any, noise: Tensor, latent: dict[str, Any], candidate: int, callback: Callable) -> Tensor:
        guider = copy.copy(self._guider)
        guider.model_patcher, guider.model_options = model, model.model_options
        plan = noise, latent["samples"], self.sampler, self.sigmas.clone()
        options = {"denoise_mask": latent.get("noise_mask"), "seed": self.seed_of(candidate), "callback": callback}
        found = guider.sample(*plan, **options, **_shown())
        return found.to(comfy.model_management.intermediate_device())
