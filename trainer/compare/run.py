"""The whole comparison."""

from pathlib import Path

from ..job_board import claim, run_jobs
from .plan import WORLDS, Scale, make_plan, scale_to_values
from .report import write_report


def compare(output: Path, scale: Scale, at_once: int, worlds: tuple[str, ...] = WORLDS) -> None:
    """Do what is not done yet, and write the tables. Raises MaskUNetError where jobs failed."""
    claim(output, scale_to_values(scale))
    try:
        run_jobs(
            make_plan(scale, worlds),
            output.resolve(),
            "trainer.compare.jobs",
            at_once,
            lambda finished: write_report(output, scale, any(job.kind == "final" for job in finished)),
        )
    finally:
        write_report(output, scale, figures=True)
    print(f"wrote {output / 'table.md'}, {output / 'table.json'} and {output / 'figures'}")
