"""Draws pictures of prompts by a method, through the host's samplers. The noise of a picture depends on the run's seed,
its prompt and its number alone, so that all methods begin from the same."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskunet_core.rewards.files import load, others_in_host
from maskunet_core.rewards.reward import BoundReward, CombinedReward, Reward, value_and_gradient
from maskunet_core.rewards.toy import ToyReward
from maskunet_core.seam.sampling import loaded_with_room
from maskunet_core.search.decoder import latent_decoder
from maskunet_core.search.judge import Judge
from maskunet_core.search.run import search_images
from maskunet_core.search.settings import SMALL_SIDE, SearchSettings
from maskunet_core.training.base import BaseModel
from maskunet_core.training.seeds import seeded
from maskunet_core.training.texts import Conditions, stacked

from ..choices import TOY
from ..host import REWARD, model_choice, model_file
from ..pictures import file_digest
from ..reward_compare.stage import Sampling
from .methods import BadMethod, Method

_KEY = "maskunet_benchmark"
Pair = tuple[int, int]
"""A picture: the index of its prompt, and its number among the prompt's pictures."""


def plain_text(prompt: str) -> str:
    """A prompt whose brackets are meant as such: the host reads them as weights of words."""
    return re.sub(r"([()])", r"\\\1", prompt)


def reward_files(names: Sequence[str]) -> dict[str, Path | None]:
    """Where the rewards lie, by name; None for the toy's, which needs no file. Raises BadMethod."""
    found = {name: None if name == TOY else model_file(REWARD, name) for name in names}
    for name, path in found.items():
        if name != TOY and path is None:
            raise BadMethod(
                f"The reward '{name}' does not exist; {model_choice(REWARD)}. Name a file in it, or a path."
            )
    return found


def reward_digests(files: dict[str, Path | None]) -> dict[str, str]:
    return {name: TOY if path is None else file_digest(path) for name, path in files.items()}


def load_rewards(files: dict[str, Path | None]) -> Reward:
    """The sum of the rewards."""
    loaded = [ToyReward() if path is None else load(path, others_in_host(path)) for path in files.values()]
    return CombinedReward([(1.0, reward) for reward in loaded])


class EachItsOwn(BoundReward):
    """A reward of a batch, each picture for its own prompt."""

    def __init__(self, bound: Sequence[BoundReward]):
        self.name, self._bound = bound[0].name, bound

    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([bound(image) for bound, image in zip(self._bound, images.split(1))])


def _conditioning(texts: Sequence[Conditions]) -> list:
    """The host's, of texts of one length."""
    conditions = stacked(list(texts))
    return [[conditions.pop("cross_attn"), conditions]]


def _equally_long(texts: Sequence[Conditions]) -> list[list[int]]:
    """Numbers of the texts, in groups that make a batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, text in enumerate(texts):
        groups.setdefault(tuple(map(len, text.values())), []).append(number)
    return list(groups.values())


@dataclass
class Drawer:
    """base: with the method's parts. search, reward: None for the plain sampler. side: of the pictures, in pixels."""

    base: BaseModel
    sampling: Sampling
    side: int
    seed: int
    search: SearchSettings | None = None
    reward: Reward | None = None

    @classmethod
    def of(cls, method: Method, base: BaseModel, reward: Reward | None, **options: Any) -> "Drawer":
        """options: the other fields. Raises BadMethod where a search has no reward to follow."""
        if method.search is not None and reward is None:
            raise BadMethod(f"The method '{method}' searches: name the reward that it follows by --reward.")
        return cls(method.on(base), search=method.search, reward=reward, **options)

    def noise(self, pairs: Sequence[Pair], candidate: int = 0) -> Tensor:
        """`[N, C, ..., h, w]`: starting noises; a plain sampler's are those of candidate 0."""
        shape = (1, *self.base.latent_shape(self.side, self.side))
        streams = [seeded(80, self.seed, prompt, number, candidate) for prompt, number in pairs]
        return torch.cat([torch.randn(shape, generator=stream) for stream in streams])

    @torch.no_grad()
    def pictures(self, pairs: Sequence[Pair], prompts: Sequence[str]) -> Tensor:
        """`[N, H, W, 3]` in [0, 1], on the CPU; prompts: of the pairs. Texts of one length are drawn together."""
        texts = [self.base.encode_text(plain_text(prompt)) for prompt in prompts]
        found: dict[int, Tensor] = {}
        for rows in _equally_long(texts):
            positive = _conditioning([texts[n] for n in rows])
            latents = self._latents([pairs[n] for n in rows], [prompts[n] for n in rows], positive)
            found.update(zip(rows, self._decoded(latents).movedim(1, -1).clamp(0, 1).float().cpu()))
        return torch.stack([found[n] for n in range(len(pairs))])

    @cached_property
    def _no_text(self) -> Conditions:
        return self.base.encode_text("")

    def _latents(self, pairs: Sequence[Pair], prompts: Sequence[str], positive: list) -> Tensor:
        if self.search is None:
            return self._sampled(self.base.patcher, pairs, self.noise(pairs), positive)
        return self._searched(pairs, prompts, positive)

    def _decoded(self, latents: Tensor) -> Tensor:
        """`[N, 3, H, W]`, one at a time: a decoder takes more memory than a U-Net."""
        return torch.cat([self.base.vae.decode(latent) for latent in latents.split(1)]).movedim(-1, 1)[:, :3]

    def _sampled(self, model: Any, pairs: Sequence[Pair], noise: Tensor, positive: list, **options: Any) -> Tensor:
        """Latents by the host's sampler, without a negative prompt."""
        import comfy.sample

        how, negative = self.sampling, _conditioning([self._no_text] * len(noise))
        plan = (how.steps, how.cfg, how.sampler, how.scheduler, positive, negative, torch.zeros_like(noise))
        # Of the noise that a stochastic sampler adds: that of a batch is no other's.
        seed = torch.randint(2**31, (), generator=seeded(83, self.seed, *pairs[0])).item()
        return comfy.sample.sample(model, noise, *plan, disable_pbar=True, seed=seed, **options)

    def _searched(self, pairs: Sequence[Pair], prompts: Sequence[str], positive: list) -> Tensor:
        """Latents by the reward sampler."""
        from comfy.patcher_extension import WrappersMP

        bound = EachItsOwn([self.reward.bind(prompt) for prompt in prompts])
        # The decoder is loaded beside the U-Net, and the rewards lie where the pictures come.
        model, vae = self.base.patcher.clone(), self.base.vae
        model.set_additional_models(_KEY, [vae.patcher])
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, partial(loaded_with_room, 0))
        for module in self.reward.modules():
            module.to(model.load_device)
        decode = latent_decoder(vae, model.get_model_object("latent_format"))
        small = SMALL_SIDE if self.search.small_decode else 0
        judge = Judge(decode, partial(value_and_gradient, bound), small, vae.spacial_compression_decode())

        def peek(noise: Tensor, number: int, steps: int) -> Tensor:
            estimates: list[Tensor] = []

            def keep(step: int, x0: Tensor, x: Tensor, total: int) -> None:
                estimates[:] = [x0]

            self._sampled(model, pairs, noise, positive, last_step=steps, callback=keep)
            return estimates[0]

        found = search_images(
            model=model,
            sample=lambda masked, noise, number: self._sampled(masked, pairs, noise, positive),
            peek=peek,
            noise=lambda number: self.noise(pairs, number),
            settings=self.search,
            judge=judge,
            score=lambda latents: bound(self._decoded(latents)).detach().cpu(),
            steps=self.sampling.steps,
            seed=self.seed,
        )
        return found.latents
