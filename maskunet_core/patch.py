"""The seam to ComfyUI: masks reach the weights for the duration of one call of the diffusion model.

One DIFFUSION_MODEL wrapper serves all mask sources of a MODEL. It shadows the cast path of each masked layer on the
instance, takes the weight through the host's own cast (so LoRA patches, casts and offloading come first), and removes
everything in `finally`: between two calls nothing of it is left on the model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import MaskUNetError
from .families import Structure, family_name, inspect_model
from .masked_linear import linear_per_sample, masked_weight
from .sources import Call, MaskSource

OPTION = "maskunet"
"""Key of the attachments in `transformer_options`, and of the wrapper and additional models on the MODEL."""


@dataclass(frozen=True)
class Attachment:
    """A mask source on a MODEL. start_sigma, end_sigma: it is active at `start_sigma >= sigma >= end_sigma`."""

    source: MaskSource
    strength: float
    start_sigma: float
    end_sigma: float

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


def _masked_linear(name: str, masks: Sequence[tuple[Any, float]]) -> Linear:
    """The weight times all its masks (`[(mask function, strength)]`)."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        masked = weight
        for mask_of, strength in masks:
            mask = mask_of(name, weight)
            if mask is not None:
                masked = masked_weight(masked, mask, strength)
        return linear_per_sample(x, masked, bias)

    return linear


def _recomputed(linear: Linear) -> Linear:
    """Keeps the layer's input for the backward pass, and makes mask and masked weight anew there.

    Kept, they would be the size of all masked weights times the batch.
    """

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return checkpoint(linear, x, weight, bias, use_reentrant=False)

    return forward


def _announcer(call: Call, block: str):
    def announce(module: nn.Module, inputs: tuple) -> None:
        call.enter(block, inputs[0], inputs[1])

    return announce


@contextlib.contextmanager
def installed(
    diffusion_model: nn.Module,
    sources: Sequence[tuple[MaskSource, float]],
    sigma: float | None = None,
    branches: int = 1,
) -> Iterator[None]:
    """Masks act on `diffusion_model` inside the block, and leave no trace after it, however it ends.

    sources: (source, strength); several on one layer act as the product of their masks. sigma, branches: see `Call`.
    Training keeps the block open around forward and backward, because checkpointing runs layers again in the backward
    pass.
    """
    call = Call(sigma, branches)
    masks: dict[str, list] = {}
    anchors: dict[str, str] = {}
    for source, strength in sources:
        mask_of = source.begin(call)
        for block in source.structure.blocks:
            anchors[block.name] = block.anchor
            for layer in block.layers:
                masks.setdefault(layer.name, []).append((mask_of, strength))
    linears = {name: _masked_linear(name, of_layer) for name, of_layer in masks.items()}
    if any(source.trainable for source, _ in sources):
        linears = {name: _recomputed(linear) for name, linear in linears.items()}
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
    if not active:
        return executor(*args, **kwargs)
    branches = len(options.get("cond_or_uncond", (0,)))
    with installed(executor.class_obj, active, sigma, branches):
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
    patched = model.clone()
    if strength == 0.0:
        return patched
    from comfy.patcher_extension import WrappersMP

    sampling = model.get_model_object("model_sampling")
    attachment = Attachment(
        source, strength, sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent)
    )
    options = patched.model_options.setdefault("transformer_options", {})
    if OPTION not in options:
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, OPTION, _wrapper)
    options[OPTION] = (*options.get(OPTION, ()), attachment)
    if weights is not None:
        others = patched.get_additional_models_with_key(OPTION)
        patched.set_additional_models(OPTION, [*others, weights])
    return patched
