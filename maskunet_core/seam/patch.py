"""The seam to ComfyUI: masks reach the weights for the duration of one call of the diffusion model.

One DIFFUSION_MODEL wrapper serves all mask sources of a MODEL. It shadows the cast path of each masked layer on the
instance, takes the weight through the host's own cast (so LoRA patches, casts and offloading come first), and removes
everything in `finally`: between two calls nothing of it is left on the model.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MaskUNetError
from ..masks.linear import linear_per_sample, masked_weight
from ..masks.sources import Call, LearningSource, MaskSource
from ..models.structure import Structure, family_name, inspect_model

OPTION = "maskunet"
"""Key of the attachments in `transformer_options`, and of the wrapper and additional models on the MODEL."""
ENCODER = "maskunet_encoder"
"""Key of an EncoderCache or LiveEncoder in `transformer_options`, which then serves the encoder of every call."""
RECORDER = "maskunet_recorder"
"""Key of a Recorder in `transformer_options`, which is then told the masks of every call."""


@dataclass(frozen=True)
class Attachment:
    """A mask source on a MODEL. start_sigma, end_sigma: it is active at `start_sigma >= sigma >= end_sigma`."""

    source: MaskSource | LearningSource
    strength: float = 1.0
    start_sigma: float = math.inf
    end_sigma: float = 0.0

    def active_at(self, sigma: float) -> bool:
        return self.start_sigma >= sigma >= self.end_sigma


@contextlib.contextmanager
def shadowed(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Sets instance attributes and puts back what was there."""
    before = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
    module.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)


Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What computes instead of a linear layer, from its input, its weight as the host presents it, and its bias."""


@contextlib.contextmanager
def replaced_linears(diffusion_model: nn.Module, linears: Mapping[str, Linear]) -> Iterator[None]:
    """The named layers of `diffusion_model` compute by `linears` inside the block, and by themselves after it."""
    from comfy.ops import cast_bias_weight, uncast_bias_weight

    def forward_of(module: nn.Module, linear: Linear):
        def forward(x: Tensor, *_, **__) -> Tensor:
            weight, bias, offload_stream = cast_bias_weight(module, x, offloadable=True)
            try:
                return linear(x, weight, bias)
            finally:
                uncast_bias_weight(module, weight, bias, offload_stream)

        return forward

    with contextlib.ExitStack() as stack:
        for name, linear in linears.items():
            module = diffusion_model.get_submodule(name)
            # A mixed-precision layer keeps its input unquantised where the cast is forced.
            attributes = {"comfy_cast_weights": True, "comfy_force_cast_weights": True}
            attributes["forward_comfy_cast_weights"] = forward_of(module, linear)
            stack.enter_context(shadowed(module, **attributes))
        yield


Observer = Callable[[str, Tensor], None]
"""Is told the name of a layer and a mask that acts on it, [out, in] or [B, out, in]."""


def _masked_linear(
    name: str, masks: Sequence[tuple[Any, float]], learning: Any, observe: Observer | None = None
) -> Linear:
    """The weight times all its masks (`[(mask function, strength)]`), through the layer of a `LearningSource`."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for mask_of, strength in masks:
            mask = mask_of(name, weight)
            if mask is not None:
                weight = masked_weight(weight, mask, strength)
                if observe is not None:
                    observe(name, mask)
        if learning is None:
            return linear_per_sample(x, weight, bias)
        return learning(name, x, weight, bias)

    return linear


def _announcer(call: Call, block: str):
    def announce(module: nn.Module, inputs: tuple) -> None:
        call.enter(block, inputs[0], inputs[1])

    return announce


