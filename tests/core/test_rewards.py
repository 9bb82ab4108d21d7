"""Rewards from published files: equal to the original code, differentiable, in every precision."""

import gc
import json
import math
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

from maskunet_core.rewards import preprocess
from maskunet_core.rewards.aesthetic import AestheticReward
from maskunet_core.rewards.blip import ImageReward
from maskunet_core.rewards.clip import ClipReward, ImageTower, to_openclip
from maskunet_core.rewards.clip_layout import ClipLayout, layout_of
from maskunet_core.rewards.layers import heads_of
from maskunet_core.rewards.preprocess import fit, letterbox, normalise
from maskunet_core.rewards.reward import (
    HALF_SCALE,
    BoundModel,
    BoundReward,
    BoundSum,
    CombinedReward,
    value_and_gradient,
)
from maskunet_core.rewards.tokens import bert_tokens, clip_tokens
from tests.reward_files import (
    HPS_LAYOUT,
    IMAGE_REWARD_HEADS,
    PUBLISHED,
    WRONGLY_DECODED,
    aesthetic_head,
    clip_l_image_model,
    clip_model,
    golden_pictures,
    hps_tensors,
    image_reward_tensors,
)


def image_reward(dtype=torch.float32, checkpointing=False) -> ImageReward:
    tensors = image_reward_tensors()
    return ImageReward.from_tensors(
        "ImageReward", tensors, dtype, checkpointing=checkpointing, heads=IMAGE_REWARD_HEADS
    )


def hps(dtype=torch.float32, scale=1.0, checkpointing=False) -> ClipReward:
    reward = ClipReward.from_tensors(
        "HPSv2", hps_tensors(), dtype, scaled=False, checkpointing=checkpointing, layout=HPS_LAYOUT
    )
    reward.scale = scale
    return reward


FAMILIES = {"image_reward": image_reward, "hps": hps}


def golden(reward):
    """Prompts, scores `[3]` and gradients `[3, 3, H, W]` of `golden_pictures`, from tests/parity/golden.py."""
    path = PUBLISHED / "rewards_golden.safetensors"
    with safe_open(path, "pt") as file:
        prompts = json.loads(file.metadata()["prompts"])
    tensors = load_file(path)
    return prompts, tensors[f"{reward}/scores"], tensors[f"{reward}/gradient"]


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def cosine(a, b):
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


@pytest.mark.parametrize(("name", "make"), [("ImageReward", image_reward), ("HPSv2.1", hps)])
def test_scores_and_gradients_equal_the_original_codes(name, make):
    """The pictures leave [0, 1] on purpose: a clamp would show."""
    pictures = golden_pictures(name)
    assert pictures.min() < 0.0
    assert pictures.max() > 1.0
    prompts, scores, gradients = golden(name)
    assert len(prompts) == len(scores) == 3
    reward = make()
    for n, prompt in enumerate(prompts):
        score, gradient = value_and_gradient(reward.bind(prompt), pictures[n : n + 1])
        assert relative(score, scores[n : n + 1]) < 1e-5
        assert relative(gradient[0], gradients[n]) < 1e-5


@pytest.mark.parametrize(("width", "heads"), [(1280, 20), (1024, 16), (768, 12), (512, 8)])
def test_numbers_of_heads_are_those_of_the_published_models(width, heads):
    """The text towers of ViT-bigG, ViT-H, ViT-L (and BERT), and ViT-B."""
    assert heads_of(width) == heads


@pytest.mark.parametrize("with_ftfy", [False, True])
def test_token_ids_equal_the_original_tokenisers(monkeypatch, with_ftfy):
    """All of them where `ftfy` is there; without it, all but those of wrongly decoded text."""
    if with_ftfy:
        pytest.importorskip("ftfy")
    else:
        monkeypatch.setitem(sys.modules, "ftfy", None)
    expected = json.loads((PUBLISHED / "tokens_golden.json").read_text())
    for n, prompt in enumerate(expected["prompts"]):
        ids, mask = bert_tokens(prompt)
        assert ids.tolist() == expected["bert"][n], prompt
        assert mask.tolist() == expected["bm"][n], prompt
        same = clip_tokens(prompt).tolist() == expected["clip"][n]
        assert same == (with_ftfy or prompt != WRONGLY_DECODED), prompt


