"""Masks that were recorded while the host sampled, and their replay by the host."""

import pytest
import torch

from maskunet_core.masks.call import Call
from maskunet_core.masks.sources import GeneratorMasks
from maskunet_core.models.structure import Block, Layer, Structure
from maskunet_core.records.recorded import (
    IncompatibleMasks,
    RecordedMasks,
    RecordedSource,
    pack_bits,
    packed_size,
    unpack_bits,
)
from maskunet_core.seam.attach import attach, structure_of
from tests.builders import make_generator
from tests.recording import Recording, random_masks

LAYERS = (Layer("a", 4, 6), Layer("b", 3, 3), Layer("c", 1, 8))
SMALL = Structure("a small model", 16, (Block("up.0", "anchor", 8, LAYERS),))


def small_mask(images=2, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return {
        layer.name: torch.rand(images, layer.out_features, layer.in_features, generator=stream) < 0.5
        for layer in LAYERS
    }


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (3, 3), (1, 1), (1, 8), (5, 13), (128, 128)])
def test_bits_come_back_for_every_size(rows, columns):
    layer = Layer("x", rows, columns)
    mask = torch.rand(3, rows, columns, generator=torch.Generator().manual_seed(rows)) < 0.5
    packed = pack_bits(mask)
    assert packed.shape == (3, packed_size(layer)) == (3, -(-rows * columns // 8))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, layer), mask)


def test_the_first_weight_is_the_lowest_bit():
    mask = torch.tensor([[[True, False, False], [False, True, False], [False, False, True]]])
    assert pack_bits(mask).tolist() == [[0b00010001, 0b1]]


def test_recorded_steps_come_back_and_are_in_order():
    masks = RecordedMasks(SMALL, 2, {"prompt": "a red circle"})
    steps = {sigma: small_mask(seed=n) for n, sigma in enumerate((1.0, 14.5, 0.25))}
    for sigma, step in steps.items():
        masks.add(sigma, step)
    assert masks.sigmas == [14.5, 1.0, 0.25]
    assert masks.record == {"prompt": "a red circle"}
    for sigma, step in steps.items():
        found = masks.at(sigma)
        assert found.keys() == step.keys()
        assert all(torch.equal(found[name], step[name]) for name in step)


def test_the_nearest_step_is_the_one_with_the_nearest_ratio():
    masks = RecordedMasks(SMALL, 2)
    for seed, sigma in enumerate((10.0, 1.0, 0.1)):
        masks.add(sigma, small_mask(seed=seed))
    expected = {20.0: 10.0, 3.3: 10.0, 3.0: 1.0, 0.32: 1.0, 0.31: 0.1, 0.001: 0.1, 0.0: 0.1, 1e9: 10.0}
    for sigma, nearest in expected.items():
        assert masks.nearest(sigma) is masks.nearest(nearest), sigma


def test_sigmas_that_differ_in_the_last_bit_are_two_steps():
    masks = RecordedMasks(SMALL, 2)
    first, second = 1.0, 1.0 + 2**-52
    masks.add(first, small_mask(seed=1))
    masks.add(second, small_mask(seed=2))
    assert torch.equal(masks.at(first)["a"], small_mask(seed=1)["a"])
    assert torch.equal(masks.at(second)["a"], small_mask(seed=2)["a"])


def test_the_same_sigma_again_replaces_the_step():
    masks = RecordedMasks(SMALL, 2)
    masks.add(1.0, small_mask(seed=1))
    masks.add(1.0, small_mask(seed=2))
    assert masks.sigmas == [1.0]
    assert torch.equal(masks.at(1.0)["b"], small_mask(seed=2)["b"])


def test_layers_that_are_kept_whole_cost_nothing():
    masks = RecordedMasks(SMALL, 2)
    step = small_mask()
    masks.add(1.0, {**step, "a": torch.ones(2, 4, 6, dtype=torch.bool)})
    assert masks.at(1.0).keys() == {"b", "c"}
    assert masks.bytes == 2 * (2 + 1)
    masks.add(2.0, {})
    assert masks.at(2.0) == {}


def test_keep_ratio_counts_layers_that_are_not_stored_as_kept():
    masks = RecordedMasks(SMALL, 2)
    step = small_mask()
    masks.add(1.0, step)
    masks.add(2.0, {"b": step["b"]})
    masks.add(3.0, {})
    weights = 2 * (24 + 9 + 8)
    removed = {name: int((~mask).sum()) for name, mask in step.items()}
    assert masks.keep_ratio() == pytest.approx([1.0, 1 - removed["b"] / weights, 1 - sum(removed.values()) / weights])


@pytest.mark.parametrize(
    ("sigma", "masks", "sentence"),
    [
        (0.0, {}, "positive and finite"),
        (float("nan"), {}, "positive and finite"),
        (float("inf"), {}, "positive and finite"),
        (1.0, {"d": torch.ones(2, 1, 1, dtype=torch.bool)}, "layer d is not in the structure"),
        (1.0, {"a": torch.ones(1, 4, 6, dtype=torch.bool)}, r"should be bool \(2, 4, 6\)"),
        (1.0, {"a": torch.ones(2, 4, 6)}, r"is torch.float32 \(2, 4, 6\), but should be bool"),
    ],
)
def test_what_cannot_be_recorded_is_refused(sigma, masks, sentence):
    recorded = RecordedMasks(SMALL, 2)
    with pytest.raises(ValueError, match=sentence):
        recorded.add(sigma, masks)
    assert recorded.sigmas == []


def sample(model, clip, images=1, steps=4, size=8, sampler="euler", scheduler="normal", seed=1):
    """Latents of a batch, as EmptyLatentImage and KSampler make them."""
    import comfy.sample

    latent = torch.zeros(images, 4, size, size)
    noise = comfy.sample.prepare_noise(latent, seed)
    conditioning = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red circle", "")]
    return comfy.sample.sample(
        model, noise, steps, 5.0, sampler, scheduler, *conditioning, latent, disable_pbar=True, seed=seed
    )


@pytest.fixture
def split(monkeypatch):
    """The host has too little memory for both branches of CFG in one call. Gives the batch of every call."""
    import comfy.model_base

    batches = []
    apply_model = comfy.model_base.BaseModel.apply_model

    def counting(self, x, *args, **kwargs):
        batches.append(len(x))
        return apply_model(self, x, *args, **kwargs)

    def install():
        monkeypatch.setattr(comfy.model_base.BaseModel, "apply_model", counting)
        monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *args, **kwargs: 1e15)
        return batches

    return install


def record(model, clip, structure, images, **settings):
    """The latents of a run with masks of a lively generator, and these masks."""
    recording = Recording(GeneratorMasks(make_generator(structure, lively=True)), images)
    latents = sample(attach(model, recording, 1.0, 0.0, 1.0), clip, images, **settings)
    return latents, recording.masks()


def replay(model, clip, masks, images=1, strength=1.0, **settings):
    return sample(attach(model, RecordedSource(masks), strength, 0.0, 1.0), clip, images, **settings)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde"])
def test_a_run_is_repeated_bit_for_bit(toy, toy_structure, images, sampler):
    model, clip, _ = toy
    latents, masks = record(model, clip, toy_structure, images, sampler=sampler)
    assert torch.equal(replay(model, clip, masks, images, sampler=sampler), latents)
    assert not torch.equal(sample(model, clip, images, sampler=sampler), latents)
    assert all(0.5 < ratio < 0.999 for ratio in masks.keep_ratio())


@pytest.mark.parametrize("images", [1, 3])
def test_a_run_in_split_calls_is_repeated_bit_for_bit(toy, toy_structure, split, images):
    model, clip, _ = toy
    batches = split()
    latents, masks = record(model, clip, toy_structure, images)
    assert torch.equal(replay(model, clip, masks, images), latents)
    assert set(batches) == {images}


@pytest.mark.parametrize("images", [1, 3])
def test_the_same_masks_reach_split_and_joint_calls(toy, toy_structure, split, images):
    model, clip, _ = toy
    latents, masks = record(model, clip, toy_structure, images)
    split()
    torch.testing.assert_close(replay(model, clip, masks, images), latents, rtol=1e-3, atol=1e-3)


def test_every_image_gets_its_own_masks(toy, toy_structure):
    """The masks of one image in a batch of three give the picture that they give alone."""
    model, clip, _ = toy
    latents, masks = record(model, clip, toy_structure, 3)
    for n in range(3):
        own = RecordedMasks(toy_structure, 1)
        for sigma in masks.sigmas:
            own.add(sigma, {name: mask[n : n + 1] for name, mask in masks.at(sigma).items()})
        alone = replay(model, clip, own, 3)
        torch.testing.assert_close(alone[n], latents[n], rtol=1e-3, atol=1e-3)
        assert (alone[(n + 1) % 3] - latents[(n + 1) % 3]).abs().max() > 0.01


class Watched(RecordedSource):
    """Notes which step is replayed at which sigma."""

    def __init__(self, masks):
        super().__init__(masks)
        self.seen = {}

    def begin(self, call: Call):
        step = self.masks.nearest(call.sigma)
        self.seen[call.sigma] = next(sigma for sigma, other in self.masks.steps.items() if other is step)
        return super().begin(call)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 9},
        {"steps": 2},
        {"size": 12},
        {"sampler": "dpmpp_2m", "scheduler": "karras"},
        {"sampler": "euler_ancestral", "scheduler": "sgm_uniform"},
        {"images": 2},
        {"seed": 2},
    ],
)
def test_other_settings_take_the_nearest_step(toy, toy_structure, settings):
    model, clip, _ = toy
    _, masks = record(model, clip, toy_structure, 1)
    source = Watched(masks)
    result = sample(attach(model, source, 1.0, 0.0, 1.0), clip, **settings)
    assert torch.isfinite(result).all()
    assert not torch.equal(result, sample(model, clip, **settings))
    assert source.seen
    for sigma, taken in source.seen.items():
        ratios = {recorded: max(sigma / recorded, recorded / sigma) for recorded in masks.sigmas}
        assert ratios[taken] == min(ratios.values())


