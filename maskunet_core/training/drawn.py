"""Pictures of prompts by a base's own sampler, one after another."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import BaseModel
from .seeds import seeded


def _conditioning(base: BaseModel, prompt: str) -> list:
    found = {key: value[None] for key, value in base.encode_text(prompt).items()}
    return [[found.pop("cross_attn"), found]]


@torch.no_grad()
def drawn(
    base: BaseModel,
    patcher: Any,
    wanted: Sequence[tuple[str, int]],
    *,
    size: tuple[int, int],
    steps: int,
    cfg: float,
) -> Iterator[Tensor]:
    """A picture `[height, width, 3]` in [0, 1] for each (prompt, seed), by the base's sampler, one after another.

    size: (width, height).
    """
    import comfy.sample

    # All texts first: text encoder and U-Net need not lie in memory together.
    conditionings = {prompt: _conditioning(base, prompt) for prompt in {"", *(prompt for prompt, _ in wanted)}}
    for prompt, seed in wanted:
        latent = torch.zeros(1, *base.latent_shape(*size))
        noise = torch.randn(latent.shape, generator=seeded(41, seed))
        both = conditionings[prompt], conditionings[""]
        options = {"disable_pbar": True, "seed": seed}
        found = comfy.sample.sample(patcher, noise, steps, cfg, *base.sampler, *both, latent, **options)
        # Models of films give a film of one picture.
        yield base.vae.decode(found).flatten(0, -4)[0, ..., :3].clamp(0, 1).cpu()
