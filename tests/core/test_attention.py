"""Attention maps of real models, and guidance by them inside the host's samplers."""

import contextlib
import gc
from dataclasses import replace
from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrapperExecutor
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from maskunet_core.attention.guidance import (
    AttentionGuidance,
    GuidanceSettings,
    NothingToGuide,
    WordsLoss,
)
from maskunet_core.attention.losses import excite_loss
from maskunet_core.attention.maps import (
    MapReader,
    NoAttentionMaps,
    _LastMapRead,
    _Reading,
    attention_of,
    map_layers,
)
from maskunet_core.attention.words import read, sets_in
from maskunet_core.choices import ATTENTION_METHODS, PERCENT_STEP
from maskunet_core.masks.sources import GeneratorMasks, RandomMasks
from maskunet_core.seam.attach import attach, with_options
from maskunet_core.seam.gradients import LeanGraph
from maskunet_core.seam.latent import UnchangeableLatent
from maskunet_core.toy.model import load_toy_model
from tests.builders import SD15, SDXL, make_generator, sd15_unet
from tests.tiny_models import controlnet, lora, write_unet

PROMPT = "a red circle and a small blue square"
STEPS, SEED, CFG = 4, 3, 5.0
FIRST = GuidanceSettings(share=1 / STEPS, step=5.0)
"""Of four steps the first is guided."""


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).with_name("published") / "attention_golden.safetensors")


class Scene:
    """The toy model as the host's executor makes it, and samplers of stock nodes."""

    def __init__(self, toy):
        self.model, self.clip, self.vae = toy
        words = read(self.clip, PROMPT)
        self.words = replace(words, sets=sets_in(words.words))
        self.texts = self.encode(PROMPT), self.encode("")

    def encode(self, text):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def guided(self, settings=FIRST, words=None, model=None, accepts=True, **options):
        guidance = AttentionGuidance(words or self.words, settings, lambda *_: accepts, **options)
        return guidance.guiding(model or self.model)

    def draw(self, model=None, latent=None, sampler="euler", texts=None, **options):
        latent = torch.zeros(1, 4, 8, 8) if latent is None else latent
        noise = options.pop("noise", comfy.sample.prepare_noise(latent, SEED))
        settings = (STEPS, CFG, sampler, "normal", *(texts or self.texts), latent)
        options = {"seed": SEED, "disable_pbar": True} | options
        with torch.inference_mode():
            return comfy.sample.sample(model or self.model, noise, *settings, **options)


@pytest.fixture(scope="module")
def scene():
    with torch.inference_mode():
        return Scene(load_toy_model())


def inside(scene, do, batch=1, model=None, positive=None, sigma=2.0):
    """What `do` returns, called with (guider, sigma `[N]`, options of the model's calls) inside a run of a sampler."""
    results = []

    def sampler(asked, x, sigmas, extra_args, **_):
        with torch.inference_mode(False), torch.enable_grad(), LeanGraph():
            results.append(do(asked.inner_model, sigmas[:1].expand(len(x)), extra_args["model_options"]))
        return x

    latent = torch.zeros(batch, 4, 8, 8)
    sigmas = torch.tensor([sigma, 0.0])
    guider = comfy.samplers.CFGGuider(model or scene.model)
    guider.set_conds(positive or scene.texts[0], scene.texts[1])
    with torch.inference_mode():
        guider.sample(latent, latent, comfy.samplers.KSAMPLER(sampler), sigmas, disable_pbar=True)
    return results[0]


# Maps ---------------------------------------------------------------------------------------------------------------


