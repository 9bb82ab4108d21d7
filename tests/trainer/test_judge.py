import pytest
import torch

from maskunet_core.judges.frechet import Gaussian, frechet_distance
from maskunet_core.toy.judge import fully_right, read
from maskunet_core.toy.model import load_autoencoder, load_reader
from maskunet_core.toy.readers import Reading
from maskunet_core.toy.vocabulary import PAIRS
from trainer.toy.world import Caption, Phrase, render, sample_captioned


def reading(**objects):
    """A reading of one picture: pair -> (x, y, large)."""
    result = Reading(torch.full((1, PAIRS), -5.0), torch.zeros(1, PAIRS, 2), torch.zeros(1, PAIRS), torch.zeros(1, 4))
    for name, (x, y, large) in objects.items():
        pair = int(name[1:])
        result.presence[0, pair] = 5.0
        result.position[0, pair] = torch.tensor([x, y])
        result.size[0, pair] = 1.0 if large else -1.0
    return result


RED_CIRCLE, BLUE_RING = Phrase(0, 0, None), Phrase(2, 4, None)
RED, BLUE = f"p{RED_CIRCLE.pair}", f"p{BLUE_RING.pair}"


@pytest.mark.parametrize(
    ("caption", "seen", "right"),
    [
        (Caption((RED_CIRCLE,)), {RED: (0.5, 0.5, True)}, True),
        (Caption((RED_CIRCLE,)), {BLUE: (0.5, 0.5, True)}, False),
        (Caption((RED_CIRCLE,)), {RED: (0.2, 0.5, True), BLUE: (0.8, 0.5, True)}, False),
        (Caption((Phrase(0, 0, 0),)), {RED: (0.5, 0.5, True)}, False),
        (Caption((Phrase(0, 0, 1),)), {RED: (0.5, 0.5, True)}, True),
        (Caption((RED_CIRCLE, BLUE_RING)), {RED: (0.2, 0.5, True)}, False),
        (Caption((RED_CIRCLE, BLUE_RING), 0), {RED: (0.2, 0.5, True), BLUE: (0.8, 0.6, True)}, True),
        (Caption((RED_CIRCLE, BLUE_RING), 1), {RED: (0.2, 0.5, True), BLUE: (0.8, 0.6, True)}, False),
        (Caption((RED_CIRCLE, BLUE_RING), 2), {RED: (0.5, 0.2, True), BLUE: (0.6, 0.8, True)}, True),
        (Caption((RED_CIRCLE, BLUE_RING), 3), {RED: (0.5, 0.2, True), BLUE: (0.6, 0.8, True)}, False),
        (Caption((RED_CIRCLE, BLUE_RING), 0), {RED: (0.5, 0.2, True), BLUE: (0.6, 0.8, True)}, False),
    ],
)
def test_fully_right_means_the_objects_their_sizes_and_their_relation(caption, seen, right):
    assert fully_right(reading(**seen), [caption]).tolist() == [right]


def test_frechet_distance_is_that_of_gaussians():
    torch.manual_seed(0)
    a = torch.randn(50_000, 3)
    b = a * torch.tensor([2.0, 1.0, 1.0]) + torch.tensor([0.0, 3.0, 0.0])
    assert frechet_distance(a, Gaussian.of(a)) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(a, Gaussian.of(b)) == pytest.approx(9.0 + 1.0, rel=0.02)


@pytest.mark.parametrize("name", ["reader_a", "reader_b"])
def test_shipped_readers_read_real_pictures_also_through_the_autoencoder(name):
    stream = torch.Generator().manual_seed(99)
    scenes, captions = sample_captioned(300, stream)
    pictures = render(scenes, stream)
    autoencoder, reader = load_autoencoder(), load_reader(name)
    with torch.no_grad():
        decoded = (autoencoder.decode(autoencoder.encode(pictures * 2 - 1)) / 2 + 0.5).clamp(0, 1)
    assert (decoded - pictures).square().mean().sqrt() < 0.03
    for shown in (pictures, decoded):
        assert fully_right(read(reader, shown), captions).float().mean() >= 0.97
