"""The reward curve of a search."""

from torch import Tensor

from ..maskunet_core.search.run import Found
from .plots import figure, to_image


def reward_curve(found: Found, reward: str, watched: str | None) -> Tensor:
    """[1, H, W, 3]: reward of the estimates at each look, a line per image, steps marked by vertical lines."""
    drawn = figure(8, 4.5)
    if drawn is None:
        return to_image(None)
    axes = drawn.subplots()
    axes.set_xlabel("updates, grouped by step of the sampler (vertical lines)")
    axes.set_ylabel(reward if len(reward) < 50 else "reward (weighted sum)")
    history = found.history
    if not history:
        text = (
            "No updates were made: nothing to draw." if found.scores is None else "No updates: best of the candidates."
        )
        axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
        return to_image(drawn)
    for n in range(len(history[0].scores)):
        label = f"image {n + 1}" if len(history[0].scores) <= 8 else None
        axes.plot([float(look.scores[n]) for look in history], label=label, linewidth=1.2)
    starts = [i for i, look in enumerate(history) if look.iteration == 0]
    for place in starts:
        axes.axvline(place, color="0.85", linewidth=0.8, zorder=0)
    axes.set_xticks(starts, [str(history[place].step + 1) for place in starts])
    if watched is not None:
        other = axes.twinx()
        other.plot([float(look.watched.mean()) for look in history], "k--", linewidth=1, label=f"watched: {watched}")
        other.set_ylabel(f"{watched} (watched, mean)")
        other.legend(loc="lower right", fontsize="small")
    if len(history[0].scores) <= 8:
        axes.legend(loc="upper left", fontsize="small")
    axes.set_title("reward of the estimated image")
    return to_image(drawn)
