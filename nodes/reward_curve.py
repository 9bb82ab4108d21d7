"""The reward curve of a search."""

import torch
from torch import Tensor

from ..maskunet_core.search.loop import Evaluation
from ..maskunet_core.search.run import SearchResult
from .plots import INK, LINES, darken, figure, to_image

_FEW = 8
"""As many images are told apart by colour."""
_COLOURS = ("#60a5fa", "#fb923c", "#4ade80", "#f472b6", "#facc15", "#22d3ee", "#c084fc", "#f87171")
_TICKS = 12
_APART = 3
"""Of the updates, by which the ends stand off them."""
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


def _colour(image: int, images: int) -> str:
    return _COLOURS[image] if images <= _FEW else "0.55"


def _draw_rewards(axes, scores: Tensor, steps: list[range], taken: Tensor) -> None:
    """Thin: each update; thick, with dots: what the steps were taken with. scores: `[looks, N]`."""
    images = scores.shape[1]
    for n in range(images):
        colour = _colour(n, images)
        for step in steps:
            axes.plot(list(step), scores[step.start : step.stop, n], color=colour, linewidth=0.8, alpha=0.6)
        axes.plot(taken[:, n], scores[taken[:, n], n], "o-", color=colour, markersize=3.5, linewidth=1.8)
    if images > _FEW:
        mean = scores.gather(0, taken).mean(1)
        label = f"mean of {images} images"
        axes.plot([step.start for step in steps], mean, "s-", color=_COLOURS[0], linewidth=2, label=label)


def _draw_ends(axes, first: Tensor | None, final: Tensor | None, length: int) -> None:
    """Diamonds: the chosen candidates, before all updates; stars: the finished images."""
    for place, scores, marker, size in ((-_APART, first, "D", 7), (length - 1 + _APART, final, "*", 14)):
        for n, score in enumerate(() if scores is None else scores.tolist()):
            axes.plot([place], [score], marker, color=_colour(n, len(scores)), markersize=size, markeredgecolor=INK)


def _draw_candidates(axes, candidates: list[Tensor], chosen: Tensor) -> None:
    """Without updates the candidates are all there is to see."""
    if not candidates:
        axes.axis("off")
        axes.text(0.5, 0.5, "No candidates and no updates: nothing was judged.", ha="center", transform=axes.transAxes)
        return
    scores = torch.stack(candidates).float()
    for n, best in enumerate(chosen.tolist()):
        colour = _colour(n, len(chosen))
        axes.plot(scores[:, n], "o", color=colour, markersize=4)
        axes.plot([best], [scores[best, n]], "*", color=colour, markersize=14, markeredgecolor=INK)
    axes.set_xticks(range(len(scores)), [str(n + 1) for n in range(len(scores))])
    axes.set_xlabel("candidate (no updates were made)")


def _legend(candidates: bool, judged: bool, updates: bool) -> list:
    from matplotlib.lines import Line2D

    def sign(marker: str, label: str, line: str = "none", size: int = 6) -> Line2D:
        return Line2D([], [], color=INK, marker=marker, linestyle=line, markersize=size, label=label)

    if not updates:
        return [sign("o", "candidate", size=4), sign("*", "chosen", size=11)] if candidates else []
    signs = [sign("D", "chosen candidate")] if candidates else []
    signs += [sign("o", "step", "-", 4), sign("", "update", "-")]
    return signs + ([sign("*", "final", size=11)] if judged else [])


def _short(name: str, otherwise: str) -> str:
    return name if len(name) <= _SHORT else otherwise


def _in_words(scores: Tensor) -> str:
    return f"{float(scores.float().mean()):.3f}"


def title_of(candidates: list[Tensor], first: Tensor | None, final: Tensor | None) -> str:
    """The finished image beside the plain one, the first candidate, as it was judged. Means over a batch."""
    plain = f"plain {_in_words(candidates[0])}, chosen {_in_words(first)}" if candidates else ""
    if final is None:
        return plain
    mean = f"mean of {len(final)}: " if len(final) > 1 else ""
    return f"{mean}final {_in_words(final)}" + (f" ({plain})" if plain else "")


def reward_curve(
    found: SearchResult, reward: str, watched: str | None, keep_best: bool, candidates: list[Tensor]
) -> Tensor:
    """[1, H, W, 3]: rewards of the chosen candidates, of the estimates at each update, step by step, and of the
    finished images; and the watched one where steps are taken.

    reward, watched: their names. keep_best: steps are taken with the best masks that were seen, else with the last.
    candidates: rewards `[N]` of each that was judged; the first is the plain image.
    """
    drawn = figure(6.4, 4.2)
    if drawn is None:
        return to_image(None)
    axes, history, others = drawn.subplots(), found.history, []
    first = torch.stack(candidates).float().gather(0, found.candidates.cpu()[None])[0] if candidates else None
    final = None if found.scores is None else found.scores.float().cpu()
    if history:
        scores, steps = torch.stack([look.scores.float() for look in history]), _steps(history)
        taken = _taken(scores, steps, keep_best)
        _draw_rewards(axes, torch.stack([look.rewards.float() for look in history]), steps, taken)
        _draw_ends(axes, first, final, len(history))
        shown = steps[:: -(-len(steps) // _TICKS)]
        axes.set_xticks([step.start for step in shown], [str(history[step.start].step + 1) for step in shown])
        axes.set_xlabel("step of the sampler, with its updates")
    else:
        _draw_candidates(axes, candidates, found.candidates)
    axes.grid(color=LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel(_short(reward, "reward (weighted sum)"))
    axes.set_title(title_of(candidates, first, final), fontsize="large")
    if watched is not None and history:
        other = axes.twinx()
        values = torch.stack([look.watched.float() for look in history]).gather(0, taken).mean(1)
        label = f"watched: {_short(watched, 'weighted sum')}"
        others = other.plot([step.start for step in steps], values, "^--", color=INK, markersize=4, label=label)
        other.set_ylabel(f"{_short(watched, 'weighted sum')} (watched, mean)")
    signs = _legend(bool(candidates), final is not None, bool(history))
    handles = signs + axes.get_legend_handles_labels()[0] + others
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    darken(drawn)
    return to_image(drawn)
