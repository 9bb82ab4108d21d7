"""The reward nodes: in the host's own process, and in a real server as a user meets them."""

import gc
import io
import json
import os
import weakref

import comfy.model_management
import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from maskunet_core.rewards.files import load
from maskunet_core.rewards.reward import value_and_gradient
from maskunet_core.rewards.toy import ToyReward
from tests.host.server import ExecutionError, ServerError
from tests.reward_files import aesthetic_head, clip_l_image_model, describe, write_hps, write_image_reward
from trainer.toy.world import render, sample_scenes

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def nodes(extension):
    """The extension's nodes.rewards."""
    return extension("rewards")


@pytest.fixture
def reward_folder(nodes, tmp_path, monkeypatch):
    """models/reward and models/clip_vision of this test alone."""
    for name in ("reward", "clip_vision"):
        folder = tmp_path / name
        folder.mkdir()
        extensions = folder_paths.folder_names_and_paths[name][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(folder)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path / "reward"


def pictures(count=3):
    stream = torch.Generator().manual_seed(5)
    return render(sample_scenes(count, stream), stream).movedim(1, -1)


def run(node, **inputs):
    """A node's outputs, computed as the host's executor does."""
    with torch.inference_mode():
        return node.execute(**inputs).result


def loaded(nodes, name, dtype="fp32", checkpointing=False):
    return run(nodes.MaskUNetRewardLoader, reward_name=name, dtype=dtype, checkpointing=checkpointing)[0]


def scored(nodes, reward, images, prompt=PROMPT, framing="centre crop"):
    score = nodes.MaskUNetRewardScore.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    return run(score, images=images, prompt=prompt, reward=reward, framing=framing)


def test_the_toy_reward_scores_a_batch(nodes):
    images = pictures()
    scores, sheet, table = scored(nodes, loaded(nodes, nodes.TOY_REWARD), images)
    expected = ToyReward().bind(PROMPT)(images.movedim(-1, 1))
    assert scores == pytest.approx(expected.tolist(), rel=1e-5)
    assert json.loads(table) == {"prompt": PROMPT, "reward": "toy reward", "scores": scores}
    assert sheet.shape[0] == 3


@pytest.mark.parametrize(("height", "width"), [(64, 64), (512, 512), (300, 700)])
def test_scores_stand_under_the_pictures(nodes, height, width):
    images = torch.rand(2, height, width, 3, generator=torch.Generator().manual_seed(0))
    reward = loaded(nodes, nodes.TOY_REWARD)
    _, sheet, _ = scored(nodes, reward, images)
    assert sheet.dtype == torch.float32
    left = (sheet.shape[2] - width) // 2
    assert torch.equal(sheet[:, :height, left : left + width], images)
    strip = sheet[:, height:]
    assert strip.shape[1] >= 20
    ink = (strip > 0.8).all(-1)
    assert 0.005 < ink.float().mean() < 0.3
    edges = ink[:, [0, -1]].any() | ink[:, :, [0, -1]].any()
    assert not edges, "the text touches the border"
    assert sheet.shape[2] < 1.5 * width, "names and scores of small pictures stand in two lines"
    combined = run(nodes.MaskUNetRewardCombine, reward_a=reward, weight_a=1.0, reward_b=reward, weight_b=2.0)[0]
    _, taller, _ = scored(nodes, combined, images)
    assert taller.shape[1] - height > 2 * (sheet.shape[1] - height)


@pytest.mark.parametrize("write", [write_image_reward, write_hps])
@pytest.mark.parametrize("dtype", ["auto", "fp32", "fp16", "bf16"])
def test_published_files_are_loaded_and_score(nodes, reward_folder, write, dtype):
    file = write(reward_folder / "renamed.bin")
    images = torch.rand(2, 40, 36, 3, generator=torch.Generator().manual_seed(0))
    scores, _, table = scored(nodes, loaded(nodes, "renamed.bin", dtype), images, "a red dog")
    expected = load(file).bind("a red dog")(images.movedim(-1, 1))
    assert scores == pytest.approx(expected.tolist(), rel=0.05, abs=0.02)
    assert json.loads(table)["reward"] == "renamed"


def test_the_aesthetic_predictor_finds_its_tower_in_clip_vision(nodes, reward_folder):
    torch.save(aesthetic_head(), reward_folder / "head.pth")
    tower = reward_folder.parent / "clip_vision" / "clip_l.safetensors"
    with pytest.raises(
        ValueError, match=r"Put model.safetensors of openai/clip-vit-large-patch14 into models/clip_vision"
    ):
        loaded(nodes, "head.pth")
    save_file(clip_l_image_model().state_dict(), tower)
    scores, _, _ = scored(nodes, loaded(nodes, "head.pth"), torch.rand(2, 64, 64, 3))
    assert np.isfinite(scores).all()


def test_combined_rewards_add_up_and_show_their_parts(nodes, reward_folder):
    write_hps(reward_folder / "HPS_tiny.pt")
    images, toy, hps = pictures(), loaded(nodes, nodes.TOY_REWARD), loaded(nodes, "HPS_tiny.pt")
    combined = run(nodes.MaskUNetRewardCombine, reward_a=toy, weight_a=0.5, reward_b=hps, weight_b=-10.0)[0]
    again = run(nodes.MaskUNetRewardCombine, reward_a=combined, weight_a=2.0, reward_b=toy, weight_b=1.0)[0]
    a, b = (np.array(scored(nodes, reward, images)[0]) for reward in (toy, hps))
    scores, _, table = scored(nodes, again, images)
    assert scores == pytest.approx(2 * a - 20 * b, rel=1e-6)
    parts = json.loads(table)["parts"]
    assert [(part["name"], part["weight"]) for part in parts] == [
        ("toy reward", 1),
        ("HPS_tiny", -20),
        ("toy reward", 1),
    ]
    assert len(again.patchers()) == 2


def test_letterboxing_shows_the_reward_the_whole_picture(nodes):
    """A circle near the end of a wide picture: the centre crop cuts it off."""
    reward, wide = loaded(nodes, nodes.TOY_REWARD), torch.full((1, 3, 64, 128), 0.5)
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(128.0), indexing="ij")
    circle = torch.hypot(rows - 32, columns - 108) < 18
    wide[0, :, circle] = torch.tensor([0.86, 0.12, 0.12])[:, None]
    images = wide.movedim(1, -1)
    (crop,), _, _ = scored(nodes, reward, images)
    (boxed,), _, _ = scored(nodes, reward, images, framing="letterbox")
    assert boxed > crop + 3


