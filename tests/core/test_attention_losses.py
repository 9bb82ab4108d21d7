"""The losses of attention guidance against numbers that the published functions gave."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskunet_core.attention.losses import bind_loss, distances, excite_loss, peaks
from maskunet_core.attention.words import WordSet

GOLDEN = Path(__file__).with_name("published") / "attention_golden.safetensors"
SETS = json.loads(GOLDEN.with_suffix(".json").read_text())
ALL, TO_END = tuple(range(1, 76)), tuple(range(1, 7))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def close(found, expected, share):
    """Within a share of the largest number."""
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("case", "subjects", "compared"), [("two", (2, 5), ALL), ("three", (2, 5, 9), ALL), ("eot", (2, 5), TO_END)]
)
def test_attend_and_excite_gives_the_published_loss_and_gradient(golden, case, subjects, compared):
    maps = golden["excite/map"][None].requires_grad_()
    subjects = [(subject,) for subject in subjects]
    torch.testing.assert_close(peaks(maps, subjects, compared)[0], golden[f"excite/{case}/max"], rtol=1e-5, atol=0)
    loss = excite_loss(maps, subjects, compared)
    torch.testing.assert_close(loss, golden[f"excite/{case}/loss"], rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), maps)
    rows, columns = golden[f"excite/{case}/grad_pixels"].long().unbind(1)
    expected = torch.zeros_like(maps[0]).index_put((rows, columns), golden[f"excite/{case}/grad_values"])
    close(gradient[0], expected, 1e-5)


@pytest.mark.parametrize("case", SETS)
def test_syngen_gives_the_published_loss_and_gradient(golden, case):
    maps = golden["bind/map"][None].requires_grad_()
    sets = [WordSet(tuple(noun), tuple(map(tuple, modifiers))) for noun, modifiers in SETS[case]["sets"]]
    loss = bind_loss(maps, sets, SETS[case]["prompt"])
    torch.testing.assert_close(loss, golden[f"bind/{case}/loss"], rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), maps)
    expected = torch.zeros_like(maps[0])
    expected[..., golden[f"bind/{case}/grad_columns"].long()] = golden[f"bind/{case}/grad"]
    close(gradient[0], expected, 1e-5)


def test_distances_are_the_published_ones_and_stay_finite_where_a_map_is_zero(golden):
    one, other, expected = (golden[f"bind/kl/{name}"] for name in ("p", "q", "out"))
    pairs = torch.stack([one, other], 2).view(4, 8, 8, 2)
    found = distances(pairs)[:, 0, 1]
    with_zeros = torch.isinf(expected)
    assert with_zeros.any()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[~with_zeros].float(), expected[~with_zeros], rtol=1e-5, atol=0)
    assert (found[with_zeros] > found[~with_zeros].max()).all()


def test_images_of_a_batch_have_losses_and_gradients_of_their_own(golden):
    maps = torch.stack([golden["bind/map"], golden["bind/map"].flip(0, 1).roll(1, 2)]).requires_grad_()
    sets, prompt = [WordSet((3,), ((2,),))], (1, 2, 3, 4)
    for loss_of in (lambda m: excite_loss(m, [(2,), (3,)], ALL), lambda m: bind_loss(m, sets, prompt)):
        (gradient,) = torch.autograd.grad(loss_of(maps).sum(), maps)
        for image in range(2):
            alone = maps[image : image + 1].detach().requires_grad_()
            (own,) = torch.autograd.grad(loss_of(alone).sum(), alone)
            torch.testing.assert_close(gradient[image : image + 1], own)


def test_a_subject_of_several_pieces_gets_what_its_pieces_get_together(golden):
    maps = golden["excite/map"][None]
    shares = (100 * maps[..., 1:76]).softmax(-1)
    expected = (shares[..., 1] + shares[..., 2]).flatten(1).amax(1)
    torch.testing.assert_close(peaks(maps, [(2, 3)], ALL, smooth=False)[:, 0], expected)
