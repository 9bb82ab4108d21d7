import itertools

import pytest

from tests.host.graph import BYPASSED, MUTED, WORKFLOWS, load_workflow, nodes_of, titled, to_prompt

INFO = {
    "Loader": {"input": {"required": {"name": [["a", "b"], {}]}}, "input_order": {"required": ["name"]}},
    "Patch": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"control_after_generate": True}],
                "on": ["BOOLEAN", {}],
            }
        },
        "input_order": {"required": ["model", "seed", "on"]},
    },
    "Sampler": {
        "input": {"required": {"model": ["MODEL", {}], "cfg": ["FLOAT", {}]}, "optional": {"name": ["COMBO", {}]}},
        "input_order": {"required": ["model", "cfg"], "optional": ["name"]},
    },
}


def workflow(patch_mode=0):
    def node(identity, kind, widgets, inputs=(), mode=0):
        entries = [{"name": name, "type": "MODEL", "link": link} for name, link in inputs]
        outputs = [{"name": "MODEL", "type": "MODEL"}]
        return {
            "id": identity,
            "type": kind,
            "title": f"the {kind.lower()}",
            "mode": mode,
            "inputs": entries,
            "outputs": outputs,
            "widgets_values": widgets,
        }

    return {
        "nodes": [
            node(1, "Loader", ["b"]),
            node(2, "Patch", [7, "fixed", True], [("model", 1)], patch_mode),
            node(3, "Reroute", None, [("", 2)]),
            node(4, "Sampler", [5.5, "euler"], [("model", 3)]),
            node(5, "MarkdownNote", ["text"]),
        ],
        "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"], [3, 3, 0, 4, 0, "MODEL"]],
    }


def test_widgets_and_links_become_inputs():
    prompt = to_prompt(workflow(), INFO)
    assert {key: node["inputs"] for key, node in prompt.items()} == {
        "1": {"name": "b"},
        "2": {"model": ["1", 0], "seed": 7, "on": True},
        "4": {"model": ["2", 0], "cfg": 5.5, "name": "euler"},
    }
    assert nodes_of(prompt, "Sampler") == ["4"]
    assert titled(prompt, "the patch")["seed"] == 7


def test_a_bypassed_node_passes_its_input_on():
    assert to_prompt(workflow(BYPASSED), INFO)["4"]["inputs"]["model"] == ["1", 0]


def test_a_muted_node_is_left_out():
    prompt = to_prompt(workflow(MUTED), INFO)
    assert "2" not in prompt
    assert "model" not in prompt["4"]["inputs"]


SHIPPED = sorted(path.stem for path in WORKFLOWS.glob("*.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_graphs_are_in_the_format_that_people_open(name):
    shipped = load_workflow(name)
    assert shipped["version"] == 0.4
    assert {"nodes", "links", "groups"} <= set(shipped)


def overlap(one, other):
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_graphs_have_no_overlapping_nodes_or_groups(name):
    shipped, bar = load_workflow(name), 30
    nodes = {n["title"]: (n["pos"][0], n["pos"][1] - bar, n["size"][0], n["size"][1] + bar) for n in shipped["nodes"]}
    groups = {group["title"]: group["bounding"] for group in shipped["groups"]}
    assert len(nodes) == len(shipped["nodes"]), "titles tell nodes apart"
    for boxes in (nodes, groups):
        for one, other in itertools.combinations(boxes, 2):
            assert not overlap(boxes[one], boxes[other]), (one, other)
