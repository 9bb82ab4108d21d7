"""Autoencoder of the toy world: 64x64 pictures (or any multiple of 8) to latents of 4 channels, 8x8 times smaller."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class ToyAutoencoder(nn.Module):
    """Variational autoencoder whose latents are normalised to zero mean and unit variance per channel.

    `encode` and `decode` are what the host's VAE calls: pictures in [-1, 1], `[B, 3, 8h, 8w]`; latents `[B, 4, h, w]`.
    """

    def __init__(self, width: int = 64, deep: int = 80, latent_channels: int = 4):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            ResidualBlock(width),
            ResidualBlock(width),
            nn.Conv2d(width, deep, 4, stride=2, padding=1),
            ResidualBlock(deep),
            ResidualBlock(deep),
            nn.GroupNorm(8, deep),
            nn.SiLU(),
            nn.Conv2d(deep, 2 * latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, deep, 3, padding=1),
            ResidualBlock(deep),
            ResidualBlock(deep),
            ResidualBlock(deep),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(deep, width, 3, padding=1),
            ResidualBlock(width),
            ResidualBlock(width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2, 3, padding=1),
            ResidualBlock(width // 2),
            nn.GroupNorm(8, width // 2),
            nn.SiLU(),
            nn.Conv2d(width // 2, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("latent_mean", torch.zeros(1, latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(1, latent_channels, 1, 1))

    def posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the raw (not normalised) latents."""
        mean, log_variance = self.encoder(pictures).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def encode(self, pictures: Tensor) -> Tensor:
        return (self.posterior(pictures)[0] - self.latent_mean) / self.latent_std

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents * self.latent_std + self.latent_mean)
