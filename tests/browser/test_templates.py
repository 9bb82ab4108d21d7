"""Every graph that ships, from the template browser to the picture and back: on one desk, graph after graph, each is
opened, looked at, run, saved and opened again."""

from typing import NamedTuple

import pytest
from PIL import Image

from tests.browser.conftest import declared_models
from tests.browser.desk import POLLING, Desk
from tests.browser.layout import clipped, misplaced
from tests.host.graph import TEMPLATES, load_workflow, template_file

SHIPPED = sorted(TEMPLATES, key=lambda name: (bool(declared_models(name)), name))
COMPLETE = [name for name in SHIPPED if not declared_models(name)]
"""Graphs that run without a download: the first of those that ship."""

to_be_run = pytest.mark.parametrize("opened", COMPLETE, indirect=True, scope="module")

SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
SAMPLERS += ("MaskUNetRewardSampler", "MaskUNetVideoSampler")


class Opened(NamedTuple):
    name: str
    desk: Desk
    readable: bool


class Run(NamedTuple):
    name: str
    desk: Desk
    queued: dict
    seen: dict


@pytest.fixture(scope="module")
def somebody_else(new_desk):
    """A front end that knows of the others' graphs only what they saved."""
    with new_desk() as desk:
        yield desk


@pytest.fixture(scope="module")
def ones_desk(new_desk):
    """Where all graphs are opened from the templates, and run."""
    with new_desk() as desk:
        yield desk


@pytest.fixture(scope="module", params=SHIPPED)
def opened(request, ones_desk):
    ones_desk.mistakes.clear()
    ones_desk.open_template(request.param)
    readable = ones_desk.readable()
    ones_desk.screenshot(f"{request.param}_opened")
    return Opened(request.param, ones_desk, readable)


@pytest.fixture(scope="module")
def run(opened):
    """The graph after a press of Run."""
    name, desk, _ = opened
    desk.show_all()
    queued = desk.graph()
    desk.press_run()
    desk.page.wait_for_function(
        "() => seen.ended.length || Object.values(seen.progress).some(part => part > 0.3)", polling=POLLING
    )
    desk.screenshot(f"{name}_running")
    assert desk.wait_for_end() == "success"
    desk.wait_for_pictures()
    desk.screenshot(f"{name}_done")
    return Run(name, desk, queued, desk.seen())


def test_the_browser_of_templates_lists_just_what_ships(desk):
    desk.browse_templates()
    cards = desk.page.locator("[data-testid^=template-workflow-]")
    desk.screenshot("templates")
    listed = [card.get_attribute("data-testid").removeprefix("template-workflow-") for card in cards.all()]
    assert sorted(listed) == sorted(TEMPLATES.values())
    for thumbnail in (template_file(name, ".jpg") for name in SHIPPED):
        card = desk.page.get_by_test_id(f"template-workflow-{thumbnail.stem}")
        card.scroll_into_view_if_needed()
        picture = card.locator("img").first
        shown = picture.evaluate("picture => picture.decode().then(() => picture.naturalWidth)")
        assert shown == Image.open(thumbnail).width, thumbnail.name


def test_it_opens_whole(opened):
    name, desk, _ = opened
    shown = {(node["id"], node["type"], node["title"]) for node in desk.graph()["nodes"]}
    assert shown == {(node["id"], node["type"], node["title"]) for node in load_workflow(name)["nodes"]}
    assert desk.unknown_nodes() == []
    assert desk.complaint() is None
    assert desk.mistakes == []


def test_it_can_be_read_as_it_opens(opened):
    """Of a large graph the front end shows all, and then no texts."""
    assert opened.readable


def test_nothing_lies_over_anything_else(opened):
    assert misplaced(opened.desk) == []


def test_nothing_is_clipped(opened):
    assert clipped(opened.desk) == []


@pytest.fixture(scope="module")
def newer_desk(new_desk):
    """A front end that draws nodes as elements of the page ("Nodes 2.0")."""
    setting = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    with new_desk() as desk:
        desk.page.evaluate(setting, True)
        yield desk
        desk.page.evaluate(setting, False)


@pytest.mark.parametrize("name", SHIPPED)
def test_it_can_be_read_in_the_newer_way_of_drawing_too(newer_desk, name):
    newer_desk.open_template(name)
    newer_desk.screenshot(f"{name}_opened_newer")
    assert newer_desk.readable()
    assert newer_desk.grown() == []
    assert misplaced(newer_desk) == []


