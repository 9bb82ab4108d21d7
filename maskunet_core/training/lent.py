"""A MODEL of a graph as a frozen base: the host lends its weights for one product, and other nodes go on to use it."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import MaskUNetError
from ..models.families.unet import UNET
from ..models.structure import Structure, family_name
from ..seam.gradients import LeanGraph, kept_weights, recomputed
from .base import BaseModel, Learned, fitting
from .base import recomputed as recomputed_transformer

_OF_A_WEIGHT = 16
"""Bytes that a trained number takes: itself, its gradient, two moments."""
_GRAPH = 4
"""What a training step keeps, in units of what the host plans for a sampling step of the same latents."""


class Untrainable(MaskUNetError):
    """A MODEL without masks, or one that takes more than a noisy picture, a noise level and a prompt."""


@dataclass
class LentModel(BaseModel):
    """patcher: the MODEL. room: bytes that the host leaves free beside it.

    Its weights may be inference tensors, lie wherever the host has put them, and be others by the backward pass.
    """

    room: int = 0

    @classmethod
    def of(cls, patcher: Any, clip: Any, vae: Any) -> "LentModel":
        return cls(patcher, clip, vae, family_name(patcher.model))

    def reserve(self, structure: Structure, samples: int, size: tuple[int, int]) -> None:
        """Plans for masks of a structure and steps of so many samples at once. size: of pictures, (width, height)."""
        shape = self.latent_shape(*size)
        computing = self.model.memory_required([samples, shape[0], *shape[-2:]])
        self.room = _OF_A_WEIGHT * structure.masked_weights + math.ceil(_GRAPH * computing)

    def require_trainable(self) -> None:
        """Raises Untrainable."""
        if self.family is None:
            raise Untrainable(
                f"The connected model ({self.name}) is of a kind that has no masks. Connect SD 1.5, SD 2.x, SDXL, or a "
                "transformer that MaskUNet Inspect knows."
            )
        if further := self.further_input():
            raise Untrainable(f"{further}, which is not there while training. Connect the plain model.")

    def load(self) -> torch.device:
        import comfy.model_management as management

        device = self.patcher.load_device
        # What is registered anew while the host loads could not be moved in the inference mode of the next graph.
        with fitting(f"The model ({self.name})", device, "close other programs that use it"), torch.inference_mode():
            management.load_models_gpu([self.patcher], memory_required=self.room)
        return device

    def _graph(self) -> contextlib.AbstractContextManager:
        return LeanGraph()

    def _masked_parts(self) -> list[nn.Module]:
        if self.family is UNET:
            return [*(layer for block in self.unet.output_blocks for layer in block), self.unet.out]
        return [self.unet.get_submodule(name) for name in self.family.blocks(self.unet)]

    def _others(self) -> list[nn.Module]:
        """Layers of a transformer outside of its blocks, which gradients may pass."""
        if self.family is UNET:
            return []
        inside = {module for part in self._masked_parts() for module in part.modules()}
        return [m for m in self.unet.modules() if m not in inside and next(m.children(), None) is None]

    @contextlib.contextmanager
    def recomputed(self, learned: Learned) -> Iterator[None]:
        again = recomputed(self._masked_parts()) if self.family is UNET else recomputed_transformer(self, learned)
        with kept_weights(self._others()), again:
            yield

    def kept(self) -> contextlib.AbstractContextManager:
        return kept_weights([*self._masked_parts(), *self._others()])


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside the block no parameter of a module learns."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            # One that was made in inference mode takes it there alone.
            with torch.inference_mode(parameter.is_inference()):
                parameter.requires_grad_(True)
