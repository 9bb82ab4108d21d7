"""The graphs for SD 1.5 in a real server, with small files of random weights under the names that they ask for."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.builders import write_tiny_checkpoint
from tests.host.graph import load_workflow, titled, to_prompt
from tests.host.server import Server, ServerError
from tests.reward_files import write_image_reward

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"


@pytest.fixture(scope="module")
def furnished():
    """A server whose model folders hold what the notes of the graphs ask for."""
    with Server() as server:
        models = server.base / "models"
        for folder in ("checkpoints", "reward"):
            (models / folder).mkdir(exist_ok=True)
        write_tiny_checkpoint(models / "checkpoints" / CHECKPOINT)
        write_image_reward(models / "reward" / "ImageReward.pt")
        yield server


def small(server: Server, name: str) -> dict:
    """The graph in API format, with small pictures and two steps."""
    prompt = to_prompt(load_workflow(name), server.object_info())
    for node in prompt.values():
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"].update(width=64, height=64)
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    return prompt


def pictures(server: Server, prompt: dict) -> dict[str, np.ndarray]:
    """The first picture by the title of the node that saves or shows it."""
    found = {}
    for node, output in server.run(prompt).items():
        if "images" in output:
            content = io.BytesIO(server.view(output["images"][0]))
            found[prompt[node]["_meta"]["title"]] = np.asarray(Image.open(content).convert("RGB"))
    return found


def test_random_masks_act(furnished):
    prompt = small(furnished, "sd15_random_masks")
    found = pictures(furnished, prompt)
    assert found["Save with all weights"].shape == (64, 64, 3)
    assert not np.array_equal(found["Save with all weights"], found["Save with 95 %"])
    titled(prompt, "Keep 95 %")["keep_ratio"] = 1.0
    found = pictures(furnished, prompt)
    assert np.array_equal(found["Save with all weights"], found["Save with 95 %"])


def test_the_best_of_six_is_drawn_beside_all_of_them(furnished):
    found = pictures(furnished, small(furnished, "sd15_best_of_6"))
    assert found["Save the best"].shape == (64, 64, 3)
    assert found["Candidates"].shape[1] > 300


@pytest.mark.parametrize("name", ["best_of_6", "reward_sampler", "random_masks"])
def test_the_graphs_for_sdxl_are_those_for_sd15_but_for_file_and_size(furnished, name):
    info = furnished.object_info()
    for_sd15, for_sdxl = (to_prompt(load_workflow(f"{family}_{name}"), info) for family in ("sd15", "sdxl"))
    unlike = {"ckpt_name", "width", "height", "cfg", "filename_prefix"}
    for key, node in for_sd15.items():
        other = for_sdxl[key]
        assert node["class_type"] == other["class_type"]
        assert {k: v for k, v in node["inputs"].items() if k not in unlike} == {
            k: v for k, v in other["inputs"].items() if k not in unlike
        }
    assert for_sd15.keys() == for_sdxl.keys()


def test_the_search_acts(furnished):
    prompt = small(furnished, "sd15_reward_sampler")
    titled(prompt, "Sample with a search").update(preset="paper")
    found = pictures(furnished, prompt)
    assert found["Save with a search"].shape == (64, 64, 3)
    assert not np.array_equal(found["Save without a search"], found["Save with a search"])
    assert found["Reward curve"].shape[0] > 100
    assert found["Candidates"].shape[0] > 100


def test_training_takes_pictures_and_texts_from_a_folder(furnished):
    folder = furnished.base / "input" / "my_pictures"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 90, 120)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of sks plate {number}")
    prompt = small(furnished, "sd15_train_on_my_pictures")
    titled(prompt, "Train").update(resolution=64, held_out=0, pictures=1)
    found = pictures(furnished, prompt)
    assert found["Loss curve"].shape[0] > 100
    assert found["Save before and after"].shape[1] > 2 * 128
    assert (furnished.base / "models" / "maskunet" / "my_subject_00001_.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sd15_random_masks", f"ckpt_name: '{CHECKPOINT}' not in"),
        ("sd15_reward_sampler", "'ImageReward.pt' is not in models/reward. These files can be put there: "),
    ],
)
def test_without_its_files_a_graph_is_refused_with_what_to_do(server, name, sentence):
    with pytest.raises(ServerError, match="The graph was refused") as caught:
        server.run(small(server, name))
    assert sentence in str(caught.value)
