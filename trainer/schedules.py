"""Learning-rate schedules."""

import math
from collections.abc import Callable


def warm_up_and_cosine(steps: int, warm_up: int, floor: float) -> Callable[[int], float]:
    """Factor per step: linear over `warm_up` steps (a tenth of a short run), then a cosine from 1 down to `floor`."""
    warm_up = max(1, min(warm_up, steps // 10))

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / warm_up) * (floor + (1 - floor) * cosine)

    return factor
