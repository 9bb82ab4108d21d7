"""What judges said of a run, as numbers: each method's measures with their errors, and paired differences."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskunet_core.judges.statistics import (
    LEVEL,
    Estimate,
    PairedTest,
    diversity,
    estimate,
    from_to,
    holm,
    in_words,
    mean_of_tasks,
    of_prompts,
)

from .columns import is_text, to_text
from .distances import COLUMNS, DISTANCES, Distance
from .drawing import Pair
from .folder import MethodFolder, RunFolder
from .real import Real, read_real

DIVERSITY = "diversity"
"""Name of the distance between two pictures of one prompt in a judge's features."""


@dataclass(frozen=True)
class Verdicts:
    """What the judges said of one method. scores: `[P, I]` by (judge, measure), NaN where a picture was not judged.
    features, texts: by (judge, column) and picture.
    """

    run: RunFolder
    folder: MethodFolder
    scores: dict[tuple[str, str], Tensor]
    features: dict[tuple[str, str], dict[Pair, Tensor]]
    texts: dict[tuple[str, str], dict[Pair, str]]

    @classmethod
    def of(cls, run: RunFolder, method: MethodFolder) -> "Verdicts":
        units, prompts = run.units(), len(run.prompts)
        scores, features, texts = {}, {}, {}
        for judge in method.judges():
            rows = method.rows(judge, units)
            for column, value in next(iter(rows.values()), {}).items():
                of_column = {pair: row[column] for pair, row in rows.items() if column in row}
                if column in COLUMNS:
                    features[judge, column] = of_column
                elif is_text(value):
                    texts[judge, column] = {pair: to_text(text) for pair, text in of_column.items()}
                elif value.ndim == 0:
                    scores[judge, column] = _table(of_column, prompts)
        return cls(run, method, scores, features, texts)

    @property
    def method(self) -> str:
        return self.folder.name

    @property
    def pairs(self) -> list[Pair]:
        """The pictures that any judge has seen, in the order of the prompts."""
        found = {pair for of_judge in self.features.values() for pair in of_judge}
        for values in self.scores.values():
            found |= {(prompt, number) for prompt, number in values.isfinite().nonzero().tolist()}
        return sorted(found)


def _table(values: dict[Pair, Tensor], prompts: int) -> Tensor:
    """`[P, I]` of one measure."""
    table = torch.full((prompts, 1 + max(number for _, number in values)), torch.nan)
    for (prompt, number), value in values.items():
        table[prompt, number] = value
    return table


def _diversities(features: dict[Pair, Tensor], prompts: int) -> Tensor:
    """`[P]`, NaN where a prompt has fewer than two pictures."""
    values = torch.full((prompts,), torch.nan)
    of_prompts: dict[int, list[Tensor]] = {}
    for (prompt, _), row in features.items():
        of_prompts.setdefault(prompt, []).append(row)
    for prompt, rows in of_prompts.items():
        if len(rows) > 1:
            values[prompt] = diversity(torch.stack(rows)[:, None])
    return values


def _tasks(run: RunFolder) -> dict[str, Tensor]:
    """Rows of each task, `[P]` bool, in the order of the prompts."""
    tasks = [prompt.task for prompt in run.prompts]
    return {task: torch.tensor([other == task for other in tasks]) for task in dict.fromkeys(tasks)}


@dataclass(frozen=True)
class Measure:
    """What a method got from a judge. tasks: None each for a distance, which is of all pictures together."""

    method: str
    judge: str
    name: str
    tasks: dict[str, Estimate | None]
    whole: Estimate
    prompts: int
    pictures: int

    @property
    def row(self) -> dict[str, Any]:
        """Of the table."""
        names = {"method": self.method, "judge": self.judge, "measure": self.name}
        counts = {"prompts": self.prompts, "pictures": self.pictures}
        return names | _shown(self.tasks, str) | {"all": str(self.whole)} | counts


@dataclass(frozen=True)
class Difference:
    """A method minus another, paired. sure: tasks by which they are told apart, all of them taken together (Holm).
    ends: of the 95 % interval."""

    method: str
    against: str
    judge: str
    name: str
    tasks: dict[str, Estimate | None]
    sure: frozenset[str]
    whole: Estimate
    p: float
    ends: tuple[float, float]

    @property
    def is_told(self) -> bool:
        """Whether it is more than chance explains."""
        return self.p < LEVEL

    @property
    def interval(self) -> str:
        return from_to(self.ends)

    @property
    def row(self) -> dict[str, Any]:
        """Of the table of differences."""
        names = {"method": self.method, "against": self.against, "judge": self.judge, "measure": self.name}
        tasks = _shown(self.tasks, _signed)
        marked = {task: text + (" *" if task in self.sure else "") for task, text in tasks.items()}
        whole = {
            "all": _signed(self.whole),
            "95 %": self.interval,
            "p": f"{self.p:.4f}",
            "told": in_words(self.whole, self.p),
        }
        return names | marked | whole


