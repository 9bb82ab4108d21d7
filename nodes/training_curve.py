"""The loss curve of a training."""

import torch
from torch import Tensor

from .plots import INK, LINES, darken, figure, to_image

_SMOOTH = 0.1
"""Share of a new loss in the running mean, as of a training of many steps."""


def _running_mean(losses: list[float]) -> list[float]:
    means: list[float] = []
    for loss in losses:
        before = means[-1] if means else loss
        means.append(before if loss != loss else before + max(_SMOOTH, 1 / (len(means) + 1)) * (loss - before))
    return means


def loss_curve(losses: list[float], held_out: list[tuple[int, float, float]], best: int | None) -> Tensor:
    """[1, H, W, 3]: the loss of each step (thin) with its running mean, and the held-out loss as a share of the base's.

    held_out: (step, loss, difference to the base's) of each validation; best: the step whose generator was kept.
    """
    drawn = figure(6.4, 4.2)
    if drawn is None:
        return to_image(None)
    axes = drawn.subplots()
    steps = torch.arange(1, len(losses) + 1).tolist()
    axes.plot(steps, losses, color="#60a5fa", linewidth=0.7, alpha=0.5)
    axes.plot(steps, _running_mean(losses), color="#60a5fa", linewidth=1.8, label="training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.grid(color=LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    if held_out:
        other = axes.twinx()
        gains = [100 * change / (loss - change) for _, loss, change in held_out]
        places = [step for step, _, _ in held_out]
        other.plot(places, gains, "o-", color="#fb923c", markersize=4, label="held-out loss against the base's")
        other.set_ylabel("held-out loss, % against the base's")
        if best in places:
            other.plot(best, gains[places.index(best)], "*", color="#fb923c", markersize=14, markeredgecolor=INK)
    handles = [handle for one in drawn.axes for handle in one.get_legend_handles_labels()[0]]
    drawn.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    darken(drawn)
    return to_image(drawn)
