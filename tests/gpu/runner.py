"""Runs steps one after another, each in a process of its own, within a budget of time; what finished stays finished."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.rows import FAILED, PASSED, SKIPPED, replace_text

CRASHED, TOO_LONG, NOT_RUN = "crashed", "ended: took too long", "not run: out of time"
FINISHED = (PASSED, FAILED, SKIPPED)
"""States of steps that ran to their end. The others are tried again by the next call."""
LAST_LINES = 3
"""Of a step's output, told where it did not reach its end."""


@dataclass(frozen=True)
class Step:
    """command: after the interpreter; the file for its rows is added. seconds: estimate; limit: after which it ends."""

    name: str
    command: tuple[str, ...]
    seconds: float
    limit: float


@dataclass(frozen=True)
class Outcome:
    """How a step ended. rows: what it told."""

    state: str
    seconds: float
    rows: list[dict[str, Any]]
    detail: str = ""

    @classmethod
    def read(cls, path: Path) -> "Outcome | None":
        with contextlib.suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        return None

    def write(self, path: Path) -> None:
        replace_text(path, json.dumps(vars(self), indent=1))


def _end(process: subprocess.Popen) -> None:
    """End a step with all that it started."""
    if os.name == "nt":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return []


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:])[-400:]


def run_step(step: Step, folder: Path, limit: float, environment: dict[str, str]) -> Outcome:
    """Runs a step for `limit` seconds at most. Its output goes to `folder/<name>.log`."""
    told, log = folder / f"{step.name}.rows.json", folder / f"{step.name}.log"
    told.unlink(missing_ok=True)
    began, ended = time.monotonic(), False
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *step.command, str(told)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            ended = True
        finally:
            _end(process)
    rows, seconds = _read_rows(told), round(time.monotonic() - began, 1)
    if ended:
        return Outcome(TOO_LONG, seconds, rows, f"ended after {limit:.0f} s: {_last_lines(log)}")
    if process.returncode:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        return Outcome(CRASHED, seconds, rows, f"{how}: {_last_lines(log)}")
    results = {row["result"] for row in rows}
    state = FAILED if not rows or FAILED in results else SKIPPED if results == {SKIPPED} else PASSED
    return Outcome(state, seconds, rows, "" if rows else "told nothing")


class Runner:
    """Runs steps and keeps their outcomes in `folder`. report: called with all outcomes, by name, after every step.

    seconds: the budget of a call. environment: of the steps' processes.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float,
        report: Callable[[dict[str, Outcome]], None],
        environment: dict[str, str] | None = None,
    ):
        self.folder, self.report = folder, report
        self.environment = dict(os.environ) if environment is None else environment
        self._end = time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def remaining(self) -> float:
        return self._end - time.monotonic()

    def _path(self, step: Step) -> Path:
        return self.folder / f"{step.name}.json"

    def run(self, steps: Sequence[Step]) -> dict[str, Outcome]:
        """Outcomes in the order of `steps`. Steps that an earlier call finished are not run again, and those that it
        could not finish come after those that it never began."""
        outcomes = {step.name: Outcome.read(self._path(step)) for step in steps}
        open_steps = [step for step in steps if not (outcomes[step.name] and outcomes[step.name].state in FINISHED)]
        open_steps.sort(key=lambda step: outcomes[step.name] is not None)
        for step in open_steps:
            if self.remaining >= step.seconds:
                outcome = run_step(step, self.folder, min(step.limit, self.remaining), self.environment)
                outcome.write(self._path(step))
                outcomes[step.name] = outcome
            elif outcomes[step.name] is None:
                outcomes[step.name] = Outcome(NOT_RUN, 0.0, [], f"takes about {step.seconds:.0f} s")
            self.report({name: outcome for name, outcome in outcomes.items() if outcome})
        self.report(outcomes)
        return outcomes
