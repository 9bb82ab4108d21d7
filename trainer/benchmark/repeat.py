"""The commands that make a run anew, from what its folder says of it."""

import shlex
from collections import Counter
from typing import Any

from ..choices import TOY
from .folder import RunFolder
from .methods import BASE
from .plan import SMOKE, SUITES
from .suites import Suite

_PROGRAM = "python -m trainer benchmark"


def commands_of(run: RunFolder) -> list[str]:
    """One that draws all methods, or one for each folder of pictures that others drew. Files are named without their
    folders, as ComfyUI lists them; LISTS is the folder of prompt lists."""
    records, settings = [method.record for method in run.methods()], run.settings
    suite = SUITES[settings["suite"]]
    shared = ["--data", "LISTS"] if suite.lists else []
    shared += _others({"seed": (settings["seed"], 0), "batch": (settings["batch"], suite.batch)})
    shared += _prompts(run, suite)
    if settings["sampling"] is None:
        return [_written("score", one["pictures"], suite.name, *_imported(one), *shared) for one in records]
    return [_written("run", suite.name, *_drawn(settings, suite), *shared, *_methods(records))]


def _written(*words: str) -> str:
    return f"{_PROGRAM} {shlex.join(words)}"


def _others(options: dict[str, tuple[Any, Any]]) -> list[str]:
    """Options whose value is not the usual one, which stands second."""
    return [word for name, (value, usual) in options.items() if value != usual for word in (f"--{name}", str(value))]


def _prompts(run: RunFolder, suite: Suite) -> list[str]:
    images = max((number + 1 for unit in run.units() for _, number in unit.pairs), default=suite.images)
    of_task = Counter(prompt.task for prompt in run.prompts).values()
    if images == 1 and max(of_task) <= SMOKE:
        return ["--smoke"]
    return _others({"images": (images, suite.images)})


def _drawn(settings: dict[str, Any], suite: Suite) -> list[str]:
    sampling = settings["sampling"]
    return _others(
        {
            "base": (settings["base"], TOY),
            "side": (settings["side"], suite.side),
        }
        | {name: (value, getattr(suite.sampling, name)) for name, value in sampling.items()}
    )


def _methods(records: list[dict[str, Any]]) -> list[str]:
    names = [record["method"] for record in records if record["method"] != BASE]
    rewards = dict.fromkeys(reward for record in records for reward in record.get("rewards", ()))
    return [word for name in names for word in ("--method", name)] + [
        word for reward in rewards for word in ("--reward", reward)
    ]


def _imported(record: dict[str, Any]) -> list[str]:
    return ["--layout", record.get("layout", "flat"), "--name", record["method"]]
