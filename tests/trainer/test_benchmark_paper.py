"""The suite `paper`: which method is judged where, and the paper's numbers beside a run's."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskunet_core.files import checkpoint
from maskunet_core.judges.pictures import levels
from tests.builders import make_generator
from trainer.__main__ import parse
from trainer.benchmark import paper, plan
from trainer.benchmark.files import BadSuite
from trainer.benchmark.folder import BadRun, RunFolder
from trainer.benchmark.methods import parse_methods
from trainer.benchmark.real import Real
from trainer.benchmark.suites import Prompt

TASKS = {"geneval": ("colors", "position"), "t2i-compbench": ("colour", "texture", "shape")}
MEASURES = {"geneval": ("geneval", "right"), "t2i-compbench": ("blip-vqa", "as published")}


class Brightness:
    """Pictures' mean levels, as a score or as features."""

    record = {"version": 1}

    def __init__(self, name: str, measure: str, scale: float = 1.0):
        self.name, self.measure, self.scale = name, measure, scale
        features = measure == "features"
        self.real = Real.of(scale * torch.rand(8, 3, generator=torch.Generator().manual_seed(1))) if features else None

    def __call__(self, pictures, prompts):
        means = torch.stack([levels(picture).float().mean((1, 2)) / 255 for picture in pictures])
        return {self.measure: self.scale * means if self.real else means.mean(1)}


def judges_of(suite: str) -> list[Brightness]:
    if suite in MEASURES:
        return [Brightness(*MEASURES[suite])]
    return [Brightness("fid-clean", "features"), Brightness("fid-bk-sdm", "features", 8.0)]


@pytest.fixture
def small_suites(monkeypatch):
    """Two prompts of each task, two steps, and judges without weights."""
    for name in paper.SUITES:
        prompts = [Prompt(f"a red circle {n}", task) for task in TASKS.get(name, ("captions",)) for n in range(2)]
        suite = plan.SUITES[name]
        small = replace(
            suite,
            prompts=lambda data, prompts=prompts: prompts,
            judges=lambda data, name=name: judges_of(name),
            sampling=replace(suite.sampling, steps=2),
            images=1,
            side=64,
            batch=2,
            lists=(),
            weights=(),
        )
        monkeypatch.setitem(plan.SUITES, name, small)


@pytest.fixture(scope="module")
def generator(tmp_path_factory, toy_structure) -> Path:
    path = tmp_path_factory.mktemp("generator") / "g.safetensors"
    checkpoint.save(path, make_generator(toy_structure, lively=True), "decoder attention", {})
    return path


def run(*line: str) -> None:
    arguments = parse(["benchmark", *line])
    arguments.run(arguments)


def rows_of(folder: Path, table: int, suite: str, name: str, judge: str) -> list[dict]:
    rows = json.loads((folder / "paper.json").read_text())["rows"]
    keys = (table, suite, name, judge)
    return [row for row in rows if (row["table"], row["suite"], row["of"], row["judge"]) == keys]


def test_trained_methods_are_judged_on_coco_and_searches_on_the_others():
    methods = parse_methods(["generator:g.safetensors", "search:fast", "lora:l.safetensors+search:fast"])
    names = {suite: [str(method) for method in paper.methods_of(suite, methods)] for suite in paper.SUITES}
    assert names["coco2014"] == names["coco2017"] == ["base", "generator:g.safetensors"]
    assert names["geneval"] == names["t2i-compbench"] == ["base", "search:fast", "lora:l.safetensors+search:fast"]


def test_its_suites_draw_as_the_paper_does():
    samplings = {suite: plan.SUITES[suite].sampling for suite in paper.SUITES}
    assert {(s.sampler, s.scheduler, s.steps, s.cfg) for s in list(samplings.values())[:2]} == {
        ("ddim", "ddim_uniform", 50, 7.5)
    }
    assert {(s.sampler, s.scheduler, s.steps, s.cfg) for s in list(samplings.values())[2:]} == {
        ("dpmpp_2m", "sgm_uniform", 15, 7.5)
    }


def test_an_ablations_generator_stands_in_table_4_alone():
    def tables(name: str) -> list[tuple[int, str]]:
        found = paper.PUBLISHED
        return [(one.table, one.name) for one in found if one.method and re.fullmatch(one.method, name)]

    assert tables("generator:sd15.safetensors") == [(1, "MaskUNet"), (1, "MaskUNet"), (4, "MaskUNet")]
    assert tables("generator:sd15_no_t_emb.safetensors@0.5") == [(4, "MaskUNet without t_emb")]
    assert tables("generator:no sample.safetensors") == [(4, "MaskUNet without the sample")]
    assert tables("search:quality") == [(2, "SD 1.5 + MaskUNet"), (3, "SD 1.5 + MaskUNet")]


def test_a_run_of_the_paper_stands_beside_its_numbers(small_suites, generator, tmp_path, capsys):
    methods = ["--method", f"generator:{generator}", "--method", "search:fast", "--reward", "toy"]
    run("run", "paper", *methods, "--output", str(tmp_path))
    told = capsys.readouterr().out
    assert "0.10 for single objects, a misprint" in told
    assert "coco2017: the base comes nearest to the paper's 23.39 by fid-bk-sdm" in told

    here, change = (
        {
            row["judge"]: row["all"]
            for row in json.loads((tmp_path / "coco2017" / f"{table}.json").read_text())["rows"]
            if (row["method"], row["measure"]) == ("generator:g.safetensors", "Frechet distance")
        }
        for table in ("table", "differences")
    )
    (row,) = rows_of(tmp_path, 1, "coco2017", "MaskUNet", "fid-clean")
    assert (row["paper"], row["paper, more than base"]) == (21.88, "-1.510")
    assert row["here"] == here["fid-clean"] != here["fid-bk-sdm"]
    assert row["here, more than base"] == change["fid-clean"]
    assert rows_of(tmp_path, 4, "coco2017", "MaskUNet", "fid-clean")[0]["here"] == row["here"]

    colour, texture, shape = rows_of(tmp_path, 2, "t2i-compbench", "SD 1.5 + MaskUNet", "blip-vqa")
    assert [row["paper, more than base"] for row in (colour, texture, shape)] == ["+0.121", "+0.078", "+0.079"]
    assert colour["method"] == "search:fast"
    assert "±" in texture["here, more than base"]
    (empty,) = rows_of(tmp_path, 3, "geneval", "SynGen", "")
    assert (empty["paper"], empty["here"]) == (0.43, "")

    run("compare", str(tmp_path), str(tmp_path))
    assert capsys.readouterr().out.count(" minus ") == len(paper.SUITES)


def test_parts_of_a_paper_run_are_merged_suite_by_suite(small_suites, tmp_path, capsys):
    for part in ("1", "2"):
        run("run", "paper", "--part", f"{part}/2", "--output", str(tmp_path / part))
    run("merge", str(tmp_path / "1"), str(tmp_path / "2"))
    assert capsys.readouterr().out.count("files copied into") == len(paper.SUITES)
    settings = RunFolder(tmp_path / "1" / "t2i-compbench").methods()[0]
    assert len(list(settings.path.glob("pictures/*/samples/*.png"))) == 6


def test_check_names_what_each_suite_lacks_and_a_run_begins_with_nothing_missing(tmp_path, capsys):
    run("check", "paper")
    told = capsys.readouterr().out
    for suite in paper.SUITES:
        assert f"{suite}:\nMissing:" in told
    with pytest.raises(BadSuite):
        run("run", "paper", "--output", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.png"))
    with pytest.raises(BadRun, match="holds no run"):
        run("report", str(tmp_path))
