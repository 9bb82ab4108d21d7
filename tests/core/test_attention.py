"""Attention maps of real models, and guidance by them inside the host's samplers."""

from dataclasses import replace
from pathlib import Path

import comfy.sample
import comfy.samplers
import pytest
import torch
from safetensors.torch import load_file

from maskunet_core.attention.guidance import (
    METHODS,
    AttentionGuidance,
    GuidanceSettings,
    WordsLoss,
)
from maskunet_core.attention.losses import excite_loss
from maskunet_core.attention.maps import MapReader, NoAttentionMaps, attention_of, map_layers
from maskunet_core.attention.words import read, sets_in
from maskunet_core.seam.attach import with_options
from maskunet_core.seam.gradients import LeanGraph
from tests.builders import SDXL, sd15_unet

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
        self.model, self.clip, _ = toy
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


@pytest.fixture
def scene(toy):
    with torch.inference_mode():
        return Scene(toy)


def inside(scene, do, batch=1, model=None, positive=None):
    """What `do` returns, called with (guider, sigma `[N]`, options of a call of the model) inside a run of a sampler."""
    results = []

    def sampler(asked, x, sigmas, extra_args, **_):
        with torch.inference_mode(False), torch.enable_grad(), LeanGraph():
            results.append(do(asked.inner_model, sigmas[:1].expand(len(x)), extra_args["model_options"]))
        return x

    latent = torch.zeros(batch, 4, 8, 8)
    guider = comfy.samplers.CFGGuider(model or scene.model)
    guider.set_conds(positive or scene.texts[0], scene.texts[1])
    with torch.inference_mode():
        guider.sample(latent, latent, comfy.samplers.KSAMPLER(sampler), torch.tensor([2.0, 0.0]), disable_pbar=True)
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


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_equals_central_differences(scene, method):
    base = scene.model.model.double()
    base.manual_cast_dtype = torch.float64
    loss = WordsLoss(scene.words, method, normalised=False)
    point, direction = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()

    def slopes(guider, sigma, options):
        reader = MapReader(guider.inner_model, lent=False)
        value = lambda x: loss(reader.read(guider.conds["positive"], x, sigma.double(), options))  # noqa: E731
        leaf = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf)
        step = 1e-4 * direction
        return (gradient * direction).sum(), (value(point + step) - value(point - step)).sum() / 2e-4

    torch.testing.assert_close(*inside(scene, slopes), rtol=1e-6, atol=1e-9)
