"""The whole comparison of searches."""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from ..job_board import claim, run_jobs
from .plan import Scale, make_plan
from .report import write_report


def reward_compare(output: Path, scale: Scale, at_once: int, only: Collection[str] = ()) -> None:
    """Do what is not done yet, and write the table. only: methods. Raises MaskUNetError where jobs failed."""
    claim(output, asdict(scale))
    try:
        plan, module = make_plan(scale, only), "trainer.reward_compare.jobs"
        run_jobs(plan, output.resolve(), module, at_once, lambda finished: write_report(output, scale))
    finally:
        write_report(output, scale)
    print(f"wrote {output / 'table.md'}, {output / 'table.json'} and {output / 'accuracy_over_compute.png'}")
