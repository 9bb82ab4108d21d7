"""What a training asks of accelerate, without it."""

import torch
from torch import nn

from maskunet_core.training.alone import Alone


def test_a_step_in_half_precision_that_overflows_lowers_the_scale_and_does_no_more():
    parameter = nn.Parameter(torch.ones(2))
    alone = Alone(torch.device("cpu"), torch.float16)
    optimiser = alone.prepare_optimizer(torch.optim.SGD([parameter], lr=0.1))
    scale = alone.scaler.get_scale()
    alone.backward((parameter * torch.inf).sum())
    optimiser.step()
    assert parameter.tolist() == [1.0, 1.0]
    assert alone.scaler.get_scale() == scale / 2
    optimiser.zero_grad()
    alone.backward(parameter.sum())
    optimiser.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 0.9))


def test_full_precision_needs_no_scale():
    alone, optimiser = Alone(torch.device("cpu"), torch.float32), torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert alone.prepare_optimizer(optimiser) is optimiser
    with alone.autocast():
        assert not torch.is_autocast_enabled("cpu")
