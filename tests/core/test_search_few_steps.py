"""The search in few steps without guidance, as distilled models are sampled; on the toy model in the real host."""

from dataclasses import replace
from unittest import mock

import comfy.sample
import pytest
import torch

from maskunet_core.records.recorded import RecordedSource
from maskunet_core.rewards.reward import value_and_gradient
from maskunet_core.rewards.toy import ToyReward
from maskunet_core.seam.attach import attach
from maskunet_core.search.decoder import latent_decoder
from maskunet_core.search.judge import Judge
from maskunet_core.search.loop import Group
from maskunet_core.search.masks import SearchedMasks
from maskunet_core.search.sampling import RewardSearch
from maskunet_core.search.settings import PRESETS
from maskunet_core.search.slopes import Slope
from maskunet_core.toy.model import load_toy_model
from tests.device import loaded

PROMPT = "a red circle left of a small blue square"
FEW = replace(PRESETS["few_step"], start_percent=0.0, iterations=2)


class Toy:
    def __init__(self):
        self.model, self.clip, vae = load_toy_model()
        bound = loaded(ToyReward(), vae).bind(PROMPT)
        decode = latent_decoder(vae, self.model.get_model_object("latent_format"))
        self.judge = Judge(decode, lambda pictures: value_and_gradient(bound, pictures))

    @torch.no_grad()
    def sample(self, model, steps: int, sampler: str = "euler"):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        texts = (self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text)) for text in (PROMPT, ""))
        parts = (model, noise, steps, 1.0, sampler, "sgm_uniform", *texts, torch.zeros_like(noise))
        return comfy.sample.sample(*parts, disable_pbar=True, seed=1)


@pytest.fixture(scope="module")
def small_world():
    return Toy()


@pytest.mark.parametrize("sampler", ["euler", "lcm"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_every_step_is_searched_and_the_image_is_repeated_bit_for_bit(small_world, steps, sampler):
    search = RewardSearch(small_world.model, FEW, small_world.judge, 1)
    latents = small_world.sample(search.searching(small_world.model), steps, sampler)
    assert {look.step for look in search.history} == set(range(steps))
    assert len(search.recorded.sigmas) == steps
    assert min(search.recorded.keep_ratio()) < 1.0
    replayed = attach(small_world.model, RecordedSource(search.recorded), 1.0, 0.0, 1.0)
    assert torch.equal(small_world.sample(replayed, steps, sampler), latents)
    into = small_world.model.get_model_object("latent_format").process_in
    plain = small_world.sample(small_world.model, steps, sampler)
    assert small_world.judge.scores(into(latents)) > small_world.judge.scores(into(plain))


def first_gradients(world: Toy, branches: str) -> dict[str, torch.Tensor]:
    """Of the masks at the sole step, as the optimiser gets them."""
    settings = replace(FEW, branches=branches, iterations=1, optimiser="AdamW", lr=1e-2)
    search, seen = RewardSearch(world.model, settings, world.judge, 1), {}

    def keep(group: Group, slopes: list[Slope], factors: list[torch.Tensor], images: list[bool]) -> None:
        whole = [slope.times(factors, torch.float32) for slope in slopes]
        seen.update(zip(search.structure.layers, whole))

    with mock.patch.object(Group, "step", keep):
        world.sample(search.searching(world.model), 1)
    return seen


def test_without_guidance_both_branches_are_the_positive_one(small_world):
    both, positive = (first_gradients(small_world, branches) for branches in ("both", "positive"))
    assert max(float(slope.abs().max()) for slope in both.values()) > 0
    for layer, slope in both.items():
        torch.testing.assert_close(positive[layer], slope, rtol=0, atol=0)


def direct_gradients(world: Toy) -> dict[str, torch.Tensor]:
    """The same by plain autograd through sampler, decoder and reward in one graph."""
    from comfy.patcher_extension import WrappersMP

    from maskunet_core.seam.attach import Attachment, structure_of, with_attachment, with_masks
    from maskunet_core.seam.gradients import kept_weights

    model, found = with_masks(world.model), {}
    bound = loaded(ToyReward()).bind(PROMPT)

    def predict(executor, x, timestep, model_options, seed):
        masks = SearchedMasks(structure_of(world.model, "decoder attention"), 1, 1.0, x.device)
        options = with_attachment(model_options, Attachment(masks))
        # Beyond the CPU the host loads weights in inference mode.
        with torch.enable_grad(), kept_weights([executor.class_obj.inner_model.diffusion_model]):
            estimate = executor(x, timestep, options, seed)
            (-bound(world.judge.decode(estimate)).sum()).backward()
        found.update({layer: leaf.grad for layer, leaf in masks.logits.items()})
        return estimate.detach()

    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "direct", predict)
    world.sample(model, 1)
    return found


def test_gradients_are_those_of_the_whole_graph(small_world):
    ours, direct = first_gradients(small_world, "positive"), direct_gradients(small_world)
    size = max(float(slope.abs().max()) for slope in direct.values())
    for layer, slope in direct.items():
        torch.testing.assert_close(ours[layer], slope, rtol=1e-4, atol=1e-5 * size)


def test_the_negative_branch_is_never_computed(small_world):
    search = RewardSearch(small_world.model, FEW, small_world.judge, 1)
    rows = []
    unet = small_world.model.model.diffusion_model
    handle = unet.output_blocks[0][0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        small_world.sample(search.searching(small_world.model), 2)
    finally:
        handle.remove()
    assert rows == [1] * 2 * (FEW.iterations + 1 + 1), "looks at each step, and the step itself"


@pytest.mark.parametrize("steps", range(1, 9))
def test_candidates_are_drawn_to_the_end_and_the_last_step_is_improved(steps):
    few = PRESETS["few_step"]
    assert few.candidate_steps(steps) == steps
    assert [few.iterations_at(step, steps) for step in range(steps)] == [0] * (steps - 1) + [few.iterations]
