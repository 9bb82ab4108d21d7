import pytest
import torch

from maskunet_core.seam.saved import writable


@pytest.fixture
def leaves():
    stream = torch.Generator().manual_seed(0)
    return [torch.randn(8, 8, generator=stream).requires_grad_() for _ in range(6)]


def test_a_kept_tensor_that_is_written_into_is_still_what_it_was(leaves):
    with writable():
        kept = leaves[0] * 3.0
        loss = kept.square().sum()
        kept.mul_(0.5)
        loss = loss + kept.square().sum()
        (gradient,) = torch.autograd.grad(loss, leaves[0])
    torch.testing.assert_close(gradient, (18.0 + 4.5) * leaves[0].detach())


@pytest.mark.parametrize(
    "write",
    [
        lambda kept: kept[:, 3:].add_(1.0),
        lambda kept: kept.view(64)[40:].zero_(),
        lambda kept: kept.T[2].copy_(kept.T[1]),
        lambda kept: torch.add(torch.ones(8), 1.0, out=kept.detach()[5]),
        lambda kept: torch._foreach_add_([kept.detach()[0], kept.detach()[7]], 1.0),
    ],
    ids=["columns", "view", "transposed", "out", "foreach"],
)
def test_writes_into_a_part_are_seen(leaves, write):
    with writable():
        kept = leaves[0] * 1.0
        loss = kept.square().sum()
        write(kept)
        (gradient,) = torch.autograd.grad(loss, leaves[0])
    torch.testing.assert_close(gradient, 2 * leaves[0].detach())


def test_tensors_whose_memory_is_used_again_are_told_apart(leaves):
    """torch's own way takes one for another in one of some hundred such graphs."""
    expected = [2.0 * (n + 1) ** 2 * leaf.detach() for n, leaf in enumerate(leaves)]
    for _ in range(300):
        with writable():
            loss = torch.zeros(())
            for n, leaf in enumerate(leaves):
                kept = leaf * float(n + 1)
                loss = loss + kept.square().sum()
                kept.mul_(0.5)
                del kept
            for found, wanted in zip(torch.autograd.grad(loss, leaves), expected):
                torch.testing.assert_close(found, wanted)


def test_what_was_written_after_the_block_stops_the_backward_pass(leaves):
    with writable():
        kept = leaves[0] * 1.0
        loss = kept.square().sum()
    kept.add_(1.0)
    with pytest.raises(RuntimeError, match="was written into where no copy of it was made"):
        loss.backward()


def test_copies_are_made_once_and_of_what_is_kept_alone(leaves):
    class Clones(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten.clone.default
            return function(*args, **(kwargs or {}))

    with Clones() as clones, writable():
        kept, other = leaves[0] * 1.0, leaves[1] * 1.0
        loss = kept.square().sum() + kept.sin().sum() + other.sum()
        kept.add_(1.0)
        other.add_(1.0)
        kept.add_(1.0)
        loss.backward()
    assert clones.count == 1
