"""From latents to the pictures that a reward sees, through the host's VAE."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskUNetError
from ..seam.gradients import kept_weights


class UnusableDecoder(MaskUNetError):
    """A VAE whose pictures tell a reward nothing, or which gives no gradients; the message says what to connect."""


_WITHOUT_GRADIENTS = ("TAEHV",)
"""Decoders that cut their own graph between frames."""


def latent_decoder(vae: Any, latent_format: Any) -> Callable[[Tensor], Tensor]:
    """Latents of the diffusion model to pictures `[N, 3, H, W]` in about [0, 1], differentiable, not clamped.

    Of a clip the first frame is seen. vae: the host's VAE, KL, TAESD or Wan's, loaded as the host likes. The host's own
    `decode` may unload other models, tiles, and clamps. Raises UnusableDecoder.
    """
    from comfy.model_management import is_device_cpu

    network, dtype, device = vae.first_stage_model, vae.vae_dtype, vae.device
    kind, channels = type(network).__name__, getattr(vae, "latent_channels", latent_format.latent_channels)
    if channels != latent_format.latent_channels:
        raise UnusableDecoder(
            f"The connected VAE ({kind}) decodes latents of {channels} channels, but the model's have "
            f"{latent_format.latent_channels}. Connect the VAE that belongs to the model."
        )
    if kind in _WITHOUT_GRADIENTS:
        raise UnusableDecoder(
            f"The connected decoder ({kind}) passes no gradients on. Connect the model's own VAE, or a TAESD."
        )

    def decode(latents: Tensor) -> Tensor:
        inputs = latent_format.process_out(latents).to(device, dtype)
        lent = torch.is_grad_enabled() and not is_device_cpu(vae.patcher.load_device)
        with kept_weights([network]) if lent else contextlib.nullcontext():
            pictures = network.decode(_as_taken(inputs, vae))
        if pictures.ndim == 5:
            pictures = pictures[:, :, 0]
        return (pictures[:, :3].to(latents) + 1.0) / 2.0

    return decode


def _as_taken(latents: Tensor, vae: Any) -> Tensor:
    """Of the dimensions that the VAE's network takes."""
    return latents[:, :, 0] if latents.ndim == 5 and vae.latent_dim == 2 else latents


def pictures_by_host(vae: Any, latent_format: Any) -> Callable[[Tensor], Tensor]:
    """Latents of the diffusion model to pictures `[N, 3, H, W]` in [0, 1], by the host's own `decode`, image by image.

    For any VAE that the host knows, with its plan of memory and its tiles, without gradients. Of a clip the first frame
    is seen.
    """

    def decode(latents: Tensor) -> Tensor:
        with torch.inference_mode():
            pictures = [vae.decode(latent_format.process_out(latent)) for latent in latents.split(1)]
        return torch.cat([picture.clone().flatten(0, -4)[:1] for picture in pictures]).movedim(-1, 1)[:, :3].to(latents)

    return decode


def is_plain(vae: Any, latent_format: Any) -> bool:
    """Whether latents are `[N, C, h, w]` with 8 pixels a cell: `latent_decoder` is then the cheaper way."""
    return latent_format.latent_dimensions == vae.latent_dim == 2 and vae.spacial_compression_decode() == 8
