"""What is measured of a run: paired losses, pictures, and how masks differ between timesteps and samples."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskunet_core.judges.frechet import Gaussian, frechet_distance
from maskunet_core.judges.statistics import diversity
from maskunet_core.replacing import replacing
from maskunet_core.toy.judge import fully_right, read
from maskunet_core.toy.vocabulary import COLOURS
from maskunet_core.training.base import BaseModel

from ..base import sample_pictures
from ..evaluate import KINDS, Protocol, accuracy_by_kind, held_out_losses, held_out_prompts, mean_and_error
from ..sheets import to_image
from ..toy.data import LatentSet
from ..toy.world import Caption, Phrase
from .data import Sets
from .plan import Scale
from .worlds import STAR, SUBJECT, shows_style, shows_subject, style_strength

LOSS_SEEDS = {"validation_new": 70, "validation_old": 71, "test_new": 72, "test_old": 73}
PICTURE_SEED = 7
STARS_OF_A_COLOUR = 4
SHOWN = 3
"""Pictures of each kind of prompt in the strip that people see."""


def losses(base: BaseModel, sets: Sets, name: str, method: Any | None = None) -> Tensor:
    """`[N]` losses on a set, of the base or with a method acting; noises and timesteps are the same for all."""
    if method is None:
        return held_out_losses(base, sets[name], LOSS_SEEDS[name])
    return held_out_losses(base, sets[name], LOSS_SEEDS[name], lambda: method.acting(training=False))


def change(found: Tensor, of_base: Tensor) -> list[float]:
    """[mean, standard error over the pairs] of the losses minus the base's."""
    return list(mean_and_error(found - of_base))


def _diversity(features: Tensor) -> float:
    """Of [2N, F], prompt n's at n and N + n."""
    return diversity(torch.stack(features.chunk(2))).mean().item()


def ordinary_prompts(world: str, scale: Scale) -> list[Caption]:
    """Held-out captions of all kinds, the whole list twice; fewer where other pictures are asked for too."""
    distinct = max(1, scale.prompts // 2) if world == "subject" else scale.prompts
    # Too few pictures would not hold a prompt of every kind.
    pool = max(8, distinct)
    prompts, _ = held_out_prompts(Protocol(prompts=distinct, pictures=pool, seed=1))
    return [prompt for start in range(0, len(prompts), pool) for prompt in prompts[start : start + distinct]] * 2


def star_prompts() -> list[Caption]:
    return [Caption((Phrase(colour, STAR, None),)) for colour in range(len(COLOURS))] * STARS_OF_A_COLOUR


def _save_strip(pictures: Tensor, path: Path) -> None:
    """One row. pictures: [N, 3, H, W] in [0, 1]."""
    with replacing(path) as temporary:
        to_image(torch.cat(list(pictures.permute(0, 2, 3, 1)), dim=1)).save(temporary, format="PNG")


def picture_scores(
    base: BaseModel, patcher: Any, world: str, sets: Sets, scale: Scale, judge: Any, strip: Path
) -> dict[str, float]:
    """Scores of drawn pictures: `one`, `two`, `relation` (accuracy), `frechet_old`, `frechet_new`, `diversity`.

    For the style also `style` (share of pictures that show it) and `style_strength`. For the subject `subject` (share
    of pictures of its prompt that show it), `subject_diversity` and `stars` (accuracy of "a red star" and the like).
    strip: where some of the pictures go, as PNG: of one object, of two, of a relation, and of the subject.
    """

    def draw(texts: list[str]) -> Tensor:
        return sample_pictures(base, patcher, texts, PICTURE_SEED, scale.sampling_steps, scale.cfg)

    prompts = ordinary_prompts(world, scale)
    pictures = draw([str(prompt) for prompt in prompts])
    reading = read(judge, pictures)
    scores = {kind: mean for kind, (mean, _) in accuracy_by_kind(reading, prompts).items()}
    scores["frechet_old"] = frechet_distance(reading.features, Gaussian.of(sets.real_old))
    scores["diversity"] = _diversity(reading.features)
    distinct = len(prompts) // 2 // len(KINDS)
    shown = [pictures[kind * distinct :][:SHOWN] for kind in range(len(KINDS))]
    if world == "style":
        scores["frechet_new"] = frechet_distance(reading.features, Gaussian.of(sets.real_new))
        scores["style"] = shows_style(pictures).float().mean().item()
        scores["style_strength"] = style_strength(pictures).mean().item()
    if world == "subject":
        alone = draw([SUBJECT] * scale.prompts)
        shown.append(alone[:SHOWN])
        beside = [text for text in sets["test_new"].captions if text.split().count("a") == 2]
        features = read(judge, torch.cat([alone, draw(beside[: scale.prompts])])).features
        scores["frechet_new"] = frechet_distance(features, Gaussian.of(sets.real_new))
        scores["subject"] = shows_subject(alone).float().mean().item()
        scores["subject_diversity"] = _diversity(features[: len(alone)])
        stars = star_prompts()
        drawn = read(judge, draw([str(star) for star in stars]))
        scores["stars"] = fully_right(drawn, stars).float().mean().item()
    _save_strip(torch.cat(shown), strip)
    return scores


@torch.no_grad()
def mask_grid(base: BaseModel, method: Any, data: LatentSet, count: int, timesteps: int) -> dict[str, Tensor]:
    """The bits `[timesteps, count, out, in]` of each layer, for `count` pictures under noise at every timestep."""
    clean, tokens = data.latents[:count], data.tokens[:count]
    conditions = {"cross_attn": base.encode_tokens(tokens)}
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[Tensor]] = {}

    def record(layer: str, mask: Tensor) -> None:
        bits = mask.detach() > 0.5
        found.setdefault(layer, []).append(bits.expand(len(clean), -1, -1).clone())

    method.source.observe = record
    for timestep in torch.linspace(20, base.timesteps - 20, timesteps).long():
        with method.acting(training=False):
            base.diffusion_loss(clean, conditions, timestep.expand(len(clean)), noise)
    method.observe(False)
    return {layer: torch.stack(bits) for layer, bits in found.items()}


