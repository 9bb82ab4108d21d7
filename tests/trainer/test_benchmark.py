"""Benchmarks: methods by name, runs that go on and are put together, and how sure their numbers are."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskunet_core.rewards.toy import ToyReward
from trainer.__main__ import parse
from trainer.base import load_toy_base
from trainer.benchmark import command
from trainer.benchmark import plan as plans
from trainer.benchmark.columns import to_column
from trainer.benchmark.drawing import Drawer, plain_text
from trainer.benchmark.files import BadSuite
from trainer.benchmark.folder import BadRun, RunFolder, Share, Unit, units_of
from trainer.benchmark.methods import BadMethod, Method, Part, parse_method, parse_methods
from trainer.benchmark.plan import Plan
from trainer.benchmark.repeat import commands_of
from trainer.benchmark.report import compare, write_report
from trainer.benchmark.run import draw, drawers_of, judge
from trainer.benchmark.verdicts import Verdicts, differences, measures
from trainer.job_board import InUse, OtherScale
from trainer.reward_compare.stage import Sampling

PROMPTS, IMAGES, BATCH = 5, 2, 2
WHOLE = Share()
TOY = plans.SUITES["toy"]
TINY = replace(TOY, prompts=lambda data: TOY.prompts(data)[:PROMPTS], sampling=Sampling(steps=3), images=IMAGES)


@pytest.fixture(scope="module")
def methods(files_of_methods) -> list[Method]:
    generator = f"generator:{files_of_methods / 'g.safetensors'}"
    return parse_methods([generator, f"{generator}@0", f"lora:{files_of_methods / 'lora.safetensors'}+search:fast"])


def plan(**options) -> Plan:
    return Plan(TINY, None, "toy", batch=BATCH, **options)


def do(folder: Path, methods: list[Method], share: Share = WHOLE, **options) -> RunFolder:
    run, made = RunFolder(folder), plan(**options)
    run.claim(made.settings(), made.prompts)
    with run.working(share):
        units = share.of(made.units)
        draw(made, methods, ["toy"], run, units)
        judge(run, TINY.judges(None), units)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, methods) -> RunFolder:
    return do(tmp_path_factory.mktemp("run"), methods)


def content(run: RunFolder) -> dict[str, bytes]:
    files = [path for path in run.path.glob("methods/**/*") if path.is_file()]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in files}


def verdicts(run: RunFolder) -> dict[str, Verdicts]:
    return {method.name: Verdicts.of(run, method) for method in run.methods()}


def test_texts_of_other_lengths_are_drawn_as_they_are_alone(monkeypatch):
    base = load_toy_base()
    whole = base.encode_text
    cut = {"a red circle": 4, "a blue star": 5, "a red ring": 4}
    monkeypatch.setattr(base, "encode_text", lambda text: {"cross_attn": whole(text)["cross_attn"][: cut.get(text, 4)]})
    drawer, pairs = Drawer(base, Sampling(steps=3), side=64, seed=0), [(0, 0), (1, 0), (2, 0)]
    together = drawer.pictures(pairs, list(cut))
    alone = torch.cat([drawer.pictures([pair], [text]) for pair, text in zip(pairs, cut)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_the_base_may_be_that_of_a_training(tmp_path):
    (tmp_path / "mine.toml").write_text('[base]\nbody = "transformer"\n')
    of_training, toy = replace(plan(), base=str(tmp_path / "mine.toml")), plan()
    (drawer,) = drawers_of(of_training, parse_methods([]), {})
    assert drawer.base.family is load_toy_base(body="transformer").family
    assert of_training.settings()["base"] == "mine.toml"
    assert of_training.settings()["base digest"] != toy.settings()["base digest"]


def test_methods_are_read_from_their_names():
    assert parse_method("base") == Method()
    assert parse_method("generator:a+b.safetensors@0.5+search:fast") == Method(
        (Part("generator", "a+b.safetensors", 0.5),), "fast"
    )
    both = parse_method("lora:x/y.safetensors@-1+masks:z.safetensors")
    assert str(both) == "lora:y.safetensors@-1+masks:z.safetensors"
    assert parse_methods(["search:fast", "base"]) == [Method(), Method(preset="fast")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("something", "unknown: write base, generator:FILE"),
        ("search:slow", "choose among paper, reference, fast"),
        ("search:fast+search:paper", "several searches"),
        ("generator:no_such.safetensors", "'no_such.safetensors' does not exist"),
    ],
)
def test_a_method_that_cannot_be_had_is_refused(text, told):
    with pytest.raises(BadMethod, match=told):
        parse_method(text).on(load_toy_base())


def test_files_that_ship_are_found_by_their_names():
    for name in ("generator:toy_follows.safetensors", "masks:toy_example.safetensors"):
        assert parse_method(name).parts[0].find().is_file()


def test_two_files_of_one_name_are_refused():
    with pytest.raises(BadMethod, match="rename one"):
        parse_methods(["lora:a/x.safetensors", "lora:b/x.safetensors"])


def test_every_kind_of_part_changes_the_picture_and_a_strength_of_0_does_not(files_of_methods):
    options = {"sampling": Sampling(steps=3), "side": 64, "seed": 0}
    prompts = [prompt.text for prompt in TINY.prompts(None)[:2]]

    def pictures(name: str) -> torch.Tensor:
        return Drawer.of(parse_method(name), load_toy_base(), None, **options).pictures([(0, 0), (1, 0)], prompts)

    plain = pictures("base")
    assert plain.shape == (2, 64, 64, 3)
    for kind, file in (("generator", "g"), ("masks", "m"), ("lora", "lora"), ("full", "full")):
        name = f"{kind}:{files_of_methods / file}.safetensors"
        assert not torch.equal(pictures(name), plain), kind
        assert torch.equal(pictures(f"{name}@0"), plain), kind


def test_a_search_needs_a_reward_and_finds_pictures_that_it_likes_better():
    options = {"sampling": Sampling(steps=6), "side": 64, "seed": 0}
    prompts = [prompt.text for prompt in TINY.prompts(None)[:3]]
    pairs = [(n, 0) for n in range(3)]
    searching = parse_method("search:fast")
    with pytest.raises(BadMethod, match="--reward"):
        Drawer.of(searching, load_toy_base(), None, **options)
    reward, base = ToyReward(), load_toy_base()
    drawn = [Drawer.of(m, base, reward, **options).pictures(pairs, prompts) for m in (Method(), searching)]
    plain, found = (
        torch.cat([reward.bind(p)(x[None].movedim(-1, 1)) for p, x in zip(prompts, pictures)]) for pictures in drawn
    )
    assert (found > plain).any()
    assert found.mean() > plain.mean() + 1


def test_brackets_in_a_prompt_weigh_no_word():
    clip = load_toy_base().clip
    weights = [
        {round(float(weight), 3) for _, weight in next(iter(clip.tokenize(text).values()))[0]}
        for text in ("a (red) circle", plain_text("a (red) circle"))
    ]
    assert weights == [{1.0, 1.1}, {1.0}]


def test_fewer_images_are_the_beginning_of_more():
    assert units_of(5, 1, 2) == units_of(5, 3, 2)[:3]
    assert units_of(5, 2, 2)[3] == Unit(3, ((0, 1), (1, 1)))
    assert sorted(pair for unit in units_of(5, 2, 2) for pair in unit.pairs) == [
        (p, i) for p in range(5) for i in (0, 1)
    ]


def test_methods_share_prompts_and_noises_and_a_method_that_does_nothing_differs_by_nothing(whole):
    found = verdicts(whole)
    assert next(iter(found)) == "base"
    assert sorted(found) == [
        "base",
        "generator:g.safetensors",
        "generator:g.safetensors@0",
        "lora:lora.safetensors+search:fast",
    ]
    (right, varied, frechet) = differences(found["generator:g.safetensors@0"], found["base"])
    assert right.row["all"] == "+0.000 ± 0.000"
    assert varied.row["all"] == frechet.row["all"] == "+0.000 ± 0.000"
    assert "cannot be told apart" in right.row["told"]


def test_diversity_is_of_the_prompts_with_several_pictures_and_paired_by_what_both_have(whole):
    found = verdicts(whole)
    base, mine = found["base"], found["generator:g.safetensors"]
    (measured,) = [one for one in measures(mine) if one.name == "diversity"]
    features = mine.features["reader", "features"]
    for task, told in measured.tasks.items():
        of_task = [n for n, prompt in enumerate(whole.prompts) if prompt.task == task]
        apart = torch.stack([(features[n, 0] - features[n, 1]).norm() for n in of_task])
        assert (told.mean, told.count) == (pytest.approx(apart.mean().item()), len(of_task))
    alone = {pair: row for pair, row in features.items() if pair[1] == 0}
    one_each = replace(mine, features={("reader", "features"): alone})
    assert not [one for one in measures(one_each) if one.name == "diversity"]
    for pair in ((one_each, base), (base, one_each)):
        assert [one.name for one in differences(*pair)] == ["right", "Frechet distance"]


def test_a_run_that_was_killed_between_any_two_files_ends_with_the_same_bits(whole, methods, tmp_path):
    killed = RunFolder(tmp_path / "run")
    shutil.copytree(whole.path, killed.path)
    files = sorted([*killed.path.glob("methods/*/pictures/*/samples/*"), *killed.path.glob("methods/*/judged/*/0*")])
    for path in files[1::3]:
        path.unlink()
    assert content(killed) != content(whole)
    do(killed.path, methods)
    assert content(killed) == content(whole)


def test_three_parts_that_are_merged_are_the_run(whole, tmp_path, monkeypatch):
    methods = parse_methods([])
    do(tmp_path / "1", methods, Share.parse("1/3"))
    do(tmp_path / "2", methods, Share.parse("2/3"))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    do(tmp_path / "3", methods, Share.parse(""))
    arguments = parse(["benchmark", "merge", *(str(tmp_path / part) for part in "123")])
    arguments.run(arguments)
    merged = content(RunFolder(tmp_path / "1"))
    assert merged == {name: data for name, data in content(whole).items() if name.startswith("methods/base/")}


def test_where_features_are_enough_pictures_are_removed_when_they_are_judged(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(plans.SUITES, "toy", replace(TINY, batch=BATCH, kept=3))
    monkeypatch.setattr("trainer.benchmark.run._AT_ONCE", 4)
    arguments = parse(["benchmark", "run", "toy", "--output", str(tmp_path)])
    arguments.run(arguments)
    found = RunFolder(tmp_path)
    pictures = sorted(path.parts[-3] for path in tmp_path.glob("methods/base/pictures/*/samples/*.png"))
    assert pictures == ["00000", "00001", "00002"]
    expected = {name: data for name, data in content(whole).items() if name.startswith("methods/base/")}
    assert content(found) == {name: data for name, data in expected.items() if "pictures" not in name} | {
        name: data for name, data in expected.items() if "0000.png" in name and any(n in name for n in pictures)
    }
    assert found.units() == whole.units()
    monkeypatch.setattr(Drawer, "pictures", None)
    arguments.run(arguments)
    told = json.loads((tmp_path / "table.json").read_text())
    assert told["rows"][0]["pictures"] == PROMPTS * IMAGES


def test_parts_of_different_runs_are_not_merged(whole, tmp_path):
    other, made = RunFolder(tmp_path), plan(seed=1)
    other.claim(made.settings(), made.prompts)
    with pytest.raises(BadRun, match="different runs"):
        command.merge(parse(["benchmark", "merge", str(whole.path), str(other.path)]))


@pytest.mark.parametrize("share", ["1/1", "1/3"])
def test_a_second_run_on_the_same_pictures_is_refused(whole, share):
    with whole.working(Share()), pytest.raises(InUse, match="Another process"), whole.working(Share.parse(share)):
        pass
    with whole.working(Share.parse("1/2")), whole.working(Share.parse("2/2")):
        pass


def test_a_run_with_other_settings_is_refused_and_told(whole):
    with pytest.raises(OtherScale, match=r"run\.json: seed"):
        do(whole.path, parse_methods([]), seed=1)


def test_how_to_draw_can_be_said(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(plans.SUITES, "toy", replace(TINY, batch=BATCH))
    line = "--cfg 1 --steps 2 --sampler lcm --scheduler sgm_uniform"
    arguments = parse(["benchmark", "run", "toy", *line.split(), "--output", str(tmp_path)])
    arguments.run(arguments)
    (told,) = commands_of(RunFolder(tmp_path))
    anew = parse(shlex.split(told)[3:])
    assert (anew.cfg, anew.steps, anew.sampler, anew.scheduler) == (1, 2, "lcm", "sgm_uniform")
    (signature,) = json.loads((tmp_path / "table.json").read_text())["settings"]["signatures"]
    assert signature == "toy|v1|base|toy|p5|n10|seed0|lcm/sgm_uniform/2/1.0|reader"
    with pytest.raises(OtherScale, match=r"run\.json: sampling"):
        do(tmp_path, parse_methods([]))


def test_a_sampler_that_the_host_lacks_is_told():
    for option in ("sampler", "scheduler"):
        with pytest.raises(BadSuite, match=f"ComfyUI has no {option} 'lmc': choose among .*(lcm|sgm_uniform)"):
            plan(**{option: "lmc"})


def test_a_stochastic_sampler_adds_other_noise_to_other_pictures_and_the_same_whatever_the_method():
    drawer = Drawer(load_toy_base(), Sampling(steps=3, cfg=1.0, sampler="lcm"), side=64, seed=0)
    prompt, noise = "a red circle", torch.zeros(1, 4, 8, 8)
    positive = [[drawer.base.encode_text(prompt)["cross_attn"][None], {}]]
    first, second = (drawer._sampled(drawer.base.patcher, [pair], noise, positive) for pair in ((0, 0), (0, 1)))
    assert not torch.allclose(first, second, atol=0.1)
    assert torch.equal(first, drawer._sampled(drawer.base.patcher.clone(), [(0, 0)], noise, positive))


def test_another_file_of_the_same_name_is_refused(whole, files_of_methods, tmp_path):
    shutil.copyfile(files_of_methods / "m.safetensors", tmp_path / "g.safetensors")
    with pytest.raises(OtherScale, match=r"another method of this name .*files"):
        do(whole.path, parse_methods([f"generator:{tmp_path / 'g.safetensors'}"]))


def test_pictures_laid_out_as_others_do_are_judged_as_they_were(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(plans.SUITES, "toy", replace(TINY, batch=BATCH))
    other = tmp_path / "theirs"
    for line in (
        ["export", str(whole.path), str(other), "--layout", "geneval"],
        ["score", str(other), "toy", "--layout", "geneval", "--output", str(tmp_path / "run")],
    ):
        arguments = parse(["benchmark", *line])
        arguments.run(arguments)
    facts = json.loads((other / "00001" / "metadata.jsonl").read_text())
    assert facts["prompt"] == whole.prompts[1].text
    mine, theirs = verdicts(whole)["base"], verdicts(RunFolder(tmp_path / "run"))["theirs"]
    assert torch.equal(mine.scores["reader", "right"], theirs.scores["reader", "right"])
    told = compare(RunFolder(tmp_path / "run"), whole, ["theirs", "base"])
    assert "+0.000 ± 0.000" in told
    with pytest.raises(BadRun, match="There is no 'base'"):
        compare(RunFolder(tmp_path / "run"), whole, ["base", "base"])


def test_the_report_says_what_its_numbers_are_of(whole, capsys):
    arguments = parse(["benchmark", "report", str(whole.path)])
    arguments.run(arguments)
    table = json.loads((whole.path / "table.json").read_text())
    right = table["rows"][0]
    assert (right["method"], right["measure"]) == ("base", "right")
    assert (right["prompts"], right["pictures"]) == (PROMPTS, PROMPTS * IMAGES)
    assert table["settings"]["signatures"][0] == "toy|v1|base|toy|p5|n10|seed0|ddim/normal/3/5.0|reader"
    assert "cannot be told apart at this size" in capsys.readouterr().out


def test_check_tells_time_and_disk_and_keeps_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = parse(["benchmark", "check", "toy", "--smoke"])
    arguments.run(arguments)
    told = capsys.readouterr().out
    assert "8 prompts, 8 pictures by each of 1 methods, 0.0 GB on the disk; " in told
    assert "base: " in told
    assert not list(tmp_path.iterdir())


def test_the_commands_name_all_suites():
    assert set(command.SUITE_NAMES) == plans.SUITES.keys()


def test_a_run_tells_the_command_that_makes_it_anew(whole, methods):
    (told,) = commands_of(whole)
    program, line = told.split(" benchmark ")
    assert program == "python -m trainer"
    arguments = parse(["benchmark", *shlex.split(line)])
    assert (arguments.suite, arguments.images, arguments.steps) == ("toy", IMAGES, 3)
    assert arguments.reward == ["toy"]
    assert sorted(map(str, parse_methods(arguments.method))) == sorted(map(str, methods))


# The page ----------------------------------------------------------------------------------------------------

RIGHT = {"base": [1, 0, 0, 1, 0], "generator:g.safetensors": [0, 1, 1, 1, 0]}
"""Whether each prompt's first picture is right, as the page's test has it; all others are wrong."""
PAINTED = "<b>not bold</b> </script>"


@pytest.fixture(scope="module")
def page(whole, tmp_path_factory) -> Path:
    """Of the run, with other verdicts and a reason that would be markup."""
    run = RunFolder(tmp_path_factory.mktemp("page") / "run")
    shutil.copytree(whole.path, run.path)
    for method in run.methods():
        for unit in run.units():
            rows = load_file(method.rows_file("reader", unit))
            firsts = RIGHT.get(method.name, [0] * PROMPTS)
            rows["right"] = torch.tensor([float(number == 0 and firsts[prompt]) for prompt, number in unit.pairs])
            rows["reason"] = to_column([PAINTED] * len(unit.pairs))
            method.save_rows("reader", unit, rows)
    write_report(run)
    return run.path / "page.html"


def test_the_page_shows_pictures_that_only_one_method_has_right_without_a_network(page, chromium):
    from playwright.sync_api import sync_playwright

    requests, mistakes = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        opened = browser.new_page(viewport={"width": 1440, "height": 900})
        opened.on("request", lambda request: requests.append(request.url.split(":")[0]))
        opened.on("pageerror", lambda error: mistakes.append(str(error)))
        opened.on("console", lambda message: mistakes.append(message.text))
        opened.goto(page.as_uri())

        def shown() -> list[str]:
            return opened.locator("#rows h3").all_inner_texts()

        prompts = [prompt.text for prompt in RunFolder(page.parent).prompts]
        assert opened.locator("h1").inner_text() == "toy: 3 methods against base"
        assert opened.locator("#methods .card").count() == 3
        assert len(shown()) == PROMPTS * IMAGES
        figures = opened.locator("#rows article").first.locator("figure")
        assert figures.count() == 4
        assert figures.first.locator(".badge").inner_text() == "right"
        assert PAINTED in figures.first.inner_text()
        assert figures.first.locator("img").evaluate("image => image.naturalWidth") == 64

        assert opened.locator("label", has=opened.locator("#task")).is_visible()
        assert not opened.locator("label", has=opened.locator("#score")).is_visible(), "there is one score alone"
        opened.select_option("#other", label="generator:g.safetensors")
        only_base, only_ours = (opened.locator(f"#filters [data-show={side}]") for side in ("base", "other"))
        assert only_base.inner_text() == "only base right (1 of 10)"
        assert only_ours.inner_text() == "only generator:g.safetensors right (2 of 10)"
        only_base.click()
        assert [text.split(" · ")[0] for text in shown()] == [prompts[0]]
        only_ours.click()
        assert [text.split(" · ")[0] for text in shown()] == prompts[1:3]
        opened.locator("#filters [data-show=all]").click()
        opened.select_option("#order", "loss")
        assert shown()[0].startswith(prompts[0])
        boxes = opened.locator("#rows .box")
        assert boxes.count() > 0
        assert boxes.first.is_visible()
        opened.locator("#boxes").uncheck()
        assert not boxes.first.is_visible()
        assert opened.evaluate("document.documentElement.scrollWidth") <= 1440
        assert "benchmark run toy" in opened.locator("#commands").inner_text()
        browser.close()
    assert [kind for kind in requests if kind != "data"] == ["file"]
    assert not mistakes


def test_a_page_holds_a_fair_sample_and_what_differs_most(page, monkeypatch):
    monkeypatch.setattr("trainer.benchmark.page.PICTURES", 16)
    run = RunFolder(page.parent)
    write_report(run)
    text = page.read_text(encoding="utf-8").split('id="run">')[1].split("</script>")[0]
    pictures = json.loads(text)["pictures"]
    assert (pictures["total"], len(pictures["rows"]), pictures["samples"]) == (10, 4, 2)
    assert [row["place"] for row in pictures["rows"]] == [[0, 0], [1, 0], [2, 0], [2, 1]]
    assert pictures["counts"][0]["generator:g.safetensors"] == {"base": 1, "other": 2, "both": 10}
