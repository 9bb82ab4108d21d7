"""Attend-and-Excite and SynGen inside the host's samplers: before a step the latent moves to where attention follows
the words of the prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..choices import ATTENTION_METHODS, PERCENT_STEP, PUBLISHED_STEP
from ..errors import MaskUNetError
from ..models.structure import family_name
from ..seam.gradients import LeanGraph
from ..seam.latent import SamplerLatent, UnchangeableLatent, before_each_call, per_image
from ..seam.sampling import NoRoomForGradients, has_hooks, loaded_with_room, mutable, step_of
from ..seam.state import CallState
from .losses import bind_loss, excite_loss
from .maps import KEY, MapReader, NoAttentionMaps, map_layers
from .words import PromptWords

_REFINED = ((0.0, 0.05), (0.2, 0.5), (0.4, 0.8))
"""(share of the steps, how well the most neglected subject has to be attended to from there on), as published."""
_MOST_REFINEMENTS = 20


class NothingToGuide(MaskUNetError):
    """Words from which a method has nothing to make."""


@dataclass(frozen=True)
class GuidanceSettings:
    """method: of ATTENTION_METHODS. step: size of an update, in `unit`. share: of the sampler's steps that are guided,
    from the first on. refine: whether Attend-and-Excite repeats its update at three steps until its loss is low enough.
    """

    method: str = ATTENTION_METHODS[0]
    step: float = 20.0
    unit: str = PUBLISHED_STEP
    share: float = 0.5
    refine: bool = False

    def guided(self, steps: int) -> int:
        """How many steps are guided."""
        return round(self.share * steps)

    def step_at(self, step: int, steps: int) -> float:
        """Attend-and-Excite's steps get smaller, to 0.71 of the first."""
        if self.method != ATTENTION_METHODS[0] or steps < 2:
            return self.step
        return self.step * (1 - 0.5 * step / (steps - 1)) ** 0.5

    def refined_below(self, step: int, steps: int) -> float | None:
        """The loss that repeated updates aim at in a step, None where there are none."""
        if self.method != ATTENTION_METHODS[0] or not self.refine:
            return None
        return next((1 - reached for share, reached in _REFINED if step == round(share * steps)), None)


class WordsLoss:
    """`[N]` losses of maps, by one of ATTENTION_METHODS. Raises NothingToGuide.

    normalised: whether Attend-and-Excite compares tokens of the prompt alone, as published for SD 2.x; else padding
    counts among them, as published for SD 1.x.
    """

    def __init__(self, words: PromptWords, method: str, normalised: bool):
        self.words, self._method = words, method
        self._subjects = [found.noun for found in words.sets]
        self._pairs = [found for found in words.sets if found.modifiers]
        self._compared = words.prompt if normalised else words.padded
        if not (self._subjects if method == ATTENTION_METHODS[0] else self._pairs):
            wanted = "a noun" if method == ATTENTION_METHODS[0] else "a noun with a modifier, such as 'a red apple'"
            raise NothingToGuide(
                f"{method} needs {wanted}, and MaskUNet Prompt Words found none in the prompt. Name them there in "
                "`words`, for instance red > apple, or choose the other method."
            )

    def __call__(self, maps: Tensor) -> Tensor:
        if maps.shape[-1] != self.words.tokens:
            raise NoAttentionMaps(
                f"The words were found in a prompt of {self.words.tokens} tokens, but the positive conditioning has "
                f"{maps.shape[-1]}. Connect the conditioning of the same MaskUNet Prompt Words to the sampler."
            )
        if self._method == ATTENTION_METHODS[0]:
            return excite_loss(maps, self._subjects, self._compared)
        return bind_loss(maps, self._pairs, self.words.prompt)


class LossOfEach:
    """`[N]` losses of maps of which each image has a prompt of its own."""

    def __init__(self, losses: Sequence[WordsLoss]):
        self._losses = losses

    def __call__(self, maps: Tensor) -> Tensor:
        return torch.cat([loss(own) for loss, own in zip(self._losses, maps.split(1), strict=True)])


Loss = WordsLoss | LossOfEach


def losses_of(model: Any) -> list[Loss]:
    """Of all guidance that a MODEL carries."""
    from comfy.patcher_extension import WrappersMP

    return [wrapper.args[0] for wrapper in model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)]


@dataclass
class _Look:
    """losses: `[N]`; gradient: of their sum in the sampler's latent `[N, ...]`, zero where it was not finite."""

    losses: Tensor
    gradient: Tensor


