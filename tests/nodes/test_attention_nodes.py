"""Attention guidance's nodes as the host's executor runs them, with stock samplers and models of three families."""

import comfy.sample
import comfy.sd
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch

from maskunet_core.attention.words import read, sets_in
from tests.families.models import Tiny, load
from tests.host.extension import core_module
from tests.nodes.scene import Scene
from tests.tiny_models import write_unet

PROMPT = "a red circle and a small blue square"
SHALLOW = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "use_spatial_transformer": True}
SHALLOW |= {"num_res_blocks": [1, 1, 1], "channel_mult": [1, 1, 1], "transformer_depth": [1, 1, 1], "legacy": False}
SHALLOW |= {
    "transformer_depth_output": [1] * 6,
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 64,
}
SHALLOW |= {"use_linear_in_transformer": True, "use_temporal_attention": False, "adm_in_channels": None}
SD20 = Tiny("SD20", SHALLOW | {"context_dim": 1024})
SDXL = Tiny("SDXL", SHALLOW | {"context_dim": 2048, "num_classes": "sequential", "adm_in_channels": 2816})


class Nodes:
    """The nodes, and what they make of the toy model."""

    def __init__(self, extension):
        self.module = extension("attention")
        self.words_node = self.module.MaskUNetPromptWords.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        with torch.inference_mode():
            self.model, self.clip, self.vae = extension("toy").MaskUNetToyModel.execute().result
            self.positive, self.words, self.found = self.words_node.execute(self.clip, PROMPT).result
            self.negative = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(""))

    def guided(self, model=None, method="syngen", step=5.0, share=0.5, **more):
        node = self.module.MaskUNetAttentionGuidance
        with torch.inference_mode():
            return node.execute(model or self.model, self.words, method, step, share, **more).result[0]

    def draw(self, model=None, sampler="euler", texts=None):
        """What KSampler does."""
        latent = torch.zeros(1, 4, 8, 8)
        settings = (4, 5.0, sampler, "normal", *(texts or (self.positive, self.negative)), latent)
        noise = comfy.sample.prepare_noise(latent, 3)
        with torch.inference_mode():
            return comfy.sample.sample(model or self.model, noise, *settings, seed=3, disable_pbar=True)


@pytest.fixture(scope="module")
def made(extension):
    return Nodes(extension)


def test_the_words_node_encodes_and_tells_what_it_found(made, extension, monkeypatch):
    told = []
    monkeypatch.setattr(made.module, "tell", lambda text, node: told.append(text))
    with torch.inference_mode():
        conditioning, words, found = made.words_node.execute(made.clip, PROMPT).result
        expected = made.clip.encode_from_tokens_scheduled(made.clip.tokenize(PROMPT))
        overruled = made.words_node.execute(made.clip, PROMPT, "small > circle").result[2]
        nothing = made.words_node.execute(made.clip, "and").result[2]
    assert torch.equal(conditioning[0][0], expected[0][0])
    assert found == "red > circle; small, blue > square"
    assert words.tokens == conditioning[0][0].shape[1]
    assert (overruled, nothing) == ("small > circle", "")
    assert told[:2] == [found, overruled]
    assert "red > apple" in told[2]


def test_a_parser_finds_the_words_where_it_is_chosen_and_none_are_told(made, monkeypatch):
    """No parser is installed here: what it would find stands in for it."""
    found = {"en_small": sets_in(read(made.clip, "a blue square").words)}
    monkeypatch.setattr(core_module("attention.grammar"), "sets_by_grammar", lambda words, parser: found[parser])
    with torch.inference_mode():
        texts = [made.words_node.execute(made.clip, PROMPT, told, "en_small").result[2] for told in ("", "circle")]
    assert texts == ["blue > square", "circle"]


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "lcm"])
def test_samplers_that_look_once_are_guided(made, sampler):
    plain, found = made.draw(sampler=sampler), made.draw(made.guided(), sampler)
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("sampler", ["uni_pc", "heun", "dpmpp_sde"])
def test_other_samplers_are_refused_in_a_sentence(made, sampler):
    plain = made.draw(sampler=sampler)
    with pytest.raises(ValueError, match="Choose a sampler that looks at each step once"):
        made.draw(made.guided(), sampler)
    assert torch.equal(made.draw(sampler=sampler), plain)


def test_a_sampler_of_custom_nodes_draws_what_ksampler_draws(made):
    model = made.guided()
    with torch.inference_mode():
        sampler = custom.KSamplerSelect.execute("euler").result[0]
        sigmas = custom.BasicScheduler.execute(model, "normal", 4, 1.0).result[0]
        guider = custom.CFGGuider.execute(model, made.positive, made.negative, 5.0).result[0]
        noise = custom.RandomNoise.execute(3).result[0]
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        found = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).result[0]["samples"]
    assert torch.equal(found, made.draw(model))


