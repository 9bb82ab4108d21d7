"""What a run needs: files, time and disk."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from maskunet_core.errors import MaskUNetError

from ..base_files import checkpoint_file, part_files
from .drawing import reward_files
from .methods import Method
from .plan import Plan
from .run import drawers_of, plan_of


def check(
    plan: Plan, methods: Sequence[Method], rewards: Sequence[str], output: Path, keep_all: bool = False
) -> list[str]:
    """Lines for people. One picture is drawn by each method, to tell the time. output: of the run. keep_all: see
    run_suite. Raises MaskUNetError."""
    missing = [*plan.suite.missing(plan.data), *_missing_models(plan, methods)]
    notes = [*plan.suite.notes, *(f"Not needed, but used where it is there: {line}" for line in plan.suite.unused())]
    if missing:
        return ["Missing:", *missing, *notes, "Nothing was drawn; check again when all is there."]
    prompts, units = plan.prompts, plan.units
    pictures = sum(len(unit.pairs) for unit in units)
    plan.suite.judges(plan.data)
    lines = [f"{len(prompts)} prompts, {plan_of(plan, methods, units, output, keep_all)}"]
    for method, drawer in zip(methods, drawers_of(plan, methods, reward_files(rewards))):
        pairs = units[0].pairs
        began = time.monotonic()
        drawer.pictures(pairs, [prompts[n].text for n, _ in pairs])
        seconds = (time.monotonic() - began) / len(pairs)
        lines.append(f"{method}: {seconds:.2f} s a picture, {pictures * seconds / 3600:.1f} h")
    return [*lines, "All that is needed is there.", *notes]


def _missing_models(plan: Plan, methods: Sequence[Method]) -> list[str]:
    """A line for the base and for each method's file that is not there."""
    base, told = plan.base_settings, []
    finders = [] if base.is_toy else [partial(part_files if base.parts else checkpoint_file, base)]
    finders += [part.find for method in methods for part in method.parts]
    for find in finders:
        try:
            find()
        except MaskUNetError as error:
            told.append(str(error))
    return told
