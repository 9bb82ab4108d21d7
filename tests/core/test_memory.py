"""Masks and searches where weights are streamed in, evicted, or moved away in the middle of a run."""

import contextlib

import comfy.model_management
import comfy.sample
import pytest
import torch

from maskunet_core.toy.model import load_toy_model
from tests.host.memory import card, run_as_executor

PROMPT, STEPS = "a red circle left of a small blue square", 4


def noise(images=1, seed=3):
    return torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def texts(clip):
    return [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, "")]


def sample(model, conditioning, images=1, steps=STEPS, **options):
    start = noise(images)
    parts = (model, start, steps, 5.0, "euler", "normal", *conditioning, torch.zeros_like(start))
    return comfy.sample.sample(*parts, disable_pbar=True, seed=1, **options)


def executed_toy():
    """The toy model as the executor leaves it: its weights are inference tensors."""
    with torch.inference_mode():
        model, clip, vae = load_toy_model()
        return model, texts(clip), vae


@pytest.fixture(scope="module")
def plain():
    """The stock image of a host that has room for everything."""
    model, conditioning, _ = executed_toy()
    return run_as_executor(sample, model, conditioning)


@contextlib.contextmanager
def copied_weights(module):
    """Inside the block the host hands out copies of the weights that it lends."""
    changed = []
    for part in module.modules():
        for name in ("weight_function", "bias_function"):
            if hasattr(part, "comfy_cast_weights") and hasattr(part, name):
                changed.append((part, name, part.__dict__.get(name)))
                setattr(part, name, [*getattr(part, name), torch.clone])
    try:
        yield
    finally:
        for part, name, before in changed:
            if before is None:
                delattr(part, name)
            else:
                setattr(part, name, before)


def gradient(model, conditioning, copied):
    """Of the U-Net's output in its input, outside of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        comfy.model_management.load_models_gpu([model])
        text = conditioning[0][0][0].clone()
        with torch.enable_grad(), copied_weights(model.model) if copied else contextlib.nullcontext():
            leaf = noise().requires_grad_()
            estimate = model.model.apply_model(leaf, torch.tensor([5.0]), c_crossattn=text)
            return torch.autograd.grad(estimate.square().sum(), leaf)[0]


# What the fixtures are worth ----------------------------------------------------------------------------------------


def test_stock_images_are_the_same_as_with_room_for_everything(plain, scarce):
    model, conditioning, _ = executed_toy()
    for _ in range(3):
        assert torch.equal(run_as_executor(sample, model, conditioning), plain)
    assert model.loaded_size() < model.model_size()
    assert scarce.casts


def test_a_dynamic_model_finds_its_weights_in_every_way(plain):
    from tests.host.memory import dynamic_vram

    with dynamic_vram() as memory:
        model, conditioning, _ = executed_toy()
        assert model.is_dynamic()
        for _ in range(2):
            run_as_executor(sample, model, conditioning)
        assert min(memory.page_hits, memory.page_faults, memory.page_misses, memory.evictions) > 10


def test_a_gradient_that_keeps_the_weights_that_the_host_lends_is_wrong(scarce):
    with torch.inference_mode(False):
        model, clip, _ = load_toy_model()
        conditioning = texts(clip)
    comfy.model_management.load_models_gpu([model])
    kept = gradient(model, conditioning, copied=False)
    assert not torch.isfinite(kept).all()


def test_a_gradient_through_copies_of_the_weights_is_right(scarce):
    model, conditioning, _ = executed_toy()
    run_as_executor(sample, model, conditioning)
    copied = gradient(model, conditioning, copied=True)
    with card():
        model, conditioning, _ = executed_toy()
        assert torch.equal(gradient(model, conditioning, copied=True), copied)
