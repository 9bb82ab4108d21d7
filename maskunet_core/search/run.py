"""A whole search: judge some starting noises, improve the masks on the best, and never end below where it began."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..records.recorded import RecordedMasks
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
    peek: Callable[[Tensor, int, int], Tensor],
    noise: Callable[[int], Tensor],
    settings: SearchSettings,
    judge: Judge,
    score: Callable[[Tensor], Tensor],
    steps: int,
    candidate_done: Callable[[int, Tensor], None] | None = None,
    **options: Any,
) -> Found:
    """Algorithm 1, with a search over starting noises before it.

    sample: runs the host's sampler on (MODEL, noise `[N, ...]`, number of the candidate). peek: runs it on (noise,
    number, steps) for the first few steps, unmasked, and returns the last estimate of the clean latent, as the model
    sees latents; without masks it is not used. noise: of a candidate; the first is the one that a plain sampler would
    have. score: `[N]` of finished latents. steps: of the sampler. candidate_done: told (number, scores). options: for
    RewardSearch. Where candidates were drawn to the end and `keep_best` is set, an image whose reward the masks have
    lowered gives way to its plain candidate.
    """
    first = noise(0)
    images = len(first)
    search = RewardSearch(model, settings, judge, images, **options)
    updates = settings.total_iterations(steps) > 0
    looks = settings.candidate_steps(steps)
    best = Best()
    for number in range(settings.candidates if settings.candidates > 1 else 0):
        start = first if number == 0 else noise(number)
        items = {"noise": start, "number": torch.full((images,), number)}
        if looks < steps:
            scores = judge.scores(peek(start, number, looks))
        else:
            items["latents"] = sample(model, start, number)
            scores = score(items["latents"])
        best.offer(scores, lambda items=items: items, always=False)
        if candidate_done is not None:
            candidate_done(number, scores)
    numbers = best.items.get("number", torch.zeros(images, dtype=torch.long))
    plain = best.items.get("latents")
    if plain is not None and not updates:
        return Found(plain, best.scores, numbers, search.recorded, [])
    latents = sample(search.model, best.items.get("noise", first), int(numbers[0]) if images == 1 else 0)
    scores = score(latents) if updates or best.scores is not None else None
    if plain is not None and settings.keep_best:
        for image in torch.nonzero(scores < best.scores).flatten().tolist():
            latents[image], scores[image] = plain[image], best.scores[image]
            search.recorded.keep_all(image)
    return Found(latents, scores, numbers, search.recorded, search.history)
