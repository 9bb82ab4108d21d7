"""Pictures of the toy world as the trainer wants them: latents and token ids."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from maskunet_core.toy import vocabulary
from maskunet_core.toy.autoencoder import ToyAutoencoder

from .world import Caption, render, sample_captioned


@dataclass
class LatentSet:
    """latents: [N, 4, 8, 8]; tokens: [N, 16]; captions: N, as they were told (some of them wrong on purpose)."""

    latents: Tensor
    tokens: Tensor
    captions: list[Caption]

    def __len__(self) -> int:
        return len(self.latents)


@torch.no_grad()
def latent_set(
    count: int,
    generator: torch.Generator,
    autoencoder: ToyAutoencoder,
    caption_noise: float = 0.0,
    held_out: bool = False,
) -> LatentSet:
    """`count` rendered and encoded pictures, with captions inside or outside the held-out set."""
    scenes, captions = sample_captioned(count, generator, caption_noise, held_out)
    latents = []
    for start in tqdm(range(0, count, 500), desc="pictures", mininterval=1):
        pictures = render(scenes[torch.arange(start, min(start + 500, count))], generator)
        latents.append(autoencoder.encode(pictures * 2 - 1))
    tokens = torch.tensor([vocabulary.encode_padded(str(caption)) for caption in captions])
    return LatentSet(torch.cat(latents), tokens, captions)
