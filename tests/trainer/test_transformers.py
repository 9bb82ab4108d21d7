"""Training on transformers: the loss of flows, its gradients, and what a run on the toy transformer writes."""

import contextlib
import re

import numpy as np
import pytest
import torch
from PIL import Image

from maskunet_core.files import checkpoint
from maskunet_core.models.families.transformer import time_embedding
from maskunet_core.training.base import BaseModel
from maskunet_core.training.seeds import seeded
from trainer.base import load_toy_base
from trainer.benchmark.methods import parse_methods
from trainer.config import Base
from trainer.config_file import BadConfig, parse_config
from trainer.evaluate import Protocol, evaluate
from trainer.loop import Run
from trainer.methods import build_method
from trainer.samples import sample
from trainer.toy.transformer import norms_on_copies
from trainer.train import check, load_data, make_accelerator, resume, start

METHODS = ("maskunet", "static_mask", "lora", "full")


@pytest.fixture(scope="module")
def base():
    return load_toy_base(body="transformer")


def config_of(tmp_path, method="maskunet", **changes):
    values = {
        "method": method,
        "output": str(tmp_path / method),
        "base": {"body": "transformer"},
        "data": {"pictures": 40, "cache": str(tmp_path / "cache")},
        "loop": {"steps": 3, "batch": 4, "precision": "fp32", "save_every": 1},
        "optimiser": {"lr": 1e-2, "lr_bias": 0.5},
        "validation": {"pictures": 8, "every": 3},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_config(values)


def batch_of(base, count=3):
    """(clean, conditions, timesteps, noise)."""
    clean, noise = torch.randn(2, count, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    words = ["a red circle", "a large green star", "a blue square above a yellow ring"][:count]
    conditions = {"cross_attn": torch.stack([base.encode_text(text)["cross_attn"] for text in words])}
    return clean, conditions, torch.tensor([100, 500, 900])[:count], noise


def test_the_loss_of_a_flow_is_the_error_of_its_velocity(base):
    clean, conditions, timesteps, noise = batch_of(base)
    time = (timesteps + 1) / 1000
    with torch.no_grad():
        found = base.diffusion_loss(clean, conditions, timesteps, noise)
        noisy = torch.lerp(clean, noise, time.view(-1, 1, 1, 1))
        predicted = base.unet(noisy, time, context=conditions["cross_attn"], transformer_options={})
        weighted = base.diffusion_loss(clean, conditions, timesteps, noise, min_snr=5.0)
    torch.testing.assert_close(found, (predicted - (noise - clean)).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    # Min-SNR caps the weight of the error of the clean latents, which is the velocity's times sigma.
    capped = (((1 - time) / time) ** 2).clamp(max=5.0)
    torch.testing.assert_close(weighted, found * capped * time**2)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_plain_operations(base, method, tmp_path, monkeypatch):
    """Of the host's own way to train: without fused operations, and here on copies of what it would overwrite."""
    import comfy.model_management

    def gradients(checkpointing: bool = False) -> dict[str, torch.Tensor]:
        trained = build_method(base, config_of(tmp_path, method, loop={"checkpointing": checkpointing}))
        with torch.no_grad():
            stream = torch.Generator().manual_seed(2)
            for parameter in trained.module.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=stream))
        with trained.acting():
            base.diffusion_loss(*batch_of(base)).mean().backward()
        return {name: parameter.grad for name, parameter in trained.module.named_parameters()}

    found = gradients(), gradients(checkpointing=True)
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "in_training", True)
        patch.setattr(base, "differentiable", contextlib.nullcontext)
        hooks = norms_on_copies(base.unet)
        expected = gradients()
        for hook in hooks:
            hook.remove()
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, name
        for other in found:
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_blocks_run_again_with_the_same_noise(base, tmp_path):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        changes = {"loop": {"checkpointing": checkpointing}, "generator": {"noise": True}}
        trained = build_method(base, config_of(tmp_path, **changes))
        torch.manual_seed(5)
        with trained.acting():
            base.diffusion_loss(*batch_of(base)).mean().backward()
        return [parameter.grad for parameter in trained.module.parameters()]

    # Other noise would change them by as much as they are.
    for kept, again in zip(gradients(False), gradients(True)):
        torch.testing.assert_close(again, kept, rtol=1e-4, atol=1e-4 * float(kept.abs().max()))


