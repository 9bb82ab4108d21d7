"""The comparison: fair by its plan, resumable, and a tiny one from end to end."""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch

from maskunet_core.errors import MaskUNetError
from maskunet_core.files import checkpoint
from maskunet_core.replacing import replacing
from maskunet_core.toy.judge import fully_right, read
from maskunet_core.toy.model import load_autoencoder, load_reader
from maskunet_core.training.seeds import seeded
from trainer import job_board
from trainer.__main__ import parse
from trainer.base import load_toy_base
from trainer.compare import jobs, measure, report
from trainer.compare.data import load_sets, make_sets, new_pictures, save_sets
from trainer.compare.jobs import GENERATOR, chosen_factor, do
from trainer.compare.plan import (
    ABLATIONS,
    ARMS,
    TRIAL_SEED,
    Job,
    Scale,
    configuration,
    make_plan,
    scale_from_values,
    scale_to_values,
)
from trainer.compare.worlds import (
    render_style,
    render_subject,
    sample_subject,
    shows_style,
    shows_subject,
    style_strength,
)
from trainer.host import PROJECT
from trainer.job_board import folder_of, result_of
from trainer.methods import build_method
from trainer.toy.world import render, sample_captioned

JOBS = "trainer.compare.jobs"
TWO_ARMS = ("static_mask", "maskunet")
TWO_ABLATIONS = ("no sample", "with feed-forward")
TINY, TINY_TRANSFORMER = (
    dataclasses.replace(Scale.quick(body), style_steps=2, style_pictures=16, pairs=16, sampling_steps=2)
    for body in ("unet", "transformer")
)


@pytest.fixture(scope="module")
def base():
    return load_toy_base()


@pytest.fixture(scope="module")
def sets(base):
    return {world: make_sets(world, TINY, base, load_reader("reader_b")) for world in ("style", "subject")}


def store(output, name, result):
    with replacing(folder_of(output, name) / "result.json") as temporary:
        temporary.write_text(json.dumps(result))


# Fairness ---------------------------------------------------------------------------------------------------------


def test_every_arm_has_as_many_trials_and_final_runs_as_every_other():
    for scale in (Scale(), Scale.quick(), Scale.of("transformer")):
        plan = make_plan(scale)
        counts = Counter((job.kind, job.task.name, job.arm) for job in plan if job.task and not job.ablation)
        for task in scale.tasks:
            for arm in task.arms:
                assert counts["trial", task.name, arm] == len(scale.factors)
                assert counts["final", task.name, arm] == scale.seeds
    assert Scale().seeds == 3
    assert len(Scale().factors) == 5


@pytest.mark.parametrize("task", [*Scale().tasks, *TINY_TRANSFORMER.tasks], ids=lambda task: f"{task.name}-{task.body}")
def test_arms_differ_in_the_method_and_its_rates_alone(task, tmp_path):
    configs = [configuration(task, arm, 1.0, 0, tmp_path) for arm in task.arms]
    for config in configs:
        assert (config.loop.steps, config.loop.batch, config.targets) == (task.steps, task.batch, task.targets)
        same = {"loop": config.loop, "data": config.data, "prior": config.prior, "targets": config.targets}
        assert same == {key: getattr(configs[0], key) for key in same}
        rates = {"lr": 0.0, "lr_bias": 0.0}
        assert dataclasses.replace(config.optimiser, **rates) == dataclasses.replace(configs[0].optimiser, **rates)


@pytest.mark.parametrize("arm", ARMS)
def test_factors_scale_all_learning_rates_of_an_arm(arm, tmp_path):
    task = Scale().tasks[0]
    one, three = (configuration(task, arm, factor, 0, tmp_path) for factor in (1.0, 3.0))
    base = load_toy_base()
    rates = [[group["lr"] for group in build_method(base, config).groups()] for config in (one, three)]
    assert rates[1] == pytest.approx([3 * rate for rate in rates[0]])


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_the_method_and_not_what_it_learns_from(name, tmp_path, base):
    task = Scale().tasks[1]
    plain, changed = (configuration(task, "maskunet", 1.0, 0, tmp_path, changes=c) for c in ({}, ABLATIONS[name]))
    assert changed != plain
    loop = dataclasses.replace(changed.loop, min_snr=plain.loop.min_snr)
    assert dataclasses.replace(changed, generator=plain.generator, targets=plain.targets, loop=loop) == plain
    assert build_method(base, changed).groups()


