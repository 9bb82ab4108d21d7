"""A search that follows attention to the words beside its reward, on the toy model in the real host."""

from dataclasses import replace
from functools import partial

import comfy.sample
import pytest
import torch

from maskunet_core.attention.guidance import AttentionGuidance, GuidanceSettings
from maskunet_core.attention.words import read, sets_in
from maskunet_core.choices import ATTENTION_METHODS
from maskunet_core.rewards.reward import value_and_gradient
from maskunet_core.rewards.toy import ToyReward
from maskunet_core.search.decoder import latent_decoder
from maskunet_core.search.judge import Judge
from maskunet_core.search.sampling import RewardSearch
from maskunet_core.search.settings import SearchSettings
from maskunet_core.toy.model import load_toy_model

PROMPTS = ("a red circle and a small blue square", "a large green star and a ring")
SETTINGS = SearchSettings(iterations=2, start_percent=0.6, lr=0.1, branches="positive")


@pytest.fixture(scope="module")
def toy():
    return load_toy_model()


def search(toy, method, weight, prompts=PROMPTS[:1], **changes):
    """The search after its run, and its latents; each image has a prompt of its own."""
    model, clip, vae = toy
    told = [read(clip, text) for text in prompts]
    words = [replace(each, sets=sets_in(each.words)) for each in told]
    guided = AttentionGuidance(words, GuidanceSettings(method, 5.0), lambda *_: True).guiding(model)
    bound = ToyReward().bind(prompts[0])
    judge = Judge(latent_decoder(vae, model.get_model_object("latent_format")), partial(value_and_gradient, bound))
    run = RewardSearch(guided, replace(SETTINGS, attention_weight=weight, **changes), judge, len(prompts))
    contexts = [
        torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in texts]) for texts in (prompts, [""])
    ]
    texts = [[[context, {}]] for context in contexts]
    start = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        latents = comfy.sample.sample(
            run.searching(guided), start, 4, 5.0, "euler", "normal", *texts, torch.zeros_like(start), disable_pbar=True
        )
    return run, latents


def taken(run):
    """`[steps, N]`: losses of the looks that the steps were taken with."""
    steps = sorted({look.step for look in run.history})
    looks = [[look for look in run.history if look.step == step] for step in steps]
    best = [torch.stack([look.scores for look in of_step]).argmax(0) for of_step in looks]
    return torch.stack(
        [torch.stack([look.losses for look in each]).gather(0, n[None])[0] for each, n in zip(looks, best)]
    )


@pytest.mark.parametrize("method", ATTENTION_METHODS)
def test_masks_that_follow_attention_too_lower_its_loss_further(toy, method):
    barely, much = (search(toy, method, weight)[0] for weight in (1e-6, 100.0))
    assert taken(much).mean() < taken(barely).mean() - 0.01
    first = [run.history[0] for run in (barely, much)]
    torch.testing.assert_close(first[1].losses, first[0].losses)
    torch.testing.assert_close(first[1].rewards, first[0].rewards, rtol=1e-4, atol=1e-4)
    for look in much.history:
        torch.testing.assert_close(look.scores, look.rewards - 100.0 * look.losses)


def test_latents_that_are_searched_for_follow_attention_too(toy):
    barely, much = (
        search(toy, ATTENTION_METHODS[1], weight, masks=False, latent_lr=0.05)[0] for weight in (1e-6, 100.0)
    )
    assert taken(much).mean() < taken(barely).mean() - 0.01


def test_each_image_of_a_batch_follows_the_words_of_its_own_prompt(toy):
    both, alone = (search(toy, ATTENTION_METHODS[1], 100.0, prompts)[0] for prompts in (PROMPTS, PROMPTS[:1]))
    assert both.history[0].losses.shape == (2,)
    torch.testing.assert_close(both.history[0].losses[:1], alone.history[0].losses, rtol=1e-4, atol=1e-4)
