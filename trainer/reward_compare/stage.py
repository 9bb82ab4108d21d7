"""What all methods draw with: the toy model, prompts, the reward that is optimised, and the judge that never is."""

import zlib
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskunet_core.rewards.reward import BoundReward, value_and_gradient
from maskunet_core.rewards.toy import log_probability
from maskunet_core.search.decoder import latent_decoder
from maskunet_core.search.judge import Judge
from maskunet_core.toy import vocabulary
from maskunet_core.toy.captions import Caption
from maskunet_core.toy.judge import fully_right, read
from maskunet_core.toy.model import load_reader
from maskunet_core.toy.readers import Reading
from maskunet_core.training.base import BaseModel
from maskunet_core.training.seeds import seeded

from ..base import load_toy_base
from ..toy.held_out import real_pictures


@dataclass(frozen=True)
class Sampling:
    """What the host's sampler is asked for."""

    steps: int = 15
    cfg: float = 5.0
    sampler: str = "ddim"
    scheduler: str = "normal"


def tokens_of(captions: list[Caption]) -> Tensor:
    """`[N, 16]`."""
    return torch.tensor([vocabulary.encode_padded(str(caption)) for caption in captions])


def scores_of(reading: Reading, captions: list[Caption]) -> Tensor:
    """`[N]`: the toy reward of picture n for caption n."""
    single = [Reading(*(getattr(reading, f.name)[n : n + 1] for f in fields(Reading))) for n in range(len(captions))]
    return torch.cat([log_probability(one, caption) for one, caption in zip(single, captions)])


class BatchReward(BoundReward):
    """The toy reward of a batch, each picture for its own prompt."""

    name = "toy reward"

    def __init__(self, reader: nn.Module, captions: list[Caption]):
        self.reader, self.captions = reader, captions

    def __call__(self, images: Tensor) -> Tensor:
        return scores_of(self.reader(images), self.captions)


@dataclass(frozen=True)
class Verdict:
    """What the readers say of N finished pictures. right: fully right by the judge; right_by_reward: by reader A.

    reward: the toy reward; features: the judge's, `[N, F]`; patches: see `patches_of`.
    pictures: `[N, 3, H, W]` in [0, 1].
    """

    pictures: Tensor
    right: Tensor
    right_by_reward: Tensor
    reward: Tensor
    features: Tensor
    patches: Tensor


def patches_of(latents: Tensor) -> Tensor:
    """`[N * 16, 16]`: latents `[N, 4, 8, 8]` in pieces of 2 x 2.

    Readers look for objects; how clean edges and backgrounds are shows here.
    """
    return F.unfold(latents, kernel_size=2, stride=2).transpose(1, 2).flatten(0, 1)


class Stage:
    """The toy model and its readers, for batches of different prompts.

    sampling: how pictures are drawn. weights, body: see `load_toy_base`.
    """

    def __init__(self, sampling: Sampling = Sampling(), weights: str = "", body: str = "unet"):
        self.sampling = sampling
        self.base: BaseModel = load_toy_base(weights, body)
        self.reward, self.referee = load_reader("reader_a"), load_reader("reader_b")
        self.format = self.base.patcher.get_model_object("latent_format")
        self.decode = latent_decoder(self.base.vae, self.format)
        self.empty = [[self.base.encode_tokens(torch.tensor([vocabulary.encode_padded("")])), {}]]

    def noise(self, captions: list[Caption], seed: int, number: int = 0) -> Tensor:
        """Starting noises `[N, 4, 8, 8]` of a candidate; that of a prompt does not depend on the others."""
        streams = [seeded(72, seed, number, zlib.crc32(str(caption).encode())) for caption in captions]
        return torch.cat([torch.randn(1, 4, 8, 8, generator=stream) for stream in streams])

    def judge(self, captions: list[Caption]) -> Judge:
        """By the optimised reward, each picture for its own prompt."""
        return Judge(self.decode, partial(value_and_gradient, BatchReward(self.reward, captions)))

    def _encode(self, pictures: Tensor) -> Tensor:
        with torch.no_grad():
            return self.base.vae.first_stage_model.encode(pictures * 2 - 1)

    def conditioning(self, captions: list[Caption]) -> list:
        return [[self.base.encode_tokens(tokens_of(captions)), {}]]

    @torch.no_grad()
    def sample(
        self,
        model: Any,
        captions: list[Caption],
        noise: Tensor,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Tensor:
        """Latents as the host's sampler gives them; steps, sampler: other ones than the stage's."""
        import comfy.sample

        how = self.sampling
        return comfy.sample.sample(
            model,
            noise,
            steps or how.steps,
            how.cfg,
            sampler or how.sampler,
            how.scheduler,
            self.conditioning(captions),
            self.empty,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=seed,
            **options,
        )

    def estimate(self, captions: list[Caption], noise: Tensor, steps: int, seed: int) -> Tensor:
        """The base's estimate of the clean latents after the first `steps`."""
        seen: list[Tensor] = []

        def keep(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            seen[:] = [x0]

        self.sample(self.base.patcher, captions, noise, seed=seed, last_step=steps, callback=keep)
        return seen[0]

    @torch.no_grad()
    def rewards(self, latents: Tensor, captions: list[Caption]) -> Tensor:
        """`[N]` of finished latents."""
        return scores_of(self.reward(self.decode(self.format.process_in(latents))), captions)

    @torch.no_grad()
    def verdict(self, latents: Tensor, captions: list[Caption]) -> Verdict:
        pictures = self.decode(self.format.process_in(latents)).clamp(0, 1)
        of_reward, of_judge = read(self.reward, pictures), read(self.referee, pictures)
        return Verdict(
            pictures,
            fully_right(of_judge, captions),
            fully_right(of_reward, captions),
            scores_of(of_reward, captions),
            of_judge.features,
            patches_of(self._encode(pictures)),
        )

    @torch.no_grad()
    def real(self, count: int) -> tuple[Tensor, Tensor]:
        """The judge's features and the patches of rendered pictures of the same kinds."""
        pictures = real_pictures(count)
        return read(self.referee, pictures).features, patches_of(self._encode(pictures))
