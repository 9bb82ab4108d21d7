"""The trainer's commands on the toy world, small enough to run in seconds."""

import json
import subprocess
import sys

import pytest
import torch

from maskunet_core import checkpoint
from maskunet_core.sources import GeneratorMasks
from maskunet_core.toy.model import load_reader, read_weights
from tests.builders import make_generator
from trainer.base import load_base, sample_pictures
from trainer.config import load_config, parse_config
from trainer.host import PROJECT
from trainer.seeds import seeded
from trainer.toy.data import latent_set
from trainer.toy.judge import fully_right, read
from trainer.toy.world import sample_captioned
from trainer.train import MaskStatistics, build_generator, parameter_groups, train, training_step


@pytest.fixture(scope="module")
def base():
    return load_base()


@pytest.fixture(scope="module")
def data(base):
    return latent_set(64, seeded(0), base.vae.first_stage_model)


def small(**changes):
    values = {"data": {"pictures": 64}, "optimiser": {"steps": 4, "batch": 8}} | changes
    return parse_config(values)


def test_every_parameter_has_a_gradient_at_the_first_step(base, data):
    config = load_config("toy")
    generator = build_generator(base, config)
    training_step(base, GeneratorMasks(generator, trainable=True), data, config, 0)
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in base.unet.parameters())


def test_the_bias_learns_at_its_own_rate(base):
    config = load_config("toy")
    generator = build_generator(base, config)
    static, dynamic = parameter_groups(generator, config)
    assert static["lr"] == config.optimiser.lr_bias
    assert sum(p.numel() for p in static["params"]) == generator.structure.masked_weights
    total = sum(p.numel() for p in generator.parameters())
    assert sum(p.numel() for p in dynamic["params"]) == total - generator.structure.masked_weights


def test_the_preset_flips_bits_within_a_few_hundred_steps(base, data):
    """40 steps at ten times the rates stand for 400: what counts is learning rate times steps over start."""
    recipe = load_config("toy")
    config = small(optimiser={"lr": 10 * recipe.optimiser.lr, "lr_bias": 10 * recipe.optimiser.lr_bias, "batch": 8})
    generator = build_generator(base, config)
    statistics = MaskStatistics()
    source = GeneratorMasks(generator, trainable=True, observe=statistics)
    optimiser = torch.optim.AdamW(parameter_groups(generator, config), eps=recipe.optimiser.eps, weight_decay=0.0)
    for step in range(40):
        statistics.reset()
        training_step(base, source, data, config, step)
        if step == 0:
            assert statistics.keep_ratio == 1.0
        optimiser.step()
        optimiser.zero_grad()
    assert 0.5 < statistics.keep_ratio < 0.999
    assert statistics.share_differing > 1e-4


def test_training_leaves_the_base_untouched_and_writes_what_the_loader_reads(tmp_path):
    path = tmp_path / "made" / "generator.safetensors"
    assert train(small(output=str(path)), progress=False) == path
    loaded = checkpoint.load(path)
    assert loaded.training["config"]["optimiser"]["steps"] == 4
    assert loaded.structure.family == "the MaskUNet toy model"
    assert path.with_suffix(".csv").read_text().splitlines()[0] == "step,loss,keep_ratio,share_differing"
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 5


def test_the_same_seed_trains_the_same_generator(tmp_path):
    files = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.safetensors"
        train(small(output=str(path)), progress=False)
        files.append(checkpoint.load(path).generator.state_dict())
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_the_shipped_base_draws_single_objects_as_well_as_its_scores_say(base):
    """A sample of what `python -m trainer evaluate` measured; the scores are in the U-Net's metadata."""
    scores = json.loads(read_weights("unet")[1]["scores"])
    _, captions = sample_captioned(2000, seeded(77), held_out=True)
    singles = [caption for caption in captions if caption.kind == "one"][:100]
    pictures = sample_pictures(base, base.patcher, [str(c) for c in singles], seed=3, steps=15, cfg=5.0, batch=50)
    right = fully_right(read(load_reader("reader_b"), pictures), singles).float()
    expected = float(scores["one"].split(" ± ")[0])
    error = max((expected * (1 - expected) / len(singles)) ** 0.5, 0.02)
    assert abs(right.mean().item() - expected) < 3 * error


def command(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "trainer", *arguments], cwd=PROJECT, capture_output=True, text=True, **options
    )


def test_evaluate_prints_its_table_and_writes_it_twice(tmp_path, toy_structure):
    path = tmp_path / "generator.safetensors"
    checkpoint.save(path, make_generator(toy_structure, lively=True), "decoder attention", {})
    result = command("evaluate", str(path), "--quick", "--output", str(tmp_path / "table"))
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "table" / "table.json").read_text())
    assert [row["model"] for row in table["rows"]] == ["base", "base + generator.safetensors"]
    for column in ("loss", "one", "two", "relation", "frechet"):
        assert column in table["rows"][1]
    assert (tmp_path / "table" / "table.md").read_text() in result.stdout
    assert table["machine"]["torch"]


def test_the_toy_is_trained_by_one_command(tmp_path):
    result = command("toy", "--quick", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == {
        "autoencoder",
        "reader_a",
        "reader_b",
        "text_encoder",
        "unet",
    }
    # Complete: the same command has nothing left to do, and the result is a base like the shipped one.
    again = command("toy", "--quick", "--output", str(tmp_path))
    assert again.returncode == 0
    assert "u-net" not in again.stderr
    sample = sample_pictures(load_base(str(tmp_path)), load_base(str(tmp_path)).patcher, ["a red circle"], 0, 2, 5.0)
    assert sample.shape == (1, 3, 64, 64)


def test_a_toy_stage_that_was_stopped_goes_on_with_the_same_weights(tmp_path):
    from torch import nn

    from trainer.toy.train import fit

    def run(state_file, stop_at=None):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)

        def step_loss(step):
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=seeded(1, step))
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        fit("stage", nn.ModuleDict({"model": model}), step_loss, 600, 1e-2, state_file, ema=0.9)
        return model.weight.detach()

    whole = run(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped.pt", stop_at=520)
    assert torch.equal(run(tmp_path / "stopped.pt"), whole)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "nothing.toml"), "'nothing.toml' does not exist. Name a TOML file or a preset"),
        (("evaluate", "nothing.safetensors", "--quick"), "'nothing.safetensors' does not exist"),
        (("convert", "a.pth", "b.pth", "c.safetensors"), "'a.pth' does not exist."),
    ],
)
def test_bad_input_gets_one_sentence(arguments, sentence):
    result = command(*arguments)
    assert result.returncode == 2
    assert sentence in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
