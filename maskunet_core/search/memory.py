"""What a search will take at its peak, from what autograd keeps of small latents."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..models.structure import Structure
from ..rewards.reward import BoundReward
from .host import NoRoomForGradients
from .judge import Judge
from .lean import LeanGraph
from .sampling import RewardSearch
from .settings import SearchSettings

SIDES = (8, 16, 24)
"""Of the latents that are tried, in cells: what is kept is a polynomial of the area, quadratic by its attention."""
_AT_WORK = 3
"""Tensors of the largest kept size that an operation holds besides: its result, its gradient, and a copy laid out
anew."""


@dataclass(frozen=True)
class Graph:
    """Bytes that autograd keeps of a forward pass, and of the largest tensor among them."""

    bytes: float
    largest: float

    @property
    def peak(self) -> float:
        return self.bytes + _AT_WORK * self.largest

    def times(self, images: int) -> "Graph":
        return Graph(images * self.bytes, images * self.largest)


@dataclass(frozen=True)
class Need:
    """Bytes of a search beyond the models themselves. masks: logits, their optimiser, their bits; slopes: gradients of
    logits; features: of the encoder; weights: copies of the largest weight that kernels lay out anew."""

    masks: float
    slopes: float
    features: float
    weights: float
    unet: Graph
    vae: Graph
    reward: Graph

    @property
    def peak(self) -> int:
        """The U-Net's graph waits while the picture is judged, whose graph waits while each reward is asked."""
        judging = self.unet.bytes + max(self.vae.bytes + self.reward.peak, self.vae.peak)
        updating = self.unet.peak + self.slopes
        return int(self.masks + self.features + self.weights + max(judging, updating))


class KeptByAutograd:
    """Counts what is saved for backward passes inside the block, while all of it lives."""

    def __init__(self):
        self._kept: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def graph(self, besides: Iterable[Tensor]) -> Graph:
        """What is kept besides tensors that are there anyway, such as weights."""
        known = {tensor.untyped_storage().data_ptr() for tensor in besides}
        kept = [size for pointer, size in self._kept.items() if pointer not in known]
        return Graph(sum(kept), max(kept, default=0))

    def __enter__(self) -> "KeptByAutograd":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def extrapolated(values: dict[int, float], area: int) -> float:
    """The polynomial through (area, value) pairs at another area."""
    total = 0.0
    for one, value in values.items():
        weight = 1.0
        for other in values:
            if other != one:
                weight *= (area - other) / (one - other)
        total += weight * value
    return max(total, 0.0)


def _tried(area: int) -> list[tuple[int, int]]:
    """(side, area) of the latents to try: one of the size itself where that is small."""
    sides = SIDES if area > SIDES[-1] ** 2 else [max(1, round(area**0.5))]
    return [(side, side * side) for side in sides]


def _graph_at(area: int, graph_of: Callable[[int], Graph]) -> Graph:
    found = {tried: graph_of(side) for side, tried in _tried(area)}
    kept, largest = {n: g.bytes for n, g in found.items()}, {n: g.largest for n, g in found.items()}
    return Graph(extrapolated(kept, area), extrapolated(largest, area))


class CannotEstimate(Exception):
    """Small latents do not pass the sampler: areas of the conditioning lie outside of them, for instance."""


class _Enough(Exception):
    pass


class _Stop:
    """In a Judge's place: ends the sampling as soon as there is an estimate."""

    def scores_and_gradient(self, *_) -> None:
        raise _Enough


def estimate_need(
    *,
    model: Any,
    settings: SearchSettings,
    targets: str,
    judge: Judge,
    bound: BoundReward,
    size: tuple[int, int, int, int],
    sample: Callable[[Any, Tensor], Any],
    weights: Sequence[Tensor],
    device: torch.device,
) -> Need:
    """For latents of `size` `[N, C, h, w]`. The models lie on the device already. Raises CannotEstimate.

    sample: begins the host's sampler on (MODEL, noise `[1, C, s, s]`). bound: the reward that `judge` asks. weights: of
    all models.
    """
    images, channels, height, width = size
    once = replace(settings, iterations=1, start_percent=0.0, end_percent=1.0, seconds=0.0)
    features: dict[int, float] = {}

    def of_unet(side: int) -> Graph:
        search = RewardSearch(model, once, _Stop(), 1, targets=targets)
        with KeptByAutograd() as kept, contextlib.suppress(_Enough):
            _begin(sample, search.model, torch.zeros(1, channels, side, side))
        features[side * side] = search.encoder.bytes
        return kept.graph([*weights, *search.leaves()])

    def of_vae(side: int) -> Graph:
        with torch.enable_grad(), LeanGraph(), KeptByAutograd() as kept:
            judge.decode(torch.zeros(1, channels, side, side, device=device).requires_grad_())
        return kept.graph(weights)

    def of_reward(part: BoundReward, cells: tuple[int, int]) -> Graph:
        pixels = [side * judge.pixels_per_cell for side in cells]
        with torch.enable_grad(), KeptByAutograd() as kept:
            part(torch.zeros(1, 3, *pixels, device=device).requires_grad_())
        return kept.graph(weights)

    decoded = judge.decoded_size(height, width)
    unet = _graph_at(height * width, of_unet)
    vae = _graph_at(decoded[0] * decoded[1], of_vae)
    rewards = [of_reward(part, decoded) for _, part in bound.parts()]
    reward = max(rewards, key=lambda graph: graph.peak)
    masks, slopes = _of_masks(RewardSearch(model, once, judge, 1, targets=targets).structure, settings)
    of_features = extrapolated(features, height * width)
    laid_out = 2 * max(weight.nbytes for weight in weights)
    graphs = [graph.times(images) for graph in (unet, vae, reward)]
    return Need(images * masks, images * slopes, images * of_features, laid_out, *graphs)


def _begin(sample: Callable[[Any, Tensor], Any], model: Any, noise: Tensor) -> None:
    try:
        sample(model, noise)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        raise CannotEstimate(str(error)) from error


def _of_masks(structure: Structure, settings: SearchSettings) -> tuple[int, int]:
    """Bytes for one image: what stays over a step, and gradients."""
    if not settings.masks:
        return 0, 0
    numbers, moments = structure.masked_weights, 2 if settings.optimiser == "AdamW" else int(settings.momentum > 0)
    logits, bits = 4 * numbers, 2 * numbers
    return (1 + moments) * logits + bits, logits


def require_room(need: Need, free: int, settings: SearchSettings, device: str, small_vae: bool) -> None:
    """Raises NoRoomForGradients, with what to lower, where the need is more than `free` bytes.

    small_vae: whether a small decoder works on the gradient's way already.
    """
    if need.peak <= free:
        return
    changes = []
    if need.vae.bytes > need.unet.bytes / 4:
        if not small_vae:
            changes.append("connect a TAESD to gradient_vae")
        if not settings.small_decode:
            changes.append("switch small_decode on (preset quality has it)")
    if settings.branches != "positive":
        changes.append("set branches to positive (preset quality has it)")
    if need.reward.bytes > need.unet.bytes / 4:
        changes.append("load the reward with checkpointing")
    changes.append("lower the size or the batch")
    raise NoRoomForGradients(
        f"The search would take about {_size(need.peak)} beside the models on {device}, where {_size(free)} are free. "
        f"What makes it smaller: {', '.join(changes)}."
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
