"""A sampling run of the host as what looks into it must know it: its steps, its memory, what other nodes do in it."""

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import MaskUNetError
from .attach import OPTION
from .saved import writable

SEARCH = "maskunet_search"
"""Of the wrappers of a search for masks, and of its additional models on the MODEL."""
_OWN = {OPTION, SEARCH}


class NoRoomForGradients(MaskUNetError):
    """The device's memory does not hold what a search needs beside the models; the message says what to lower."""


def step_of(sigma: float, model_options: dict) -> tuple[int, int]:
    """The sampler's step that is nearest to `sigma`, counted from 0, and how many there are."""
    sigmas = model_options["transformer_options"]["sample_sigmas"]
    return int((sigmas[:-1] - sigma).abs().argmin()), len(sigmas) - 1


def loaded_with_room(room: int, executor, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
    """PREPARE_SAMPLING wrapper: the host loads the models of a run, and leaves `room` bytes more than it would.

    It plans by the size of the latents, so it is told of more of them. It loads in inference mode, as it always does,
    although a search runs outside of it: what a model registers anew while it is loaded there could not be moved again
    in the inference mode of the next graph.
    """
    planned = model.model.memory_required([2 * shape[0], *shape[1:]])
    images = shape[0] + math.ceil(shape[0] * room / max(planned, 1)) if room else shape[0]
    with torch.inference_mode():
        return executor(model, [images, *shape[1:]], *args, **kwargs)


_AROUND_THE_MODEL = {
    "context_handler",
    "model_function_wrapper",
    "sampler_calc_cond_batch_function",
    "sampler_cfg_function",
    "sampler_post_cfg_function",
    "sampler_pre_cfg_function",
}
"""What other nodes put into the options of a MODEL to act between its network and the estimate."""


def mutable(model_options: dict[str, Any], writes_in_place: bool = False) -> contextlib.AbstractContextManager:
    """Around forward and backward pass: other nodes, where they act, may write into what autograd keeps, as some models
    do themselves."""
    from comfy.patcher_extension import WrappersMP

    options = model_options["transformer_options"]
    kinds = (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL)
    wrapped = {key for kind in kinds for key in options.get("wrappers", {}).get(kind, {})} - _OWN
    foreign = acts_in_blocks(options) or wrapped or _AROUND_THE_MODEL & model_options.keys()
    if not (foreign or writes_in_place):
        return contextlib.nullcontext()
    return writable()


def acts_in_blocks(options: dict[str, Any]) -> bool:
    """Whether anything of other nodes acts inside the blocks of a U-Net, or in place of them, in a call with these
    `transformer_options`: what it does may differ between calls with the same input."""
    from comfy.patcher_extension import WrappersMP

    wrappers = options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
    foreign = [key for key, found in wrappers.items() if found and key not in _OWN]
    return bool(foreign or any(options.get("patches", {}).values()) or any(options.get("patches_replace", {}).values()))


def joins_branches(model_options: dict[str, Any], conditions: Iterable[Any]) -> bool:
    """Whether the branches of guidance may have to be computed together: other nodes may act on both at once."""
    from comfy.patcher_extension import WrappersMP

    options = model_options.get("transformer_options", {})
    wrappers = options.get("wrappers", {})
    around = [
        key
        for kind in (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL)
        for key, found in wrappers.get(kind, {}).items()
        if found and key not in _OWN
    ]
    others = {"model_function_wrapper", "context_handler", "multigpu_clones"} & model_options.keys()
    return bool(around or others or acts_in_blocks(options) or has_hooks(conditions))


def has_hooks(conditions: Iterable[Any]) -> bool:
    """Whether one of the conditionings changes the model's weights while it is computed."""
    return any("hooks" in entry for condition in conditions for entry in condition or ())


def controls_of(conditions: Iterable[Any]) -> list[Any]:
    """The ControlNets of conditionings, also those in front of others."""
    controls = {}
    for control in (entry.get("control") for condition in conditions for entry in condition or ()):
        while control is not None:
            controls[id(control)] = control
            control = control.previous_controlnet
    return list(controls.values())
