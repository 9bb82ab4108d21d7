"""Learning-rate schedules."""

import math
from collections.abc import Callable

FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""Schedules by name: from the share of a run that is done to what is left of the learning rate."""


def learning_rate_factor(schedule: str, steps: int, warm_up: int, floor: float) -> Callable[[int], float]:
    """Factor per step: linear over `warm_up` steps (a tenth of a short run), then by the schedule from 1 to `floor`."""
    warm_up = max(1, min(warm_up, steps // 10))
    fall = FALLS[schedule]

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * (floor + (1 - floor) * fall(min(1.0, step / steps)))

    return factor
