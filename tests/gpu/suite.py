"""Tests of the project on the device: `python -m tests.gpu.suite FILES... ROWS`, files without `tests/` and `.py`."""

import sys
from pathlib import Path

import pytest

from tests.gpu.rows import FAILED, PASSED, SKIPPED, Rows
from trainer.host import PROJECT


class Collector:
    """A row for each file, told as soon as its last test has ended."""

    def __init__(self, rows: Rows):
        self.rows, self.file = rows, ""

    def _begin(self, file: str) -> None:
        self.file, self.passed, self.skipped, self.failed = file, 0, 0, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file, _, name = report.nodeid.partition("::")
        if file != self.file:
            self.end()
            self._begin(file)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = str(crash.message if crash else report.longrepr).strip().splitlines() or [""]
            self.failed.append(f"{name}: {said[0]}"[:160])
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            said = [line for line in str(report.longrepr).splitlines() if line.strip()]
            self.rows.add(report.nodeid, FAILED, detail=f"cannot be imported: {said[-1] if said else ''}"[:300])

    def end(self) -> None:
        if not self.file:
            return
        result = FAILED if self.failed else PASSED if self.passed else SKIPPED
        skipped = f"{self.skipped} skipped" if self.skipped else ""
        detail = "; ".join([*([skipped] if skipped else []), *self.failed])
        self.rows.add(self.file, result, value=self.passed, unit="tests", failed=len(self.failed), detail=detail)
        self.file = ""

    def pytest_sessionfinish(self) -> None:
        self.end()


def main(files: list[str], path: Path) -> None:
    rows = Rows(path)
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore"]
    pytest.main([*options, *(str(PROJECT / "tests" / f"{file}.py") for file in files)], plugins=[Collector(rows)])


if __name__ == "__main__":
    main(sys.argv[1:-1], Path(sys.argv[-1]))
