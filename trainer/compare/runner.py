"""Runs the plan: a process per job, several at once, in order; what is done stays done."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from maskunet_core.errors import MaskUNetError

from ..files import replacing
from ..host import PROJECT
from .jobs import folder_of, result_of
from .plan import WORLDS, Job, Scale, make_plan, scale_to_values
from .report import write_report


class OtherScale(MaskUNetError):
    """The folder holds a comparison of another size."""


def claim(output: Path, scale: Scale) -> None:
    """Write the scale into the folder. Raises OtherScale where the folder has another one."""
    path, values = output / "scale.json", scale_to_values(scale)
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != values:
            raise OtherScale(
                f"'{output}' holds a comparison of another size (see scale.json). Delete it, or choose another folder "
                "by --output."
            )
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _start(job: Job, output: Path) -> subprocess.Popen:
    folder = folder_of(output, job.name)
    folder.mkdir(parents=True, exist_ok=True)
    # One thread each: several jobs use the cores better than one job with several threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "trainer.compare.jobs", str(output), job.name]
        return subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _tell(text: str, done: int, total: int) -> None:
    print(f"[{time.strftime('%H:%M:%S')} {done}/{total}] {text}", flush=True)


class _Board:
    """Which jobs wait, run, are done and have failed."""

    def __init__(self, jobs: list[Job], output: Path):
        self.output = output
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
        self.running[job.name] = (job, _start(job, self.output))

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


def run_jobs(jobs: list[Job], output: Path, at_once: int, report: Callable[[bool], None]) -> set[str]:
    """Do all jobs, `at_once` at a time. report(figures): called after each. Returns the names of failed ones."""
    board = _Board(jobs, output)
    try:
        while board.waiting or board.running:
            while len(board.running) < at_once and (job := board.next_job()) is not None:
                board.start(job)
            finished = board.collect()
            if finished:
                report(any(job.kind == "final" for job in finished))
            time.sleep(0.2)
    finally:
        for _, process in board.running.values():
            process.terminate()
            process.wait()
    return board.failed


def compare(output: Path, scale: Scale, at_once: int, worlds: tuple[str, ...] = WORLDS) -> None:
    """The whole comparison. Raises MaskUNetError where jobs failed; the others are done and in the tables."""
    claim(output, scale)
    jobs = make_plan(scale, worlds)
    failed = run_jobs(jobs, output.resolve(), at_once, lambda figures: write_report(output, scale, figures))
    write_report(output, scale, figures=True)
    print(f"wrote {output / 'table.md'}, {output / 'table.json'} and {output / 'figures'}")
    if failed:
        raise MaskUNetError(
            f"{len(failed)} of {len(jobs)} jobs failed, the first by name is {min(failed)}. The same command tries "
            "them again."
        )
