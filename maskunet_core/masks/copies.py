"""One generator on several devices and in several precisions, without a second copy of it in memory."""

import copy
import itertools
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..models.structure import Block
from .linear import MaskLogits


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(owner, name, tensor) of all parameters and buffers."""
    for owner in module.modules():
        for name, tensor in itertools.chain(owner.named_parameters(recurse=False), owner.named_buffers(recurse=False)):
            yield owner, name, tensor


def _sharing(tensor: Tensor) -> Tensor:
    """Another tensor object over the same memory."""
    shared = tensor.detach()
    return nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared


class GeneratorCopies:
    """A generator for mask sources, which computes with the copy that lies on the device of what it is given.

    original: a frozen generator on the CPU, which is never moved. dtype: of the copies' weights. A copy shares the
    original's memory until it is moved or cast, and lives as long as whoever asked for it holds it.
    """

    def __init__(self, original: nn.Module, dtype: torch.dtype):
        self.original, self.dtype = original, dtype
        self.structure, self.tau, self.noise = original.structure, original.tau, original.noise
        self.threshold, self.noisy_threshold = original.threshold, original.noisy_threshold
        self._copies: list[weakref.ref[nn.Module]] = []

    @torch.inference_mode(False)
    def new(self) -> nn.Module:
        """A copy on the CPU."""
        shared = {id(tensor): _sharing(tensor) for _, _, tensor in _tensors(self.original)}
        made = copy.deepcopy(self.original, shared).to(self.dtype)
        self._copies = [ref for ref in self._copies if ref() is not None] + [weakref.ref(made)]
        return made

    def share(self, made: nn.Module) -> None:
        """A copy that came back from a device shares the original's memory again, where its values are the same."""
        for (owner, name, tensor), (_, _, original) in zip(_tensors(made), list(_tensors(self.original))):
            if (tensor.device, tensor.dtype) == (original.device, original.dtype):
                setattr(owner, name, _sharing(original))

    def on(self, device: torch.device) -> nn.Module:
        """The copy that lies on `device`; else the first, which takes what comes from any device."""
        copies = [made for ref in self._copies if (made := ref()) is not None]
        if len(copies) > 1:
            copies.sort(key=lambda made: next(_tensors(made))[2].device != device)
        return copies[0] if copies else self.original

    def condition(self, block: Block, features: Tensor, t_emb: Tensor) -> dict[str, Tensor]:
        return self.on(features.device).condition(block, features, t_emb)

    def layer_logits(self, layer: str, condition: Tensor) -> MaskLogits:
        # A condition lies where the copy lay that made it.
        return self.on(condition.device).layer_logits(layer, condition)
