"""The steps of `make gpu`, in order of worth."""

from pathlib import Path

from tests.gpu.runner import Step

SUITES = {
    "masks": ("core/test_masked_linear", "core/test_gumbel", "core/test_generator", "core/test_attach"),
    "records": ("core/test_recorder", "core/test_recorded"),
    "search": ("core/test_search", "core/test_search_few_steps", "core/test_gradients"),
    "rewards": ("core/test_rewards_toy", "nodes/test_reward_sampler_in_process"),
    "trainer": ("trainer/test_methods", "trainer/test_toy_training"),
}
"""Tests that a device changes, by what they are about. Files under `tests`."""
ESTIMATES = {
    # name: seconds on a card, seconds on a CPU with tiny shapes
    "tests of masks": (30, 60),
    "tests of records": (30, 60),
    "tests of search": (60, 120),
    "tests of rewards": (30, 60),
    "tests of trainer": (60, 120),
    "nodes, dynamic VRAM off": (50, 90),
    "nodes, dynamic VRAM on": (50, 10),
    "presets, dynamic VRAM off": (50, 90),
    "presets, dynamic VRAM on": (50, 10),
    "step, SD 1.5": (40, 30),
    "step, SDXL": (60, 30),
    "whole presets": (60, 60),
    "training step": (50, 30),
    "step, compiled": (120, 90),
}
LIMIT, CPU_LIMIT = 3, 20
"""A step is ended after this many times its estimate; on a CPU it may be slow, as long as the budget lasts."""


def _commands() -> dict[str, tuple[str, ...]]:
    commands = {f"tests of {about}": ("-m", "tests.gpu.suite", *files) for about, files in SUITES.items()}
    for part in ("nodes", "presets"):
        for mode, said in (("static", "off"), ("dynamic", "on")):
            commands[f"{part}, dynamic VRAM {said}"] = ("-m", "tests.gpu.in_host", mode, part)
    goals = {"step, SD 1.5": "sd15", "step, SDXL": "sdxl", "whole presets": "presets"}
    goals |= {"training step": "training", "step, compiled": "compiled"}
    return commands | {name: ("-m", "tests.gpu.goals", goal) for name, goal in goals.items()}


def steps(on_card: bool) -> list[Step]:
    commands = _commands()
    if on_card:
        return [Step(name, commands[name], card, LIMIT * card) for name, (card, _) in ESTIMATES.items()]
    return [Step(name, commands[name], cpu, CPU_LIMIT * cpu) for name, (_, cpu) in ESTIMATES.items()]


def missing(tests: Path) -> list[str]:
    """Files of SUITES that are not there."""
    return [file for files in SUITES.values() for file in files if not (tests / f"{file}.py").is_file()]
