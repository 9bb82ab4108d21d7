"""What a search takes of the device's memory."""

from dataclasses import replace
from functools import partial
from unittest import mock

import comfy.sample
import comfy.sampler_helpers
import pytest
import torch

from maskunet_core.masks.linear import LearnedMask, MaskLogits, thresholded_linear
from maskunet_core.seam.sampling import NoRoomForGradients
from maskunet_core.search import sampling
from maskunet_core.search.judge import Judge
from maskunet_core.search.loop import Group
from maskunet_core.search.masks import SearchedMasks
from maskunet_core.search.memory import bytes_of_masks, keeps_ways
from maskunet_core.search.sampling import RewardSearch
from maskunet_core.search.settings import SearchSettings
from maskunet_core.toy.model import load_toy_model

SETTINGS = SearchSettings(iterations=1)


def test_masks_take_as_many_numbers_as_their_optimiser_keeps(toy_structure):
    weights = toy_structure.masked_weights
    plain = bytes_of_masks(toy_structure, replace(SETTINGS, momentum=0.0))
    assert plain == (4 + 4) * weights + weights // 4, "logits, gradients, and bits twice"
    assert bytes_of_masks(toy_structure, SETTINGS) == plain + 4 * weights
    assert bytes_of_masks(toy_structure, replace(SETTINGS, optimiser="AdamW")) == plain + 8 * weights
    assert bytes_of_masks(toy_structure, replace(SETTINGS, masks=False, latent_lr=0.1)) == 0
    halves = partial(bytes_of_masks, toy_structure, computing=torch.float16)
    assert halves(SETTINGS) == (2 + 2 + 1) * weights + weights // 4
    assert halves(replace(SETTINGS, optimiser="AdamW")) == plain + 8 * weights


def test_on_a_transformer_a_masked_weight_takes_at_most_6_bytes(monkeypatch):
    """Counted while all of it exists, in fp32, and as much as is told before."""
    counted = []

    def tensors_of(value):
        if isinstance(value, torch.Tensor):
            return [value]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return [tensor for part in parts for tensor in tensors_of(part)]

    class Counting(Group):
        def step(self, slopes, *rest):
            super().step(slopes, *rest)
            moments = [dict(optimiser.state) for optimiser in self._optimisers]
            best = [search._masks.bits(), search._masks.bits()]
            kept = tensors_of([self.leaves, moments, best, [(slope.values, slope.unit) for slope in slopes]])
            counted.append(sum(tensor.nbytes for tensor in kept))

    monkeypatch.setattr(sampling, "Group", Counting)
    model, clip, _ = load_toy_model(body="transformer")
    judge = Judge(lambda z: z[:, :3], lambda pictures: (pictures.sum((1, 2, 3)), torch.ones_like(pictures)))
    search = RewardSearch(model, SETTINGS, judge, 1)
    sample(search.searching(model), clip)
    weights = search.structure.masked_weights
    assert search.recorded.structure.masked_weights == weights
    assert max(counted) <= 6 * weights
    told = bytes_of_masks(search.structure, SETTINGS, ways=keeps_ways(SETTINGS, model.model.diffusion_model))
    assert told == pytest.approx(max(counted), rel=0.02)


def test_a_way_from_the_start_makes_the_masks_and_gradients_of_its_logits(toy_structure):
    layer = next(iter(toy_structure.layers.values()))
    x, weight = (torch.randn(2, size, layer.in_features) for size in (5, layer.out_features))
    found = []
    for from_start in (False, True):
        masks = SearchedMasks(toy_structure, 2, 1.0, torch.device("cpu"), from_start=from_start)
        # Numbers that are the same in either form.
        way = torch.arange(masks.logits[layer.name].numel()).remainder(512).view_as(masks.logits[layer.name]) / 128 - 3
        masks.logits[layer.name].data += way
        learned = LearnedMask(MaskLogits(masks.logits[layer.name]), 0.0, start=1.0 if from_start else 0.0)
        product = thresholded_linear(x, weight[0], None, learned)
        (gradient,) = torch.autograd.grad(product.square().sum(), masks.logits[layer.name])
        found.append((product, gradient, masks.bits()[layer.name]))
        masks.restart(0.5)
        moved = masks.logits[layer.name] + (1.0 if from_start else 0.0)
        assert torch.equal(moved, 1 + way / 2)
    assert all(torch.equal(some, other) for some, other in zip(*found))


@torch.no_grad()
def sample(model, clip):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red circle", ""))
    parts = (model, noise, 2, 5.0, "euler", "normal", *texts, torch.zeros_like(noise))
    return comfy.sample.sample(*parts, disable_pbar=True, seed=1)


def test_a_full_device_is_told_with_what_to_lower(toy):
    model, clip, _ = toy

    def full(latents):
        raise torch.OutOfMemoryError("CUDA out of memory")

    judge = Judge(full, lambda pictures: (pictures.new_zeros(1), pictures))
    before = sample(model, clip)
    with pytest.raises(NoRoomForGradients) as told:
        sample(RewardSearch(model, SETTINGS, judge, 1).searching(model), clip)
    assert str(told.value) == (
        "The search ran out of the device's memory while it looked for masks. What makes it smaller: lower the size or "
        "the batch, set branches to positive (preset quality has it), switch small_decode on (preset quality has it), "
        "connect a TAESD to gradient_vae, load the reward in fp16 and with checkpointing, close other programs that "
        "use the device. Preset fast needs no more than plain sampling."
    )
    assert torch.equal(sample(model, clip), before)


def test_the_host_is_asked_to_leave_room_for_gradients(toy):
    import comfy.model_management

    model, clip, _ = toy
    judge = Judge(lambda z: z[:, :3], lambda pictures: (pictures.new_zeros(1), torch.ones_like(pictures)))
    asked = []
    load = comfy.model_management.load_models_gpu

    def counted(models, memory_required=0, **options):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **options)

    for room in (0, 10**10):
        searching = RewardSearch(model, SETTINGS, judge, 1, room=room).searching(model)
        with mock.patch.object(comfy.model_management, "load_models_gpu", counted):
            sample(searching, clip)
    # Text encoders ask for themselves.
    plain, roomy = (number for number in asked if number)
    assert plain + 10**10 <= roomy <= 1.2 * (plain + 10**10)