def test_the_host_manages_the_weights(nodes, reward_folder):
    write_hps(reward_folder / "HPS_tiny.pt")
    reward = loaded(nodes, "HPS_tiny.pt")
    scored(nodes, reward, pictures())
    (patcher,) = reward.patchers()
    assert patcher.model is reward.reward.modules()[0]
    assert patcher in [entry.model for entry in comfy.model_management.current_loaded_models]
    comfy.model_management.unload_all_models()
    assert patcher not in [entry.model for entry in comfy.model_management.current_loaded_models]


def test_a_reward_that_was_loaded_and_moved_in_inference_mode_still_gives_gradients(nodes, reward_folder):
    write_hps(reward_folder / "HPS_tiny.pt")
    reward = loaded(nodes, "HPS_tiny.pt")
    with torch.inference_mode():
        comfy.model_management.load_models_gpu(reward.patchers())
        images = torch.rand(1, 3, 28, 28)
        _, gradient = value_and_gradient(reward.reward.bind("a red dog"), images)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_pictures_of_any_number_of_channels_are_scored(nodes, channels):
    images = torch.rand(2, 64, 64, channels, generator=torch.Generator().manual_seed(0))
    coloured = images[..., :3] if channels == 4 else images[..., :1].expand(-1, -1, -1, 3)
    reward = loaded(nodes, nodes.TOY_REWARD)
    expected, sheet, _ = scored(nodes, reward, coloured)
    scores, drawn, _ = scored(nodes, reward, images)
    assert scores == expected
    assert torch.equal(drawn, sheet)


@pytest.mark.parametrize("framing", ["centre crop", "letterbox"])
@pytest.mark.parametrize(("height", "width"), [(4, 1000), (1, 1), (1000, 4)])
def test_pictures_of_any_shape_are_scored(nodes, height, width, framing):
    scores, sheet, _ = scored(nodes, loaded(nodes, nodes.TOY_REWARD), torch.rand(1, height, width, 3), framing=framing)
    assert np.isfinite(scores).all()
    assert sheet.shape[1] > height


