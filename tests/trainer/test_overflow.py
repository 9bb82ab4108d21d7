"""Losses and gradients that are not finite cost the samples and steps that they come from, never a run."""

import contextlib
import csv
import json
import logging
import math
import sys

import pytest
import torch

from maskunet_core.files import checkpoint
from maskunet_core.training import run as training
from maskunet_core.training.run import Diverged
from tests.builders import in_two_processes
from trainer.base import load_toy_base
from trainer.config import to_toml_values
from trainer.config_file import parse_config
from trainer.host import PROJECT
from trainer.loop import Run
from trainer.train import load_data, make_accelerator


@pytest.fixture
def base():
    return load_toy_base()


def config_of(folder, **changes):
    values = {
        "output": str(folder / "run"),
        "data": {"pictures": 48},
        "loop": {"steps": 4, "batch": 8, "precision": "fp32", "save_every": 2},
        "validation": {"pictures": 0, "every": 0},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value}
    return parse_config(values)


def make_run(config, base, accelerator=None) -> Run:
    run = Run(config, base, load_data(config, base), accelerator or make_accelerator(config))
    run.log.truncate(0)
    return run


@contextlib.contextmanager
def overflowing(base, timesteps):
    """The activations of samples with these timesteps are infinite in the U-Net's last decoder block, as in fp16."""
    rows = torch.empty(0)

    def look(module, arguments):
        nonlocal rows
        rows = torch.isin(arguments[1].round().long().cpu(), torch.as_tensor(timesteps))

    def overflow(module, arguments, output):
        return torch.where(rows.view(-1, 1, 1, 1), math.inf, output)

    # The block's output enters its transformer, so that the masked layers of the sample see infinite inputs.
    hooks = [base.unet.register_forward_pre_hook(look)]
    hooks += [base.unet.output_blocks[-1][0].register_forward_hook(overflow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gradients_of(run) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in run.module.parameters()])


def snapshot(run) -> list[torch.Tensor]:
    moments = [value for state in run.optimiser.state.values() for value in state.values()]
    return [value.detach().clone() for value in [*run.module.parameters(), *moments, *(run.average or [])]]


def rows_of(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_sample_that_overflows_costs_its_share_of_the_gradient_alone(base, tmp_path, accumulate):
    run = make_run(config_of(tmp_path, loop={"accumulate": accumulate}), base)
    batch = run.objective.batches.draw(0)
    others = torch.arange(8) != 2
    with run.method.acting():
        whole = base.diffusion_loss(
            batch.clean[others],
            {key: value[others] for key, value in batch.conditions.items()},
            batch.timesteps[others],
            batch.noise[others],
        )
        (whole.sum() / 8).backward()
    expected = gradients_of(run)
    run.optimiser.zero_grad()
    with overflowing(base, batch.timesteps[2:3]):
        losses, lost, finite = run._gradients()
    assert (lost, finite) == (1, True)
    assert (gradients_of(run) - expected).norm() < 1e-4 * expected.norm()
    torch.testing.assert_close(torch.tensor(losses), whole.detach())


def test_a_lost_sample_is_told_and_the_run_goes_on(base, tmp_path, caplog):
    run = make_run(config_of(tmp_path), base)
    with overflowing(base, run.objective.batches.draw(1).timesteps[:2]), caplog.at_level(logging.WARNING):
        path = run.run()
    assert [(row["step"], row["samples"], row["whole_step"]) for row in rows_of(run.folder / "left_out.csv")] == [
        ("2", "2", "0")
    ]
    assert "The losses of 2 samples were not finite at step 2" in caplog.text
    assert "In all 2 samples were left out and 0 steps updated nothing" in caplog.text
    assert all(math.isfinite(float(row["loss"])) for row in rows_of(run.folder / "log.csv"))
    assert all(torch.isfinite(p).all() for p in run.module.parameters())
    assert checkpoint.load(path).training["step"] == 4


def test_many_lost_samples_are_told_now_and_then(base, tmp_path, caplog):
    run = make_run(config_of(tmp_path), base)
    run.left_out.count(1, False)
    with caplog.at_level(logging.WARNING):
        for _ in range(99):
            run.log.step(run, 1.0, observed=False)
    assert len(caplog.records) == 2
    assert len(rows_of(run.folder / "left_out.csv")) == 99


def test_a_step_without_a_finite_loss_changes_nothing(base, tmp_path):
    run = make_run(config_of(tmp_path, loop={"ema": 0.5}), base)
    run.train_step()
    before = snapshot(run)
    with overflowing(base, run.objective.batches.draw(1).timesteps):
        loss = run.train_step()
    assert math.isnan(loss)
    assert run.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True))
    assert math.isfinite(run.train_step())
    assert not all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True))
    assert (run.left_out.samples, run.left_out.steps, run.left_out.in_a_row) == (8, 1, 0)


