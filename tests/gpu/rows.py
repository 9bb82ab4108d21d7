"""What a step found: rows with plain keys, kept in a file after every row, so that a crash loses none of them."""

import contextlib
import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PASSED, FAILED, MEASURED, SKIPPED = "passed", "failed", "measured", "skipped"


def replace_text(path: Path, text: str) -> None:
    """Write under a temporary name beside `path`, then rename."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Rows:
    """The rows of one step. path: the file that they are kept in, a JSON list."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def add(self, check: str, result: str, **values: Any) -> None:
        """values: `value`, `unit`, `goal`, `detail` and whatever else a row tells."""
        self.rows.append({"check": check, "result": result, **values})
        replace_text(self.path, json.dumps(self.rows, indent=1))
        print(f"{check}: {result} {values}", flush=True)

    def promise(self, check: str, kept: bool, detail: str = "") -> None:
        """Something that must hold."""
        self.add(check, PASSED if kept else FAILED, detail=detail)

    def measured(self, check: str, value: float, unit: str, goal: float | None = None, **values: Any) -> None:
        """A number, which should not be above `goal` where there is one."""
        result = MEASURED if goal is None else PASSED if value <= goal else FAILED
        self.add(check, result, value=value, unit=unit, goal="" if goal is None else goal, **values)

    def skipped(self, check: str, why: str) -> None:
        self.add(check, SKIPPED, detail=why)

    @contextlib.contextmanager
    def attempt(self, check: str) -> Iterator[None]:
        """What is raised inside becomes a row, and the step goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip().splitlines() or [""]
            self.add(check, FAILED, detail=f"{type(error).__name__}: {text[0]}"[:300])