@dataclass
class AttentionGuidance:
    """Changes of the latent in the sampling runs of the MODEL that `guiding` gives.

    words: of the prompt of all images, or of that of each. takes_up_changes: whether a sampler of the host goes on from
    changed latents, by (MODEL, sampler, sigmas).
    report: called with (step, losses `[N]`) at each look.
    """

    words: PromptWords | Sequence[PromptWords]
    settings: GuidanceSettings
    takes_up_changes: Callable[[Any, Any, Tensor], bool]
    report: Callable[[int, Tensor], None] = field(default=lambda step, losses: None)

    def guiding(self, model: Any) -> Any:
        """A clone of a MODEL whose sampling runs are guided. Raises NothingToGuide, NoAttentionMaps."""
        from comfy.patcher_extension import WrappersMP

        map_layers(model.model)
        loss = self._loss(normalised=family_name(model.model) == "SD 2.x")
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _loaded_with_room_for_gradients)
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, partial(self._sampled, loss))
        return clone

    def _loss(self, normalised: bool) -> Loss:
        if isinstance(self.words, PromptWords):
            return WordsLoss(self.words, self.settings.method, normalised)
        return LossOfEach([WordsLoss(words, self.settings.method, normalised) for words in self.words])

    def _sampled(self, loss: Loss, executor, noise, latents, sampler, sigmas, *args: Any, **kwargs: Any) -> Tensor:
        """OUTER_SAMPLE wrapper. Raises UnchangeableLatent."""
        guider = executor.class_obj
        if guider.model_patcher.get_additional_models_with_key("multigpu"):
            raise MaskUNetError(
                "Attention guidance takes gradients on one device, but the connected model is set to work on several. "
                "Connect the model without MultiGPU Work Units."
            )
        run = _GuidedRun(guider, self, loss)
        with before_each_call(sampler, run.before_call):
            if not self.takes_up_changes(guider.model_patcher, sampler, sigmas):
                raise UnchangeableLatent(
                    "Attention guidance changes the noisy latent, and this sampler does not go on from what was "
                    "changed. Choose a sampler that looks at each step once, such as euler, ddim or dpmpp_2m."
                )
            return executor(noise, latents, sampler, sigmas, *args, **kwargs)


def _loaded_with_room_for_gradients(executor, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
    """PREPARE_SAMPLING wrapper: a backward pass of one branch keeps about what a call with twice its batch takes."""
    room = model.model.memory_required([2 * shape[0], *shape[1:]])
    return loaded_with_room(room, executor, model, shape, *args, **kwargs)


class _GuidedRun:
    """One run of a sampler."""

    def __init__(self, guider: Any, guidance: AttentionGuidance, loss: Loss):
        self._guider, self._loss = guider, loss
        self._settings, self._report = guidance.settings, guidance.report
        self._reader: MapReader | None = None
        self._last = -1

    def before_call(self, latent: SamplerLatent) -> None:
        step, steps = step_of(float(latent.sigma.max()), latent.options)
        if self._last < step < self._settings.guided(steps):
            self._last = step
            state = CallState(latent.options, latent.value.device)
            self._update(latent, step, steps)
            state.restore()

    def _update(self, latent: SamplerLatent, step: int, steps: int) -> None:
        size, aim = self._settings.step_at(step, steps), self._settings.refined_below(step, steps)
        for _ in range(0 if aim is None else _MOST_REFINEMENTS):
            look = self._look(latent, step)
            if look is None or not (look.losses > aim).any():
                break
            self._move(latent, look, size, look.losses > aim)
        else:
            look = self._look(latent, step)
        if look is not None:
            self._move(latent, look, size, look.losses != 0)

    def _look(self, latent: SamplerLatent, step: int) -> _Look | None:
        """None where the prompt does not act at this step. Raises NoRoomForGradients."""
        try:
            with torch.inference_mode(False), torch.enable_grad(), LeanGraph(), mutable(latent.options):
                leaf = latent.value.clone().requires_grad_()
                maps = self._maps(latent, leaf)
                if maps is None:
                    return None
                losses = self._loss(maps)
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        except torch.OutOfMemoryError:
            raise NoRoomForGradients(
                "Attention guidance ran out of the device's memory while it computed its gradient. Lower the size or "
                "the batch, or close other programs that use the device."
            ) from None
        finite = gradient.flatten(1).isfinite().all(1)
        self._report(step, losses.detach())
        return _Look(losses.detach(), torch.where(per_image(finite, gradient), gradient, 0.0))

    def _maps(self, latent: SamplerLatent, value: Tensor) -> Tensor | None:
        import comfy.model_management

        guider = self._guider
        positive = guider.conds.get("positive") or []
        if self._reader is None:
            on_cpu = comfy.model_management.is_device_cpu(guider.model_patcher.load_device)
            self._reader = MapReader(guider.inner_model, lent=not on_cpu or has_hooks([positive]))
        return self._reader.read(positive, latent.seen(value), latent.sigma, latent.options)

    def _move(self, latent: SamplerLatent, look: _Look, size: float, chosen: Tensor) -> None:
        """Against the gradient, the chosen images `[N]` alone."""
        value, gradient = latent.value, look.gradient
        if self._settings.unit == PERCENT_STEP:
            # Of the part that an inpainting mask lets change.
            free = value.where(gradient != 0, 0.0).flatten(1).norm(dim=1)
            factor = size / 100 * free / gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
        else:
            # The published updates are of the latent as the network takes it, this much smaller than the sampler's.
            sampling = self._guider.inner_model.model_sampling
            scale = 1 / sampling.calculate_input(latent.sigma, torch.ones_like(value))
            factor = size * scale.flatten(1)[:, 0] ** 2
        value.sub_(per_image(factor * chosen, value) * gradient)
