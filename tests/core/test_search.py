"""The search for masks, on the toy model in the real host."""

import contextlib
from dataclasses import replace
from functools import partial

import comfy.sample
import pytest
import torch
import torch.nn.functional as F

from maskunet_core.records.recorded import RecordedSource, count_ones, unpack_bits
from maskunet_core.rewards.reward import value_and_gradient
from maskunet_core.rewards.toy import ToyReward
from maskunet_core.seam.attach import attach
from maskunet_core.seam.prefix import Prefix
from maskunet_core.search import sampling
from maskunet_core.search.decoder import latent_decoder
from maskunet_core.search.judge import Judge, views_of
from maskunet_core.search.loop import Best, Group
from maskunet_core.search.masks import SearchedMasks
from maskunet_core.search.memory import dtype_of_logits
from maskunet_core.search.run import search_images
from maskunet_core.search.sampling import RewardSearch
from maskunet_core.search.settings import PRESETS, SearchSettings
from maskunet_core.search.slopes import Slope, size_of
from tests.device import loaded
from tests.tiny_models import controlnet

PROMPT, STEPS = "a red circle left of a small blue square", 4
FEW = SearchSettings(iterations=3, start_percent=0.25, end_percent=1.0, lr=0.1)


@pytest.fixture(scope="module")
def toy():
    from maskunet_core.toy.model import load_toy_model

    return load_toy_model()


@pytest.fixture(scope="module")
def judge(toy):
    model, _, vae = toy
    bound = loaded(ToyReward(), vae).bind(PROMPT)
    decode = latent_decoder(vae, model.get_model_object("latent_format"))
    return Judge(decode, lambda pictures: value_and_gradient(bound, pictures))


def noise(images=1, seed=3):
    return torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def sample(model, clip, start, sampler="euler", steps=STEPS, **options):
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, ""))
    parts = (model, start, steps, 5.0, sampler, "normal", positive, negative, torch.zeros_like(start))
    with torch.no_grad():
        return comfy.sample.sample(*parts, disable_pbar=True, seed=1, **options)


def found(toy, judge, settings, images=1, **options):
    model, clip, _ = toy
    search = RewardSearch(model, settings, judge, images, **options)
    return search, sample(search.searching(model), clip, noise(images))


def test_without_iterations_the_stock_sampler_runs(toy, judge):
    _, latents = found(toy, judge, SearchSettings(iterations=0))
    assert torch.equal(latents, sample(toy[0], toy[1], noise()))


@pytest.mark.parametrize("branches", ["both", "positive"])
@pytest.mark.parametrize("images", [1, 3])
def test_found_masks_raise_the_reward_and_repeat_the_image_bit_for_bit(toy, judge, images, branches):
    model, clip, _ = toy
    search, latents = found(toy, judge, replace(FEW, branches=branches), images)
    plain = sample(model, clip, noise(images))
    into = model.get_model_object("latent_format").process_in
    assert (judge.scores(into(latents)) > judge.scores(into(plain))).any()
    replayed = attach(model, RecordedSource(search.recorded), 1.0, 0.0, 1.0)
    assert torch.equal(sample(replayed, clip, noise(images)), latents)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "dpmpp_sde", "uni_pc", "dpm_2"])
def test_every_kind_of_sampler_works_and_is_repeated(toy, judge, sampler):
    model, clip, _ = toy
    search = RewardSearch(model, replace(FEW, iterations=1), judge, 1)
    latents = sample(search.searching(model), clip, noise(), sampler)
    replayed = attach(model, RecordedSource(search.recorded), 1.0, 0.0, 1.0)
    assert torch.equal(sample(replayed, clip, noise(), sampler), latents)
    assert min(search.recorded.keep_ratio()) < 1.0


def test_both_branches_of_guidance_follow_a_latent_that_is_searched(toy, judge):
    settings = replace(FEW, masks=False, latent_lr=0.05)
    both, one = (found(toy, judge, replace(settings, branches=branches))[1] for branches in ("both", "positive"))
    torch.testing.assert_close(one, both, rtol=1e-3, atol=1e-3)
    assert not torch.equal(both, sample(toy[0], toy[1], noise()))


def test_images_of_a_batch_do_not_share_masks_or_rewards(toy, judge):
    search, _ = found(toy, judge, FEW, images=3)
    masks = search.recorded.at(search.recorded.sigmas[1])
    layer = next(iter(masks.values()))
    assert not torch.equal(layer[0], layer[1])
    assert all(look.scores.shape == (3,) for look in search.history)


