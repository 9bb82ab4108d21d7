import math

import pytest
import torch

from maskunet_core.masks.gumbel import binary_mask, gumbel_noise, logistic_noise, straight_through, threshold_of


def test_mask_is_one_where_the_probability_exceeds_delta():
    logits = torch.tensor([-2.0, -0.1, 0.1, 2.0])
    assert binary_mask(logits, threshold_of(1.0, 0.5)).tolist() == [False, False, True, True]
    assert binary_mask(logits, threshold_of(1.0, 0.8)).tolist() == [False, False, False, True]
    assert binary_mask(logits, 0.0, torch.tensor([3.0, 0.0, -1.0, 0.0])).tolist() == [True, False, False, True]


@pytest.mark.parametrize("tau", [0.5, 1.0, 5.0])
def test_gradient_is_that_of_the_sigmoid(tau):
    logits = torch.linspace(-4, 4, 9, requires_grad=True)
    straight_through(logits, 0.0, tau).sum().backward()
    probability = torch.sigmoid(logits.detach() / tau)
    torch.testing.assert_close(logits.grad, probability * (1 - probability) / tau)


@pytest.mark.parametrize("logit", [-1.0, 0.0, 1.5])
def test_noise_keeps_with_the_probability_of_the_sigmoid(logit):
    noise = logistic_noise(torch.Size([200_000]), torch.Generator().manual_seed(0))
    kept = (logit + noise > 0).float().mean().item()
    assert abs(kept - 1 / (1 + math.exp(-logit))) < 0.004


def test_one_gumbel_sample_keeps_with_the_authors_probability():
    noise = gumbel_noise(torch.Size([200_000]), torch.Generator().manual_seed(0))
    for logit in (-2.0, -0.367, 1.0):
        kept = (logit + noise > 0).float().mean().item()
        assert abs(kept - (1 - math.exp(-math.exp(logit)))) < 0.004


def test_noise_is_finite_and_repeats_with_its_seed():
    first = logistic_noise(torch.Size([1_000_000]), torch.Generator().manual_seed(3))
    again = logistic_noise(torch.Size([1_000_000]), torch.Generator().manual_seed(3))
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
