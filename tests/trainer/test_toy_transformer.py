"""The toy transformer's training, its storage in 8 bits, and its comparison with the U-Net."""

import json

import pytest
import torch

from maskunet_core.toy.model import WEIGHTS, read_weights
from maskunet_core.toy.vocabulary import encode_padded
from trainer.base import load_toy_base, sample_pictures
from trainer.evaluate import Protocol
from trainer.toy import train, transformer
from trainer.toy.data import LatentSet
from trainer.toy.muon import orthogonalised
from trainer.toy.transformer import TransformerRecipe, in_eight_bits, train_transformer

FEW = Protocol(prompts=2, pictures=2, steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a training of a few steps writes."""
    folder = tmp_path_factory.mktemp("transformer")
    train_transformer(TransformerRecipe.quick(), folder, FEW)
    return folder


def test_the_transformer_is_trained_and_judged_beside_the_unet_at_equal_cost(folder):
    unet, transformer = json.loads((folder / "scores" / "table.json").read_text())["rows"]
    assert unet["steps"] == 3
    costs = [float(row["operations"].split()[0]) for row in (unet, transformer)]
    assert costs[0] * (1 - 1 / transformer["steps"]) < costs[1] <= costs[0]
    _, metadata = read_weights("transformer", folder)
    assert json.loads(metadata["scores"]) == transformer
    base = load_toy_base(str(folder), "transformer")
    pictures = sample_pictures(base, base.patcher, ["a red circle"], 0, 2, 5.0)
    assert pictures.shape == (1, 3, 64, 64)
    assert pictures.isfinite().all()


def test_a_finished_training_has_nothing_left_to_do(command, folder):
    result = command("toy-transformer", "--quick", "--output", str(folder))
    assert result.returncode == 0, result.stderr
    assert "transformer:" not in result.stderr


def test_another_recipe_does_not_overwrite_it(folder):
    with pytest.raises(train.OtherRecipe, match="trained with another recipe"):
        train_transformer(TransformerRecipe(), folder, FEW)


def test_a_training_that_was_stopped_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for output in (whole, stopped):
        transformer.take_over(WEIGHTS, output)
    transformer.train(TransformerRecipe.quick(), whole)
    loss_of = transformer.flow_loss

    def stopping(*arguments):
        step_loss = loss_of(*arguments)

        def loss(step):
            if step == 5:
                raise KeyboardInterrupt
            return step_loss(step)

        return loss

    with monkeypatch.context() as patch:
        patch.setattr(transformer, "flow_loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            transformer.train(TransformerRecipe.quick(), stopped)
    assert not (stopped / "transformer.safetensors").exists()
    transformer.train(TransformerRecipe.quick(), stopped)
    (expected, _), (found, _) = (read_weights("transformer", folder) for folder in (whole, stopped))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_training_moves_every_weight_of_the_transformer():
    """A fused operation without gradients, or a sum in place, would leave some as they were."""
    import comfy.model_management

    model = transformer.trainable_transformer()
    with torch.no_grad():
        # From the start on: a block that does nothing has no gradients.
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    comfy.model_management.in_training = True
    try:
        latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 128)
        model(latents, torch.rand(2), context=context, transformer_options={}).square().mean().backward()
    finally:
        comfy.model_management.in_training = False
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


def test_the_loss_is_least_where_the_host_would_draw_the_picture_itself(folder):
    """Noise level, direction and scale are those of the host's sampling."""
    base = load_toy_base(str(folder), "transformer")
    clean = torch.randn(1, 4, 8, 8)
    data = LatentSet(clean, torch.tensor([encode_padded("a red circle")]), [])
    sampling = base.model.model_sampling

    def ideal(noisy, time, context, transformer_options):
        sigma = time.view(-1, 1, 1, 1)
        velocity = (noisy - clean) / sigma
        assert torch.equal(sampling.timestep(time), time)
        expected = clean.expand_as(noisy)
        torch.testing.assert_close(sampling.calculate_denoised(time, velocity, noisy), expected, rtol=0, atol=1e-4)
        return velocity

    loss = transformer.flow_loss(ideal, base.clip.cond_stage_model.clip_l.transformer, data, TransformerRecipe.quick())
    assert loss(3) < 1e-8


def test_eight_bits_come_back_within_half_a_level(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(6, 40) * torch.logspace(-3, 1, 6)[:, None], "zero.weight": torch.zeros(3, 4)}
    tensors |= {"norm.weight": torch.rand(5)}
    stored = in_eight_bits(tensors)
    save_file(stored, tmp_path / "transformer.safetensors")
    read, _ = read_weights("transformer", tmp_path)
    assert read.keys() == tensors.keys()
    assert stored["a.weight"].dtype == torch.int8
    level = tensors["a.weight"].abs().amax(1, keepdim=True) / 127
    assert ((read["a.weight"] - tensors["a.weight"]).abs() <= 0.51 * level + 0.001 * tensors["a.weight"].abs()).all()
    assert torch.equal(read["zero.weight"], tensors["zero.weight"])
    torch.testing.assert_close(read["norm.weight"], tensors["norm.weight"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(192, 64), (64, 256)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalised(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3
    assert values.max() < 1.3
    # It turns nothing: what is left of the singular vectors is diagonal.
    turned = left.T @ result @ right.T
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-3