def test_two_guidances_both_act(made):
    one, both = made.guided(), made.guided(made.guided(), "attend-and-excite")
    assert not torch.equal(made.draw(both), made.draw(one))
    assert not torch.equal(made.draw(both), made.draw(made.guided(method="attend-and-excite")))


def test_a_search_for_masks_begins_each_step_where_guidance_has_moved_the_latent(made, extension):
    scene = Scene(extension, "toy")
    inputs = {"positive": made.positive, "negative": made.negative, "prompt": PROMPT, "iterations": 1}
    plain, masks, *_ = scene.search(model=made.model, **inputs)
    found, guided_masks, *_ = scene.search(model=made.guided(), **inputs)
    assert torch.isfinite(found["samples"]).all()
    assert not torch.equal(found["samples"], plain["samples"])
    assert masks.steps.keys() == guided_masks.steps.keys()
    unweighted = scene.search(model=made.guided(), attention_weight=0.0, **inputs)[0]
    assert torch.equal(unweighted["samples"], found["samples"])


def test_a_weight_without_attention_guidance_is_refused_in_a_sentence(made, extension):
    with pytest.raises(ValueError, match="carries no attention guidance"):
        Scene(extension, "toy").search(model=made.model, attention_weight=1.0)


@pytest.mark.parametrize(("method", "weight"), [("syngen", 3.0), ("attend-and-excite", 0.0)])
def test_the_masks_of_a_guided_search_draw_its_image_again_on_the_guided_model(made, extension, method, weight):
    scene, sampling = Scene(extension, "toy"), {"steps": 4, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal"}
    inputs = {"positive": made.positive, "negative": made.negative, "prompt": PROMPT, "candidates": 1, "seed": 3}
    inputs |= {"iterations": 3, "start_percent": 0.0, "lr": 0.3, "attention_weight": weight}
    found, masks, *_ = scene.search(model=made.guided(method=method), **inputs | sampling)
    assert any(masks.steps.values())
    with torch.inference_mode():
        replay = extension("masks").MaskUNetApplyMasks.execute
        again, masks_alone = (replay(model, masks, 1.0).result[0] for model in (made.guided(method=method), made.model))
    assert torch.equal(made.draw(again), found["samples"])
    assert not torch.equal(made.draw(made.guided(method=method)), found["samples"])
    assert not torch.equal(made.draw(masks_alone), found["samples"])


@pytest.mark.parametrize("setting", [{"step": 0.0}, {"share": 0.0}])
def test_without_a_step_or_a_guided_step_the_image_stays_bit_for_bit(made, setting):
    assert torch.equal(made.draw(made.guided(**setting)), made.draw())


@pytest.mark.parametrize("method", ["attend-and-excite", "syngen"])
@pytest.mark.parametrize("family", ["SD 1.5", "SD 2.x", "SDXL"])
def test_models_of_each_family_are_guided(made, tmp_path, family, method):
    with torch.inference_mode():
        if family == "SD 1.5":
            model, width = comfy.sd.load_diffusion_model(str(write_unet(tmp_path / "unet.safetensors"))), 768
        else:
            tiny = SD20 if family == "SD 2.x" else SDXL
            model, width = load(tiny), tiny.layout["context_dim"]
    stream = torch.Generator().manual_seed(1)
    more = {"pooled_output": torch.randn(1, 1280, generator=stream)}
    texts = [[[torch.randn(1, made.words.tokens, width, generator=stream), more]] for _ in range(2)]
    plain = made.draw(model, texts=texts)
    found = made.draw(made.guided(model, method, step_unit=made.module.PERCENT_STEP), texts=texts)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, plain)
    assert torch.equal(made.draw(model, texts=texts), plain)


def test_maps_are_pictures_of_each_word_and_show_where_it_is(made):
    with torch.inference_mode():
        words, positive = made.words, made.positive
        latent = {"samples": made.draw().repeat(2, 1, 1, 1)}
        node = made.module.MaskUNetAttentionMaps
        pictures = node.execute(made.model, words, positive, latent, 0.4).result[0]
        again = node.execute(made.model, words, positive, latent, 0.4).result[0]
    assert pictures.shape[0] == 2 * len(["red", "circle", "small", "blue", "square"])
    assert pictures.shape[-1] == 3
    tiles = pictures[:, :128]
    assert (tiles.flatten(1).amax(1) == 1).all()
    assert (tiles.flatten(1).std(1) > 0.05).all()
    assert torch.equal(pictures, again)
