"""Text conditions of any length in one batch.

What text encoders give is as long as the text. Padding would change what a transformer computes, and not all of them
take a mask: so texts of a batch are kept together padded, and handed to a model in groups of one length.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Conditions = dict[str, Tensor]
"""By name; [B, ...] of a batch, or without B of one text."""
LENGTH = "length of "
"""In front of the name of a condition whose lengths differ in a batch: what each of them is, [B]."""


def stacked(texts: list[Conditions]) -> Conditions:
    """Conditions of single texts as those of a batch; the first dimension of each may differ."""
    found = {}
    for name in texts[0]:
        values = [text[name] for text in texts]
        lengths = [len(value) for value in values]
        found[name] = pad_sequence(values, batch_first=True)
        if len(set(lengths)) > 1:
            found[LENGTH + name] = torch.tensor(lengths)
    return found


def by_length(conditions: Conditions) -> list[tuple[Tensor | slice, Conditions]]:
    """The rows whose texts are equally long, and their conditions as `stacked` was given them."""
    names = [name.removeprefix(LENGTH) for name in conditions if name.startswith(LENGTH)]
    if not names:
        return [(slice(None), conditions)]
    lengths = torch.stack([conditions[LENGTH + name] for name in names], 1)
    found = []
    for together in lengths.unique(dim=0):
        rows = (lengths == together).all(1).nonzero()[:, 0]
        group = {name: value[rows] for name, value in conditions.items() if not name.startswith(LENGTH)}
        found.append((rows, group | {name: group[name][:, :end] for name, end in zip(names, together.tolist())}))
    return found


def joined(some: Conditions, others: Conditions) -> Conditions:
    """Two batches as one."""
    return stacked([text for batch in (some, others) for text in _apart(batch)])


def _apart(conditions: Conditions) -> list[Conditions]:
    texts: list[Conditions] = [{} for _ in next(iter(conditions.values()))]
    for rows, group in by_length(conditions):
        places = range(len(texts))[rows] if isinstance(rows, slice) else rows.tolist()
        for n, place in enumerate(places):
            texts[place] = {name: value[n] for name, value in group.items()}
    return texts