def test_no_seed_of_the_tables_is_used_for_tuning():
    assert TRIAL_SEED not in range(Scale().seeds)


@pytest.mark.parametrize("world", ["style", "subject"])
def test_training_validation_and_test_pictures_are_all_different(sets, world):
    found = sets[world]
    parts = [found[name].latents.flatten(1) for name in ("training", "validation_new", "test_new")]
    for n, first in enumerate(parts):
        for second in parts[n + 1 :]:
            assert torch.cdist(first, second).min() > 1e-3
    assert torch.cdist(*(found[f"{part}_old"].latents.flatten(1) for part in ("validation", "test"))).min() > 1e-3


def test_test_captions_are_held_out_of_training_and_validation():
    for world in ("noise", "style"):
        training, tested = (new_pictures(world, 64, seed, held)[1] for seed, held in ((0, False), (2, True)))
        assert not any(caption.held_out for caption in training)
        assert all(caption.held_out for caption in tested)


def test_settings_are_chosen_by_validation_alone(tmp_path):
    task = Scale().tasks[1]
    names = tuple(f"style/lora/trial-{n}" for n in range(3))
    for name, factor, score in zip(names, (1 / 3, 1.0, 3.0), (-1.0, -3.0, None)):
        store(tmp_path, name, {"factor": factor, "score": score})
    assert chosen_factor(Job("style/lora/seed-0", "final", "style", names, task, "lora"), Scale(), tmp_path) == 1.0


def test_an_arm_whose_trials_all_diverged_says_so(tmp_path):
    name = "style/lora/trial-0"
    store(tmp_path, name, {"factor": 1.0, "score": None})
    job = Job("style/lora/seed-0", "final", "style", (name,), Scale().tasks[1], "lora")
    with pytest.raises(jobs.NoSettings, match=r"lora on style"):
        chosen_factor(job, Scale(), tmp_path)


# Order --------------------------------------------------------------------------------------------------------


def test_jobs_come_after_what_they_need_and_tables_fill_evenly():
    plan = make_plan(Scale())
    places = {job.name: place for place, job in enumerate(plan)}
    assert len(places) == len(plan)
    for job in plan:
        assert all(places[need] < places[job.name] for need in job.needs)
    for task in Scale().tasks:
        for seeds in pairwise(range(3)):
            earlier, later = ([places[f"{task.name}/{arm}/seed-{seed}"] for arm in task.arms] for seed in seeds)
            assert max(earlier) < min(later)
    ablated = 3 * sum(len(task.ablations) for task in Scale().tasks)
    assert all(job.ablation for job in plan[-ablated:])
    assert not any(job.ablation for job in plan[:-ablated])


def test_one_task_leaves_out_the_others():
    worlds = {job.world for job in make_plan(Scale(), ("subject",))}
    assert worlds == {"subject"}


def test_a_scale_survives_the_way_through_a_file():
    for scale in (Scale(), Scale.quick("transformer")):
        assert scale_from_values(json.loads(json.dumps(scale_to_values(scale)))) == scale


# Worlds -------------------------------------------------------------------------------------------------------


def through_autoencoder(pictures):
    autoencoder = load_autoencoder()
    with torch.no_grad():
        return (autoencoder.decode(autoencoder.encode(pictures * 2 - 1)) / 2 + 0.5).clamp(0, 1)


def test_the_judge_reads_the_new_style_also_through_the_autoencoder():
    scenes, captions = sample_captioned(300, seeded(1))
    pictures = render_style(scenes, seeded(2))
    decoded = through_autoencoder(pictures)
    assert (decoded - pictures).square().mean().sqrt() < 0.03
    for shown in (pictures, decoded):
        assert fully_right(read(load_reader("reader_b"), shown), captions).float().mean() > 0.95


