"""The host's sampler, run over parts of its steps for the frames of a video."""

from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..maskunet_core.errors import MaskUNetError
from ..maskunet_core.video.sampling import VideoSettings
from .sampler_trial import SamplerTrial


class FrameSampler:
    """Runs of the host's sampler over parts of its steps, with one bar over all of them.

    sampling: what the host's `sample` is called with. sigmas: the sampler's noise levels. format: of latents. Raises
    MaskUNetError where the latent is not one whole picture, or the sampler cannot draw it in chunks.
    """

    def __init__(self, model, latent_image: dict, sampling: dict[str, Any], settings: VideoSettings):
        self._model, self._sampling = model, sampling
        ratios = (latent_image.get(f"downscale_ratio_{kind}") for kind in ("spacial", "temporal"))
        self._empty = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"], *ratios)
        if len(self._empty) != 1 or "noise_mask" in latent_image:
            raise MaskUNetError(
                "The frames of a video are made of one whole picture, but the latent holds several, or a mask. Connect "
                "an Empty Latent Image with batch_size 1."
            )
        self._noise = comfy.sample.prepare_noise(self._empty, sampling["seed"], latent_image.get("batch_index"))
        kinds = {"sampler": sampling["sampler_name"], "scheduler": sampling["scheduler"]}
        self.sigmas = comfy.samplers.KSampler(model, sampling["steps"], torch.device("cpu"), **kinds).sigmas
        self.format = model.get_model_object("latent_format")
        self._require_same_in_chunks(settings)
        self._previewer = latent_preview.get_previewer(model.load_device, self.format)
        self._bar, self._done = comfy.utils.ProgressBar(settings.images(self.sigmas)), 0

    def _require_same_in_chunks(self, settings: VideoSettings) -> None:
        """Each chunk draws the first frame anew, to the same picture."""
        sampler = comfy.samplers.sampler_object(self._sampling["sampler_name"])
        trial = SamplerTrial(self._model, sampler, self.sigmas, self._empty.repeat(2, 1, 1, 1))
        if len(settings.chunks()) > 1 and not trial.draws_each_alone():
            raise MaskUNetError(
                f"{self._sampling['sampler_name']} adds noise of its own, so frames that are drawn apart do not fit "
                f"together. Set chunk to {settings.frames}, or choose another sampler, such as ddim or euler."
            )

    def draw(self, x: Tensor | None, start: int, end: int) -> Tensor:
        """See `Draw`."""
        latents = self._empty if x is None else self.format.process_out(x)

        def after_step(step: int, x0: Tensor, *_: Any) -> None:
            preview = self._previewer and self._previewer.decode_latent_to_preview_image("JPEG", x0)
            self._bar.update_absolute(self._done + (step + 1) * len(latents), preview=preview)

        samples = comfy.sample.sample(
            self._model,
            self._noise if x is None else torch.zeros_like(latents),
            latent_image=latents,
            disable_noise=x is not None,
            start_step=start,
            last_step=end,
            callback=after_step,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            **self._sampling,
        )
        self._done += (end - start) * len(latents)
        return self.format.process_in(samples)
