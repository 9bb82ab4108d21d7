"""One run of the reward sampler inside the host."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..maskunet_core.errors import MaskUNetError
from ..maskunet_core.records.recorder import without_recording
from ..maskunet_core.rewards.reward import BoundReward, value_and_gradient
from ..maskunet_core.seam.attention import attention_notice
from ..maskunet_core.seam.sampling import SEARCH, loaded_with_room
from ..maskunet_core.search.decoder import is_plain, latent_decoder, pictures_by_host
from ..maskunet_core.search.judge import Judge
from ..maskunet_core.search.memory import bytes_of_blocks, bytes_of_masks, keeps_ways, room_for
from ..maskunet_core.search.run import SearchResult, search_images, structure_for
from ..maskunet_core.search.settings import SMALL_SIDE, SearchSettings
from .candidate_sheet import candidate_sheets, small
from .host_sampling import HostSampling
from .masks import not_by_seeds, seeds_in_words
from .node_text import words_in_a_line
from .sampler_trial import SamplerTrial
from .search_progress import SearchProgress, numbers

_PEEK = "maskunet_peek"
_ROUNDING = 1e-4
"""By how much of it a noise level may differ from the plan: some samplers reckon with logarithms."""


class _StopSampling(Exception):
    """Leaves a run of the host's sampler from inside."""


@cache
def _log_once(text: str) -> None:
    if text:
        logging.info(f"MaskUNet Reward Sampler: {text}")


def _tidied(executor, *args: Any, **kwargs: Any) -> Tensor:
    """OUTER_SAMPLE wrapper: what the host does at a run's end is done where a run is left, too.

    Else ControlNets keep their hints, and some a network of their own, on the device.
    """
    try:
        return executor(*args, **kwargs)
    except _StopSampling:
        guider = executor.class_obj
        comfy.sampler_helpers.cleanup_models(guider.conds, guider.loaded_models)
        raise


