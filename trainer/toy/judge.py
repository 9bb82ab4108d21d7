"""Whether a picture shows what its caption says, as a reader sees it."""

import torch
from torch import Tensor, nn

from maskunet_core.toy.readers import Reading

from .world import Caption


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
    present = reading.presence > 0
    right = []
    for n, caption in enumerate(captions):
        wanted = torch.zeros(present.shape[1], dtype=torch.bool)
        wanted[[phrase.pair for phrase in caption.phrases]] = True
        ok = bool((present[n] == wanted).all())
        for phrase in caption.phrases:
            if phrase.size is not None:
                ok = ok and bool(reading.size[n, phrase.pair] > 0) == bool(phrase.size)
        if ok and caption.relation is not None:
            first, second = (reading.position[n, phrase.pair] for phrase in caption.phrases)
            ok = _holds(caption.relation, first, second)
        right.append(ok)
    return torch.tensor(right)