def test_masks_learn_from_the_noise_level(base, tmp_path):
    """Training, validation and sampling give a block the same embedding of it."""
    trained = build_method(base, config_of(tmp_path))
    seen: list[torch.Tensor] = []
    code = next(iter(trained.module.codes.values()))
    handle = code.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    clean, conditions, timesteps, noise = batch_of(base)
    for training in (True, False):
        with torch.set_grad_enabled(training), trained.acting(training):
            base.diffusion_loss(clean, conditions, timesteps, noise)
    handle.remove()
    torch.testing.assert_close(seen[0], time_embedding(base.sigmas(clean, timesteps), 3))
    assert torch.equal(seen[0], seen[1])


def test_a_run_goes_on_after_a_stop_and_its_file_is_drawn_with_and_judged(tmp_path, monkeypatch):
    grid = {"prompts": ["a red circle"], "sample_every": 3, "sample_steps": 2}
    whole = start(config_of(tmp_path / "whole", validation=grid))
    assert (whole.parent / "samples" / "000003.png").exists()
    assert float((whole.parent / "validation.csv").read_text().splitlines()[-1].split(",")[1]) > 0
    loaded = checkpoint.load(whole)
    assert loaded.structure.family == "the MaskUNet toy transformer"

    step = Run.train_step

    def stopping(run: Run) -> float:
        if run.step == 2:
            raise KeyboardInterrupt
        return step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            start(config_of(tmp_path / "stopped", validation=grid))
    resume(tmp_path / "stopped" / "maskunet")
    first, second = (torch.load(path, weights_only=True)["module"] for path in tmp_path.rglob("last.pt"))
    assert all(torch.equal(second[name], value) for name, value in first.items())

    sheet = sample(Base(body="transformer"), whole, ["a red circle"], tmp_path / "sheet.png", seed=0, steps=2)
    assert sheet.exists()
    few = Protocol(loss_pictures=8, prompts=1, pictures=2, steps=2)
    rows = evaluate(parse_methods([f"generator:{whole}"]), few, tmp_path / "judged", body="transformer")
    assert [row["model"] for row in rows] == ["base", "generator:maskunet.safetensors"]
    assert 0 < rows[0]["loss"] < 2