def test_the_style_is_seen_where_it_is_and_nowhere_else():
    scenes, _ = sample_captioned(500, seeded(1))
    style = render_style(scenes, seeded(2))
    assert shows_style(style).float().mean() > 0.9
    assert shows_style(through_autoencoder(style)).float().mean() > 0.9
    assert shows_style(render(scenes, seeded(3))).float().mean() < 0.01
    assert style_strength(style).mean() == pytest.approx(1.0, abs=0.03)
    assert style_strength(render(scenes, seeded(3))).mean() == pytest.approx(0.0, abs=0.03)


def test_the_subject_is_seen_where_it_is_and_nowhere_else():
    scenes, captions = sample_subject(200, seeded(1), beside=0.0)
    assert set(captions) <= {"a of star", "a small of star", "a large of star"}
    subject = render_subject(scenes, 0)
    assert shows_subject(subject).float().mean() > 0.99
    assert shows_subject(through_autoencoder(subject)).float().mean() > 0.95
    ordinary = render(sample_captioned(500, seeded(2))[0], seeded(3))
    assert shows_subject(ordinary).float().mean() < 0.01
    assert not shows_subject(subject.flip(-1)).any()


def test_sets_survive_the_way_through_a_file(sets, tmp_path):
    save_sets(sets["subject"], tmp_path / "sets.safetensors")
    loaded = load_sets(tmp_path / "sets.safetensors")
    for name, found in sets["subject"].latents.items():
        assert torch.equal(loaded[name].latents, found.latents)
        assert torch.equal(loaded[name].tokens, found.tokens)
    assert loaded["prior"].captions == ["a star"] * TINY.prior_pictures


# Measures -------------------------------------------------------------------------------------------------------


def test_a_static_mask_has_no_differing_bit_and_a_dynamic_one_has(base, sets, tmp_path):
    for arm, differs in (("static_mask", False), ("maskunet", True)):
        method = build_method(base, configuration(TINY.tasks[1], arm, 1.0, 0, tmp_path))
        with torch.no_grad():
            for name, parameter in method.module.named_parameters():
                if name.endswith(".bias") and ".codes" not in name and parameter.ndim == 2:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=seeded(1)))
        scores = measure.mask_scores(measure.mask_grid(base, method, sets["style"]["test_new"], 4, 4))
        assert 0.3 < scores["keep_ratio"] < 0.7
        for key in ("between_timesteps", "between_samples"):
            assert (scores[key] > 0) == differs, (arm, key)


def test_shares_of_differing_bits_are_counted_along_their_dimension():
    bits = torch.zeros(2, 3, 1, 4, dtype=torch.bool)
    bits[0, :, 0, 0] = True
    bits[:, 1, 0, 1] = True
    assert measure.share_differing({"layer": bits}, 0) == pytest.approx(1 / 4)
    assert measure.share_differing({"layer": bits}, 1) == pytest.approx(1 / 4)
    bits[0, 0, 0, 2] = True
    assert measure.share_differing({"layer": bits}, 0) == pytest.approx(4 / 12)
    assert measure.share_differing({"layer": bits}, 1) == pytest.approx(3 / 8)


def test_losses_are_paired(base, sets):
    first, again = (measure.losses(base, sets["style"], "test_new") for _ in range(2))
    assert torch.equal(first, again)
    mean, error = measure.change(first + 0.5, again)
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(0.0, abs=1e-6)


def test_standard_errors_are_those_of_the_mean_over_seeds():
    values = [1.0, 2.0, 6.0]
    assert report.mean_and_error(values) == (3.0, pytest.approx(statistics.stdev(values) / 3**0.5))
    assert report.mean_and_error([2.0]) == (2.0, None)
    results = [{"last": {"new": [value * 1e-4, 0.0], "old": [1e-4, 0.0]}} for value in values]
    row = report.make_row(Scale().tasks[0], "lora", results)
    assert (row["seeds"], row["new"], row["old"], row["sum"]) == (3, *map(pytest.approx, (3.0, 1.0, 4.0)))
    assert row["new_error"] == pytest.approx(2.6458 / 3**0.5, rel=1e-4)


