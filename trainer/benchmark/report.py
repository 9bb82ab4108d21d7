"""Tables of a run: each method's scores with their errors, and paired differences between methods."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskunet_core.judges.statistics import (
    LEVEL,
    Estimate,
    chance,
    estimate,
    holm,
    in_words,
    mean_of_tasks,
    of_prompts,
)

from ..tables import to_markdown, write_table
from .distances import COLUMNS, DISTANCES, Distance
from .drawing import Pair
from .folder import BadRun, MethodFolder, RunFolder
from .real import Real, read_real


@dataclass(frozen=True)
class Verdicts:
    """What the judges said of one method. scores: `[P, I]` by (judge, measure), NaN where a picture was not judged.
    features: by (judge, column) and picture.
    """

    run: RunFolder
    method: str
    scores: dict[tuple[str, str], Tensor]
    features: dict[tuple[str, str], dict[Pair, Tensor]]

    @classmethod
    def of(cls, run: RunFolder, method: MethodFolder) -> "Verdicts":
        units, prompts = run.units(), len(run.prompts)
        scores, features = {}, {}
        for judge in method.judges():
            rows = method.rows(judge, units)
            for measure, value in next(iter(rows.values()), {}).items():
                if measure in COLUMNS:
                    features[judge, measure] = {pair: row[measure] for pair, row in rows.items()}
                elif value.ndim == 0:
                    scores[judge, measure] = _table(rows, measure, prompts)
        return cls(run, method.name, scores, features)


def _table(rows: dict[Pair, dict[str, Tensor]], measure: str, prompts: int) -> Tensor:
    """`[P, I]` of one measure."""
    values = torch.full((prompts, 1 + max(number for _, number in rows)), torch.nan)
    for (prompt, number), row in rows.items():
        values[prompt, number] = row[measure]
    return values


def _tasks(run: RunFolder) -> dict[str, Tensor]:
    """Rows of each task, `[P]` bool, in the order of the prompts."""
    tasks = [prompt.task for prompt in run.prompts]
    return {task: torch.tensor([other == task for other in tasks]) for task in dict.fromkeys(tasks)}


def rows_of(found: Verdicts) -> list[dict[str, Any]]:
    """A row per measure; distances to real pictures have no tasks."""
    tasks = _tasks(found.run)
    rows = []
    for (judge, measure), values in found.scores.items():
        means = of_prompts(values)
        row = {"method": found.method, "judge": judge, "measure": measure}
        row |= {task: str(estimate(means[of_task])) for task, of_task in tasks.items()}
        row["all"] = str(mean_of_tasks(means, list(tasks.values())))
        rows.append(row | {"prompts": int(means.isfinite().sum()), "pictures": int(values.isfinite().sum())})
    for judge, distance, features, real in _distances(found):
        value, influence = distance.influence(torch.stack(list(features.values())), real)
        row = {"method": found.method, "judge": judge, "measure": distance.name} | dict.fromkeys(tasks, "")
        row["all"] = str(Estimate(value, _error(influence), len(influence)))
        rows.append(row | {"prompts": len({prompt for prompt, _ in features}), "pictures": len(influence)})
    return rows


def _distances(found: Verdicts) -> Iterator[tuple[str, Distance, dict[Pair, Tensor], Real]]:
    """Judge, distance, features of two pictures at least, and what they are held against."""
    for (judge, column), features in found.features.items():
        real = read_real(found.run.real_file(judge))
        for distance in DISTANCES:
            if distance.column == column and distance.can_tell(real) and len(features) > 1:
                yield judge, distance, features, real


def _error(influence: Tensor) -> float:
    return float(influence.std()) / len(influence) ** 0.5


def differences(mine: Verdicts, other: Verdicts) -> list[dict[str, Any]]:
    """A row per measure that both have: mine minus other, on the prompts, numbers and noises that both have."""
    tasks = _tasks(mine.run)
    rows = []
    for key, values in mine.scores.items():
        if key in other.scores:
            images = min(values.shape[1], other.scores[key].shape[1])
            change = of_prompts(values[:, :images] - other.scores[key][:, :images])
            rows.append(_difference_row(mine, other, key, change, tasks))
    for judge, distance, features, real in _distances(mine):
        of_other = other.features.get((judge, distance.column), {})
        both = [pair for pair in features if pair in of_other]
        if len(both) > 1:
            told = [distance.influence(torch.stack([one[pair] for pair in both]), real) for one in (features, of_other)]
            rows.append(_names(mine, other, judge, distance.name) | dict.fromkeys(tasks, "") | _of_distances(*told))
    return rows


def _difference_row(
    mine: Verdicts, other: Verdicts, key: tuple[str, str], change: Tensor, tasks: dict[str, Tensor]
) -> dict[str, Any]:
    whole, p = mean_of_tasks(change, list(tasks.values())), chance(change, list(tasks.values()))
    row = _names(mine, other, *key)
    by_task = holm([chance(change, [rows]) for rows in tasks.values()])
    for (task, of_task), of_chance in zip(tasks.items(), by_task):
        row[task] = _signed(estimate(change[of_task])) + (" *" if of_chance < LEVEL else "")
    return row | _told(whole, p)


def _of_distances(mine: tuple[float, Tensor], other: tuple[float, Tensor]) -> dict[str, Any]:
    """The difference of two distances with their influences, paired picture by picture."""
    from scipy.stats import norm

    influence = mine[1] - other[1]
    whole = Estimate(mine[0] - other[0], _error(influence), len(influence))
    p = float(2 * norm.sf(abs(whole.mean) / whole.error)) if whole.error else 1.0
    return _told(whole, p)


def _names(mine: Verdicts, other: Verdicts, judge: str, measure: str) -> dict[str, Any]:
    return {"method": mine.method, "against": other.method, "judge": judge, "measure": measure}


def _signed(found: Estimate) -> str:
    return f"{found.mean:+.3f} ± {found.error:.3f}"


def _told(whole: Estimate, p: float) -> dict[str, Any]:
    low, high = whole.interval
    return {"all": _signed(whole), "95 %": f"{low:+.3f} to {high:+.3f}", "p": f"{p:.4f}", "told": in_words(whole, p)}


def signature(run: RunFolder, found: Verdicts) -> str:
    """One line that says what a method's numbers are of."""
    settings, sampling = run.settings, run.settings["sampling"]
    pictures = max((int(values.isfinite().sum()) for values in found.scores.values()), default=0)
    how = "/".join(str(sampling[key]) for key in ("sampler", "scheduler", "steps", "cfg")) if sampling else "imported"
    judges = "|".join(sorted({judge for judge, _ in [*found.scores, *found.features]}))
    parts = (settings["suite"], f"v{settings['version']}", found.method, settings["base"], f"p{len(run.prompts)}")
    return "|".join([*parts, f"n{pictures}", f"seed{settings['seed']}", how, judges])