def test_a_prompt_that_is_too_long_keeps_its_end_token():
    assert clip_tokens("red " * 200).tolist()[-1] == 49407
    assert bert_tokens("red " * 200)[0].tolist()[-1] == 102


@pytest.mark.parametrize(("tokens", "length"), [(bert_tokens, 33), (clip_tokens, 75)])
def test_a_prompt_that_is_cut_is_told_in_the_log(caplog, tokens, length):
    tokens("red " * length)
    assert caplog.text == ""
    tokens("red " * (length - 2) + "blue green black white")
    assert f"reads the first {length} of the prompt's {length + 2} tokens, to '... " in caplog.text
    assert "red blue green'. What comes after that does not count" in caplog.text


def test_pickscore_equals_transformers():
    """The names are mapped: towers, projections, pooling, logit scale."""
    model = clip_model()
    reward = ClipReward.from_tensors(
        "PickScore", to_openclip(model.state_dict()), torch.float32, scaled=True, layout=ClipLayout(False, 1, 1)
    )
    torch.manual_seed(2)
    pictures, prompt = torch.rand(3, 3, 28, 28), "a photo of an axolotl, in the style of Caravaggio"
    leaf = pictures.clone().requires_grad_()
    ids = clip_tokens(prompt)[None]
    expected = model(input_ids=ids, pixel_values=normalise(leaf)).logits_per_image.flatten()
    (expected_gradient,) = torch.autograd.grad(expected.sum(), leaf)
    scores, gradient = value_and_gradient(reward.bind(prompt), pictures)
    assert reward.scale == pytest.approx(math.exp(model.logit_scale.item()))
    assert relative(scores, expected) < 1e-5
    assert relative(gradient, expected_gradient) < 1e-5


def test_the_aesthetic_predictor_equals_transformers_with_the_head():
    model, head = clip_l_image_model(), aesthetic_head()
    tensors = to_openclip(model.state_dict())
    tower = ImageTower.from_tensors(tensors, torch.float32, layout_of(tensors))
    reward = AestheticReward.from_tensors("aesthetic", head, tower)
    chain = nn.Sequential()
    for index in (0, 2, 4, 6, 7):
        weight, bias = head[f"layers.{index}.weight"], head[f"layers.{index}.bias"]
        chain.append(nn.Linear(*reversed(weight.shape)))
        chain[-1].load_state_dict({"weight": weight, "bias": bias})
    pictures = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    leaf = pictures.clone().requires_grad_()
    expected = chain(F.normalize(model(pixel_values=normalise(leaf)).image_embeds, dim=-1)).flatten()
    (expected_gradient,) = torch.autograd.grad(expected.sum(), leaf)
    scores, gradient = value_and_gradient(reward.bind("any prompt"), pictures)
    assert relative(scores, expected) < 1e-5
    assert relative(gradient, expected_gradient) < 1e-5
    assert torch.equal(reward.bind("")(pictures), reward.bind("another")(pictures))


@pytest.mark.parametrize(
    "height_width", [(64, 64), (224, 224), (300, 200), (201, 503), (90, 40), (512, 768), (225, 224)]
)
def test_fitting_equals_torchvision_to_the_bit(height_width):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    stock = Compose([Resize(224, InterpolationMode.BICUBIC, antialias=True), CenterCrop(224)])
    images = torch.rand(1, 3, *height_width, generator=torch.Generator().manual_seed(0))
    slope = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    gradients = []
    for function in (lambda x: fit(x, 224), stock):
        leaf = images.clone().requires_grad_()
        fitted = function(leaf)
        assert torch.equal(fitted, stock(images))
        gradients += torch.autograd.grad((slope * fitted).sum(), leaf)
    assert torch.equal(*gradients)


