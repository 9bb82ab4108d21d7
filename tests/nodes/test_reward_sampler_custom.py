"""The reward sampler in the form of SamplerCustomAdvanced: guiders, samplers and noise levels of the host's nodes."""

import comfy.samplers
import comfy_extras.nodes_custom_sampler as host
import pytest
import torch

from tests.host.memory import run_as_executor
from tests.nodes.reward_graphs import PROMPT, Graph, Result, node
from tests.nodes.scene import SAMPLED, SEARCH, Scene

SEED = SAMPLED["seed"]
NO_SEARCH = {"preset": "custom", "iterations": 0, "candidates": 1}


@pytest.fixture(scope="module")
def scene(extension):
    return Scene(extension, "toy")


def executed(kind, *inputs):
    with torch.inference_mode():
        return kind.execute(*inputs).result[0]


def cfg_guider(scene, model=None):
    texts = scene.texts["positive"], scene.texts["negative"]
    return executed(host.CFGGuider, model or scene.model, *texts, SAMPLED["cfg"])


def basic_guider(scene, model=None):
    return executed(host.BasicGuider, model or scene.model, scene.texts["positive"])


def dual_guider(scene, model=None):
    positive, negative = scene.texts["positive"], scene.texts["negative"]
    return executed(host.DualCFGGuider, model or scene.model, positive, positive, negative, 3.0, 2.0, "regular")


GUIDERS = {"CFG": cfg_guider, "basic": basic_guider, "dual CFG": dual_guider}


def plan(scene, guider, noise=None):
    """Inputs that this node and SamplerCustomAdvanced share."""
    model = scene.model
    options = {"sampler": SAMPLED["sampler_name"], "scheduler": SAMPLED["scheduler"], "denoise": 1.0}
    return {
        "noise": noise or host.Noise_RandomNoise(SEED),
        "guider": guider,
        "sampler": comfy.samplers.sampler_object(SAMPLED["sampler_name"]),
        "sigmas": comfy.samplers.KSampler(model, SAMPLED["steps"], model.load_device, **options).sigmas,
        "latent_image": {"samples": torch.zeros(2, 4, 8, 8)},
    }


def stock(inputs):
    return run_as_executor(host.SamplerCustomAdvanced.execute, **inputs).result[0]["samples"]


def searched(scene, inputs, **changes):
    kind = scene.extension("reward_sampler").MaskUNetRewardSamplerCustom.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    inputs = {"starting_noise" if name == "noise" else name: value for name, value in inputs.items()}
    own = {"reward": scene.reward, "prompt": PROMPT, "masks": True, **scene.inputs, **SEARCH}
    return run_as_executor(kind.execute, **inputs | own | changes).result


def test_with_a_cfg_guider_it_is_the_reward_sampler(scene):
    of_ksampler = scene.search(batch=2)
    latents, masks, _, sheet, seeds = searched(scene, plan(scene, cfg_guider(scene)))
    assert torch.equal(latents["samples"], of_ksampler[0]["samples"])
    assert torch.equal(sheet, of_ksampler[3])
    assert seeds == of_ksampler[4]
    assert masks.record["sampling"]["sampler_name"] == SAMPLED["sampler_name"]


@pytest.mark.parametrize("guider", GUIDERS)
def test_without_a_search_the_picture_is_the_stock_samplers(scene, guider):
    inputs = plan(scene, GUIDERS[guider](scene))
    expected = stock(inputs)
    before = dict(vars(inputs["guider"]))
    assert torch.equal(searched(scene, inputs, **NO_SEARCH)[0]["samples"], expected)
    after = vars(inputs["guider"])
    assert after.keys() == before.keys(), "the connected guider is left as it was"
    assert all(after[name] is value for name, value in before.items() if name != "conds")
    assert torch.equal(stock(inputs), expected)


@pytest.mark.parametrize("guider", GUIDERS)
def test_what_it_finds_is_drawn_again_by_the_stock_sampler(scene, guider):
    node_of = scene.extension("masks").MaskUNetApplyMasks
    inputs = plan(scene, GUIDERS[guider](scene))
    latents, masks, _, _, seeds = searched(scene, inputs, branches="positive")
    assert not torch.equal(latents["samples"], stock(inputs))
    (seed,) = set(seeds) if len(set(seeds)) == 1 else (seeds[0],)
    with torch.inference_mode():
        masked = node_of.execute(scene.model, masks, 1.0).result[0]
    again = stock(plan(scene, GUIDERS[guider](scene, masked), host.Noise_RandomNoise(seed)))
    # Of a batch whose images have noises of unlike candidates, the first is compared.
    assert torch.allclose(again[0], latents["samples"][0], atol=1e-5)
    # Other guiders ask for their branches in an order of their own.
    assert masks.record["settings"]["branches"] == ("both" if guider == "dual CFG" else "positive")
    explain = scene.extension("masks").how_to_draw_again
    assert explain(masks.record).startswith("To draw this again, give the custom sampler seed")


def test_noise_without_a_seed_makes_no_candidates(scene):
    inputs = plan(scene, cfg_guider(scene), host.Noise_EmptyNoise())
    with pytest.raises(Exception, match="Connect Random Noise, or set candidates to 1"):
        searched(scene, inputs)
    assert torch.equal(searched(scene, inputs, **NO_SEARCH)[0]["samples"], stock(inputs))


def test_a_transformer_is_searched_in_a_graph_of_custom_sampling(server):
    graph = Graph()
    graph["toy"]["inputs"]["body"] = "transformer"
    graph["noise"] = node("RandomNoise", noise_seed=SEED)
    graph["guider"] = node("CFGGuider", model=["toy", 0], positive=["positive", 0], negative=["negative", 0], cfg=5.0)
    graph["sampler"] = node("KSamplerSelect", sampler_name="euler")
    graph["sigmas"] = node("BasicScheduler", model=["toy", 0], scheduler="simple", steps=6, denoise=1.0)
    shared = {name: [name, 0] for name in ("guider", "sampler", "sigmas")} | {"latent_image": ["empty", 0]}
    graph["plain"] = node("SamplerCustomAdvanced", noise=["noise", 0], **shared)
    own = {"vae": ["toy", 2], "reward": ["reward", 0], "prompt": PROMPT, "masks": True, "candidates": 0}
    graph["found"] = node("MaskUNetRewardSamplerCustom", starting_noise=["noise", 0], **shared, **own, preset="quality")
    for name in ("plain", "found"):
        graph.scored(name)
    result = Result(server, graph)
    assert result.scores("found")[0] > result.scores("plain")[0]
