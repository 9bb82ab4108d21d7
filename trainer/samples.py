"""Pictures of prompts with a method off and on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskunet_core.files import checkpoint
from maskunet_core.masks.sources import GeneratorMasks
from maskunet_core.replacing import replacing
from maskunet_core.seam.attach import attach, structure_of
from maskunet_core.training.base import BaseModel
from maskunet_core.training.drawn import drawn

from .base import load_base
from .choices import TOY_RESOLUTION
from .config import Base
from .sheets import side_by_side


def draw_prompts(
    base: BaseModel, patcher: Any, prompts: Sequence[str], *, size: int, seed: int, steps: int, cfg: float
) -> Tensor:
    """Pictures `[N, size, size, 3]` in [0, 1] by the base's sampler; picture n has the seed `seed + n`."""
    wanted = [(prompt, seed + number) for number, prompt in enumerate(prompts)]
    return torch.stack(list(drawn(base, patcher, wanted, size=(size, size), steps=steps, cfg=cfg)))


def sample(settings: Base, generator: Path, prompts: Sequence[str], output: Path, seed: int, steps: int) -> Path:
    """Write a sheet of the prompts without (left) and with a generator. Raises MaskUNetError for unfit files."""
    loaded = checkpoint.load(generator)
    base = load_base(settings)
    loaded.require_fit(structure_of(base.patcher, loaded.targets))
    patched = attach(base.patcher, GeneratorMasks(loaded.generator), 1.0, 0.0, 1.0)
    options = {"size": _side(settings), "seed": seed, "steps": steps, "cfg": 7.5}
    pictures = [draw_prompts(base, model, prompts, **options) for model in (base.patcher, patched)]
    with replacing(output) as temporary:
        side_by_side(prompts, *pictures).save(temporary, format="PNG")
    return output


def sample_word(settings: Base, file: Path, prompts: Sequence[str], output: Path, seed: int, steps: int) -> Path:
    """Write a sheet of prompts with `{}` as what a learned word began with (left) and as the word."""
    from .embedding.word import word_of

    base = load_base(settings)
    word = word_of(file, base)
    options = {"size": _side(settings), "seed": seed, "steps": steps, "cfg": 7.5}
    pictures = []
    for vectors in (word.start, dict(word.vectors)):
        with word.held_at(vectors), word.known():
            pictures.append(draw_prompts(base, base.patcher, list(map(word.prompt, prompts)), **options))
    with replacing(output) as temporary:
        side_by_side(prompts, *pictures, ("its start", f"embedding:{word.name}")).save(temporary, format="PNG")
    return output


def _side(settings: Base) -> int:
    """Of the pictures, in pixels."""
    return TOY_RESOLUTION if settings.is_toy else 512