def test_letterboxed_pictures_are_whole_between_black_bars():
    images = torch.full((1, 3, 100, 200), 0.5)
    boxed = letterbox(images, 64)
    assert boxed.shape == (1, 3, 64, 64)
    torch.testing.assert_close(boxed[:, :, 16:48], torch.full((1, 3, 32, 64), 0.5))
    assert not boxed[:, :, :16].any()
    assert not boxed[:, :, 48:].any()
    assert torch.equal(fit(boxed, 64), boxed)


@pytest.mark.parametrize(("height", "width", "inside"), [(4, 2000, (1, 64)), (2000, 4, (64, 1))])
def test_pictures_far_longer_than_wide_are_letterboxed_to_a_line(height, width, inside):
    boxed = letterbox(torch.ones(1, 3, height, width), 64)
    assert boxed.shape == (1, 3, 64, 64)
    assert (boxed[0, 0].any(1).sum(), boxed[0, 0].any(0).sum()) == inside


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.995), (torch.float16, 0.9999)])
def test_half_precision_keeps_scores_and_gradients(family, dtype, least):
    # Pictures whose scores are not about zero, where only an absolute tolerance would tell.
    torch.manual_seed(1)
    images = torch.rand(2, 3, 40, 36)
    scores, gradient = value_and_gradient(FAMILIES[family]().bind("a red dog"), images)
    bound = FAMILIES[family](dtype=dtype).bind("a red dog")
    half_scores, half_gradient = value_and_gradient(bound, images)
    assert half_scores.dtype == torch.float32
    torch.testing.assert_close(half_scores, scores, rtol=0.02, atol=0.01)
    assert cosine(half_gradient, gradient) > least
    assert relative(half_gradient, gradient) < 0.1


def test_in_fp16_small_gradients_survive_because_the_loss_is_scaled():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 28, 28)
    _, exact = value_and_gradient(hps(scale=1e-5).bind("a red dog"), images)
    bound = hps(torch.float16, scale=1e-5).bind("a red dog")
    leaf = images.clone().requires_grad_()
    (plain,) = torch.autograd.grad(bound(leaf).sum(), leaf)
    assert cosine(value_and_gradient(bound, images)[1], exact) > 0.999
    assert cosine(plain, exact) < 0.9


def test_in_fp16_large_gradients_survive_because_the_scale_gives_way():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 28, 28)
    bound = hps(torch.float16, scale=1e4).bind("a red dog")
    leaf = images.clone().requires_grad_()
    (overflown,) = torch.autograd.grad(1024 * bound(leaf).sum(), leaf)
    assert not overflown.isfinite().all()
    _, exact = value_and_gradient(hps(scale=1e4).bind("a red dog"), images)
    assert cosine(value_and_gradient(bound, images)[1], exact) > 0.999


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_picture_that_is_no_number_spoils_no_other_of_its_batch(dtype, bad):
    images = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    bound = hps(dtype).bind("a red dog")
    expected_scores, expected = value_and_gradient(bound, images)
    images[1] *= bad
    scores, gradient = value_and_gradient(bound, images)
    assert torch.equal(scores[[0, 2]], expected_scores[[0, 2]])
    assert torch.equal(gradient[[0, 2]], expected[[0, 2]])
    assert gradient[1].isnan().all() == (not scores[1].isfinite())


class Steep(BoundReward):
    """The sum of a picture in fp16, with a slope of its own for each picture. It counts how often it is asked."""

    name, gradient_scale = "steep", HALF_SCALE

    def __init__(self, *slopes: float):
        self.slopes, self.calls = torch.tensor(slopes), 0

    def __call__(self, images):
        self.calls += 1
        half = images.half()
        if half.requires_grad:
            half.register_hook(lambda slope: (slope.float() * self.slopes.view(-1, 1, 1, 1)).half())
        return half.float().flatten(1).sum(1)


def test_each_picture_of_a_batch_has_the_largest_scale_at_which_its_slope_is_a_number():
    """At 1/32 of the scale the faint slope would lose digits, at the full one the steep one overflows."""
    faint, steep = 1e-7, 500.0
    images, bound = torch.rand(2, 3, 4, 4), Steep(faint, steep)
    scores, gradient = value_and_gradient(bound, images)
    torch.testing.assert_close(gradient[0], torch.full((3, 4, 4), faint), rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient[1], torch.full((3, 4, 4), steep), rtol=1e-3, atol=0)
    assert scores.isfinite().all()
    assert bound.calls == 2


