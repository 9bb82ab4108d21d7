"""What a run needs: files, time and disk."""

import time
from collections.abc import Sequence

from .drawing import reward_files
from .methods import Method
from .plan import Plan
from .run import drawers_of

_BYTES = 1.7
"""Of a PNG, per pixel."""


def check(plan: Plan, methods: Sequence[Method], rewards: Sequence[str]) -> list[str]:
    """Lines for people. One picture is drawn by each method, to tell the time. Raises MaskUNetError."""
    missing = plan.suite.missing(plan.data)
    notes = [*plan.suite.notes, *(f"Not needed, but used where it is there: {line}" for line in plan.suite.unused())]
    if missing:
        return ["Missing:", *missing, *notes, "Nothing was drawn; check again when all is there."]
    prompts, units = plan.prompts, plan.units
    pictures = sum(len(unit.pairs) for unit in units)
    plan.suite.judges(plan.data)
    disk = pictures * len(methods) * (plan.side or plan.suite.side) ** 2 * _BYTES / 1e9
    lines = [
        f"{len(prompts)} prompts, {pictures} pictures by each of {len(methods)} methods, {disk:.1f} GB of pictures"
    ]
    for method, drawer in zip(methods, drawers_of(plan, methods, reward_files(rewards))):
        pairs = units[0].pairs
        began = time.monotonic()
        drawer.pictures(pairs, [prompts[n].text for n, _ in pairs])
        seconds = (time.monotonic() - began) / len(pairs)
        lines.append(f"{method}: {seconds:.2f} s a picture, {pictures * seconds / 3600:.1f} h")
    return [*lines, "All that is needed is there.", *notes]
