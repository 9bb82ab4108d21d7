"""Pictures of the toy world as the trainer wants them: latents and token ids."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from maskunet_core.toy import vocabulary
from maskunet_core.toy.autoencoder import ToyAutoencoder

from .world import Caption, render, sample_captioned


@dataclass
class LatentSet:
    """latents: [N, 4, 8, 8]; tokens: [N, 16]; captions: N, as they were told (some wrong on purpose)."""

    latents: Tensor
    tokens: Tensor
    captions: list[Caption] | list[str]

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
    latents, like = [], next(autoencoder.parameters())
    for start in tqdm(range(0, count, 500), desc="pictures", mininterval=1):
        pictures = render(scenes[torch.arange(start, min(start + 500, count))], generator)
        # The host holds it in half precision on some devices.
        latents.append(autoencoder.encode((pictures * 2 - 1).to(like)).float().cpu())
    tokens = torch.tensor([vocabulary.encode_padded(str(caption)) for caption in captions])
    return LatentSet(torch.cat(latents), tokens, captions)


class ToyData:
    """A LatentSet as the training loop reads data; prompts are encoded batch by batch.

    encode_tokens: from token ids [B, 16] to the cross-attention context.
    """

    digests: list[int] = []
    """As `EncodedPictures` has them; of these none, since a seed makes the same pictures each time."""

    def __init__(self, latents: LatentSet, encode_tokens: Callable[[Tensor], Tensor]):
        self._set = latents
        self._encode = encode_tokens
        self._empty = torch.tensor(vocabulary.encode_padded(""))
        self.buckets = [torch.arange(len(latents))]

    def __len__(self) -> int:
        return len(self._set)

    def latents(self, rows: Tensor, flips: Tensor | None = None) -> Tensor:
        """[B, 4, 8, 8]. Nothing is ever mirrored: captions say what is left and right."""
        return self._set.latents[rows]

    def conditions(self, rows: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """`cross_attn` [B, 16, 128]; of the empty prompt where `dropped`."""
        return {"cross_attn": self._encode(torch.where(dropped[:, None], self._empty, self._set.tokens[rows]))}

    def split(self, held_out: int, seed: int) -> tuple["ToyData", "ToyData"]:
        """(training, held out): the last pictures are held out."""
        cut = len(self) - held_out
        parts = (slice(0, cut), slice(cut, None))
        s = self._set
        return tuple(ToyData(LatentSet(s.latents[p], s.tokens[p], s.captions[p]), self._encode) for p in parts)
