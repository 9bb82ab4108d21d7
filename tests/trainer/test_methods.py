"""Baselines in the same loop, and files that the stock nodes read."""

import pytest
import torch

from maskunet_core.files import checkpoint
from maskunet_core.masks.sources import GeneratorMasks
from maskunet_core.seam.attach import attach
from maskunet_core.training.method import MaskCounts
from tests.device import DEVICE
from trainer.base import load_toy_base
from trainer.config_file import parse_config
from trainer.loop import Run
from trainer.methods import build_method
from trainer.train import load_data, make_accelerator, start


def method_of(base, config):
    """Where the trainer has it: on the device."""
    method = build_method(base, config)
    method.module.to(DEVICE)
    return method


def config_of(method: str, tmp_path, **changes):
    values = {
        "method": method,
        "output": str(tmp_path / method),
        "data": {"pictures": 64},
        "loop": {"steps": 4, "batch": 8, "precision": "fp32"},
        "optimiser": {"lr": 1e-2, "lr_bias": 0.5},
        "validation": {"every": 0},
    }
    return parse_config(values | changes)


def predict(base, patcher=None):
    """The U-Net's answer to fixed inputs, as a sampler asks for it."""
    import comfy.sample

    context = base.encode_text("a red circle")["cross_attn"][None]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning = [[context, {}]], [[torch.zeros_like(context), {}]]
    options = {"disable_pbar": True, "seed": 0}
    model = patcher or base.patcher
    return comfy.sample.sample(model, noise, 2, 3.0, "euler", "normal", *conditioning, 0 * noise, **options)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_stock_loader_reads_what_a_baseline_wrote(method, tmp_path):
    import comfy.sd
    import comfy.utils

    path = start(config_of(method, tmp_path))
    base = load_toy_base()
    file = comfy.utils.load_torch_file(str(path), safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(base.patcher, base.clip, file, 1.0, 1.0)
    assert len(patched.patches) == 32

    trained = method_of(base, config_of(method, tmp_path))
    state = torch.load(path.with_name("state") / "last.pt", weights_only=True)["module"]
    trained.module.load_state_dict(state)
    with trained.sampling() as model:
        expected = predict(base, model)
    stock = predict(load_toy_base())
    loaded = predict(base, patched)
    assert (expected - stock).abs().max() > 1e-2
    # The file is fp16.
    assert (loaded - expected).abs().max() < 0.05 * (expected - stock).abs().max()


@pytest.mark.parametrize("method", ["maskunet", "static_mask", "lora", "full"])
def test_a_method_begins_as_the_base(method, tmp_path):
    base = load_toy_base()
    stock = predict(base)
    with method_of(base, config_of(method, tmp_path)).sampling() as model:
        assert torch.equal(predict(base, model), stock)
    assert torch.equal(predict(base), stock)


def test_a_static_mask_is_the_same_for_every_step_and_sample(tmp_path):
    path = start(config_of("static_mask", tmp_path))
    loaded = checkpoint.load(path)
    assert loaded.generator.settings.rank == 0
    base = load_toy_base()
    seen: dict[str, list[torch.Tensor]] = {}
    source = GeneratorMasks(loaded.generator, observe=lambda layer, mask: seen.setdefault(layer, []).append(mask))
    stock = predict(base)
    masked = predict(base, attach(base.patcher, source, 1.0, 0.0, 1.0))
    assert not torch.equal(masked, stock)
    assert len(seen) == 32
    for masks in seen.values():
        assert len(masks) >= 2
        assert all(mask.shape[0] == 1 and torch.equal(mask, masks[0]) for mask in masks)


def test_a_generator_with_a_network_per_layer_is_saved_and_loaded(tmp_path):
    path = start(config_of("maskunet", tmp_path, generator={"codes": "layer", "width": 8}))
    generator = checkpoint.load(path).generator
    assert len(generator.codes) == 32
    assert generator.settings.codes == "layer"


def masks_seen(generator, base) -> dict[str, list[torch.Tensor]]:
    """The masks [B, out, in] of a sampler's steps, by layer: two samples, each with both branches of CFG."""
    seen: dict[str, list[torch.Tensor]] = {}
    source = GeneratorMasks(generator, observe=lambda layer, mask: seen.setdefault(layer, []).append(mask))
    predict(base, attach(base.patcher, source, 1.0, 0.0, 1.0))
    assert len(seen) == 32
    assert all(len(masks) >= 2 for masks in seen.values())
    return seen


def outputs_of_maps(generator) -> torch.Tensor:
    """S of all blocks for random conditions, flat."""
    block_inputs = [(b, torch.randn(3, b.channels, 8, 8), torch.randn(3, 512)) for b in generator.structure.blocks]
    with torch.no_grad():
        found = [generator.condition(*inputs)[inputs[0].layers[0].name] for inputs in block_inputs]
    return torch.cat([small.flatten() for small in found])


def reference_run(tmp_path, freed: bool) -> Run:
    generator = {"architecture": "reference", "freed": freed}
    # The schedule warms up: the first step has no learning rate.
    loop = {"steps": 31, "batch": 8, "precision": "fp32", "schedule": "constant", "warm_up": 0}
    config = config_of("maskunet", tmp_path, generator=generator, loop=loop, optimiser={"lr": 1e-2, "lr_bias": 0.1})
    base = load_toy_base()
    return Run(config, base, load_data(config, base), make_accelerator(config))


def test_the_authors_generator_as_released_never_learns(tmp_path):
    run = reference_run(tmp_path, freed=False)
    for _ in range(30):
        run.train_step()
    run._forward_backward(run.objective.batches.draw(30))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in run.module.generators.parameters())
    assert any(p.grad.abs().sum() > 0 for p in run.module.adapters.parameters())
    outputs = outputs_of_maps(run.module)
    assert torch.equal(outputs, torch.zeros_like(outputs))
    seen = masks_seen(run.module, run.base)
    assert all(torch.equal(mask, masks[0][:1].expand_as(mask)) for masks in seen.values() for mask in masks)
    kept = sum(masks[0].sum().item() for masks in seen.values()) / sum(m[0].numel() for m in seen.values())
    assert 0.1 < kept < 0.999


