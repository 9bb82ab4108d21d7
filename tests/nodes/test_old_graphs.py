"""Graphs that people saved with version 0.2.0: the templates of then, as they are opened and as they are sent."""

import json
from pathlib import Path

import pytest

from tests.host.graph import to_prompt

GRAPHS = json.loads(Path(__file__).with_name("graphs_of_0_2_0.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def info(server):
    return server.object_info()


def without_titles(prompt: dict) -> dict:
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}


@pytest.mark.parametrize("name", GRAPHS)
def test_an_old_graph_still_means_the_same(info, name):
    """Widgets are saved by their place alone, and links by the number of an output."""
    workflow, prompt = GRAPHS[name]["workflow"], GRAPHS[name]["prompt"]
    assert without_titles(to_prompt(workflow, info)) == without_titles(prompt)
    nodes = {node["id"]: node["type"] for node in workflow["nodes"]}
    for _, source, slot, _, _, kind in workflow["links"]:
        assert kind in (info[nodes[source]]["output"][slot], "*")


@pytest.mark.parametrize("name", GRAPHS)
def test_what_an_old_graph_sends_has_the_names_and_choices_of_now(info, name):
    for node in GRAPHS[name]["prompt"].values():
        known = info[node["class_type"]]["input"]
        every = known.get("required", {}) | known.get("optional", {})
        assert set(node["inputs"]) <= set(every)
        assert set(known.get("required", {})) <= set(node["inputs"])
        if not node["class_type"].startswith("MaskUNet"):
            continue
        for input_name, value in node["inputs"].items():
            kind, *rest = every[input_name]
            if kind == "COMBO" and not str(value).endswith((".safetensors", ".pt")):
                assert value in rest[0]["options"]
