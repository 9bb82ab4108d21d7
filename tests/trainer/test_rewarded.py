"""Training on rewards: what a round draws, what its pictures count for, and that the policy gets better by it."""

import csv
import json

import pytest
import torch
from PIL import Image

from maskunet_core.rewards.files import BadRewardFile
from maskunet_core.toy.captions import parse
from tests.builders import in_two_processes
from trainer.base import load_toy_base
from trainer.config_file import BadConfig, load_config, parse_config
from trainer.loop import Run
from trainer.rewarded.prompts import BadPrompts, Prompts, load_prompts, tell
from trainer.rewarded.toy import ToyJudgement, toy_prompts
from trainer.train import check, load_data, make_accelerator, start

PROMPTS = ["a red circle", "a blue star", "a green ring and a red square", "a yellow cross above a blue circle"]


@pytest.fixture(scope="module")
def base():
    return load_toy_base()


def values(folder, **changes) -> dict:
    found = {
        "output": str(folder / "run"),
        "objective": "reward",
        "loop": {"steps": 4, "batch": 4, "save_every": 2, "warm_up": 0, "precision": "fp32"},
        "reward": {
            "prompts": str(folder / "prompts.txt"),
            "prompts_per_round": 2,
            "pictures_per_prompt": 2,
            "steps": 3,
        },
        "validation": {"pictures": 0},
    }
    for key, value in changes.items():
        found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    return found


