"""Attention while gradients are on: what the host chooses for inference may have no backward pass, or keep too much."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_DIFFERENTIABLE = ("attention_basic", "attention_split", "attention_sub_quad", "attention_pytorch")
"""The host's ways of computing attention that have a backward pass and no need of a package."""


def _chosen(device: torch.device) -> Callable:
    import comfy.model_management
    from comfy.ldm.modules.attention import attention_pytorch, attention_sub_quad

    on_cpu = device.type == "cpu"
    return attention_pytorch if on_cpu or comfy.model_management.pytorch_attention_enabled() else attention_sub_quad


def differentiable_attention(function: Callable, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An `optimized_attention_override`: PyTorch's attention on the CPU and where the host uses it, else in slices.

    function: what the host would call, of any kind; it is called where gradients are off.
    """
    if not torch.is_grad_enabled():
        return function(query, *args, **kwargs)
    chosen = _chosen(query.device)
    if chosen.__name__ == "attention_pytorch":
        return chosen(query, *args, **kwargs)
    # The slices together are the whole matrix: they are made anew in the backward pass, for one layer at a time.
    return checkpoint(chosen, query, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def notice(device: torch.device) -> str:
    """A sentence where the host's attention is not used for training, else nothing."""
    from comfy.ldm.modules import attention

    host = attention.optimized_attention.__name__
    if host in _DIFFERENTIABLE:
        return ""
    return (
        f"Training computes attention by {_chosen(device).__name__}: {host}, ComfyUI's choice, is made for inference."
    )
