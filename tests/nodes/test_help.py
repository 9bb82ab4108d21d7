"""What helps a person who meets the nodes in a real ComfyUI: search, tooltips, ranges and help pages."""

import copy
import re

import pytest

from maskunet_core.search.settings import PRESETS
from tests.host.server import FOLDER_NAME, Server, ServerError

SECTIONS = ("## Inputs", "## Outputs", "## Cost", "## What it does not combine with")
WORDS = {
    "mask": ("MaskUNetApply", "MaskUNetLoader", "MaskUNetRandomMask", "MaskUNetApplyMasks", "MaskUNetRewardSampler"),
    "quality": ("MaskUNetRewardSampler",),
    "prompt adherence": ("MaskUNetRewardSampler",),
    "improve": ("MaskUNetRewardSampler",),
    "judge": ("MaskUNetJudgeLoader",),
    "geneval": ("MaskUNetJudgeLoader", "MaskUNetCheckPicture"),
    "train": ("MaskUNetTrain",),
    "dreambooth": ("MaskUNetTrain",),
    "compare": ("MaskUNetCompareBatches", "MaskUNetRewardScore"),
    "reward": ("MaskUNetRewardLoader", "MaskUNetRewardCombine", "MaskUNetRewardScore", "MaskUNetRewardSampler"),
}
JPEG = b"\xff\xd8\xff"


def of_this_extension(server: Server) -> dict[str, dict]:
    """The server's nodes that come from here, by id: whoever adds one meets this file's tests."""
    every = server.object_info()
    return {name: info for name, info in every.items() if info["python_module"] == f"custom_nodes.{FOLDER_NAME}"}


@pytest.fixture(scope="module")
def nodes(server):
    return of_this_extension(server)


def inputs_of(info: dict) -> dict[str, list]:
    """(type, options) by name; not the hidden inputs, which the host adds."""
    return {name: entry for group in ("required", "optional") for name, entry in info["input"].get(group, {}).items()}


def missing_in_schema(info: dict) -> list[str]:
    """What a person at the graph would miss in a node's definition."""
    missing = [] if info["category"].startswith("MaskUNet/") else ["category"]
    missing += [] if info["display_name"].startswith("MaskUNet ") else ["display name"]
    missing += [] if len(info["description"]) > 40 else ["description"]
    missing += [] if info["search_aliases"] else ["search aliases"]
    for name, (kind, *options) in inputs_of(info).items():
        options = options[0] if options else {}
        if len(options.get("tooltip") or "") <= 20:
            missing.append(f"tooltip of {name}")
        if kind in ("INT", "FLOAT"):
            missing += [f"{bound} of {name}" for bound in ("min", "max", "step") if options.get(bound) is None]
    tips = info["output_tooltips"] or [None] * len(info["output"])
    return missing + [f"tooltip of output {name}" for name, tip in zip(info["output_name"], tips) if not tip]


def missing_in_page(info: dict, page: str) -> list[str]:
    missing = [] if page.startswith(f"# {info['display_name']}\n") else ["title"]
    missing += [section for section in SECTIONS if f"\n{section}\n" not in page]
    missing += [f"input {name}" for name in inputs_of(info) if f"`{name}`" not in page]
    return missing + ([] if pictures_of(page) else ["picture"])


def pictures_of(page: str) -> list[str]:
    return re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)


def page_of(server: Server, node: str) -> str:
    """As the side panel of the front end asks for it."""
    return server.read(f"/extensions/{FOLDER_NAME}/docs/{node}.md").decode()


def test_every_node_explains_itself(nodes):
    assert len(nodes) >= 11
    assert {name: missing for name, info in nodes.items() if (missing := missing_in_schema(info))} == {}


def test_every_node_has_a_help_page_that_names_all_its_inputs(server, nodes):
    pages = {name: page_of(server, name) for name in nodes}
    assert {name: missing for name, page in pages.items() if (missing := missing_in_page(nodes[name], page))} == {}


def test_the_pictures_of_the_help_pages_are_small_and_served(server, nodes):
    pictures = {picture for name in nodes for picture in pictures_of(page_of(server, name))}
    assert pictures
    for picture in pictures:
        content = server.read(f"/extensions/{FOLDER_NAME}/docs/{picture}")
        assert content.startswith(JPEG), picture
        assert len(content) <= 60_000, picture