# Jobs ---------------------------------------------------------------------------------------------------------


def test_a_finished_job_is_not_done_again(tmp_path, base):
    job = make_plan(TINY, ("style",))[0]
    store(tmp_path, job.name, {"job_seconds": 1.0, "mark": 7})
    assert do(job, TINY, tmp_path)["mark"] == 7
    assert list(folder_of(tmp_path, job.name).iterdir()) == [folder_of(tmp_path, job.name) / "result.json"]


def test_a_folder_of_another_size_is_refused(tmp_path):
    job_board.claim(tmp_path, scale_to_values(TINY))
    job_board.claim(tmp_path, scale_to_values(TINY))
    with pytest.raises(job_board.OtherScale, match="another size"):
        job_board.claim(tmp_path, scale_to_values(Scale()))


def test_a_failed_job_leaves_its_traceback_and_the_others_go_on(tmp_path, capsys):
    job_board.claim(tmp_path, scale_to_values(TINY))
    lost = Job("style/nonesuch", "data", "style")
    needing = Job("style/later", "trial", "style", ("style/nonesuch",))
    with pytest.raises(MaskUNetError, match="2 of 2 jobs failed"):
        job_board.run_jobs([lost, needing], tmp_path, JOBS, 1, lambda finished: None)
    assert "Traceback" in (folder_of(tmp_path, lost.name) / "log.txt").read_text()
    told = capsys.readouterr().out
    assert "failed: style/nonesuch" in told
    assert "left out: style/later" in told


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A comparison of the style task with two steps, two arms and ablations; the runner does the last in a process."""
    output = tmp_path_factory.mktemp("compare")
    job_board.claim(output, scale_to_values(TINY))
    jobs_of_task = [job for job in make_plan(TINY, ("style",)) if job.task in (None, TINY.tasks[1])]
    plan = [job for job in jobs_of_task if job.arm in ("", *TWO_ARMS) and job.ablation in ("", *TWO_ABLATIONS)]
    for job in plan[:-1]:
        do(job, TINY, output)
    job_board.run_jobs(plan, output, JOBS, 1, lambda finished: report.write_report(output, TINY, bool(finished)))
    return output


def test_a_comparison_writes_its_tables(done):
    table = json.loads((done / "table.json").read_text())
    rows = {row["method"]: row for row in table["rows"]}
    assert set(rows) == {"base", *TWO_ARMS}
    assert rows["base"]["new"] == 0.0
    for row in rows.values():
        assert {"one", "two", "relation", "frechet_new", "frechet_old", "diversity"} <= set(row)
    assert rows["static_mask"]["between_timesteps"] == rows["static_mask"]["between_samples"] == 0.0
    assert rows["maskunet"]["parameters"] > rows["static_mask"]["parameters"] == 524_288
    assert {(trial["method"], trial["trial"]) for trial in table["trials"]} == {("static_mask", 0), ("maskunet", 0)}
    assert [row["method"] for row in table["ablations"]] == ["maskunet", *TWO_ABLATIONS]
    assert table["machine"]["torch"]
    told = (done / "table.md").read_text()
    assert "## Style" in told
    assert "| maskunet | 1 |" in told


def test_a_comparison_writes_its_figures(done):
    names = {"gain_and_forgetting.png", "pictures_style.png", "masks_style.png", "pca_style.png"}
    assert {path.name for path in (done / "figures").iterdir()} == names
    for name in names:
        assert (done / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_the_first_masks_are_left_for_the_nodes(done, toy_structure):
    file = checkpoint.load(folder_of(done, "style/maskunet/seed-0") / GENERATOR)
    file.require_fit(toy_structure)
    left = [path.parent for path in done.rglob(GENERATOR)]
    assert left == [folder_of(done, "style/maskunet/seed-0")]


def test_on_the_transformer_its_own_attention_is_tuned_from_its_own_losses(tmp_path):
    plan = {job.name: job for job in make_plan(TINY_TRANSFORMER)}
    names = ("style/data", "style/maskunet/trial-0", "style/bias per group/seed-0")
    data, _, final = (do(plan[name], TINY_TRANSFORMER, tmp_path) for name in names)
    sets = load_sets(folder_of(tmp_path, "style/data") / "sets.safetensors")
    expected = measure.losses(load_toy_base("", "transformer"), sets, "test_old").mean().item()
    assert data["losses"]["test_old"] == pytest.approx(expected)
    assert final["parameters"] == 990_880 - 655_360 * 7 // 8
    assert 0 < final["masks"]["keep_ratio"] < 1
    assert {"style", "frechet_old"} <= set(final["pictures"])
    report.write_report(tmp_path, TINY_TRANSFORMER, figures=False)
    assert "2 steps of 16, on all attention of the toy transformer." in (tmp_path / "table.md").read_text()


def with_states(*arguments):
    """The configuration of a run that saves its state at every second step."""
    config = configuration(*arguments)
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, save_every=2))


KILLED_AT_ITS_FOURTH_STEP = """
import os
from tests.trainer.test_compare import jobs, with_states

