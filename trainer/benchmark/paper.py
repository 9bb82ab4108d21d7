"""The suite `paper`: those that tables 1 to 4 of arXiv 2505.03097 are of, and its numbers beside a run's.

What a method is decides where it is judged, as in the paper: trained ones on COCO, searches on the others.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tables import write_table
from .folder import BadRun, RunFolder
from .methods import Method
from .published import NOTES, PUBLISHED, Published
from .report import write_report

NAME = "paper"
SUITES = ("coco2014", "coco2017", "t2i-compbench", "geneval")
_TRAINED = SUITES[:2]


def methods_of(suite: str, methods: Sequence[Method]) -> list[Method]:
    """The base, and those that the paper judged by this suite."""
    return [method for method in methods if method == Method() or bool(method.preset) != (suite in _TRAINED)]


def runs_in(folder: Path) -> dict[str, RunFolder]:
    """The runs of the paper's suites, by suite."""
    return {suite: RunFolder(folder / suite) for suite in SUITES if (folder / suite / "run.json").is_file()}


def write_paper_report(folder: Path) -> str:
    """The reports of all suites that were run, and `paper.md` and `paper.json`. Raises BadRun."""
    runs = runs_in(folder)
    if not runs:
        raise BadRun(f"'{folder}' holds no run of the paper's suites: give the command `run paper` first.")
    texts = [f"{suite}:\n\n{write_report(run)}" for suite, run in runs.items()]
    rows = [row for one in PUBLISHED for row in _beside(one, runs)]
    settings = {"notes": NOTES, "runs": {suite: run.settings for suite, run in runs.items()}}
    table = write_table(folder, rows, settings, NAME)
    return "\n\n".join([*texts, "Beside the paper:", table, *nearest_protocols(rows), *NOTES])


def _beside(one: Published, runs: Mapping[str, RunFolder]) -> list[dict[str, Any]]:
    """A row for each column, and for each method and judge here that it may be held against."""
    base = next(other for other in PUBLISHED if (other.table, other.suite) == (one.table, one.suite))
    here = _matching(one, runs[one.suite].path, "table") if one.suite in runs else []
    changes = _matching(one, runs[one.suite].path, "differences") if here else []
    by_name = {(row["method"], row["judge"]): row for row in changes}
    rows = []
    for column, value in one.values.items():
        known = {"table": one.table, "suite": one.suite, "of": one.name, "task": column, "paper": value}
        known["paper, more than base"] = "" if one is base else f"{value - base.values[column]:+.3f}"
        for row in here or [{}]:
            change = by_name.get((row.get("method"), row.get("judge")), {})
            shown = {"method": row.get("method", ""), "judge": row.get("judge", ""), "here": row.get(column, "")}
            rows.append(known | shown | {"here, more than base": change.get(column, "")})
    return rows


def _matching(one: Published, folder: Path, table: str) -> list[dict[str, Any]]:
    """Rows of a run's table that are of the method and by the measure of a published row."""
    path = folder / f"{table}.json"
    if not one.method or not path.is_file():
        return []
    judge, measure = one.measure
    return [
        row
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
        if re.fullmatch(one.method, row["method"]) and re.fullmatch(judge, row["judge"]) and row["measure"] == measure
    ]


def nearest_protocols(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each suite of COCO: by which protocol the base comes nearest to the paper's."""
    lines = []
    for suite in _TRAINED:
        of_base = [row for row in rows if row["suite"] == suite and row["method"] == "base" and row["here"]]
        if of_base:
            row = min(of_base, key=lambda row: abs(float(row["here"].split(" ")[0]) - row["paper"]))
            lines.append(
                f"{suite}: the base comes nearest to the paper's {row['paper']} by {row['judge']}, {row['here']}."
            )
    return lines
