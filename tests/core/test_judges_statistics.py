"""How sure a benchmark's numbers are."""

import pytest
import torch

from maskunet_core.judges import statistics


def test_the_unit_is_the_prompt():
    """Ten equal pictures of a prompt are as sure as one."""
    values = torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0]])
    once, ten = (statistics.estimate(statistics.of_prompts(x)) for x in (values, values.repeat(1, 10)))
    assert (once.mean, once.error) == pytest.approx((0.6, 0.24495), abs=1e-5)
    assert ten == once
    assert once.interval == pytest.approx((-0.08, 1.28), abs=1e-2)


def test_a_prompt_that_was_not_judged_is_left_out():
    values = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [0.0, 1.0]])
    assert statistics.estimate(statistics.of_prompts(values)) == statistics.Estimate(0.75, 0.25, 2)


def test_tasks_count_alike_whatever_their_sizes():
    values = torch.tensor([1.0, 1.0, 1.0, 0.0])
    tasks = [torch.tensor([True, True, True, False]), torch.tensor([False, False, False, True])]
    assert statistics.mean_of_tasks(values, tasks).mean == 0.5


def test_the_permutation_test_is_exact_where_all_flips_can_be_counted():
    differences = torch.tensor([1.0, 2.0, 3.0, 4.0])
    p = statistics.PairedTest(differences, [torch.ones(4, dtype=torch.bool)]).p()
    assert p == pytest.approx(2 / 16, abs=0.01)


def test_the_permutation_test_finds_as_many_differences_by_chance_as_it_says():
    stream = torch.Generator().manual_seed(0)
    every = [torch.ones(30, dtype=torch.bool)]
    found = [statistics.PairedTest(torch.randn(30, generator=stream), every).p() < 0.05 for _ in range(200)]
    assert 0.01 < sum(found) / len(found) < 0.1


@pytest.mark.parametrize("right", [[1] * 5 + [0] * 3, [1] * 6 + [0] * 3, [1] * 12 + [-1] * 4, [1] * 14 + [-1] * 4])
def test_an_interval_leaves_0_out_just_where_the_test_tells_a_difference(right):
    """Of pictures that are right or wrong Student's interval would leave 0 out of the first, and end above 1."""
    test = statistics.PairedTest(torch.tensor(right, dtype=torch.float64), [torch.ones(len(right), dtype=torch.bool)])
    low, high = test.interval
    assert (low > 1e-6) == (test.p() < 0.05)
    assert low < sum(right) / len(right) < high <= 1.0 + 1e-6


def test_of_many_numbers_the_interval_is_students():
    differences = torch.randn(200, generator=torch.Generator().manual_seed(1)) + 0.2
    tasks = [torch.arange(200) < 80, torch.arange(200) >= 80]
    ends = statistics.PairedTest(differences, tasks).interval
    assert ends == pytest.approx(statistics.mean_of_tasks(differences, tasks).interval, abs=0.02)


def test_too_few_differences_have_no_interval():
    for differences in ([1.0, 0.5, 0.2, 0.4, 0.9], [0.0] * 4, [torch.nan] * 3):
        test = statistics.PairedTest(torch.tensor(differences), [torch.ones(len(differences), dtype=torch.bool)])
        assert test.interval == (-torch.inf, torch.inf)
        assert statistics.from_to(test.interval) == "not known"
        assert test.p() > 0.05


def test_what_is_all_the_same_differs_by_nothing_for_sure():
    test = statistics.PairedTest(torch.zeros(9), [torch.ones(9, dtype=torch.bool)])
    assert statistics.from_to(test.interval) == "+0.000 to +0.000"
    assert test.p() == 1.0


def test_several_questions_at_once_are_answered_more_carefully():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_difference_is_told_in_words():
    surely, hardly = statistics.Estimate(0.3, 0.05, 100), statistics.Estimate(0.05, 0.05, 100)
    assert statistics.in_words(surely, 0.001) == "higher"
    assert statistics.in_words(hardly, 0.3) == "cannot be told apart at this size (shown would be 0.140)"
    few = statistics.Estimate(0.625, 0.183, 8)
    assert statistics.in_words(few, 0.06) == "cannot be told apart at this size"


def test_diversity_is_the_mean_distance_between_two_pictures_of_a_prompt():
    """By the two prompts: three pictures 3, 4 and 5 apart; three that are the same."""
    features = torch.tensor([[[0.0, 0.0], [7.0, 7.0]], [[3.0, 0.0], [7.0, 7.0]], [[0.0, 4.0], [7.0, 7.0]]])
    assert statistics.diversity(features).tolist() == [4.0, 0.0]
