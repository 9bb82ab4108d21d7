"""The nodes that judge pictures: in the host's own process, and in a real server as a user meets them."""

import json

import folder_paths
import pytest
import torch

from maskunet_core.judges.pictures import levels
from tests.host.server import ExecutionError
from tests.judge_files import write_detector
from tests.judge_weights import blobs
from trainer.toy.world import render, sample_captioned

TOY, TOY_REWARD = "toy judge (bundled)", "toy reward (bundled)"
BOXES = {"asked": (34, 197, 94), "other": (245, 158, 11)}


@pytest.fixture(scope="module")
def nodes(extension):
    """The extension's nodes.judges."""
    return extension("judges")


@pytest.fixture(scope="module")
def comparing(extension):
    return extension("compare_batches")


@pytest.fixture
def judges_folder(nodes, tmp_path, monkeypatch):
    """models/judges of this test alone; no file lies where CLIP is looked for."""
    for name in ("judges", "reward", "clip_vision"):
        folder = tmp_path / name
        folder.mkdir()
        extensions = folder_paths.folder_names_and_paths[name][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(folder)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path / "judges"


def run(node, **inputs):
    """A node's outputs, computed as the host's executor does."""
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).execute(**inputs).result


def loaded(nodes, name=TOY):
    return run(nodes.MaskUNetJudgeLoader, judge_name=name)[0]


@pytest.fixture(scope="module")
def scene():
    """Four pictures of the toy world, and the caption of the first."""
    stream = torch.Generator().manual_seed(5)
    scenes, captions = sample_captioned(4, stream)
    return render(scenes, stream).movedim(1, -1), str(captions[0])


def checked(nodes, images, prompt, judge=None):
    return run(nodes.MaskUNetCheckPicture, images=images, prompt=prompt, judge=judge or loaded(nodes))


def test_the_toy_judge_checks_a_batch(nodes, scene):
    images, prompt = scene
    scores, sheet, reasons = checked(nodes, images, prompt)
    assert scores == [1.0, 0.0, 0.0, 0.0]
    lines = reasons.splitlines()
    assert lines[0] == "1: yes"
    assert all(line.startswith(f"{n}: no: ") for n, line in enumerate(lines[1:], 2))
    assert sheet.shape[0] == 4


def colour_share(pictures, name):
    """Of the pixels that have just the colour of a kind of box."""
    return ((pictures * 255).round() == torch.tensor(BOXES[name])).all(-1).float().mean()


@pytest.mark.parametrize("side", [64, 1024])
def test_boxes_stand_in_pictures_large_enough_to_be_read(nodes, scene, side):
    images, prompt = scene
    large = torch.nn.functional.interpolate(images.movedim(-1, 1), side).movedim(1, -1)
    _, right, _ = checked(nodes, large[:1], prompt)
    _, wrong, _ = checked(nodes, large[:1], "a white cross")
    assert right.shape[2] >= max(384, side)
    assert colour_share(right, "asked") > 0.005 > colour_share(right, "other") == 0
    assert colour_share(wrong, "other") > 0.005 > colour_share(wrong, "asked") == 0


def test_labels_do_not_cover_each_other(extension):
    boxes, verdict = extension("boxes"), extension("judges").Verdict
    seen = tuple(boxes.Seen(name, (10, 10, 50, 50), True) for name in ("teddy bear", "hot dog", "dining table"))
    ground = torch.zeros(64, 64, 3)
    areas = [float((boxes.boxed(ground, verdict((), seen[:n])) > 0).any(-1).sum()) for n in (1, 2, 3)]
    assert areas[1] > areas[0] + 400
    assert areas[2] > areas[1] + 400


def test_a_published_detector_is_loaded_and_checks_real_pictures(nodes, judges_folder):
    write_detector(judges_folder / "renamed.pth")
    judge = loaded(nodes, "renamed.pth")
    image = levels(blobs(64, 64, 2)).movedim(0, -1)[None] / 255
    scores, _, reasons = checked(nodes, image, "2 bicycles, no person", judge)
    assert (scores, reasons) == ([0.0], "1: no: 0 bicycle, wanted 2")
    assert [patcher.model for patcher in judge.patchers()] == judge.judge.modules()
    with pytest.raises(ValueError, match=r"put model\.safetensors of openai/clip-vit-large-patch14"):
        checked(nodes, image, "a red bicycle", judge)