class RewardRun:
    """Everything that a search needs from the host. Made and run outside of inference mode, under `no_grad`.

    sampling: how the host draws the images. advice: a line for the person at the graph, told on the node with the
    result.

    After the run `seeds` tells for each image the seed whose starting noise it was made from, and `seeds_suffice`
    whether the stock sampler draws these images again, each with its seed and the masks. Images of unlike seeds are
    drawn as one batch with the node's seed: some samplers draw noise of their own by it, or choose steps for all.
    """

    def __init__(
        self,
        *,
        sampling: HostSampling,
        vae: Any,
        gradient_vae: Any,
        reward: Any,
        watch: Any,
        prompt: str,
        latent: dict,
        settings: SearchSettings,
        targets: str,
        stop_by_watch: bool,
        node_id: str,
        advice: str = "",
    ):
        self.sampling, self.targets, self.stop_by_watch = sampling, targets, stop_by_watch
        self.settings = settings if sampling.masks_one_branch else replace(settings, branches="both")
        self.advice, self.vae = advice, vae
        # A search gives its masks itself, and may put together its latents from several runs.
        self.model = without_recording(sampling.model)
        self.gradient_vae = gradient_vae or vae
        self.reward_patchers = [*reward.patchers(), *(watch.patchers() if watch else ())]
        helpers = [self.gradient_vae.patcher, *self.reward_patchers]
        self.model.set_additional_models(SEARCH, list({id(patcher): patcher for patcher in helpers}.values()))
        self.model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, SEARCH, partial(loaded_with_room, 0))
        # A host knows just those ratios that its own nodes put into a latent.
        ratios = {key: value for key, value in latent.items() if key.startswith("downscale_ratio_")}
        self.samples = comfy.sample.fix_empty_latent_channels(self.model, latent["samples"], **ratios)
        self.latent = latent | {"samples": self.samples}
        self.bound: BoundReward = reward.reward.bind(prompt)
        watched = watch.reward.bind(prompt) if watch else None
        small = SMALL_SIDE if settings.small_decode else 0
        finish = self._finish() if "noise_mask" in latent else None
        self.sigmas = sampling.sigmas.tolist()
        self.steps = max(len(self.sigmas) - 1, 0)
        decode = self._decoder(settings.total_iterations(self.steps) > 0)
        # What refers to the run itself would outlive it until Python looks for circles.
        scale = self.gradient_vae.spacial_compression_decode()
        self.judge = judge = Judge(decode, partial(value_and_gradient, self.bound), small, scale, finish)
        self.watch = None if watched is None else lambda z: watched(judge.pictures(z)).detach()
        self.progress = SearchProgress(self.model, settings, self.steps, node_id)
        self.candidate_scores: list[Tensor] = []
        self._pictures: list[Tensor] = []
        self._finished: Tensor | None = None

    def _decoder(self, gradients: bool) -> Callable[[Tensor], Tensor]:
        """What estimates are seen through."""
        latent_format = self.model.get_model_object("latent_format")
        if gradients or is_plain(self.gradient_vae, latent_format):
            return latent_decoder(self.gradient_vae, latent_format)
        return pictures_by_host(self.gradient_vae, latent_format)

    def _inpainting_mask(self) -> Tensor:
        return comfy.sampler_helpers.prepare_mask(self.latent["noise_mask"], self.samples.shape, self.model.load_device)

    def _finish(self) -> Callable[[Tensor], Tensor]:
        """Outside of an inpainting mask the sampler ends with the latent as it was."""
        mask = self._inpainting_mask()
        kept = self.model.model.process_latent_in(self.samples).to(mask)
        return lambda latents: latents * mask.to(latents) + kept.to(latents) * (1 - mask.to(latents))

    def _noise(self, candidate: int) -> Tensor:
        return self.sampling.noise(self.latent, candidate)

    def _sample(self, model: Any, noise: Tensor, candidate: int, callback: Any = None) -> Tensor:
        # The host draws its noise just before it samples: other nodes that draw, too, go on from there.
        self._noise(candidate)
        return self.sampling.draw(model, noise, self.latent, candidate, callback or self.progress.step)

    def _peek(self, noise: Tensor, candidate: int, steps: int) -> Tensor:
        """The estimate of the clean latent after the first steps of the very run that would be drawn.

        Steps are told by their noise level: dpm_fast and dpm_adaptive take others than planned, and count those. Of a
        run that never comes so far it is the last estimate; of one that tells of none, the finished latent.
        """
        enough = self.sigmas[steps - 1] * (1 + _ROUNDING)
        level, estimates = float("inf"), []

        def note_level(executor, x: Tensor, timestep: Tensor, *args: Any) -> Tensor:
            nonlocal level
            level = float(timestep.max())
            return executor(x, timestep, *args)

        def look(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            estimates[:] = [x0]
            self.progress.step(step, x0, x, total)
            if level <= enough:
                raise _StopSampling

        model = self.model.clone()
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, _PEEK, note_level)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _PEEK, _tidied)
        with contextlib.suppress(_StopSampling):
            latents = self._sample(model, noise, candidate, look)
        return estimates[0] if estimates else self.model.model.process_latent_in(latents)

    def _final_scores(self, latents: Tensor) -> Tensor:
        """Rewards `[N]` of finished latents: decoded in the host's way, with its plan of memory and its tiles."""
        scores, shown = [], []
        for latent in latents.split(1):
            with torch.inference_mode():
                pictures = self.vae.decode(latent)
                comfy.model_management.load_models_gpu(self.reward_patchers)
            pictures = pictures.clone().flatten(0, -4).movedim(-1, 1)[:, :3]
            scores.append(self.bound(pictures).cpu())
            shown.append(small(pictures))
        self._finished = torch.cat(shown)
        return torch.cat(scores)

    def _candidate_done(self, number: int, scores: Tensor) -> None:
        """Keeps what the judging has decoded anyway."""
        self.candidate_scores.append(scores.cpu())
        self._pictures.append(small(self.judge.last_pictures) if self._finished is None else self._finished)
        self.progress.candidate(number, scores)

    def sheets(self, found: SearchResult) -> Tensor:
        """`[N, H, W, 3]`: the candidates of each image, with their scores."""
        seeds = [self.sampling.seed_of(number) for number in range(len(self._pictures))]
        return candidate_sheets(self._pictures, self.candidate_scores, seeds, found.candidates)

    # Before anything is sampled ---------------------------------------------------------------------------------

    def _trial(self) -> SamplerTrial:
        mask = self._inpainting_mask() if "noise_mask" in self.latent else None
        sampling = self.sampling
        return SamplerTrial(self.model, sampling.sampler, sampling.sigmas, self.samples, mask)

    def _require_possible(self) -> None:
        if self.model.get_additional_models_with_key("multigpu"):
            raise MaskUNetError(
                "The search takes gradients on one device, but the connected model is set to work on several. Connect "
                "the model without MultiGPU Work Units, or use preset fast."
            )
        if self.settings.latent_lr and not self._trial().takes_up_changes():
            raise MaskUNetError(
                f"latent_lr changes the noisy latent, but {self.sampling.name} does not go on from what was "
                "changed. Set latent_lr to 0, or choose a sampler that looks at each step once, such as euler or "
                "dpmpp_2m."
            )

    def run(self) -> SearchResult:
        room = 0
        if self.settings.total_iterations(self.steps):
            self._require_possible()
            _log_once(attention_notice(self.model.load_device))
            decoded = self.judge.decoded_size(*self.samples.shape[-2:])
            structure = structure_for(self.model, self.targets, updates=True)
            computing = self.model.model.get_dtype_inference()
            diffusion_model = self.model.model.diffusion_model
            ways = keeps_ways(self.settings, diffusion_model)
            masks = bytes_of_masks(structure, self.settings, computing, ways)
            cells = self.samples.shape[2:].numel()
            blocks = bytes_of_blocks(diffusion_model, structure, cells, computing)
            branches = 1 if self.settings.branches == "positive" else self.sampling.branches
            room = room_for(masks, branches * blocks, self.gradient_vae, len(self.samples), decoded)
        found = search_images(
            model=self.model,
            sample=self._sample,
            peek=self._peek,
            noise=self._noise,
            settings=self.settings,
            judge=self.judge,
            score=self._final_scores,
            steps=self.steps,
            candidate_done=self._candidate_done,
            targets=self.targets,
            seed=self.sampling.seed,
            watch=self.watch,
            stop_by_watch=self.stop_by_watch,
            report=self.progress.look,
            room=room,
        )
        self.seeds = [self.sampling.seed_of(int(candidate)) for candidate in found.candidates]
        by_masks = not (self.settings.latent_lr and found.history)
        alike = bool(found.drawn_as_candidate.all())
        self.seeds_suffice = by_masks and (alike or self._trial().draws_each_alone())
        self._tell(found)
        return found

    def _tell(self, found: SearchResult) -> None:
        if found.skipped:
            logging.warning(
                f"MaskUNet Reward Sampler: {found.skipped} updates of an image were left out, because a reward or a "
                "gradient was no finite number. Half precision does so where a picture is extreme: load the reward "
                "with dtype fp32, or start ComfyUI with --fp32-vae."
            )
        if found.peak:
            logging.info(f"MaskUNet Reward Sampler: a look took {found.peak / 2**30:.2f} GB beside the models.")
        if found.scores is not None:
            told = seeds_in_words(self.seeds)
            if not self.seeds_suffice:
                told += f". {not_by_seeds(self.sampling.name, self.settings.latent_lr, self.sampling.drawer)}"
            lines = f"reward {numbers(found.scores)}, {told}", words_in_a_line(self.bound), self.advice
            self.progress.tell("\n".join(filter(None, lines)))
