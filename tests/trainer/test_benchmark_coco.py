"""The suites of COCO with a narrow Inception: captions, statistics of real pictures, distances by every protocol."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from maskunet_core.judges.clip import embedded
from maskunet_core.judges.frechet import Gaussian, frechet_distance
from maskunet_core.judges.inception import PROTOCOLS
from maskunet_core.judges.kernel import cmmd, kid
from maskunet_core.judges.pictures import central_square
from maskunet_core.rewards.clip import ClipReward
from maskunet_core.rewards.clip_layout import ClipLayout
from tests.judge_weights import blobs, dinov2_model, inception_weights, weights
from trainer.__main__ import parse
from trainer.benchmark import coco, files, plan
from trainer.benchmark.files import BadSuite
from trainer.benchmark.folder import RunFolder
from trainer.benchmark.real import read_real
from trainer.benchmark.verdicts import Verdicts, measures

GOLDEN = Path(__file__).parent.parent / "core" / "judges"
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


def _tiny_clip(path: Path) -> ClipReward:
    two_heads = ClipLayout(quick=True, image_heads=2, text_heads=2)
    return ClipReward.from_tensors("clip", load_file(path), torch.float32, scaled=False, layout=two_heads)


@pytest.fixture
def judges_folder(tmp_path, monkeypatch) -> Path:
    """The only place where judges lie, with a narrow Inception, a shallow DINOv2 and a tiny CLIP."""
    inception, clip = (json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("inception", "geneval_colour"))
    judges = [tmp_path / f"{name}.safetensors" for name in ("inception", "clip", "dinov2/model")]
    save_file(inception_weights(inception["convolutions"], narrower=16), judges[0])
    save_file(weights(clip["layout"], 21), judges[1])
    dinov2_model(seed=1).save_pretrained(judges[2].parent)
    tiny = replace(coco.CLIP_L336, holds=lambda tensors: "visual.proj" in tensors, read=_tiny_clip)
    monkeypatch.setattr(coco, "CLIP_L336", tiny)
    monkeypatch.setattr(files, "files_in_host", lambda *kinds: judges)
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


def test_check_names_all_that_is_missing_and_says_where_no_digest_is_known(data, judges_folder, monkeypatch, capsys):
    run("check", "coco2017", "--data", str(data))
    told = capsys.readouterr().out
    assert "val2017, COCO's pictures (0.8 GB, http://images.cocodataset.org/zips/val2017.zip" in told
    assert "reference coco2017 FOLDER" in told
    assert "openai/clip-vit-base-patch16 (0.6 GB, https://huggingface.co/openai/clip-vit-base-patch16; SHA-256" in told
    monkeypatch.setattr(files, "files_in_host", lambda *kinds: [])
    run("check", "coco2017")
    told = capsys.readouterr().out
    for part in (
        "captions_val2017.json (0.24 GB, http://images.cocodataset.org",
        "6726825d.pth (96 MB, https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights; SHA-256 begins",
        "dinov2_vitl14_pretrain.pth (1.22 GB, https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14; SHA-256 d5383ea8f4",
    ):
        assert part in told


def test_a_run_without_statistics_of_real_pictures_says_how_to_make_them(data, judges_folder):
    with pytest.raises(BadSuite, match="make them once by `reference coco2017 FOLDER`"):
        run("run", "coco2017", "--data", str(data), "--output", str(judges_folder / "run"))


def test_distances_by_every_protocol_stand_side_by_side(data, judges_folder, monkeypatch, capsys):
    real = judges_folder / "val2017"
    real.mkdir()
    pictures = [blobs(60 + 10 * n, 90, n) for n in range(4)]
    for number, picture in enumerate(pictures):
        picture.save(real / f"{number}.png")
    opened, read = [], Image.open
    with monkeypatch.context() as watched:
        watched.setattr(Image, "open", lambda file: opened.append(file) or read(file))
        run("reference", "coco2017", str(real))
    assert sorted(file for file in opened if isinstance(file, Path)) == sorted(real.iterdir())
    assert capsys.readouterr().out.count("wrote ") == len(PROTOCOLS) + 2
    run("reference", "coco2017", str(real))
    assert capsys.readouterr().out.count("is there already") == len(PROTOCOLS) + 2
    assert read_real(coco.reference_file("coco2017", "clean")).gaussian.count == 4

    sampling = replace(plan.OF_THE_PAPERS_COCO, steps=2)
    monkeypatch.setitem(plan.SUITES, "coco2017", replace(plan.SUITES["coco2017"], sampling=sampling, side=64))
    output = judges_folder / "run"
    run("run", "coco2017", "--data", str(data), "--output", str(output))
    folder = RunFolder(output)
    method = folder.methods()[0]
    rows = {(one.judge, one.name): one for one in measures(Verdicts.of(folder, method))}
    of_inception = {(f"fid-{name}", measure) for name in PROTOCOLS for measure in ("Frechet distance", "KID x 1000")}
    assert rows.keys() == of_inception | {("cmmd", "CMMD"), ("fd-dinov2", "Frechet distance")}
    inception, _ = files.loaded(coco.INCEPTION)
    of_reals = coco.features(inception, PROTOCOLS["clean"].real, pictures)
    drawn = [method.pictures(unit)[n] for unit in folder.units() for n in range(len(unit.pairs))]
    of_drawn = coco.features(inception, PROTOCOLS["clean"].drawn, drawn)
    dinov2, _ = files.loaded(coco.DINOV2)
    of_clip = [embedded(_tiny_clip(judges_folder / "clip.safetensors"), x, central_square) for x in (drawn, pictures)]
    expected = {
        ("fid-clean", "Frechet distance"): frechet_distance(of_drawn, Gaussian.of(of_reals)),
        ("fid-clean", "KID x 1000"): 1000 * kid(of_drawn, of_reals)[0],
        ("cmmd", "CMMD"): 1000 * cmmd(*of_clip)[0],
        ("fd-dinov2", "Frechet distance"): frechet_distance(
            dinov2.features(drawn), Gaussian.of(dinov2.features(pictures))
        ),
    }
    found = {key: rows[key].whole.mean for key in expected}
    assert found == pytest.approx(expected, abs=2e-3)
    assert all(torch.tensor(list(expected.values())).abs() > 1e-2)
