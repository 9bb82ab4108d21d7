"""Pictures of prompts as a method on a base draws them, by the host's own samplers."""

from typing import Any

import torch
from torch import Tensor

from maskunet_core.training.base import BaseModel
from maskunet_core.training.texts import Conditions, by_length, stacked

from ..choices import TOY_RESOLUTION
from ..config import Config


def picture_side(config: Config) -> int:
    """In pixels, of the squares that are drawn."""
    return TOY_RESOLUTION if config.is_toy else config.data.resolution


class Drawing:
    """Draws latents and shows them. at_once: latents that are drawn together."""

    def __init__(self, base: BaseModel, config: Config, at_once: int):
        self.base, self.settings, self.at_once = base, config.reward, at_once
        side = picture_side(config)
        self.shape = base.latent_shape(side, side)
        self._known: dict[str, Conditions] = {}

    def read(self, prompts: list[str]) -> None:
        """Encode prompts, for `conditions`; those of the last call and the empty one are known, others forgotten."""
        wanted = dict.fromkeys(["", *prompts])
        self._known = {text: self._known.get(text) or self.base.encode_text(text) for text in wanted}

    def conditions(self, prompts: list[str]) -> Conditions:
        """Of a batch of prompts that were read, on the CPU."""
        return stacked([self._known[text] for text in prompts])

    @torch.no_grad()
    def latents(self, model: Any, prompts: list[str], noise: Tensor, seed: int, progress=None) -> Tensor:
        """`[N, C, ..., h, w]`, scaled as the model takes them, on the CPU; of prompts that were read.

        model: the host's MODEL. noise: likewise. progress: called with the number of pictures that were drawn.
        """
        import comfy.sample

        how = self.settings
        plan = (how.steps, how.cfg, how.sampler, how.scheduler)
        found = torch.empty_like(noise)
        for start in range(0, len(prompts), self.at_once):
            together = slice(start, start + self.at_once)
            for rows, conditions in by_length(self.conditions(prompts[together])):
                part = noise[together][rows]
                both = _link(conditions), _link(self.conditions([""] * len(part)))
                options = {"disable_pbar": True, "seed": seed + start}
                latents = comfy.sample.sample(model, part, *plan, *both, torch.zeros_like(part), **options)
                found[together][rows] = latents.cpu()
                if progress is not None:
                    progress(len(part))
        return self.base.model.process_latent_in(found).float()

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """`[N, 3, H, W]` in [0, 1], on the CPU."""
        decoded = self.base.vae.decode(self.base.model.process_latent_out(latents))
        # Of films, which such a decoder gives, they are the only frame.
        decoded = decoded.reshape(len(latents), *decoded.shape[-3:])
        return decoded.movedim(-1, 1)[:, :3].clamp(0, 1).float().cpu()


def _link(conditions: Conditions) -> list:
    """What travels on a CONDITIONING link of the host."""
    others = dict(conditions)
    return [[others.pop("cross_attn"), others]]
