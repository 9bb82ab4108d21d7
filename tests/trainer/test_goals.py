"""The goals of MaskUNet Train against the presets of the command line."""

import pytest

from maskunet_core.training.goals import GOALS, settings_of
from maskunet_core.training.settings import plain_values
from trainer.config_file import PRESETS, read_toml


@pytest.mark.parametrize(("goal", "preset"), [("subject", "dreambooth"), ("general", "sd15")])
def test_a_goal_has_the_numbers_of_its_preset(goal, preset):
    chosen = plain_values(GOALS[goal])
    of_preset = read_toml(PRESETS / f"{preset}.toml")
    for part in ("generator", "optimiser", "loop"):
        assert of_preset[part].items() <= chosen[part].items()
    assert chosen["validation"]["pictures"] == of_preset["validation"]["pictures"]
    of_pictures = {key: value for key, value in of_preset["data"].items() if key in chosen["data"]}
    assert of_pictures.items() <= chosen["data"].items()


@pytest.mark.parametrize("goal", GOALS)
def test_biases_reach_the_threshold_in_however_few_steps(goal):
    for steps in (20, 200, 2000):
        found = settings_of(goal, steps, 0, "decoder attention", 512)
        assert found.optimiser.lr_bias * steps >= 8 * found.generator.start
        assert found.validation.every * 8 <= max(8, steps)


def test_small_pictures_are_computed_at_once_and_large_ones_in_parts():
    small, large = (settings_of("general", 100, 0, "decoder attention", side).loop for side in (64, 512))
    assert (small.batch, small.accumulate, small.checkpointing) == (8, 1, False)
    assert (large.batch, large.accumulate, large.checkpointing) == (8, 4, True)
