"""Whether a picture shows what its caption says, as a reader sees it."""

import torch
from torch import Tensor, nn

from .captions import Caption, Phrase
from .readers import Reading
from .vocabulary import RELATIONS, SIZES, pair_name


def read(reader: nn.Module, pictures: Tensor, batch: int = 256) -> Reading:
    """Readings of many pictures `[N, 3, H, W]` in [0, 1]."""
    with torch.no_grad():
        parts = [reader(part) for part in pictures.split(batch)]
    return Reading(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def _holds(relation: int, first: Tensor, second: Tensor) -> bool:
    dx, dy = (second - first).tolist()
    along, across = ((dx, dy), (-dx, dy), (dy, dx), (-dy, dx))[relation]
    return along > abs(across)


def fully_right(reading: Reading, captions: list[Caption]) -> Tensor:
    """`[N]` bool: just the objects that the caption names, with the sizes it says, in the relation it says."""
    return torch.tensor([not faults(reading, n, caption) for n, caption in enumerate(captions)])


def present_pairs(reading: Reading, number: int) -> list[int]:
    """The colour-shape pairs that a reader sees in one of its pictures."""
    return (reading.presence[number] > 0).nonzero().flatten().tolist()


def faults(reading: Reading, number: int, caption: Caption) -> list[str]:
    """What is wrong with picture `number` of a reading, each in a few words."""
    present = present_pairs(reading, number)
    wanted = [phrase.pair for phrase in caption.phrases]
    found = [f"{pair_name(pair)} missing" for pair in wanted if pair not in present]
    found += [f"{pair_name(pair)} not asked for" for pair in present if pair not in wanted]
    sizes = reading.size[number] > 0
    for phrase in caption.phrases:
        if phrase.pair in present and phrase.size not in (None, int(sizes[phrase.pair])):
            seen = SIZES[int(sizes[phrase.pair])]
            found.append(f"the {pair_name(phrase.pair)} is {seen}, wanted {SIZES[phrase.size]}")
    if caption.relation is not None and set(wanted) <= set(present):
        found += _misplaced(reading, number, caption.relation, caption.phrases)
    return found


def _misplaced(reading: Reading, number: int, relation: int, phrases: tuple[Phrase, ...]) -> list[str]:
    places = [reading.position[number, phrase.pair] for phrase in phrases]
    if _holds(relation, *places):
        return []
    first, second = (pair_name(phrase.pair) for phrase in phrases)
    for other, seen in enumerate(RELATIONS):
        if _holds(other, *places):
            return [f"the {first} is {seen} the {second}, wanted {RELATIONS[relation]}"]
    return [f"the {first} is not {RELATIONS[relation]} the {second}"]
