"""One run of the reward sampler inside the host: loading, progress, previews, memory."""

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..maskunet_core.records.recorder import without_recording
from ..maskunet_core.rewards.reward import BoundReward, value_and_gradient
from ..maskunet_core.search.host import latent_decoder, load_for_gradients, static_clone
from ..maskunet_core.search.judge import Judge
from ..maskunet_core.search.loop import Evaluation
from ..maskunet_core.search.memory import CannotEstimate, estimate_need, require_room
from ..maskunet_core.search.run import Found, search_images
from ..maskunet_core.search.sampling import KEY
from ..maskunet_core.search.settings import SMALL_SIDE, SearchSettings
from .masks import seeds_in_words


class RewardRun:
    """Everything that a search needs from the host. Made and run outside of inference mode, under `no_grad`."""

    def __init__(
        self,
        *,
        model: Any,
        vae: Any,
        gradient_vae: Any,
        reward: Any,
        watch: Any,
        prompt: str,
        latent: dict,
        positive: Any,
        negative: Any,
        settings: SearchSettings,
        targets: str,
        stop_by_watch: bool,
        sampling: dict[str, Any],
        node_id: str,
    ):
        self.settings, self.sampling, self.targets, self.stop_by_watch = settings, sampling, targets, stop_by_watch
        self.positive, self.negative, self.latent = positive, negative, latent
        # A search gives its masks itself, and may put together its latents from several runs.
        self.model = without_recording(static_clone(model))
        looking, self.has_gradient_vae = gradient_vae or vae, gradient_vae is not None
        patchers = [looking.patcher, vae.patcher, *reward.patchers(), *(watch.patchers() if watch else ())]
        self.helpers = list({id(patcher): patcher for patcher in patchers}.values())
        self.model.set_additional_models(KEY, self.helpers)
        # A host knows just those ratios that its own nodes put into a latent.
        ratios = {key: value for key, value in latent.items() if key.startswith("downscale_ratio_")}
        self.samples = comfy.sample.fix_empty_latent_channels(self.model, latent["samples"], **ratios)
        self.format = self.model.get_model_object("latent_format")
        self.bound: BoundReward = reward.reward.bind(prompt)
        watched = watch.reward.bind(prompt) if watch else None
        small = SMALL_SIDE if settings.small_decode else 0
        finish = self._finish() if "noise_mask" in latent else None
        decode = latent_decoder(looking, self.format)
        self.judge = Judge(decode, self._score, small, finish=finish)
        self.final = Judge(latent_decoder(vae, self.format), self._score)
        self.watch = None if watched is None else lambda z: watched(self.judge.pictures(z)).detach()
        self.steps = self._steps()
        self.progress = _Progress(self.model, settings, self.steps, node_id)

    def _score(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_gradient(self.bound, pictures)

    def _steps(self) -> int:
        """Of the sampler, which for some schedulers are not as many as asked for."""
        steps, sampler, scheduler, denoise = (
            self.sampling[name] for name in ("steps", "sampler_name", "scheduler", "denoise")
        )
        options = {"sampler": sampler, "scheduler": scheduler, "denoise": denoise}
        planned = comfy.samplers.KSampler(self.model, steps, self.model.load_device, **options)
        return max(len(planned.sigmas) - 1, 0)

    def _of_conditioning(self) -> list[Any]:
        """ControlNets and other models that the conditioning brings along."""
        conditioning = {"positive": self.positive, "negative": self.negative}
        converted = {name: comfy.sampler_helpers.convert_cond(value) for name, value in conditioning.items()}
        return comfy.sampler_helpers.get_additional_models(converted, self.model.model_dtype())[0]

    def _finish(self) -> Callable[[Tensor], Tensor]:
        """Outside of an inpainting mask the sampler ends with the latent as it was."""
        mask = comfy.sampler_helpers.prepare_mask(self.latent["noise_mask"], self.samples.shape, self.model.load_device)
        kept = self.model.model.process_latent_in(self.samples).to(mask)
        return lambda latents: latents * mask.to(latents) + kept.to(latents) * (1 - mask.to(latents))

    def _seed(self, candidate: int) -> int:
        return (self.sampling["seed"] + candidate) % (1 << 64)

    def _noise(self, candidate: int) -> Tensor:
        return comfy.sample.prepare_noise(self.samples, self._seed(candidate), self.latent.get("batch_index"))

    def _sample(self, model: Any, noise: Tensor, candidate: int, callback=None, last_step: int | None = None) -> Tensor:
        options = self.sampling | {"seed": self._seed(candidate), "noise_mask": self.latent.get("noise_mask")}
        names = ("steps", "cfg", "sampler_name", "scheduler")
        settings = [options.pop(name) for name in names]
        return comfy.sample.sample(
            model,
            noise,
            *settings,
            self.positive,
            self.negative,
            self.samples,
            last_step=last_step,
            callback=callback or self.progress.step,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            **options,
        )

    def _peek(self, noise: Tensor, candidate: int, steps: int) -> Tensor:
        """The estimate of the clean latent after the first steps."""
        seen: list[Tensor] = []

        def keep(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            seen[:] = [x0]
            self.progress.step(step, x0, x, total)

        self._sample(self.model, noise, candidate, keep, steps)
        return seen[0]

    def _final_scores(self, latents: Tensor) -> Tensor:
        inside = self.format.process_in(latents.to(self.model.load_device))
        return self.final.scores(inside).cpu()

    def _begin_small(self, model: Any, noise: Tensor) -> None:
        """The first step of the sampler on a latent of another size."""
        names = ("steps", "cfg", "sampler_name", "scheduler")
        settings = [self.sampling[name] for name in names]
        begun = (model, noise, *settings, self.positive, self.negative, torch.zeros_like(noise))
        comfy.sample.sample(*begun, last_step=1, seed=0, disable_pbar=True)

    def _make_room(self, patchers: list[Any]) -> None:
        """Models on the device as a whole, and room for what gradients need beside them.

        Raises NoRoomForGradients before anything is sampled.
        """
        load_for_gradients(patchers)
        device = self.model.load_device
        try:
            need = estimate_need(
                model=self.model,
                settings=self.settings,
                targets=self.targets,
                judge=self.judge,
                bound=self.bound,
                size=tuple(self.samples.shape),
                sample=self._begin_small,
                weights=[weight for patcher in patchers for weight in patcher.model.parameters()],
                device=device,
            )
        except CannotEstimate as error:
            logging.warning(f"MaskUNet Reward Sampler: the memory of this search cannot be estimated ({error}).")
            return
        if need.peak > comfy.model_management.get_free_memory(device):
            # Other graphs' models may lie there.
            load_for_gradients(patchers, need.peak)
        free = comfy.model_management.get_free_memory(device)
        require_room(need, free, self.settings, str(device), self.has_gradient_vae)

    def run(self) -> Found:
        if self.settings.total_iterations(self.steps):
            self._make_room([self.model, *self.helpers, *self._of_conditioning()])
        elif self.settings.candidates > 1:
            comfy.model_management.load_models_gpu([self.model, *self.helpers])
        found = search_images(
            model=self.model,
            sample=self._sample,
            peek=self._peek,
            noise=self._noise,
            settings=self.settings,
            judge=self.judge,
            score=self._final_scores,
            steps=self.steps,
            candidate_done=self.progress.candidate,
            targets=self.targets,
            seed=self.sampling["seed"],
            watch=self.watch,
            stop_by_watch=self.stop_by_watch,
            report=self.progress.look,
        )
        self.progress.end(found.scores, self.seeds(found))
        return found

    def seeds(self, found: Found) -> list[int]:
        """Of KSampler, for each image: the one whose noise it was made from."""
        return [self._seed(int(candidate)) for candidate in found.candidates]


class _Progress:
    """The node's bar over all candidates, steps and updates, with previews and the reward of now."""

    def __init__(self, model: Any, settings: SearchSettings, steps: int, node_id: str | None):
        self.steps, self.node_id, self.settings = steps, node_id, settings
        updates = [settings.iterations_at(step, steps) for step in range(steps)]
        self._peeked = settings.candidate_steps(steps)
        drawn = settings.candidates * self._peeked if settings.candidates > 1 else 0
        self._before = [drawn + step + sum(updates[:step]) for step in range(steps + 1)]
        self._candidate = 0 if drawn else None
        ends_there = drawn and self._peeked == steps and not any(updates)
        self.bar = comfy.utils.ProgressBar(drawn if ends_there else self._before[-1])
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._done = 0

    def _tell(self, text: str) -> None:
        if self.node_id is None:
            return
        from server import PromptServer

        if getattr(PromptServer, "instance", None) is not None:
            PromptServer.instance.send_progress_text(text, self.node_id)

    def _show(self, done: int, estimate: Tensor) -> None:
        # Samplers that look twice at a step ask for an earlier step again.
        self._done = max(self._done, done)
        preview = self._previewer.decode_latent_to_preview_image("JPEG", estimate) if self._previewer else None
        self.bar.update_absolute(self._done, preview=preview)

    def step(self, step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        """The host's callback after each step."""
        place = min(step + 1, self.steps)
        done = self._before[place] if self._candidate is None else self._candidate * self._peeked + place
        self._show(done, x0)

    def candidate(self, number: int, scores: Tensor) -> None:
        count = self.settings.candidates
        self._tell(f"candidate {number + 1} of {count}: reward {_numbers(scores)}")
        self._candidate = number + 1 if number + 1 < count else None

    def look(self, seen: Evaluation, estimate: Tensor) -> None:
        """After each look at an estimate; raises where the user cancelled."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._show(self._before[seen.step] + seen.iteration, estimate)
        self._tell(f"step {seen.step + 1} of {self.steps}, update {seen.iteration}: reward {_numbers(seen.scores)}")

    def end(self, scores: Tensor | None, seeds: list[int]) -> None:
        if scores is not None:
            self._tell(f"reward {_numbers(scores)}, {seeds_in_words(seeds)}")


def _numbers(scores: Tensor) -> str:
    shown = ", ".join(f"{float(score):.3f}" for score in scores[:4])
    return shown + (", ..." if len(scores) > 4 else "")
