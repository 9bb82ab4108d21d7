"""Figures of the comparison, as PNG; matplotlib is imported late, and without it there are none."""

import json
from pathlib import Path
from typing import Any

import torch

from maskunet_core.replacing import replacing

from ..job_board import folder_of
from .jobs import STRIP
from .plan import ARMS, Scale, Task


def write_figures(output: Path, rows: list[dict[str, Any]], scale: Scale) -> None:
    """`figures/gain_and_forgetting.png`; of seed 0 `pictures_<task>.png`, `masks_<task>.png` and `pca_<task>.png`."""
    try:
        import matplotlib
    except ImportError:
        print("No figures: matplotlib is missing (pip install matplotlib).")
        return
    matplotlib.use("Agg")
    _gain_and_forgetting(output / "figures" / "gain_and_forgetting.png", rows, scale)
    for task in scale.tasks:
        name = folder_of(output, task.name).name
        _pictures(output / "figures" / f"pictures_{name}.png", _strips(output, task), task.name)
        path = folder_of(output, f"{task.name}/maskunet/seed-0") / "masks.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            _keep_ratio(output / "figures" / f"masks_{name}.png", found, task.name)
            _principal_axes(output / "figures" / f"pca_{name}.png", found, task.name)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def _gain_and_forgetting(path: Path, rows: list[dict[str, Any]], scale: Scale) -> None:
    import matplotlib.pyplot as plt

    trained = {row["task"] for row in rows if row["method"] in ARMS}
    tasks = [task.name for task in scale.tasks if task.name in trained]
    if not tasks:
        return
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.8), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        for number, arm in enumerate(ARMS):
            for row in rows:
                if (row["task"], row["method"]) == (task, arm):
                    errors = {"xerr": row["old_error"] or 0.0, "yerr": row["new_error"] or 0.0}
                    axis.errorbar(row["old"], row["new"], **errors, fmt="o", color=f"C{number}", capsize=2, label=arm)
        axis.axhline(0, color="grey", linewidth=0.6)
        axis.axvline(0, color="grey", linewidth=0.6)
        axis.plot(0, 0, "k+", label="base")
        axis.set_title(task)
        axis.set_xlabel("old domain: change of loss x 1e-4 (right: forgetting)")
    axes[0][0].set_ylabel("new domain: change of loss x 1e-4 (down: gain)")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    _save(figure, path)


def _strips(output: Path, task: Task) -> dict[str, Path]:
    """Files of the base's pictures, and of those of each arm's seed 0, by name."""
    folders = {"base": f"{task.world}/data", **{arm: f"{task.name}/{arm}/seed-0" for arm in task.arms}}
    files = {name: folder_of(output, folder) / STRIP for name, folder in folders.items()}
    return {name: path for name, path in files.items() if path.exists()}


def _pictures(path: Path, strips: dict[str, Path], task: str) -> None:
    """A row per method, the same prompts and noises in all."""
    import matplotlib.pyplot as plt

    if len(strips) < 2:
        return
    figure, axes = plt.subplots(len(strips), 1, figsize=(8, 0.95 * len(strips)))
    for axis, (name, strip) in zip(axes, strips.items()):
        axis.imshow(plt.imread(strip))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_title(task, fontsize=9)
    _save(figure, path)


def _keep_ratio(path: Path, found: dict[str, Any], task: str) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.4))
    for block, keep in found["keep_ratio"].items():
        axis.plot(found["timesteps"], keep, marker=".", label=block)
    axis.set_xlabel("timestep (right: more noise)")
    axis.set_ylabel("keep ratio")
    axis.set_title(f"maskunet on {task}")
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.legend()
    _save(figure, path)


def _principal_axes(path: Path, found: dict[str, Any], task: str) -> None:
    import matplotlib.pyplot as plt

    points, prompts = torch.tensor(found["points"]), found["prompts"]
    steps = torch.tensor(found["timesteps"]).repeat_interleave(len(prompts))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8))
    shown = left.scatter(points[:, 0], points[:, 1], c=steps, s=12, cmap="viridis")
    figure.colorbar(shown, ax=left, label="timestep")
    for number, prompt in enumerate(prompts):
        these = points[number :: len(prompts)]
        right.scatter(these[:, 0], these[:, 1], s=12, color=plt.cm.tab10(number % 10), label=prompt)
    right.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis, what in ((left, "timestep"), (right, "picture")):
        axis.set_xlabel("first principal axis of the masks")
        axis.set_ylabel("second")
        axis.set_title(f"maskunet on {task}, by {what}", fontsize=9)
    figure.tight_layout()
    _save(figure, path)
