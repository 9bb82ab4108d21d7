"""The tables of what is done so far, and its figures."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from maskunet_core.judges.statistics import diversity

from ..job_board import folder_of, result_of
from ..tables import write_table
from .figures import plot, sheet
from .jobs import JUDGED
from .plan import DIFFICULTY, METHODS, PAIRS, Scale

CLASSES = ("never", "up to 1 in 4", "more")
"""How often the base succeeds."""


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


def _shares(values: Tensor, classes: list[str]) -> dict[str, str]:
    """By how hard the prompts are; values: `[seeds, prompts]` of the first prompts."""
    of_prompts = classes[: values.shape[1]]
    return {name: share(values[:, torch.tensor([c == name for c in of_prompts])]) for name in CLASSES}


def _classes(output: Path) -> list[str] | None:
    """How hard each prompt is, where that is measured."""
    hard = result_of(output, DIFFICULTY)
    return hard and classes_of(hard["successes"], hard["draws"])


def _diversity(features: list[Tensor]) -> str:
    """Mean distance between the judge's features of one prompt's pictures at different seeds."""
    if len(features) < 2:
        return ""
    return f"{diversity(torch.stack(features)).mean():.2f}"


def rows_of(output: Path, scale: Scale) -> list[dict[str, Any]]:
    """A row per method that has a seed; costs in plain images, counted and in CPU seconds of the same machine."""
    base, classes = _result(output, "base", 0), _classes(output)
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
            "operations": round(results[0]["operations"] / base["operations"], 2),
            "seconds": round(sum(r["seconds"] for r in results) / len(results) / base["seconds"], 2),
            "right by the judge": share(right),
        }
        if classes is not None:
            row |= _shares(right, classes)
        row["right by the reward's reader"] = share(torch.tensor([result["right_by_reward"] for result in results]))
        row["reward"] = f"{sum(sum(r['reward']) / len(r['reward']) for r in results) / len(results):.2f}"
        whole = right.shape[1] == scale.prompts
        for name in ("frechet", "frechet_patches"):
            # Of fewer pictures it would not be comparable.
            row[name] = f"{sum(r[name] for r in results) / len(results):.3f}" if whole else ""
        features = [load_file(folder_of(output, name) / JUDGED)["features"] for name, _ in found]
        row |= {"diversity": _diversity(features), "prompts": right.shape[1], "seeds": len(results)}
        rows.append(row)
    return rows


def differences_of(output: Path, scale: Scale) -> list[dict[str, Any]]:
    """A row per pair of PAIRS that was measured: how much more often the first is right on the same prompts and seeds.

    operations, seconds: of the first over the second.
    """
    classes = _classes(output)
    rows = []
    for method, rival in PAIRS:
        both = [(_result(output, method, seed), _result(output, rival, seed)) for seed in range(scale.seeds)]
        both = [pair for pair in both if None not in pair]
        if not both:
            continue
        count = min(len(result["right"]) for result in both[0])
        mine, other = (torch.tensor([pair[side]["right"][:count] for pair in both]).float() for side in (0, 1))
        row = {"method": method, "rival": rival, "all prompts": share(mine - other)}
        row |= _shares(mine - other, classes) if classes is not None else {}
        row["operations"] = round(both[0][0]["operations"] / both[0][1]["operations"], 2)
        row["seconds"] = round(sum(a["seconds"] for a, _ in both) / sum(b["seconds"] for _, b in both), 2)
        rows.append(row | {"prompts": count, "seeds": len(both)})
    return rows


def _result(output: Path, method: str, seed: int) -> dict[str, Any] | None:
    return result_of(output, f"{method}/seed-{seed}")


def write_report(output: Path, scale: Scale) -> None:
    """`table` and `differences`, as Markdown and JSON, the plot, and the sheet of pictures."""
    rows = rows_of(output, scale)
    if not rows:
        return
    write_table(output, rows, asdict(scale))
    if differences := differences_of(output, scale):
        write_table(output, differences, asdict(scale), "differences")
    plot(output / "accuracy_over_compute.png", rows)
    if (classes := _classes(output)) is not None:
        results = {method: _result(output, method, 0) for method in METHODS}
        files = {m: folder_of(output, f"{m}/seed-0") / JUDGED for m, found in results.items() if found is not None}
        right = {method: results[method]["right"] for method in files}
        sheet(output / "pictures.png", result_of(output, DIFFICULTY)["prompts"], classes, files, right)
