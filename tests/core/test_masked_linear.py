import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from maskunet_core.masks.gumbel import straight_through
from maskunet_core.masks.linear import (
    LearnedMask,
    MaskLogits,
    UnknownRows,
    linear_per_sample,
    masked_linear,
    masked_weight,
    shared_by_all_samples,
    thresholded_linear,
)


def plainly_masked(x, weight, mask, bias=None, strength=1.0):
    """`x (m * w)^T + bias`, as the seam to the host composes it."""
    return linear_per_sample(x, masked_weight(weight, shared_by_all_samples(mask), strength), bias)


@pytest.fixture
def parts():
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 5), torch.randn(6)
    masks = torch.rand(3, 6, 5) < 0.5
    return torch.randn(3, 7, 5), weight, bias, masks


def test_all_ones_equal_the_plain_layer_bit_for_bit(parts):
    x, weight, bias, masks = parts
    assert torch.equal(plainly_masked(x, weight, torch.ones(6, 5), bias), F.linear(x, weight, bias))
    assert torch.equal(plainly_masked(x, weight, torch.ones_like(masks), bias), F.linear(x, weight, bias))


def test_each_sample_has_its_own_weight(parts):
    x, weight, bias, masks = parts
    result = plainly_masked(x, weight, masks, bias)
    for n in range(3):
        torch.testing.assert_close(result[n], F.linear(x[n], weight * masks[n], bias))


def test_strength_scales_what_is_removed(parts):
    x, weight, bias, masks = parts
    half = plainly_masked(x, weight, masks[0], bias, strength=0.5)
    torch.testing.assert_close(half, F.linear(x, weight * (0.5 + 0.5 * masks[0]), bias))


def test_gradients_equal_those_of_the_product(parts):
    x, weight, _, masks = parts
    soft = masks.float().requires_grad_()
    plainly_masked(x, weight, soft).square().sum().backward()
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


