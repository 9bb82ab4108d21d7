"""Gradients through the host's models, wherever their weights lie and whatever computes their attention.

The host lends a layer its weight for one product: a view of a buffer that it uses again, a page that it may take back,
or a tensor that autograd refuses. So a layer that takes part in a backward pass gets a copy of its own, made at the end
of the host's cast; and where copies of a whole decoder are too much, its layers run once more in the backward pass.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .fused import takes_no_gradient, with_gradient
from .shadow import Shadowed

_MASKED = ("comfy_cast_weights", "comfy_force_cast_weights", "forward_comfy_cast_weights")
"""Attributes of a layer whose product is replaced, see `layers.replaced_linears`."""


def kept_weights(modules: Iterable[nn.Module]) -> Shadowed:
    """Inside the block the layers of these modules compute with copies of their weights, which autograd may keep."""
    layers = {id(layer): layer for module in modules for layer in module.modules() if hasattr(layer, "weight_function")}
    return Shadowed(
        (
            layer,
            {
                "weight_function": [*layer.weight_function, torch.clone],
                "bias_function": [*layer.bias_function, torch.clone],
            },
        )
        for layer in layers.values()
    )


def kept_on_the_way(layers: Iterable[nn.Module]) -> Shadowed:
    """As `kept_weights`, for those layers alone whose input takes gradients when they are called. Others run as in the
    sampler's own call: a layer in 8 bits that computes with a copy rounds its input no more."""
    return Shadowed((layer, {"forward": partial(_kept_if_needed, layer, layer.forward)}) for layer in layers)


def _kept_if_needed(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = (*args, *kwargs.values())
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in given):
        with kept_weights([layer]):
            return forward(*args, **kwargs)
    return forward(*args, **kwargs)


def recomputed(layers: Iterable[nn.Module]) -> Shadowed:
    """Inside the block these layers keep their inputs alone for the backward pass, and run once more in it.

    They run as they did: with the masks that acted on them, and with copies of the host's weights. It is enough that
    the block was open in the forward pass.
    """
    return Shadowed((layer, {"forward": partial(_recomputed, layer, layer.forward)}) for layer in layers)


def run_again(layer: nn.Module) -> Callable[[], contextlib.AbstractContextManager]:
    """Gives contexts in which a layer runs as it does now, in a backward pass: with the masks that act on it now."""
    masked = [part for part in layer.modules() if _MASKED[-1] in part.__dict__]
    masks = Shadowed([(part, {name: part.__dict__[name] for name in _MASKED}) for part in masked])

    @contextlib.contextmanager
    def once_more() -> Iterator[None]:
        with masks, LeanGraph():
            yield

    return once_more


def of_this_call(argument: Any) -> Any:
    """What a layer was given, as it was then: the host writes into its options from block to block."""
    return dict(argument) if type(argument) is dict else argument


def _recomputed(layer: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    once_more = run_again(layer)

    def compute(*args: Any) -> Tensor:
        with kept_weights([layer]):
            return forward(*args, **kwargs)

    contexts = lambda: (contextlib.nullcontext(), once_more())  # noqa: E731
    args = tuple(map(of_this_call, args))
    return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def on_a_copy(blocks: Iterable[nn.Sequential]) -> Shadowed:
    """Inside the block these blocks of a U-Net work on copies of their inputs.

    The host adds ControlNet's residuals to the encoder's features in place, after the next block has taken them.
    """

    def forward_of(layer: nn.Module):
        compute = layer.forward
        return lambda x, *args, **kwargs: compute(x.clone(), *args, **kwargs)

    return Shadowed((block[0], {"forward": forward_of(block[0])}) for block in blocks)


class LeanGraph(TorchFunctionMode):
    """Frozen layers inside the block keep less for their backward passes, and inference tensors do not stop them.

    A convolution whose weights take no gradient needs its input for nothing but its shape. What lies between a group
    norm and its SiLU is made anew from the norm's input. So a residual block keeps two feature maps instead of six.
    Tensors of the inference mode that nodes run in, which autograd refuses, are replaced by ordinary ones. Fused
    operations of the host, which have no gradients, get those of what they stand for.
    """

    def __init__(self):
        super().__init__()
        self._normed: tuple[Any, int, tuple] = (lambda: None, 0, ())

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and function is not Tensor.is_inference:
            if function is torch.conv2d and _is_frozen_convolution(*args, **kwargs):
                return _FrozenConvolution.apply(*map(_ordinary, _convolution(*args, **kwargs)))
            if function is F.silu and args and self._is_as_normed(args[0]):
                return _SiluOfNorm.apply(args[0].detach(), *self._normed[2])
            args = tuple(map(_ordinary, args))
            kwargs = {name: _ordinary(value) for name, value in kwargs.items()}
            if takes_no_gradient(function, (*args, *kwargs.values())):
                return with_gradient(function, args, kwargs)
        result = function(*args, **kwargs)
        if function is F.group_norm and isinstance(result, Tensor) and result.requires_grad:
            terms = _group_norm(*args, **kwargs)
            if not any(isinstance(term, Tensor) and term.requires_grad for term in terms[2:4]):
                self._normed = weakref.ref(result), result._version, terms
        return result

    def _is_as_normed(self, tensor: Tensor) -> bool:
        """Whether it is the last norm's result, and nothing was written into it since."""
        normed, version, _ = self._normed
        return normed() is tensor and tensor._version == version


def _ordinary(value: Any) -> Any:
    """An ordinary tensor of an inference tensor's values, also in a list or tuple; anything else as it is."""
    if isinstance(value, Tensor):
        return _of_same_values(value) if value.is_inference() else value
    if type(value) in (list, tuple):
        return type(value)(map(_ordinary, value))
    return value


def _of_same_values(tensor: Tensor) -> Tensor:
    """On the CPU over the same memory: a model's weights would be twice there. Elsewhere a copy."""
    if (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.ndim
        and tensor.is_contiguous()
    ):
        return torch.from_numpy(tensor.detach().view(torch.uint8).numpy()).view(tensor.dtype)
    return tensor.clone()


def _convolution(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> tuple:
    return input, weight, bias, stride, padding, dilation, groups


def _is_frozen_convolution(input, weight, bias=None, *_, padding: Any = 0, **__) -> bool:
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return input.ndim == 4 and input.requires_grad and not trained and not isinstance(padding, str)


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5) -> tuple:
    return input, num_groups, weight, bias, eps


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, *geometry) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = input.shape, geometry
        return F.conv2d(input, weight, bias, *geometry)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return torch.nn.grad.conv2d_input(ctx.shape, weight, gradient, *ctx.geometry), *[None] * 6


class _SiluOfNorm(torch.autograd.Function):
    """SiLU of a group norm that was computed already."""

    @staticmethod
    def forward(ctx, normed, input, groups, weight, bias, eps) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(normed)

    @staticmethod
    def backward(ctx, gradient):
        input, weight, bias = ctx.saved_tensors
        with torch.enable_grad():
            leaf = input.detach().requires_grad_()
            result = F.silu(F.group_norm(leaf, ctx.groups, weight, bias, ctx.eps))
            (of_input,) = torch.autograd.grad(result, leaf, gradient)
        return None, of_input, None, None, None, None


def ordinary_tensors(value: Any) -> Any:
    """`value` with copies of its inference tensors, which autograd refuses, also those in lists, tuples and dicts."""
    if type(value) is dict:
        return {key: ordinary_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(ordinary_tensors, value))
    return _ordinary(value)