def test_maps_of_queries_and_keys_are_the_published_ones(golden):
    def joined(tensor):
        return tensor.transpose(0, 1).flatten(1)[None].requires_grad_()

    layers = [[joined(golden[f"maps/{kind}{layer}"]) for kind in "qk"] for layer in range(3)]
    maps = (sum(attention_of(q, k, heads=2) for q, k in layers) / 3).unflatten(1, (8, 8))
    torch.testing.assert_close(maps[0], golden["maps/aggregate"], rtol=1e-5, atol=1e-7)
    loss = excite_loss(maps, [(2,), (5,)], range(1, 76))
    torch.testing.assert_close(loss, golden["maps/smooth/loss"], rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(loss.sum(), [tensor for layer in layers for tensor in layer])
    expected = [golden[f"maps/smooth/grad_{kind}{layer}"] for layer in range(3) for kind in "qk"]
    for found, known in zip(gradients, expected):
        known = known.transpose(0, 1).flatten(1)
        torch.testing.assert_close(found[0], known, rtol=0, atol=1e-5 * float(known.abs().max()))


class Base:
    """What `map_layers` asks of the host's BaseModel."""

    def __init__(self, unet):
        self.diffusion_model = unet


def test_layers_are_those_at_a_quarter_of_the_latent_or_the_finest(scene):
    def blocks(model):
        layers = map_layers(model)
        return list(dict.fromkeys(name.split(".transformer_blocks")[0] for name in layers.names)), layers

    sd15, layers = blocks(Base(sd15_unet()))
    assert sd15 == ["input_blocks.7.1", "input_blocks.8.1", *(f"output_blocks.{n}.1" for n in (3, 4, 5))]
    assert (layers.sides(64, 64), layers.sides(48, 97), layers.sides(50, 50)) == ((16, 16), (12, 25), (13, 13))
    sdxl, layers = blocks(Base(sd15_unet(**SDXL)))
    assert sdxl == [
        *("input_blocks.7.1", "input_blocks.8.1", "middle_block.1"),
        *(f"output_blocks.{n}.1" for n in (0, 1, 2)),
    ]
    assert len(layers.names) == 60
    assert blocks(scene.model.model)[0] == ["input_blocks.1.1", "output_blocks.2.1", "output_blocks.3.1"]


def test_a_model_without_a_unet_is_refused():
    with pytest.raises(NoAttentionMaps, match="can be read in U-Nets"):
        map_layers(Base(torch.nn.Linear(2, 2)))


def test_maps_are_the_model_s_own_attention_and_the_network_is_left_after_the_last(scene):
    from comfy.ldm.modules.attention import attention_basic
    from comfy.samplers import calc_cond_batch

    x = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    network, own, ended = scene.model.model.diffusion_model, [], []

    def override(function, q, k, v, heads, *args, **kwargs):
        if k.shape[1] == scene.words.tokens and q.shape[1] == 48:
            own.append(attention_of(q, k, heads))
        return attention_basic(q, k, v, heads, *args, **kwargs)

    def read_both(guider, sigma, options):
        end = network.out.register_forward_hook(lambda *_: ended.append(True))
        maps = MapReader(guider.inner_model, lent=False).read(guider.conds["positive"], x, sigma, options)
        assert not ended
        overridden = with_options(options, {"optimized_attention_override": override})
        calc_cond_batch(guider.inner_model, [guider.conds["positive"]], x, sigma, overridden)
        end.remove()
        return maps

    maps = inside(scene, read_both, batch=2)
    assert ended
    assert maps.shape == (2, 8, 6, 16)
    torch.testing.assert_close(maps, (sum(own) / 3).unflatten(1, (8, 6)))
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 8, 6))
    assert not any(module._forward_hooks for module in network.modules())


def test_guided_runs_of_sd15_cost_126_and_46_passes():
    """Operations on SD 1.5's shapes at 512 pixels, in passes for one picture; CFG takes two of them for a step."""
    import comfy.ops
    from comfy.ldm.modules.attention import attention_basic
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**SD15, device="meta", operations=comfy.ops.disable_weight_init).requires_grad_(False)
    with torch.device("meta"):
        x, step, text = torch.zeros(1, 4, 64, 64).requires_grad_(), torch.zeros(1), torch.zeros(1, 77, 768)

    def override(_, q, k, v, heads, *args, **kwargs):
        return attention_basic(q, k, v, heads)

    class Whole(Base):
        """Calls the network alone, as the host's BaseModel calls it."""

        def apply(self, options):
            around = options["transformer_options"].get("wrappers", {}).get("diffusion_model", {})
            call = WrapperExecutor.new_executor(unet._forward, [each[0] for each in around.values()])
            call.execute(x, step, text, transformer_options={"optimized_attention_override": override})

    def cost(do):
        with FlopCounterMode(display=False) as counter:
            result = do()
        return counter.get_total_flops(), result

    def read():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                "comfy.samplers.calc_cond_batch", lambda model, conds, x, sigma, options: model.apply(options)
            )
            return MapReader(Whole(unet), lent=False).read([{}], x, step, {"transformer_options": {}})

    whole, _ = cost(lambda: Whole(unet).apply({"transformer_options": {}}))
    forward, maps = cost(read)
    backward, _ = cost(lambda: torch.autograd.grad(maps.sum(), x))
    look = (forward + backward) / whole
    assert 25 * (look + 2) + 25 * 2 < 127
    assert 15 * (look + 2) < 46
    assert 25 * (look + 2) + 25 * 2 + 60 * look < 190


