"""Kernel distances between sets of features, held against those of the reference packages."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from maskunet_core.judges.kernel import SCALE, cmmd, kid
from maskunet_core.judges.pictures import central_square, levels
from tests.judge_weights import blobs, edges, features, noise

FOLDER = Path(__file__).with_name("judges")
GOLDEN = json.loads((FOLDER / "distances.json").read_text(encoding="utf-8"))


def sets(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return features(**GOLDEN[name]["first"]), features(**GOLDEN[name]["second"])


def test_kid_of_all_pairs_is_unbiased_and_of_the_reference():
    distance, influence = kid(*sets("kid"))
    assert distance == pytest.approx(GOLDEN["kid"]["unbiased_all_pairs"], rel=1e-9)
    assert influence.mean() == pytest.approx(0, abs=1e-12)


def test_kid_of_torch_fidelitys_subsets_is_its_own():
    first, second = sets("kid")
    how = GOLDEN["kid"]["torch_fidelity"]
    stream, found = np.random.RandomState(how["rng_seed"]), []
    for _ in range(how["subsets"]):
        chosen = [x[stream.choice(len(x), how["subset_size"], replace=False)] for x in (first, second)]
        found.append(kid(*chosen)[0])
    assert np.mean(found) == pytest.approx(how["mean"], rel=1e-9)


def test_cmmd_is_the_references():
    distance, _ = cmmd(*(F.normalize(x, dim=-1) for x in sets("cmmd")))
    assert SCALE * distance == pytest.approx(GOLDEN["cmmd"]["value"], rel=1e-9)


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_the_influence_gives_the_error_of_a_distance_and_of_a_paired_difference(distance):
    """Against the spread over samples that are drawn anew."""
    d, n, draws = 12, 150, 80
    reference, found = features(300, d, 1, mean=0.3), []
    for seed in range(draws):
        first = features(n, d, 100 + seed)
        second = 1.1 * first + 0.2 * features(n, d, 1000 + seed)
        (a, of_a), (b, of_b) = (distance(x, reference) for x in (first, second))
        found.append([a, b - a, float(of_a.std()) / n**0.5, float((of_b - of_a).std()) / n**0.5])
    distances, differences, error, error_of_difference = np.array(found, dtype=float).T
    assert error.mean() == pytest.approx(distances.std(), rel=0.25)
    assert error_of_difference.mean() == pytest.approx(differences.std(), rel=0.25)


def test_pictures_are_framed_as_cmmds_reference_does():
    pictures = {
        "37x53_noise": noise(37, 53, 1),
        "427x640_blobs": blobs(427, 640, 5),
        "301x200_edges": edges(301, 200, 4),
    }
    for name, expected in load_file(FOLDER / "cmmd.safetensors").items():
        found = levels(central_square(pictures[name], 336)).movedim(0, -1)[10::42, 10::42]
        assert torch.equal(found, expected), name
