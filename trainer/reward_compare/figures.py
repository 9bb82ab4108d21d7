"""The plot of accuracy over compute, and a sheet of pictures."""

import textwrap
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from maskunet_core.replacing import replacing

from .plan import SHOWN

COLUMNS = 8
"""Prompts of the sheet."""
CHAINS = (("base", "best of "), ("4 steps", "4 steps, best of "), ("CFG 1", "CFG 1, best of "))
"""What is drawn plainly, and how its best of N are called."""
TICKS = (0.25, 1, 4, 16, 64)


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _accuracy(row: dict[str, Any]) -> tuple[float, float]:
    """Mean and standard error, 0 where there is none."""
    mean, _, error = row["right by the judge"].partition(" ± ")
    return float(mean), float(error or 0)


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """The judge's accuracy over operations, a point per method, the best named first. rows: of the table.

    Plain drawing and best of N are joined by a line, of the student and without guidance, too.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 5.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for plain, best_of in CHAINS:
        chain = [row for row in rows if row["method"] == plain or row["method"].startswith(best_of)]
        points = sorted((row["operations"], _accuracy(row)[0]) for row in chain)
        axes.plot([x for x, _ in points], [y for _, y in points], "-", color="0.8", zorder=1)
    for number, row in enumerate(sorted(rows, key=_accuracy, reverse=True)):
        mean, error = _accuracy(row)
        look = {"fmt": "osD^vPX"[number % 7], "color": f"C{number % 10}", "markersize": 5, "capsize": 2}
        axes.errorbar(row["operations"], mean, yerr=error, label=row["method"], **look)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("operations, in plain images")
    axes.set_ylabel("pictures that the judge finds fully right")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", frameon=False)
    _save(figure, path)


def sheet(
    path: Path, prompts: list[str], classes: list[str], files: dict[str, Path], right: dict[str, list[bool]]
) -> None:
    """A row per method of SHOWN, the first prompts of the two harder classes; green frames: right by the judge.

    classes: how hard each prompt is; files: with `pictures` of the first prompts; right: of every prompt, by method.
    """
    from matplotlib.figure import Figure

    pictures = {method: load_file(files[method])["pictures"] for method in SHOWN if method in files}
    drawn = min((len(of_method) for of_method in pictures.values()), default=0)
    columns = [n for n in range(drawn) if classes[n] != "more"][:COLUMNS]
    if not columns:
        return
    figure = Figure(figsize=(1.15 * COLUMNS + 1.2, 1.1 * len(pictures) + 0.7), dpi=110, layout="constrained")
    axes = figure.subplots(len(pictures), len(columns), squeeze=False)
    for line, (method, of_method) in zip(axes, pictures.items()):
        line[0].set_ylabel(textwrap.fill(method, 14), rotation=0, ha="right", va="center", fontsize=8)
        for axis, n in zip(line, columns):
            axis.imshow(of_method[n].permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color="tab:green" if right[method][n] else "0.8", linewidth=2.5)
    for axis, n in zip(axes[0], columns):
        axis.set_title(textwrap.fill(prompts[n], 17), fontsize=7)
    _save(figure, path)