def test_gradients_that_overflow_behind_finite_losses_change_nothing(base, tmp_path, caplog):
    run = make_run(config_of(tmp_path), base)
    run.train_step()
    before = snapshot(run)
    hook = next(run.module.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with caplog.at_level(logging.WARNING):
        run.log.step(run, run.train_step(), observed=False)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True))
    assert (run.left_out.samples, run.left_out.steps) == (0, 1)
    assert "The gradients were not finite at step 2, which updates nothing" in caplog.text


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_fp16s_loss_scale_falls_where_gradients_overflow(base, tmp_path, clip):
    """GradScaler, as accelerate brings it for fp16 on a GPU."""
    config = config_of(tmp_path, optimiser={"clip": clip})
    accelerator = make_accelerator(config)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run = make_run(config, base, accelerator)
    run.train_step()
    before = snapshot(run)
    hook = next(run.module.parameters()).register_hook(lambda gradient: gradient * math.inf)
    run.train_step()
    hook.remove()
    assert accelerator.scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True))
    with overflowing(base, run.objective.batches.draw(2).timesteps):
        run.train_step()
    assert accelerator.scaler.get_scale() == 2.0**9
    run.train_step()
    assert not all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True))


@pytest.mark.parametrize(("precision", "advice"), [("bf16", ", or with loop.precision fp32."), ("fp32", "lr_bias.")])
def test_a_run_that_has_diverged_stops_with_a_sentence(base, tmp_path, monkeypatch, precision, advice):
    monkeypatch.setattr(training, "PATIENCE", 3)
    run = make_run(config_of(tmp_path, loop={"steps": 40, "batch": 2, "precision": precision}), base)
    run.train_step()
    with overflowing(base, range(1000)):
        run.train_step()
        run.train_step()
    run.train_step()
    with overflowing(base, range(1000)), pytest.raises(Diverged) as raised:
        run.run()
    assert "were not finite in each of the 3 steps up to step 7. The last good state is in" in str(raised.value)
    assert str(raised.value).endswith(advice)
    assert torch.load(run.state_file, weights_only=True)["step"] == 6
    assert all(torch.isfinite(p).all() for p in run.module.parameters())


def test_what_was_left_out_is_still_known_after_a_resume(base, tmp_path):
    run = make_run(config_of(tmp_path), base)
    with overflowing(base, run.objective.batches.draw(0).timesteps):
        run.train_step()
    run.save_state()
    again = make_run(config_of(tmp_path), base)
    again.load_state()
    assert again.left_out == run.left_out
    assert (again.left_out.steps, again.left_out.in_a_row) == (1, 1)


# Validation -----------------------------------------------------------------------------------------------------


def test_held_out_losses_that_overflow_are_left_out(base, tmp_path, caplog):
    run = make_run(config_of(tmp_path, validation={"pictures": 8, "every": 2}), base)
    run.train_step()
    whole = run.validator.measure()
    timestep = run.validator._timesteps[5:6]
    with overflowing(base, timestep), caplog.at_level(logging.WARNING):
        found = run.validator.measure()
    assert all(math.isfinite(value) for value in found.values())
    assert found["loss"] != whole["loss"]
    assert "Validation at step 1: 1 of 32 held-out losses are not finite and left out." in caplog.text


def test_a_validation_without_a_finite_loss_is_never_the_best(base, tmp_path):
    run = make_run(config_of(tmp_path, validation={"pictures": 8, "every": 2}), base)
    with overflowing(base, range(1000)):
        run.validate()
    assert run.best is None
    run.validator._base = None
    path = run.run()
    assert run.best is not None
    assert math.isfinite(checkpoint.load(path).training["validation"]["change"])


# Several processes ----------------------------------------------------------------------------------------------

IN_TWO_PROCESSES = """
import json, math, pathlib, sys
sys.path.insert(0, {project!r})
from tests.trainer.test_overflow import make_run, overflowing
from trainer.host import enter_host
enter_host()
from trainer.base import load_toy_base
from trainer.config_file import parse_config

base = load_toy_base()
run = make_run(parse_config(json.loads({values!r})), base)
run.train_step()
# All samples of the second process.
with overflowing(base, run.objective.batches.draw(1).timesteps[4:]):
    loss = run.train_step()
total = sum(p.double().sum().item() for p in run.module.parameters())
found = [run.accelerator.process_index, loss, run.left_out.samples, run.left_out.steps, total]
# Lines that two processes print at once may come as one.
pathlib.Path({folder!r}, f"{{found[0]}}.json").write_text(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gloo needs a host name there")
def test_processes_stay_alike_where_one_has_no_finite_loss(tmp_path):
    values = json.dumps(to_toml_values(config_of(tmp_path)))
    script = tmp_path / "two.py"
    texts = {"project": str(PROJECT), "values": values, "folder": str(tmp_path)}
    script.write_text(IN_TWO_PROCESSES.format(**texts), encoding="utf-8")
    result = in_two_processes(str(script))
    assert result.returncode == 0, result.stderr
    told = [json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2)]
    assert [process for process, *_ in told] == [0, 1]
    assert told[0][1:] == told[1][1:]
    assert math.isfinite(told[0][1])
    assert told[0][2:4] == [4, 0]
