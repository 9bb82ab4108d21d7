"""`make gpu`: every check and every figure that needs a card, within 9 minutes. Run it again and it goes on."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gpu.report import write_report
from tests.gpu.rows import FAILED, PASSED, SKIPPED
from tests.gpu.runner import Outcome, Runner
from tests.gpu.steps import steps
from trainer.host import PROJECT

MINUTES = 9.0
SETTINGS = {"seed of models": 0, "seed of pictures": 3}
SAME = ("device", "card", "torch", "ComfyUI")
"""What must not change between the calls that make one table."""


def environment(device: str, models: str) -> dict[str, str]:
    """Of the steps' processes."""
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {"PYTHONPATH": os.pathsep.join(paths), "MASKUNET_TEST_DEVICE": device, "MASKUNET_GPU_MODELS": models}
    # Nothing is ever downloaded, and hours of waiting for a network are none of the steps'.
    return os.environ | told | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def look_at_machine(folder: Path) -> dict[str, Any]:
    file = folder / "machine.json"
    command = [sys.executable, "-m", "tests.gpu.machine", str(file)]
    done = subprocess.run(command, cwd=PROJECT, env=environment("", ""), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"[gpu] this machine cannot run the host:\n{done.stderr[-2000:]}")
    return json.loads(file.read_text(encoding="utf-8"))


def begin(folder: Path, machine: dict[str, Any], fresh: bool) -> None:
    """Forget what another card, torch or host told."""
    file, steps_folder = folder / "before.json", folder / "steps"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else machine
    if fresh or any(before.get(key) != machine.get(key) for key in SAME):
        shutil.rmtree(steps_folder, ignore_errors=True)
    steps_folder.mkdir(exist_ok=True)
    file.write_text(json.dumps(machine), encoding="utf-8")


def tell(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    failed = [row["check"] for row in outcome.rows if row["result"] == FAILED]
    print(f"[gpu] {name}: {outcome.state}, {outcome.seconds:.0f} s. {'; '.join(failed) or outcome.detail}", flush=True)


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget what earlier calls found")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="budget of this call")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="instead of the one that is there")
    parser.add_argument("--only", nargs="+", metavar="WORD", default=(), help="steps whose names hold one of the words")
    parser.add_argument("--output", type=Path, default=PROJECT / "output" / "gpu", help="folder of tables and state")
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    machine = look_at_machine(folder)
    device = machine["device"] = arguments.device or machine["device"]
    begin(folder, machine, arguments.fresh)
    chosen = [s for s in steps(device != "cpu") if not arguments.only or any(w in s.name for w in arguments.only)]
    print(f"[gpu] {machine['card']}, torch {machine['torch']}; {len(chosen)} steps", flush=True)
    told: set[str] = set()

    def report(outcomes: dict[str, Outcome]) -> None:
        write_report(folder, outcomes, machine, SETTINGS)
        for name in [name for name in outcomes if name not in told]:
            told.add(name)
            tell(outcomes, name)

    with tempfile.TemporaryDirectory(prefix="maskunet-gpu-") as models:
        seconds = 60 * arguments.minutes - (time.monotonic() - began)
        outcomes = Runner(folder / "steps", seconds, report, environment(device, models)).run(chosen)
    print(f"[gpu] {folder / 'table.md'}", flush=True)
    return 0 if all(outcome.state in (PASSED, SKIPPED) for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