@pytest.mark.parametrize(("method", "share", "looks"), [(ATTENTION_METHODS[0], 0.5, 2), (ATTENTION_METHODS[1], 1.0, 4)])
def test_a_run_calls_the_network_once_more_for_one_branch_at_each_guided_step(scene, method, share, looks):
    rows = []
    entered = scene.model.model.diffusion_model.time_embed
    counting = entered.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    scene.draw(scene.guided(GuidanceSettings(method, 5.0, share=share)))
    counting.remove()
    assert rows.count(2) == STEPS
    assert rows.count(1) == looks
    assert len(rows) == STEPS + looks


@pytest.mark.parametrize(
    ("method", "kind"), [(ATTENTION_METHODS[0], "toy"), (ATTENTION_METHODS[1], "toy"), (ATTENTION_METHODS[1], "SD 1.5")]
)
def test_the_gradient_equals_central_differences_and_that_of_the_whole_network(method, kind, tmp_path, monkeypatch):
    # What was made in inference mode cannot get another precision in place.
    scene = Scene(load_toy_model())
    if kind == "SD 1.5":
        scene.model = comfy.sd.load_diffusion_model(str(write_unet(tmp_path / "unet.safetensors")))
        context = torch.randn(1, scene.words.tokens, 768, generator=torch.Generator().manual_seed(2))
        scene.texts = ([[context.double(), {}]],) * 2
    base = scene.model.model.double()
    base.manual_cast_dtype = torch.float64
    loss = WordsLoss(scene.words, method, normalised=False)
    point, direction = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()

    reading = _Reading._add

    def going_on(self, *of_layer):
        """The network is not left after the last map."""
        with contextlib.suppress(_LastMapRead):
            reading(self, *of_layer)

    def slopes(guider, sigma, options):
        reader = MapReader(guider.inner_model, lent=False)
        value = lambda x: loss(reader.read(guider.conds["positive"], x, sigma.double(), options))  # noqa: E731

        def gradient_of():
            leaf = point.clone().requires_grad_()
            return torch.autograd.grad(value(leaf).sum(), leaf)[0]

        gradient = gradient_of()
        with monkeypatch.context() as patched:
            patched.setattr(_Reading, "_add", going_on)
            assert torch.equal(gradient_of(), gradient)
        step = 1e-4 * direction
        return (gradient * direction).sum(), (value(point + step) - value(point - step)).sum() / 2e-4

    torch.testing.assert_close(*inside(scene, slopes), rtol=1e-6, atol=1e-9)


# Guidance -----------------------------------------------------------------------------------------------------------


def first_noise(batch=1):
    return comfy.sample.prepare_noise(torch.zeros(batch, 4, 8, 8), SEED)


def moved_by_hand(scene, noise, settings, model=None):
    """The noise of a run, moved as the first step is to move it: the network takes it without any scale."""
    loss = WordsLoss(scene.words, settings.method, normalised=False)
    sigma = float(scene.model.model.model_sampling.sigma_max)

    def gradient(guider, sigmas, options):
        leaf = noise.clone().requires_grad_()
        latent = leaf * (1 + sigma**2) ** 0.5
        maps = MapReader(guider.inner_model, lent=False).read(guider.conds["positive"], latent, sigmas, options)
        return torch.autograd.grad(loss(maps).sum(), leaf)[0]

    return noise - settings.step * inside(scene, gradient, len(noise), model, sigma=sigma)


