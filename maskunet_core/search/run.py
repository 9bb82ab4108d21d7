"""A whole search: judge some starting noises, improve the masks on the best, and never end below where it began."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..recorded import RecordedMasks
from .judge import Judge
from .loop import Best, Evaluation
from .sampling import RewardSearch
from .settings import SearchSettings


@dataclass(frozen=True)
class Found:
    """latents: what the sampler gave. scores: `[N]` rewards of the final pictures, None where nothing was judged.

    candidates: `[N]` the number of each image's starting noise. recorded: the masks, by which a sampler repeats it.
    """

    latents: Tensor
    scores: Tensor | None
    candidates: Tensor
    recorded: RecordedMasks
    history: list[Evaluation]


def search_images(
    *,
    model: Any,
    sample: Callable[[Any, Tensor, int], Tensor],
    noise: Callable[[int], Tensor],
    settings: SearchSettings,
    judge: Judge,
    score: Callable[[Tensor], Tensor],
    steps: int,
    candidate_done: Callable[[int, Tensor, Tensor], None] | None = None,
    **options: Any,
) -> Found:
    """Algorithm 1, with a search over starting noises before it.

    sample: runs the host's sampler on (MODEL, noise `[N, ...]`, number of the candidate). noise: of a candidate; the
    first is the one that a plain sampler would have. score: `[N]` of finished latents. steps: of the sampler.
    candidate_done: told (number, latents, scores). options: for RewardSearch. A masked image whose reward is below its
    plain candidate's gives way to it, where `keep_best`.
    """
    first = noise(0)
    images = len(first)
    search = RewardSearch(model, settings, judge, images, **options)
    updates = settings.total_iterations(steps) > 0
    best = Best()
    if settings.candidates > 1:
        for number in range(settings.candidates):
            start = first if number == 0 else noise(number)
            latents = sample(model, start, number)
            scores = score(latents)
            items = {"latents": latents, "noise": start, "number": torch.full((images,), number)}
            best.offer(scores, lambda items=items: items, always=False)
            if candidate_done is not None:
                candidate_done(number, latents, scores)
        if not updates:
            return Found(best.items["latents"], best.scores, best.items["number"], search.recorded, [])
    numbers = best.items.get("number", torch.zeros(images, dtype=torch.long))
    latents = sample(search.model, best.items.get("noise", first), int(numbers[0]) if images == 1 else 0)
    scores = score(latents) if updates else None
    if best.scores is not None and scores is not None and settings.keep_best:
        worse = (scores < best.scores).tolist()
        for image in (n for n, is_worse in enumerate(worse) if is_worse):
            latents[image], scores[image] = best.items["latents"][image], best.scores[image]
            search.recorded.keep_all(image)
    return Found(latents, scores, numbers, search.recorded, search.history)
