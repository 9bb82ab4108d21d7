"""The graphs for transformers in a real server, with the toy transformer for the files that they ask for."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.host.graph import load_workflow, nodes_of, titled, to_prompt
from tests.nodes.reward_graphs import node

OF_THE_TOY = {"UNETLoader": 0, "CLIPLoader": 1, "VAELoader": 2}
"""Outputs of MaskUNet Toy Model that stand for the loaders."""


def with_the_toy(prompt):
    """The graph, small, with the toy's parts for files, and the seed that a search chose as text."""
    loaders = {key: OF_THE_TOY[each["class_type"]] for key, each in prompt.items() if each["class_type"] in OF_THE_TOY}
    small = {"width": 64, "height": 64, "reward_name": "toy reward (bundled)"}
    small |= {"text": "a red circle and a blue square", "prompt": "a red circle and a blue square"}
    graph = {key: each for key, each in prompt.items() if key not in loaders} | {
        "toy": node("MaskUNetToyModel", body="transformer")
    }
    for each in graph.values():
        inputs = each["inputs"]
        inputs |= {name: value for name, value in small.items() if name in inputs}
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in loaders:
                inputs[name] = ["toy", loaders[value[0]]]
    samplers = nodes_of(graph, "MaskUNetRewardSampler") + nodes_of(graph, "MaskUNetRewardSamplerCustom")
    return graph | ({"told": node("PreviewAny", source=[samplers[0], 4])} if samplers else {})


def drawn(server, graph):
    """The first picture by the title of the node that saves or shows it, and the chosen seed."""
    found = {}
    for key, output in server.run(graph).items():
        if "images" in output:
            content = io.BytesIO(server.view(output["images"][0]))
            found[graph[key]["_meta"]["title"]] = np.asarray(Image.open(content).convert("RGB"))
        elif key == "told":
            found["seed"] = int(output["text"][0].strip("[]"))
    return found


@pytest.mark.parametrize(
    ("name", "seeded", "seed"),
    [("z_image_best_of_6", "Best of 6", "seed"), ("flux_best_of_6", "Starting noise", "noise_seed")],
)
def test_the_best_of_six_is_what_its_seed_draws(server, name, seeded, seed):
    graph = with_the_toy(to_prompt(load_workflow(name), server.object_info()))
    found = drawn(server, graph)
    assert found["seed"] in range(6)
    assert found["Candidates"].shape[1] > 300
    assert found["Save the best"].std() > 5
    titled(graph, "Best of 6")["candidates"] = 1
    titled(graph, seeded)[seed] = found["seed"]
    alone = drawn(server, graph)
    assert alone["seed"] == found["seed"]
    assert np.array_equal(alone["Save the best"], found["Save the best"])
    assert alone["Candidates"].shape != found["Candidates"].shape


@pytest.mark.parametrize(
    ("name", "shares"), [("random_masks_on_a_transformer", (98, 95, 90)), ("z_image_random_masks", (99, 98, 95))]
)
def test_each_picture_is_of_its_share_of_the_weights(server, name, shares):
    graph = with_the_toy(to_prompt(load_workflow(name), server.object_info()))
    found = drawn(server, graph)
    plain = found["Save with all weights"].astype(float)
    away = [np.abs(found[f"Save with {share} %"] - plain).mean() for share in shares]
    assert min(away) > 0
    assert away[0] < away[-1]
    for share in shares:
        mask = titled(graph, f"Keep {share} %")
        assert mask["keep_ratio"] == share / 100
        mask["keep_ratio"] = 1.0
    for picture in drawn(server, graph).values():
        assert np.array_equal(picture, plain)
