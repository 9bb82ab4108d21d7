"""Attention while gradients are on: what the host chooses for inference may have no backward pass, or keep too much."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LARGE = 1 << 16
"""Entries of one head's attention matrix from which on it is worth not to keep it: 256 tokens that see each other."""
_WITH_GRADIENTS = ("attention_basic", "attention_split", "attention_sub_quad", "attention_pytorch")
"""The host's ways of computing attention that have a backward pass and need no package."""


def _chosen(device: torch.device) -> Callable:
    from comfy.ldm.modules.attention import attention_pytorch, attention_sub_quad
    from comfy.model_management import pytorch_attention_enabled

    return attention_pytorch if device.type == "cpu" or pytorch_attention_enabled() else attention_sub_quad


def differentiable_attention(function: Callable, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The host's override of attention (`optimized_attention_override`), for calls that take part in a backward pass.

    function: what the host would call. Fast kernels have no backward pass (flash, sage). What the host chooses on a CPU
    cuts large matrices into slices, all of which a backward pass keeps, where PyTorch's own keeps no matrix. Where the
    host does without that (some AMD cards, Apple, DirectML) the slices are made anew in the backward pass.
    """
    tokens = 2 if kwargs.get("skip_reshape") else 1
    small = query.shape[tokens] * key.shape[tokens] < LARGE
    if query.device.type == "cpu" and small and getattr(function, "__name__", "") in _WITH_GRADIENTS:
        return function(query, key, *args, **kwargs)
    chosen = _chosen(query.device)
    if chosen.__name__ == "attention_pytorch" or not torch.is_grad_enabled():
        return chosen(query, key, *args, **kwargs)
    return checkpoint(chosen, query, key, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def with_differentiable_attention(transformer_options: dict[str, Any]) -> dict[str, Any]:
    """The options with `differentiable_attention`, in place of whatever else was to compute attention."""
    return transformer_options | {"optimized_attention_override": differentiable_attention}


def attention_notice(device: torch.device) -> str:
    """A sentence where the host's choice is not used while gradients are on, else nothing."""
    from comfy.ldm.modules import attention

    host = attention.optimized_attention.__name__
    if host in _WITH_GRADIENTS:
        return ""
    chosen = _chosen(device).__name__
    return f"Gradients go through {chosen}: {host}, which ComfyUI uses, has no backward pass."
