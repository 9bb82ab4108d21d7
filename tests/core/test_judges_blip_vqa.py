"""BLIP's answers, held against T2I-CompBench's own code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskunet_core.judges.blip_vqa import BlipVqa, question_ids
from maskunet_core.judges.files import BLIP_VQA, INCEPTION
from maskunet_core.rewards.files import BadRewardFile
from tests.judge_weights import blip_vqa_weights, blobs

FOLDER = Path(__file__).with_name("judges")
GOLDEN = json.loads((FOLDER / "blip_vqa.json").read_text(encoding="utf-8"))
PICTURES = list(dict.fromkeys(tuple(row["picture"]) for row in GOLDEN["rows"]))


@pytest.fixture(scope="module")
def model() -> BlipVqa:
    return BlipVqa.from_tensors(blip_vqa_weights(GOLDEN["seed"]), heads=(2, 2))


@pytest.mark.parametrize("row", GOLDEN["rows"][:7], ids=lambda row: row["question"])
def test_questions_are_read_as_by_t2i_compbench(row):
    assert question_ids(row["question"])[0].tolist() == row["ids"]


@pytest.mark.parametrize("picture", PICTURES, ids=str)
def test_answers_are_those_of_t2i_compbench(model, picture):
    rows = [row for row in GOLDEN["rows"] if tuple(row["picture"]) == picture]
    seen = model.visual_encoder(model.prepare(blobs(*picture)))
    logits = torch.cat([model(seen, question_ids(row["question"])) for row in rows])
    expected = torch.tensor([row["logits"] for row in rows])
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5
    answers = model.answers(blobs(*picture), [row["question"] for row in rows])
    assert answers == pytest.approx([row["probability"] for row in rows], abs=1e-5)


def test_pictures_are_squashed_as_pillow_does(model):
    expected = load_file(FOLDER / "blip_vqa.safetensors")["net_input"]
    found = torch.cat([model.prepare(blobs(*picture)) for picture in PICTURES])
    torch.testing.assert_close(found[:, :, ::6, ::6], expected, rtol=0, atol=1e-6)


def test_the_file_is_recognised_by_its_tensors_and_by_the_size_of_its_pictures(tmp_path):
    blip, small = tmp_path / "blip.pth", tmp_path / "small.pth"
    tensors = blip_vqa_weights(1, patches=30)
    torch.save({"model": tensors}, blip)
    torch.save({"model": blip_vqa_weights(1, patches=24)}, small)
    assert BLIP_VQA.find([small, blip]) == blip
    assert INCEPTION.find([small, blip]) is None
    assert BLIP_VQA.load(blip).visual_encoder.size == 480
    del tensors["text_decoder.cls.predictions.decoder.bias"]
    torch.save({"model": tensors}, blip)
    with pytest.raises(BadRewardFile, match=r"'blip.pth' lacks the tensor text_decoder.cls.predictions.decoder.bias"):
        BLIP_VQA.load(blip)
