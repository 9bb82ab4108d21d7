"""Prior preservation: pictures of a class that the base draws, beside the pictures trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskunet_core.training.batches import Batches, UnfitPrior
from maskunet_core.training.seeds import seeded
from trainer.base import load_toy_base
from trainer.config import Config
from trainer.config_file import parse_config
from trainer.loop import Run
from trainer.prior import class_pictures, plan, prior_data
from trainer.samples import draw_prompts
from trainer.toy.data import LatentSet, ToyData
from trainer.train import load_data, make_accelerator

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def base():
    return load_toy_base()


def config_of(tmp_path: Path, **changes) -> Config:
    values = {
        "output": str(tmp_path / "run"),
        "data": {"pictures": 24, "cache": str(tmp_path / "cache")},
        "prior": {"prompt": PROMPT, "pictures": 4, "folder": str(tmp_path / "prior"), "steps": 2, "share": 0.25},
        "loop": {"steps": 2, "batch": 8, "precision": "fp32"},
        "validation": {"pictures": 4, "every": 2},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value}
    return parse_config(values)


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Time and content of each class picture."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*.png"))}


def make_run(config: Config, base) -> Run:
    return Run(config, base, load_data(config, base), make_accelerator(config), prior_data(config, base))


# The pictures ---------------------------------------------------------------------------------------------------


def test_class_pictures_are_what_the_base_draws_of_the_prompt(base, tmp_path):
    config = config_of(tmp_path)
    data = prior_data(config, base)
    assert data.captions == [PROMPT] * 4
    found = [np.asarray(Image.open(path)) for path in contents(tmp_path / "prior")]
    expected = draw_prompts(base, base.patcher, [PROMPT] * 4, size=64, seed=0, steps=2, cfg=config.prior.cfg)
    assert np.array_equal(np.stack(found), (expected * 255).round().byte().numpy())
    latents = data.latents(data.buckets[0])
    wanted = torch.stack([base.encode_picture((p * 255).round().permute(2, 0, 1) / 255) for p in expected])
    torch.testing.assert_close(latents, wanted, rtol=1e-3, atol=1e-3)


def test_class_pictures_are_drawn_once_and_found_again(base, tmp_path):
    config = config_of(tmp_path)
    assert plan(config) == (
        f"Prior: 4 pictures of 'a red circle', of which 4 are yet to be drawn, in {tmp_path / 'prior'}."
    )
    prior_data(config, base)
    first = contents(tmp_path / "prior")
    assert "of which 0 are yet to be drawn" in plan(config)
    prior_data(config_of(tmp_path, prior={"weight": 0.5, "share": 0.5}), base)
    assert contents(tmp_path / "prior") == first


def test_drawing_goes_on_at_what_is_missing(base, tmp_path):
    config = config_of(tmp_path)
    prior_data(config, base)
    first = contents(tmp_path / "prior")
    for lost in list(first)[1:3]:
        lost.unlink()
    assert "of which 2 are yet to be drawn" in plan(config)
    more = config_of(tmp_path, prior={"pictures": 5})
    assert len(prior_data(more, base)) == 5
    again = contents(tmp_path / "prior")
    assert [again[path][1] for path in first] == [content for _, content in first.values()]
    kept = [path for n, path in enumerate(first) if n not in (1, 2)]
    assert [again[path] for path in kept] == [first[path] for path in kept]


@pytest.mark.parametrize("changed", [{"prompt": "a blue star"}, {"steps": 3}, {"cfg": 2.0}])
def test_other_settings_make_other_pictures(base, tmp_path, changed):
    first, second = config_of(tmp_path), config_of(tmp_path, prior=changed)
    prior_data(first, base)
    found = contents(tmp_path / "prior")
    prior_data(second, base)
    assert len(contents(tmp_path / "prior")) == 8
    others = contents(class_pictures(second)[0].folder)
    assert not {content for _, content in others.values()} & {content for _, content in found.values()}


def test_another_base_makes_other_pictures(tmp_path):
    from maskunet_core.toy.model import WEIGHTS

    weights = tmp_path / "weights"
    weights.mkdir()
    for path in WEIGHTS.glob("*.safetensors"):
        (weights / path.name).write_bytes(path.read_bytes())
    same = parse_config({"base": {"weights": str(weights)}, "prior": {"prompt": PROMPT}})
    folder = class_pictures(same)[0].folder
    assert folder == class_pictures(parse_config({"prior": {"prompt": PROMPT}}))[0].folder
    (weights / "unet.safetensors").write_bytes((WEIGHTS / "reader_a.safetensors").read_bytes())
    assert class_pictures(same)[0].folder != folder


# The loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "of_class"), [(0.25, 2), (0.5, 4), (0.01, 1), (0.99, 7)])
def test_the_loss_is_the_mean_of_the_pictures_plus_the_weighted_mean_of_the_class(base, tmp_path, share, of_class):
    run = make_run(config_of(tmp_path, prior={"share": share, "weight": 0.3}), base)
    batch = run.objective.batches.draw(0)
    with torch.no_grad(), run.method.acting():
        losses = base.diffusion_loss(batch.clean, batch.conditions, batch.timesteps, batch.noise)
    expected = losses[:-of_class].mean() + 0.3 * losses[-of_class:].mean()
    assert run._forward_backward(batch).mean().item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_pictures_come_with_the_class_prompt(base, tmp_path):
    run = make_run(config_of(tmp_path, data={"caption_dropout": 0.0, "flip": False}), base)
    prior = run.objective.batches.prior
    drawn = [run.objective.batches.draw(step) for step in range(2)]
    prompt = base.encode_text(PROMPT)["cross_attn"].expand(2, -1, -1)
    for batch in drawn:
        torch.testing.assert_close(batch.conditions["cross_attn"][-2:], prompt, rtol=1e-3, atol=1e-3)
    # Two steps of two are the four that there are, each once.
    shown = torch.cat([batch.clean[-2:] for batch in drawn]).flatten(1)
    assert sorted(shown.tolist()) == sorted(prior.latents(prior.buckets[0]).flatten(1).tolist())


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(base, tmp_path, parts):
    gradients = []
    for accumulate in (1, parts):
        run = make_run(config_of(tmp_path, loop={"accumulate": accumulate}), base)
        run._forward_backward(run.objective.batches.draw(0))
        gradients.append(torch.cat([p.grad.flatten() for p in run.module.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_held_out_are_pictures_of_the_subject_alone(base, tmp_path):
    measured = []
    for prompt in ("", PROMPT):
        run = make_run(config_of(tmp_path, prior={"prompt": prompt}), base)
        assert len(run.validator.held_out) == 4
        measured.append(run.validator.measure())
    assert measured[0] == measured[1]


# Any data -------------------------------------------------------------------------------------------------------


def in_memory(base, count: int, side: int = 8) -> ToyData:
    stream = seeded(0, count, side)
    latents = torch.randn(count, 4, side, side, generator=stream)
    return ToyData(LatentSet(latents, torch.ones(count, 16, dtype=torch.long), []), base.encode_tokens)


def test_data_and_prior_may_live_in_memory(base, tmp_path):
    config = config_of(tmp_path, prior={"prompt": ""})
    data, prior = in_memory(base, 20), in_memory(base, 3)
    run = Run(config, base, data, make_accelerator(config), prior)
    batch = run.objective.batches.draw(0)
    known = {tuple(row) for row in prior.latents(torch.arange(3)).flatten(1).tolist()}
    assert [tuple(row) in known for row in batch.clean.flatten(1).tolist()] == [False] * 6 + [True] * 2
    assert run.run().exists()


def test_a_prior_of_other_sizes_is_refused(base, tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(UnfitPrior, match=r"lack latents of the shape \(4, 8, 8\)"):
        Batches(in_memory(base, 8), config, 1000, in_memory(base, 4, side=16))
    alone = config_of(tmp_path, prior={"prompt": ""}, loop={"batch": 1})
    with pytest.raises(UnfitPrior, match=r"raise loop\.batch to 2"):
        Batches(in_memory(base, 8), alone, 1000, in_memory(base, 4))