def write_report(run: RunFolder) -> str:
    """`table` and `differences` as Markdown and JSON. Returns what is printed. Raises BadRun."""
    found = [Verdicts.of(run, method) for method in run.methods()]
    found = [one for one in found if one.scores or one.features]
    if not found:
        raise BadRun(f"'{run.path}' holds no judged pictures yet: give the command `run` first.")
    settings = run.settings | {"signatures": [signature(run, one) for one in found]}
    texts = [write_table(run.path, [row for one in found for row in rows_of(one)], settings)]
    changes = [row for one in found[1:] for row in differences(one, found[0])]
    if changes:
        texts.append(write_table(run.path, changes, settings, "differences"))
        texts.append("* of one task: told apart from chance, all tasks of the row taken together (Holm).")
    return "\n\n".join([*texts, "\n".join(settings["signatures"])])


def compare(mine: RunFolder, other: RunFolder, methods: Sequence[str]) -> str:
    """Differences between methods of two runs with the same prompts, seeds and judges: those of the same name, or two
    that are named. Raises BadRun."""
    if mine.prompts != other.prompts or mine.settings["seed"] != other.settings["seed"]:
        raise BadRun(f"'{mine.path}' and '{other.path}' have other prompts or another seed: nothing of them is paired.")
    first, second = ({method.name: method for method in run.methods()} for run in (mine, other))
    pairs = [tuple(methods)] if methods else [(name, name) for name in first if name in second]
    rows = []
    for name, against in pairs:
        if name not in first or against not in second:
            raise BadRun(
                f"There is no '{name}' in '{mine.path}' ({', '.join(first)}), or no '{against}' in '{other.path}' "
                f"({', '.join(second)}): name two others by --methods."
            )
        _require_same_judges(first[name], second[against])
        rows += differences(Verdicts.of(mine, first[name]), Verdicts.of(other, second[against]))
    if not rows:
        raise BadRun(f"'{mine.path}' and '{other.path}' share no method that both judged: name two by --methods.")
    return f"{mine.path} minus {other.path}\n\n{to_markdown(rows)}"


def _require_same_judges(mine: MethodFolder, other: MethodFolder) -> None:
    for judge in set(mine.judges()) & set(other.judges()):
        if mine.judge_record(judge) != other.judge_record(judge):
            raise BadRun(f"The judge '{judge}' of the two runs is not the same (judge.json): judge one of them again.")
