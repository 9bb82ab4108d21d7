import itertools
import re

import pytest
from PIL import Image

from maskunet_core.search.settings import PRESETS
from maskunet_core.toy.model import EMBEDDINGS
from tests.host.graph import (
    BLUEPRINTS,
    BYPASSED,
    MUTED,
    TEMPLATES,
    WORKFLOWS,
    load_blueprint,
    load_workflow,
    nodes_of,
    template_file,
    titled,
    to_prompt,
)
from tests.host.thumbnails import LARGEST, SIZE, THUMBNAILS, compose
from trainer.config_file import tomllib
from trainer.host import PROJECT

INFO = {
    "Loader": {"input": {"required": {"name": [["a", "b"], {}]}}, "input_order": {"required": ["name"]}},
    "Patch": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {}],
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


SHIPPED = list(TEMPLATES)


def test_the_graphs_that_ship_are_those_with_a_title():
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == sorted(TEMPLATES.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_graphs_are_in_the_format_that_people_open(name):
    shipped = load_workflow(name)
    assert shipped["version"] == 0.4
    assert {"nodes", "links", "groups"} <= set(shipped)


def overlap(one, other):
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_graph_can_be_read_where_all_of_it_is_shown(name):
    """Fit View leaves a quarter of a window of 1440 x 900 free, and below 8/14 the front end draws no texts."""
    shipped, bar = load_workflow(name), 30
    boxes = [group["bounding"] for group in shipped["groups"]]
    boxes += [(*node["pos"], *node["size"]) for node in shipped["nodes"]]
    boxes += [(node["pos"][0], node["pos"][1] - bar, 0, 0) for node in shipped["nodes"]]
    for axis, shown in enumerate((1440, 900)):
        size = max(box[axis] + box[axis + 2] for box in boxes) - min(box[axis] for box in boxes)
        assert 0.75 * shown / (size + 20) >= 8 / 14


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_graphs_have_no_overlapping_nodes_or_groups(name):
    shipped, bar = load_workflow(name), 30
    nodes = {n["title"]: (n["pos"][0], n["pos"][1] - bar, n["size"][0], n["size"][1] + bar) for n in shipped["nodes"]}
    groups = {group["title"]: group["bounding"] for group in shipped["groups"]}
    assert len(nodes) == len(shipped["nodes"]), "titles tell nodes apart"
    for boxes in (nodes, groups):
        for one, other in itertools.combinations(boxes, 2):
            assert not overlap(boxes[one], boxes[other]), (one, other)


def crosses(box, group):
    """A box lies neither inside a group nor beside it."""
    inside = all(group[a] <= box[a] and box[a] + box[a + 2] <= group[a] + group[a + 2] for a in (0, 1))
    return overlap(box, group) and not inside


@pytest.mark.parametrize("name", SHIPPED)
def test_no_node_of_a_shipped_graph_lies_on_the_border_of_a_group(name):
    shipped = load_workflow(name)
    for node, group in itertools.product(shipped["nodes"], shipped["groups"]):
        assert not crosses((*node["pos"], *node["size"]), group["bounding"]), (node["title"], group["title"])


LETTER, BADGE = 10.5, (122, 52)
"""A letter of a group's title is at most that wide (font 24); above a node's right corner stands the name of its pack,
that wide, and up to that high above the node."""


@pytest.mark.parametrize("name", SHIPPED)
def test_the_name_of_our_pack_covers_no_title_of_a_group(name):
    shipped = load_workflow(name)
    ours = [node for node in shipped["nodes"] if node["type"].startswith("MaskUNet")]
    for node, group in itertools.product(ours, shipped["groups"]):
        left, top = group["bounding"][:2]
        right, (wide, high) = node["pos"][0] + node["size"][0], BADGE
        badge = (right - wide, node["pos"][1] - high, wide, high)
        title = (left, top, 8 + LETTER * len(group["title"]), 34)
        assert not overlap(badge, title), (node["title"], group["title"])


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_graph_says_what_it_shows_and_which_files_it_needs(name):
    (note,) = [node for node in load_workflow(name)["nodes"] if node["type"] == "MarkdownNote"]
    (text,) = note["widgets_values"]
    assert text.startswith("## ")
    assert "\n\n**Files**" in text


SHIPPED_FILES = {
    "MaskUNetLoader": {path.name for path in (PROJECT / "maskunet_core" / "toy" / "generators").iterdir()},
    "MaskUNetLoadMasks": {path.name for path in (PROJECT / "maskunet_core" / "toy" / "masks").iterdir()},
    "MaskUNetRewardLoader": {"toy reward (bundled)"},
    "MaskUNetJudgeLoader": {"toy judge (bundled)"},
}
FILE_NODES = (*SHIPPED_FILES, "CheckpointLoaderSimple", "LoraLoader", "LoraLoaderModelOnly", "ControlNetLoader")
FILE_NODES += ("UNETLoader", "CLIPLoader", "VAELoader")


@pytest.mark.parametrize("name", SHIPPED)
def test_files_that_do_not_ship_come_with_their_address(name):
    nodes = load_workflow(name)["nodes"]
    (note,) = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
    for node in nodes:
        if node["type"] not in FILE_NODES or node["widgets_values"][0] in SHIPPED_FILES.get(node["type"], ()):
            continue
        file = node["widgets_values"][0]
        assert f"`{file}`" in note or f"[{file}]" in note
        (model,) = node["properties"]["models"]
        assert model["name"] == file
        assert model["url"].startswith("https://")
        assert f"({model['url']})" in note
        assert f"`models/{model['directory']}`" in note


def test_learned_words_in_prompts_ship():
    prompts = " ".join(
        str(node["widgets_values"])
        for name in SHIPPED
        for node in load_workflow(name)["nodes"]
        if node["type"] == "CLIPTextEncode"
    )
    named = set(re.findall(r"embedding:(\w+)", prompts))
    assert named == {path.stem for path in EMBEDDINGS.iterdir()}


def nodes_that_ship() -> dict[str, list[dict]]:
    """By the name of the template or blueprint."""
    inside = {name: load_blueprint(name) for name in BLUEPRINTS}
    found = {name: [*graph["nodes"], *graph["definitions"]["subgraphs"][0]["nodes"]] for name, graph in inside.items()}
    return found | {name: load_workflow(name)["nodes"] for name in SHIPPED}


@pytest.mark.parametrize("name", [*SHIPPED, *BLUEPRINTS])
def test_nodes_of_shipped_graphs_say_which_pack_they_come_from(name):
    """So that the manager can offer what is missing."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for node in nodes_that_ship()[name]:
        properties = node["properties"]
        # The node outside of a blueprint has the subgraph's id for its type.
        if node["type"].startswith("MaskUNet") or node.get("title") in BLUEPRINTS:
            assert (properties["cnr_id"], properties["ver"]) == (project["name"], project["version"])
        else:
            assert properties["cnr_id"] == "comfy-core"


NUMBERS = {
    r"chooses among (\d+) noises|draws (\d+) starting noises|## Best of (\d+)": "fast",
    r"judges (\d+) starting noises|the best of (\d+), then masks": "quality",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_numbers_in_notes_are_those_of_the_presets(name):
    (note,) = [node["widgets_values"][0] for node in load_workflow(name)["nodes"] if node["type"] == "MarkdownNote"]
    told = [(preset, int("".join(found))) for words, preset in NUMBERS.items() for found in re.findall(words, note)]
    quality = {"reward_sampler", "sd15_reward_sampler", "sdxl_reward_sampler", "reward_sampler_and_best_of_n"}
    assert bool(told) == (name in quality or name.endswith("best_of_6"))
    assert [(preset, number) for preset, number in told if number != PRESETS[preset].candidates] == []


def test_every_shipped_graph_has_a_thumbnail_that_can_be_drawn_again():
    assert sorted(THUMBNAILS) == sorted(SHIPPED)
    for name, thumbnail in THUMBNAILS.items():
        titles = {node["title"] for node in load_workflow(thumbnail.runs or name)["nodes"]}
        assert {title for _, title in thumbnail.panels} <= titles


@pytest.mark.parametrize("name", SHIPPED)
def test_thumbnails_are_small(name):
    path = template_file(name, ".jpg")
    assert path.stat().st_size <= LARGEST
    with Image.open(path) as picture:
        assert (picture.format, *picture.size) == ("JPEG", SIZE, SIZE)


def test_a_thumbnail_shows_all_its_pictures_without_overlap():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    pictures = [Image.new("RGB", (64, 64), colour) for colour in colours]
    sheet = compose([("two", pictures[:2]), ("three", pictures[2:])])
    counts = {colour: number for number, colour in sheet.getcolors(sheet.width * sheet.height)}
    areas = [counts.get(colour, 0) for colour in colours]
    assert min(areas) > 100 * 100
    assert areas[0] == areas[1]
    assert areas[2] == areas[3] == areas[4]


def test_a_thumbnail_shows_what_is_compared_in_one_size():
    """Three panels leave the last one a row of its own, where it would otherwise grow."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = compose([(str(colour), [Image.new("RGB", (64, 64), colour)] * 2) for colour in colours])
    counts = {colour: number for number, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert counts[colours[0]] == counts[colours[1]] == counts[colours[2]]