def test_the_best_masks_of_a_step_are_taken(toy, judge):
    search, _ = found(toy, judge, replace(FEW, lr=3.0, iterations=2))
    first = [look for look in search.history if look.step == 1]
    assert float(first[0].scores) > float(first[-1].scores), "at this rate the first update does harm"
    sigma = search.recorded.sigmas[1]
    assert search.recorded.steps[sigma] == {}, "so the step is taken with all weights"


def test_steps_end_on_a_plateau_and_when_the_reward_is_good_enough(toy, judge):
    flat = Judge(judge.decode, lambda pictures: (torch.zeros(len(pictures)), torch.ones_like(pictures)))
    hopeless, _ = found(toy, flat, replace(FEW, iterations=12, patience=2))
    assert max(look.iteration for look in hopeless.history) == 2
    satisfied, _ = found(toy, judge, replace(FEW, target=-1e9))
    assert {look.iteration for look in satisfied.history} == {0}


def test_a_time_budget_ends_the_updates(toy, judge):
    search, latents = found(toy, judge, replace(FEW, seconds=1e-9))
    assert len(search.history) <= 2
    assert torch.isfinite(latents).all()


def test_a_watched_reward_stops_the_run_when_it_falls(toy, judge):
    settings = replace(FEW, start_percent=0.0)
    looks = []

    def falling(estimate):
        looks.append(1)
        return torch.full((len(estimate),), -float(len(looks)))

    stopped, _ = found(toy, judge, settings, watch=falling, stop_by_watch=True)
    assert {look.step for look in stopped.history} == {0, 1}
    ignored, _ = found(toy, judge, settings, watch=falling)
    assert {look.step for look in ignored.history} == {0, 1, 2, 3}


def test_logits_carry_over_only_where_asked(toy_structure):
    masks = SearchedMasks(toy_structure, 1, 1.0, torch.device("cpu"))
    for logits in masks.logits.values():
        logits.data -= 2.0
    masks.restart(0.5)
    assert all(torch.equal(logits, torch.zeros_like(logits)) for logits in masks.logits.values())
    masks.restart(0.0)
    assert all(torch.equal(logits, torch.ones_like(logits)) for logits in masks.logits.values())