def share_differing(grid: dict[str, Tensor], along: int) -> float:
    """Share of weights whose bit is not the same all along a dimension of the grid: 0 timesteps, 1 samples."""
    differing = [(bits.any(along) & ~bits.all(along)).flatten() for bits in grid.values()]
    return torch.cat(differing).double().mean().item()


def mask_scores(grid: dict[str, Tensor]) -> dict[str, float]:
    kept, all_bits = (sum(count(bits) for bits in grid.values()) for count in (lambda b: int(b.sum()), torch.numel))
    return {
        "keep_ratio": kept / all_bits,
        "between_timesteps": share_differing(grid, 0),
        "between_samples": share_differing(grid, 1),
    }


def mask_map(base: BaseModel, method: Any, data: LatentSet, count: int, timesteps: int) -> dict[str, Any]:
    """What the figures show: keep ratio per block and timestep, and all masks on their first two principal axes."""
    grid = mask_grid(base, method, data, count, timesteps)
    keep = {}
    for block in method.structure.blocks:
        bits = [grid[layer.name].flatten(1) for layer in block.layers]
        keep[block.name] = torch.cat(bits, 1).float().mean(1).tolist()
    flat = torch.cat([bits.flatten(2).flatten(0, 1) for bits in grid.values()], 1)
    varying = (flat.any(0) & ~flat.all(0)).nonzero()[:, 0]
    chosen = varying[torch.randperm(len(varying), generator=torch.Generator().manual_seed(0))[:20_000]]
    points = torch.zeros(len(flat), 2)
    if len(chosen) > 2:
        values = flat[:, chosen].float()
        values -= values.mean(0)
        torch.manual_seed(0)
        points = values @ torch.pca_lowrank(values, q=2, center=False)[2]
    return {
        "timesteps": torch.linspace(20, base.timesteps - 20, timesteps).long().tolist(),
        "prompts": [str(caption) for caption in data.captions[:count]],
        "keep_ratio": keep,
        "points": points.tolist(),
    }
