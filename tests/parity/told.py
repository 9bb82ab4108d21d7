"""What both halves of `make parity` end with."""

import sys
from collections.abc import Callable

from tests.parity.environment import PACKAGES, ParityError
from trainer.host import PROJECT
from trainer.tables import write_table

TOLERANCE = 1e-5


def tell(rows: list[dict], seed: int, name: str = "table") -> int:
    """Writes the table, and returns the exit status: 1 where a row is not `equal`."""
    settings = {"tolerance": TOLERANCE, "seed": seed, "original": list(PACKAGES)}
    print(write_table(PROJECT / "output" / "parity", rows, settings, name))
    if all(row["equal"] for row in rows):
        return 0
    print(f"Something differs by more than {TOLERANCE:g}: see the rows that are not equal.", file=sys.stderr)
    return 1


def end_with(compare: Callable[[], int]) -> None:
    """Ends the process with what a half returns, or with its sentence."""
    try:
        sys.exit(compare())
    except ParityError as error:
        sys.exit(f"[parity] {error}")