def test_files_that_are_no_judge_get_a_sentence(nodes, judges_folder):
    (judges_folder / "page.pth").write_text("<html>")
    with pytest.raises(ValueError, match=r"'page\.pth' is not GenEval's detector, or is damaged"):
        loaded(nodes, "page.pth")
    said = nodes.MaskUNetJudgeLoader.validate_inputs("gone.pth")
    assert said.startswith("'gone.pth' is not in models/judges. This file can be put there: mask2former_swin-s")
    assert nodes.MaskUNetJudgeLoader.validate_inputs(TOY) is True


def test_a_file_that_was_replaced_is_noticed(nodes, judges_folder):
    file = judges_folder / "a.pth"
    file.write_text("one")
    before = nodes.MaskUNetJudgeLoader.fingerprint_inputs("a.pth")
    assert nodes.MaskUNetJudgeLoader.fingerprint_inputs("a.pth") == before
    file.write_text("another")
    assert nodes.MaskUNetJudgeLoader.fingerprint_inputs("a.pth") != before
    assert nodes.MaskUNetJudgeLoader.fingerprint_inputs(TOY) == []


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_any_number_of_channels_are_checked(nodes, channels):
    assert len(checked(nodes, torch.rand(2, 64, 96, channels), "a red circle")[0]) == 2


def test_the_nodes_themselves_tell_what_they_found(nodes, comparing, scene, monkeypatch):
    said, (images, prompt) = [], scene
    for module in (nodes, comparing):
        monkeypatch.setattr(module, "tell", lambda text, node_id: said.append(text))
    checked(nodes, images.repeat(2, 1, 1, 1), f"{prompt} on a table")
    compared(comparing, images, images, prompt, loaded(nodes))
    first, *wrong, more, unread = said[0].splitlines()
    assert (first, more, unread) == ("2 of 8 right.", "and more.", "The toy judge did not read: on, table")
    assert [line.split(": no: ")[0] for line in wrong] == ["2", "3", "4", "6"]
    assert said[1] == "A and B score alike: 4 pairs"


# Compare Batches ---------------------------------------------------------------------------------------------------


def compared(comparing, a, b, prompt, judge):
    return run(comparing.MaskUNetCompareBatches, images_a=a, images_b=b, prompt=prompt, judge=judge)


def test_a_judge_compares_two_batches(nodes, comparing, scene):
    images, prompt = scene
    right = images[:1].expand(8, -1, -1, -1)
    wrong = images[1:2].expand(8, -1, -1, -1).clone()
    wrong[0] = images[0]
    difference, sheet, verdict, table = compared(comparing, wrong, right, prompt, loaded(nodes))
    assert difference == pytest.approx(7 / 8)
    assert verdict.startswith("B scores higher than A: difference +0.875, interval +0.500 to +1.000, p 0.0")
    assert verdict.endswith("8 pairs")
    told = json.loads(table)
    assert (told["a"], told["b"]) == ([1.0] + [0.0] * 7, [1.0] * 8)
    assert told["interval"] == pytest.approx([0.5, 1.0], abs=1e-3)
    assert compared(comparing, right, wrong, prompt, loaded(nodes))[2].startswith("B scores lower than A")
    green = ((sheet * 255).round() == torch.tensor([33, 196, 94])).all(-1)
    assert green.any()


@pytest.fixture(scope="module")
def rewards(extension):
    return extension("rewards")


@pytest.fixture(scope="module")
def reward(rewards):
    return run(rewards.MaskUNetRewardLoader, reward_name=TOY_REWARD, dtype="fp32", checkpointing=False)[0]


