"""What a step of a configuration takes."""

import dataclasses
from typing import Any

from maskunet_core.training import cost
from maskunet_core.training.base import BaseModel

from .config import Config


def estimate(base: BaseModel, method: Any, config: Config, accelerator: Any, size: tuple[int, int]) -> cost.Cost:
    """As the core's. Where rewards are trained on, drawing counts, but not the autoencoder and the rewards."""
    if config.objective != "reward":
        return cost.estimate(base, method, config, accelerator, size)
    reward = config.reward
    # A guided prediction is two.
    found = cost.estimate(base, method, config, accelerator, size, guided=1 if reward.cfg == 1 else 2)
    # The policy's prediction, the base's, and a share of a picture's steps.
    further = (1 + (reward.pull > 0) + reward.steps / reward.passes) * found.forward
    return dataclasses.replace(found, seconds=found.seconds + further)
