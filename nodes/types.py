"""What MaskUNet's nodes hand to each other, and inputs that several of them have."""

from typing import Any

import comfy.samplers
from comfy_api.latest import io

MaskUNetType = io.Custom("MASKUNET")
RewardType = io.Custom("MASKUNET_REWARD")
JudgeType = io.Custom("MASKUNET_JUDGE")
MasksType = io.Custom("MASKUNET_MASKS")
WordsType = io.Custom("MASKUNET_WORDS")


def strength_input() -> io.Input:
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.0,
        max=2.0,
        step=0.01,
        tooltip="How much of a masked weight is removed: 1 removes all of it, 0.5 half, 0 nothing (the stock model). "
        "Above 1 its sign turns.",
    )


def window_inputs(acts: str = "the masks act") -> list[io.Input]:
    """start_percent and end_percent, as in ControlNet's nodes. acts: what does so between them."""
    return [
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip=f"From where in sampling {acts}: 0 is the first step (pure noise), 1 the end.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip=f"Up to where in sampling {acts}. Outside the two the model runs as without, at full speed.",
        ),
    ]


def seed_input(tooltip: str, fixed: bool = False, **options: Any) -> io.Input:
    """fixed: a new node keeps its seed from run to run, where the host knows that choice."""
    kinds = getattr(io, "ControlAfterGenerate", None)
    control = kinds.fixed if fixed and kinds else True
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        step=1,
        control_after_generate=control,
        tooltip=tooltip,
        **options,
    )


def ksampler_inputs(
    seed: str, steps: int, fewest: int, sampler: str, about_samplers: str, scheduler: str, shown: str
) -> list[io.Input]:
    """KSampler's, from seed to negative: tooltips of seed and sampler_name, defaults, and what the prompts show."""
    return [
        seed_input(seed),
        io.Int.Input("steps", default=steps, min=fewest, max=10000, step=1, tooltip="Steps of the sampler."),
        io.Float.Input(
            "cfg",
            default=7.5,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Classifier-free guidance, as in KSampler.",
        ),
        io.Combo.Input(
            "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default=sampler, tooltip=about_samplers
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            default=scheduler,
            tooltip="How noise is removed over the steps.",
        ),
        io.Conditioning.Input("positive", tooltip=f"What the {shown} should show."),
        io.Conditioning.Input("negative", tooltip="What it should not show."),
    ]
