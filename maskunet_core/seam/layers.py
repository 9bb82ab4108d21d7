"""Layers of a diffusion model that compute with masked weights, for the duration of a block.

The weight comes through the host's own cast, so LoRA patches, casts and offloading have acted before; nothing is stored
into it, and after the block nothing is left on the model.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..masks.call import Call
from ..masks.linear import Mask, computing_dtype, masked_linear, masked_weight
from ..masks.sources import MaskOf, MaskSource
from ..models.families import family_of
from ..models.families.transformer import time_embedding
from ..models.structure import Layer
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


_Masks = Sequence[tuple[MaskOf, float]]
"""The masks and strengths of all sources for a layer."""


def _acting(layer: str, weight: Tensor, masks: _Masks, observe: Observer | None) -> list[tuple[Mask, float]]:
    acting = [(mask, strength) for mask_of, strength in masks if (mask := mask_of(layer, weight)) is not None]
    if observe is not None:
        for mask, _ in acting:
            if isinstance(mask, Tensor):
                observe(layer, mask)
    return acting


def _masked(name: str, call: Call, masks: _Masks, observe: Observer | None) -> Linear:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return masked_linear(x, weight, bias, _acting(name, weight, masks, observe), call.tokens, name)

    return linear


def _partly_masked(name: str, call: Call, parts: Sequence[tuple[Layer, _Masks]], observe: Observer | None) -> Linear:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = [(layer, _acting(layer.name, layer.part_of(weight), masks, observe)) for layer, masks in parts]
        given = [(layer, [m for m in masks if isinstance(m[0], Tensor)]) for layer, masks in found]
        learned = [(layer, m) for layer, masks in found for m in masks if not isinstance(m[0], Tensor)]
        if any(masks for _, masks in given):
            weight = _with_masked_parts(weight, given)
        if learned:
            return _with_learned_parts(x, weight, bias, learned, call.tokens, name)
        return masked_linear(x, weight, bias, (), call.tokens, name)

    return linear


def _with_learned_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    learned: Sequence[tuple[Layer, tuple[Mask, float]]],
    tokens: int,
    name: str,
) -> Tensor:
    """The product piece by piece: parts in which masks are learned, and what lies between them.

    They are all rows of the weight, or all columns of it.
    """
    by_rows = learned[0][0].rows is not None
    spans = {layer.rows if by_rows else layer.columns: mask for layer, mask in learned}
    ends = sorted({0, weight.shape[-2 if by_rows else -1], *(end for span in spans for end in span)})
    products = []
    for span in itertools.pairwise(ends):
        piece, masks = slice(*span), [spans[span]] if span in spans else ()
        if by_rows:
            terms = x, weight[..., piece, :], None if bias is None else bias[piece]
        else:
            terms = x[..., piece], weight[..., piece], None if products else bias
        products.append(masked_linear(*terms, masks, tokens, name))
    return torch.cat(products, -1) if by_rows else sum(products)


def _with_masked_parts(weight: Tensor, parts: Sequence[tuple[Layer, Sequence[tuple[Tensor, float]]]]) -> Tensor:
    """A copy of a weight [out, in] with given masks on parts of it, or one for each sample.

    The product is that of the whole weight, whose rounding a product of parts would not have.
    """
    samples = max((len(mask) for _, masks in parts for mask, _ in masks if mask.ndim == 3), default=None)
    # A part of a quantised weight is a copy: what is written into it is lost.
    factors = torch.ones(weight.shape, dtype=weight.dtype, device=weight.device)
    factors = factors if samples is None else factors.expand(samples, -1, -1).clone()
    for layer, masks in parts:
        part = layer.part_of(factors)
        for mask, strength in masks:
            part.copy_(masked_weight(part, mask, strength))
    return factors.mul_(weight)


@contextlib.contextmanager
def masked(
    modules: Mapping[str, nn.Module],
    sources: Sequence[tuple[MaskSource, float]],
    call: Call | None = None,
    observe: Observer | None = None,
) -> Iterator[None]:
    """Masks act on a diffusion model inside the block, and leave no trace after it, however it ends.

    modules: of the diffusion model, by name. sources: (source, strength); several on one layer act as the product of
    their masks, and at most one of them learns. call: without noise levels of its own it takes those that the diffusion
    model is called with. observe: called with each mask that is given. Training keeps the block open around forward and
    backward, because checkpointing runs layers again in the backward pass.
    """
    call = Call() if call is None else call
    masks: dict[str, tuple[Layer, list[tuple[MaskOf, float]]]] = {}
    anchors: dict[str, str] = {}
    for source, strength in sources:
        mask_of = source.begin(call)
        for block in source.structure.blocks:
            anchors[block.name] = block.anchor
            for layer in block.layers:
                if layer.name in masks:
                    masks[layer.name][1].append((mask_of, strength))
                else:
                    masks[layer.name] = layer, [(mask_of, strength)]
    linears: dict[str, Linear] = {}
    parts: dict[str, list[tuple[Layer, _Masks]]] = {}
    for name, (layer, of_layer) in masks.items():
        if layer.module is None:
            linears[name] = _masked(name, call, of_layer, observe)
        else:
            parts.setdefault(layer.module, []).append((layer, of_layer))
    linears |= {module: _partly_masked(module, call, of_module, observe) for module, of_module in parts.items()}
    family = family_of(modules[""])

    @functools.cache
    def embed(rows: int) -> Tensor:
        return time_embedding(call.sigmas, rows)

    def called(module: nn.Module, args: tuple, kwargs: dict) -> None:
        call.sigmas = kwargs.get("transformer_options", {}).get("sigmas")
        embed.cache_clear()

    with contextlib.ExitStack() as stack:
        if call.sigmas is None:
            stack.callback(modules[""].register_forward_pre_hook(called, with_kwargs=True).remove)
        for block, anchor in anchors.items():

            def entered(module: nn.Module, args: tuple, kwargs: dict, block: str = block) -> None:
                call.enter(block, *family.conditions(args, kwargs, embed))

            stack.callback(modules[anchor].register_forward_pre_hook(entered, with_kwargs=True).remove)
        stack.enter_context(replaced_linears(modules, linears))
        yield


def modules_of(diffusion_model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name. To find a layer takes longer than to mask it: look once for many calls."""
    return dict(diffusion_model.named_modules())


def presented_weights(model, layers: Mapping[str, Layer]) -> Callable[[str], Tensor]:
    """Loads a MODEL; gives a layer's weight [out, in] float32 as the host presents it: LoRAs merged, dequantised.

    layers: those that will be asked for, by name.
    """
    from comfy.model_management import load_models_gpu
    from comfy.ops import cast_bias_weight, uncast_bias_weight

    load_models_gpu([model])

    def weight_of(layer: str) -> Tensor:
        module = model.model.diffusion_model.get_submodule(layers[layer].module_name)
        weight, bias, offload_stream = cast_bias_weight(
            module, dtype=torch.float32, bias_dtype=torch.float32, device=model.load_device, offloadable=True
        )
        try:
            # What the host lent may be the module's own weight, or a buffer that it uses again.
            return layers[layer].part_of(weight).detach().clone()
        finally:
            uncast_bias_weight(module, weight, bias, offload_stream)

    return weight_of
