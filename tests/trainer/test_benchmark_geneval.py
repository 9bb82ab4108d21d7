"""The suite `geneval` with tiny judges in the published layouts: from prompt lists to the table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from maskunet_core.judges.files import CLIP_B16, CLIP_B32, CLIP_L, DETECTOR, DETECTOR_STAND_IN
from maskunet_core.judges.geneval import Colours
from maskunet_core.judges.mask2former import Mask2Former
from maskunet_core.rewards.clip import ClipReward
from maskunet_core.rewards.clip_layout import ClipLayout
from tests.judge_files import detector_tensors
from tests.judge_weights import blobs, scaled, weights
from trainer.__main__ import parse
from trainer.benchmark import files, geneval, plan
from trainer.benchmark.clip_score import ClipScore
from trainer.benchmark.columns import seen_from_text, to_text
from trainer.benchmark.files import BadSuite
from trainer.benchmark.folder import RunFolder
from trainer.benchmark.suites import Prompt
from trainer.benchmark.verdicts import Verdicts

GOLDEN = Path(__file__).parent.parent / "core" / "judges"
FACTS = [
    {"tag": "single_object", "include": [{"class": "carrot", "count": 1}], "prompt": "a photo of a carrot (3)"},
    {
        "tag": "colors",
        "include": [{"class": "bench", "count": 1, "color": "red"}],
        "prompt": "a photo of a red bench",
    },
]


def layout(name: str):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["layout"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, FACTS)))
    return folder


@pytest.fixture(scope="module")
def clip() -> ClipReward:
    tensors = scaled(weights(layout("geneval_colour"), 21), {"positional_embedding": 0.3, "class_embedding": 0.3})
    two_heads = ClipLayout(quick=True, image_heads=2, text_heads=2)
    return ClipReward.from_tensors("clip", tensors, torch.float32, scaled=False, layout=two_heads)


def test_the_lists_of_a_suite_are_known_by_their_digests(data):
    prompts = geneval.prompts(data)
    assert [(p.text, p.task) for p in prompts] == [(facts["prompt"], facts["tag"]) for facts in FACTS]
    assert prompts[1].facts == {"include": FACTS[1]["include"]}
    assert geneval.PROMPTS.version(data).startswith("not published, SHA-256 ")


def test_check_names_every_missing_file_its_address_and_place(capsys):
    absent = ["--base", "no_base.safetensors", "--method", "lora:no_lora.safetensors"]
    arguments = parse(["benchmark", "check", "geneval", "--data", "no/such/folder", *absent])
    arguments.run(arguments)
    told = capsys.readouterr().out
    for part in (
        "evaluation_metadata.jsonl (0.1 MB, https://github.com/djghosh13/geneval",
        "SHA-256 5c48e0813e812e3c",
        "743b7d99.pth (275 MB, https://download.openmmlab.com",
        "openai/clip-vit-large-patch14 (1.71 GB",
        "to models/judges",
        "no_base.safetensors' does not exist",
        "'no_lora.safetensors' does not exist",
    ):
        assert part in told
    with pytest.raises(BadSuite, match="name that by --data"):
        geneval.prompts(None)


def shapes(width: int, patch: int) -> dict[str, torch.Tensor]:
    made = {
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.positional_embedding": ((224 // patch) ** 2 + 1, width),
        "token_embedding.weight": (49408, 512),
        "visual.proj": (width, 512),
    }
    return {name: torch.empty(shape, device="meta") for name, shape in made.items()}


def test_judges_are_recognised_by_their_tensors(tmp_path):
    detector = tmp_path / "detector.pth"
    tensors = weights(layout("mask2former"), 6)
    torch.save({"meta": {"CLASSES": ("a", "b"), "epoch": 50}, "state_dict": tensors}, detector)
    other, page = tmp_path / "other.safetensors", tmp_path / "page.pth"
    save_file({"x": torch.zeros(1)}, other)
    page.write_text("<html>")
    assert DETECTOR.find([page, other, detector]) == detector
    assert isinstance(DETECTOR.load(detector), Mask2Former)
    assert CLIP_L.find([page, other, detector]) is None
    kinds = {(1024, 14): CLIP_L, (768, 16): CLIP_B16, (768, 32): CLIP_B32}
    for sizes, kind in kinds.items():
        assert [one for one in kinds.values() if one.holds(shapes(*sizes))] == [kind]
    assert not any(one.holds(shapes(1280, 14)) for one in kinds.values())


def test_scores_by_another_detector_are_told_apart(data, clip, tmp_path, monkeypatch):
    own, other, of_clip = tmp_path / "own.pth", tmp_path / "other.safetensors", tmp_path / "clip.safetensors"
    detector = Mask2Former.from_tensors(weights(layout("mask2former"), 6))
    names = ("model.transformer_module.queries_features.weight", "class_predictor.weight")
    save_file({name: torch.zeros(1) for name in names}, other)
    save_file({"clip": torch.zeros(1)}, of_clip)
    read_as_clip = replace(CLIP_L, holds=lambda tensors: "clip" in tensors, read=lambda path: clip)
    monkeypatch.setattr(geneval, "CLIP_L", read_as_clip)
    monkeypatch.setattr(geneval, "DETECTOR_STAND_IN", replace(DETECTOR_STAND_IN, read=lambda path: detector))
    monkeypatch.setattr(files, "files_in_host", lambda *kinds: [of_clip, other])
    assert [judge.name for judge in geneval.judges(data)] == ["geneval-other-detector", "clip-l14"]
    missing = plan.SUITES["geneval"].missing(data)
    assert not any("mask2former" in line for line in missing)
    torch.save({"state_dict": weights(layout("mask2former"), 6)}, own)
    monkeypatch.setattr(files, "files_in_host", lambda *kinds: [of_clip, other, own])
    assert [judge.name for judge in geneval.judges(data)] == ["geneval", "clip-l14"]


def test_the_score_is_the_cosine_of_a_picture_and_its_prompt(data, clip):
    prompts = geneval.prompts(data)
    pictures = [blobs(64, 64, seed) for seed in (1, 2)]
    both = ClipScore("clip", clip, "")(pictures, prompts)["cosine"]
    alone = torch.cat([ClipScore("clip", clip, "")([x], [p])["cosine"] for x, p in zip(pictures, prompts)])
    torch.testing.assert_close(both, alone)
    assert both.abs().max() <= 1
    assert both[0] != both[1]


def test_what_the_detector_saw_is_kept_for_people(clip):
    detector = Mask2Former.from_tensors(detector_tensors(6))
    prompt = Prompt("", "single_object", {"include": [{"class": "carrot", "count": 99}]})
    rows = geneval.GenevalJudge(detector, Colours(clip), {})([blobs(64, 64, 2)], [prompt])
    assert to_text(rows["reason"][0]).startswith("expected carrot>=99, found ")
    seen = seen_from_text(to_text(rows["seen"][0]))
    assert {one.name for one in seen} == {"carrot", "baseball glove"}
    assert all(one.asked == (one.name == "carrot") for one in seen)
    assert all(0 <= side <= 64 for one in seen for side in one.box)


def test_a_suite_runs_from_lists_to_the_table(data, clip, tmp_path, monkeypatch):
    detector = Mask2Former.from_tensors(weights(layout("mask2former"), 6))

    def judges(folder: Path):
        return [geneval.GenevalJudge(detector, Colours(clip), {}), ClipScore("clip-l14", clip, "")]

    sampling = replace(plan.OF_THE_PAPER, steps=2)
    tiny = replace(plan.SUITES["geneval"], judges=judges, sampling=sampling, side=64)
    monkeypatch.setitem(plan.SUITES, "geneval", tiny)
    output = tmp_path / "run"
    arguments = parse(["benchmark", "run", "geneval", "--data", str(data), "--quick", "--output", str(output)])
    arguments.run(arguments)
    run = RunFolder(output)
    found = Verdicts.of(run, run.methods()[0])
    assert found.scores.keys() == {("geneval", "right"), ("clip-l14", "cosine")}
    assert found.scores["geneval", "right"].shape == (2, 1)
    rows = run.methods()[0].rows("geneval", run.units())
    for row in rows.values():
        reason = bytes(row["reason"].tolist()).decode().strip()
        assert (reason == "") == bool(row["right"])
        assert not reason or reason.startswith("expected ")
    assert run.settings["lists"]["evaluation_metadata.jsonl"].startswith("not published")
    with Image.open(run.methods()[0].picture((0, 0))) as picture:
        assert picture.size == (64, 64)
