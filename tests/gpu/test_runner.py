"""How `make gpu` runs its steps: tables after every step, resuming, the budget of time, steps that do not end well."""

import json
import time

import pytest

from tests.gpu import runner
from tests.gpu.report import write_report
from tests.gpu.runner import CRASHED, NOT_RUN, TOO_LONG, Outcome, Runner, Step
from tests.gpu.steps import ESTIMATES, missing, steps
from trainer.host import PROJECT

TELL = """
import json, sys
from pathlib import Path
rows = [{"check": "one", "result": "RESULT", "value": 3, "detail": "a | b"}]
Path(sys.argv[-1]).write_text(json.dumps(rows))
with open(sys.argv[1], "a") as file:
    file.write("ran ")
"""


@pytest.fixture
def step(tmp_path):
    """A step that runs `code` after it told one row. Its runs are counted in the file `<name>.runs`."""

    def make(name, code="", result="passed", seconds=0.0, limit=30.0):
        source = TELL.replace("RESULT", result) + code
        return Step(name, ("-c", source, str(tmp_path / f"{name}.runs")), seconds, limit)

    return make


@pytest.fixture
def run(tmp_path):
    def run_all(steps, seconds=60.0):
        def report(outcomes):
            write_report(tmp_path, outcomes, {"card": "none"}, {"seed": 0})
            tables.append(json.loads((tmp_path / "table.json").read_text()))

        tables = []
        outcomes = Runner(tmp_path / "steps", seconds, report).run(steps)
        return {name: outcome.state for name, outcome in outcomes.items()}, tables

    return run_all


def runs(tmp_path, name):
    file = tmp_path / f"{name}.runs"
    return file.read_text().count("ran") if file.exists() else 0


def test_the_table_is_written_after_every_step(step, run, tmp_path):
    states, tables = run([step("first"), step("second", result="failed")])
    assert states == {"first": "passed", "second": "failed"}
    assert [[row["step"] for row in table["rows"]] for table in tables[:2]] == [
        ["first", "first"],
        ["first", "first", "second", "second"],
    ]
    assert tables[-1]["machine"] == {"card": "none"}
    assert tables[-1]["settings"] == {"seed": 0}
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "- card: none" in lines
    assert "| first | one | passed | 3 |  |  |  |  | a / b |" in lines
    assert not list(tmp_path.glob(".*.part"))


def test_a_finished_step_is_not_run_again(step, run, tmp_path):
    steps = [step("passes"), step("fails", result="failed")]
    first, _ = run(steps)
    again, tables = run(steps)
    assert first == again == {"passes": "passed", "fails": "failed"}
    assert [runs(tmp_path, name) for name in again] == [1, 1]
    assert len(tables[-1]["rows"]) == 4


def test_a_step_that_crashes_ends_alone_and_is_tried_again_after_the_new_ones(step, run, tmp_path):
    crash = step(
        "crashes", "import os, signal; print('about to die', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    states, tables = run([crash, step("after")])
    assert states == {"crashes": CRASHED, "after": "passed"}
    summary, told = (row for row in tables[-1]["rows"] if row["step"] == "crashes")
    assert "signal 9" in summary["detail"]
    assert "about to die" in summary["detail"]
    assert told["check"] == "one"
    started = []
    original = runner.run_step

    def watched(which, *arguments):
        started.append(which.name)
        return original(which, *arguments)

    runner.run_step = watched
    try:
        run([crash, step("after"), step("new")])
    finally:
        runner.run_step = original
    assert started == ["new", "crashes"]


def test_a_step_that_raises_tells_its_last_words(step, run):
    states, tables = run([step("raises", "raise MemoryError('the card is full')")])
    assert states == {"raises": CRASHED}
    assert "exit code 1" in tables[-1]["rows"][0]["detail"]
    assert "the card is full" in tables[-1]["rows"][0]["detail"]


def test_a_step_is_ended_at_its_limit_with_all_that_it_started(step, run, tmp_path):
    late = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(late)!r}, 'w')"
    code = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    began = time.monotonic()
    states, tables = run([step("hangs", code, limit=1.0)])
    assert states == {"hangs": TOO_LONG}
    assert time.monotonic() - began < 10
    assert [row["check"] for row in tables[-1]["rows"]] == ["the whole step", "one"]
    time.sleep(3)
    assert not late.exists()


def test_steps_that_no_longer_fit_are_listed_and_come_next_time(step, run, tmp_path):
    steps = [step("short"), step("long", seconds=1000.0), step("short too")]
    states, tables = run(steps)
    assert states == {"short": "passed", "long": NOT_RUN, "short too": "passed"}
    assert [row["result"] for row in tables[-1]["rows"] if row["step"] == "long"] == [NOT_RUN]
    assert runs(tmp_path, "long") == 0
    states, _ = run(steps, seconds=2000.0)
    assert states == {"short": "passed", "long": "passed", "short too": "passed"}
    assert [runs(tmp_path, name) for name in states] == [1, 1, 1]


def test_a_step_that_tells_nothing_has_failed(run):
    states, _ = run([Step("silent", ("-c", "pass"), 0.0, 30.0)])
    assert states == {"silent": "failed"}


def test_a_step_that_skipped_everything_is_not_said_to_have_passed(step, run, tmp_path):
    steps = [step("skips", result="skipped")]
    assert run(steps)[0] == run(steps)[0] == {"skips": "skipped"}
    assert runs(tmp_path, "skips") == 1


def test_a_damaged_outcome_is_as_none(step, run, tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "cut.json").write_text('{"state": "pas')
    assert Outcome.read(tmp_path / "steps" / "cut.json") is None
    assert run([step("cut")])[0] == {"cut": "passed"}


def test_the_tests_that_are_run_on_the_device_exist():
    assert not missing(PROJECT / "tests")
    assert {step.name for step in steps(on_card=True)} == set(ESTIMATES)
