"""The part of sampling in which something acts, told in percents of the host's schedule."""

import math
from typing import Any

from ..errors import MaskUNetError


def require_order(start_percent: float, end_percent: float, what: str) -> None:
    """Raises MaskUNetError where the percents are not in order. what: acts between them, for the message."""
    if start_percent > end_percent:
        raise MaskUNetError(
            f"start_percent ({start_percent}) lies after end_percent ({end_percent}), so {what} would never act. "
            "Set start_percent to the smaller of the two."
        )


def is_whole(start_percent: float, end_percent: float) -> bool:
    return start_percent <= 0.0 and end_percent >= 1.0


def acts_at(sigma: float, sampling: Any, start_percent: float, end_percent: float) -> bool:
    """Whether a noise level of the host's schedule lies between the two."""
    start = math.inf if start_percent <= 0.0 else sampling.percent_to_sigma(start_percent)
    return start >= sigma >= sampling.percent_to_sigma(end_percent)
