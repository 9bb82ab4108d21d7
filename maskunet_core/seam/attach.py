"""The seam to ComfyUI: masks reach the weights for the duration of one call of the diffusion model.

One wrapper around its calls serves all mask sources of a MODEL; between two calls nothing of it is left on the model.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..masks.call import Call
from ..masks.sources import MaskSource
from ..models.families import family_of
from ..models.structure import Structure, family_name, inspect_model
from .layers import masked
from .run import RUN, Run
from .window import acts_at, is_whole, require_order

OPTION = "maskunet"
"""Key of the attachments in `transformer_options`, and of the wrappers and additional models on the MODEL."""
RECORDER = "maskunet_recorder"
"""Key of a Recorder in `transformer_options`, which then sees the masks of every call."""


@dataclass(frozen=True)
class Attachment:
    """A mask source on a MODEL, active from `start_percent` to `end_percent` of the sampling schedule.

    sampling: the host's schedule where a call does not know that of its run.
    """

    source: MaskSource
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    sampling: Any = None

    def active_in(self, call: Call) -> bool:
        if is_whole(self.start_percent, self.end_percent):
            return True
        sampling = call.sampling or self.sampling
        sigma = call.sigma
        if sampling is None or sigma is None:
            return True
        return acts_at(sigma, sampling, self.start_percent, self.end_percent)


def options_of(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The `transformer_options` among the arguments of a diffusion model, whose place differs between models."""
    if "transformer_options" in kwargs:
        return kwargs["transformer_options"]
    return next((a for a in reversed(args) if isinstance(a, dict) and "sigmas" in a), {})


@torch.compiler.disable(recursive=False)
def _masked_call(executor, *args, **kwargs):
    """DIFFUSION_MODEL or APPLY_MODEL wrapper: the diffusion model's call, with the masks that are active in it."""
    options = options_of(args, kwargs)
    attachments, recorder = options.get(OPTION, ()), options.get(RECORDER)
    if not attachments and recorder is None:
        return executor(*args, **kwargs)
    run = options.get(RUN) or Run()
    call = run.call(options, len(args[0]))
    active = [(a.source, a.strength) for a in attachments if a.active_in(call)]
    with contextlib.ExitStack() as stack:
        observe = None if recorder is None else stack.enter_context(recorder.recording(call))
        if active:
            diffusion_model = getattr(executor.class_obj, "diffusion_model", executor.class_obj)
            stack.enter_context(masked(run.modules(diffusion_model), active, call, observe))
        return executor(*args, **kwargs)


def _known_run(executor, *args, **kwargs):
    """OUTER_SAMPLE wrapper: calls know their run. The host puts the guider's own options back afterwards."""
    guider = executor.class_obj
    guider.model_options = with_options(guider.model_options, {RUN: Run(guider)})
    return executor(*args, **kwargs)


def structure_of(model, targets: str) -> Structure:
    """The masked part of a MODEL (the host's ModelPatcher). Raises NothingToMask."""
    base = model.model
    return inspect_model(base.diffusion_model, targets, family_name(base))


def attach(model, source: MaskSource, strength: float, start_percent: float, end_percent: float, weights=None):
    """A clone of a MODEL whose layers are masked by `source`; the original is left alone.

    At strength 0 the clone is not patched at all. weights: ModelPatcher of the source's own weights, which the host
    then loads and offloads beside the model. Raises MaskUNetError where the percents are not in order.
    """
    require_order(start_percent, end_percent, "the masks")
    if strength == 0.0:
        return model.clone()
    patched = with_masks(model)
    attachment = Attachment(source, strength, start_percent, end_percent, model.get_model_object("model_sampling"))
    patched.model_options = with_attachment(patched.model_options, attachment)
    others = patched.get_additional_models_with_key(OPTION)
    if weights is not None and not any(weights.is_clone(other) for other in others):
        patched.set_additional_models(OPTION, [*others, weights])
    return patched


def with_masks(model):
    """A clone of a MODEL on which attachments in its options act."""
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    family = family_of(model.model.diffusion_model)
    around_calls = WrappersMP.DIFFUSION_MODEL if family is None else getattr(WrappersMP, family.wrapper)
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, _known_run), (around_calls, _masked_call)):
        if not patched.get_wrappers(kind, OPTION):
            patched.add_wrapper_with_key(kind, OPTION, wrapper)
    return patched


def with_options(model_options: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The options of a MODEL or of a call of its sampler, with more `transformer_options`. Changes no given dict."""
    return model_options | {"transformer_options": model_options.get("transformer_options", {}) | more}


def with_attachment(model_options: dict[str, Any], attachment: Attachment) -> dict[str, Any]:
    """The options of a MODEL, or of a call of its sampler, with one attachment more."""
    attachments = model_options.get("transformer_options", {}).get(OPTION, ())
    return with_options(model_options, {OPTION: (*attachments, attachment)})
