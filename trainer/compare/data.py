"""The pictures of each world: training, validation and test sets, made once and kept as latents."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskunet_core.replacing import replacing
from maskunet_core.toy import vocabulary
from maskunet_core.toy.judge import read
from maskunet_core.training.base import BaseModel
from maskunet_core.training.seeds import seeded

from ..base import sample_pictures
from ..toy.data import LatentSet, ToyData
from ..toy.world import Caption, render, sample_captioned
from .plan import Scale
from .worlds import CLASS, render_style, render_subject, sample_subject

OLD_NOISE = {"noise": 0.5, "style": 0.25, "subject": 0.25}
"""Share of wrong captions in what each world's base was trained on, its old domain."""
SETS = ("training", "validation_new", "validation_old", "test_new", "test_old", "prior")


@dataclass
class Sets:
    """The sets of one world, and features [N, F] of real pictures, as the judge sees them."""

    latents: dict[str, LatentSet]
    real_new: Tensor
    real_old: Tensor

    def __getitem__(self, name: str) -> LatentSet:
        return self.latents[name]


class FixedSplit(ToyData):
    """Training pictures with validation pictures that were drawn apart from them, not cut off."""

    def __init__(self, training: LatentSet, validation: LatentSet, encode_tokens: Callable[[Tensor], Tensor]):
        super().__init__(training, encode_tokens)
        self._validation = validation

    def __len__(self) -> int:
        return len(self._set) + len(self._validation)

    def split(self, held_out: int, seed: int) -> tuple[ToyData, ToyData]:
        """(training, the first `held_out` validation pictures)."""
        tokens, latents = self._validation.tokens[:held_out], self._validation.latents[:held_out]
        held = LatentSet(latents, tokens, self._validation.captions[:held_out])
        return ToyData(self._set, self._encode), ToyData(held, self._encode)


@torch.no_grad()
def _encoded(base: BaseModel, pictures: Tensor, texts: list[str]) -> LatentSet:
    autoencoder = base.vae.first_stage_model
    latents = torch.cat([autoencoder.encode(part * 2 - 1) for part in pictures.split(500)])
    return LatentSet(latents, torch.tensor([vocabulary.encode_padded(text) for text in texts]), texts)


def new_pictures(world: str, count: int, seed: int, held_out: bool) -> tuple[Tensor, list[Caption] | list[str]]:
    """Pictures of the new domain with true captions. held_out: with captions that no training set holds."""
    stream = seeded(51, seed)
    if world == "subject":
        scenes, texts = sample_subject(count, stream, beside=0.5)
        return render_subject(scenes, seed), texts
    scenes, captions = sample_captioned(count, stream, held_out=held_out)
    return (render_style if world == "style" else render)(scenes, stream), captions


def old_pictures(world: str, count: int, seed: int, held_out: bool) -> tuple[Tensor, list[Caption]]:
    stream = seeded(52, seed)
    scenes, captions = sample_captioned(count, stream, OLD_NOISE[world], held_out)
    return render(scenes, stream), captions


def _training(world: str, scale: Scale) -> tuple[Tensor, list[Caption] | list[str]]:
    if world == "subject":
        scenes, texts = sample_subject(scale.subject_pictures, seeded(51, 0), beside=0.0)
        return render_subject(scenes, 0), texts
    return new_pictures(world, {"noise": scale.noise_pictures, "style": scale.style_pictures}[world], 0, False)


def make_sets(world: str, scale: Scale, base: BaseModel, judge) -> Sets:
    """All sets of a world; those of training, validation and test come from streams of their own."""

    def encoded(drawn: tuple[Tensor, list]) -> LatentSet:
        return _encoded(base, drawn[0], [str(caption) for caption in drawn[1]])

    latents = {"training": encoded(_training(world, scale))}
    for name, count, seed, held_out in (
        ("validation", scale.validation_pairs, 1, False),
        ("test", scale.pairs, 2, True),
    ):
        latents[f"{name}_new"] = encoded(new_pictures(world, count, seed, held_out))
        latents[f"{name}_old"] = encoded(old_pictures(world, count, seed, held_out))
    if world == "subject":
        texts = [CLASS] * scale.prior_pictures
        latents["prior"] = encoded(
            (sample_pictures(base, base.patcher, texts, 60, scale.sampling_steps, scale.cfg), texts)
        )
    real = [draw(world, scale.real_pictures, 3, True)[0] for draw in (new_pictures, old_pictures)]
    return Sets(latents, *(read(judge, pictures).features for pictures in real))


def save_sets(sets: Sets, path: Path) -> None:
    tensors = {"real_new": sets.real_new, "real_old": sets.real_old}
    for name, found in sets.latents.items():
        tensors |= {f"{name}.latents": found.latents, f"{name}.tokens": found.tokens}
    with replacing(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)


def text_of(tokens: Tensor) -> str:
    return " ".join(vocabulary.WORDS[index] for index in tokens.tolist() if index > vocabulary.END)


def load_sets(path: Path) -> Sets:
    tensors = load_file(path)
    latents = {}
    for name in SETS:
        if f"{name}.latents" in tensors:
            tokens = tensors[f"{name}.tokens"]
            latents[name] = LatentSet(tensors[f"{name}.latents"], tokens, [text_of(row) for row in tokens])
    return Sets(latents, tensors["real_new"], tensors["real_old"])
