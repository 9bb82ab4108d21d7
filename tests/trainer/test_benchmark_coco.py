"""The suites of COCO with a narrow Inception: captions, statistics of real pictures, distances by every protocol."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maskunet_core.judges.frechet import Gaussian, frechet_distance
from maskunet_core.judges.inception import PROTOCOLS
from tests.judge_weights import blobs, inception_weights
from trainer.__main__ import parse
from trainer.benchmark import coco, files, plan
from trainer.benchmark.files import BadSuite
from trainer.benchmark.folder import RunFolder
from trainer.benchmark.real import read_real
from trainer.benchmark.report import Verdicts, rows_of

GOLDEN = Path(__file__).parent.parent / "core" / "judges" / "inception.json"
ANNOTATIONS = [
    {"image_id": 7, "caption": "a red circle\n"},
    {"image_id": 3, "caption": " a blue  square "},
    {"image_id": 7, "caption": "another one"},
    {"image_id": 9, "caption": "a green ring"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    (folder / "captions_val2017.json").write_text(json.dumps({"annotations": ANNOTATIONS}))
    return folder


@pytest.fixture
def judges_folder(tmp_path, monkeypatch) -> Path:
    """The only place where judges lie, with a narrow Inception in the published layout."""
    convolutions = json.loads(GOLDEN.read_text(encoding="utf-8"))["convolutions"]
    save_file(inception_weights(convolutions, narrower=16), tmp_path / "inception.safetensors")
    monkeypatch.setattr(files, "_in_host", lambda: [tmp_path / "inception.safetensors"])
    monkeypatch.setattr(coco, "REFERENCES", tmp_path / "reference")
    return tmp_path


def run(*line: str) -> None:
    arguments = parse(["benchmark", *line])
    arguments.run(arguments)


def test_the_first_caption_of_each_picture_counts(data):
    found = coco.prompts(2017, 2, data)
    assert [(p.text, p.facts["image_id"]) for p in found] == [("a red circle", 7), ("a blue square", 3)]
    (data / "captions_val2014.json").write_text("[]")
    with pytest.raises(BadSuite, match="holds no captions of COCO"):
        coco.prompts(2014, 2, data)


def test_a_run_without_statistics_of_real_pictures_says_how_to_make_them(data, judges_folder):
    with pytest.raises(BadSuite, match="make them once by `reference coco2017 FOLDER`"):
        run("run", "coco2017", "--data", str(data), "--output", str(judges_folder / "run"))


def test_distances_by_every_protocol_stand_side_by_side(data, judges_folder, monkeypatch, capsys):
    real = judges_folder / "val2017"
    real.mkdir()
    pictures = [blobs(60 + 10 * n, 90, n) for n in range(4)]
    for number, picture in enumerate(pictures):
        picture.save(real / f"{number}.png")
    run("reference", "coco2017", str(real))
    run("reference", "coco2017", str(real))
    assert "is there already" in capsys.readouterr().out
    assert read_real(coco.reference_file("coco2017", "clean")).count == 4

    sampling = replace(plan.OF_THE_PAPERS_COCO, steps=2)
    monkeypatch.setitem(plan.SUITES, "coco2017", replace(plan.SUITES["coco2017"], sampling=sampling, side=64))
    output = judges_folder / "run"
    run("run", "coco2017", "--data", str(data), "--output", str(output))
    folder = RunFolder(output)
    method = folder.methods()[0]
    rows = {row["judge"]: row for row in rows_of(Verdicts.of(folder, method))}
    assert rows.keys() == {f"fid-{name}" for name in PROTOCOLS}
    inception, _ = files.loaded(coco.INCEPTION)
    of_reals = coco.features(inception, PROTOCOLS["clean"].real, pictures)
    drawn = [method.pictures(unit)[n] for unit in folder.units() for n in range(len(unit.pairs))]
    of_drawn = coco.features(inception, PROTOCOLS["clean"].drawn, drawn)
    expected = frechet_distance(of_drawn, Gaussian.of(of_reals))
    assert float(rows["fid-clean"]["all"].split(" ")[0]) == pytest.approx(expected, abs=2e-3)
    assert torch.isfinite(torch.tensor(expected))
