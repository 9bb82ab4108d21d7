"""Fixtures of the trainer's tests."""

import pytest


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """accelerate keeps precision and processes for a whole process, of which every test is a part."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
