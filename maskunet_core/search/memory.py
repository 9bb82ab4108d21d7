"""What a search takes on the device beside the models: an estimate for the host's plan, and the true peak."""

from typing import Any

import torch
from torch import nn

from ..models.families import family_of
from ..models.families.transformer import Transformer
from ..models.structure import Structure
from .graph import first_masked
from .settings import SearchSettings

_DECODER_GRAPH = 2
"""What a decoder's backward pass keeps, in units of what the host plans for decoding the same latents."""
_BLOCK_GRAPH = 32
"""What the backward pass of a transformer's block keeps, in units of its tokens; 17 to 30 in the families here."""
_TEXT_TOKENS = 512
"""As many as text encoders of today give."""


def keeps_ways(settings: SearchSettings, diffusion_model: nn.Module) -> bool:
    """Whether the search keeps the way of its logits from their start, in bf16: on all transformers, where AdamW, which
    needs fp32, does not forbid it. On U-Nets masks that were found once are found again, bit for bit."""
    return settings.optimiser != "AdamW" and isinstance(family_of(diffusion_model), Transformer)


def dtype_of_logits(settings: SearchSettings, computing: torch.dtype, ways: bool = False) -> torch.dtype:
    """bf16 where the model computes in half precision, and of ways (see `keeps_ways`).

    computing: the model's; Adam's second moments need fp32.
    """
    halves = ways or computing in (torch.float16, torch.bfloat16)
    return torch.bfloat16 if halves and settings.optimiser != "AdamW" else torch.float32


def bytes_of_masks(
    structure: Structure, settings: SearchSettings, computing: torch.dtype = torch.float32, ways: bool = False
) -> int:
    """Of one image: logits, moments, gradients (see `Slope`), and the bits of the best masks and of those of now.

    computing: the dtype that the model computes in. ways: see `keeps_ways`.
    """
    if not settings.masks:
        return 0
    moments = 2 if settings.optimiser == "AdamW" else int(settings.momentum > 0)
    dtype = dtype_of_logits(settings, computing, ways)
    slope = 4 if dtype == torch.float32 else 1
    return structure.masked_weights * (dtype.itemsize * (1 + moments) + slope) + structure.masked_weights // 4


def bytes_of_blocks(diffusion_model: nn.Module, structure: Structure, cells: int, computing: torch.dtype) -> int:
    """Of one sample in a transformer: what its blocks keep, and what one that runs again in the backward pass takes.

    cells: of its latent. Of a U-Net none: beside its decoder's that is small.
    """
    family = family_of(diffusion_model)
    if not isinstance(family, Transformer):
        return 0
    names = family.blocks(diffusion_model)
    again = names[first_masked(names, structure) :]
    tokens = cells // family.cells_per_token(diffusion_model) + _TEXT_TOKENS
    streams = tokens * family.channels(diffusion_model) * computing.itemsize
    blocks = (diffusion_model.get_submodule(name) for name in again)
    weights = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
    return (len(again) + _BLOCK_GRAPH) * streams + weights * computing.itemsize


def room_for(masks: int, blocks: int, vae: Any, images: int, decoded: tuple[int, int]) -> int:
    """Bytes that the host should leave free.

    masks: `bytes_of_masks`. blocks: `bytes_of_blocks`, of an image in all branches that are masked. vae: that gradients
    flow through; decoded: its latents' height and width in cells.
    """
    frames = (1,) if vae.latent_dim == 3 else ()
    decoding = vae.memory_used_decode((images, vae.latent_channels, *frames, *decoded), vae.vae_dtype)
    return images * (masks + blocks) + int(_DECODER_GRAPH * decoding)


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
