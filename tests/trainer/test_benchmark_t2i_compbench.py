"""The suite `t2i-compbench` with a tiny BLIP in the published layout: from prompt lists to the table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from maskunet_core.judges.blip_vqa import BlipVqa
from maskunet_core.training.data import sha256
from tests.judge_weights import blip_vqa_weights, blobs
from trainer.__main__ import parse
from trainer.benchmark import files, noun_chunks, plan, t2i_compbench
from trainer.benchmark.files import BadSuite
from trainer.benchmark.folder import RunFolder
from trainer.benchmark.suites import Prompt
from trainer.benchmark.t2i_compbench import CompbenchJudge, as_published
from trainer.benchmark.verdicts import Verdicts

GOLDEN = Path(__file__).parent.parent / "core" / "judges" / "blip_vqa.json"
CHUNKS = {
    "color_val.txt": [("a red circle and a blue ring", [0, 12, 17, 28], [0, 28])],
    "texture_val.txt": [("a metallic ring.", [0, 15], [0, 15])],
    "shape_val.txt": [("a round circle", [0, 14], [0, 14]), ("a square", [0, 8], [0, 8])],
}
"""Prompts of each list, and the chunks by both parsers."""


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder with prompt lists, BLIP's file, and the lists' chunks."""
    folder = tmp_path_factory.mktemp("compbench")
    lists = []
    for name, rows in CHUNKS.items():
        prompts = [prompt for prompt, *_ in rows]
        (folder / name).write_bytes("\r\n".join(prompts).encode())
        other = {str(n): theirs for n, (_, mine, theirs) in enumerate(rows) if mine != theirs}
        digest = sha256("\n".join(prompts).encode())
        lists.append({"name": name, "sha256": digest, "spans": [mine for _, mine, _ in rows], "other": other})
    (folder / "chunks.json").write_text(json.dumps({"parsers": ["a", "b"], "lists": lists}))
    torch.save({"model": blip_vqa_weights(5, patches=30)}, folder / "blip.pth")
    return folder


@pytest.fixture
def lists(published, monkeypatch) -> Path:
    monkeypatch.setattr(noun_chunks, "CHUNKS", published / "chunks.json")
    monkeypatch.setattr(files, "files_in_host", lambda *kinds: [published / "blip.pth"])
    tiny = replace(plan.SUITES["t2i-compbench"], sampling=replace(plan.OF_THE_PAPER, steps=2), side=64)
    monkeypatch.setitem(plan.SUITES, "t2i-compbench", tiny)
    return published


def run(*line: str) -> None:
    arguments = parse(["benchmark", *line])
    arguments.run(arguments)


def test_the_shipped_chunks_are_of_all_prompts():
    shipped = json.loads(noun_chunks.CHUNKS.read_text(encoding="utf-8"))["lists"]
    assert [one["name"] for one in shipped] == ["color_val.txt", *CHUNKS]
    assert [len(one["other"]) for one in shipped] == [13, 13, 23, 16]
    for one in shipped:
        assert len(one["spans"]) == 300
        for spans in [*one["spans"], *one["other"].values()]:
            assert 2 <= len(spans) <= 16
            assert spans == sorted(spans)
            assert all(start < end for start, end in zip(spans[::2], spans[1::2]))


def test_each_thing_of_a_prompt_is_asked_for(lists):
    first, *_, last = t2i_compbench.prompts(lists)
    assert (first.text, first.task) == ("a red circle and a blue ring", "colour")
    assert first.facts["questions"] == ["a red circle?", "a blue ring?"]
    assert first.facts["other questions"] == ["a red circle and a blue ring?"]
    assert (last.text, last.task, last.facts["questions"]) == ("a square", "shape", ["a square?"])


def test_a_list_whose_chunks_are_not_known_is_refused(published):
    with pytest.raises(BadSuite, match=r"'color_val\.txt' is none of T2I-CompBench's published lists"):
        t2i_compbench.prompts(published)


def test_products_are_those_that_t2i_compbench_prints():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = [as_published(row["probabilities"]) for row in golden["products"]]
    assert [f"{value:.4f}" for value in found] == [row["answer"] for row in golden["products"]]
    assert sum(found) / len(found) == pytest.approx(golden["mean"], abs=1e-12)


def test_a_score_is_the_product_of_the_answers():
    blip = BlipVqa.from_tensors(blip_vqa_weights(5))
    picture, questions = blobs(64, 64, 1), ["a red circle?", "a blue ring?"]
    facts = {"questions": questions, "other questions": questions[1:]}
    found = CompbenchJudge(blip, "")([picture], [Prompt("", "colour", facts)])
    red, blue = blip.answers(picture, questions)
    assert red != pytest.approx(blue)
    assert found["score"].tolist() == pytest.approx([red * blue])
    assert found["as published"].tolist() == pytest.approx([red * blue], abs=2e-4)
    assert found["by other chunks"].tolist() == pytest.approx([blue])


def test_check_names_the_files_and_what_is_not_judged(lists, monkeypatch, capsys):
    run("check", "t2i-compbench", "--data", str(lists))
    told = capsys.readouterr().out
    assert "4 prompts, 40 pictures" in told
    assert "UniDet, its detector, is missing" in told
    monkeypatch.setattr(files, "files_in_host", lambda *kinds: [])
    run("check", "t2i-compbench")
    told = capsys.readouterr().out
    for part in (
        "until 2 September 2025: SHA-256 1e37a12c1861bf6b",
        "model_base_vqa_capfilt_large.pth (1.5 GB, https://storage.googleapis.com/sfr-vision-language-research/BLIP",
        "UniDet, its detector, is missing",
    ):
        assert part in told


def test_a_suite_runs_from_lists_to_the_table(lists, tmp_path, capsys):
    ours, theirs, samples = tmp_path / "ours", tmp_path / "theirs", tmp_path / "samples"
    run("run", "t2i-compbench", "--data", str(lists), "--images", "2", "--output", str(ours))
    told = capsys.readouterr().out
    for part in ("| colour | texture | shape |", "by other chunks", "|p4|n8|seed0|dpmpp_2m/sgm_uniform/2/7.5|blip-vqa"):
        assert part in told
    folder = RunFolder(ours)
    scores = Verdicts.of(folder, folder.methods()[0]).scores
    assert scores["blip-vqa", "score"].shape == (4, 2)
    assert not torch.equal(scores["blip-vqa", "score"][0], scores["blip-vqa", "by other chunks"][0])

    run("export", str(ours), str(samples), "--layout", "t2i-compbench")
    names = {str(path.relative_to(samples)) for path in samples.rglob("*.png")}
    assert {"colour/samples/a red circle and a blue ring_000001.png", "shape/samples/a square_000010.png"} <= names
    with Image.open(samples / "texture/samples/a metallic ring._000000.png") as picture:
        assert picture.size == (64, 64)
    score = ["t2i-compbench", "--data", str(lists), "--images", "2", "--layout", "t2i-compbench", "--name", "base"]
    run("score", str(samples), *score, "--output", str(theirs))
    run("compare", str(ours), str(theirs))
    assert capsys.readouterr().out.count("| +0.000 ± 0.000 | not known |") == 3
