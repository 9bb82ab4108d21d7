"""The table and the plot of what is done so far."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..files import replacing
from ..job_board import folder_of, result_of
from ..tables import write_table
from .plan import DIFFICULTY, METHODS, Scale

CLASSES = ("never", "up to 1 in 4", "more")


def classes_of(successes: list[int], draws: int) -> list[str]:
    """How hard each prompt is, by how often the base succeeded in `draws` tries."""
    return [CLASSES[0] if n == 0 else CLASSES[1] if 4 * n <= draws else CLASSES[2] for n in successes]


def share(values: Tensor) -> str:
    """Mean with its standard error over prompts; values: `[seeds, prompts]`, seeds of a prompt belong together."""
    if values.numel() == 0:
        return ""
    of_prompt = values.float().mean(0)
    if len(of_prompt) < 2:
        return f"{of_prompt.mean():.3f}"
    return f"{of_prompt.mean():.3f} ± {of_prompt.std() / len(of_prompt) ** 0.5:.3f}"


def _diversity(features: list[Tensor]) -> str:
    """Mean distance between the judge's features of one prompt's pictures at different seeds."""
    if len(features) < 2:
        return ""
    pairs = [(a - b).norm(dim=1) for n, a in enumerate(features) for b in features[:n]]
    return f"{torch.stack(pairs).mean():.2f}"


def rows_of(output: Path, scale: Scale) -> list[dict[str, Any]]:
    """A row per method that has a seed; costs in plain images, counted and in CPU seconds of the same machine."""
    base = result_of(output, "base/seed-0")
    hard = result_of(output, DIFFICULTY)
    rows = []
    for method in METHODS:
        names = [f"{method}/seed-{seed}" for seed in range(scale.seeds)]
        found = [(name, result) for name in names if (result := result_of(output, name)) is not None]
        if not found or base is None:
            continue
        results = [result for _, result in found]
        right = torch.tensor([result["right"] for result in results])
        row = {
            "method": method,
            "operations": round(results[0]["operations"] / base["operations"], 1),
            "seconds": round(sum(r["seconds"] for r in results) / len(results) / base["seconds"], 1),
            "right by the judge": share(right),
        }
        if hard is not None:
            classes = classes_of(hard["successes"], hard["draws"])[: right.shape[1]]
            for name in CLASSES:
                row[name] = share(right[:, torch.tensor([c == name for c in classes])])
        row["right by the reward's reader"] = share(torch.tensor([result["right_by_reward"] for result in results]))
        row["reward"] = f"{sum(sum(r['reward']) / len(r['reward']) for r in results) / len(results):.2f}"
        whole = right.shape[1] == scale.prompts
        for name in ("frechet", "frechet_patches"):
            # Of fewer pictures it would not be comparable.
            row[name] = f"{sum(r[name] for r in results) / len(results):.3f}" if whole else ""
        features = [load_file(folder_of(output, name) / "features.safetensors")["features"] for name, _ in found]
        row |= {"diversity": _diversity(features), "prompts": right.shape[1], "seeds": len(results)}
        rows.append(row)
    return rows


def write_report(output: Path, scale: Scale) -> None:
    rows = rows_of(output, scale)
    if rows:
        write_table(output, rows, asdict(scale))
        _plot(output / "accuracy_over_compute.png", rows)


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    chain = [row for row in rows if row["method"] == "base" or row["method"].startswith("best of")]
    chain.sort(key=lambda row: row["operations"])
    axes.plot([row["operations"] for row in chain], [_value(row) for row in chain], "-", color="0.7", label="best of N")
    for row in rows:
        mean, error = _value(row), _error(row)
        axes.errorbar(row["operations"], mean, yerr=error, fmt="o", markersize=4, capsize=2)
        axes.annotate(row["method"], (row["operations"], mean), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("operations, in plain images")
    axes.set_ylabel("pictures that the judge finds fully right")
    axes.legend(loc="lower right", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _value(row: dict[str, Any]) -> float:
    return float(row["right by the judge"].split(" ± ")[0])


def _error(row: dict[str, Any]) -> float:
    parts = row["right by the judge"].split(" ± ")
    return float(parts[1]) if len(parts) > 1 else 0.0
