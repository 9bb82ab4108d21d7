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


def test_a_folder_has_one_runner_whose_jobs_end_with_it(runner, tmp_path):
    job = started(tmp_path / "pid")
    with pytest.raises(job_board.InUse, match="Another process does jobs"):
        job_board.run_jobs([SimpleNamespace(name="job", needs=())], tmp_path, "sleeper", 1, print)
    assert psutil.pid_exists(job)
    runner.terminate()
    assert runner.wait(30) != 0
    assert not psutil.pid_exists(job)
    job_board.run_jobs([], tmp_path, "sleeper", 1, print)