def test_slopes_too_steep_for_half_precision_at_their_own_size_are_scaled_down():
    _, gradient = value_and_gradient(Steep(120_000.0), torch.rand(1, 3, 4, 4))
    torch.testing.assert_close(gradient, torch.full((1, 3, 4, 4), 120_000.0), rtol=1e-3, atol=0)


def test_a_slope_that_is_never_a_number_is_marked_for_its_picture_alone():
    images, bound = torch.rand(3, 3, 4, 4), Steep(1.0, math.inf, 2.0)
    scores, gradient = value_and_gradient(bound, images)
    assert scores.isfinite().all()
    assert gradient[1].isnan().all()
    torch.testing.assert_close(gradient[[0, 2]], torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4))
    assert bound.calls <= 5


def test_a_picture_without_a_score_is_not_tried_again():
    images, bound = torch.rand(2, 3, 4, 4), Steep(1.0, 1.0)
    images[1, 0, 0, 0] = math.nan
    scores, gradient = value_and_gradient(bound, images)
    assert scores.isnan().tolist() == [False, True]
    assert gradient[0].isfinite().all()
    assert bound.calls == 1


def test_gradients_that_the_pictures_dtype_cannot_hold_are_marked_as_no_numbers():
    images = torch.rand(2, 3, 4, 4).half()

    class Plain(Steep):
        gradient_scale = 1.0

        def __call__(self, images):
            return (images.float() * self.slopes.view(-1, 1, 1, 1)).flatten(1).sum(1)

    _, gradient = value_and_gradient(Plain(1.0, 1e6), images)
    assert gradient[0].eq(1.0).all()
    assert gradient[1].isnan().all()


