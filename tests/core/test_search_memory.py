"""The memory that a search will take, before it begins."""

import ctypes
import sys
from dataclasses import replace

import comfy.sample
import psutil
import pytest
import torch

from maskunet_core.rewards.reward import CombinedReward, value_and_gradient
from maskunet_core.rewards.toy import ToyReward
from maskunet_core.search.host import NoRoomForGradients, latent_decoder, load_for_gradients
from maskunet_core.search.judge import Judge
from maskunet_core.search.memory import Graph, Need, estimate_need, extrapolated, require_room
from maskunet_core.search.sampling import RewardSearch
from maskunet_core.search.settings import SearchSettings
from maskunet_core.toy.model import load_toy_model
from trainer.cost import PeakMemory

PROMPT = "a red circle left of a small blue square"
SETTINGS = SearchSettings(iterations=2)
GB = 2**30
_MMAP_THRESHOLD = -3
"""Of glibc's `mallopt`."""


class Toy:
    def __init__(self):
        self.model, self.clip, vae = load_toy_model()
        self.reward = ToyReward()
        self.bound = self.reward.bind(PROMPT)
        decode = latent_decoder(vae, self.model.get_model_object("latent_format"))
        self.judge = Judge(decode, lambda pictures: value_and_gradient(self.bound, pictures))
        modules = (self.model.model, vae.first_stage_model, self.reward.reader)
        self.weights = [weight for module in modules for weight in module.parameters()]

    @torch.no_grad()
    def sample(self, model, noise):
        texts = (self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text)) for text in (PROMPT, ""))
        parts = (model, noise, 3, 5.0, "euler", "normal", *texts, torch.zeros_like(noise))
        return comfy.sample.sample(*parts, disable_pbar=True, seed=1, last_step=1)

    def need(self, images: int, side: int, settings: SearchSettings = SETTINGS, bound=None) -> Need:
        return estimate_need(
            model=self.model,
            settings=settings,
            targets="decoder attention",
            judge=self.judge,
            bound=bound or self.bound,
            size=(images, 4, side, side),
            sample=self.sample,
            weights=self.weights,
            device=torch.device("cpu"),
        )


@pytest.fixture(scope="module")
def small_world():
    return Toy()


def measured(world: Toy, images: int, side: int) -> int:
    """Bytes at the peak of a step, beyond what lay in memory before it."""
    search = RewardSearch(world.model, SETTINGS, world.judge, images)
    # What is freed goes back to the system at once, or it would be used again unseen.
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
    libc.malloc_trim(0)
    before = psutil.Process().memory_info().rss
    with PeakMemory(torch.device("cpu")) as memory:
        world.sample(search.model, torch.randn(images, 4, side, side))
    return memory.peak - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory as Linux tells it")
@pytest.mark.parametrize(("images", "side"), [(64, 8), (2, 40)])
def test_the_estimate_is_within_a_quarter_of_the_peak(small_world, images, side):
    """A side of 40 is larger than what is tried."""
    need = small_world.need(images, side).peak
    assert need == pytest.approx(measured(small_world, images, side), rel=0.25)


def test_a_polynomial_is_followed_through_its_points():
    values = {area: 5 + 3 * area + 0.25 * area**2 for area in (64, 256, 576)}
    assert extrapolated(values, 4096) == pytest.approx(5 + 3 * 4096 + 0.25 * 4096**2)
    assert extrapolated({64: 7.0}, 64) == 7.0


def test_images_add_up_and_one_branch_takes_half(small_world):
    one, four = small_world.need(1, 8), small_world.need(4, 8)
    assert four.unet.bytes == 4 * one.unet.bytes
    assert four.masks == 4 * one.masks
    positive = small_world.need(1, 8, replace(SETTINGS, branches="positive"))
    assert positive.unet.bytes == pytest.approx(0.5 * one.unet.bytes, rel=0.1)


def test_masks_take_as_many_numbers_as_their_optimiser_keeps(small_world, toy_structure):
    weights = toy_structure.masked_weights
    kept = {name: small_world.need(1, 8, replace(SETTINGS, optimiser=name)) for name in ("AdamW", "normalised SGD")}
    assert kept["AdamW"].masks - kept["normalised SGD"].masks == 4 * weights
    assert kept["AdamW"].slopes == 4 * weights
    latent = small_world.need(1, 8, replace(SETTINGS, masks=False, latent_lr=0.1))
    assert latent.masks == latent.slopes == latent.features == 0


def test_rewards_in_turn_take_what_the_larger_one_takes(small_world):
    twice = CombinedReward([(1.0, small_world.reward), (2.0, small_world.reward)]).bind(PROMPT)
    assert small_world.need(1, 8, bound=twice).reward == small_world.need(1, 8).reward


def test_an_estimate_leaves_the_model_and_the_random_numbers_alone(small_world):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = small_world.sample(small_world.model, noise)
    small_world.need(1, 8)
    assert torch.equal(small_world.sample(small_world.model, noise), before)
    unet = small_world.model.model.diffusion_model
    assert all("forward" not in module.__dict__ for module in unet.modules())


def need_of(unet: float, vae: float, reward: float) -> Need:
    unet, vae, reward = (Graph(size * GB, 0.0) for size in (unet, vae, reward))
    return Need(masks=GB, slopes=0.0, features=0.0, weights=0.0, unet=unet, vae=vae, reward=reward)


def test_the_peak_is_while_the_reward_is_asked():
    assert need_of(unet=2, vae=3, reward=1).peak == 7 * GB


def test_what_fits_is_let_through():
    require_room(need_of(2, 3, 1), 7 * GB, SETTINGS, "cpu", small_vae=False)


def test_what_does_not_fit_is_told_with_what_to_lower():
    with pytest.raises(NoRoomForGradients) as told:
        require_room(need_of(2, 3, 1), 6 * GB, SETTINGS, "cpu", small_vae=False)
    assert str(told.value) == (
        "The search would take about 7.0 GB beside the models on cpu, where 6.0 GB are free. What makes it smaller: "
        "connect a TAESD to gradient_vae, switch small_decode on (preset quality has it), set branches to positive "
        "(preset quality has it), load the reward with checkpointing, lower the size or the batch."
    )


def test_what_is_lowered_already_is_not_advised():
    settings = replace(SETTINGS, branches="positive", small_decode=True)
    with pytest.raises(NoRoomForGradients, match=r"What makes it smaller: lower the size or the batch\.$"):
        require_room(need_of(8, 3, 1), GB, settings, "cpu", small_vae=True)


def test_a_model_that_is_streamed_in_is_refused(streamed_in):
    model, _, _ = load_toy_model()
    load_for_gradients([model])
    with streamed_in(), pytest.raises(NoRoomForGradients, match=r"does not fit on cpu .* without --lowvram\.$"):
        load_for_gradients([model])