def _shown(tasks: dict[str, Estimate | None], write: Callable[[Estimate], str]) -> dict[str, str]:
    return {task: "" if found is None else write(found) for task, found in tasks.items()}


def _signed(found: Estimate) -> str:
    return f"{found.mean:+.3f} ± {found.error:.3f}"


def measures(found: Verdicts) -> list[Measure]:
    tasks, made = _tasks(found.run), []
    for judge, name, means, pictures in _by_prompt(found):
        by_task = {task: estimate(means[of_task]) for task, of_task in tasks.items()}
        counts = int(means.isfinite().sum()), pictures
        whole = mean_of_tasks(means, list(tasks.values()))
        made.append(Measure(found.method, judge, name, by_task, whole, *counts))
    for judge, distance, features, real in _distances(found):
        value, influence = distance.influence(torch.stack(list(features.values())), real)
        whole = Estimate(value, _error(influence), len(influence))
        counts = len({prompt for prompt, _ in features}), len(influence)
        made.append(Measure(found.method, judge, distance.name, dict.fromkeys(tasks), whole, *counts))
    return made


def _by_prompt(found: Verdicts) -> Iterator[tuple[str, str, Tensor, int]]:
    """Judge, measure, a number for each prompt `[P]`, and of how many pictures."""
    for (judge, name), values in found.scores.items():
        yield judge, name, of_prompts(values), int(values.isfinite().sum())
    for (judge, _), features in found.features.items():
        values = _diversities(features, len(found.run.prompts))
        if values.isfinite().any():
            yield judge, DIVERSITY, values, len(features)


def _distances(found: Verdicts) -> Iterator[tuple[str, Distance, dict[Pair, Tensor], Real]]:
    """Judge, distance, features of two pictures at least, and what they are held against."""
    for (judge, column), features in found.features.items():
        real = read_real(found.run.real_file(judge))
        for distance in DISTANCES:
            if distance.column == column and distance.can_tell(real) and len(features) > 1:
                yield judge, distance, features, real


def _error(influence: Tensor) -> float:
    return float(influence.std()) / len(influence) ** 0.5


def differences(mine: Verdicts, other: Verdicts) -> list[Difference]:
    """Of each measure that both have, on the prompts, numbers and noises that both have."""
    tasks, made = _tasks(mine.run), []
    for (judge, name), values in mine.scores.items():
        if (judge, name) in other.scores:
            of_other = other.scores[judge, name]
            images = min(values.shape[1], of_other.shape[1])
            change = of_prompts(values[:, :images] - of_other[:, :images])
            made.append(Difference(mine.method, other.method, judge, name, **_told(change, tasks)))
    for (judge, column), features in mine.features.items():
        shared = _shared(features, other.features.get((judge, column), {}))
        change = torch.sub(*(_diversities(one, len(mine.run.prompts)) for one in shared))
        if change.isfinite().any():
            made.append(Difference(mine.method, other.method, judge, DIVERSITY, **_told(change, tasks)))
    for judge, distance, features, real in _distances(mine):
        shared = _shared(features, other.features.get((judge, distance.column), {}))
        if len(shared[0]) > 1:
            pictures = [torch.stack(list(one.values())) for one in shared]
            whole, p = _of_distances(*(distance.influence(one, real) for one in pictures))
            names = (mine.method, other.method, judge, distance.name)
            made.append(Difference(*names, dict.fromkeys(tasks), frozenset(), whole, p, whole.interval))
    return made


def _shared(*features: dict[Pair, Tensor]) -> list[dict[Pair, Tensor]]:
    """Of the pictures that all have, in the order of the first."""
    both = [pair for pair in features[0] if all(pair in one for one in features)]
    return [{pair: one[pair] for pair in both} for one in features]


def _told(change: Tensor, tasks: dict[str, Tensor]) -> dict[str, Any]:
    """What `Difference` has of a change of each prompt `[P]`."""
    every = list(tasks.values())
    by_task = holm([PairedTest(change, [rows]).p() for rows in every])
    test = PairedTest(change, every)
    return {
        "tasks": {task: estimate(change[rows]) for task, rows in tasks.items()},
        "sure": frozenset(task for task, p in zip(tasks, by_task) if p < LEVEL),
        "whole": mean_of_tasks(change, every),
        "p": test.p(),
        "ends": test.interval,
    }


def _of_distances(mine: tuple[float, Tensor], other: tuple[float, Tensor]) -> tuple[Estimate, float]:
    """The difference of two distances with their influences, paired picture by picture, and its p."""
    from scipy.stats import norm

    influence = mine[1] - other[1]
    whole = Estimate(mine[0] - other[0], _error(influence), len(influence))
    return whole, float(2 * norm.sf(abs(whole.mean) / whole.error)) if whole.error else 1.0