def test_texts_of_unequal_lengths_are_learned_from_as_each_alone(tmp_path, monkeypatch):
    """The losses and gradients of a batch are those of its samples one by one, each with its own text alone."""
    for number, words in enumerate(("red", "large green", "small blue and yellow", "purple")):
        Image.new("RGB", (64, 64), (60 * number, 90, 120)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(words, encoding="utf-8")
    encode = BaseModel.encode_text

    def without_padding(base: BaseModel, text: str) -> dict[str, torch.Tensor]:
        found = encode(base, text)
        return {"cross_attn": found["cross_attn"][: len(text.split()) + 2]}

    monkeypatch.setattr(BaseModel, "encode_text", without_padding)
    base = load_toy_base(body="transformer")
    settings = {"data": {"path": str(tmp_path)}, "validation": {"pictures": 0}}
    config = config_of(tmp_path, loop={"checkpointing": True}, **settings)
    run = Run(config, base, load_data(config, base), make_accelerator(config))
    batch = run.objective.batches.draw(0)
    losses = run._forward_backward(batch)
    together = [p.grad.clone() for p in run.module.parameters()]
    run.optimiser.zero_grad()
    alone = []
    for row in range(4):
        (_, part), *others = batch.part(row, 4, run.device).by_length()
        assert not others
        text = part.conditions["cross_attn"]
        assert (text.abs().sum(-1) > 0).all()
        with run.method.acting():
            alone.append(run.objective.losses(part))
            (alone[-1].sum() / 4).backward()
    texts = run.data.samples.texts(np.arange(len(run.data)))
    assert len({len(text["cross_attn"]) for text in texts}) == 3
    torch.testing.assert_close(losses, torch.cat(alone).detach())
    for parameter, gradient in zip(run.module.parameters(), together):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def drawn(base, model):
    import comfy.sample

    context = base.encode_text("a red circle")["cross_attn"][None]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    both = [[context, {}]], [[torch.zeros_like(context), {}]]
    options = {"disable_pbar": True, "seed": 0}
    return comfy.sample.sample(model, noise, 2, 3.0, "euler", "simple", *both, 0 * noise, **options)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_stock_loader_reads_a_baseline_of_parts_of_layers(base, method, tmp_path):
    import comfy.sd
    import comfy.utils

    # Attention and feed-forward are parts of the same layers.
    trained = build_method(base, config_of(tmp_path, method, targets="decoder attention and feed-forward"))
    with torch.no_grad():
        stream = torch.Generator().manual_seed(2)
        for parameter in trained.module.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=stream))
    trained.save(tmp_path / "file.safetensors", {})
    file = comfy.utils.load_torch_file(str(tmp_path / "file.safetensors"), safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(base.patcher, base.clip, file, 1.0, 1.0)
    assert len(patched.patches) == 4
    stock = drawn(base, base.patcher)
    with trained.sampling() as model:
        expected = drawn(base, model)
    assert (expected - stock).abs().max() > 1e-2
    # The file is fp16.
    assert (drawn(base, patched) - expected).abs().max() < 0.05 * (expected - stock).abs().max()
    assert torch.equal(drawn(base, base.patcher), stock)


def test_rewards_train_a_transformer_with_texts_of_several_lengths(tmp_path, monkeypatch):
    """Guided. Each text as if it were alone: padding would change what a transformer computes."""
    base = load_toy_base(body="transformer")
    encode = BaseModel.encode_text

    def of_own_length(self, text: str) -> dict[str, torch.Tensor]:
        return {"cross_attn": encode(self, text)["cross_attn"][: 16 - len(text) % 4]}

    monkeypatch.setattr(BaseModel, "encode_text", of_own_length)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\na red ring\na green cross")
    drawing = {"prompts_per_round": 2, "pictures_per_prompt": 2, "steps": 3, "scheduler": "simple", "cfg": 2.0}
    config = config_of(
        tmp_path,
        objective="reward",
        reward=drawing | {"prompts": str(tmp_path / "prompts.txt")},
        validation={"pictures": 0},
    )
    run = Run(config, base, load_data(config, base), make_accelerator(config))
    objective = run.objective
    sigmas = base.sigmas(torch.zeros(1), objective._timesteps)
    torch.testing.assert_close(sigmas, torch.linspace(1, 1 / 3, 3), atol=2e-3, rtol=0)
    found = objective._drawn(0)
    noise = torch.randn(4, 4, 8, 8, generator=seeded(62, 0, 0))
    assert len({len(base.encode_text(text)["cross_attn"]) for text in found.prompts}) == 2
    for n, prompt in enumerate(found.prompts):
        objective.drawing.read([prompt])
        alone = objective.drawing.latents(base.patcher, [prompt], noise[n : n + 1], 0)
        torch.testing.assert_close(found.latents[n : n + 1], alone, atol=1e-4, rtol=1e-4)
    part = objective.prepared(objective.draw(0))
    sigma = base.sigmas(part.clean, part.timesteps)
    noisy = base.noised(part.clean, sigma, part.noise)

    def predicted(n: int, text: str):
        conditions = {key: value[None] for key, value in base.encode_text(text).items()}
        with torch.no_grad():
            return base.denoised(noisy[n : n + 1], sigma[n : n + 1], conditions)[0]

    for n, latent in enumerate(part.clean):
        prompt = next(p for p, other in zip(found.prompts, found.latents) if torch.equal(latent, other))
        expected = torch.lerp(predicted(n, ""), predicted(n, prompt), 2.0)
        torch.testing.assert_close(part.of_policy[n], expected, atol=1e-4, rtol=1e-4)
    run.train_step()
    assert start(config).exists()


def test_check_tells_what_a_run_takes(tmp_path):
    told = "\n".join(check(config_of(tmp_path, loop={"checkpointing": True})))
    assert "Method: maskunet" in told
    assert re.search(r"Estimated peak memory: [1-9][\d,]* MB", told)


def test_what_is_for_unets_alone_is_told_at_once(tmp_path):
    with pytest.raises(BadConfig) as told:
        config_of(tmp_path, "embedding", generator={"architecture": "reference"})
    for sentence in ("words are learned for U-Nets alone", "is made for U-Nets alone"):
        assert sentence in str(told.value)
    with pytest.raises(BadConfig, match=r"base\.body: is of the toy model alone"):
        config_of(tmp_path, base={"checkpoint": "other.safetensors"})
