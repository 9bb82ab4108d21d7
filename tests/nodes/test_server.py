"""The extension in a real ComfyUI server, through its own API: what a user of the graph meets."""

import copy
import io
import json
import random
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from maskunet_core.files import checkpoint, mask_file
from maskunet_core.masks.reference import ReferenceGenerator, authors_maps
from maskunet_core.models.structure import inspect_model
from maskunet_core.seam.attach import structure_of
from tests.builders import make_generator, sd15_unet
from tests.damage import missing_tensor, newer_version, no_safetensors, not_finite, truncated
from tests.host.browser import find_browser
from tests.host.graph import TEMPLATES, load_workflow, nodes_of, shows_pictures, titled, to_prompt
from tests.host.server import ExecutionError, Server, ServerError

NODES = (
    "MaskUNetLoader",
    "MaskUNetApply",
    "MaskUNetApplyMasks",
    "MaskUNetSaveMasks",
    "MaskUNetLoadMasks",
    "MaskUNetRecordMasks",
    "MaskUNetMasksOfRun",
    "MaskUNetInspect",
    "MaskUNetRandomMask",
    "MaskUNetRewardSampler",
    "MaskUNetToyModel",
    "MaskUNetRewardLoader",
    "MaskUNetRewardCombine",
    "MaskUNetRewardScore",
    "MaskUNetJudgeLoader",
    "MaskUNetCheckPicture",
    "MaskUNetCompareBatches",
    "MaskUNetPromptWords",
    "MaskUNetAttentionGuidance",
    "MaskUNetAttentionMaps",
    "MaskUNetCrossFrame",
    "MaskUNetVideoSampler",
    "MaskUNetTrain",
)


TOY_WORKFLOWS = sorted(
    name for name in TEMPLATES if any(node["type"] == "MaskUNetToyModel" for node in load_workflow(name)["nodes"])
)
"""Those that need no file which does not ship; test_sd15_workflows and test_transformer_workflows run the others."""


@pytest.fixture(scope="module")
def object_info(server):
    return server.object_info()


@pytest.fixture
def graph(object_info):
    """The demo's graph in API format, with two small pictures and few steps; every test may change it."""
    prompt = to_prompt(load_workflow("generator_off_and_on"), object_info)
    titled(prompt, "Eight 64x64 pictures")["batch_size"] = 2
    for title in ("Sample without masks", "Sample with masks"):
        titled(prompt, title)["steps"] = 4
    return prompt


def pictures(server: Server, prompt: dict, title: str) -> np.ndarray:
    """`[B, H, W, 3]` bytes of the Save Image node with this title, after a run."""
    node = next(key for key, value in prompt.items() if value["_meta"]["title"] == title)
    images = server.run(prompt)[node]["images"]
    return np.stack([np.asarray(Image.open(io.BytesIO(server.view(image))).convert("RGB")) for image in images])


def both(server: Server, prompt: dict) -> tuple[np.ndarray, np.ndarray]:
    return tuple(pictures(server, resampled(prompt), f"Save {which} masks") for which in ("without", "with"))


def resampled(prompt: dict) -> dict:
    """The same graph with a negative prompt of other digits, which the toy's text encoder does not see: the server
    samples again, on the same cached model, instead of giving what it has."""
    prompt = copy.deepcopy(prompt)
    titled(prompt, "Negative prompt")["text"] = str(time.monotonic_ns())
    return prompt


def put_generator(server: Server, name: str, generator) -> str:
    checkpoint.save(server.base / "models" / "maskunet" / name, generator, "decoder attention", {})
    return name


