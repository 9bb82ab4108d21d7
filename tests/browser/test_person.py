"""What a person does with our nodes: takes them away again, finds them, asks what they do, makes a mistake."""

import json
import re
import urllib.error
import urllib.request

import numpy as np
import pytest

from tests.host.server import FOLDER_NAME
from trainer.host import PROJECT

GRAPH, MASKED, APPLY = "generator_off_and_on", "Save with masks", "Apply the masks"


@pytest.fixture(scope="module")
def one_desk(new_desk):
    """For all tests of this file that leave it as others can use it."""
    with new_desk() as desk:
        yield desk


@pytest.fixture(scope="module")
def empty_canvas(one_desk):
    one_desk.start_blank()
    return one_desk


def draw(desk) -> np.ndarray:
    """The pictures of the masked half, sampled anew: the toy's text encoder does not see digits."""
    draw.count = getattr(draw, "count", 0) + 1
    desk.type_into("Negative prompt", str(draw.count))
    desk.press_run()
    assert desk.wait_for_end() == "success"
    desk.wait_for_pictures()
    assert desk.seen()["progress"], "nothing was sampled"
    return desk.pixels(MASKED)


def test_an_apply_node_that_is_bypassed_or_deleted_gives_the_stock_image_bit_for_bit(one_desk, stock):
    desk = one_desk
    desk.open_template(GRAPH)
    masked = draw(desk)
    assert not np.array_equal(masked, stock)
    desk.select(APPLY)
    desk.page.keyboard.press("Control+b")
    assert np.array_equal(draw(desk), stock)
    desk.screenshot("apply_node_bypassed")
    desk.select(APPLY)
    desk.page.keyboard.press("Control+b")
    assert np.array_equal(draw(desk), masked)
    desk.select(APPLY)
    desk.page.keyboard.press("Delete")
    assert np.array_equal(draw(desk), stock)
    desk.screenshot("apply_node_deleted")
    assert desk.mistakes == []


def test_a_training_that_was_cancelled_goes_on_where_it_was(one_desk):
    desk = one_desk
    desk.open_template("train_on_my_pictures")
    desk.set_values("Train", steps=50)
    desk.press_run()
    desk.page.wait_for_function("() => seen.progress['Train'] > 0.1", timeout=300_000)
    desk.press_cancel()
    assert desk.wait_for_end() == "interrupted"
    (step,) = re.findall(r"^Stopped: step (\d+) of 50 is saved\. The same inputs go on", desk.told()["Train"])
    desk.screenshot("training_cancelled")
    desk.press_run()
    desk.page.wait_for_function("() => seen.progress['Train']")
    assert f"goes on from step {step}" in desk.told()["Train"]
    assert desk.wait_for_end() == "success"
    desk.wait_for_pictures()
    desk.screenshot("training_went_on")
    assert "Saved as " in desk.told()["Train"]
    assert desk.mistakes == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mask", {"MaskUNet Loader", "MaskUNet Apply", "MaskUNet Random Mask", "MaskUNet Apply Masks"}),
        ("quality", {"MaskUNet Reward Sampler"}),
        ("prompt adherence", {"MaskUNet Reward Sampler"}),
        ("reward", {"MaskUNet Reward Sampler", "MaskUNet Reward Loader", "MaskUNet Reward Score"}),
        ("best of n", {"MaskUNet best of 6", "MaskUNet Reward Sampler"}),
        ("aesthetic", {"MaskUNet Reward Loader"}),
        ("count objects", {"MaskUNet Check Picture"}),
        ("significance", {"MaskUNet Compare Batches"}),
    ],
)
def test_the_search_finds_nodes_by_what_they_are_for(empty_canvas, words, expected):
    found = empty_canvas.search(words)
    empty_canvas.screenshot(f"search_{words.replace(' ', '_')}")
    empty_canvas.end_search()
    assert expected <= set(found)
    ours = [name for name in found if name.startswith("MaskUNet ")]
    assert len(expected) > 1 or ours[0] in expected, "what can be used without a file stands first"


