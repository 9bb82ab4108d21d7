"""Tables of what is done so far: a section per task and one of ablations, for people and for programs."""

import json
import statistics
from pathlib import Path
from typing import Any

from maskunet_core.replacing import replacing

from ..job_board import result_of
from ..tables import machine, to_markdown
from .figures import write_figures
from .jobs import NEW, OLD
from .plan import Scale, Task, make_plan, scale_to_values

TITLES = {
    "noise": "Noise: a base of half wrong captions, tuned on right ones",
    "style": "Style: {style_pictures} pictures of another background and tilted shapes",
    "style, more layers": "Style, on the feed-forward layers too",
    "subject": "Subject: {subject_pictures} pictures of a two-coloured star",
    "subject, prior": "Subject with prior preservation",
}
PICTURE_COLUMNS = (
    "one",
    "two",
    "relation",
    "frechet_new",
    "frechet_old",
    "diversity",
    "style",
    "style_strength",
    "subject",
    "subject_diversity",
    "stars",
)
MASK_COLUMNS = ("keep_ratio", "between_timesteps", "between_samples")
LEGEND = """Changes are of the held-out loss against the base's, x 1e-4, on the same pictures, noises, timesteps: below
zero is better. `new`: the domain that is tuned to. `old`: the base's own, where above zero is forgetting. ±: the
standard error over seeds. `best`: at each run's best validation instead of its last step. `one`, `two`, `relation`:
share of pictures of held-out prompts that a judge finds fully right. `frechet`: distance of the judge's features to
real pictures. `diversity`: distance between two pictures of one prompt. `style`, `subject`: share of pictures that show
it, by their pixels. `style_strength`: their tint and shade over those of the style. `stars`: accuracy of "a red star"
and the like. `keep_ratio`: share of masked weights that are kept. `between_timesteps`, `between_samples`: share of them
whose bit is not the same over 8 timesteps of a picture, or over 8 pictures at a timestep.
`s/step`: CPU seconds, one thread."""


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean; None for one value."""
    mean = sum(values) / len(values)
    return mean, statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _finals(output: Path, task: Task, name: str, seeds: int) -> list[dict[str, Any]]:
    found = [result_of(output, f"{task.name}/{name}/seed-{seed}") for seed in range(seeds)]
    return [result for result in found if result is not None]


def _put(row: dict[str, Any], key: str, values: list[float | None]) -> None:
    known = [value for value in values if value is not None]
    if known:
        row[key], row[f"{key}_error"] = mean_and_error(known)


def make_row(task: Task, name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of a table with plain keys: each measured value's mean, and its standard error under `<key>_error`."""
    row: dict[str, Any] = {"task": task.name, "method": name, "seeds": len(results)}
    for key in ("parameters", "factor"):
        row[key] = results[0].get(key)
    _put(row, "seconds_per_step", [result.get("seconds_per_step") for result in results])
    for state, prefix in (("last", ""), ("best", "best_")):
        found = [result[state] for result in results if state in result]
        if found:
            _put(row, f"{prefix}new", [1e4 * each[NEW][0] for each in found])
            _put(row, f"{prefix}old", [1e4 * each[OLD][0] for each in found])
            _put(row, f"{prefix}sum", [1e4 * (each[NEW][0] + each[OLD][0]) for each in found])
        if state == "best" and found:
            row["best_steps"] = [each["step"] for each in found]
    for part, columns in (("pictures", PICTURE_COLUMNS), ("masks", MASK_COLUMNS)):
        for key in columns:
            _put(row, key, [result.get(part, {}).get(key) for result in results])
    return row


def task_rows(output: Path, task: Task, scale: Scale) -> list[dict[str, Any]]:
    """The base (and for noise the base as shipped), then every arm with at least one finished seed."""
    data = result_of(output, f"{task.world}/data")
    if data is None:
        return []
    still = {NEW: [0.0, 0.0], OLD: [0.0, 0.0]}
    rows = [make_row(task, "base", [data["base"] | {"last": still}])]
    if "shipped" in data:
        rows.append(make_row(task, "base, as shipped", [data["shipped"]]))
    for arm in task.arms:
        results = _finals(output, task, arm, scale.seeds)
        if results:
            rows.append(make_row(task, arm, results))
    return rows


def ablation_rows(output: Path, task: Task, scale: Scale) -> list[dict[str, Any]]:
    rows = []
    for name in ("maskunet", *task.ablations):
        results = _finals(output, task, name, scale.seeds)
        if results:
            row = make_row(task, name, results)
            rows.append({key: value for key, value in row.items() if not key.startswith("best_")})
    return rows if len(rows) > 1 else []


def _shown(row: dict[str, Any], key: str, digits: int) -> str:
    value, error = row.get(key), row.get(f"{key}_error")
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _terms(task: Task) -> str:
    body = {"unet": "U-Net", "transformer": "transformer"}[task.body]
    return f"{task.steps} steps of {task.batch}, on {task.targets} of the toy {body}."


def to_people(rows: list[dict[str, Any]]) -> str:
    """Markdown of rows with plain keys; columns that no row has are left out."""
    columns = {"new": 1, "old": 1, "sum": 1, "best_new": 1, "best_old": 1}
    columns |= dict.fromkeys(PICTURE_COLUMNS, 2) | dict.fromkeys(MASK_COLUMNS, 4)
    shown = []
    for row in rows:
        parameters = f"{row['parameters']:,}" if row.get("parameters") else ""
        line = {"method": row["method"], "seeds": row["seeds"], "parameters": parameters}
        line["s/step"] = _shown(row, "seconds_per_step", 3)
        shown.append(line | {key: _shown(row, key, digits) for key, digits in columns.items()})
    empty = {key for key in columns if not any(line[key] for line in shown)}
    return to_markdown([{k: v for k, v in line.items() if k not in empty} for line in shown])


def trial_rows(output: Path, scale: Scale) -> list[dict[str, Any]]:
    rows = []
    for job in make_plan(scale):
        result = result_of(output, job.name) if job.kind == "trial" else None
        if result is not None:
            kept = {key: result.get(key) for key in ("factor", NEW, OLD, "score")}
            rates = {key: result["optimiser"][key] for key in ("lr", "lr_bias")}
            rows.append({"task": job.task.name, "method": job.arm, "trial": job.number, **kept, **rates})
    return rows


def write_report(output: Path, scale: Scale, figures: bool) -> None:
    """`table.md`, `table.json` and, where wanted, `figures/` from what is done."""
    sections, rows, ablations = [LEGEND], [], []
    for task in scale.tasks:
        found = task_rows(output, task, scale)
        if not found:
            continue
        rows += found
        title = TITLES[task.name].format(**vars(scale))
        sections.append(f"## {title}\n\n{_terms(task)}\n\n{to_people(found)}")
        if changed := ablation_rows(output, task, scale):
            ablations += changed
            sections.append(f"### Ablations of maskunet on the task '{task.name}'\n\n{to_people(changed)}")
    with replacing(output / "table.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    content = {"rows": rows, "ablations": ablations, "trials": trial_rows(output, scale)}
    content |= {"settings": scale_to_values(scale), "seeds": list(range(scale.seeds)), "machine": machine()}
    with replacing(output / "table.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if figures:
        write_figures(output, rows, scale)
