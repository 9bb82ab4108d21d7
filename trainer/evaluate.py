"""Judges methods on prompts, pictures and noises that no training saw."""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from maskunet_core.judges.frechet import Gaussian, frechet_distance
from maskunet_core.seam.attach import OPTION
from maskunet_core.seam.layers import masked, modules_of
from maskunet_core.toy.judge import fully_right, read
from maskunet_core.toy.model import load_reader
from maskunet_core.toy.readers import Reading
from maskunet_core.training.base import BaseModel, load_for_training
from maskunet_core.training.seeds import seeded
from maskunet_core.training.validate import stratified_timesteps

from .base import load_toy_base, sample_pictures
from .benchmark.methods import BadMethod, Method
from .tables import write_table
from .toy.data import LatentSet, latent_set
from .toy.world import Caption, render, sample_captioned

KINDS = ("one", "two", "relation")


@dataclass(frozen=True)
class Protocol:
    """loss_pictures: pairs for the held-out loss. prompts: distinct held-out prompts of each kind, as many as there
    are; pictures: of each kind. steps, cfg: of the base's sampler."""

    loss_pictures: int = 6144
    prompts: int = 240
    pictures: int = 720
    steps: int = 15
    cfg: float = 5.0
    seed: int = 0

    @classmethod
    def quick(cls) -> "Protocol":
        """Few pictures: shows that the path works, not how good a model is."""
        return cls(loss_pictures=64, prompts=4, pictures=8)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


@torch.no_grad()
def held_out_losses(
    base: BaseModel,
    data: LatentSet,
    seed: int,
    acting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Tensor:
    """`[N]` losses of Eq. 2, each sample with a fixed noise and a timestep of its own stratum.

    acting: gives a context in which a method acts on the U-Net, for one call of it.
    """
    stream = seeded(30, seed)
    timesteps = stratified_timesteps(len(data), base.timesteps, stream)
    noise = torch.randn(data.latents.shape, generator=stream)
    losses = []
    for rows in tqdm(torch.arange(len(data)).split(64), desc="held-out loss", mininterval=1):
        conditions = {"cross_attn": base.encode_tokens(data.tokens[rows])}
        with acting():
            losses.append(base.diffusion_loss(data.latents[rows], conditions, timesteps[rows], noise[rows]))
    return torch.cat(losses)


def held_out_prompts(protocol: Protocol) -> tuple[list[Caption], Tensor]:
    """Captions of all kinds, repeated in turn to `pictures` of each, and as many real pictures of the same kinds."""
    stream = seeded(31, protocol.seed)
    scenes, captions = sample_captioned(12 * protocol.pictures, stream, held_out=True)
    prompts, rows = [], []
    for kind in KINDS:
        distinct = list(dict.fromkeys(caption for caption in captions if caption.kind == kind))[: protocol.prompts]
        prompts += [distinct[n % len(distinct)] for n in range(protocol.pictures)]
        rows += [n for n, caption in enumerate(captions) if caption.kind == kind][: protocol.pictures]
    return prompts, render(scenes[torch.tensor(rows)], stream)


def accuracy_by_kind(reading: Reading, prompts: list[Caption]) -> dict[str, tuple[float, float]]:
    """Share of pictures that are fully right, with its standard error, by the kind of their prompts."""
    right = fully_right(reading, prompts).float()
    return {kind: mean_and_error(right[torch.tensor([prompt.kind == kind for prompt in prompts])]) for kind in KINDS}


def judge_pictures(pictures: Tensor, prompts: list[Caption], real: Tensor, judge) -> dict[str, Any]:
    """Accuracy by kind with its standard error, and the Frechet distance to the real pictures."""
    reading = read(judge, pictures)
    accuracy = accuracy_by_kind(reading, prompts)
    scores: dict[str, Any] = {kind: f"{mean:.3f} ± {error:.3f}" for kind, (mean, error) in accuracy.items()}
    scores["frechet"] = round(frechet_distance(reading.features, Gaussian.of(read(judge, real).features)), 3)
    return scores


def _losses(base: BaseModel, data: LatentSet, seed: int) -> Tensor:
    """`held_out_losses` of a base with a method on it."""
    load_for_training(base)  # merges LoRAs, and takes those of the last method out
    attachments = base.patcher.model_options.get("transformer_options", {}).get(OPTION, ())
    sources = [(attachment.source, attachment.strength) for attachment in attachments]
    return held_out_losses(base, data, seed, partial(masked, modules_of(base.unet), sources))


def _with(method: Method, base: BaseModel) -> BaseModel:
    """Raises MaskUNetError: BadMethod for one that acts on more than a call of the U-Net."""
    changed = method.on(base)
    if method.search or any(part.kind == "masks" for part in method.parts) or changed.clip.patcher.patches:
        raise BadMethod(
            f"The method '{method}' changes more than a call of the U-Net, so that it has no held-out loss: judge it "
            "by `benchmark`, and name generator:FILE, lora:FILE or full:FILE here."
        )
    return changed


def evaluate(
    methods: Sequence[Method], protocol: Protocol, output: Path, weights: str = "", body: str = "unet"
) -> list[dict[str, Any]]:
    """A row for each method, the first of which is the base; written to `output/table.md` and `.json`, and printed.

    weights: folder of other toy weights. Raises MaskUNetError.
    """
    base = load_toy_base(weights, body)
    bases = {str(method): _with(method, base) for method in methods}
    judge = load_reader("reader_b", Path(weights) if weights else None)
    data = latent_set(protocol.loss_pictures, seeded(32, protocol.seed), base.vae.first_stage_model, held_out=True)
    prompts, real = held_out_prompts(protocol)
    texts = [str(prompt) for prompt in prompts]
    counts = Counter(prompt.kind for prompt in dict.fromkeys(prompts))
    print(f"{len(texts)} pictures of {len(dict.fromkeys(texts))} held-out prompts: {dict(counts)}", flush=True)

    rows, base_losses = [], None
    for name, changed in bases.items():
        losses = _losses(changed, data, protocol.seed)
        base_losses = losses if base_losses is None else base_losses
        mean, error = mean_and_error(losses - base_losses)
        with tqdm(total=len(texts), desc=name, mininterval=1) as bar:
            pictures = sample_pictures(
                base, changed.patcher, texts, protocol.seed, protocol.steps, protocol.cfg, 60, bar.update
            )
        row = {"model": name, "loss": round(losses.mean().item(), 5), "change x 1e-4": "0"}
        if rows:
            row["change x 1e-4"] = f"{mean * 1e4:+.2f} ± {error * 1e4:.2f}"
        rows.append(row | judge_pictures(pictures, prompts, real, judge))
    print(write_table(output, rows, vars(protocol) | {"prompts by kind": dict(counts)}))
    return rows