@pytest.fixture
def make_run(base, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def make(**changes) -> Run:
        config = parse_config(values(tmp_path, **changes))
        return Run(config, base, load_data(config, base), make_accelerator(config))

    return make


def test_a_round_draws_what_the_policy_draws_and_its_steps_share_it(make_run):
    run = make_run(reward={"passes": 2})
    first, second, third = (run.objective.draw(step) for step in range(3))
    clean = {tuple(latent.flatten().tolist()) for latent in first.clean}
    assert clean == {tuple(latent.flatten().tolist()) for latent in second.clean}
    assert len(clean) == 4
    assert not clean & {tuple(latent.flatten().tolist()) for latent in third.clean}
    # The sampler's own noise levels, and no others.
    allowed = set(run.objective._timesteps.tolist())
    assert set(first.timesteps.tolist()) | set(second.timesteps.tolist()) <= allowed
    assert len(allowed) == 3


def test_a_round_can_be_drawn_again(make_run):
    run = make_run()
    first = run.objective.draw(0)
    run.objective._round = None
    again = run.objective.draw(0)
    assert torch.equal(first.clean, again.clean)
    assert torch.equal(first.goodness, again.goodness)


def test_pictures_are_compared_with_those_of_their_prompt(make_run):
    objective = make_run(reward={"pictures_per_prompt": 4}).objective
    goodness, spread = objective._compared(torch.tensor([0.0, 0, 0, 1, 7, 7, 7, 7]))
    assert goodness[3] > 0.5 > goodness[0]
    # None of four like pictures is good or bad, however high their rewards are.
    assert goodness[4:].tolist() == [0.5] * 4
    assert goodness[0].item() == pytest.approx(0.5 - 0.5 * 0.25 / (0.75 / 8) ** 0.5)
    assert spread == pytest.approx((0.75 / 8) ** 0.5)
    assert ((goodness >= 0) & (goodness <= 1)).all()


def test_a_picture_without_a_score_counts_for_nothing(make_run):
    objective = make_run(reward={"pictures_per_prompt": 4}).objective
    goodness, spread = objective._compared(torch.tensor([float("nan"), 0, 1, 1, 0, 1, 0, 1]))
    assert goodness[0] == 0.5
    assert goodness.isfinite().all()
    assert spread > 0
    assert goodness[1] < 0.5 < goodness[2]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_loss_at_the_policy_is_its_own_error_and_pulls_towards_good_pictures(make_run, cfg):
    run = make_run(reward={"cfg": cfg, "pull": 1.0})
    part = run.objective.prepared(run.objective.draw(0))
    part.goodness = torch.tensor([1.0, 1.0, 0.0, 0.0])
    base, unit = run.base, run.base.error_unit(run.base.sigmas(part.clean, part.timesteps), part.clean)
    with torch.no_grad(), run.method.acting(training=False):
        losses = run.objective.losses(part)
    error = (part.of_policy - part.clean) / unit
    expected = error.square().flatten(1).mean(1) / error.abs().flatten(1).mean(1)
    # At the start masks keep all, so that the trained prediction, the policy's and the base's are one.
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    with run.method.acting():
        run.objective.losses(part).mean().backward()
    gradient = next(p.grad for p in run.module.parameters() if p.grad is not None and p.grad.abs().sum() > 0)
    run.module.zero_grad()
    part.goodness = 1 - part.goodness
    with run.method.acting():
        run.objective.losses(part).mean().backward()
    opposite = next(p.grad for p in run.module.parameters() if p.grad is not None and p.grad.abs().sum() > 0)
    torch.testing.assert_close(gradient, -opposite, rtol=1e-3, atol=1e-9)
    assert base.predicts_v is False


def test_what_is_as_good_as_others_moves_nothing(make_run):
    run = make_run()
    part = run.objective.prepared(run.objective.draw(0))
    part.goodness.fill_(0.5)
    with run.method.acting():
        run.objective.losses(part).mean().backward()
    largest = max(p.grad.abs().max().item() for p in run.module.parameters() if p.grad is not None)
    assert largest < 1e-8


def test_the_policy_follows_at_the_end_of_a_round(make_run):
    run = make_run(reward={"passes": 2, "follow": 0.25})
    before = [p.clone() for p in run.objective.policy]
    run.train_step()
    assert all(map(torch.equal, before, run.objective.policy))
    run.train_step()
    expected = [torch.lerp(old, new.detach(), 0.25) for old, new in zip(before, run.module.parameters())]
    torch.testing.assert_close(run.objective.policy, expected)
    assert any(not torch.equal(old, new) for old, new in zip(before, run.objective.policy))


def test_masks_learn_a_reward_from_prompts_alone(base, tmp_path):
    """The reward is one that a few steps can raise: how much darker than grey pictures are."""

    class Darkness:
        def __call__(self, pictures, prompts):
            return 1 - pictures.mean((1, 2, 3))

    changes = {
        "loop": {"steps": 12, "batch": 16},
        "reward": {"prompts_per_round": 4, "pictures_per_prompt": 4, "passes": 1, "steps": 3},
        "optimiser": {"lr": 3e-3, "lr_bias": 3e-2},
        "generator": {"start": 0.1},
    }
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = parse_config(values(tmp_path, **changes))
    run = Run(config, base, load_data(config, base), make_accelerator(config))
    run.objective.scorer = Darkness()
    rewards = []
    for _ in range(config.loop.steps):
        run.train_step()
        rewards.append(run.objective._round.rewards.mean().item())
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.01


def test_a_run_writes_what_the_loader_reads_and_says_whether_it_helped(tmp_path, capsys):
    changes = {"reward": {"prompts": ""}, "validation": {"pictures": 4, "every": 2}}
    path = start(parse_config(values(tmp_path, **changes)))
    from maskunet_core.files import checkpoint

    assert checkpoint.load(path).targets == "decoder attention"
    with (tmp_path / "run" / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    assert set(rows[0]) == {
        "step",
        "reward",
        "change",
        "error",
        "right",
    }
    assert float(rows[0]["change"]) == 0
    assert "the reward of held-out prompts was" in capsys.readouterr().out
    lines = check(parse_config(values(tmp_path, output=str(tmp_path / "other"), **changes)))
    assert any("prompts, pictures of 64x64; 4 more are held out" in line for line in lines)


def test_the_best_state_is_that_of_the_highest_reward(make_run, monkeypatch):
    run = make_run(reward={"prompts": ""}, validation={"pictures": 4, "every": 1})
    measured = iter([0.0, 0.3, 0.1, float("nan"), 0.2])
    found = lambda: {"reward": 0.0, "change": next(measured), "error": 0.0}  # noqa: E731
    monkeypatch.setattr(run.validator, "measure", found)
    run.run()
    assert run.best["step"] == 1
    assert run.validator.stale == 3


def test_prompts_come_from_a_file_or_captions(tmp_path):
    file = tmp_path / "prompts.txt"
    text = "\ufeffa red circle\r\n\r\n# a remark\r\na blue\u2028star\r\na red circle\r\n"
    file.write_bytes(text.encode())
    config = parse_config(values(tmp_path))
    prompts = load_prompts(config)
    assert prompts.texts == ["a red circle", "a blue\u2028star"]
    assert prompts.notes == [f"Left out of '{file}': 1 lines that begin with #, 1 lines that repeat another."]
    for content, sentence in (
        (b"# nothing\n", "holds no prompt"),
        ("a red circle".encode("utf-16"), "is not UTF-8 text"),
        ("a red circle".encode("utf-16-le"), "is not UTF-8 text"),
        (b"a dog\na red circle\na cat", r'^2 of 3 prompts cannot be trained on, .* cannot read the prompt "a dog"'),
        (b"dog " * 100, r'cannot read the prompt "(dog ){50}\.\.\."'),
    ):
        file.write_bytes(content)
        with pytest.raises(BadPrompts, match=sentence):
            load_prompts(config)


def test_captions_are_prompts_and_what_is_left_out_of_them_is_counted(base, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n, caption in enumerate(["a red circle", "a blue star " * 20, "", "a red circle"]):
        Image.new("RGB", (64, 64)).save(pictures / f"{n}.png")
        (pictures / f"{n}.txt").write_text(caption)
    (pictures / "4.gif").touch()
    changes = {"reward": {"prompts": "", "models": {"toy": 1.0}}, "data": {"path": str(pictures)}}
    config = parse_config(values(tmp_path, **changes))
    with pytest.raises(BadPrompts, match="1 of 2 prompts cannot be trained on"):
        load_prompts(config)
    (pictures / "1.txt").write_text("what I saw " * 20 + "a blue star")
    assert load_data(config, base).texts == ["a red circle", ("what I saw " * 20 + "a blue star")]
    told = capsys.readouterr().out
    assert "Left out: 1 pictures of kinds that are not read (4.gif)" in told
    assert f"Left out of '{pictures}': 1 captions that are empty, 1 captions that repeat another." in told


def test_prompts_that_are_cut_are_counted(base, capsys):
    tell(Prompts(["a red circle left of a small blue square", "a red circle and " * 9]), base)
    assert "Cut: 1 prompts have more tokens than the text encoder takes at once, of 'a red circle and" in (
        capsys.readouterr().out
    )


def test_a_reward_that_cannot_be_read_is_told_by_check(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "reward.pt").write_text("no tensors")
    config = parse_config(values(tmp_path, reward={"models": {str(tmp_path / "reward.pt"): 1.0}}))
    with pytest.raises(BadRewardFile, match=r"'reward\.pt' is neither a safetensors file nor"):
        check(config)


def test_held_out_prompts_are_not_trained_on():
    training, held_out = Prompts([f"prompt {n}" for n in range(10)]).split(5, 0)
    assert len(held_out) == 2
    assert not set(training.texts) & set(held_out.texts)
    training, held_out = Prompts(*toy_prompts(300, 40)).split(30, 0)
    assert len(held_out) == 30
    assert all(parse(text).held_out for text in held_out.texts)
    assert not any(parse(text).held_out for text in training.texts)


def test_the_toys_judgement_is_the_reading_plus_a_part_of_its_probability():
    judgement = ToyJudgement()
    scores = judgement.bind("a red circle")(torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert ((scores >= -0.5) & (scores <= 0)).all()


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("loop.batch=7", "loop.batch: is 7, but must divide the 128 that a round learns from"),
        ("reward.models={nothing = 1}", "reward.models: 'nothing' does not exist"),
        ("reward.sampler=euler_b", "reward.sampler: is 'euler_b', which this ComfyUI does not have"),
        ("reward.prompts=nowhere.txt", "reward.prompts: the file 'nowhere.txt' does not exist"),
        ("reward.pictures_per_prompt=1", "must be at least 2"),
        ("prior.prompt=a dog", "prior.prompt: class pictures need"),
    ],
)
def test_contradictions_are_told(assignment, sentence):
    with pytest.raises(BadConfig, match=sentence.replace(".", r"\.").replace("(", r"\(")):
        load_config("toy", ["objective=reward", assignment])


def test_published_rewards_score_each_picture_for_its_prompt(tmp_path):
    """A reward in the layout of a published file, through the folder of models."""
    from maskunet_core.rewards.files import load
    from tests.reward_files import image_reward_tensors
    from trainer.rewarded.scorer import Scorer

    path = tmp_path / "reward.pt"
    torch.save(image_reward_tensors(), path)
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = Scorer({str(path): 2.0}, torch.device("cpu"))(pictures, ["a cat", "a dog", "a cat"])
    reward = load(path, [], torch.float32)
    with torch.no_grad():
        expected = [2 * reward.bind(p)(pictures[n : n + 1]) for n, p in enumerate(["a cat", "a dog", "a cat"])]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_a_run_that_was_stopped_within_a_round_goes_on_with_the_same_bits(make_run, tmp_path):
    changes = {
        "reward": {"passes": 3},
        "loop": {"steps": 8, "save_every": 1},
        "optimiser": {"lr": 1e-2, "lr_bias": 0.5},
    }
    whole = make_run(**changes)
    for _ in range(8):
        whole.train_step()
    stopped = make_run(**changes)
    for _ in range(5):
        stopped.train_step()
    stopped.save_state()
    resumed = make_run(**changes)
    resumed.load_state()
    for _ in range(3):
        resumed.train_step()
    assert resumed.step == whole.step == 8
    assert all(map(torch.equal, resumed.module.parameters(), whole.module.parameters()))
    assert all(map(torch.equal, resumed.objective.policy, whole.objective.policy))
    assert resumed.objective.spread == whole.objective.spread
    assert any(not torch.equal(p, q) for p, q in zip(whole.objective.policy, whole.module.parameters()))


def test_a_state_of_before_there_were_rewards_can_be_resumed(base, tmp_path):
    """What a version saved that did not know the keys yet."""
    config = parse_config({"output": str(tmp_path / "run"), "data": {"pictures": 20}, "loop": {"steps": 2, "batch": 2}})
    run = Run(config, base, load_data(config, base), make_accelerator(config))
    run.save_state()
    state = torch.load(run.state_file, weights_only=True)
    saved = json.loads(state["config"])
    del saved["objective"], saved["reward"], state["objective"]
    torch.save(state | {"config": json.dumps(saved)}, run.state_file)
    run.load_state()


def test_two_processes_share_the_drawing(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    one, two = (values(tmp_path, output=str(tmp_path / name), loop={"steps": 3}) for name in ("one", "two"))
    start(parse_config(one))
    assignments = [
        f"--set={key}.{inner}={json.dumps(value)}"
        for key, table in two.items()
        if isinstance(table, dict)
        for inner, value in table.items()
    ]
    words = ("train", "toy", "--set=objective=reward", f"--set=output={tmp_path / 'two'}", *assignments)
    result = in_two_processes("-m", "trainer", *words)
    assert result.returncode == 0, result.stderr
    losses = []
    for name in ("one", "two"):
        with (tmp_path / name / "log.csv").open() as file:
            losses.append([(float(row["loss"]), float(row["reward"])) for row in csv.DictReader(file)])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-4)
