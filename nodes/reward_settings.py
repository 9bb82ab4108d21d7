"""What the reward sampler's presets leave to the person at the graph."""

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..maskunet_core.choices import BRANCHES
from ..maskunet_core.errors import MaskUNetError
from ..maskunet_core.search.settings import OPTIMISERS, PRESETS, SearchSettings

CUSTOM = "custom"
_OPEN = SearchSettings()
_FOLDED = {"optional": True, "advanced": True, "extra_dict": {"shown_with": {"preset": CUSTOM}}}
"""The newer way of drawing nodes folds advanced inputs away; nodes/web/maskunet.js hides these in both ways."""


_QUALITY, _FEW_STEP, _REFERENCE = PRESETS["quality"], PRESETS["few_step"], PRESETS["reference"]
PRESETS_IN_WORDS = {
    "fast": f"the best of {PRESETS['fast'].candidates} starting noises, without masks. Costs about 4 plain images.",
    "quality": f"the best of {_QUALITY.candidates}, then masks, {_QUALITY.iterations} updates at each step of the "
    "second half. About 15 plain images.",
    "few_step": "for distilled models (Turbo, LCM, Lightning) at 1 to 8 steps and CFG 1: the best of "
    f"{_FEW_STEP.candidates}, then {_FEW_STEP.iterations} updates at the last step. About 25 of their images of 4 "
    "steps.",
    CUSTOM: f"the settings that appear below; {_OPEN.iterations} updates at each step unless you change them.",
    "paper": f"the paper's schedule, {PRESETS['paper'].iterations} updates at each step. The dearest by far.",
    "reference": f"the schedule of the authors' release, {_REFERENCE.early_iterations} update at each step of the "
    f"first half and {_REFERENCE.iterations} at each later one.",
}
"""In the order of use. Prices: operations on SD 1.5's shapes, 15 steps (trainer/reward_compare/README.md)."""


_DISTILLED_CFG = 2.0
"""Above this guidance, pictures of distilled models burn; published ones ask for 1 to 2."""


def advice_on(preset: str, cfg: float) -> str:
    """What speaks against a preset with this guidance, in a sentence, or nothing."""
    if preset == "few_step" and cfg > _DISTILLED_CFG:
        return f"few_step is for distilled models at CFG 1, but cfg is {cfg:g}. For other models take fast or quality."
    return ""


def _of_custom(text: str) -> str:
    return f"{text} Counts where the preset is 'custom'."


def custom_inputs() -> list[io.Input]:
    """The settings that a preset fixes."""

    def number(name: str, low: float, high: float, step: float, tooltip: str) -> io.Input:
        value = getattr(_OPEN, name)
        options = {"default": value, "min": low, "max": high, "step": step, "tooltip": _of_custom(tooltip)}
        kind = io.Int if isinstance(value, int) else io.Float
        return kind.Input(name, **_FOLDED, **options)

    return [
        number(
            "iterations", 0, 200, 1, "Updates of the masks at each step. More follow the reward further and cost more."
        ),
        number(
            "start_percent",
            0.0,
            1.0,
            0.01,
            "Where updates begin: 0 is the first step, 1 the last. The first steps, of pure noise, tell a reward "
            "little.",
        ),
        number(
            "end_percent",
            0.0,
            1.0,
            0.01,
            "Where updates end: 0 is the first step, 1 the last. Late updates can please the reward without a better "
            "image.",
        ),
        io.Combo.Input(
            "optimiser",
            options=list(OPTIMISERS),
            default=_OPEN.optimiser,
            **_FOLDED,
            tooltip=_of_custom(
                "Normalised SGD flips the bits that matter most. AdamW, the paper's, moves all "
                "logits by the same amount."
            ),
        ),
        number("lr", 0.0, 10.0, 0.001, "Learning rate, in units of logits, which begin at `start`."),
        number("momentum", 0.0, 0.99, 0.01, "Momentum of normalised SGD."),
        number("start", -5.0, 10.0, 0.01, "Logit that every weight begins with; those above 0 are kept."),
        io.Boolean.Input(
            "noise",
            default=_OPEN.noise,
            **_FOLDED,
            tooltip=_of_custom("Gumbel noise on the logits, as in the paper."),
        ),
        number("clip", 0.0, 100.0, 0.01, "Bound of the gradient's norm per image, 0 for none."),
        number("carry", 0.0, 1.0, 0.01, "Share of what was learned at a step that the next begins with."),
        number(
            "patience",
            0,
            100,
            1,
            "Updates of a step without a better reward before the step is taken; the reward often "
            "falls before it climbs, so at least 6. 0 for no limit.",
        ),
        number(
            "views",
            0,
            16,
            1,
            "Shifted, blurred and noised copies of the image that the reward is averaged over, which "
            "makes it harder to cheat. Each costs one more pass of the reward.",
        ),
        io.Combo.Input(
            "branches",
            options=list(BRANCHES),
            default=_OPEN.branches,
            **_FOLDED,
            tooltip=_of_custom(
                "Branches of classifier-free guidance that are masked. The positive one alone costs half."
            ),
        ),
        io.Boolean.Input(
            "small_decode",
            default=_OPEN.small_decode,
            **_FOLDED,
            tooltip=_of_custom("Decode estimates no larger than the reward looks at: much cheaper for large images."),
        ),
        number(
            "latent_lr",
            0.0,
            1.0,
            0.001,
            "Changes the noisy latent itself at each step, too, with this learning rate, for instance 0.03. 0 "
            "leaves it alone. Masks alone do not record it.",
        ),
        number(
            "candidate_percent",
            0.05,
            1.0,
            0.01,
            "Share of the steps after which candidates are judged, by an estimate of the finished image. On the toy "
            "model 0.6 chooses as well as 1. Without masks they are always drawn to the end.",
        ),
    ]


def chosen_settings(
    preset: str, candidates: int, target: float, custom: dict[str, Any], **others: Any
) -> SearchSettings:
    """Of a preset of PRESETS, or CUSTOM with the values of `custom_inputs`; 0 candidates are as many as that says.

    Raises MaskUNetError where the percents are not in order.
    """
    settings = replace(_OPEN, **custom) if preset == CUSTOM else PRESETS[preset]
    if settings.start_percent > settings.end_percent:
        raise MaskUNetError(
            f"start_percent ({settings.start_percent}) lies after end_percent ({settings.end_percent}), so no update "
            "would be made. Set start_percent to the smaller of the two."
        )
    return replace(settings, candidates=candidates or settings.candidates, target=target or None, **others)
