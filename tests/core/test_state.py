"""What other nodes remember from call to call is put back after calls that are not the sampler's own."""

import functools

import torch

from maskunet_core.seam.state import CallState


class Average:
    def __init__(self):
        self.value, self.seen = None, []

    def __call__(self, arguments):
        self.value = arguments if self.value is None else 0.5 * self.value + arguments
        self.seen.append(float(arguments))
        return self.value


def remembering(average):
    calls, last = {"count": 0}, None

    def guide(arguments):
        nonlocal last
        calls["count"] += 1
        last = arguments if last is None else last + arguments
        return calls["count"], float(last), float(average(arguments)), float(torch.rand(()))

    return guide


def options():
    average = Average()
    guide = remembering(average)
    cache = Average()
    return {
        "sampler_pre_cfg_function": [guide, functools.partial(cache)],
        "transformer_options": {"cache": cache, "wrappers": {"kind": {"key": [average.__call__]}}},
    }, guide


def test_calls_in_between_leave_nothing_behind():
    made, guide = options()
    torch.manual_seed(0)
    guide(torch.tensor(1.0))
    state = CallState(made, torch.device("cpu"))
    first = guide(torch.tensor(2.0))
    made["transformer_options"]["cache"](torch.tensor(5.0))
    guide(torch.tensor(3.0))
    state.restore()
    assert made["transformer_options"]["cache"].value is None
    assert made["transformer_options"]["cache"].seen == []
    assert guide(torch.tensor(2.0)) == first
    state.restore()
    assert guide(torch.tensor(2.0)) == first


def test_a_variable_without_a_value_yet_is_no_obstacle():
    def function():
        return later

    state = CallState({"sampler_cfg_function": function}, torch.device("cpu"))
    later = 3
    state.restore()
    assert function() == 3


def test_models_and_what_serves_more_than_one_run_are_left_alone():
    layer, lasting = torch.nn.Linear(1, 1), Average()
    lasting.model_options = {}
    state = CallState({"a": lambda: (layer, lasting, torch, Average)}, torch.device("cpu"))
    layer.mark, lasting.value = 1, 2
    state.restore()
    assert (layer.mark, lasting.value) == (1, 2)