class Started(TorchDispatchMode):
    """Counts the operations that a device is asked to start."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_another_device_than_the_cpu_is_not_waited_for():
    """`meta` has no values to look at: it raises where one is asked for."""
    terms = MaskLogits(*(torch.randn(shape, device="meta") for shape in ((640, 640), (2, 640, 8), (640, 8))))
    with Started() as started:
        masks = shared_by_all_samples(terms.above(0.3))
    assert masks.shape == (2, 640, 640)
    assert started.names.count("baddbmm") == started.names.count("gt") == 1
    assert (
        shared_by_all_samples(masks[:1]).shape == shared_by_all_samples(masks[:1].expand(4, -1, -1)).shape == (640, 640)
    )


def test_masks_multiply_in_any_order(parts):
    _, weight, _, masks = parts
    shared = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = weight * masks * shared
    assert torch.equal(masked_weight(masked_weight(weight, masks), shared), expected)
    assert torch.equal(masked_weight(masked_weight(weight, shared), masks), expected)


@pytest.mark.parametrize("static", [(700, 600), (700, 1), ()], ids=str)
def test_bits_of_many_logits_are_those_of_their_signs(static):
    torch.manual_seed(0)
    terms = MaskLogits(torch.randn(static), torch.randn(3, 700, 8), torch.randn(600, 8))
    if not static:
        terms = MaskLogits(torch.randn(700, 600))
    full = terms.full()
    differing = terms.above(0.3) != (full > 0.3)
    # Blocks may be added up in another order than the whole.
    assert not differing[(full - 0.3).abs() > 1e-5].any()
    assert differing.sum() <= 3


def direct(x, weight, bias, logits, threshold, tau, chunks):
    """The same by autograd, with a mask and a masked weight per row of the batch."""
    masks = straight_through(logits.full(), threshold, tau).repeat(chunks, 1, 1)
    return linear_per_sample(x, masks * weight, bias)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("masks", [1, 4])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("per_sample", [False, True])
def test_learned_masks_have_the_gradients_of_the_plain_product(rank, masks, chunks, per_sample):
    torch.manual_seed(0)
    double = torch.float64
    rows = chunks * masks
    weight = torch.randn(rows, 5, 6, dtype=double) if per_sample else torch.randn(5, 6, dtype=double)
    bias = torch.randn(5, dtype=double)
    x = torch.randn(2 * rows, 7, 6, dtype=double, requires_grad=True)
    static = torch.randn(5, 6, dtype=double) if rank or masks == 1 else torch.randn(masks, 5, 6, dtype=double)
    terms = [static]
    if rank:
        terms += [torch.randn(masks, 5, rank, dtype=double), torch.randn(6, rank, dtype=double)]
    for term in terms:
        term.requires_grad_()
    logits, pull = MaskLogits(*terms), torch.randn(2 * rows, 7, 5, dtype=double)
    mask = LearnedMask(logits, 0.1, 0.7, samples=tuple(range(masks)) * chunks)
    found = thresholded_linear(x, weight, bias, mask)
    expected = direct(x, weight, bias, logits, 0.1, 0.7, chunks)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(*(torch.autograd.grad(out, [x, *terms], pull) for out in (found, expected))):
        torch.testing.assert_close(ours, theirs)


def test_noise_of_a_learned_mask_is_the_same_in_the_backward_pass():
    torch.manual_seed(0)
    weight, x, static = torch.randn(5, 6), torch.randn(3, 7, 6), torch.randn(5, 6, requires_grad=True)
    noise = torch.randn(1, 5, 6)
    mask = LearnedMask(MaskLogits(static), 0.0, noise=lambda shape: noise.expand(shape))
    (found,) = torch.autograd.grad(thresholded_linear(x, weight, None, mask).sum(), static)
    shifted = (static.detach() + noise[0]).requires_grad_()
    (expected,) = torch.autograd.grad(direct(x, weight, None, MaskLogits(shifted), 0.0, 1.0, 1).sum(), shifted)
    torch.testing.assert_close(found, expected)


def test_samples_without_a_mask_keep_everything():
    """Both branches of guidance in one batch, of which one is masked."""
    torch.manual_seed(0)
    weight, bias, static = torch.randn(5, 6), torch.randn(5), torch.randn(2, 5, 6, requires_grad=True)
    x = torch.randn(12, 7, 6, requires_grad=True)
    mask = LearnedMask(MaskLogits(static), 0.0, samples=(None, None, 0, 1, None, None))
    found = thresholded_linear(x, weight, bias, mask)
    kept = (static > 0).detach().float()
    expected = [weight, weight, weight * kept[0], weight * kept[1], weight, weight]
    for n, own in enumerate(expected):
        torch.testing.assert_close(found[2 * n : 2 * n + 2], F.linear(x[2 * n : 2 * n + 2], own, bias))
    of_mask, of_x = torch.autograd.grad(found.square().sum(), [static, x])
    (direct_x,) = torch.autograd.grad(
        sum(F.linear(x[2 * n : 2 * n + 2], own, bias).square().sum() for n, own in enumerate(expected)), x
    )
    torch.testing.assert_close(of_x, direct_x)
    assert of_mask.flatten(1).any(1).all()


def test_masks_that_do_not_run_through_the_samples_are_refused():
    with pytest.raises(ValueError, match="do not run through 2 masks"):
        LearnedMask(MaskLogits(torch.zeros(2, 5, 6)), 0.0, samples=(0, 0, 1, 1))


def test_a_batch_that_another_node_has_repeated_is_refused(parts):
    """Attention couple asks every region of a sample for its own answer: twice the rows, each of all tokens."""
    _, weight, bias, masks = parts
    tiles, regions = torch.randn(6, 8, 5), torch.randn(6, 16, 5)
    assert masked_linear(tiles, weight, bias, [(masks, 1.0)], tokens=16, name="to_q").shape == (6, 8, 6)
    with pytest.raises(UnknownRows, match="to_q gets 6 rows for 3 samples"):
        masked_linear(regions, weight, bias, [(masks, 1.0)], tokens=16, name="to_q")
    with pytest.raises(UnknownRows, match="to_q gets 4 rows for 3 samples"):
        masked_linear(regions[:4], weight, bias, [(masks, 1.0)], name="to_q")
    assert masked_linear(regions, weight, bias, [(masks[0], 1.0)], tokens=16, name="to_q").shape == (6, 16, 6)
