"""Distances between sets of features, held against those of the reference packages."""

import json
from pathlib import Path

import numpy as np
import pytest

from maskunet_core.judges.frechet import Gaussian, frechet_distance, frechet_influence
from tests.judge_weights import features

GOLDEN = json.loads(Path(__file__).with_name("judges").joinpath("distances.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["frechet"], ids=lambda case: case["name"])
def test_frechet_distances_are_those_of_pytorch_fid(case):
    first, second = features(**case["first"]), features(**case["second"])
    few = min(len(first), len(second)) <= first.shape[1] or "rank" in case["first"]
    expected = pytest.approx(case["pytorch_fid"], rel=1e-7 if few else 1e-9, abs=1e-12)
    reference = Gaussian.of(second)
    assert frechet_distance(first, reference) == expected
    distance, influence = frechet_influence(first, reference)
    assert distance == expected
    assert influence.isfinite().all()


def test_the_influence_gives_the_error_of_a_distance_and_of_a_paired_difference():
    """Against the spread over samples that are drawn anew."""
    d, n, draws = 12, 400, 100
    reference = Gaussian.of(features(20_000, d, 1, mean=0.2))
    found = []
    for seed in range(draws):
        first = features(n, d, 100 + seed)
        second = 1.1 * first + 0.2 * features(n, d, 1000 + seed)
        (a, of_a), (b, of_b) = (frechet_influence(x, reference) for x in (first, second))
        found.append([a, b - a, float(of_a.std()) / n**0.5, float((of_b - of_a).std()) / n**0.5])
    distances, differences, error, error_of_difference = np.array(found, dtype=float).T
    assert error.mean() == pytest.approx(distances.std(), rel=0.25)
    assert error_of_difference.mean() == pytest.approx(differences.std(), rel=0.25)
    assert error_of_difference.mean() < 0.8 * error.mean() * 2**0.5
