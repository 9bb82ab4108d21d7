"""The toy model's own training, and what the shipped one is good for."""

import json

import pytest
import torch

from maskunet_core.files import checkpoint
from maskunet_core.masks.sources import GeneratorMasks
from maskunet_core.seam.attach import attach
from maskunet_core.toy.judge import fully_right, read
from maskunet_core.toy.model import WEIGHTS, load_reader, read_weights
from maskunet_core.training.seeds import seeded
from tests.builders import trainer_command
from trainer.base import load_toy_base, sample_pictures
from trainer.toy.bodies import TRANSFORMER_CFG, TRANSFORMER_STEPS
from trainer.toy.held_out import TABLE, held_out_prompts
from trainer.toy.world import sample_captioned

SAMPLING = [("unet", 15, 5.0), ("transformer", TRANSFORMER_STEPS, TRANSFORMER_CFG)]


@pytest.mark.parametrize(("body", "steps", "cfg"), SAMPLING)
def test_the_shipped_bases_draw_single_objects_as_well_as_their_scores_say(body, steps, cfg):
    """A sample of what `python -m trainer toy-bodies` measured; the scores are in the weights' metadata."""
    base = load_toy_base(body=body)
    scores = json.loads(read_weights(body)[1]["scores"])
    _, captions = sample_captioned(2000, seeded(77), held_out=True)
    singles = [caption for caption in captions if caption.kind == "one"][:100]
    texts = [str(caption) for caption in singles]
    pictures = sample_pictures(base, base.patcher, texts, 3, steps, cfg, batch=50)
    right = fully_right(read(load_reader("reader_b"), pictures), singles).float()
    expected = float(scores["one"].split(" ± ")[0])
    assert expected >= 0.9
    error = max((expected * (1 - expected) / len(singles)) ** 0.5, 0.02)
    assert abs(right.mean().item() - expected) < 3 * error


def test_the_generator_that_learned_from_a_reward_makes_more_pictures_right_without_guidance():
    """Of prompts and by a reader that its training never saw."""
    base = load_toy_base()
    generator = checkpoint.load(WEIGHTS.with_name("generators") / "toy_follows.safetensors").generator
    captions = held_out_prompts(80, TABLE)
    right = []
    for model in (base.patcher, attach(base.patcher, GeneratorMasks(generator), 1.0, 0.0, 1.0)):
        pictures = sample_pictures(base, model, [str(caption) for caption in captions], seed=0, steps=15, cfg=1.0)
        right.append(fully_right(read(load_reader("reader_b"), pictures), captions).float())
    gain = right[1] - right[0]
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def test_the_toy_is_trained_by_one_command(command, tmp_path):
    result = trainer_command("toy", "--quick", "--output", str(tmp_path))
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
    base = load_toy_base(str(tmp_path))
    sample = sample_pictures(base, base.patcher, ["a red circle"], 0, 2, 5.0)
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
