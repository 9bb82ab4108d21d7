"""Masks belong to conditionings: regional prompts, ranges and samplers that look twice are recorded and replayed."""

import comfy.sample
import comfy.samplers
import pytest
import torch

from maskunet_core.files import mask_file
from maskunet_core.masks.sources import GeneratorMasks
from maskunet_core.records.recorded import RecordedSource
from maskunet_core.records.recorder import masks_of_run, recording
from maskunet_core.seam.attach import attach
from tests.builders import make_generator


def encoded(clip, text, **more):
    ((context, options),) = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return [[context, options | more]]


def left_half(size=8):
    mask = torch.zeros(1, size, size)
    mask[..., : size // 2] = 1
    return mask


def with_controlled_guidance(model):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, 3.0)[0]


PROMPTS = {
    "two prompts": lambda clip: encoded(clip, "a red circle") + encoded(clip, "a blue square"),
    "areas": lambda clip: (
        encoded(clip, "a red circle", area=(4, 8, 0, 0), strength=1.0)
        + encoded(clip, "a blue square", area=(4, 8, 4, 0), strength=1.0)
    ),
    "an area and the whole": lambda clip: (
        encoded(clip, "a red circle", area=(4, 8, 0, 0), strength=1.0) + encoded(clip, "a blue square")
    ),
    "masks": lambda clip: (
        encoded(clip, "a red circle", mask=left_half()) + encoded(clip, "a blue square", mask=1 - left_half())
    ),
    "ranges": lambda clip: (
        encoded(clip, "a red circle", start_percent=0.0, end_percent=0.5)
        + encoded(clip, "a blue square", start_percent=0.3, end_percent=1.0)
    ),
    "a gap": lambda clip: (
        encoded(clip, "a red circle", start_percent=0.0, end_percent=0.3)
        + encoded(clip, "a blue square", start_percent=0.8, end_percent=1.0)
    ),
}


@torch.no_grad()
def sample(model, positive, negative, images=2, sampler="euler", steps=4):
    noise = torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    parts = (model, noise, steps, 5.0, sampler, "normal", positive, negative, torch.zeros_like(noise))
    return comfy.sample.sample(*parts, disable_pbar=True, seed=1)


def replayed(model, masks, *conditioning, **options):
    return sample(attach(model, RecordedSource(masks), 1.0, 0.0, 1.0), *conditioning, **options)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", PROMPTS)
def test_several_prompts_are_replayed_bit_for_bit(toy, toy_structure, name, images, tmp_path):
    model, clip, _ = toy
    conditioning = PROMPTS[name](clip), encoded(clip, "")
    source = GeneratorMasks(make_generator(toy_structure, lively=True))
    drawn = sample(recording(attach(model, source, 1.0, 0.0, 1.0)), *conditioning, images=images)
    masks = masks_of_run(drawn)
    assert torch.equal(replayed(model, masks, *conditioning, images=images), drawn)
    assert not torch.equal(sample(model, *conditioning, images=images), drawn)
    mask_file.save(tmp_path / "masks.safetensors", masks)
    loaded = mask_file.load(tmp_path / "masks.safetensors")
    assert torch.equal(replayed(model, loaded, *conditioning, images=images), drawn)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde", "uni_pc"])
def test_samplers_that_look_twice_are_replayed_bit_for_bit(toy, toy_structure, sampler):
    model, clip, _ = toy
    conditioning = encoded(clip, "a red circle"), encoded(clip, "")
    source = GeneratorMasks(make_generator(toy_structure, lively=True))
    drawn = sample(recording(attach(model, source, 1.0, 0.0, 1.0)), *conditioning, sampler=sampler)
    assert torch.equal(replayed(model, masks_of_run(drawn), *conditioning, sampler=sampler), drawn)


def test_perturbed_attention_is_replayed_bit_for_bit(toy, toy_structure):
    model, clip, _ = toy
    conditioning = encoded(clip, "a red circle"), encoded(clip, "")
    source = GeneratorMasks(make_generator(toy_structure, lively=True))
    perturbed = with_controlled_guidance(attach(model, source, 1.0, 0.0, 1.0))
    drawn = sample(recording(perturbed), *conditioning)
    assert torch.equal(replayed(with_controlled_guidance(model), masks_of_run(drawn), *conditioning), drawn)


def test_a_guider_with_its_conditionings_in_another_order_is_known_by_their_names(toy, toy_structure):
    """DualCFGGuider calls the negative one first, which the host then numbers 0."""
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    model, clip, _ = toy
    texts = encoded(clip, "a red circle"), encoded(clip, "a blue square"), encoded(clip, "")
    source = GeneratorMasks(make_generator(toy_structure, lively=True))

    @torch.no_grad()
    def dual(patched):
        guider = Guider_DualCFG(patched)
        guider.set_conds(*texts)
        guider.set_cfg(5.0, 3.0)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=1).cpu()

    drawn = dual(recording(attach(model, source, 1.0, 0.0, 1.0)))
    masks = masks_of_run(drawn)
    assert torch.equal(dual(attach(model, RecordedSource(masks), 1.0, 0.0, 1.0)), drawn)
    one = RecordedSource(masks)
    one.masks.branches, one.masks.others = "positive", {}
    acting = []
    attached = attach(model, one, 1.0, 0.0, 1.0)
    begin = one.begin

    def counted(call):
        acting.append(tuple(one._acts_on(chunk.branch) for chunk in call.chunks))
        assert [chunk.entry for chunk in call.chunks if chunk.branch == 0] == ["positive.0"] * sum(acting[-1])
        return begin(call)

    one.begin = counted
    one.masks.steps = {sigma: {k: v[:1] for k, v in step.items()} for sigma, step in one.masks.steps.items()}
    dual(attached)
    assert {sum(places) for places in acting} == {1}
