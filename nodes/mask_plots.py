"""Diagrams of recorded masks. Without matplotlib each is a picture of one sentence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..maskunet_core.records.statistics import MaskStatistics, WeightStatistics, places, short_name
from .plots import figure, to_image

_WIDTH = 7.0
"""Inches, 770 pixels: what a preview shows at half its size can still be read."""
_MAP = "viridis"
"""Evenly bright steps: readable in grey, and for people who see colours differently."""
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osv^DP*"
_NAMED_LAYERS = 40
"""As many layers are named one by one; more of them by the module that they lie in."""
_ENOUGH = 1000
"""Weights in a bin of the histogram whose removed share means something."""


def _starts(names: Sequence[str]) -> list[int]:
    return [row for row, name in enumerate(names) if row == 0 or name != names[row - 1]]


def _label_layers(axes, masks: MaskStatistics) -> None:
    modules, layers = places(masks), masks.layers
    starts = _starts(modules)
    for rows, width in ((starts, 0.8), (_starts(masks.blocks), 2.4)):
        for start in rows[1:]:
            axes.axhline(start - 0.5, color="white", linewidth=width)
    if len(layers) <= _NAMED_LAYERS:
        named = [(row, f"{place}  {short_name(layer)}") for row, (place, layer) in enumerate(zip(modules, layers))]
        axes.set_ylabel("layer, in the model's order")
    else:
        ends = [*starts[1:], len(layers)]
        named = [((start + end - 1) / 2, modules[start]) for start, end in zip(starts, ends)]
        named = named[:: -(-len(named) // _NAMED_LAYERS)]
        axes.set_ylabel("layers in the model's order, by module")
    axes.set_yticks(*zip(*named), fontsize="small")


def _label_steps(axes, sigmas: tuple[float, ...]) -> None:
    steps = range(0, len(sigmas), -(-len(sigmas) // 16))
    axes.set_xticks(list(steps), [str(step + 1) for step in steps])
    axes.set_xlabel(f"sampling step (noise level $\\sigma$ falls from {sigmas[0]:.3g} to {sigmas[-1]:.3g})")


def _heat_map(masks: MaskStatistics, shares: Tensor, title: str, unit: str, lowest: float, highest: float) -> Tensor:
    rows = len(masks.layers)
    drawn = figure(_WIDTH, min(max(1.8 + 0.17 * min(rows, 48), 4.0), 10.0))
    if drawn is None:
        return to_image(None)
    axes = drawn.subplots()
    shown = axes.imshow(100 * shares.numpy(), aspect="auto", cmap=_MAP, interpolation="nearest")
    shown.set_clim(100 * lowest, 100 * highest)
    _label_layers(axes, masks)
    _label_steps(axes, masks.sigmas)
    axes.set_title(title, fontsize="medium")
    drawn.colorbar(shown, ax=axes, label=unit, pad=0.02)
    return to_image(drawn)


def _sentence(text: str) -> Tensor:
    """[1, H, W, 3] in a diagram's place."""
    drawn = figure(_WIDTH, 1.6)
    if drawn is not None:
        drawn.text(0.5, 0.5, text, ha="center", va="center")
    return to_image(drawn)


def keep_map(masks: MaskStatistics, subject: str) -> Tensor:
    """[1, H, W, 3]: keep ratio per layer and step. subject: whose masks, for the title."""
    if not masks.removed.any():
        return _sentence(f"Nothing is masked: all weights are kept ({subject}).")
    keep = 1 - masks.share(masks.removed)
    # A scale without a range would show noise, or nothing.
    lowest = min(float(keep.min()), 0.999)
    return _heat_map(masks, keep, f"Keep ratio per layer and step, {subject}", "weights kept (%)", lowest, 1.0)


