"""The subgraphs that the front end offers to put on the canvas, in a real server."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.host.graph import BLUEPRINTS, SUBGRAPHS, expanded, load_blueprint, load_workflow, nodes_of, titled, to_prompt
from tests.host.server import FOLDER_NAME, Server

BEST_OF_6, OFF_AND_ON, SCORE = BLUEPRINTS
TOY = {"toy": {"class_type": "MaskUNetToyModel", "inputs": {}}}
FROM_TOY = {"model": ["toy", 0], "clip": ["toy", 1], "vae": ["toy", 2]}
SMALL = {"width": 64, "height": 64, "steps": 4}
TOY_REWARD = "toy reward (bundled)"
PROMPT = "a small black ring and an orange star"


@pytest.fixture(scope="module")
def object_info(server):
    return server.object_info()


def pixels(server: Server, images: list[dict]) -> np.ndarray:
    """`[B, H, W, 3]`."""
    return np.stack([np.asarray(Image.open(io.BytesIO(server.view(image))).convert("RGB")) for image in images])


def preview(source: tuple[str, int]) -> dict:
    return {"class_type": "PreviewImage", "inputs": {"images": [*source]}}


def test_the_server_offers_just_what_ships(server):
    listed = server.get("/global_subgraphs").items()
    ours = {key: entry for key, entry in listed if entry["info"]["node_pack"] == f"custom_nodes.{FOLDER_NAME}"}
    assert sorted(entry["name"] for entry in ours.values()) == sorted(BLUEPRINTS)
    assert sorted(path.stem for path in SUBGRAPHS.iterdir()) == sorted(BLUEPRINTS)
    for key, entry in ours.items():
        assert json.loads(server.get(f"/global_subgraphs/{key}")["data"]) == load_blueprint(entry["name"])


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_the_node_outside_shows_what_the_subgraph_takes_and_gives(name):
    blueprint = load_blueprint(name)
    (node,), (subgraph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"]
    assert node["title"] == subgraph["name"] == name
    for side in ("inputs", "outputs"):
        outside, inside = ([(slot["name"], slot["type"]) for slot in part[side]] for part in (node, subgraph))
        assert outside == inside


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_both_ends_of_each_link_know_it(name):
    (subgraph,) = load_blueprint(name)["definitions"]["subgraphs"]
    starts = {entry["id"]: [slot["links"] or [] for slot in entry["outputs"]] for entry in subgraph["nodes"]}
    ends = {entry["id"]: [[slot["link"]] for slot in entry["inputs"]] for entry in subgraph["nodes"]}
    starts[subgraph["inputNode"]["id"]] = [slot["linkIds"] for slot in subgraph["inputs"]]
    ends[subgraph["outputNode"]["id"]] = [slot["linkIds"] for slot in subgraph["outputs"]]
    for link in subgraph["links"]:
        assert link["id"] in starts[link["origin_id"]][link["origin_slot"]]
        assert link["id"] in ends[link["target_id"]][link["target_slot"]]


def test_best_of_6_draws_what_its_template_draws(server, object_info):
    settings = {"prompt": PROMPT, "reward": TOY_REWARD, "seed": 15, "cfg": 5.0}
    inside, outputs = expanded(BEST_OF_6, FROM_TOY | SMALL | settings, object_info)
    drawn = server.run(TOY | inside | {key: preview(source) for key, source in outputs.items()})

    template = to_prompt(load_workflow("sd15_best_of_6"), object_info)
    titled(template, "ImageReward")["reward_name"] = TOY_REWARD
    titled(template, "Prompt")["text"] = PROMPT
    titled(template, "1 512x512 picture").update(width=64, height=64)
    titled(template, "Best of 6").update(prompt=PROMPT, seed=15, steps=4, cfg=5.0)
    loader = next(node for node in template.values() if node["class_type"] == "CheckpointLoaderSimple")
    loader.update(class_type="MaskUNetToyModel", inputs={})
    expected = {template[key]["_meta"]["title"]: output["images"] for key, output in server.run(template).items()}

    for name, title in (("best", "Save the best"), ("candidates", "Candidates")):
        pictures = pixels(server, drawn[name]["images"])
        assert pictures.std() > 5
        assert np.array_equal(pictures, pixels(server, expected[title]))


def test_score_my_pictures_tells_which_picture_shows_the_prompt(server, object_info):
    drawn, outputs = expanded(BEST_OF_6, FROM_TOY | SMALL | {"prompt": PROMPT, "reward": TOY_REWARD}, object_info)

    def score(prompt: str) -> tuple[float, np.ndarray]:
        given = {"images": [*outputs["best"]], "prompt": prompt, "reward": TOY_REWARD}
        inside, told = expanded(SCORE, given, object_info)
        shown = {"table": {"class_type": "PreviewAny", "inputs": {"source": [*told["table"]]}}}
        shown["pictures"] = preview(told["pictures with scores"])
        output = server.run(TOY | drawn | inside | shown)
        table = json.loads(output["table"]["text"][0])
        assert table["prompt"] == prompt
        return table["scores"][0], pixels(server, output["pictures"]["images"])

    right, captioned = score(PROMPT)
    assert captioned.shape[1] > SMALL["height"], "scores are written under the picture"
    assert right > score("a large white square and a purple cross")[0]


def test_masks_off_and_on_draws_what_its_template_draws(server, object_info):
    settings = {"prompt": PROMPT, "cfg": 1.0}
    inside, _ = expanded(OFF_AND_ON, FROM_TOY | SMALL | settings, object_info)
    # What the front end's slider sends for itself.
    inside[nodes_of(inside, "ImageCompare")[0]]["inputs"]["compare_view"] = ""
    (compared,) = server.run(TOY | inside).values()
    off, on = (pixels(server, compared[f"{side}_images"]) for side in "ab")

    template = to_prompt(load_workflow("generator_off_and_on"), object_info)
    titled(template, "What to draw")["value"] = PROMPT
    titled(template, "Eight 64x64 pictures")["batch_size"] = 1
    for which in ("without", "with"):
        titled(template, f"Sample {which} masks")["steps"] = 4
        titled(template, f"Enlarge {which} masks").update(width=64, height=64)
    saved = {template[key]["_meta"]["title"]: output["images"] for key, output in server.run(template).items()}
    assert np.array_equal(off, pixels(server, saved["Save without masks"]))
    assert np.array_equal(on, pixels(server, saved["Save with masks"]))
    assert not np.array_equal(off, on)
