"""Less memory between forward and backward pass of frozen networks, with the same gradients."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LARGE = 1 << 16
"""Entries of one head's attention matrix from which on it is worth not to keep it: 256 tokens that see each other."""


class LeanGraph(TorchFunctionMode):
    """Frozen layers inside the block keep less for their backward passes.

    A convolution whose weights take no gradient needs its input for nothing but its shape. What lies between a group
    norm and its SiLU is made anew from the norm's input. So a residual block keeps two feature maps instead of six.
    """

    def __init__(self):
        super().__init__()
        self._normed: tuple[Any, int, tuple] = (lambda: None, 0, ())

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            if function is torch.conv2d and _is_frozen_convolution(*args, **kwargs):
                return _FrozenConvolution.apply(*_convolution(*args, **kwargs))
            if function is F.silu and args and self._is_as_normed(args[0]):
                return _SiluOfNorm.apply(args[0].detach(), *self._normed[2])
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


def lean_attention(function: Callable, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The host's override of attention (`optimized_attention_override`): none that keeps large matrices.

    What the host chooses for inference cuts them into slices, all of which a backward pass keeps.
    """
    from comfy.ldm.modules.attention import attention_pytorch

    tokens = 2 if kwargs.get("skip_reshape") else 1
    chosen = attention_pytorch if query.shape[tokens] * key.shape[tokens] >= LARGE else function
    return chosen(query, key, *args, **kwargs)


def with_lean_attention(transformer_options: dict[str, Any]) -> dict[str, Any]:
    """The options with `lean_attention`, unless somebody else has overridden attention."""
    return {"optimized_attention_override": lean_attention} | transformer_options
