"""A whole search: judge some starting noises, improve the masks on the best, and never end below where it began."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.structure import NothingToMask, Structure, family_name
from ..records.recorded import RecordedMasks
from ..seam.attach import structure_of
from .judge import Judge
from .loop import Best, Evaluation, comparable
from .sampling import RewardSearch
from .settings import SearchSettings


@dataclass(frozen=True)
class SearchResult:
    """latents: what the sampler gave. scores: `[N]` rewards of the final pictures, None where nothing was judged.

    candidates: `[N]` the number of each image's starting noise. drawn_as_candidate: `[N]` bool, whether an image comes
    from a run in which all images had the noises, and the sampler the seed, of that candidate. recorded: the masks, by
    which a sampler repeats it. skipped: updates of an image that were left out because a number was not finite. peak:
    bytes that a look took.
    """

    latents: Tensor
    scores: Tensor | None
    candidates: Tensor
    drawn_as_candidate: Tensor
    recorded: RecordedMasks
    history: list[Evaluation]
    skipped: int = 0
    peak: int = 0


_CANDIDATES_ALONE = (
    "Candidates alone work with any model: choose preset fast, or set masks to off and candidates to as many as you "
    "like."
)


def structure_for(model: Any, targets: str, updates: bool) -> Structure:
    """What may be masked. Where no updates are to be made any model will do: nothing of one without layers to mask.

    Raises NothingToMask.
    """
    try:
        return structure_of(model, targets)
    except NothingToMask as reason:
        if updates:
            raise NothingToMask(f"{reason} {_CANDIDATES_ALONE}") from None
        return Structure(family_name(model.model), 0, ())


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
    targets: str = "decoder attention",
    **options: Any,
) -> SearchResult:
    """Algorithm 1, with a search over starting noises before it.

    sample: runs the host's sampler on (MODEL, noise `[N, ...]`, number of the candidate). peek: runs it on (noise,
    number, steps) until so many steps are done, unmasked, and returns the last estimate of the clean latent, as the
    model sees latents; without masks it is not used. noise: of a candidate; the first is the one that a plain sampler
    would have. score: `[N]` of finished latents. steps: of the sampler. candidate_done: called with (number, scores).
    targets: what may be masked; where no updates are to be made, the model may be any. options: for RewardSearch.

    Where candidates were drawn to the end and `keep_best` is set, an image whose reward the masks have lowered gives
    way to its plain candidate.
    """
    first = noise(0)
    images = len(first)
    updates = settings.total_iterations(steps) > 0
    structure = structure_for(model, targets, updates)
    search = RewardSearch(model, settings, judge, images, targets=targets, structure=structure, **options)
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
        return SearchResult(plain, best.scores, numbers, numbers >= 0, search.recorded, [])
    try:
        # A sampler that adds noise draws it for the whole batch.
        alike = bool((numbers == numbers[0]).all())
        of_sampler = int(numbers[0]) if alike else 0
        latents = sample(search.searching(model), best.items.get("noise", first), of_sampler)
    finally:
        search.close()
    drawn_as_candidate = torch.full((images,), alike)
    scores = score(latents) if updates or best.scores is not None else None
    if plain is not None and settings.keep_best:
        for image in torch.nonzero(comparable(scores) < comparable(best.scores)).flatten().tolist():
            latents[image], scores[image] = plain[image], best.scores[image]
            search.recorded.keep_all(image)
            drawn_as_candidate[image] = True
    found = latents, scores, numbers, drawn_as_candidate
    return SearchResult(*found, search.recorded, search.history, search.skipped, search.peak)
