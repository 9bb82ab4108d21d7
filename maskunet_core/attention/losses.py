"""How badly attention follows the words: the losses of Attend-and-Excite and of SynGen, for each image of a batch.

Maps are `[N, h, w, T]`: the share of attention that each place of a picture gives to each of T text tokens.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .words import WordSet

SHARPENED = 100.0
"""Attention is multiplied by this before Attend-and-Excite's softmax over the tokens."""
_KERNEL = (-1.0, 0.0, -1.0)
"""-d^2 of the places beside each other. Its softmax is the published kernel, whose standard deviation is 0.707."""


def smoothed(maps: Tensor) -> Tensor:
    """`[N, C, h, w]`, each place mixed with the eight around it; borders are reflected."""
    weights = maps.new_tensor(_KERNEL).softmax(0)
    kernel = torch.outer(weights, weights).expand(maps.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="reflect"), kernel, groups=maps.shape[1])


def peaks(maps: Tensor, subjects: Sequence[Sequence[int]], compared: Sequence[int], smooth: bool = True) -> Tensor:
    """`[N, S]`: how much the place that looks most at a subject looks at it, next to all compared tokens.

    subjects: token positions of each; a subject of several pieces gets the sum of their shares.
    """
    shares = (SHARPENED * maps[..., list(compared)]).softmax(-1)
    place = {position: index for index, position in enumerate(compared)}
    of_subjects = [shares[..., [place[position] for position in subject]].sum(-1) for subject in subjects]
    found = torch.stack(of_subjects, 1)
    return (smoothed(found) if smooth else found).flatten(2).amax(2)


def excite_loss(maps: Tensor, subjects: Sequence[Sequence[int]], compared: Sequence[int]) -> Tensor:
    """`[N]` in [0, 1], the loss of Attend-and-Excite: what the most neglected subject lacks."""
    return (1 - peaks(maps, subjects, compared)).clamp_min(0).amax(1)


def distances(maps: Tensor) -> Tensor:
    """`[N, T, T]`: symmetric Kullback-Leibler divergences between the tokens' maps, each of which is made to sum to 1.

    In float64, where sums may be taken apart, if the device has it. A map that is zero somewhere is far from others,
    not infinitely.
    """
    precise = torch.float32 if maps.device.type == "mps" else torch.float64
    share = maps.flatten(1, 2).to(precise).movedim(2, 1)
    share = share / share.sum(2, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
    smallest = torch.finfo(torch.float32).eps
    logarithm = share.clamp(smallest, 1 - smallest).log()
    crossed = share @ logarithm.mT
    own = crossed.diagonal(dim1=1, dim2=2)
    return (own[:, :, None] + own[:, None, :] - crossed - crossed.mT) / 2


def bind_loss(maps: Tensor, sets: Iterable[WordSet], prompt: Sequence[int]) -> Tensor:
    """`[N]`, unbounded below, the loss of SynGen: modifiers look where their nouns do, and away from all other words.

    prompt: positions of all tokens of the prompt, those in no set too. A noun without modifiers is only kept away.
    """
    place = {position: index for index, position in enumerate(prompt)}
    apart = distances(maps[..., list(prompt)])
    loss = apart.new_zeros(len(maps))

    def between(one: Sequence[int], other: Sequence[int]) -> Tensor:
        return apart[:, [place[position] for position in one]][:, :, [place[position] for position in other]]

    for found in sets:
        others = [position for position in prompt if position not in found.positions]

        def attraction(word: Sequence[int], others: Sequence[int] = others) -> Tensor | float:
            """Minus the mean distance to the other words."""
            return -between(word, others).amax(1).mean(1) if others else 0.0

        if not found.modifiers:
            loss = loss + attraction(found.noun)
        for modifier in found.modifiers:
            loss = loss + between(found.noun, modifier).amax((1, 2))
            loss = loss + (attraction(found.noun) + attraction(modifier)) / 2
    return loss.to(maps.dtype)
