"""`python -m tests.families`: which families masks and the search for them work on, as a table in Markdown."""

import logging

# The host has a package `tests` of its own, so ours comes first.
from tests.families.checks import COLUMNS, World
from tests.families.models import TINY
from tests.families.searches import SEARCHES
from trainer.host import enter_host

_ALL = COLUMNS | SEARCHES


def _cell(world: World, column: str) -> str:
    try:
        _ALL[column](world)
    except Exception as error:
        return f"no: {type(error).__name__}"
    return "yes"


def main() -> None:
    enter_host()
    logging.getLogger().setLevel(logging.ERROR)
    print(f"| family | {' | '.join(_ALL)} |")
    print("| --- " * (len(_ALL) + 1) + "|")
    for name in TINY:
        world = World(name)
        print(f"| {name} | {' | '.join(_cell(world, column) for column in _ALL)} |", flush=True)


if __name__ == "__main__":
    main()
