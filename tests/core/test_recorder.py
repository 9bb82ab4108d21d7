"""Masks that are recorded while the host samples as always."""

import gc
import weakref

import pytest
import torch

from maskunet_core.files import mask_file
from maskunet_core.masks.call import Call
from maskunet_core.masks.sources import GeneratorMasks, RandomMasks
from maskunet_core.records.recorded import EACH, RecordedMasks, RecordedSource
from maskunet_core.records.recorder import NothingRecorded, Recorder, masks_of_run, recording, without_recording
from maskunet_core.seam.attach import attach, structure_of
from maskunet_core.seam.run import Run
from tests.builders import call_of, make_generator
from tests.core.test_attach import assert_untouched, snapshot
from tests.recording import random_masks


class Noted:
    """Gives what `source` gives, and notes by sigma, branch and layer which masks acted: [images, out, in]."""

    def __init__(self, source, images):
        self.source, self.structure, self.images = source, source.structure, images
        self.noted = {}

    def begin(self, call: Call):
        mask_of = self.source.begin(call)

        def mask(layer, weight):
            found = mask_of(layer, weight)
            rows = found.expand(len(call.chunks) * self.images, *weight.shape)
            for chunk, part in zip(call.chunks, rows.split(self.images)):
                self.noted.setdefault((call.sigma, chunk.branch, layer), part.cpu().clone())
            return found

        return mask


def sample(model, clip, images=1, steps=4, sampler="euler", seed=1, text="a red circle", cfg=5.0):
    """The latents of a run, as KSampler makes them."""
    import comfy.sample

    latent = torch.zeros(images, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, seed)
    conditioning = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (text, "")]
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "normal", *conditioning, latent, disable_pbar=True, seed=seed
    )


@pytest.fixture
def lively(toy_structure):
    return GeneratorMasks(make_generator(toy_structure, lively=True))


@pytest.mark.parametrize("order", ["record last", "record first"])
@pytest.mark.parametrize("images", [1, 2])
def test_a_record_holds_the_masks_that_acted(toy, lively, images, order):
    model, clip, _ = toy
    source = Noted(lively, images)
    if order == "record last":
        masked = recording(attach(model, source, 1.0, 0.0, 1.0))
    else:
        masked = attach(recording(model), source, 1.0, 0.0, 1.0)
    masks = masks_of_run(sample(masked, clip, images))
    assert (masks.images, masks.branches, masks.targets) == (images, EACH, "decoder attention")
    assert masks.structure == structure_of(model, "decoder attention")
    assert masks.record == {"sources": ["Noted"], "strengths": [1.0], "seeds": [1] * images}
    assert {sigma for sigma, _, _ in source.noted} == set(masks.sigmas)
    assert len(masks.sigmas) == 4
    for (sigma, branch, layer), mask in source.noted.items():
        kept = masks.at(sigma).get(layer, torch.ones(2 * images, *mask.shape[1:], dtype=torch.bool))
        assert torch.equal(kept[branch * images : (branch + 1) * images], mask), (sigma, branch, layer)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_a_record_repeats_the_run_bit_for_bit_also_from_a_file(toy, lively, images, sampler, tmp_path):
    model, clip, _ = toy
    latents = sample(recording(attach(model, lively, 1.0, 0.0, 1.0)), clip, images, sampler=sampler)
    assert torch.equal(sample(attach(model, lively, 1.0, 0.0, 1.0), clip, images, sampler=sampler), latents)
    mask_file.save(tmp_path / "masks.safetensors", masks_of_run(latents))
    masks = mask_file.load(tmp_path / "masks.safetensors")
    assert (masks.images, masks.branches) == (images, EACH)
    again = sample(attach(model, RecordedSource(masks), 1.0, 0.0, 1.0), clip, images, sampler=sampler)
    assert torch.equal(again, latents)
    assert not torch.equal(sample(model, clip, images, sampler=sampler), latents)


def test_one_mask_for_both_branches_is_kept_once(toy, toy_structure):
    model, clip, _ = toy
    masks = masks_of_run(
        sample(recording(attach(model, RandomMasks(toy_structure, 0.9, 3, True), 1.0, 0.0, 1.0)), clip)
    )
    assert masks.branches == "both"
    assert masks.rows == 1
    assert masks.keep_ratio() == pytest.approx([0.9] * 4, abs=0.003)
    shared = random_masks(toy_structure, 2, branches="positive")
    replayed = masks_of_run(sample(recording(attach(model, RecordedSource(shared), 1.0, 0.0, 1.0)), clip, 2))
    assert replayed.branches == EACH
    for sigma in replayed.sigmas:
        expected, found = shared.at(sigma), replayed.at(sigma)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[layer][:2], mask) and found[layer][2:].all() for layer, mask in expected.items())


