import pytest
import torch

from maskunet_core.files.checkpoint import file_size
from maskunet_core.masks.generator import BIASES, LowRankGenerator, LowRankSettings
from maskunet_core.masks.gumbel import straight_through
from tests.builders import make_generator, sd15_unet


def all_masks(generator, features, t_emb):
    """Masks of all layers by name, for features of the right width per block."""
    masks = {}
    for block in generator.structure.blocks:
        conditions = generator.condition(block, features[block.name], t_emb)
        for layer in block.layers:
            logits = generator.layer_logits(layer.name, conditions[layer.name]).full()
            masks[layer.name] = straight_through(logits, generator.threshold, generator.tau)
    return masks


def inputs(structure, batch=4, seed=0):
    torch.manual_seed(seed)
    features = {block.name: torch.randn(batch, block.channels, 4, 4) for block in structure.blocks}
    return features, torch.randn(batch, structure.embedding)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_every_weight_is_kept_at_the_start(toy_structure, bias, rank):
    generator = make_generator(toy_structure, bias=bias, rank=rank)
    masks = all_masks(generator, *inputs(toy_structure, batch=16))
    assert len(masks) == 32
    assert all(bool((mask == 1).all()) for mask in masks.values())


@pytest.mark.parametrize("bias", BIASES)
def test_every_parameter_has_a_gradient_at_the_first_step(toy_structure, bias):
    generator = make_generator(toy_structure, bias=bias).requires_grad_(True)
    masks = all_masks(generator, *inputs(toy_structure, batch=8))
    torch.manual_seed(1)
    sum((mask * torch.randn_like(mask)).sum() for mask in masks.values()).backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_masks_differ_between_timesteps_and_between_samples(toy_structure):
    generator = make_generator(toy_structure, lively=True)
    features, t_emb = inputs(toy_structure, batch=2)
    same_time = t_emb[:1].expand(2, -1)
    same_sample = {name: value[:1].expand(2, -1, -1, -1) for name, value in features.items()}
    for name, mask in all_masks(generator, features, same_time).items():
        assert not torch.equal(mask[0], mask[1]), name
    for name, mask in all_masks(generator, same_sample, t_emb).items():
        assert not torch.equal(mask[0], mask[1]), name
    for name, mask in all_masks(generator, same_sample, same_time).items():
        assert torch.equal(mask[0], mask[1]), name


def test_ablations_leave_an_input_out(toy_structure):
    features, t_emb = inputs(toy_structure, batch=2)
    block = toy_structure.blocks[0]
    for left_out in ("use_time", "use_sample"):
        generator = make_generator(toy_structure, **{left_out: False})
        code = generator.codes[block.name.replace(".", "/")]
        if left_out == "use_time":
            assert torch.equal(code(features[block.name], t_emb), code(features[block.name], t_emb.flip(0)))
        else:
            assert torch.equal(code(features[block.name], t_emb), code(features[block.name].flip(0), t_emb))


def test_logits_are_the_sum_of_bias_and_low_rank_product(toy_structure):
    generator = make_generator(toy_structure, lively=True)
    features, t_emb = inputs(toy_structure, batch=2)
    block = toy_structure.blocks[1]
    layer = block.layers[3].name
    code = generator.condition(block, features[block.name], t_emb)[layer]
    parts = generator.logits[layer.replace(".", "/")]
    expected = torch.stack([parts.bias + parts.u @ torch.diag(c) @ parts.v.T for c in code])
    torch.testing.assert_close(generator.layer_logits(layer, code).full(), expected)


@pytest.mark.parametrize(("bias", "rank"), [("row_column", 8), ("row_column", 16), ("row_column", 32), ("weight", 8)])
def test_size_at_sd15(sd15_structure, bias, rank):
    """A bias per row and column stays under 1 % of the U-Net's parameters, one per weight under 30 MB on disk."""
    unet = sum(parameter.numel() for parameter in sd15_unet().parameters())
    with torch.device("meta"):
        generator = LowRankGenerator(sd15_structure, LowRankSettings(bias=bias, rank=rank))
    assert unet == 859_520_964
    if bias == "row_column":
        assert sum(parameter.numel() for parameter in generator.parameters()) < 0.01 * unet
    else:
        assert file_size(generator) < 30_000_000


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="bias is 'per_layer'"):
        LowRankSettings(bias="per_layer")
    with pytest.raises(ValueError, match="delta between 0 and 1"):
        LowRankSettings(delta=1.0)