@pytest.mark.parametrize(("recorded", "sampled"), [(2, 1), (3, 2), (3, 4)])
def test_another_batch_than_recorded_gets_a_sentence(toy, toy_structure, recorded, sampled):
    """A batch of one with both branches of CFG has two rows: nobody may take them for two images."""
    sentence = rf"for a batch of {recorded} images, but the batch that is sampled has {sampled}\. Set the batch size"
    with pytest.raises(IncompatibleMasks, match=sentence):
        replay(*toy[:2], random_masks(toy_structure, recorded), sampled)


def test_a_multiple_of_the_batch_repeats_its_masks(toy, toy_structure):
    model, clip, _ = toy
    masks, twice = random_masks(toy_structure, 2), RecordedMasks(toy_structure, 4)
    for sigma in masks.sigmas:
        twice.add(sigma, {name: mask.repeat(2, 1, 1) for name, mask in masks.at(sigma).items()})
    assert torch.equal(replay(model, clip, masks, 4), replay(model, clip, twice, 4))


def test_masks_that_keep_everything_equal_the_stock_model_bit_for_bit(toy, toy_structure):
    model, clip, _ = toy
    for images in (1, 2):
        masks = RecordedMasks(toy_structure, images)
        masks.add(1.0, {})
        assert torch.equal(replay(model, clip, masks, images), sample(model, clip, images))