def test_a_weight_of_zero_leaves_a_reward_out_of_the_sum():
    broken, whole = Steep(math.inf), Steep(1.0)
    bound = BoundSum("sum", [(0.0, broken), (2.0, whole)])
    images = torch.rand(1, 3, 4, 4)
    scores, gradient = value_and_gradient(bound, images)
    torch.testing.assert_close(scores, 2 * whole(images))
    assert gradient.eq(2.0).all()
    torch.testing.assert_close(bound(images), scores)
    assert broken.calls == 0
    nothing = BoundSum("nothing", [(0.0, broken)])
    assert nothing(images).tolist() == value_and_gradient(nothing, images)[0].tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_any_dtype_get_gradients_of_their_dtype(dtype):
    images = torch.rand(1, 3, 28, 28).to(dtype)
    scores, gradient = value_and_gradient(hps().bind("a red dog"), images)
    expected_scores, expected = value_and_gradient(hps().bind("a red dog"), images.float())
    assert scores.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(scores, expected_scores)
    torch.testing.assert_close(gradient, expected.to(dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_scores_the_same_whoever_else_is_in_the_batch(family):
    torch.manual_seed(0)
    images, bound = torch.rand(3, 3, 32, 32), FAMILIES[family]().bind("a red dog")
    scores, gradient = value_and_gradient(bound, images)
    alone, its_gradient = value_and_gradient(bound, images[1:2])
    torch.testing.assert_close(scores[1:2], alone)
    # Products of other shapes round otherwise: by a share of the largest gradient, not of each.
    torch.testing.assert_close(gradient[1:2], its_gradient, rtol=1e-4, atol=2e-6 * its_gradient.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_keeps_less_and_changes_nothing(family):
    torch.manual_seed(0)
    images, found = torch.rand(2, 3, 32, 32), {}
    for checkpointing in (False, True):
        bound, kept = FAMILIES[family](checkpointing=checkpointing).bind("a red dog"), []
        leaf = images.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):  # noqa: B023
            score = bound(leaf)
        found[checkpointing] = (score, *torch.autograd.grad(score.sum(), leaf), sum(kept))
    torch.testing.assert_close(found[True][:2], found[False][:2])
    assert found[True][2] < 0.6 * found[False][2]


def test_rewards_work_inside_the_hosts_inference_mode():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = value_and_gradient(hps().bind("a red dog"), images)
    with torch.inference_mode(False):
        reward = hps()
    with torch.inference_mode():
        scores, gradient = value_and_gradient(reward.bind("a red dog"), images.clone())
    assert not scores.is_inference()
    torch.testing.assert_close((scores, gradient), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_that_nobody_holds_is_freed_at_once(family):
    """Without waiting for the collector of cycles: a reward is a gigabyte, and its host counts it as gone."""
    reward, images = FAMILIES[family](), torch.rand(1, 3, 28, 28)
    module = weakref.ref(reward.modules()[0])
    gc.collect()
    gc.disable()
    try:
        value_and_gradient(reward.bind("a red dog"), images)
        del reward
        assert module() is None
    finally:
        gc.enable()


def test_features_of_many_prompts_do_not_pile_up():
    reward = hps()
    for number in range(300):
        reward._features[str(number)] = torch.zeros(1)
    reward.bind("a red dog")
    assert len(reward._features) <= 256
    assert "a red dog" in reward._features


def test_the_statistics_of_pictures_are_sent_to_a_device_once():
    """And give gradients where they were first asked for in inference mode."""
    sent = []

    class Sent(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.tensor:
                sent.append(args)
            return function(*args, **(kwargs or {}))

    preprocess._statistics.cache_clear()
    pictures = torch.rand(1, 3, 8, 8)
    with torch.inference_mode(), Sent():
        normalise(pictures)
    with Sent():
        normalised = normalise(pictures.requires_grad_())
        (slope,) = torch.autograd.grad(normalised.sum(), pictures)
    assert len(sent) == 2
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    torch.testing.assert_close(normalised, (pictures - mean) / std)
    torch.testing.assert_close(slope, (1 / std).expand(1, 3, 8, 8))


def test_the_text_tower_runs_once_per_prompt():
    reward, images = hps(), torch.rand(1, 3, 28, 28)
    bound = reward.bind("a red dog")
    expected = bound(images)
    reward.text = None
    assert torch.equal(bound(images), expected)
    assert torch.equal(reward.bind("a red dog")(images), expected)
    with pytest.raises(TypeError):
        reward.bind("a blue dog")


def test_a_combination_is_the_weighted_sum_of_scores_and_gradients():
    torch.manual_seed(0)
    images, prompt, members = torch.rand(2, 3, 40, 36), "a red dog", (image_reward(), hps(torch.float16))
    (score_a, slope_a), (score_b, slope_b) = (value_and_gradient(r.bind(prompt), images) for r in members)
    inner = CombinedReward([(2.0, members[1])])
    combined = CombinedReward([(0.5, members[0]), (-3.0, inner)])
    bound = combined.bind(prompt)
    scores, gradient = value_and_gradient(bound, images)
    torch.testing.assert_close(scores, 0.5 * score_a - 6.0 * score_b)
    torch.testing.assert_close(gradient, 0.5 * slope_a - 6.0 * slope_b)
    torch.testing.assert_close(bound(images), scores)
    assert [(weight, part.name) for weight, part in bound.parts()] == [(0.5, "ImageReward"), (-6.0, "HPSv2")]
    assert combined.modules() == [members[0].model, members[1].image]
    assert hps().bind(prompt).parts()[0][0] == 1.0


def test_parts_run_one_after_the_other():
    """No part begins before the graph of the one before it is gone."""
    alive, seen = [], []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(len(alive))
            alive.append(1)
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            alive.pop()
            return slope

    class WatchedReward(ClipReward):
        def bind(self, prompt):
            inner = super().bind(prompt)
            return BoundModel(self.name, 28, self.image, lambda pictures: inner(Watched.apply(pictures)))

    first = hps()
    watched = WatchedReward("watched", first.image, first.text)
    value_and_gradient(CombinedReward([(1.0, watched), (1.0, watched)]).bind("a red dog"), torch.rand(1, 3, 28, 28))
    assert seen == [0, 0]