def test_without_guidance_there_is_one_branch(toy, lively):
    model, clip, _ = toy
    masks = masks_of_run(sample(recording(attach(model, lively, 1.0, 0.0, 1.0)), clip, cfg=1.0))
    assert (masks.branches, len(masks.sigmas)) == ("both", 4)


def test_several_sources_are_recorded_as_what_all_of_them_keep(toy, toy_structure):
    model, clip, _ = toy
    sources = [RandomMasks(toy_structure, 0.9, seed, per_step=False) for seed in (1, 2)]
    masked = attach(attach(model, sources[0], 1.0, 0.0, 1.0), sources[1], 0.5, 0.0, 1.0)
    masks = masks_of_run(sample(recording(masked), clip))
    assert masks.record["strengths"] == [1.0, 0.5]
    weight, name = torch.empty(128, 128), next(iter(masks.layers))
    one, other = (source.begin(Call())(name, weight) for source in sources)
    assert torch.equal(masks.at(masks.sigmas[0])[name][0], one & other)


def test_steps_at_which_no_mask_is_active_are_recorded_as_kept(toy, lively):
    model, clip, _ = toy
    ratios = masks_of_run(sample(recording(attach(model, lively, 1.0, 0.5, 1.0)), clip)).keep_ratio()
    assert ratios[:2] == [1.0, 1.0]
    assert all(ratio < 0.99 for ratio in ratios[2:])


@pytest.mark.parametrize("targets", ["decoder attention", "all attention", "decoder attention and feed-forward"])
def test_the_smallest_target_set_that_holds_all_masks_is_named(toy, targets):
    model, clip, _ = toy
    source = RandomMasks(structure_of(model, targets), 0.9, 1, per_step=True)
    masks = masks_of_run(sample(recording(attach(model, source, 1.0, 0.0, 1.0)), clip))
    assert masks.targets == targets
    masks.require_fit(structure_of(model, targets))


def test_masks_that_no_target_set_holds_are_refused_before_sampling(toy):
    model, clip, _ = toy
    for targets in ("all attention", "decoder attention and feed-forward"):
        model = attach(model, RandomMasks(structure_of(model, targets), 0.9, 1, True), 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="no single target set holds"):
        sample(recording(model), clip)


def test_each_latent_has_the_record_of_its_own_run(toy, lively):
    """One model, two samplers, as in a graph: whoever asks later still gets the right one."""
    model, clip, _ = toy
    masked = recording(attach(model, lively, 1.0, 0.0, 1.0))
    first, second = (sample(masked, clip, seed=seed) for seed in (1, 2))
    again = sample(masked, clip, seed=1)
    steps, repeated = masks_of_run(first).steps, masks_of_run(again).steps
    assert all(torch.equal(mask, repeated[sigma][layer]) for sigma in steps for layer, mask in steps[sigma].items())
    assert masks_of_run(first).record["seeds"] == [1]
    assert masks_of_run(second).record["seeds"] == [2]
    assert masks_of_run(first).keep_ratio() != masks_of_run(second).keep_ratio()


def test_the_record_stays_where_the_host_moves_or_converts_the_latent(toy, lively, monkeypatch):
    """As on a GPU, or with half precision between nodes: the sampler's tensor is not the one that the node gives."""
    import comfy.model_management

    model, clip, _ = toy
    masked = attach(model, lively, 1.0, 0.0, 1.0)
    monkeypatch.setattr(comfy.model_management, "intermediate_dtype", lambda: torch.float16)
    plain, latents = sample(masked, clip), sample(recording(masked), clip)
    assert latents.dtype == torch.float16
    assert torch.equal(plain, latents)
    assert len(masks_of_run(latents).sigmas) == 4


def test_the_record_goes_with_its_latent(toy, lively):
    model, clip, _ = toy
    masked = recording(attach(model, lively, 1.0, 0.0, 1.0))
    latents = sample(masked, clip)
    held = weakref.ref(masks_of_run(latents))
    assert held() is not None
    del latents
    gc.collect()
    assert held() is None


def test_a_branch_that_is_computed_again_at_a_sigma_is_recorded_apart():
    """Perturbed attention guidance calls the model once more for the positive branch."""
    recorder, run = Recorder(), Run()
    masks = torch.tensor([[[True, False]], [[False, True]]])
    sigmas = torch.tensor([2.0])
    for guidance, found in (((1, 0), masks), ((0,), torch.tensor([[[False, False]]]))):
        call = run.call({"cond_or_uncond": guidance, "sigmas": sigmas}, len(found))
        with recorder.recording(call) as observe:
            observe("a", found)
    step = recorder.steps[2.0]
    assert {place: layers["a"].tolist() for place, layers in step.items()} == {
        (1, "negative.0#0"): [[0b01]],
        (0, "positive.0#0"): [[0b10]],
        (0, "positive.0#1"): [[0b00]],
    }
    assert recorder.images == 1


