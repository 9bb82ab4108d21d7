"""The reward curve of a search."""

import torch
from torch import Tensor

from ..maskunet_core.search.loop import Evaluation
from ..maskunet_core.search.run import SearchResult
from .plots import figure, to_image

_FEW = 8
"""As many images are told apart by colour."""
_TICKS = 16
_SHORT = 40
"""Characters of a reward's name that fit beside an axis."""


def _steps(history: list[Evaluation]) -> list[range]:
    """Places in the history of each search at a step."""
    starts = [place for place, look in enumerate(history) if look.iteration == 0]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(history)])]


def _taken(scores: Tensor, steps: list[range], keep_best: bool) -> Tensor:
    """`[steps, N]`: where in the history the masks are that each step of each image was taken with."""
    if not keep_best:
        return torch.tensor([step[-1:] for step in map(list, steps)]).expand(-1, scores.shape[1])
    return torch.stack([step.start + scores[step.start : step.stop].argmax(0) for step in steps])


def _without_updates(axes, found: SearchResult) -> None:
    text = "No updates were made, so there is nothing to draw."
    if found.scores is not None:
        best = ", ".join(f"{float(score):.3f}" for score in found.scores[:_FEW])
        text = f"No updates were made.\nReward of the best candidate, image by image: {best}"
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)


def _draw_rewards(axes, scores: Tensor, steps: list[range], taken: Tensor) -> None:
    """Thin: each update; thick, with dots: what the steps were taken with."""
    images = scores.shape[1]
    for n in range(images):
        colour = f"C{n}" if images <= _FEW else "0.7"
        for step in steps:
            axes.plot(list(step), scores[step.start : step.stop, n], color=colour, linewidth=0.8, alpha=0.6)
        label = f"image {n + 1}" if images <= _FEW else None
        axes.plot(taken[:, n], scores[taken[:, n], n], "o-", color=colour, markersize=3.5, linewidth=1.8, label=label)
    if images > _FEW:
        mean = scores.gather(0, taken).mean(1)
        axes.plot([step.start for step in steps], mean, "s-", color="C0", linewidth=2, label=f"mean of {images} images")


def _short(name: str, otherwise: str) -> str:
    return name if len(name) <= _SHORT else otherwise


def reward_curve(found: SearchResult, reward: str, watched: str | None, keep_best: bool = True) -> Tensor:
    """[1, H, W, 3]: reward of the estimates at each update, step by step, and the watched one where steps are taken.

    reward, watched: their names. keep_best: steps are taken with the best masks that were seen, else with the last.
    """
    drawn = figure(8, 4.8)
    if drawn is None:
        return to_image(None)
    axes, history = drawn.subplots(), found.history
    if not history:
        _without_updates(axes, found)
        return to_image(drawn)
    scores, steps = torch.stack([look.scores.float() for look in history]), _steps(history)
    taken = _taken(scores, steps, keep_best)
    _draw_rewards(axes, scores, steps, taken)
    shown = steps[:: -(-len(steps) // _TICKS)]
    axes.set_xticks([step.start for step in shown], [str(history[step.start].step + 1) for step in shown])
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_xlabel("step of the sampler, with its updates")
    axes.set_ylabel(_short(reward, "reward (weighted sum)"))
    axes.set_title("Reward of the estimated image (dots: what each step was taken with)", fontsize="medium")
    if watched is not None:
        other = axes.twinx()
        values = torch.stack([look.watched.float() for look in history]).gather(0, taken).mean(1)
        label = f"watched: {_short(watched, 'weighted sum')}"
        other.plot([step.start for step in steps], values, "k^--", markersize=4, linewidth=1.2, label=label)
        other.set_ylabel(f"{_short(watched, 'weighted sum')} (watched, mean)")
    drawn.legend(loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    return to_image(drawn)
