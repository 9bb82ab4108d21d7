"""Images of a batch whose search is over stay exactly where they are, whatever the optimiser remembers of them."""

from functools import partial

import pytest
import torch

from maskunet_core.search.loop import Group, search_step
from maskunet_core.search.settings import SearchSettings

OPTIMISERS = {
    "SGD": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), True),
    "AdamW": (partial(torch.optim.AdamW, lr=0.1, weight_decay=0.01), False),
}
UPDATES = 6


def values(optimiser: str, start: torch.Tensor, score, **settings) -> torch.Tensor:
    """`[looks, N, 3]`: the leaves at each look."""
    leaf, seen = start.clone().requires_grad_(), []
    make, normalised = OPTIMISERS[optimiser]

    def judge(estimate, gradient):
        return score(estimate), torch.ones_like(estimate) if gradient else None

    search_step(
        groups=[Group([leaf], make, normalised)],
        redraw=lambda: None,
        predict=lambda: 2 * leaf,
        current=dict,
        judge=judge,
        iterations=UPDATES,
        settings=SearchSettings(keep_best=False, **settings),
        report=lambda *_: seen.append(leaf.detach().clone()) or True,
    )
    return torch.stack(seen)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_an_image_that_has_reached_the_target_stays_while_the_others_go_on(optimiser):
    start = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    seen = values(optimiser, start, lambda estimate: estimate.mean(1), target=2.3)
    reached = int((2 * seen[:, 0].mean(1) >= 2.3).nonzero()[0])
    assert 0 < reached < UPDATES - 1
    assert (seen[reached:, 0] == seen[reached, 0]).all()
    alone = values(optimiser, start[1:], lambda estimate: estimate.mean(1), target=None)
    # Sums over a batch may be taken in another order than those of one image.
    torch.testing.assert_close(seen[:, 1], alone[: len(seen), 0], rtol=1e-5, atol=1e-6)
    assert (seen[1:, 1] != seen[:-1, 1]).all()


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_an_image_whose_patience_is_over_stays_while_the_others_go_on(optimiser):
    """The first image's reward falls with each update."""
    start = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    signs = torch.tensor([-1.0, 1.0])
    seen = values(optimiser, start, lambda estimate: signs * estimate.mean(1), patience=2)
    assert (seen[:3, 0].diff(dim=0) != 0).all()
    assert (seen[2:, 0] == seen[2, 0]).all()
    assert (seen[1:, 1] != seen[:-1, 1]).all()