def test_an_empty_batch_gets_a_sentence(nodes):
    with pytest.raises(ValueError, match="'images' holds no picture to score"):
        scored(nodes, loaded(nodes, nodes.TOY_REWARD), torch.zeros(0, 64, 64, 3))


def test_scores_that_are_no_numbers_are_null_in_the_table(nodes):
    images, reward = pictures(2), loaded(nodes, nodes.TOY_REWARD)
    images[1] = torch.nan
    combined = run(nodes.MaskUNetRewardCombine, reward_a=reward, weight_a=1.0, reward_b=reward, weight_b=0.0)[0]
    scores, _, text = scored(nodes, combined, images)
    table = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert np.isnan(scores).tolist() == [False, True]
    assert table["scores"] == [scores[0], None]
    assert table["parts"][1]["scores"] == [scores[0], None]


def test_a_reward_of_weight_zero_does_not_spoil_the_sum(nodes):
    """Nor does its score where it is no number."""
    images, reward = pictures(2), loaded(nodes, nodes.TOY_REWARD)
    broken = loaded(nodes, nodes.TOY_REWARD)
    for parameter in broken.reward.reader.parameters():
        parameter.fill_(torch.nan)
    combined = run(nodes.MaskUNetRewardCombine, reward_a=reward, weight_a=1.0, reward_b=broken, weight_b=0.0)[0]
    assert scored(nodes, combined, images)[0] == scored(nodes, reward, images)[0]


@pytest.mark.parametrize(
    ("most", "asked"), [(8, [8, 3]), (4, [8, 4, 4, 3]), (1, [8, 4, 2, *[1] * 11]), (0, [8, 4, 2, 1])]
)
def test_where_memory_is_short_fewer_pictures_are_scored_at_once(nodes, most, asked):
    images, reward, seen = pictures(11), loaded(nodes, nodes.TOY_REWARD), []
    expected = scored(nodes, reward, images)[0]

    def room_for_few(module, arguments):
        seen.append(len(arguments[0]))
        if seen[-1] > most:
            raise torch.OutOfMemoryError("out of memory")

    reward.reward.reader.register_forward_pre_hook(room_for_few)
    if most:
        assert scored(nodes, reward, images)[0] == pytest.approx(expected, rel=1e-5)
    else:
        with pytest.raises(torch.OutOfMemoryError):
            scored(nodes, reward, images)
    assert seen == asked


def test_other_errors_of_a_reward_are_not_tried_again(nodes):
    reward, seen = loaded(nodes, nodes.TOY_REWARD), []

    def broken(module, arguments):
        seen.append(len(arguments[0]))
        raise RuntimeError("the reward broke")

    reward.reward.reader.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="the reward broke"):
        scored(nodes, reward, pictures(3))
    assert seen == [3]