def difference_map(masks: MaskStatistics, subject: str) -> Tensor:
    """[1, H, W, 3]: per layer and step, how many weights are kept in one recording and removed in the other."""
    if masks.differing is None:
        return _sentence("Connect 'other_masks' to compare two recordings.")
    differing = masks.share(masks.differing)
    overall = float(masks.differing.sum() / (masks.weights.sum() * len(masks.sigmas)))
    title = f"Where {subject} differ: {100 * overall:.3g} % of the weights"
    highest = max(float(differing.max()), 0.001)
    return _heat_map(masks, differing, title, "weights kept in just one of the two (%)", 0.0, highest)


def _curves(axes, curves: dict[str, Tensor], everything: Tensor, first: int) -> None:
    steps = torch.arange(first, len(everything))
    for n, (block, curve) in enumerate(curves.items()):
        colour, marker = _COLOURS[n % len(_COLOURS)], _MARKERS[n % len(_MARKERS)]
        axes.plot(steps, 100 * curve[first:], marker=marker, color=colour, markersize=5, linewidth=1.8, label=block)
    if len(curves) > 1:
        axes.plot(steps, 100 * everything[first:], "--", color="0.45", linewidth=1.5, label="all blocks")
    axes.grid(color="0.9", linewidth=0.8)
    axes.ticklabel_format(axis="y", useOffset=False)


def time_curves(masks: MaskStatistics, subject: str) -> Tensor:
    """[1, H, W, 3]: keep ratio of each block over the steps, and below it the bits that flip from step to step."""
    drawn = figure(_WIDTH, 6.0)
    if drawn is None:
        return to_image(None)
    kept, flipped = drawn.subplots(2, sharex=True)
    keep = {block: 1 - removed for block, removed in masks.share_of_blocks(masks.removed).items()}
    _curves(kept, keep, 1 - masks.share_of_all(masks.removed), first=0)
    kept.set_ylabel("weights kept (%)")
    kept.set_title(f"Keep ratio per block, {subject}", fontsize="medium")
    _curves(flipped, masks.share_of_blocks(masks.flipped), masks.share_of_all(masks.flipped), first=1)
    flipped.set_ylim(bottom=0)
    flipped.set_ylabel("weights switched (%)")
    flipped.set_title("Weights that are switched on or off against the step before", fontsize="medium")
    _label_steps(flipped, masks.sigmas)
    handles, labels = kept.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return to_image(drawn)


def weight_histograms(weights: WeightStatistics, subject: str) -> Tensor:
    """[1, H, W, 3]: how many weights of which magnitude are kept and removed, and what share is removed."""
    drawn = figure(_WIDTH, 6.0)
    if drawn is None:
        return to_image(None)
    counts, share = drawn.subplots(2, sharex=True, height_ratios=(3, 2))
    edges, kept, removed = (values.numpy() for values in (weights.edges, weights.kept, weights.removed))
    counts.stairs(kept, edges, color=_COLOURS[0], linewidth=1.8, label="kept")
    counts.stairs(removed, edges, color=_COLOURS[1], linewidth=1.8, fill=True, alpha=0.35)
    counts.stairs(removed, edges, color=_COLOURS[1], linewidth=1.8, label="removed")
    counts.set_xscale("log")
    counts.set_yscale("log")
    counts.set_ylabel("weights (mean per step)")
    counts.set_title(f"Kept and removed weights by magnitude, {subject}", fontsize="medium")
    counts.legend(frameon=False)
    total = weights.kept + weights.removed
    overall = 100 * float(weights.removed.sum() / total.sum())
    shares = torch.where(total >= _ENOUGH, 100 * weights.removed / total, torch.nan)
    share.stairs(shares.numpy(), edges, baseline=None, color=_COLOURS[1], linewidth=1.8)
    share.axhline(overall, color="0.45", linestyle="--", linewidth=1.5, label=f"of all weights: {overall:.3g} %")
    share.set_ylim(bottom=0)
    share.set_ylabel("weights removed (%)")
    share.set_title(f"Share that is removed (where there are {_ENOUGH} weights or more)", fontsize="medium")
    share.set_xlabel("magnitude of the weight, |w| (first bin: all smaller ones, too)")
    share.legend(frameon=False)
    for axes in (counts, share):
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    return to_image(drawn)