def test_perturbed_attention_does_not_disturb_the_record(toy, lively):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    model, clip, _ = toy
    source = Noted(lively, 1)
    perturbed = PerturbedAttentionGuidance.execute(attach(model, source, 1.0, 0.0, 1.0), 3.0).args[0]
    masks = masks_of_run(sample(recording(perturbed), clip))
    for (sigma, branch, layer), mask in source.noted.items():
        assert torch.equal(masks.at(sigma)[layer][branch : branch + 1], mask) or bool(mask.all())


def test_recording_changes_neither_the_picture_nor_the_model(toy, lively):
    model, clip, _ = toy
    masked = attach(model, lively, 1.0, 0.0, 1.0)
    expected, stock = sample(masked, clip), sample(model, clip)
    before = snapshot(model)
    recorded = recording(masked)
    options = {name: dict(value) for name, value in recorded.model_options.items() if isinstance(value, dict)}
    assert torch.equal(sample(recorded, clip), expected)
    assert {name: dict(value) for name, value in recorded.model_options.items() if isinstance(value, dict)} == options
    assert_untouched(model, before)
    assert torch.equal(sample(model, clip), stock)
    assert "maskunet_record" not in masked.wrappers["outer_sample"]


class Failing(RandomMasks):
    def begin(self, call: Call):
        if call.sigma < 5:
            raise RuntimeError("stop here")
        return super().begin(call)


def test_a_run_that_fails_leaves_no_record_and_the_model_as_it_was(toy, toy_structure):
    model, clip, _ = toy
    stock = sample(model, clip)
    before = snapshot(model)
    masked = recording(attach(model, Failing(toy_structure, 0.9, 1, True), 1.0, 0.0, 1.0))
    with pytest.raises(RuntimeError, match="stop here"):
        sample(masked, clip)
    assert "maskunet_recorder" not in masked.model_options["transformer_options"]
    assert_untouched(model, before)
    assert torch.equal(sample(model, clip), stock)


def test_a_latent_without_a_record_gets_a_sentence(toy, lively):
    model, clip, _ = toy
    unrecorded = sample(attach(model, lively, 1.0, 0.0, 1.0), clip)
    with pytest.raises(NothingRecorded, match="Put MaskUNet Record Masks in front of the sampler"):
        masks_of_run(unrecorded)
    changed = sample(recording(attach(model, lively, 1.0, 0.0, 1.0)), clip) * 2
    with pytest.raises(NothingRecorded, match="nodes that change a latent drop the record"):
        masks_of_run(changed)


def test_a_run_without_masks_gets_a_sentence(toy, lively):
    model, clip, _ = toy
    for masked in (recording(model), recording(attach(model, lively, 0.0, 0.0, 1.0))):
        latents = sample(masked, clip)
        assert torch.equal(latents, sample(model, clip))
        with pytest.raises(NothingRecorded, match="ran without masks"):
            masks_of_run(latents)


def test_recording_can_be_taken_off_a_clone(toy, lively):
    model, clip, _ = toy
    recorded = recording(attach(model, lively, 1.0, 0.0, 1.0))
    with pytest.raises(NothingRecorded, match="holds no recorded masks"):
        masks_of_run(sample(without_recording(recorded), clip))
    assert masks_of_run(sample(recorded, clip)).sigmas


def test_masks_of_each_branch_in_a_batch_of_two(toy_structure):
    """Rows: the images of the positive branch, then those of the negative one, whatever order the host calls in."""
    masks = RecordedMasks(toy_structure, 2, branches=EACH)
    name, layer = next(iter(masks.layers.items()))
    rows = torch.rand(4, layer.out_features, layer.in_features, generator=torch.Generator().manual_seed(0)) < 0.5
    masks.add(1.0, {name: rows})
    weight = torch.empty(layer.out_features, layer.in_features)

    def given(*guidance, batch=2):
        call = call_of(1.0, guidance, batch)
        mask = RecordedSource(masks).begin(call)
        call.enter("up.0", torch.empty(len(guidance) * batch, 1, 1, 1), torch.empty(1))
        return mask(name, weight)

    assert torch.equal(given(1, 0), rows[[2, 3, 0, 1]])
    assert torch.equal(given(0), rows[:2])
    assert torch.equal(given(1), rows[2:])
    assert torch.equal(given(0, 1, batch=4), rows[[0, 1, 0, 1, 2, 3, 2, 3]])
    # What all share costs one product, and gives the bits that one product gives.
    masks.add(1.0, {name: rows[:1].expand(4, -1, -1)})
    assert torch.equal(given(1, 0), rows[0])
    masks.add(1.0, {name: rows})
    masks.keep_all(1)
    assert torch.equal(given(0, 1)[[0, 2]], rows[[0, 2]])
    assert given(0, 1)[[1, 3]].all()
    assert masks.keep_ratio()[0] == pytest.approx(1 - int((~rows[[0, 2]]).sum()) / (4 * toy_structure.masked_weights))