def test_strength_scales_what_is_removed(toy, toy_structure):
    model, clip, _ = toy
    masks = random_masks(toy_structure)
    stock, half, whole = sample(model, clip), replay(model, clip, masks, strength=0.5), replay(model, clip, masks)
    assert torch.equal(replay(model, clip, masks, strength=0.0), stock)
    assert 0 < (half - stock).abs().mean() < (whole - stock).abs().mean()


def test_a_replay_leaves_the_model_bitwise_as_it_was(toy, toy_structure):
    model, clip, _ = toy
    stock = sample(model, clip)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    replay(model, clip, random_masks(toy_structure))
    with pytest.raises(IncompatibleMasks):
        replay(model, clip, random_masks(toy_structure, 2))
    after = model.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(sample(model, clip), stock)


def test_masks_of_another_family_and_masks_without_steps_are_refused(toy, toy_structure, sd15_structure):
    model = structure_of(toy[0], "decoder attention")
    random_masks(toy_structure).require_fit(model)
    foreign = RecordedMasks(sd15_structure, 1)
    foreign.add(1.0, {})
    with pytest.raises(IncompatibleMasks, match=r"recorded on SD 1\.5, but the connected model is the MaskUNet toy"):
        foreign.require_fit(model)
    with pytest.raises(IncompatibleMasks, match="hold no step"):
        RecordedMasks(toy_structure, 1).require_fit(model)


def test_a_step_of_sd15_takes_a_bit_per_weight(sd15_structure):
    masks = RecordedMasks(sd15_structure, 1)
    masks.add(1.0, {n: torch.zeros(1, v.out_features, v.in_features).bool() for n, v in masks.layers.items()})
    assert masks.bytes == sd15_structure.masked_weights // 8
    assert 6.1e6 < masks.bytes < 6.2e6
    assert masks.keep_ratio() == [0.0]
