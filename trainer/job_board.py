"""Runs a list of jobs, a process for each, several at once, in order; what is done stays done.

A job has a `name`, which is also its folder, and `needs`, the names of jobs that come before it. Its process is
`python -m MODULE OUTPUT NAME` and writes `result.json` into its folder when it is done.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from maskunet_core.errors import MaskUNetError
from maskunet_core.replacing import replacing

from .host import PROJECT


class Job(Protocol):
    name: str
    needs: tuple[str, ...]


class OtherScale(MaskUNetError):
    """The folder holds a comparison of another size."""


class InUse(MaskUNetError):
    """Another process does jobs in the folder."""


def claim(
    output: Path, values: dict[str, Any], name: str = "scale.json", what: str = "a comparison of another size"
) -> None:
    """Write what the folder is for into its file `name`. Raises OtherScale where the file says otherwise.

    what: the folder then holds.
    """
    path = output / name
    if path.exists():
        before = _read_json(path)
        if before != json.loads(json.dumps(values)):
            before = before or {}
            differing = sorted(key for key in before.keys() | values.keys() if before.get(key) != values.get(key))
            raise OtherScale(
                f"'{output}' holds {what} (see {name}: {', '.join(differing)}). Delete it, or choose another folder by "
                "--output."
            )
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")


def folder_of(output: Path, name: str) -> Path:
    return output / "jobs" / name.replace(", ", "_").replace(" ", "_")


def result_of(output: Path, name: str) -> dict[str, Any] | None:
    """What a finished job found, or None."""
    return _read_json(folder_of(output, name) / "result.json")


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where there is none, or where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_result(output: Path, name: str, result: dict[str, Any], began: float) -> dict[str, Any]:
    """Returns what is written: the result, and the job's seconds since `began` (`time.monotonic()`)."""
    result = result | {"job_seconds": round(time.monotonic() - began, 1)}
    with replacing(folder_of(output, name) / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def _start(job: Job, output: Path, module: str) -> subprocess.Popen:
    folder = folder_of(output, job.name)
    folder.mkdir(parents=True, exist_ok=True)
    # One thread each: several jobs use the cores better than one job with several threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", module, str(output), job.name]
        return subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _tell(text: str, done: int, total: int) -> None:
    print(f"[{time.strftime('%H:%M:%S')} {done}/{total}] {text}", flush=True)


class _Board:
    """Which jobs wait, run, are done and have failed."""

    def __init__(self, jobs: Sequence[Job], output: Path, module: str):
        self.output, self.module = output, module
        self.done = {job.name for job in jobs if result_of(output, job.name) is not None}
        self.waiting = [job for job in jobs if job.name not in self.done]
        self.running: dict[str, tuple[Job, subprocess.Popen]] = {}
        self.failed: set[str] = set()

    def next_job(self) -> Job | None:
        """The first job that can be done now; jobs that need a failed one fail too."""
        for job in list(self.waiting):
            lost = [name for name in job.needs if name in self.failed]
            if lost:
                self.waiting.remove(job)
                self.failed.add(job.name)
                _tell(f"left out: {job.name} needs {lost[0]}, which failed", len(self.done), self.total)
            elif all(name in self.done for name in job.needs):
                return job
        return None

    @property
    def total(self) -> int:
        return len(self.done) + len(self.waiting) + len(self.running) + len(self.failed)

    def start(self, job: Job) -> None:
        self.waiting.remove(job)
        self.running[job.name] = (job, _start(job, self.output, self.module))

    def collect(self) -> list[Job]:
        """Jobs that have just been finished."""
        finished = []
        for name, (job, process) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[name]
            result = result_of(self.output, name) if process.returncode == 0 else None
            if result is None:
                self.failed.add(name)
                log = folder_of(self.output, name) / "log.txt"
                _tell(f"failed: {name}; its traceback is in {log}", len(self.done), self.total)
            else:
                self.done.add(name)
                finished.append(job)
                _tell(f"done: {name}, {result['job_seconds']:.0f} s", len(self.done), self.total)
        return finished


@contextlib.contextmanager
def alone(output: Path, what: str = "does jobs", other: str = "--output") -> Iterator[None]:
    """No other process is in such a block of the folder, and SIGTERM ends the block as Ctrl-C does. Raises InUse.

    what: it does in the folder; other: how another folder is chosen.
    """
    lock = FileLock(output / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InUse(
            f"Another process {what} in '{output}'. Wait for it, stop it, or choose another folder by {other}."
        ) from None
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        lock.release()


def run_jobs(jobs: Sequence[Job], output: Path, module: str, at_once: int, report: Callable[[list[Job]], None]) -> None:
    """Do all jobs, `at_once` at a time. report: called with those that have just been finished.

    Raises MaskUNetError at the end where jobs failed; the others are done. Raises InUse.
    """
    with alone(output):
        board = _Board(jobs, output, module)
        try:
            while board.waiting or board.running:
                while len(board.running) < at_once and (job := board.next_job()) is not None:
                    board.start(job)
                finished = board.collect()
                if finished:
                    report(finished)
                time.sleep(0.2)
        finally:
            for _, process in board.running.values():
                process.terminate()
                process.wait()
    if board.failed:
        raise MaskUNetError(
            f"{len(board.failed)} of {len(jobs)} jobs failed, the first by name is {min(board.failed)}. The same "
            "command tries them again."
        )