CHECK = {
    "nodes": [
        {
            "id": 1,
            "type": "EmptyImage",
            "pos": [0, 0],
            "widgets_values": [64, 64, 2, 8421504],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
        },
        {
            "id": 2,
            "type": "MaskUNetJudgeLoader",
            "pos": [0, 300],
            "widgets_values": ["toy judge (bundled)"],
            "outputs": [{"name": "MASKUNET_JUDGE", "type": "MASKUNET_JUDGE", "links": [2]}],
        },
        {
            "id": 3,
            "type": "MaskUNetCheckPicture",
            "pos": [400, 0],
            "size": [300, 300],
            "widgets_values": ["a red ring"],
            "inputs": [
                {"name": "images", "type": "IMAGE", "link": 1},
                {"name": "judge", "type": "MASKUNET_JUDGE", "link": 2},
            ],
            "outputs": [
                {"name": "scores", "type": "FLOAT", "links": []},
                {"name": "IMAGE", "type": "IMAGE", "links": [3]},
            ],
        },
        {
            "id": 4,
            "type": "PreviewImage",
            "pos": [800, 0],
            "inputs": [{"name": "images", "type": "IMAGE", "link": 3}],
        },
    ],
    "links": [[1, 1, 0, 3, 0, "IMAGE"], [2, 2, 0, 3, 1, "MASKUNET_JUDGE"], [3, 3, 1, 4, 0, "IMAGE"]],
    "version": 0.4,
}
"""Two grey pictures, checked by the toy judge."""


def test_verdicts_stand_on_the_node_in_the_newer_way_of_drawing_too(newer_desk):
    newer_desk.sent(CHECK)
    newer_desk.press_run()
    assert newer_desk.wait_for_end() == "success"
    newer_desk.page.get_by_text("0 of 2 right").wait_for()
    newer_desk.screenshot("check_newer")


@to_be_run
def test_it_runs_and_shows_how_far_it_is(run):
    samplers = {node["title"] for node in run.queued["nodes"] if node["type"] in SAMPLERS}
    cached = {node["title"] for node in run.queued["nodes"] if str(node["id"]) in run.seen["cached"]}
    assert samplers
    assert samplers - cached <= set(run.seen["progress"])
    assert run.desk.complaint() is None
    assert run.desk.mistakes == []


@to_be_run
def test_its_pictures_appear(run):
    shown = run.desk.pictures()
    assert shown
    for title, pictures in shown.items():
        assert pictures, title
        pixels = run.desk.pixels(title)
        assert [picture["width"] for picture in pictures] == [pixels.shape[2]] * len(pixels), title
        assert (pixels.std(axis=(1, 2, 3)) > 5).all(), f"{title} shows an even surface"


@to_be_run
def test_nodes_tell_what_they_found_and_where_they_saved_it(run):
    said = {"MaskUNetRewardSampler": "reward ", "MaskUNetSaveMasks": "Saved as masks/"}
    said["MaskUNetCheckPicture"], said["MaskUNetCompareBatches"] = " of 8 right", "difference "
    said["MaskUNetTrain"] = "Saved as "
    said["MaskUNetPromptWords"] = "red > circle; small, blue > square"
    # What the server has kept from the template before is not run again, and says nothing.
    ran = [node for node in run.queued["nodes"] if str(node["id"]) not in run.seen["cached"]]
    telling = {node["title"]: said[node["type"]] for node in ran if node["type"] in said}
    told = run.desk.told()
    assert set(told) == set(telling)
    for title, text in telling.items():
        assert text in told[title]


@to_be_run
def test_nothing_lies_over_anything_else_after_a_run(run):
    """Nodes grow when they show previews and pictures."""
    assert misplaced(run.desk) == []


def without_sizes_of_videos(graph):
    """The front end gives a Save Video, whose codec brings settings of its own, another height when it opens it."""
    nodes = [
        {key: value for key, value in node.items() if (node["type"], key) != ("SaveVideo", "size")}
        for node in graph["nodes"]
    ]
    return graph | {"nodes": nodes}


@to_be_run
def test_saving_and_opening_it_again_gives_the_same_graph(run, somebody_else):
    kept = run.desk.graph()
    run.desk.save_as(f"{run.name} of mine")
    somebody_else.open_saved(f"{run.name} of mine")
    assert without_sizes_of_videos(somebody_else.graph()) == without_sizes_of_videos(kept)


@to_be_run
def test_a_picture_that_it_saved_opens_as_the_graph_that_was_queued(run, somebody_else):
    files = [picture["file"] for pictures in run.desk.pictures().values() for picture in pictures]
    for file in (files[0], files[-1]):
        somebody_else.open_file(run.desk.server.base / file)
        assert somebody_else.graph() == run.queued
    assert somebody_else.mistakes == []