def test_the_authors_generator_freed_learns_from_the_first_step(tmp_path):
    run = reference_run(tmp_path, freed=True)
    run._forward_backward(run.objective.batches.draw(0))
    for name, parameter in run.module.generators.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    run.optimiser.zero_grad()
    for _ in range(30):
        run.train_step()
    assert outputs_of_maps(run.module).max() > 0
    seen = masks_seen(run.module, run.base)
    assert any(not torch.equal(mask[:1], mask[1:2]) for masks in seen.values() for mask in masks)
    assert any(not torch.equal(masks[0][:1], mask[:1]) for masks in seen.values() for mask in masks)


@pytest.mark.parametrize("freed", [False, True])
def test_the_authors_generator_begins_as_the_base_and_goes_through_a_file(freed, tmp_path):
    generator = {"architecture": "reference", "freed": freed, "start": 2.0}
    config = config_of("maskunet", tmp_path, generator=generator)
    base = load_toy_base()
    method = method_of(base, config)
    assert all(bool(mask.all()) for masks in masks_seen(method.module, base).values() for mask in masks)
    small = torch.zeros(1, *method.module.maps["up.0"][:2])
    logits = method.module.layer_logits(next(iter(method.structure.layers)), small).full()
    assert logits.mean().item() == pytest.approx(2.0, abs=0.05)
    biases, others = method.groups()
    assert (biases["lr"], others["lr"]) == (config.optimiser.lr_bias, config.optimiser.lr)
    assert sum(p.numel() for p in biases["params"]) == sum(
        n.out_features + n.in_features for n in method.structure.layers.values()
    )

    path = start(config)
    loaded = checkpoint.load(path)
    assert loaded.generator.architecture == "reference"
    assert loaded.generator.maps == method.module.maps
    trained = torch.load(path.with_name("state") / "last.pt", weights_only=True)["module"]
    for name, value in loaded.generator.state_dict().items():
        torch.testing.assert_close(value, trained[name], rtol=1e-3, atol=1e-6)


def test_statistics_count_what_is_kept_and_what_differs():
    statistics = MaskCounts()
    statistics("a", torch.tensor([[[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]))
    statistics("b", torch.ones(1, 2, 2))
    assert statistics.keep_ratio == (5 + 4) / 12
    assert statistics.share_differing == 1 / 8
    assert statistics.keep_ratio_per_layer == {"a": 5 / 8, "b": 1.0}
    statistics.reset()
    assert statistics.keep_ratio_per_layer == {}
