"""The graphs for SD 1.5 in a real server, with small files of random weights under the names that they ask for."""

import io

import numpy as np
import pytest
from PIL import Image

from maskunet_core.files import checkpoint
from maskunet_core.models.structure import Structure, inspect_model
from tests.builders import make_generator, sd15_unet, tiny_sd15_layout, write_tiny_checkpoint
from tests.host.graph import load_workflow, titled, to_prompt
from tests.host.server import Server, ServerError
from tests.reward_files import write_image_reward

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"


@pytest.fixture(scope="module")
def tiny_structure() -> Structure:
    return inspect_model(sd15_unet(**tiny_sd15_layout()), "decoder attention", "SD 1.5")


@pytest.fixture(scope="module")
def furnished(tiny_structure):
    """A server whose model folders hold what the notes of the graphs ask for."""
    with Server() as server:
        models = server.base / "models"
        for folder in ("checkpoints", "reward"):
            (models / folder).mkdir(exist_ok=True)
        write_tiny_checkpoint(models / "checkpoints" / CHECKPOINT)
        generator = make_generator(tiny_structure, lively=True)
        checkpoint.save(models / "maskunet" / "sd15.safetensors", generator, "decoder attention", {})
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


def test_the_generator_acts(furnished):
    prompt = small(furnished, "sd15_generator_off_and_on")
    found = pictures(furnished, prompt)
    assert found["Save without masks"].shape == (64, 64, 3)
    assert not np.array_equal(found["Save without masks"], found["Save with masks"])
    titled(prompt, "Apply the masks")["strength"] = 0.0
    found = pictures(furnished, prompt)
    assert np.array_equal(found["Save without masks"], found["Save with masks"])


def test_the_search_acts(furnished):
    prompt = small(furnished, "sd15_reward_sampler")
    titled(prompt, "Sample with a search").update(preset="paper")
    found = pictures(furnished, prompt)
    assert found["Save with a search"].shape == (64, 64, 3)
    assert not np.array_equal(found["Save without a search"], found["Save with a search"])
    assert found["Reward curve"].shape[0] > 100


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sd15_generator_off_and_on", f"ckpt_name: '{CHECKPOINT}' not in"),
        ("sd15_generator_off_and_on", "'sd15.safetensors' is not in models/maskunet. Put a generator file there"),
        ("sd15_reward_sampler", "'ImageReward.pt' is not in models/reward. These files can be put there: "),
    ],
)
def test_without_its_files_a_graph_is_refused_with_what_to_do(server, name, sentence):
    with pytest.raises(ServerError, match="The graph was refused") as caught:
        server.run(small(server, name))
    assert sentence in str(caught.value)
