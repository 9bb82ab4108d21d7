import pytest
import torch
import torch.nn.functional as F

from maskunet_core.masked_linear import linear_per_sample, masked_linear, masked_weight, shared_by_all_samples


@pytest.fixture
def parts():
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 5), torch.randn(6)
    masks = torch.rand(3, 6, 5) < 0.5
    return torch.randn(3, 7, 5), weight, bias, masks


def test_all_ones_equal_the_plain_layer_bit_for_bit(parts):
    x, weight, bias, masks = parts
    assert torch.equal(masked_linear(x, weight, torch.ones(6, 5), bias), F.linear(x, weight, bias))
    assert torch.equal(masked_linear(x, weight, torch.ones_like(masks), bias), F.linear(x, weight, bias))


def test_each_sample_has_its_own_weight(parts):
    x, weight, bias, masks = parts
    result = masked_linear(x, weight, masks, bias)
    for n in range(3):
        torch.testing.assert_close(result[n], F.linear(x[n], weight * masks[n], bias))


def test_strength_scales_what_is_removed(parts):
    x, weight, bias, masks = parts
    half = masked_linear(x, weight, masks[0], bias, strength=0.5)
    torch.testing.assert_close(half, F.linear(x, weight * (0.5 + 0.5 * masks[0]), bias))


def test_gradients_equal_those_of_the_product(parts):
    x, weight, _, masks = parts
    soft = masks.float().requires_grad_()
    masked_linear(x, weight, soft).square().sum().backward()
    expected = masks.float().requires_grad_()
    torch.einsum("bti,boi->bto", x, weight * expected).square().sum().backward()
    torch.testing.assert_close(soft.grad, expected.grad)


def test_tiles_of_a_sample_share_its_mask(parts):
    _, weight, bias, masks = parts
    tiles = torch.randn(6, 4, 5)
    result = linear_per_sample(tiles, masked_weight(weight, masks), bias)
    for n in range(6):
        torch.testing.assert_close(result[n], F.linear(tiles[n], weight * masks[n // 2], bias))


def test_equal_masks_are_shared_and_different_ones_are_not(parts):
    masks = parts[3]
    assert shared_by_all_samples(masks[:1].expand(4, -1, -1)).shape == (6, 5)
    assert shared_by_all_samples(masks).shape == (3, 6, 5)