@pytest.mark.parametrize("method", ATTENTION_METHODS)
def test_a_guided_step_moves_what_the_network_takes_by_step_times_gradient(scene, method):
    settings = replace(FIRST, method=method)
    noise = first_noise(2)
    expected = scene.draw(noise=moved_by_hand(scene, noise, settings), latent=torch.zeros(2, 4, 8, 8))
    found = scene.draw(scene.guided(settings), latent=torch.zeros(2, 4, 8, 8))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, scene.draw(latent=torch.zeros(2, 4, 8, 8)), atol=1e-2)


def test_a_step_in_percent_moves_the_latent_by_so_much_of_its_norm(scene):
    held = []

    def note(executor, x, *args):
        held.append(x.clone())
        return executor(x, *args)

    for model in (scene.model, scene.guided(replace(FIRST, unit=PERCENT_STEP))):
        noted = model.clone()
        noted.add_wrapper_with_key("predict_noise", "note", note)
        scene.draw(noted, latent=torch.zeros(2, 4, 8, 8))
    plain, guided = held[0], held[STEPS]
    moved = (guided - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, torch.full((2,), 0.05), rtol=1e-4, atol=0)


def test_images_of_a_batch_are_guided_each_for_itself(scene):
    settings = GuidanceSettings(ATTENTION_METHODS[0], 5.0)
    both = scene.draw(scene.guided(settings), latent=torch.zeros(2, 4, 8, 8), noise=first_noise(2))
    for image, noise in enumerate(first_noise(2).split(1)):
        alone = scene.draw(scene.guided(settings), noise=noise)
        torch.testing.assert_close(both[image : image + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(8, 12), (7, 5)])
def test_any_size_is_guided(scene, size):
    latent = torch.zeros(1, 4, *size)
    found, plain = scene.draw(scene.guided(), latent=latent), scene.draw(latent=latent)
    assert found.shape == plain.shape
    assert torch.isfinite(found).all()
    assert not torch.equal(found, plain)


def test_under_an_inpainting_mask_only_the_part_to_be_painted_is_guided(scene):
    kept = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1.0
    plain = scene.draw(latent=kept, noise_mask=mask)
    found = scene.draw(
        scene.guided(GuidanceSettings(ATTENTION_METHODS[1], 5.0, PERCENT_STEP, share=1.0)), kept, noise_mask=mask
    )
    assert float((found - plain)[..., 4:].abs().min()) > 0
    torch.testing.assert_close(found[..., :4], kept[..., :4])


@pytest.mark.parametrize("beside", ["lora", "generator", "control", "random masks"])
def test_guidance_sees_what_else_acts_on_the_model(scene, toy_structure, beside):
    model, texts = scene.model, scene.texts
    with torch.inference_mode():
        if beside == "lora":
            model = comfy.sd.load_lora_for_models(model, None, lora(model), 1.0, 0.0)[0]
        elif beside == "control":
            net = controlnet(model, torch.device("cpu"))
            texts = [[[text, more | {"control": net}] for text, more in positive] for positive in texts]
        else:
            source = RandomMasks(toy_structure, 0.8, 0, True)
            if beside == "generator":
                source = GeneratorMasks(make_generator(toy_structure, lively=True))
            model = attach(model, source, 1.0, 0.0, 1.0)
    losses = []
    guided = scene.guided(model=model, report=lambda step, seen: losses.append(float(seen)))
    plain, found = scene.draw(model, texts=texts), scene.draw(guided, texts=texts)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, plain)
    scene.draw(scene.guided(report=lambda step, seen: losses.append(float(seen))))
    assert losses[0] != losses[1]
    assert torch.equal(scene.draw(model, texts=texts), plain)


class Stop(Exception):
    pass


