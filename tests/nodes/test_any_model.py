"""The reward sampler on transformers of the host, and on layers that no mask can reach."""

import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.supported_models as published
import pytest
import torch

from tests.host.extension import core_module
from tests.nodes.reward_graphs import PROMPT, Graph, Result
from tests.tiny_models import drawn, shapes_of

CPU = torch.device("cpu")
FLUX = {"image_model": "flux", "axes_dim": [16, 56, 56], "num_heads": 1, "mlp_ratio": 4.0, "theta": 10000}
FLUX |= {"out_channels": 16, "qkv_bias": True, "txt_ids_dims": [], "in_channels": 16, "hidden_size": 128}
FLUX |= {"context_in_dim": 64, "patch_size": 2, "vec_in_dim": 48, "depth": 1, "depth_single_blocks": 2}
FLUX |= {"guidance_embed": True, "yak_mlp": False, "txt_norm": False}
QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 3, "num_attention_heads": 1}
QWEN |= {"attention_head_dim": 128, "joint_attention_dim": 64}
WAN = {"image_model": "wan2.1", "model_type": "t2v", "dim": 128, "out_dim": 16, "num_heads": 1, "ffn_dim": 256}
WAN |= {"num_layers": 3, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True}
WAN |= {"cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "text_dim": 64}


def _taesd():
    from comfy.taesd.taesd import TAESD

    weights = drawn(shapes_of(TAESD(latent_channels=16)), seed=2)
    return comfy.sd.VAE(sd=weights | {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)})


def _wan_vae():
    from comfy.ldm.wan.vae import WanVAE

    layout = {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    network = WanVAE(**layout, temperal_downsample=[False, True, True], dropout=0.0)
    return comfy.sd.VAE(sd=drawn(shapes_of(network), seed=2))


FAMILIES = {
    "Flux": (published.Flux, FLUX, _taesd, {"pooled_output": (48,)}),
    "Qwen-Image": (published.QwenImage, QWEN, _wan_vae, {}),
    "Wan, one frame": (published.WAN21_T2V, WAN, _wan_vae, {}),
}


def conditioning(more, seed):
    stream = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 7, 64, generator=stream)
    return [[text, {name: torch.randn(1, *shape, generator=stream) for name, shape in more.items()}]]


def of_family(name):
    """(MODEL, VAE, positive, negative)"""
    family, layout, vae, more = FAMILIES[name]
    config = family(dict(layout))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    model.diffusion_model.load_state_dict(drawn(shapes_of(model.diffusion_model), seed=1))
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)
    return patcher, vae(), conditioning(more, 3), conditioning(more, 4)


def with_layers_of_their_own(extension):
    """The toy, whose layers compute in a way of their own, as those of GGUF files do."""
    model, clip, vae = extension("toy").MaskUNetToyModel.execute().result
    for layer in model.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Linear):
            own = {"forward": lambda self, x: type(self).__base__.forward(self, x)}
            layer.__class__ = type("OwnForward", (type(layer),), own)
    texts = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, ""))
    return model, vae, *texts


def toy_transformer(extension):
    model, clip, vae = extension("toy").MaskUNetToyModel.execute("transformer").result
    texts = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, ""))
    return model, vae, *texts


OWN = {"layers of their own": with_layers_of_their_own, "toy transformer": toy_transformer}


def inputs_of(extension, name):
    """Inputs of the reward sampler."""
    with torch.inference_mode():
        model, vae, positive, negative = of_family(name) if name in FAMILIES else OWN[name](extension)
        rewards = extension("rewards")
        return {
            "model": model,
            "vae": vae,
            "reward": rewards.MaskUNetRewardLoader.execute(rewards.TOY_REWARD, "auto", False).result[0],
            "prompt": PROMPT,
            "positive": positive,
            "negative": negative,
            # What EmptyLatentImage gives: the host makes of it what the model takes.
            "latent_image": {"samples": torch.zeros(2, 4, 8, 8)},
        }


@pytest.fixture(params=[*FAMILIES, *OWN])
def world(request, extension):
    return inputs_of(extension, request.param)


