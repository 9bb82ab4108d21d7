"""The runner of jobs: one to a folder, and none of its processes outlives it."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from trainer import job_board
from trainer.host import PROJECT

SLEEPER = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], "pid").write_text(str(os.getpid()))
time.sleep(600)
"""
RUNNER = """
import pathlib, sys, types
from trainer.job_board import run_jobs
run_jobs([types.SimpleNamespace(name="job", needs=())], pathlib.Path(sys.argv[1]), "sleeper", 1, print)
"""


@pytest.fixture
def runner(tmp_path):
    """A process that runs one job, which sleeps."""
    (tmp_path / "sleeper.py").write_text(SLEEPER, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", RUNNER, str(tmp_path)], cwd=PROJECT, env=environment)
    yield process
    process.kill()
    process.wait()


def started(file: Path) -> int:
    """The number of the job's process, once it runs."""
    until = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return int(file.read_text())


def test_files_that_were_damaged_are_done_again_or_told(tmp_path):
    job_board.write_result(tmp_path, "job", {"score": 1}, time.monotonic())
    assert job_board.result_of(tmp_path, "job")["score"] == 1
    (job_board.folder_of(tmp_path, "job") / "result.json").write_text("")
    assert job_board.result_of(tmp_path, "job") is None
    (tmp_path / "scale.json").write_text("{")
    with pytest.raises(job_board.OtherScale, match=r"see scale\.json"):
        job_board.claim(tmp_path, {"jobs": 1})


def test_a_folder_has_one_runner_whose_jobs_end_with_it(runner, tmp_path):
    job = started(tmp_path / "pid")
    with pytest.raises(job_board.InUse, match="Another process does jobs"):
        job_board.run_jobs([SimpleNamespace(name="job", needs=())], tmp_path, "sleeper", 1, print)
    assert psutil.pid_exists(job)
    runner.terminate()
    assert runner.wait(30) != 0
    assert not psutil.pid_exists(job)
    job_board.run_jobs([], tmp_path, "sleeper", 1, print)
