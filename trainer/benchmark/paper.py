"""The suite `paper`: those that tables 1 to 4 of arXiv 2505.03097 are of, and its numbers beside a run's.

What a method is decides where it is judged, as in the paper: trained ones on COCO, searches on the others.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tables import write_table
from .distances import FRECHET
from .folder import BadRun, RunFolder
from .methods import Method
from .report import write_report

NAME = "paper"
SUITES = ("coco2014", "coco2017", "t2i-compbench", "geneval")
_TRAINED = SUITES[:2]
_ABLATION = r"no[ _-](t_emb|sample)"


@dataclass(frozen=True)
class Published:
    """A row of the paper's tables. method: pattern of the names of what it is of, "" for what cannot be run here.
    values: by the report's column.
    """

    table: int
    suite: str
    measure: tuple[str, str]
    name: str
    method: str
    values: Mapping[str, float]


def _distances(suite: str, *values: float) -> list[Published]:
    kinds = {
        "SD 1.5": "base",
        "full fine-tune": "full:.*",
        "LoRA": "lora:.*",
        "MaskUNet": rf"generator:(?!.*{_ABLATION}).*",
    }
    measure = ("fid-.*", FRECHET)
    return [Published(1, suite, measure, *kind, {"all": value}) for kind, value in zip(kinds.items(), values)]


def _binding(name: str, method: str, *values: float) -> Published:
    columns = dict(zip(("colour", "texture", "shape"), values))
    return Published(2, "t2i-compbench", ("blip-vqa", "as published"), name, method, columns)


def _geneval(name: str, method: str, **values: float) -> Published:
    return Published(3, "geneval", ("geneval", "right"), name, method, values)


def _ablated(name: str, method: str, value: float) -> Published:
    return Published(4, "coco2017", ("fid-.*", FRECHET), name, method, {"all": value})


PUBLISHED = (
    *_distances("coco2014", 12.85, 14.06, 12.82, 11.72),
    *_distances("coco2017", 23.39, 24.45, 23.18, 21.88),
    _binding("SD 1.5", "base", 0.375, 0.416, 0.374),
    _binding("SD 1.5 + MaskUNet", "search:.*", 0.496, 0.494, 0.453),
    _binding("SynGen", "", 0.629, 0.580, 0.388),
    _binding("SynGen + MaskUNet", "", 0.699, 0.621, 0.464),
    _binding("Attend-and-Excite", "", 0.640, 0.596, 0.452),
    _geneval("SD 1.5", "base", position=0.02, all=0.39),
    _geneval("SD 1.5 + MaskUNet", "search:.*", position=0.06, all=0.46),
    _geneval("SynGen", "", all=0.43),
    _geneval("SynGen + MaskUNet", "", all=0.50),
    _ablated("SD 1.5", "base", 23.39),
    _ablated("MaskUNet without t_emb", r"generator:.*no[ _-]t_emb.*", 22.30),
    _ablated("MaskUNet without the sample", r"generator:.*no[ _-]sample.*", 22.14),
    _ablated("MaskUNet", rf"generator:(?!.*{_ABLATION}).*", 21.88),
)
NOTES = (
    "Tables 1 and 4: the paper does not say by which protocol its Frechet distances were made. The one whose base "
    "comes nearest to the paper's is the likeliest, and only differences under it are comparable. Nor does it say of "
    "which CLIP its scores are: they are not held against anything, and the suites' own tables have them by each.",
    "Table 2: the rows of Attend-and-Excite and of SD 2.0 are copies of T2I-CompBench's own table, made at 50 steps, "
    "of which 0.5065 (SD 2.0, colour) is misprinted as 0.5056. The number of pictures is not said; here there are 10.",
    "Table 3: SynGen + MaskUNet has 0.10 for single objects, a misprint: the mean of 0.50 needs 0.96. The authors' "
    "script draws one picture of a prompt, without a seed; here there are GenEval's 4.",
)


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