train_step = jobs._Run.train_step
jobs.configuration = with_states
jobs._Run.train_step = lambda run: os._exit(9) if run.step == 3 else train_step(run)
jobs.main()
"""
"""Nothing of a process is run after `_exit`, as after a kill."""


def test_a_killed_job_goes_on_from_its_state_and_ends_the_same(done, tmp_path, monkeypatch):
    """Killed after its first saved state, it does the rest alone; the result has the same numbers."""
    scale = dataclasses.replace(TINY, style_steps=5)
    job_board.claim(tmp_path, scale_to_values(scale))
    monkeypatch.setattr(jobs, "configuration", with_states)
    plan = {job.name: job for job in make_plan(scale, ("style",))}
    data = folder_of(tmp_path, "style/data")
    data.parent.mkdir(parents=True)
    data.symlink_to(folder_of(done, "style/data"))
    job = plan["style/static_mask/trial-0"]
    expected = do(job, scale, tmp_path)
    folder = folder_of(tmp_path, job.name)
    (folder / "result.json").unlink()

    command = [sys.executable, "-c", KILLED_AT_ITS_FOURTH_STEP, str(tmp_path), job.name]
    killed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    state = folder / "run" / "state" / "last.pt"
    assert torch.load(state, weights_only=True)["step"] == 2
    train_step, steps = jobs._Run.train_step, []
    monkeypatch.setattr(jobs._Run, "train_step", lambda run: steps.append(run.step) or train_step(run))
    found = do(job, scale, tmp_path)
    assert steps == [2, 3, 4]
    assert {key: found[key] for key in ("new", "old", "score")} == {
        key: expected[key] for key in ("new", "old", "score")
    }
    assert result_of(tmp_path, job.name) == found
    assert not state.exists()


def test_a_state_of_other_settings_is_not_gone_on_from(done, tmp_path):
    data = folder_of(tmp_path, "style/data")
    data.parent.mkdir(parents=True)
    data.symlink_to(folder_of(done, "style/data"))
    job = next(job for job in make_plan(TINY, ("style",)) if job.name == "style/static_mask/trial-0")
    state = folder_of(tmp_path, job.name) / "run" / "state" / "last.pt"
    state.parent.mkdir(parents=True)
    torch.save({"config": "of another version"}, state)
    assert do(job, TINY, tmp_path)["score"] == result_of(done, job.name)["score"]


def test_the_command_tells_what_it_can_do(capsys):
    with pytest.raises(SystemExit):
        parse(["compare", "--help"])
    told = capsys.readouterr().out
    assert all(option in told for option in ("--quick", "--output", "--jobs", "--task"))
