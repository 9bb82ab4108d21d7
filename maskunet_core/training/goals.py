"""What a training is for, instead of twenty numbers."""

import dataclasses
import math

from ..models.families.unet import UNET
from .base import BaseModel
from .settings import Generator, Loop, Optimiser, Pictures, Settings, Validation

_GENERATOR = Generator(rank=8, width=256, bias="weight", start=1.0)
_CROSSINGS = 8.0
"""How often over a logit that moves by the whole rate at each step comes from its start to the threshold."""

_FEW_PICTURES = Settings(
    generator=_GENERATOR,
    loop=Loop(steps=800, batch=4, accumulate=4, checkpointing=True),
    validation=Validation(pictures=2),
)
GOALS = {
    "subject": dataclasses.replace(_FEW_PICTURES, data=Pictures(flip=False, caption_dropout=0.0)),
    "style": _FEW_PICTURES,
    "general": Settings(
        generator=_GENERATOR,
        loop=Loop(steps=4000, batch=8, accumulate=4, checkpointing=True, min_snr=5.0),
        validation=Validation(pictures=64),
    ),
}
"""`subject` and `general` have the numbers of the trainer's presets `dreambooth` and `sd15`."""


def usual_resolution(base: BaseModel) -> int:
    """Side of the square pictures that a model is made for, in pixels."""
    if base.name in ("the MaskUNet toy model", "the MaskUNet toy transformer"):
        return 64
    return 512 if base.family is UNET and not base.model.adm_channels else 1024


def settings_of(
    goal: str,
    steps: int,
    seed: int,
    targets: str,
    resolution: int,
    batch: int = 0,
    rate: float = 0.0,
    held_out: int = -1,
) -> Settings:
    """A goal's numbers for so many steps.

    batch, rate (of the biases; the rest learns at a tenth of it), held_out: 0, 0 and -1 for the goal's own. In few
    steps the biases learn faster than the goal says: a logit moves by about the rate at each step, and has to reach
    the threshold.
    """
    chosen = GOALS[goal]
    rate = rate or max(chosen.optimiser.lr_bias, _CROSSINGS * chosen.generator.start / steps)
    batch = batch or chosen.loop.batch
    loop = dataclasses.replace(chosen.loop, steps=steps, batch=batch)
    # Small pictures are no burden: all of a batch at once, and nothing twice.
    small = resolution < 256
    parts = 1 if small else math.gcd(batch, loop.accumulate)
    loop = dataclasses.replace(loop, accumulate=parts, checkpointing=not small)
    pictures = chosen.validation.pictures if held_out < 0 else held_out
    return dataclasses.replace(
        chosen,
        seed=seed,
        targets=targets,
        optimiser=Optimiser(lr=rate / 10, lr_bias=rate),
        loop=loop,
        validation=Validation(pictures=pictures, every=max(1, steps // 8)),
    )