def test_a_model_in_half_precision_is_searched_with_logits_in_half_precision(toy, judge, monkeypatch):
    """They take 5 bytes a weight instead of 12, and find nearly the same."""
    whole, expected = found(toy, judge, FEW)
    monkeypatch.setattr(sampling, "dtype_of_logits", lambda settings, *_: dtype_of_logits(settings, torch.float16))
    halves, latents = found(toy, judge, FEW)
    assert {logits.dtype for logits in whole._masks.logits.values()} == {torch.float32}
    assert {logits.dtype for logits in halves._masks.logits.values()} == {torch.bfloat16}
    first = next(sigma for sigma in whole.recorded.sigmas if whole.recorded.steps[sigma])
    one, other = whole.recorded.steps[first], halves.recorded.steps[first]
    assert one.keys() == other.keys()
    removed = sum(one[layer].numel() * 8 - count_ones(one[layer]) for layer in one)
    differing = sum(count_ones(one[layer] ^ other[layer]) for layer in one)
    assert removed > 0
    assert differing < 0.05 * removed
    assert (latents - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_noise_changes_with_each_look_and_repeats_in_it(toy_structure):
    masks = SearchedMasks(toy_structure, 2, 0.0, torch.device("cpu"), seed=4)
    layer = next(iter(masks.logits))
    first, again = masks.bits()[layer], masks.bits()[layer]
    masks.draw()
    other = masks.bits()[layer]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    kept = unpack_bits(first, toy_structure.layers[layer])
    assert kept.float().mean() == pytest.approx(0.5, abs=0.02)


def test_the_cached_encoder_gives_the_same_gradients(toy, judge, monkeypatch):
    model, clip, _ = toy
    gradients = {}
    for cached in (True, False):
        search = RewardSearch(model, FEW, judge, 1)
        if not cached:
            monkeypatch.setattr(Prefix, "serving", lambda *_: contextlib.nullcontext())
        latents = sample(search.searching(model), clip, noise())
        gradients[cached] = (latents, [float(look.scores) for look in search.history])
    assert torch.equal(gradients[True][0], gradients[False][0])
    assert gradients[True][1] == gradients[False][1]


def test_the_encoder_runs_once_in_a_step_and_leaves_no_trace(toy, judge):
    model, clip, _ = toy
    unet = model.model.diffusion_model
    runs = []
    handle = unet.input_blocks[1][0].in_layers.register_forward_hook(lambda *_: runs.append(1))
    try:
        sample(RewardSearch(model, FEW, judge, 1).searching(model), clip, noise(), steps=1)
    finally:
        handle.remove()
    assert len(runs) == 2, "all looks, and the step itself"
    assert all("forward" not in module.__dict__ for module in unet.modules())


def test_an_interrupt_leaves_the_model_as_it_was(toy, judge):
    model, clip, _ = toy
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    plain = sample(model, clip, noise())

    def cancel(seen, estimate):
        if seen.step == 2 and seen.iteration == 1:
            raise KeyboardInterrupt

    search = RewardSearch(model, FEW, judge, 1, report=cancel)
    with pytest.raises(KeyboardInterrupt):
        sample(search.searching(model), clip, noise())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert torch.equal(sample(model, clip, noise()), plain)


def test_the_judges_two_stages_are_exact(toy, judge):
    latents = noise(2).requires_grad_()
    scores, gradient = judge.scores_and_gradient(latents.detach())
    bound = loaded(ToyReward()).bind(PROMPT)
    (direct,) = torch.autograd.grad(bound(judge.decode(latents)).sum(), latents)
    torch.testing.assert_close(gradient, direct, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scores, bound(judge.decode(latents)).detach())


def test_views_look_at_other_pictures(toy, judge):
    plain, _ = judge.scores_and_gradient(noise(2))
    first, again, other = (judge.scores_and_gradient(noise(2), views_of(2, seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, plain)
    torch.testing.assert_close(judge.scores(noise(2), views_of(2, 0)), first)


def test_all_looks_at_a_step_are_scored_with_the_same_views(toy, judge):
    search, _ = found(toy, judge, replace(FEW, views=2, lr=0.0))
    for step in {look.step for look in search.history}:
        looks = [look.scores for look in search.history if look.step == step]
        assert len(looks) == FEW.iterations + 1
        for look in looks[1:]:
            torch.testing.assert_close(look, looks[0], rtol=1e-4, atol=1e-4)


def test_small_pictures_are_decoded_small(toy, judge):
    small = Judge(judge.decode, judge.score, small_side=32)
    assert small.pictures(noise(1)).shape[2:] == (32, 32)


def test_latents_are_finished_before_they_are_decoded_small(toy, judge):
    """As an inpainting mask is: it has the latent's full size."""
    kept, keep = noise(seed=7), torch.zeros(1, 1, 8, 8)
    keep[..., 4:] = 1.0
    finished = Judge(judge.decode, judge.score, small_side=32, finish=lambda z: z * (1 - keep) + kept * keep)
    latents = noise()
    expected = Judge(judge.decode, judge.score, small_side=32).pictures(latents * (1 - keep) + kept * keep)
    assert torch.equal(finished.pictures(latents), expected)
    _, gradient = finished.scores_and_gradient(latents)
    assert not gradient[..., 4:].any()
    assert gradient[..., :4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_gradients_have_size_one_in_every_image(dtype):
    torch.manual_seed(0)
    leaves = [torch.zeros(2, 3, 4), torch.zeros(2, 7)]
    gradients = [torch.randn(2, 3, 4), 5 * torch.randn(2, 7)]
    moved = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    group = Group(moved, partial(torch.optim.SGD, lr=1.0), normalised=True)
    slopes = [Slope.of(gradient.clone().to(dtype)) for gradient in gradients]
    size = size_of(slopes)
    squares = sum((t.flatten(1) ** 2).sum(1) for t in gradients) / 19
    rounding = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
    torch.testing.assert_close(size, squares.sqrt(), **rounding)
    group.step(slopes, [1 / size], [True, True])
    for leaf, gradient in zip(moved, gradients):
        expected = -gradient / squares.sqrt().view(-1, *[1] * (gradient.ndim - 1))
        torch.testing.assert_close(leaf.detach().float(), expected, **rounding)


def test_gradients_in_half_precision_are_kept_in_a_byte_each():
    """To half a 127th of their row's largest; zeros, and images that are not finite, do not spoil the others."""
    torch.manual_seed(0)
    gradient = torch.randn(4, 30, 50).to(torch.bfloat16)
    gradient[1] = 0
    gradient[2, 3, 4] = torch.nan
    gradient[3, 3, 4] = torch.inf
    slope = Slope.of(gradient)
    assert slope.values.dtype == torch.int8
    assert slope.squares.isfinite().tolist() == [True, True, False, False]
    kept = slope.times([torch.ones(4)], torch.float32)
    wrong = (kept - gradient.float())[:2].abs()
    assert (wrong <= gradient[:2].float().abs().amax(-1, keepdim=True) / 127 * 0.51).all()
    assert not kept[1].any()


def test_best_is_kept_image_by_image():
    best = Best()
    best.offer(torch.tensor([1.0, 1.0]), lambda: {"x": torch.tensor([[1.0], [1.0]])}, always=False)
    better = best.offer(torch.tensor([0.0, 2.0]), lambda: {"x": torch.tensor([[2.0], [2.0]])}, always=False)
    assert better.tolist() == [False, True]
    assert best.items["x"].tolist() == [[1.0], [2.0]]
    assert best.scores.tolist() == [1.0, 2.0]


def run_search(toy, settings, judge, score, images=2):
    model, clip, _ = toy

    def peek(start, number, steps):
        seen = []
        sample(model, clip, start, last_step=steps, callback=lambda step, x0, x, total: seen.append(x0))
        assert len(seen) == steps
        return seen[-1]

    return search_images(
        model=model,
        sample=lambda model, start, number: sample(model, clip, start),
        peek=peek,
        noise=lambda number: noise(images, seed=number),
        settings=settings,
        judge=judge,
        score=score,
        steps=STEPS,
    )


def test_candidates_without_masks_are_best_of_n(toy, judge):
    model, clip, _ = toy
    into = model.get_model_object("latent_format").process_in
    settings = SearchSettings(masks=False, candidates=3, candidate_percent=0.5)
    result = run_search(toy, settings, judge, lambda latents: judge.scores(into(latents)))
    each = torch.stack([judge.scores(into(sample(model, clip, noise(2, seed=number)))) for number in range(3)])
    assert torch.equal(result.scores, each.max(0).values)
    assert torch.equal(result.candidates, each.argmax(0))


def test_candidates_are_judged_by_their_estimates_where_asked(toy, judge):
    model, clip, _ = toy
    settings = SearchSettings(candidates=3, candidate_percent=0.5, iterations=0)
    result = run_search(toy, settings, judge, lambda latents: torch.zeros(2))
    estimates = []
    for number in range(3):
        seen = []
        keep = lambda step, x0, x, total, seen=seen: seen.append(x0)  # noqa: E731
        sample(model, clip, noise(2, seed=number), callback=keep)
        estimates.append(judge.scores(seen[1]))
    best = torch.stack(estimates).argmax(0).cpu()
    assert torch.equal(result.candidates, best)
    start = torch.stack([noise(2, seed=int(number))[n] for n, number in enumerate(best)])
    assert torch.equal(result.latents, sample(model, clip, start))


def test_a_search_never_ends_below_its_finished_candidates(toy, judge):
    model, clip, _ = toy
    harmful = SearchSettings(candidates=2, iterations=1, lr=5.0, keep_best=True, start_percent=0.5)
    calls = iter([0.0, 0.0, 5.0, 7.0, -100.0, 9.0])
    result = run_search(toy, harmful, judge, lambda latents: torch.tensor([next(calls), next(calls)]))
    assert result.scores.tolist() == [5.0, 9.0]
    assert torch.equal(result.latents[0], sample(model, clip, noise(2, seed=1))[0])
    assert all(bool(mask[0].all()) for sigma in result.recorded.sigmas for mask in result.recorded.at(sigma).values())


def test_presets_say_where_the_iterations_go():
    assert PRESETS["paper"].total_iterations(15) == 225
    assert [PRESETS["reference"].iterations_at(step, 15) for step in range(15)] == [1] * 7 + [10] * 8
    assert PRESETS["reference"].total_iterations(15) == 87
    assert [PRESETS["quality"].iterations_at(step, 15) for step in range(15)] == [0] * 7 + [6] * 8


def test_updates_begin_and_end_at_a_share_of_the_steps():
    window = SearchSettings(iterations=1, start_percent=0.5, end_percent=0.75)
    assert [window.iterations_at(step, 5) for step in range(5)] == [0, 0, 1, 1, 0]
    assert replace(window, end_percent=1.0).iterations_at(0, 1) == 1


@pytest.mark.parametrize(
    "settings", [FEW, replace(FEW, branches="positive"), replace(FEW, masks=False, latent_lr=0.05)]
)
def test_layers_that_run_again_in_the_backward_pass_find_the_same(toy, judge, settings):
    kept, again = (found(toy, judge, settings, 2, recompute=recompute) for recompute in (False, True))
    assert torch.equal(kept[1], again[1])
    assert [look.scores.tolist() for look in kept[0].history] == [look.scores.tolist() for look in again[0].history]


@pytest.mark.parametrize("recompute", [False, True])
def test_masks_in_the_encoder_are_searched_too(toy, judge, recompute):
    model, clip, _ = toy
    search, latents = found(toy, judge, FEW, targets="all attention", recompute=recompute)
    removed = {name for step in search.recorded.steps.values() for name in step}
    assert any(name.startswith("input_blocks") for name in removed)
    replayed = attach(model, RecordedSource(search.recorded), 1.0, 0.0, 1.0)
    assert torch.equal(sample(replayed, clip, noise()), latents)


@pytest.mark.parametrize("kernel", ["flash", "sage"])
def test_attention_without_a_backward_pass_is_searched(toy, judge, kernel, monkeypatch):
    """Stand-ins for kernels of a card: they compute as PyTorch does, and have no gradient."""
    from comfy.ldm.modules import attention

    plain = found(toy, judge, FEW)[1]

    @attention.wrap_attn
    def attention_sage(*args, **kwargs):
        with torch.no_grad():
            return attention.attention_pytorch(*args, **kwargs)

    def flash(q, k, v, **_):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).contiguous()

    monkeypatch.setattr(attention, "flash_attn_func", flash, raising=False)
    fast = attention.attention_flash if kernel == "flash" else attention_sage
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, fast)
    search, latents = found(toy, judge, FEW)
    assert min(search.recorded.keep_ratio()) < 1.0
    assert (latents - plain).abs().max() < 0.3 * plain.abs().max()


def test_a_step_without_an_active_prompt_is_taken_plainly(toy, judge):
    model, clip, _ = toy
    ((text, options),) = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    until = [[text, options | {"start_percent": 0.0, "end_percent": 0.4}]]
    search = RewardSearch(model, replace(FEW, branches="positive", start_percent=0.0), judge, 1)
    with torch.no_grad():
        parts = (noise(), STEPS, 5.0, "euler", "normal", until, empty, torch.zeros(1, 4, 8, 8))
        latents = comfy.sample.sample(search.searching(model), *parts, disable_pbar=True, seed=1)
    assert torch.isfinite(latents).all()
    ratios = search.recorded.keep_ratio()
    assert ratios[0] < 1.0
    assert ratios[-1] == 1.0


def test_a_watched_reward_looks_at_the_pictures_that_were_judged(toy, judge):
    decoded = []

    def decode(latents):
        decoded.append(1)
        return judge.decode(latents)

    counted = Judge(decode, judge.score)
    search, _ = found(toy, counted, FEW, watch=lambda z: judge.score(counted.pictures(z))[0])
    assert len(decoded) == len(search.history)
    assert all(torch.equal(look.watched, look.scores) for look in search.history)


def test_a_controlnet_is_computed_once_in_a_step(toy, judge):
    model, clip, _ = toy
    net, runs = controlnet(model, torch.device("cpu")), []
    positive, negative = (
        [[text, more | {"control": net, "control_apply_to_uncond": True}] for text, more in encoded]
        for encoded in (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, ""))
    )
    handle = net.control_model.register_forward_hook(lambda *_: runs.append(1))
    search = RewardSearch(model, replace(FEW, start_percent=0.0), judge, 1)
    try:
        with torch.no_grad():
            parts = (noise(), 3, 5.0, "euler", "normal", positive, negative, torch.zeros(1, 4, 8, 8))
            comfy.sample.sample(search.searching(model), *parts, disable_pbar=True, seed=1)
    finally:
        handle.remove()
    assert len(search.history) == 3 * (FEW.iterations + 1)
    assert len(runs) == 3 * 2, "once for all looks, and in the step itself"
    assert "get_control" not in vars(net)