@pytest.mark.parametrize("word", WORDS)
def test_nodes_are_found_by_what_people_type(nodes, word):
    found = {
        name
        for name, info in nodes.items()
        if any(word in text.lower() for text in (info["display_name"], *info["search_aliases"]))
    }
    assert set(WORDS[word]) <= found
    if word in ("quality", "prompt adherence", "improve"):
        # What needs a file that people do not have would come first by its name.
        assert found == set(WORDS[word])


def test_settings_that_a_preset_fixes_are_folded(nodes):
    folded = {name for name, (_, *rest) in inputs_of(nodes["MaskUNetRewardSampler"]).items() if rest[0].get("advanced")}
    assert {"iterations", "lr", "optimiser", "momentum", "patience", "views", "latent_lr"} <= folded
    assert not folded & {"steps", "cfg", "prompt", "preset", "candidates", "masks"}


def test_settings_of_custom_are_shown_with_that_choice_alone(nodes):
    inputs = inputs_of(nodes["MaskUNetRewardSampler"])
    shown_with = {
        name: rest[0]["shown_with"] for name, (_, *rest) in inputs.items() if rest and "shown_with" in rest[0]
    }
    assert {"iterations", "optimiser", "noise", "branches", "candidate_percent"} <= set(shown_with)
    assert not set(shown_with) & {"target", "seconds", "targets", "stop_by_watch"}
    assert all(condition == {"preset": "custom"} for condition in shown_with.values())
    assert "custom" in inputs["preset"][1]["options"]


def test_presets_stand_in_the_order_of_use_each_with_its_price(nodes):
    options = inputs_of(nodes["MaskUNetRewardSampler"])["preset"][1]
    assert options["options"] == ["fast", "quality", "few_step", "custom", "paper", "reference"]
    lines = dict(line.split(": ", 1) for line in options["tooltip"].splitlines())
    assert list(lines) == options["options"]
    for preset in ("fast", "quality", "few_step"):
        assert f"the best of {PRESETS[preset].candidates}" in lines[preset]
        assert "images" in lines[preset]


@pytest.mark.parametrize("node", ["MaskUNetApply", "MaskUNetRandomMask"])
def test_the_seed_of_masks_stays_from_run_to_run(nodes, node):
    """Else each run would sample anew though nothing was changed."""
    assert inputs_of(nodes[node])["seed"][1]["control_after_generate"] == "fixed"


def without(path: tuple, info: dict) -> dict:
    """A copy of a node's definition that lacks the entry at `path`."""
    changed = copy.deepcopy(info)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = type(place[path[-1]])() if isinstance(place[path[-1]], str | list) else None
    return changed


SETTING, WATCH = ("input", "required", "steps", 1), ("input", "optional", "watch", 1)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("category",), "category"),
        (("display_name",), "display name"),
        (("description",), "description"),
        (("search_aliases",), "search aliases"),
        ((*SETTING, "tooltip"), "tooltip of steps"),
        ((*SETTING, "min"), "min of steps"),
        ((*SETTING, "max"), "max of steps"),
        ((*SETTING, "step"), "step of steps"),
        ((*WATCH, "tooltip"), "tooltip of watch"),
        (("output_tooltips",), "tooltip of output LATENT"),
    ],
)
def test_what_a_definition_lacks_is_noticed(nodes, path, named):
    assert named in missing_in_schema(without(path, nodes["MaskUNetRewardSampler"]))


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("# MaskUNet Reward Sampler\n", "title"),
        ("\n## Cost\n", "## Cost"),
        ("`latent_lr`", "input latent_lr"),
        ("](pictures/", "picture"),
    ],
)
def test_what_a_help_page_lacks_is_noticed(server, nodes, lost, named):
    page = page_of(server, "MaskUNetRewardSampler")
    assert lost in page
    assert named in missing_in_page(nodes["MaskUNetRewardSampler"], page.replace(lost, ""))


def test_a_page_that_is_not_there_is_noticed(server):
    with pytest.raises(ServerError, match="404"):
        page_of(server, "MaskUNetNoSuchNode")