@contextlib.contextmanager
def installed(
    diffusion_model: nn.Module,
    sources: Sequence[tuple[MaskSource | LearningSource, float]],
    sigma: float | None = None,
    guidance: tuple[int, ...] = (0,),
    observe: Observer | None = None,
) -> Iterator[None]:
    """Masks act on `diffusion_model` inside the block, and leave no trace after it, however it ends.

    sources: (source, strength); several on one layer act as the product of their masks. At most one of them is a
    `LearningSource`, whose strength is 1. observe: sees each mask of the others. Training keeps the block open
    around forward and backward, because checkpointing runs layers again in the backward pass.
    """
    call = Call(sigma, guidance)
    masks: dict[str, list] = {}
    learning: dict[str, Any] = {}
    anchors: dict[str, str] = {}
    for source, strength in sources:
        acting = source.begin(call)
        for block in source.structure.blocks:
            anchors[block.name] = block.anchor
            for layer in block.layers:
                if source.learning:
                    learning[layer.name] = acting
                else:
                    masks.setdefault(layer.name, []).append((acting, strength))
    names = [*masks, *(name for name in learning if name not in masks)]
    linears = {name: _masked_linear(name, masks.get(name, ()), learning.get(name), observe) for name in names}
    with contextlib.ExitStack() as stack:
        for block, anchor in anchors.items():
            handle = diffusion_model.get_submodule(anchor).register_forward_pre_hook(_announcer(call, block))
            stack.callback(handle.remove)
        stack.enter_context(replaced_linears(diffusion_model, linears))
        yield


@torch._dynamo.disable(recursive=False)
def _wrapper(executor, *args, **kwargs):
    """DIFFUSION_MODEL wrapper: the diffusion model's call, with the masks that are active at its sigma."""
    options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[5]
    sigma = float(options["sigmas"].max())
    active = [(a.source, a.strength) for a in options.get(OPTION, ()) if a.active_at(sigma)]
    cache, recorder = options.get(ENCODER), options.get(RECORDER)
    unet, guidance = executor.class_obj, tuple(options.get("cond_or_uncond", (0,)))
    observe = None if recorder is None else recorder.begin(sigma, guidance, len(args[0]))
    if not active and cache is None:
        return executor(*args, **kwargs)
    with contextlib.ExitStack() as stack:
        if cache is not None:
            key = (guidance, tuple(options.get("uuids", ())), tuple(args[0].shape))
            stack.enter_context(cache.serving(unet, key))
        if active:
            stack.enter_context(installed(unet, active, sigma, guidance, observe))
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
    if start_percent > end_percent:
        raise MaskUNetError(
            f"start_percent ({start_percent}) lies after end_percent ({end_percent}), so the masks would never act. "
            "Set start_percent to the smaller of the two."
        )
    if strength == 0.0:
        return model.clone()
    patched = enabled(model)
    sampling = model.get_model_object("model_sampling")
    window = sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent)
    patched.model_options = with_attachment(patched.model_options, Attachment(source, strength, *window))
    if weights is not None:
        others = patched.get_additional_models_with_key(OPTION)
        patched.set_additional_models(OPTION, [*others, weights])
    return patched


def enabled(model):
    """A clone of a MODEL on which attachments in its options act."""
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    if not patched.get_wrappers(WrappersMP.DIFFUSION_MODEL, OPTION):
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, OPTION, _wrapper)
    return patched


def with_attachment(model_options: dict[str, Any], attachment: Attachment) -> dict[str, Any]:
    """The options of a MODEL, or of a call of its sampler, with one attachment more; the given ones are left alone."""
    options = model_options.get("transformer_options", {})
    return model_options | {"transformer_options": options | {OPTION: (*options.get(OPTION, ()), attachment)}}


def presented_weights(model) -> Callable[[str], Tensor]:
    """Loads a MODEL; gives a layer's weight [out, in] float32 as the host presents it: LoRAs merged, dequantised."""
    from comfy.model_management import load_models_gpu
    from comfy.ops import cast_bias_weight, uncast_bias_weight

    load_models_gpu([model])

    def weight_of(layer: str) -> Tensor:
        module = model.model.diffusion_model.get_submodule(layer)
        weight, bias, offload_stream = cast_bias_weight(
            module, dtype=torch.float32, bias_dtype=torch.float32, device=model.load_device, offloadable=True
        )
        try:
            # What the host lent may be the module's own weight, or a buffer that it uses again.
            return weight.detach().clone()
        finally:
            uncast_bias_weight(module, weight, bias, offload_stream)

    return weight_of
