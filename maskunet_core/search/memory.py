"""What a search takes on the device beside the models: an estimate for the host's plan, and the true peak."""

from typing import Any

import torch

from ..models.structure import Structure
from .settings import SearchSettings

_DECODER_GRAPH = 2
"""What a decoder's backward pass keeps, in units of what the host plans for decoding the same latents."""


def dtype_of_logits(settings: SearchSettings, computing: torch.dtype) -> torch.dtype:
    """bf16 where the model computes in half precision. computing: the model's; Adam's second moments need fp32."""
    halves = computing in (torch.float16, torch.bfloat16) and settings.optimiser != "AdamW"
    return torch.bfloat16 if halves else torch.float32


def bytes_of_masks(structure: Structure, settings: SearchSettings, computing: torch.dtype = torch.float32) -> int:
    """Of one image: logits, moments, gradients (see `Slope`), and the bits of the best masks and of those of now.

    computing: the dtype that the model computes in.
    """
    if not settings.masks:
        return 0
    moments = 2 if settings.optimiser == "AdamW" else int(settings.momentum > 0)
    dtype = dtype_of_logits(settings, computing)
    slope = 4 if dtype == torch.float32 else 1
    return structure.masked_weights * (dtype.itemsize * (1 + moments) + slope) + structure.masked_weights // 4


def room_for(masks: int, vae: Any, images: int, decoded: tuple[int, int]) -> int:
    """Bytes that the host should leave free.

    masks: `bytes_of_masks`. vae: that gradients flow through; decoded: its latents' height and width in cells. The
    diffusion model's own graph is small beside them: its layers run again in the backward pass.
    """
    decoding = vae.memory_used_decode((images, vae.latent_channels, *decoded), vae.vae_dtype)
    return images * masks + int(_DECODER_GRAPH * decoding)


class PeakMeter:
    """The most that a device held since it was made, beyond what it held then, in bytes; 0 where it does not tell."""

    def __init__(self, device: torch.device):
        self._device = device if device.type == "cuda" else None
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    @property
    def bytes(self) -> int:
        return 0 if self._device is None else torch.cuda.max_memory_allocated(self._device) - self._before