def test_settings_of_custom_are_shown_with_that_choice_alone(one_desk):
    desk, name = one_desk, "MaskUNet Reward Sampler"
    desk.start_blank()
    desk.search(name)
    desk.take(name)
    before, height = desk.shown_settings(name), desk.height(name)
    assert {"seed", "prompt", "preset", "target"} <= set(before)
    assert not {"iterations", "candidate_percent"} & set(before)
    desk.choose(name, "preset", "custom")
    assert {"iterations", "candidate_percent"} <= set(desk.shown_settings(name))
    assert desk.height(name) > height + 16 * 20
    desk.choose(name, "preset", "fast")
    assert (desk.shown_settings(name), desk.height(name)) == (before, height)


def test_old_graphs_are_sent_as_before(one_desk):
    """Graphs that were saved with version 0.2.0."""
    file = PROJECT / "tests" / "nodes" / "graphs_of_0_2_0.json"
    for name, graph in json.loads(file.read_text(encoding="utf-8")).items():
        sent = one_desk.sent(graph["workflow"])
        assert sent.keys() == graph["prompt"].keys(), name
        for key, expected in graph["prompt"].items():
            assert sent[key]["class_type"] == expected["class_type"]
            # Settings that joined later have their defaults.
            assert sent[key]["inputs"] | expected["inputs"] == sent[key]["inputs"], name


def help_page(desk, node_id: str) -> str | None:
    """The page that the extension ships for a node, if any."""
    try:
        address = f"{desk.server.url}/extensions/{FOLDER_NAME}/docs/{node_id}.md"
        with urllib.request.urlopen(address) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError:
        return None


def plain(text: str) -> str:
    """Words alone, without Markdown's marks and line ends."""
    return " ".join(re.sub(r"[*_`#\[\]]", "", text).split())


@pytest.mark.parametrize(
    "name", ["MaskUNet Apply", "MaskUNet Reward Sampler", "MaskUNet Toy Model", "MaskUNet Compare Batches"]
)
def test_the_info_button_opens_the_help_of_a_node(one_desk, name):
    desk = one_desk
    desk.start_blank()
    desk.search(name)
    desk.take(name)
    desk.page.get_by_test_id("info-button").click()
    panel = desk.page.locator(".node-help-content")
    panel.wait_for()
    desk.screenshot(f"help_{name.replace(' ', '_')}")
    shown, info = plain(panel.inner_text()), desk.node_info(name)
    page = help_page(desk, info["name"])
    if page is None:
        assert plain(info["description"]) in shown
    else:
        first = next(line for line in page.splitlines() if line.strip() and not line.startswith(("#", "!")))
        assert plain(first) in shown
    for group in ("required", "optional"):
        for title in info["input"].get(group, {}):
            assert plain(title) in shown


def test_an_error_of_a_node_is_shown_as_its_sentence(desk):
    file = desk.server.base / "models" / "maskunet" / "broken.safetensors"
    file.write_bytes(b"no tensors at all")
    desk.open_template(GRAPH)
    desk.type_into("Negative prompt", "of no other test")  # whose pictures would be remembered with this graph
    desk.press_key_on_canvas("r")  # new files appear in the lists
    desk.choose("Generator", "maskunet_name", "broken.safetensors")
    desk.press_run()
    assert desk.wait_for_end() == "error"
    desk.page.get_by_test_id("error-overlay").wait_for()
    desk.screenshot("error")
    assert "Generator failed" in desk.complaint()
    desk.page.get_by_test_id("error-overlay-see-errors").click()
    panel = desk.page.get_by_test_id("properties-panel")
    panel.get_by_text("Exception Message").wait_for()
    desk.screenshot("error_details")
    told = plain(panel.inner_text())
    assert "Exception Message: MaskUNet.BadCheckpoint: 'broken.safetensors' is not a readable" in told
    assert "It may be truncated or of another kind: copy or download it again." in told
    file.unlink()
