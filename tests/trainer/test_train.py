"""The training loop on the toy world, small enough to run in seconds."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from maskunet_core.files import checkpoint
from maskunet_core.training.validate import Validator
from tests.builders import in_two_processes
from trainer.base import load_toy_base
from trainer.config_checks import warnings
from trainer.config_file import load_config, parse_config
from trainer.host import PROJECT
from trainer.loop import DiskFull, Run
from trainer.methods import build_method
from trainer.run_folder import CannotResume
from trainer.train import load_data, make_accelerator, resume, start


@pytest.fixture(scope="module")
def base():
    return load_toy_base()


def small(tmp_path: Path | None = None, **changes):
    folder = tmp_path or Path("output")
    values = {
        "output": str(folder / "run"),
        "data": {"pictures": 64, "cache": str(folder / "cache")},
        "loop": {"steps": 4, "batch": 8, "save_every": 2},
        "validation": {"pictures": 8, "every": 2},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_config(values)


def make_run(config, base) -> Run:
    return Run(config, base, load_data(config, base), make_accelerator(config))


def state_of(folder: Path) -> dict:
    return torch.load(folder / "state" / "last.pt", weights_only=True)


def assert_same(first, second, path="state"):
    """Bitwise the same, at any depth; how long it took is no part of it."""
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert set(first) == set(second), path
        for key in set(first) - {"seconds", "config"}:
            assert_same(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for n, pair in enumerate(zip(first, second)):
            assert_same(*pair, f"{path}[{n}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    else:
        assert first == second, path


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# What a step learns ---------------------------------------------------------------------------------------------


def test_every_parameter_has_a_gradient_at_the_first_step(base, tmp_path):
    run = make_run(small(tmp_path), base)
    run._forward_backward(run.objective.batches.draw(0))
    for name, parameter in run.module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in base.unet.parameters())


def test_the_bias_learns_at_its_own_rate(base):
    config = load_config("toy")
    method = build_method(base, config)
    static, dynamic = method.groups()
    assert static["lr"] == config.optimiser.lr_bias
    assert sum(p.numel() for p in static["params"]) == method.structure.masked_weights
    total = sum(p.numel() for p in method.module.parameters())
    assert sum(p.numel() for p in dynamic["params"]) == total - method.structure.masked_weights


def test_the_preset_flips_bits_within_a_few_hundred_steps(base, tmp_path):
    """40 steps at ten times the rates stand for 400: what counts is learning rate times steps over start."""
    recipe = load_config("toy").optimiser
    rates = {"lr": 10 * recipe.lr, "lr_bias": 10 * recipe.lr_bias}
    run = make_run(small(tmp_path, optimiser=rates, loop={"steps": 40, "schedule": "constant"}), base)
    run.method.observe(True)
    run.train_step()
    assert run.method.statistics.keep_ratio == 1.0
    while run.step < 40:
        run.method.observe(True)
        run.train_step()
    assert 0.5 < run.method.statistics.keep_ratio < 0.999
    assert run.method.statistics.share_differing > 1e-4


@pytest.mark.parametrize(
    ("method", "sentence", "all_kept"),
    [("maskunet", "by the low-rank part alone", False), ("static_mask", "hardly a weight will be removed", True)],
)
def test_slow_biases_are_warned_of_as_they_act(base, tmp_path, method, sentence, all_kept):
    rates = {"lr": 3e-2, "lr_bias": 1e-3}
    loop = {"steps": 20, "batch": 4, "schedule": "constant"}
    run = make_run(small(tmp_path, method=method, optimiser=rates, loop=loop), base)
    (warning,) = warnings(run.config)
    assert sentence in warning
    while run.step < 20:
        run.method.observe(True)
        run.train_step()
    assert (run.method.statistics.keep_ratio == 1.0) is all_kept


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_gradient_of_the_whole_batch(base, tmp_path, parts):
    gradients = []
    for accumulate in (1, parts):
        config = small(tmp_path, loop={"accumulate": accumulate, "precision": "fp32"})
        run = make_run(config, base)
        run._forward_backward(run.objective.batches.draw(0))
        gradients.append(torch.cat([p.grad.flatten() for p in run.module.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_checkpointing_changes_no_gradient(base, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        config = small(tmp_path, loop={"checkpointing": checkpointing, "precision": "fp32"})
        run = make_run(config, base)
        run._forward_backward(run.objective.batches.draw(0))
        gradients.append(torch.cat([p.grad.flatten() for p in run.module.parameters()]))
    torch.testing.assert_close(*gradients)


def test_gumbel_noise_is_drawn_again_in_the_backward_pass(base, tmp_path):
    """With its mask made anew in the backward pass, a run with noise must still repeat bit for bit."""
    losses = []
    for _ in range(2):
        run = make_run(small(tmp_path, generator={"noise": True}), base)
        losses.append([run.train_step() for _ in range(3)])
    assert losses[0] == losses[1]


def test_min_snr_weighs_the_loss_by_timestep(base):
    clean, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([5, 300, 600, 990])
    conditions = {"cross_attn": base.encode_text("a red circle")["cross_attn"].expand(4, -1, -1)}
    with torch.no_grad():
        plain = base.diffusion_loss(clean, conditions, timesteps, noise)
        weighted = base.diffusion_loss(clean, conditions, timesteps, noise, min_snr=5.0)
    snr = base.model.model_sampling.sigma(timesteps.float()) ** -2
    torch.testing.assert_close(weighted / plain, snr.clamp(max=5.0) / snr)


def test_the_loss_of_eq_2_is_that_of_the_predicted_noise(base):
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([10, 400, 900])
    context = base.encode_text("a red circle")["cross_attn"].expand(3, -1, -1)
    alpha = (1 / (1 + base.model.model_sampling.sigma(timesteps.float()) ** 2)).view(-1, 1, 1, 1)
    with torch.no_grad():
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        predicted = base.unet(noisy, timesteps.float(), context=context, transformer_options={})
        expected = (predicted - noise).square().mean((1, 2, 3))
        found = base.diffusion_loss(clean, {"cross_attn": context}, timesteps, noise)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_ema_follows_the_weights(base, tmp_path):
    run = make_run(small(tmp_path, loop={"ema": 0.5, "steps": 3}), base)
    expected = [p.detach().clone() for p in run.module.parameters()]
    for step in range(1, 4):
        run.train_step()
        decay = min(0.5, step / (step + 10))
        expected = [decay * a + (1 - decay) * p.detach() for a, p in zip(expected, run.module.parameters())]
    trained = [p.detach().clone() for p in run.module.parameters()]
    with run.averaged():
        for found, wanted in zip(run.module.parameters(), expected):
            torch.testing.assert_close(found.detach(), wanted)
    assert all(torch.equal(p, q) for p, q in zip(run.module.parameters(), trained))


# What a run leaves ----------------------------------------------------------------------------------------------


def test_a_run_leaves_the_base_untouched_and_writes_what_the_loader_reads(tmp_path):
    prompts = ["a red circle", "a green star"]
    config = small(tmp_path, validation={"prompts": prompts, "sample_every": 2, "sample_steps": 2})
    before = {key: value.clone() for key, value in load_toy_base().unet.state_dict().items()}
    path = start(config)
    assert path == tmp_path / "run" / "run.safetensors"
    loaded = checkpoint.load(path)
    assert loaded.training["config"]["loop"]["steps"] == 4
    assert loaded.structure.family == "the MaskUNet toy model"
    after = load_toy_base().unet.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    log = rows_of(path.with_name("log.csv"))
    assert [row["step"] for row in log] == ["1", "2", "3", "4"]
    assert float(log[0]["keep_ratio"]) == 1.0
    assert int(log[0]["peak_memory_mb"]) > 100
    validations = rows_of(path.with_name("validation.csv"))
    assert [row["step"] for row in validations] == ["0", "2", "4"]
    # At the start every weight is kept: the paired difference to the base is exactly none.
    assert float(validations[0]["change"]) == 0.0
    layers = rows_of(path.with_name("layers.csv"))
    assert len(layers) == 3 * 32
    assert {row["keep_ratio"] for row in layers if row["step"] == "0"} == {"1.0"}
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == ["000002.png", "000004.png"]
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_the_best_validation_is_what_is_kept(base, tmp_path, monkeypatch):
    changes = iter([0.0, -3.0, -1.0])
    monkeypatch.setattr(Validator, "measure", lambda self: {"loss": 1.0, "change": next(changes), "error": 0.1})
    path = start(small(tmp_path))
    assert checkpoint.load(path).training["step"] == 2
    assert checkpoint.load(path).training["validation"]["change"] == -3.0


def test_a_run_stops_early_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(Validator, "measure", lambda self: {"loss": 1.0, "change": 0.0, "error": 0.1})
    path = start(small(tmp_path, loop={"steps": 40}, validation={"patience": 3}))
    assert len(rows_of(path.with_name("log.csv"))) == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_stops_the_run_and_keeps_the_last_state(base, tmp_path, monkeypatch):
    run = make_run(small(tmp_path), base)
    save = torch.save

    def full(state, file):
        if state["step"] < 4:
            return save(state, file)
        file.write(b"half")
        with open("/dev/full", "wb") as disk:
            save(state, disk)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DiskFull, match=r"No space left for '.*last.pt'. Whatever was saved before is untouched"):
        run.run()
    assert state_of(tmp_path / "run")["step"] == 2
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["last.pt"]


# Going on -------------------------------------------------------------------------------------------------------

WITH_PRIOR = {"prior": {"prompt": "a red circle", "pictures": 5, "steps": 2}}
MANY = {"loop": {"steps": 24, "batch": 4, "save_every": 3, "ema": 0.9}, "data": {"pictures": 48}}
MANY |= {"validation": {"pictures": 4, "every": 8}}


def spawn(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "trainer", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=PROJECT, env=environment, **options)


def write_config(config, path: Path) -> str:
    """A TOML file; JSON's texts, numbers, lists and booleans are TOML's."""
    from trainer.config import to_toml_values

    tables, lines = [], []
    for key, value in to_toml_values(config).items():
        if isinstance(value, dict):
            tables.append(f"[{key}]")
            tables += [f"{k} = {json.dumps(v)}" for k, v in value.items() if not isinstance(v, dict)]
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    path.write_text("\n".join(lines + tables), encoding="utf-8")
    return str(path)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        log = folder / "log.csv"
        if log.exists() and log.read_text().count("\n") > step:
            return
        time.sleep(0.005)


def prior_in(folder: Path, changes: dict) -> dict:
    """The changes, with class pictures of their own in `folder`."""
    return {key: value | {"folder": str(folder / "prior")} for key, value in changes.items()}


def kill(process: subprocess.Popen) -> None:
    time.sleep(random.Random(0).random() * 0.1)
    process.kill()
    process.communicate()


def stop(process: subprocess.Popen) -> None:
    """By Ctrl-C, which a console on Windows cannot send to one process."""
    if sys.platform == "win32":
        return kill(process)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate()
    assert process.returncode == 130
    assert "python -m trainer resume" in told
    assert "Traceback" not in told


def test_a_run_that_was_killed_and_then_stopped_goes_on_with_the_same_bits(tmp_path, capsys):
    """With class pictures, whose batches are drawn beside those of the others."""
    whole = small(tmp_path / "whole", **MANY, **prior_in(tmp_path / "whole", WITH_PRIOR))
    start(whole)
    ended = small(tmp_path / "ended", **MANY, **prior_in(tmp_path / "ended", WITH_PRIOR))
    command, folder = ("train", write_config(ended, tmp_path / "ended.toml")), Path(ended.output)
    for end, at in ((kill, 5), (stop, 13)):
        process = spawn(*command)
        wait_for_step(folder, at, process)
        end(process)
        command = ("resume", ended.output)
    saved = state_of(folder)["step"]
    assert saved < 24
    if sys.platform != "win32":
        # Ctrl-C saves the step that it ended.
        assert saved >= 13
        assert len(rows_of(folder / "log.csv")) == saved
    resume(folder)
    assert "after 24 steps" in capsys.readouterr().out
    assert_same(state_of(Path(whole.output)), state_of(folder))
    first, second = (rows_of(Path(c.output) / "log.csv") for c in (whole, ended))
    assert [(r["step"], r["loss"]) for r in first] == [(r["step"], r["loss"]) for r in second]
    first, second = (checkpoint.load(c.result).generator.state_dict() for c in (whole, ended))
    assert_same(dict(first), dict(second))


def test_a_state_of_another_configuration_is_refused(base, tmp_path):
    make_run(small(tmp_path), base).run()
    with pytest.raises(CannotResume, match="was saved with another configuration"):
        make_run(small(tmp_path, seed=5), base).load_state()


ON_TWO_MACHINES = """
import os, sys
sys.path.insert(0, os.getcwd())
from trainer.host import enter_host
enter_host(cpu=True)
from trainer.config_file import load_config
from trainer.train import start
rank = os.environ["RANK"]
start(load_config(sys.argv[1], [f"data.cache={sys.argv[2]}/cache {rank}"]))
"""


def test_two_machines_encode_and_learn_what_one_does(tmp_path):
    """Each has a cache of its own; what they write is shared."""
    (tmp_path / "pictures").mkdir()
    for number in range(24):
        Image.new("RGB", (48 + number, 64), (10 * number, 90, 200)).save(tmp_path / "pictures" / f"{number:02}.png")
        (tmp_path / "pictures" / f"{number:02}.txt").write_text(f"a red circle {'and a blue ring ' * (number % 2)}")
    changes = {"data": {"path": str(tmp_path / "pictures"), "flip": True}, "validation": {"every": 0}}
    changes |= {"loop": {"steps": 3, "batch": 4, "precision": "fp32"}}
    one, two = small(tmp_path / "one", **changes), small(tmp_path / "two", **changes)
    start(one)
    (script := tmp_path / "script.py").write_text(ON_TWO_MACHINES)
    result = in_two_processes(str(script), write_config(two, tmp_path / "two.toml"), str(tmp_path))
    assert result.returncode == 0, result.stderr
    first, second = (state_of(Path(config.output)) for config in (one, two))
    assert torch.equal(first["data"], second["data"])
    for name, value in first["module"].items():
        torch.testing.assert_close(value, second["module"][name], rtol=1e-3, atol=1e-4)
    # Both have encoded, into the folder that they share alone.
    assert len(list((Path(two.output) / "encoded" / "latents").iterdir())) == 2
    assert not list(tmp_path.glob("cache */latents"))


def test_two_processes_learn_what_one_does(tmp_path):
    """The same global batch, shared by two processes: the same result but for float sums."""
    changes = prior_in(tmp_path, WITH_PRIOR) | {"loop": {"steps": 6, "batch": 8, "precision": "fp32"}}
    changes |= {"validation": {"every": 0}}
    one, two = small(tmp_path / "one", **changes), small(tmp_path / "two", **changes)
    start(one)
    result = in_two_processes("-m", "trainer", "train", write_config(two, tmp_path / "two.toml"))
    assert result.returncode == 0, result.stderr
    assert "on cpu, in 2 processes" in result.stdout
    first, second = (state_of(Path(config.output))["module"] for config in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)
    losses = [[float(row["loss"]) for row in rows_of(Path(c.output) / "log.csv")] for c in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