def test_contract_of_the_nodes(object_info):
    inputs = {node: [*object_info[node]["input"].get("required", {})] for node in NODES}
    assert inputs == {
        "MaskUNetLoader": ["maskunet_name"],
        "MaskUNetApply": ["model", "maskunet", "strength", "start_percent", "end_percent", "stochastic", "seed"],
        "MaskUNetApplyMasks": ["model", "masks", "strength"],
        "MaskUNetSaveMasks": ["masks", "filename_prefix"],
        "MaskUNetLoadMasks": ["masks_name"],
        "MaskUNetRecordMasks": ["model"],
        "MaskUNetMasksOfRun": ["latent"],
        "MaskUNetInspect": ["model", "masks", "sample", "branch"],
        "MaskUNetRandomMask": [
            "model",
            "keep_ratio",
            "seed",
            "targets",
            "per_step",
            "start_percent",
            "end_percent",
        ],
        "MaskUNetRewardSampler": [
            *("model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image"),
            *("denoise", "vae", "reward", "prompt", "preset", "candidates", "masks"),
        ],
        "MaskUNetToyModel": [],
        "MaskUNetRewardLoader": ["reward_name", "dtype", "checkpointing"],
        "MaskUNetRewardCombine": ["reward_a", "weight_a", "reward_b", "weight_b"],
        "MaskUNetRewardScore": ["images", "prompt", "reward", "framing"],
        "MaskUNetJudgeLoader": ["judge_name"],
        "MaskUNetCheckPicture": ["images", "prompt", "judge"],
        "MaskUNetCompareBatches": ["images_a", "images_b", "prompt", "judge"],
        "MaskUNetPromptWords": ["clip", "text", "words"],
        "MaskUNetAttentionGuidance": ["model", "words", "method", "step", "guided_share"],
        "MaskUNetAttentionMaps": ["model", "words", "positive", "latent", "percent"],
        "MaskUNetCrossFrame": ["model", "reference", "start_percent", "end_percent"],
        "MaskUNetVideoSampler": [
            *("model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image"),
            *("frames", "motion_x", "motion_y"),
        ],
        "MaskUNetTrain": [
            *("model", "clip", "vae", "images", "captions", "goal", "steps", "name"),
            *("seed", "resolution", "batch", "rate", "held_out", "targets", "minutes", "pictures", "picture_cfg"),
        ],
    }
    outputs = {node: object_info[node]["output"] for node in NODES}
    assert outputs["MaskUNetLoader"] == ["MASKUNET"]
    assert outputs["MaskUNetLoadMasks"] == ["MASKUNET_MASKS"]
    assert outputs["MaskUNetSaveMasks"] == []
    assert outputs["MaskUNetMasksOfRun"] == ["MASKUNET_MASKS"]
    assert outputs["MaskUNetInspect"] == ["IMAGE"] * 4 + ["STRING"]
    assert outputs["MaskUNetRewardSampler"] == ["LATENT", "MASKUNET_MASKS", "IMAGE", "IMAGE", "INT"]
    for node in ("MaskUNetApply", "MaskUNetApplyMasks", "MaskUNetRandomMask", "MaskUNetRecordMasks"):
        assert outputs[node] == ["MODEL"]
    assert outputs["MaskUNetCrossFrame"] == ["MODEL"]
    assert outputs["MaskUNetVideoSampler"] == ["LATENT"]
    assert outputs["MaskUNetTrain"] == ["MASKUNET", "STRING", "IMAGE", "IMAGE"]
    assert outputs["MaskUNetToyModel"] == ["MODEL", "CLIP", "VAE"]
    assert outputs["MaskUNetRewardLoader"] == outputs["MaskUNetRewardCombine"] == ["MASKUNET_REWARD"]
    assert outputs["MaskUNetRewardScore"] == outputs["MaskUNetCheckPicture"] == ["FLOAT", "IMAGE", "STRING"]
    assert outputs["MaskUNetJudgeLoader"] == ["MASKUNET_JUDGE"]
    assert outputs["MaskUNetCompareBatches"] == ["FLOAT", "IMAGE", "STRING", "STRING"]
    assert object_info["MaskUNetCompareBatches"]["input"]["required"]["judge"][0] == "MASKUNET_JUDGE,MASKUNET_REWARD"
    defaults = {k: v[1].get("default") for k, v in object_info["MaskUNetApply"]["input"]["required"].items()}
    assert (defaults["strength"], defaults["start_percent"], defaults["end_percent"]) == (1.0, 0.0, 1.0)
    assert (defaults["stochastic"], defaults["seed"]) == (False, 0)
    assert object_info["MaskUNetApplyMasks"]["input"]["required"]["strength"][1]["default"] == 1.0
    assert object_info["MaskUNetSaveMasks"]["input"]["required"]["filename_prefix"][1]["default"] == "masks/maskunet"


