"""The numbers that golden files hang on. Where the first test fails, golden tests that fail say nothing of our code."""

import pytest
import torch

from tests.drawn import drawn


def test_a_name_draws_the_same_numbers_on_every_machine():
    """To the last bit: from one version of numpy or torch to the next, nothing may change."""
    expected = ["-0x1.93915dd785dc7p-3", "-0x1.1f73e91dc2e43p+0", "-0x1.85bd0e0213cc3p-2"]
    assert [value.hex() for value in drawn("x", 3).tolist()] == expected


def test_values_are_nearly_normal():
    values = drawn("x", 400, 500, mean=3.0, scale=0.5)
    assert values.mean() == pytest.approx(3.0, abs=0.005)
    assert values.std() == pytest.approx(0.5, abs=0.005)
    assert ((values - 3.0).abs() < 0.5).double().mean() == pytest.approx(0.683, abs=0.02)


def test_names_have_streams_of_their_own():
    assert torch.corrcoef(torch.stack([drawn(name, 10_000) for name in ("x", "y")]))[0, 1].abs() < 0.03