SAMPLING = {"seed": 5, "steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def search(extension, inputs, **changes):
    node = extension("reward_sampler").MaskUNetRewardSampler.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    settings = SAMPLING | {"preset": "fast", "candidates": 3, "masks": True} | changes
    with torch.inference_mode():
        return node.execute(**inputs, **settings).result


def stock(inputs, seed, model=None):
    """KSampler's latents of a batch."""
    with torch.inference_mode():
        model = model or inputs["model"]
        samples = comfy.sample.fix_empty_latent_channels(model, inputs["latent_image"]["samples"])
        options = {name: SAMPLING[name] for name in ("steps", "cfg", "sampler_name", "scheduler")}
        noise = comfy.sample.prepare_noise(samples, seed)
        texts = inputs["positive"], inputs["negative"]
        return comfy.sample.sample(model, noise, *options.values(), *texts, samples, disable_pbar=True, seed=seed)


@pytest.mark.parametrize("changes", [{}, {"masks": False, "preset": "quality"}], ids=["fast", "masks off"])
def test_the_best_of_several_starting_noises_is_drawn(extension, world, changes):
    latent, masks, curve, *_ = search(extension, world, **changes)
    seeds = masks.record["seeds"]
    assert all(seed - SAMPLING["seed"] in range(3) for seed in seeds)
    drawn_with = {seed: stock(world, seed) for seed in set(seeds)}
    for image, seed in enumerate(seeds):
        torch.testing.assert_close(latent["samples"][image], drawn_with[seed][image], rtol=1e-4, atol=1e-4)
    assert len(masks.record["scores"]) == 2
    assert curve.ndim == 4


FEW_UPDATES = {"preset": "custom", "candidates": 1, "iterations": 2, "start_percent": 0.6, "lr": 0.3}
SEARCHES = {
    "Flux": {"preset": "few_step", "candidates": 2, "cfg": 1.0},
    "Qwen-Image": {"preset": "quality", "candidates": 2},
    "Wan, one frame": FEW_UPDATES,
}


@pytest.mark.parametrize("name", SEARCHES)
def test_masks_are_searched_for_and_the_stock_sampler_repeats_the_images(extension, name, monkeypatch):
    transformer, changes = inputs_of(extension, name), {"steps": 2} | SEARCHES[name]
    for setting in ("steps", "cfg"):
        monkeypatch.setitem(SAMPLING, setting, changes.pop(setting, SAMPLING[setting]))
    plain = stock(transformer, SAMPLING["seed"])
    latent, masks, *_ = search(extension, transformer, **changes)
    assert any(masks.steps.values()), "some masks were better than none"
    drawn = {}
    with torch.inference_mode():
        masked = extension("masks").MaskUNetApplyMasks.execute(transformer["model"], masks, 1.0).result[0]
    for image, seed in enumerate(masks.record["seeds"]):
        if seed not in drawn:
            drawn[seed] = stock(transformer, seed, masked)
        difference = (latent["samples"][image] - drawn[seed][image]).abs().max()
        assert difference == 0 if len(set(masks.record["seeds"])) == 1 else difference < 1e-4
    assert torch.equal(stock(transformer, SAMPLING["seed"]), plain)


def test_a_decoder_that_cuts_its_graph_is_refused(extension):
    from comfy.taesd.taehv import TAEHV

    inputs = inputs_of(extension, "Qwen-Image")
    decoder = comfy.sd.VAE(sd=drawn(shapes_of(TAEHV(latent_channels=16)), seed=2))
    with pytest.raises(ValueError, match=r"passes no gradients on\. Connect the model's own VAE, or a TAESD"):
        search(extension, inputs, gradient_vae=decoder, **FEW_UPDATES)


def test_updates_where_no_mask_reaches_are_refused_with_what_works(extension):
    refusal = core_module("models.structure").NothingToMask
    with pytest.raises(refusal, match="Candidates alone work with any model: choose preset fast"):
        search(extension, inputs_of(extension, "layers of their own"), preset="quality")


def test_the_host_is_asked_for_room_for_the_blocks_of_a_transformer(extension):
    memory = core_module("search.memory")
    attach = core_module("seam.attach")
    model, *_ = of_family("Qwen-Image")
    transformer = model.model.diffusion_model
    block = sum(parameter.numel() for parameter in transformer.transformer_blocks[0].parameters())

    def room(targets: str, cells: int) -> int:
        return memory.bytes_of_blocks(transformer, attach.structure_of(model, targets), cells, torch.bfloat16)

    token = 2 * transformer.inner_dim
    last, everywhere = (room(targets, 64) for targets in ("decoder attention", "all attention"))
    assert everywhere - last == 2 * token * (64 // 4 + 512), "the inputs of two blocks more"
    assert room("decoder attention", 4 * 64) - last == token * (1 + 32) * 3 * 64 // 4
    assert last > 2 * block


def test_candidates_alone_raise_the_reward_of_a_transformer_in_the_server(server):
    graph = Graph(batch=2)
    graph["toy"]["inputs"]["body"] = "transformer"
    sampling = {"steps": 8, "scheduler": "simple"}
    graph.scored(graph.plain("plain", **sampling))
    graph.scored(graph.rewarded("best", preset="fast", candidates=6, **sampling))
    result = Result(server, graph)
    assert sum(result.scores("best")) > sum(result.scores("plain")) + 1
