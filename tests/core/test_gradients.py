"""Frozen networks keep less for their backward passes, and give the same gradients."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskunet_core.seam.attention import differentiable_attention
from maskunet_core.seam.gradients import LeanGraph
from tests.kept import KeptByAutograd


def residual_block(inplace: bool, stride: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.GroupNorm(4, 16), nn.SiLU(inplace), nn.Conv2d(16, 16, 3, stride, 1)]
    return nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), *layers, nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 1))


def passed(network: nn.Module, lean: bool):
    """(output, gradient of the input, bytes kept)."""
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with KeptByAutograd() as kept, LeanGraph() if lean else contextlib.nullcontext():
        y = network(x)
    size = kept.bytes(network.parameters())
    return y, torch.autograd.grad(y.square().sum(), x)[0], size


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_the_same_bit_for_bit_and_less_than_half_is_kept(inplace, stride):
    network = residual_block(inplace, stride).requires_grad_(False)
    (stock, slope, kept), (ours, our_slope, less) = passed(network, lean=False), passed(network, lean=True)
    assert torch.equal(ours, stock)
    assert torch.equal(our_slope, slope)
    assert less < 0.5 * kept


def test_layers_that_are_trained_keep_what_their_weights_need():
    network = residual_block(inplace=False)
    x = torch.randn(2, 4, 16, 16)
    expected = torch.autograd.grad(network(x).square().sum(), list(network.parameters()))
    with LeanGraph():
        y = network(x)
    for ours, stock in zip(torch.autograd.grad(y.square().sum(), list(network.parameters())), expected):
        assert torch.equal(ours, stock)


def test_what_is_changed_between_norm_and_silu_counts():
    norm = nn.GroupNorm(4, 16).requires_grad_(False)
    x = torch.randn(2, 16, 8, 8).requires_grad_()

    def modulated() -> torch.Tensor:
        return F.silu(norm(x) * 1.5 + 0.5)

    (expected,) = torch.autograd.grad(modulated().sum(), x)
    with LeanGraph():
        (slope,) = torch.autograd.grad(modulated().sum(), x)
    assert torch.equal(slope, expected)


def test_a_norm_that_is_changed_in_place_counts_as_it_is():
    norm = nn.GroupNorm(4, 16).requires_grad_(False)
    x = torch.randn(2, 16, 8, 8).requires_grad_()

    def modulated() -> torch.Tensor:
        y = norm(x)
        y *= 1.5
        return F.silu(y)

    (expected,) = torch.autograd.grad(modulated().sum(), x)
    with LeanGraph():
        (slope,) = torch.autograd.grad(modulated().sum(), x)
    assert torch.equal(slope, expected)


@pytest.mark.parametrize("tokens", [64, 1024])
def test_large_attention_matrices_are_not_kept(tokens):
    from comfy.ldm.modules.attention import attention_sub_quad

    stream = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, tokens, 32, generator=stream).requires_grad_() for _ in range(3))
    with KeptByAutograd() as kept:
        ours = differentiable_attention(attention_sub_quad, query, key, value, 2)
    stock = attention_sub_quad(query, key, value, 2)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (query, key, value)) for y in (ours, stock))):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    matrices = 2 * tokens * tokens * 4
    assert (kept.bytes(()) >= matrices) == (tokens == 64)
