"""Layers of a diffusion model that compute with masked weights, for the duration of a block.

The weight comes through the host's own cast, so LoRA patches, casts and offloading have acted before; nothing is stored
into it, and after the block nothing is left on the model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..masks.call import Call
from ..masks.linear import computing_dtype, masked_linear
from ..masks.sources import MaskOf, MaskSource
from .shadow import Shadowed

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What computes instead of a linear layer, from its input, its weight as the host presents it, and its bias."""
Observer = Callable[[str, Tensor], None]
"""Called with the name of a layer and a mask that acts on it, [out, in] or [B, out, in]."""


def replaced_linears(modules: Mapping[str, nn.Module], linears: Mapping[str, Linear]) -> Shadowed:
    """The named layers compute by `linears` inside the block. modules: of the diffusion model, by name."""
    from comfy.ops import cast_bias_weight, uncast_bias_weight

    def forward(module: nn.Module, linear: Linear, x: Tensor, *_, **__) -> Tensor:
        # The host casts weights to the dtype of the input, which inside of autocast is not what they are used in.
        x = x.to(computing_dtype(x))
        weight, bias, offload_stream = cast_bias_weight(module, x, offloadable=True)
        try:
            return linear(x, weight, bias)
        finally:
            uncast_bias_weight(module, weight, bias, offload_stream)

    # A mixed-precision layer keeps its input unquantised where the cast is forced.
    always = {"comfy_cast_weights": True, "comfy_force_cast_weights": True}
    return Shadowed(
        (modules[name], always | {"forward_comfy_cast_weights": partial(forward, modules[name], linear)})
        for name, linear in linears.items()
    )


def _masked(name: str, call: Call, masks: Sequence[tuple[MaskOf, float]], observe: Observer | None) -> Linear:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        acting = [(mask, strength) for mask_of, strength in masks if (mask := mask_of(name, weight)) is not None]
        if observe is not None:
            for mask, _ in acting:
                if isinstance(mask, Tensor):
                    observe(name, mask)
        return masked_linear(x, weight, bias, acting, call.tokens, name)

    return linear


@contextlib.contextmanager
def masked(
    modules: Mapping[str, nn.Module],
    sources: Sequence[tuple[MaskSource, float]],
    call: Call | None = None,
    observe: Observer | None = None,
) -> Iterator[None]:
    """Masks act on a diffusion model inside the block, and leave no trace after it, however it ends.

    modules: of the diffusion model, by name. sources: (source, strength); several on one layer act as the product of
    their masks, and at most one of them learns. observe: called with each mask that is given. Training keeps the block
    open around forward and backward, because checkpointing runs layers again in the backward pass.
    """
    call = Call() if call is None else call
    masks: dict[str, list[tuple[MaskOf, float]]] = {}
    anchors: dict[str, str] = {}
    for source, strength in sources:
        mask_of = source.begin(call)
        for block in source.structure.blocks:
            anchors[block.name] = block.anchor
            for layer in block.layers:
                masks.setdefault(layer.name, []).append((mask_of, strength))
    linears = {name: _masked(name, call, of_layer, observe) for name, of_layer in masks.items()}
    with contextlib.ExitStack() as stack:
        for block, anchor in anchors.items():

            def entered(module: nn.Module, inputs: tuple, block: str = block) -> None:
                call.enter(block, inputs[0], inputs[1])

            stack.callback(modules[anchor].register_forward_pre_hook(entered).remove)
        stack.enter_context(replaced_linears(modules, linears))
        yield


def modules_of(diffusion_model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name. To find a layer takes longer than to mask it: look once for many calls."""
    return dict(diffusion_model.named_modules())


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
