"""The table of all steps, for people and for programs."""

import json
from pathlib import Path
from typing import Any

from tests.gpu.rows import replace_text
from tests.gpu.runner import Outcome

COLUMNS = ("step", "check", "result", "value", "unit", "goal", "from", "to", "detail")


def rows_of(outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """A row for each step, followed by those that it told."""
    rows = []
    for name, outcome in outcomes.items():
        summary = {"step": name, "check": "the whole step", "result": outcome.state}
        rows.append(summary | {"value": outcome.seconds, "unit": "s", "detail": outcome.detail})
        rows += [{"step": name, **row} for row in outcome.rows]
    return rows


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "/").split())


def to_markdown(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    facts = [f"- {name}: {_cell(value)}" for name, value in machine.items()]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([row.get(column, "") for column in COLUMNS] for row in rows)]
    return "\n".join([*facts, "", *("| " + " | ".join(map(_cell, line)) + " |" for line in lines), ""])


def write_report(folder: Path, outcomes: dict[str, Outcome], machine: dict[str, Any], settings: dict[str, Any]) -> None:
    """`folder/table.md` and `folder/table.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(outcomes)
    replace_text(folder / "table.md", to_markdown(rows, machine | settings))
    content = {"rows": rows, "settings": settings, "machine": machine}
    replace_text(folder / "table.json", json.dumps(content, indent=2) + "\n")
