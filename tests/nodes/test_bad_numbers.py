"""A number that is not finite, at one look at one image: as half precision gives where it overflows."""

import logging
import math
from collections import deque

import pytest
import torch

from tests.nodes.reward_graphs import PROMPT
from tests.nodes.scene import SAMPLED, Scene

NAN, INF = math.nan, math.inf
SETTINGS = {
    "SGD": {"candidates": 1, "iterations": 3, "lr": 0.3, "carry": 0.5, "keep_best": False},
    "AdamW": {"candidates": 1, "iterations": 3, "optimiser": "AdamW", "lr": 0.3, "keep_best": False, "noise": True},
    "latent": {"candidates": 1, "iterations": 3, "latent_lr": 0.05},
}


class Poison:
    """Puts `value` into the first image, at the `look`th look of the second searched step; counts what it did."""

    def __init__(self, value: float, look: int):
        self.value, self.look, self.calls = value, look, deque()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls.append(1)
        bad = torch.zeros_like(tensor)
        bad[0] = self.value
        return tensor + bad


class Looks:
    """Counts the looks at steps of the sampler: how often the reward is asked about the batch."""

    PER_STEP = 4
    """With 3 updates at each step."""

    def __init__(self, poison: Poison):
        self.poison, self.count = poison, 0

    def bad(self) -> bool:
        """Counts one look more; whether it is the one."""
        self.count += 1
        return self.count == self.PER_STEP + self.poison.look


def reward_says(looks, scene, monkeypatch):
    _judge(looks, scene, monkeypatch, of_score=True)


def gradient_of_the_reward(looks, scene, monkeypatch):
    _judge(looks, scene, monkeypatch, of_score=False)


def _judge(looks, scene, monkeypatch, of_score):
    judge = type(scene.reward.reward.bind(PROMPT))
    own = judge.__call__

    def look(self, images):
        if len(images) != 2 or not looks.bad():
            return own(self, images)
        if of_score:
            return looks.poison(own(self, images))
        images = images.clone()
        if images.requires_grad:
            images.register_hook(looks.poison)
        return own(self, images)

    monkeypatch.setattr(judge, "__call__", look)


def decoded_picture(looks, scene, monkeypatch):
    network = scene.inputs["vae"].first_stage_model
    own = network.decode

    def decode(latents, *arguments, **options):
        pictures = own(latents, *arguments, **options)
        return looks.poison(pictures) if len(latents) == 2 and looks.bad() else pictures

    monkeypatch.setattr(network, "decode", decode)


def _of_model(looks, scene, backward):
    """In what guidance makes of the U-Net's calls; the first at a noise level is a look."""
    # What a node remembers in lists is put back after looks.
    seen = deque()

    def after_guidance(arguments):
        estimate, sigma = arguments["denoised"], round(float(arguments["sigma"].max()), 4)
        seen.append(sigma)
        levels = sorted(set(seen), reverse=True)
        # Of 3 steps the second and third are searched.
        if len(estimate) == 2 and len(levels) == 3 and seen.count(levels[2]) == looks.poison.look:
            if not backward:
                return looks.poison(estimate)
            estimate = estimate.clone()
            estimate.register_hook(looks.poison)
        return estimate

    scene.model = scene.model.clone()
    scene.model.set_model_sampler_post_cfg_function(after_guidance)


def estimate(looks, scene, monkeypatch):
    _of_model(looks, scene, backward=False)


def gradient_of_the_estimate(looks, scene, monkeypatch):
    _of_model(looks, scene, backward=True)


PLACES = [reward_says, gradient_of_the_reward, decoded_picture, estimate, gradient_of_the_estimate]


@pytest.fixture(scope="module", params=SETTINGS)
def plain(request, extension):
    """Settings, and what a run gives in which all numbers are finite."""
    changes = SETTINGS[request.param]
    latents, masks, *_ = Scene(extension, "toy").search(batch=2, **changes)
    return changes, latents["samples"], masks


def kept_share(masks, sigma: float, image: int) -> float:
    bits = [mask[image] for mask in masks.at(sigma).values()]
    removed = sum(int((~mask).sum()) for mask in bits)
    return 1.0 - removed / sum(layer.out_features * layer.in_features for layer in masks.layers.values())


def removed_in(masks, sigma: float, image: int) -> dict[str, torch.Tensor]:
    """One image's masks at a step, by layer, where they remove anything."""
    return {name: bits[image] for name, bits in masks.at(sigma).items() if not bits[image].all()}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize(("value", "look"), [(NAN, 1), (INF, 2)])
def test_a_number_that_is_not_finite_costs_one_look_of_one_image(
    extension, plain, place, value, look, monkeypatch, caplog
):
    changes, latents, masks = plain
    scene = Scene(extension, "toy")
    poison = Poison(value, look)
    with monkeypatch.context() as patch:
        place(Looks(poison), scene, patch)
        with caplog.at_level(logging.WARNING):
            found, found_masks, *_ = scene.search(batch=2, **changes)
    assert len(poison.calls) == 1
    found = found["samples"]
    assert torch.isfinite(found).all()
    assert all(math.isfinite(score) for score in found_masks.record["scores"])
    for sigma in found_masks.sigmas:
        kept = kept_share(found_masks, sigma, image=0)
        assert kept > 0.3, "nearly all weights of the image were removed"
        if found_masks.steps[sigma] and not changes.get("keep_best", True):
            assert kept < 1.0, "the other looks of the step were lost"
    assert torch.equal(found[1], latents[1]), "the other image changed"
    for sigma in masks.sigmas:
        one, other = (removed_in(recorded, sigma, image=1) for recorded in (found_masks, masks))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    warnings = [record for record in caplog.records if "MaskUNet" in record.getMessage()]
    assert len(warnings) == 1


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("number", [0, 1])
def test_a_candidate_whose_reward_is_not_finite_is_not_chosen(extension, value, number, monkeypatch):
    scene = Scene(extension, "toy")
    judge = type(scene.reward.reward.bind(PROMPT))
    own, looks = judge.__call__, []

    def look(self, images):
        scores = own(self, images)
        looks.append(1)
        return scores + value if len(looks) == number + 1 else scores

    monkeypatch.setattr(judge, "__call__", look)
    _, masks, *_ = scene.search(iterations=0, candidates=2)
    assert masks.record["seeds"] == [SAMPLED["seed"] + 1 - number]
    assert all(math.isfinite(score) for score in masks.record["scores"])