def test_the_host_is_told_what_the_pictures_take(nodes, monkeypatch):
    """Large pictures lie on the device as they are before a reward resizes them."""
    told, load_models = [], comfy.model_management.load_models_gpu

    def listening(models, memory_required=0, **options):
        told.append(memory_required)
        load_models(models, memory_required=memory_required, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", listening)
    reward = loaded(nodes, nodes.TOY_REWARD)
    for count, side in ((1, 64), (1, 1024), (2, 1024), (20, 64)):
        scored(nodes, reward, torch.rand(count, side, side, 3))
    small, large, two, many = told
    assert large - small > 1024 * 1024 * 3 * 4
    assert two == 2 * large
    assert many == 8 * small


def test_a_loaded_reward_that_nobody_holds_is_freed_at_once(nodes, reward_folder):
    write_hps(reward_folder / "HPS_tiny.pt")
    reward = loaded(nodes, "HPS_tiny.pt")
    module = weakref.ref(reward.reward.modules()[0])
    gc.collect()
    gc.disable()
    try:
        scored(nodes, reward, pictures())
        comfy.model_management.unload_all_models()
        del reward
        assert module() is None
    finally:
        gc.enable()


def test_the_aesthetic_predictor_is_loaded_again_when_its_tower_changes(nodes, reward_folder):
    """And no other reward is."""
    clip_vision = reward_folder.parent / "clip_vision"
    torch.save(aesthetic_head(), reward_folder / "head.pth")
    write_hps(reward_folder / "hps.pt")

    def fingerprints():
        options = {"dtype": "auto", "checkpointing": False}
        return [nodes.MaskUNetRewardLoader.fingerprint_inputs(name, **options) for name in ("head.pth", "hps.pt")]

    none = fingerprints()
    save_file(clip_l_image_model().state_dict(), clip_vision / "clip_l.safetensors")
    folder_paths.filename_list_cache.clear()
    first = fingerprints()
    os.utime(clip_vision / "clip_l.safetensors", ns=(1, 1))
    second = fingerprints()
    assert none[0] != first[0] != second[0] != none[0]
    assert none[1] == first[1] == second[1]
    describe(reward_folder / "hps.pt", {})
    os.utime(reward_folder / "hps.json", ns=(1, 1))
    assert fingerprints()[1] != first[1]
    assert nodes.MaskUNetRewardLoader.fingerprint_inputs(nodes.TOY_REWARD) == []


def graph(reward_name, prompt=PROMPT):
    """Toy picture -> reward -> captioned picture, in API format."""
    toy = {"class_type": "MaskUNetToyModel", "inputs": {}}
    text = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["toy", 1], "text": PROMPT}}
    empty = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}}
    sampler = {"seed": 1, "steps": 8, "cfg": 5.0, "sampler_name": "ddim", "scheduler": "ddim_uniform", "denoise": 1.0}
    sampler |= {"model": ["toy", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    reward = {"reward_name": reward_name, "dtype": "auto", "checkpointing": False}
    score = {"images": ["decode", 0], "prompt": prompt, "reward": ["sum", 0], "framing": "centre crop"}
    return {
        "toy": toy,
        "text": text,
        "empty": empty,
        "sample": {"class_type": "KSampler", "inputs": sampler},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["toy", 2]}},
        "reward": {"class_type": "MaskUNetRewardLoader", "inputs": reward},
        "sum": {
            "class_type": "MaskUNetRewardCombine",
            "inputs": {"reward_a": ["reward", 0], "weight_a": 1.0, "reward_b": ["reward", 0], "weight_b": 1.0},
        },
        "score": {"class_type": "MaskUNetRewardScore", "inputs": score},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["score", 1], "filename_prefix": "scored"}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["score", 2]}},
    }


def test_a_server_scores_pictures_that_it_drew(server):
    outputs = server.run(graph("toy reward (bundled)"))
    saved = outputs["save"]["images"]
    assert len(saved) == 2
    picture = Image.open(io.BytesIO(server.view(saved[0])))
    assert picture.height > 64 + 30
    table = json.loads(outputs["show"]["text"][0])
    assert len(table["scores"]) == 2
    assert max(table["scores"]) <= 0.0
    assert len(table["parts"]) == 2


def test_a_server_takes_files_from_models_reward(server):
    write_hps(server.base / "models" / "reward" / "hps.pt")
    options = server.object_info()["MaskUNetRewardLoader"]["input"]["required"]["reward_name"]
    assert "hps.pt" in json.dumps(options)
    assert len(server.run(graph("hps.pt"))["save"]["images"]) == 2


def test_a_server_says_where_a_missing_file_is_to_be_had(server):
    with pytest.raises(ServerError, match=r"'none.pt' is not in models/reward.*HPS_v2.1_compressed.pt .*xswu/HPSv2"):
        server.run(graph("none.pt"))


def test_a_server_tells_what_is_wrong_with_a_file_or_a_prompt(server):
    (server.base / "models" / "reward" / "page.pt").write_text("<html>")
    server.object_info()
    with pytest.raises(ExecutionError, match=r"'page.pt' is neither a safetensors file") as caught:
        server.run(graph("page.pt"))
    assert caught.value.node_type == "MaskUNetRewardLoader"
    with pytest.raises(ExecutionError, match='cannot read the prompt "a portrait"') as caught:
        server.run(graph("toy reward (bundled)", "a portrait"))
    assert caught.value.node_type == "MaskUNetRewardScore"