@pytest.mark.skipif(find_browser() is not None, reason="tests/browser runs them, with all their steps")
@pytest.mark.parametrize("name", TOY_WORKFLOWS)
def test_every_shipped_workflow_runs(server, object_info, name):
    prompt = to_prompt(load_workflow(name), object_info)
    for node in nodes_of(prompt, "TrainLoraNode") + nodes_of(prompt, "MaskUNetTrain"):
        prompt[node]["inputs"]["steps"] = 4
    outputs = server.run(prompt)
    saved = [image for output in outputs.values() if shows_pictures(output) for image in output["images"]]
    assert saved
    for image in saved:
        assert np.asarray(Image.open(io.BytesIO(server.view(image)))).std() > 1


def reward_of(server: Server, prompt: dict, title: str) -> list[float]:
    """Toy rewards of the pictures that the Save Image node with this title saves."""
    prompt = copy.deepcopy(prompt)
    text, images = titled(prompt, "Prompt")["text"], titled(prompt, title)["images"]
    options = {"reward_name": "toy reward (bundled)", "dtype": "auto", "checkpointing": False}
    scored = {"images": images, "prompt": text, "reward": ["toy reward", 0], "framing": "centre crop"}
    prompt["toy reward"] = {"class_type": "MaskUNetRewardLoader", "inputs": options}
    prompt["scored"] = {"class_type": "MaskUNetRewardScore", "inputs": scored}
    prompt["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["scored", 2]}}
    return json.loads(server.run(prompt)["shown"]["text"][0])["scores"]


def test_the_masks_that_ship_fit_their_graph_and_raise_the_reward(server, object_info):
    shipped = Path(mask_file.__file__).parent.parent / "toy" / "masks" / "toy_example.safetensors"
    assert shipped.stat().st_size < 1_000_000
    record = mask_file.load(shipped).record
    replay = to_prompt(load_workflow("replay_masks"), object_info)
    search = titled(to_prompt(load_workflow("save_masks"), object_info), "Sample with a search")
    for drawn in (titled(replay, "Sample with masks"), search):
        assert {name: drawn[name] for name in record["sampling"]} == record["sampling"]
    assert titled(replay, "Prompt")["text"] == search["prompt"] == record["prompt"]
    assert record["seeds"] == [search["seed"]]
    masked, plain = (reward_of(server, replay, f"Save {which} masks")[0] for which in ("with", "without"))
    assert masked > plain + 1


def test_the_generator_that_ships_changes_the_pictures(server, graph):
    off, on = both(server, graph)
    assert off.shape == on.shape == (2, 256, 256, 3)
    assert not np.array_equal(off, on)


def test_strength_zero_equals_the_stock_model_bit_for_bit(server, graph):
    titled(graph, "Apply the masks")["strength"] = 0.0
    off, on = both(server, graph)
    assert np.array_equal(off, on)


def test_an_untrained_generator_equals_the_stock_model_bit_for_bit(server, graph, toy_structure):
    titled(graph, "Generator")["maskunet_name"] = put_generator(
        server, "untrained.safetensors", make_generator(toy_structure)
    )
    off, on = both(server, graph)
    assert np.array_equal(off, on)


def test_a_generator_of_the_authors_architecture_is_read_and_applied(server, graph, toy):
    structure = structure_of(toy[0], "decoder attention")
    torch.manual_seed(0)
    generator = ReferenceGenerator(structure, authors_maps(structure, toy[0].model.diffusion_model))
    generator.start_training(start=0.0, freed=True)
    titled(graph, "Generator")["maskunet_name"] = put_generator(server, "authors.safetensors", generator)
    off, on = both(server, graph)
    assert not np.array_equal(off, on)


def test_same_seed_gives_the_same_image_in_one_process_and_after_a_restart(graph):
    """In a folder of any name."""
    titled(graph, "Apply the masks")["stochastic"] = True
    with Server(folder_name="my-own folder") as server:
        first, again = (pictures(server, resampled(graph), "Save with masks") for _ in range(2))
        server.restart()
        later = pictures(server, resampled(graph), "Save with masks")
        assert "Cannot import" not in server.log.read_text()
    assert first.shape == (2, 256, 256, 3)
    assert np.array_equal(first, again)
    assert np.array_equal(first, later)


def test_progress_and_previews_come_from_the_sampler(server, graph):
    events = []
    server.run(resampled(graph), lambda kind, data: events.append((kind, data)))
    node = next(key for key, value in graph.items() if value["_meta"]["title"] == "Sample with masks")
    steps = [data["value"] for kind, data in events if kind == "progress" and data["node"] == node]
    assert steps[-1] == 4
    assert any(kind == "preview" for kind, _ in events)


def test_an_interrupt_in_mid_sampling_leaves_the_model_as_it_was(server, graph):
    before, _ = both(server, graph)
    long = resampled(graph)
    titled(long, "Sample with masks").update(steps=2000, seed=123)
    interrupted = threading.Event()

    def interrupt_at_the_second_step(kind, data):
        if kind == "progress" and data["max"] == 2000 and data["value"] >= 2 and not interrupted.is_set():
            interrupted.set()
            threading.Thread(target=server.interrupt).start()

    with pytest.raises(ServerError, match="interrupted"):
        server.run(long, interrupt_at_the_second_step)
    after, _ = both(server, graph)
    assert np.array_equal(before, after)


@pytest.mark.parametrize("damage", [no_safetensors, truncated, newer_version, missing_tensor, not_finite])
def test_a_bad_file_gets_its_sentence_and_leaves_the_server_running(server, graph, toy_structure, damage):
    name = f"{damage.__name__}.safetensors"
    put_generator(server, name, make_generator(toy_structure))
    damage(server.base / "models" / "maskunet" / name)
    titled(graph, "Generator")["maskunet_name"] = name
    with pytest.raises(ExecutionError) as caught:
        server.run(graph)
    assert caught.value.node_type == "MaskUNetLoader"
    assert name in caught.value.exception_message
    assert server.get("/system_stats")["system"]["comfyui_version"]


def test_a_generator_for_another_family_is_refused_before_sampling(server, graph):
    sd15 = inspect_model(sd15_unet(), "decoder attention", "SD 1.5")
    narrow = make_generator(sd15, bias="row_column", rank=1, width=4)
    titled(graph, "Generator")["maskunet_name"] = put_generator(server, "sd15.safetensors", narrow)
    with pytest.raises(ExecutionError, match=r"was trained for SD 1\.5, but the connected model is the MaskUNet toy"):
        server.run(graph)


def test_a_file_that_was_replaced_is_read_again(server, graph, toy_structure):
    name = put_generator(server, "replaced.safetensors", make_generator(toy_structure))
    titled(graph, "Generator")["maskunet_name"] = name
    untouched = pictures(server, resampled(graph), "Save with masks")
    time.sleep(0.05)
    put_generator(server, name, make_generator(toy_structure, lively=True))
    assert not np.array_equal(pictures(server, resampled(graph), "Save with masks"), untouched)


def test_random_masks_vary_with_their_seed(server, graph):
    node = next(key for key, value in graph.items() if value["class_type"] == "MaskUNetApply")
    graph[node] = {
        "class_type": "MaskUNetRandomMask",
        "inputs": {
            "model": graph[node]["inputs"]["model"],
            "keep_ratio": 0.9,
            "seed": 1,
            "targets": "decoder attention",
            "per_step": True,
            "start_percent": 0.0,
            "end_percent": 1.0,
        },
        "_meta": {"title": "Random masks"},
    }
    first = pictures(server, resampled(graph), "Save with masks")
    assert np.array_equal(first, pictures(server, resampled(graph), "Save with masks"))
    titled(graph, "Random masks")["seed"] = 2
    assert not np.array_equal(first, pictures(server, resampled(graph), "Save with masks"))
    titled(graph, "Random masks")["keep_ratio"] = 1.0
    off, on = both(server, graph)
    assert np.array_equal(off, on)


def test_many_runs_leave_the_memory_where_the_first_ones_left_it(server, graph):
    process = psutil.Process(server.process.pid)
    for title in ("Sample without masks", "Sample with masks"):
        titled(graph, title)["steps"] = 2

    def after(runs: int) -> int:
        """Bytes that the server holds after so many more runs, each of them on a clone that was patched anew."""
        for _ in range(runs):
            prompt = resampled(graph)
            titled(prompt, "Apply the masks")["strength"] = random.uniform(0.5, 1.0)
            server.run(prompt)
        return process.memory_info().rss

    third, last = after(3), after(20)
    # A forgotten clone's generator takes 2.8 MB, a run's latents and pictures less than 1 MB.
    assert last - third < 20 * 2**20, f"{(last - third) / 2**20:.1f} MB more after 20 runs"