def test_the_stock_model_draws_as_before_also_after_a_run_that_was_stopped(scene):
    plain = scene.draw()
    scene.draw(scene.guided())

    def stop(*_):
        raise Stop

    sampler = comfy.samplers.sampler_object("euler")
    own = sampler.sampler_function
    guider = comfy.samplers.CFGGuider(scene.guided(replace(FIRST, share=1.0), report=stop))
    guider.set_conds(*scene.texts)
    with torch.inference_mode(), pytest.raises(Stop):
        guider.sample(first_noise(), torch.zeros(1, 4, 8, 8), sampler, torch.tensor([3.0, 1.0, 0.0]), disable_pbar=True)
    assert sampler.sampler_function is own
    assert not any(module._forward_hooks for module in scene.model.model.diffusion_model.modules())
    assert torch.equal(scene.draw(), plain)


def test_nothing_of_a_run_stays_in_memory(scene):
    scene.draw(scene.guided())
    gc.collect()
    before = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    scene.draw(scene.guided())
    gc.collect()
    assert sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()) <= before


def test_steps_and_refinement_are_the_published_ones():
    settings = GuidanceSettings(ATTENTION_METHODS[0], refine=True)
    assert [settings.step_at(step, 50) for step in (0, 1, 26, 49)] == pytest.approx(
        [20.0, 19.897697538834457, 17.142857142857146, 14.142135623730951]
    )
    assert settings.guided(50) == 25
    aims = {step: aim for step in range(50) if (aim := settings.refined_below(step, 50)) is not None}
    assert aims == pytest.approx({0: 0.95, 10: 0.5, 20: 0.2})
    syngen = replace(settings, method=ATTENTION_METHODS[1], share=1.0)
    assert syngen.guided(15) == 15
    assert {syngen.step_at(step, 15) for step in range(15)} == {20.0}
    assert syngen.refined_below(0, 15) is None


def test_refinement_goes_on_until_the_loss_is_low_enough_or_20_times(scene):
    looks = []
    settings = GuidanceSettings(ATTENTION_METHODS[0], 5.0, PERCENT_STEP, share=0.5, refine=True)
    scene.draw(scene.guided(settings, report=lambda step, losses: looks.append((step, float(losses)))))
    for step, aim in ((0, 0.95), (1, 0.5)):
        losses = [loss for at, loss in looks if at == step]
        assert all(loss > aim for loss in losses[:-1])
        assert losses[-1] <= aim or len(losses) == 21
    assert len(looks) > 2


def test_a_sampler_that_does_not_go_on_from_changes_is_refused(scene):
    with pytest.raises(UnchangeableLatent, match="looks at each step once, such as euler, ddim or dpmpp_2m"):
        scene.draw(scene.guided(accepts=False))


def test_words_of_another_prompt_are_refused(scene):
    words = read(scene.clip, "a red circle and a blue square " * 4)
    with torch.inference_mode():
        longer = scene.encode("a red circle and a blue square " * 4)
    guided = scene.guided(words=replace(words, sets=sets_in(words.words)))
    with pytest.raises(NoAttentionMaps, match="a prompt of 32 tokens, but the positive conditioning has 16"):
        scene.draw(guided)
    assert torch.isfinite(scene.draw(guided, texts=(longer, longer))).all()


def test_a_prompt_of_several_parts_is_refused(scene):
    parts = [scene.texts[0][0], scene.texts[0][0]]
    with pytest.raises(NoAttentionMaps, match="one prompt that acts on the whole picture"):
        scene.draw(scene.guided(), texts=(parts, scene.texts[1]))


@pytest.mark.parametrize("method", ATTENTION_METHODS)
def test_words_without_what_a_method_needs_are_refused(scene, method):
    words = read(scene.clip, "a circle" if method == ATTENTION_METHODS[1] else "and a")
    words = replace(words, sets=sets_in(words.words))
    with pytest.raises(NothingToGuide, match=f"{method} needs a noun"):
        scene.guided(GuidanceSettings(method), words)


def test_a_prompt_that_acts_later_alone_is_not_guided_before(scene):
    late = [[text, more | {"start_percent": 0.6}] for text, more in scene.texts[0]]
    early = [[text, more | {"end_percent": 0.6}] for text, more in scene.texts[1]]
    texts = ([*late, *early], scene.texts[1])
    with pytest.raises(NoAttentionMaps):
        scene.draw(scene.guided(), texts=texts)
    texts = (late, scene.texts[1])
    assert torch.equal(scene.draw(scene.guided(), texts=texts), scene.draw(texts=texts))