def test_rewards_connect_as_well(rewards, reward, comparing, scene):
    images, prompt = scene
    both = run(rewards.MaskUNetRewardCombine, reward_a=reward, weight_a=2.0, reward_b=reward, weight_b=0.0)[0]
    score = {"prompt": prompt, "reward": both, "framing": "centre crop"}
    expected = [run(rewards.MaskUNetRewardScore, images=batch, **score)[0] for batch in (images, images.flip(0))]
    difference, _, _, table = compared(comparing, images, images.flip(0), prompt, both)
    told = json.loads(table)
    assert [told["a"], told["b"]] == [pytest.approx(scores) for scores in expected]
    assert difference == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([0.0] * 9, "A and B score alike: 9 pairs"),
        ([1.0] * 5, "A and B cannot be told apart by fewer than 6 pairs: difference +1.000, p 0.0"),
        ([1.0], "A and B cannot be told apart by fewer than 6 pairs: difference +1.000, p 1.000, 1 pair"),
        ([1.0] * 6, "B scores higher than A: difference +1.000, p 0.0"),
        (
            [1.0] * 5 + [0.0] * 3,
            "A and B cannot be told apart at this size: difference +0.625, interval +0.000 to +1.000, p 0.06",
        ),
        ([0.2, -0.3, 0.5, -0.1, 0.3, -0.4], "A and B cannot be told apart at this size (shown would be 0.4"),
        ([1.0, 1.2, 0.9, 1.1, 1.0, 1.3, float("nan")], "B scores higher than A: difference +1.083, interval +0.900"),
    ],
)
def test_a_difference_is_told_in_words(comparing, differences, said):
    assert comparing.told(torch.tensor(differences))[0].startswith(said)


def test_batches_of_two_sizes_and_what_has_no_score_get_a_sentence(nodes, comparing, reward, scene):
    images, prompt = scene
    with pytest.raises(ValueError, match="Batch A holds 4 pictures and batch B 3"):
        compared(comparing, images, images[:3], prompt, loaded(nodes))
    with pytest.raises(ValueError, match="'images_b' holds no picture"):
        compared(comparing, images, images[:0], prompt, loaded(nodes))
    with pytest.raises(ValueError, match="No pair has two scores"):
        compared(comparing, images, torch.full_like(images, torch.nan), prompt, reward)


@pytest.mark.parametrize(("a", "b"), [((64, 64), (96, 128)), ((512, 384), (1024, 768))])
def test_pictures_of_two_sizes_stand_side_by_side(nodes, comparing, a, b):
    _, sheet, _, _ = compared(comparing, torch.rand(2, *a, 3), torch.rand(2, *b, 3), "a red circle", loaded(nodes))
    assert sheet.shape[0] == 1
    assert 350 < sheet.shape[2] < 1500


# In a server -------------------------------------------------------------------------------------------------------


def graph(prompt, **changes):
    """An even picture, checked by the toy judge, and compared with itself by a reward."""
    found = {
        "judge": ("MaskUNetJudgeLoader", {"judge_name": TOY}),
        "reward": (
            "MaskUNetRewardLoader",
            {"reward_name": TOY_REWARD, "dtype": "auto", "checkpointing": False},
        ),
        "picture": ("EmptyImage", {"width": 64, "height": 64, "batch_size": 2, "color": 8421504}),
        "check": ("MaskUNetCheckPicture", {"images": ["picture", 0], "prompt": prompt, "judge": ["judge", 0]}),
        "compare": (
            "MaskUNetCompareBatches",
            {"images_a": ["picture", 0], "images_b": ["picture", 0], "prompt": prompt, "judge": ["reward", 0]},
        ),
        "reasons": ("PreviewAny", {"source": ["check", 2]}),
        "verdict": ("PreviewAny", {"source": ["compare", 2]}),
        "sheet": ("PreviewImage", {"images": ["compare", 1]}),
    }
    return {key: {"class_type": kind, "inputs": inputs | changes.get(key, {})} for key, (kind, inputs) in found.items()}


def test_a_server_checks_and_compares(server):
    outputs = server.run(graph("a red circle"))
    assert outputs["reasons"]["text"] == ["1: no: red circle missing\n2: no: red circle missing"]
    assert outputs["verdict"]["text"] == ["A and B score alike: 2 pairs"]
    assert outputs["sheet"]["images"]


@pytest.mark.parametrize(
    ("changes", "node", "told"),
    [
        (
            {"check": {"prompt": "two clocks"}},
            "MaskUNetCheckPicture",
            'The toy judge cannot read the prompt "two clocks"',
        ),
        ({"judge": {"judge_name": "page.pth"}}, "MaskUNetJudgeLoader", "'page.pth' is not GenEval's detector"),
    ],
)
def test_a_server_tells_what_is_wrong_in_a_sentence(server, changes, node, told):
    (server.base / "models" / "judges" / "page.pth").write_text("<html>")
    with pytest.raises(ExecutionError) as caught:
        server.run(graph("a red circle", **changes))
    assert caught.value.node_type == node
    assert told in caught.value.exception_message
