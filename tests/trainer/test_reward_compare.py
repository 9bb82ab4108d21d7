"""The comparison of searches, on few prompts."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from maskunet_core.rewards.toy import ToyReward
from trainer import job_board
from trainer.base import load_toy_base
from trainer.reward_compare import jobs, plan, report
from trainer.reward_compare.costs import Operations
from trainer.reward_compare.rivals import Steering, optimise_noise, optimised_noise, steered
from trainer.reward_compare.stage import Stage
from trainer.reward_compare.student import SAMPLING, TEACHER, trajectories
from trainer.toy.bodies import operations
from trainer.toy.held_out import TABLE, TUNING, held_out_prompts


@pytest.fixture(scope="module")
def stage():
    return Stage()


@pytest.fixture(scope="module")
def captions():
    return held_out_prompts(4, TABLE)


def test_settings_are_chosen_on_other_prompts_than_the_tables():
    table, tuning = (held_out_prompts(200, stream) for stream in (TABLE, TUNING))
    assert len(set(map(str, table))) == 200
    assert not set(map(str, table)) & set(map(str, tuning))
    assert all(caption.held_out for caption in table + tuning)
    assert Counter(caption.kind for caption in table) == {"two": 100, "relation": 100}
    assert Counter(caption.kind for caption in table[:50]) == {"two": 25, "relation": 25}


def test_scores_of_a_mixed_batch_are_those_of_the_nodes_reward(stage, captions):
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores, gradient = stage.judge(captions).score(pictures)
    alone = torch.cat([ToyReward().bind(str(c))(picture[None]) for c, picture in zip(captions, pictures)])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_a_prompts_noise_does_not_depend_on_the_others(stage, captions):
    assert torch.equal(stage.noise(captions, 1)[2:], stage.noise(captions[2:], 1))
    assert not torch.equal(stage.noise(captions, 1), stage.noise(captions, 2))
    assert not torch.equal(stage.noise(captions, 1), stage.noise(captions, 1, number=1))


def test_operations_of_a_product_are_counted_forward_and_backward():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    with Operations() as counted:
        (a @ b).sum().backward()
    assert counted.total == 3 * (2 * 3 * 4 * 5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_are_counted_where_they_arrive_whole(mode):
    rows, weight, bias = torch.randn(2, 7, 32), torch.randn(64, 32), torch.randn(64)
    image, kernel, heads = torch.randn(1, 4, 16, 16), torch.randn(8, 4, 3, 3), torch.randn(1, 2, 16, 8)
    with mode(), Operations() as counted:
        F.linear(rows, weight, bias)
        F.conv2d(image, kernel, padding=1)
        F.scaled_dot_product_attention(heads, heads, heads)
    assert counted.total == 2 * 2 * 7 * 32 * 64 + 2 * 8 * 4 * 9 * 16 * 16 + 2 * (2 * 2 * 16 * 16 * 8)


def test_particles_follow_the_reward(stage, captions):
    steering = Steering(stage, captions[:2], particles=3, scale=1e6, every=1, seed=0)
    rewards = torch.tensor([0.0, 5.0, 1.0, 7.0, 2.0, 3.0])
    steering.judge.scores = lambda estimate: rewards
    x = torch.arange(6.0).view(6, 1, 1, 1).clone()
    options = {"transformer_options": {"sample_sigmas": torch.tensor([9.0, 5.0, 2.0, 1.0, 0.0])}}
    found = steering._predict_noise(lambda x, *_: x.clone(), x, torch.full((6,), 5.0), options, 0)
    assert x.flatten().tolist() == found.flatten().tolist() == [1, 1, 1, 3, 3, 3]


def test_steering_ends_with_the_best_particle(stage, captions):
    one, four = (stage.rewards(steered(stage, captions, particles, 0), captions) for particles in (1, 4))
    assert four.shape == (4,)
    assert four.mean() > one.mean()


def test_the_starting_noise_climbs_and_stays_likely(stage, captions):
    noise, rewards = optimise_noise(stage, captions, 0, iterations=5, lr=0.03, steps=3)
    assert torch.stack(rewards).max(0).values.mean() > rewards[0].mean()
    assert noise.flatten(1).norm(dim=1).tolist() == pytest.approx([16.0] * 4, rel=0.25)
    assert optimised_noise(stage, captions[:1], 0, iterations=1).shape == (1, 4, 8, 8)


def test_from_each_of_a_students_states_the_teacher_arrives_at_the_end(stage):
    import comfy.sample

    seen = trajectories(2)
    conditioning = [[stage.base.encode_tokens(seen["tokens"]), {}]]
    for number, state in enumerate(seen["states"].unbind(1)):
        end = comfy.sample.sample(
            stage.base.patcher,
            torch.zeros_like(state),
            TEACHER.steps,
            TEACHER.cfg,
            TEACHER.sampler,
            TEACHER.scheduler,
            conditioning,
            stage.empty,
            stage.format.process_out(state),
            start_step=number * TEACHER.steps // SAMPLING.steps,
            disable_pbar=True,
        )
        torch.testing.assert_close(seen["ends"], stage.format.process_in(end), rtol=1e-4, atol=1e-4)


def test_prompts_are_sorted_by_how_often_the_base_succeeds():
    assert report.classes_of([0, 1, 4, 5, 16], 16) == ["never", "up to 1 in 4", "up to 1 in 4", "more", "more"]


def test_errors_are_over_prompts_not_over_pictures():
    right = torch.tensor([[1, 0, 1, 0], [1, 0, 1, 0]])
    assert report.share(right) == "0.500 ± 0.289"


def test_a_method_is_measured_once_and_stands_in_the_table(tmp_path, monkeypatch):
    scale = dataclasses.replace(plan.Scale.quick(), prompts=2, batch=2, draws=2)
    few = {name: plan.METHODS[name] for name in ("base", "best of 2", "4 steps")}
    for part in (plan, report):
        monkeypatch.setattr(part, "METHODS", few)
    monkeypatch.setattr(report, "PAIRS", (("best of 2", "base"),))
    job_board.claim(tmp_path, vars(scale))
    planned, module = plan.make_plan(scale), "trainer.reward_compare.jobs"
    # All but one are done here, those that need others last; what is left has a process of its own.
    for job in sorted(planned, key=lambda job: len(job.needs)):
        if job.method != "best of 2":
            job_board.folder_of(tmp_path, job.name).mkdir(parents=True)
            job_board.write_result(tmp_path, job.name, jobs.do(tmp_path, job, scale), 0.0)
    for _ in range(2):
        job_board.run_jobs(planned, tmp_path, module, 1, lambda done: report.write_report(tmp_path, scale))
    rows = {row["method"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert rows["base"]["operations"] == 1.0
    assert rows["best of 2"]["operations"] == pytest.approx(2.0, abs=0.2)
    # 4 steps without guidance beside 15 with it.
    assert rows["4 steps"]["operations"] == pytest.approx(4 / 30, abs=0.01)
    for figure in ("accuracy_over_compute.png", "pictures.png"):
        assert (tmp_path / figure).stat().st_size > 5000
    (pair,) = json.loads((tmp_path / "differences.json").read_text())["rows"]
    right = {name: jobs.result_of(tmp_path, f"{name}/seed-0")["right"] for name in few}
    gained = sum(right["best of 2"]) / 2 - sum(right["base"]) / 2
    assert float(pair["all prompts"].split(" ± ")[0]) == gained
    assert pair["operations"] == pytest.approx(2.0, abs=0.2)
    assert jobs.result_of(tmp_path, plan.DIFFICULTY)["draws"] == 2


def test_attention_guidance_acts_on_each_prompts_own_words(stage, captions):
    before = stage.base.patcher
    costs, found = {}, {}
    for method in ("base", "Attend-and-Excite", "SynGen", "SynGen, and a generator"):
        with Operations() as counted:
            found[method] = plan.METHODS[method](stage, captions[:2], 0)
        costs[method] = counted.total
    assert stage.base.patcher is before
    base = found.pop("base")
    for latents in found.values():
        assert all(not torch.equal(mine, plain) for mine, plain in zip(latents, base))
    alone = plan.METHODS["SynGen"](stage, captions[1:2], 0)
    # Batches of other sizes round otherwise.
    torch.testing.assert_close(found["SynGen"][1:], alone, atol=1e-4, rtol=0)
    assert 1.1 < costs["SynGen"] / costs["base"] < 1.6


def test_without_guidance_a_picture_costs_half_with_a_generator_too(stage, captions):
    before, costs, found = (stage.base.patcher, stage.sampling), {}, {}
    for method in ("base", "CFG 1", "CFG 1, a generator"):
        with Operations() as counted:
            found[method] = plan.METHODS[method](stage, captions[:2], 0)
        costs[method] = counted.total
    assert (stage.base.patcher, stage.sampling) == before
    assert costs["CFG 1"] / costs["base"] == pytest.approx(0.5, abs=0.01)
    assert costs["CFG 1, a generator"] / costs["base"] == pytest.approx(0.5, abs=0.03)
    assert all(not torch.equal(*pair) for pair in zip(found["CFG 1"], found["CFG 1, a generator"]))
    alone = plan.METHODS["CFG 1, a generator"](stage, captions[1:2], 0)
    # Batches of other sizes round otherwise.
    torch.testing.assert_close(found["CFG 1, a generator"][1:], alone, atol=1e-3, rtol=0)


def test_some_methods_alone_are_planned():
    names = [job.name for job in plan.make_plan(plan.Scale.quick(), ("base", "SynGen"))]
    assert names == ["base/seed-0", "SynGen/seed-0", plan.DIFFICULTY]


def test_the_transformer_is_measured_by_the_same_methods(tmp_path, monkeypatch):
    scale = dataclasses.replace(plan.Scale.quick("transformer"), prompts=2, batch=2, draws=2)
    monkeypatch.setattr(plan, "ON_TRANSFORMER", ("base", "best of 2", "8 steps"))
    *drawing, difficulty = plan.make_plan(scale)
    names = ["base/seed-0", "best of 2/seed-0", "8 steps/seed-0"]
    assert [job.name for job in drawing] == names, "no student is trained"
    assert difficulty.name == plan.DIFFICULTY
    for job in drawing:
        job_board.folder_of(tmp_path, job.name).mkdir(parents=True)
    base, best, short = (jobs.do(tmp_path, job, scale) for job in drawing)
    unet = 2 * operations(load_toy_base())
    # As many steps as cost no more than the U-Net's 15.
    assert 0.95 < base["operations"] / (15 * unet) <= 1.01
    assert best["operations"] / base["operations"] == pytest.approx(2.0, abs=0.1)
    assert short["operations"] / base["operations"] == pytest.approx(8 / 21, rel=0.01)


def test_gradients_reach_the_noise_of_a_transformer(captions):
    stage = Stage(plan.BODIES["transformer"], body="transformer")
    _, rewards = optimise_noise(stage, captions[:2], seed=0, iterations=4, lr=0.1, steps=3)
    assert torch.stack(rewards).max(0).values.mean() > rewards[0].mean()
