"""MaskUNet Reward Sampler in a real ComfyUI server: progress, budgets, errors, and the model after them."""

import struct
import threading

import pytest
import torch

from tests.host.server import ExecutionError, ServerError
from tests.nodes.reward_graphs import FEW_UPDATES, Graph, Result, node

TEXT, PREVIEWS = 3, (1, 4)
"""Kinds of the web socket's binary messages."""


def binary(data: dict) -> tuple[int, bytes]:
    content = data["bytes"]
    return struct.unpack(">I", content[:4])[0], content[4:]


def followed(server, graph, name):
    """(result, progress [(value, max)], texts, number of previews) of a run."""
    progress, texts, previews = [], [], []

    def follow(kind, data):
        if kind == "progress" and data["node"] == name:
            progress.append((data["value"], data["max"]))
        elif kind == "preview":
            what, content = binary(data)
            if what == TEXT:
                (length,) = struct.unpack(">I", content[:4])
                texts.append((content[4 : 4 + length].decode(), content[4 + length :].decode()))
            elif what in PREVIEWS:
                previews.append(content)

    result = Result(server, graph, follow)
    return result, progress, [text for node_id, text in texts if node_id == name], len(previews)


def plain_latents(server) -> torch.Tensor:
    graph = Graph()
    graph.plain("plain")
    return Result(server, graph).latents("plain")


@pytest.mark.parametrize("sampler", ["euler", "dpm_2"])
def test_progress_covers_candidates_steps_and_updates(server, sampler):
    graph = Graph()
    graph.rewarded("rewarded", **FEW_UPDATES | {"candidates": 2, "sampler_name": sampler})
    _, progress, texts, previews = followed(server, graph, "rewarded")
    values = [value for value, _ in progress]
    assert values == sorted(values)
    candidates, steps, updates = 2 * 4, 4, 3 * 3
    assert {total for _, total in progress} == {candidates + steps + updates}
    assert values[-1] == candidates + steps + updates
    assert set(range(1, candidates + 1)) <= set(values)
    assert previews >= candidates + steps + updates
    assert texts[0].startswith("candidate 1 of 2: reward -")
    assert any(text.startswith("step 3 of 4, update 2: reward -") for text in texts)
    assert texts[-1].startswith("reward -")
    assert texts[-1].rsplit(", ", 1)[1] in ("seed 3", "seed 4")


def test_progress_counts_the_steps_that_the_scheduler_makes(server):
    """Asked for 7 steps, ddim_uniform makes 8."""
    graph = Graph()
    graph.rewarded("rewarded", **FEW_UPDATES | {"steps": 7, "scheduler": "ddim_uniform", "iterations": 1})
    _, progress, _, _ = followed(server, graph, "rewarded")
    steps, updates = 8, 6
    assert progress[-1] == (steps + updates, steps + updates)
    assert progress.count(progress[-1]) == 1


def test_a_time_budget_ends_the_updates(server):
    graph = Graph()
    graph.rewarded("rewarded", **FEW_UPDATES | {"iterations": 200, "steps": 6, "seconds": 1.0})
    _, progress, texts, _ = followed(server, graph, "rewarded")
    assert progress[-1] == (6 + 200 * 4, 6 + 200 * 4)
    looks = [text for text in texts if text.startswith("step ")]
    assert 0 < len(looks) < 200


def test_images_that_are_good_enough_are_left_as_they_are(server):
    graph = Graph()
    graph.plain("plain")
    graph.rewarded("rewarded", **FEW_UPDATES | {"target": -900.0})
    result, _, texts, _ = followed(server, graph, "rewarded")
    assert torch.equal(result.latents("rewarded"), result.latents("plain"))
    assert {text.split(":")[0] for text in texts[:-1]} == {f"step {n} of 4, update 0" for n in (2, 3, 4)}


def test_the_opposite_reward_as_watch_stops_the_updates(server):
    graph = Graph()
    graph["opposite"] = node(
        "MaskUNetRewardCombine", reward_a=["reward", 0], weight_a=-1.0, reward_b=["reward", 0], weight_b=0.0
    )
    graph.rewarded("rewarded", **FEW_UPDATES | {"watch": ["opposite", 0], "stop_by_watch": True, "start_percent": 0.0})
    _, _, texts, _ = followed(server, graph, "rewarded")
    assert {text.split(",")[0] for text in texts[:-1]} == {"step 1 of 4", "step 2 of 4"}


def test_an_interrupt_in_mid_update_leaves_the_model_as_it_was(server):
    before = plain_latents(server)
    graph = Graph()
    graph.rewarded("rewarded", **FEW_UPDATES | {"iterations": 200})
    interrupted = threading.Event()

    def interrupt_at_the_tenth_update(kind, data):
        if kind == "progress" and data["node"] == "rewarded" and data["value"] >= 11 and not interrupted.is_set():
            interrupted.set()
            threading.Thread(target=server.interrupt).start()

    with pytest.raises(ServerError, match="interrupted"):
        Result(server, graph, interrupt_at_the_tenth_update)
    assert interrupted.is_set()
    assert torch.equal(plain_latents(server), before)


@pytest.mark.parametrize("kind", ["error", "memory"])
@pytest.mark.parametrize("after", [0, 4])
def test_a_reward_that_fails_leaves_the_model_as_it_was(server, kind, after):
    before = plain_latents(server)
    graph = Graph()
    graph["faulty"] = node("FaultyReward", reward=["reward", 0], after=after, kind=kind)
    graph.rewarded("rewarded", **FEW_UPDATES | {"reward": ["faulty", 0]})
    with pytest.raises(
        ExecutionError, match="the reward broke" if kind == "error" else "ran out of the device's memory"
    ) as caught:
        Result(server, graph)
    assert caught.value.node_type == "MaskUNetRewardSampler"
    assert torch.equal(plain_latents(server), before)


def test_after_a_search_the_model_is_as_it_was(server):
    before = plain_latents(server)
    graph = Graph()
    graph.rewarded("rewarded")
    Result(server, graph)
    assert torch.equal(plain_latents(server), before)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "a portrait"}, 'The toy reward cannot read the prompt "a portrait"'),
        ({"start_percent": 0.8, "end_percent": 0.3}, r"start_percent \(0\.8\) lies after end_percent \(0\.3\)"),
        ({"stop_by_watch": True}, "stop_by_watch is on, but there is no reward to watch"),
    ],
)
def test_what_cannot_work_is_told_before_sampling(server, changes, sentence):
    graph = Graph()
    graph.rewarded("rewarded", **FEW_UPDATES | changes)
    progress = []
    with pytest.raises(ExecutionError, match=sentence) as caught:
        Result(server, graph, lambda kind, data: progress.append(kind) if kind == "progress" else None)
    assert caught.value.node_type == "MaskUNetRewardSampler"
    assert not progress


def test_the_reward_curve_is_a_picture(server):
    graph = Graph()
    graph.rewarded("rewarded")
    graph["curve"] = node("PreviewImage", images=["rewarded", 2])
    (picture,) = Result(server, graph).outputs["curve"]["images"]
    assert server.view(picture)[:4] == b"\x89PNG"


def test_candidates_after_the_largest_seed_begin_again_at_zero(server):
    graph = Graph()
    graph.rewarded("rewarded", preset="fast", masks=False, seed=(1 << 64) - 1, candidates=2)
    _, _, texts, _ = followed(server, graph, "rewarded")
    assert texts[-1].rsplit(", ", 1)[1] in (f"seed {(1 << 64) - 1}", "seed 0")
