"""Copies of a generator on several devices."""

import gc

import pytest
import torch

from maskunet_core.files import checkpoint
from maskunet_core.masks.call import Call
from maskunet_core.masks.copies import GeneratorCopies
from maskunet_core.masks.sources import GeneratorMasks
from tests.builders import make_generator

META = torch.device("meta")
"""Plays a second device: whatever lies there says so, and meets nothing that lies elsewhere."""


@pytest.fixture
def original(tmp_path, toy_structure):
    path = tmp_path / "generator.safetensors"
    checkpoint.save(path, make_generator(toy_structure, lively=True), "decoder attention", {})
    return checkpoint.load(path).generator


def places(generator) -> dict[str, int]:
    """Addresses of the tensors by name."""
    return {name: tensor.data_ptr() for name, tensor in [*generator.named_parameters(), *generator.named_buffers()]}


def masks_of(source, structure):
    call, masks = Call(), {}
    mask = source.begin(call)
    torch.manual_seed(4)
    for block in structure.blocks:
        features, t_emb = torch.randn(2, block.channels, 4, 4), torch.randn(2, structure.embedding)
        call.enter(block.name, features, t_emb)
        masks |= {layer.name: mask(layer.name, torch.zeros(1)) for layer in block.layers}
    return masks


def test_a_copy_shares_memory_until_it_is_moved(original):
    before = places(original)
    made = GeneratorCopies(original, torch.float32).new()
    assert places(made) == before
    made.to(META)
    assert {parameter.device for parameter in made.parameters()} == {META}
    assert places(original) == before
    assert {parameter.device.type for parameter in original.parameters()} == {"cpu"}


def test_a_copy_in_half_precision_shares_what_is_packed(original):
    made = GeneratorCopies(original, torch.float16).new()
    ours, theirs = places(original), places(made)
    packed = [name for name in ours if name.endswith(".packed")]
    assert len(packed) == 32
    assert all(ours[name] == theirs[name] for name in packed)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in original.parameters()} == {torch.float32}


def test_a_copy_that_came_back_shares_memory_again(original):
    copies = GeneratorCopies(original, torch.float32)
    made = copies.new()
    for owner in made.modules():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            moved = tensor.detach().clone()
            setattr(owner, name, torch.nn.Parameter(moved, False) if name in owner._parameters else moved)
    assert not set(places(made).values()) & set(places(original).values())
    copies.share(made)
    assert places(made) == places(original)
    made.to(META)
    copies.share(made)
    assert {parameter.device for parameter in made.parameters()} == {META}


def test_masks_are_those_of_the_original(original):
    copies = GeneratorCopies(original, torch.float32)
    held = copies.new()
    for seed in (None, 5):
        expected = masks_of(GeneratorMasks(original, seed), original.structure)
        found = masks_of(GeneratorMasks(copies, seed), original.structure)
        assert len(found) == 32
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert any(not mask.all() for mask in found.values())
    assert copies.on(torch.device("cpu")) is held


def test_the_copy_on_the_device_of_the_model_computes(original):
    copies = GeneratorCopies(original, torch.float32)
    here, there = copies.new(), copies.new().to(META)
    for device, made in (("cpu", here), ("meta", there)):
        assert copies.on(torch.device(device)) is made
        for block in original.structure.blocks:
            inputs = torch.randn(2, block.channels, 4, 4), torch.randn(2, original.structure.embedding)
            for layer, code in copies.condition(block, *(value.to(device) for value in inputs)).items():
                assert copies.layer_logits(layer, code).above(copies.threshold).device.type == device


def test_a_copy_lives_as_long_as_it_is_held(original):
    copies = GeneratorCopies(original, torch.float32)
    first, second = copies.new(), copies.new().to(META)
    assert copies.on(META) is second
    del second
    gc.collect()
    assert copies.on(META) is first
    del first
    gc.collect()
    assert copies.on(META) is original
