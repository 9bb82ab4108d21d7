"""MaskUNet Reward Sampler in a real ComfyUI server: what it draws, and what stays as it was."""

import pytest
import torch
from safetensors.torch import save_file

from maskunet_core.files import mask_file
from tests.builders import make_generator
from tests.nodes.reward_graphs import FEW_UPDATES, NO_UPDATES, SAMPLING, Graph, Result, node

SAMPLERS = ("euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "lcm")


def half_masked(graph: Graph) -> None:
    """Inpainting: a drawn picture is the latent, and its left half may change."""
    graph.plain("first", seed=8)
    graph["all"] = node("SolidMask", value=0.0, width=64, height=64)
    graph["left"] = node("SolidMask", value=1.0, width=32, height=64)
    graph["half"] = node("MaskComposite", destination=["all", 0], source=["left", 0], x=0, y=0, operation="add")
    graph["masked"] = node("SetLatentNoiseMask", samples=["first", 0], mask=["half", 0])


def test_without_updates_the_stock_samplers_latent_comes_out_bit_for_bit(server):
    graph = Graph(batch=3)
    half_masked(graph)
    cases = [{"sampler_name": name} for name in SAMPLERS]
    cases += [{"scheduler": "ddim_uniform", "steps": 5}, {"denoise": 0.5, "latent_image": ["first", 0]}]
    cases += [{"denoise": 0.6, "latent_image": ["masked", 0], "sampler_name": name} for name in ("euler", "dpmpp_2m")]
    for number, case in enumerate(cases):
        graph.plain(f"plain {number}", **case)
        graph.rewarded(f"rewarded {number}", **NO_UPDATES | case)
    result = Result(server, graph)
    for number, case in enumerate(cases):
        drawn = result.latents(f"rewarded {number}")
        assert drawn.shape == (3, 4, 8, 8)
        assert torch.equal(drawn, result.latents(f"plain {number}")), case


def test_a_denoise_of_zero_gives_the_latent_back(server):
    graph = Graph()
    graph.plain("first")
    graph.rewarded("rewarded", preset="fast", denoise=0.0, latent_image=["first", 0])
    result = Result(server, graph)
    assert torch.equal(result.latents("rewarded"), result.latents("first"))


@pytest.mark.parametrize("preset", ["fast", "quality", "paper", "reference"])
def test_every_preset_runs(server, preset):
    graph, ours = Graph(), preset in ("fast", "quality")
    settings = {"candidates": 0, "steps": 4 if ours else 2}
    graph.scored(graph.plain("plain", steps=settings["steps"]))
    graph.scored(graph.rewarded("rewarded", preset=preset, **settings))
    result = Result(server, graph)
    assert torch.isfinite(result.latents("rewarded")).all()
    if ours:
        assert result.scores("rewarded")[0] > result.scores("plain")[0]
    assert not torch.equal(result.latents("rewarded"), result.latents("plain"))


@pytest.mark.parametrize(("steps", "sampler"), [(1, "euler"), (2, "lcm"), (4, "lcm")])
def test_few_steps_without_guidance_have_a_preset(server, steps, sampler):
    graph, settings = Graph(), {"steps": steps, "sampler_name": sampler, "scheduler": "sgm_uniform", "cfg": 1.0}
    graph.scored(graph.plain("plain", **settings))
    graph.scored(graph.rewarded("rewarded", preset="few_step", candidates=0, **settings))
    result = Result(server, graph)
    assert result.scores("rewarded")[0] > result.scores("plain")[0]


@pytest.mark.parametrize("case", [{"candidates": 1}, {"candidates": 1, "branches": "positive"}, {"candidates": 3}])
def test_saved_masks_repeat_the_images_without_a_reward(server, case):
    graph = Graph(batch=1 if case["candidates"] > 1 else 2)
    graph.rewarded("rewarded", **FEW_UPDATES | case)
    graph["save masks"] = node("MaskUNetSaveMasks", masks=["rewarded", 1], filename_prefix="masks/found")
    result = Result(server, graph)
    output = result.outputs["save masks"]
    name = output["masks"][0]["filename"]
    masks = mask_file.load(server.base / "output" / "masks" / name)
    (seed,) = set(masks.record["seeds"])
    assert output["text"][1] == f"To draw this again, give KSampler seed {seed}"

    replay = Graph(batch=masks.images)
    del replay["reward"]
    replay["load"] = node("MaskUNetLoadMasks", masks_name=name)
    replay["apply"] = node("MaskUNetApplyMasks", model=["toy", 0], masks=["load", 0], strength=1.0)
    replay.plain("replayed", model=["apply", 0], seed=seed)
    replay.plain("plain", seed=seed)
    again = Result(server, replay)
    assert torch.equal(again.latents("replayed"), result.latents("rewarded"))
    assert not torch.equal(again.latents("plain"), result.latents("rewarded"))


def test_fast_finds_a_starting_noise_and_needs_no_masks(server):
    graph = Graph()
    graph.scored(graph.plain("plain"))
    graph.scored(graph.rewarded("rewarded", preset="fast", candidates=0))
    graph["save masks"] = node("MaskUNetSaveMasks", masks=["rewarded", 1], filename_prefix="masks/fast")
    result = Result(server, graph)
    name = result.outputs["save masks"]["masks"][0]["filename"]
    (seed,) = mask_file.load(server.base / "output" / "masks" / name).record["seeds"]

    replay = Graph()
    replay.plain("replayed", seed=seed)
    assert torch.equal(Result(server, replay).latents("replayed"), result.latents("rewarded"))
    assert result.scores("rewarded")[0] > result.scores("plain")[0]


def test_candidates_without_masks_are_the_best_of_n(server):
    graph, count = Graph(batch=2), 3
    graph.scored(graph.rewarded("best", preset="fast", candidates=count, masks=False))
    for number in range(count):
        graph.scored(graph.plain(f"candidate {number}", seed=SAMPLING["seed"] + number))
    result = Result(server, graph)
    scores = torch.tensor([result.scores(f"candidate {number}") for number in range(count)])
    drawn = torch.stack([result.latents(f"candidate {number}") for number in range(count)])
    chosen = scores.argmax(0)
    assert torch.equal(result.latents("best"), drawn[chosen, torch.arange(2)])
    assert result.scores("best") == pytest.approx(scores.max(0).values.tolist(), rel=1e-6)


def test_one_candidate_without_masks_is_the_plain_image(server):
    graph = Graph()
    graph.plain("plain")
    graph.rewarded("rewarded", preset="fast", masks=False)
    result = Result(server, graph)
    assert torch.equal(result.latents("rewarded"), result.latents("plain"))


def test_the_latent_alone_can_be_searched(server):
    graph = Graph()
    graph.scored(graph.plain("plain"))
    graph.scored(graph.rewarded("rewarded", **FEW_UPDATES | {"masks": False, "latent_lr": 0.03}))
    result = Result(server, graph)
    assert result.scores("rewarded")[0] > result.scores("plain")[0]


def lora(server, name="toy_lora.safetensors") -> str:
    key, stream = "lora_unet_output_blocks_3_1_transformer_blocks_0_attn2_to_q", torch.Generator().manual_seed(0)
    file = {f"{key}.lora_up.weight": torch.randn(128, 2, generator=stream), f"{key}.alpha": torch.tensor(2.0)}
    file[f"{key}.lora_down.weight"] = torch.randn(2, 128, generator=stream)
    (server.base / "models" / "loras").mkdir(exist_ok=True)
    save_file(file, server.base / "models" / "loras" / name)
    return name


def test_a_lora_before_the_node_acts(server):
    name = lora(server)
    server.object_info()
    graph = Graph()
    graph["lora"] = node("LoraLoaderModelOnly", model=["toy", 0], lora_name=name, strength_model=1.0)
    # The stock sampler loads the patched weights in inference mode, before the search needs them outside of it.
    graph.plain("stock lora", model=["lora", 0])
    graph.rewarded("nothing lora", **NO_UPDATES | {"model": ["lora", 0]})
    graph.rewarded("lora search", **FEW_UPDATES | {"model": ["lora", 0]})
    graph.rewarded("search", **FEW_UPDATES)
    graph.plain("stock")
    graph.plain("stock again", model=["lora", 0], cfg=5.0 + 1e-9)
    result = Result(server, graph)
    assert torch.equal(result.latents("stock lora"), result.latents("nothing lora"))
    assert torch.equal(result.latents("stock lora"), result.latents("stock again"))
    drawn = [result.latents(name) for name in ("stock", "stock lora", "search", "lora search")]
    assert all(not torch.equal(a, b) for n, a in enumerate(drawn) for b in drawn[:n])


def test_a_generator_before_the_node_acts(server, toy_structure):
    from maskunet_core.files import checkpoint

    path = server.base / "models" / "maskunet" / "lively.safetensors"
    checkpoint.save(path, make_generator(toy_structure, lively=True), "decoder attention", {})
    graph = Graph()
    graph["generator"] = node("MaskUNetLoader", maskunet_name=path.name)
    window = {"start_percent": 0.0, "end_percent": 1.0, "stochastic": False, "seed": 0}
    graph["applied"] = node("MaskUNetApply", model=["toy", 0], maskunet=["generator", 0], strength=1.0, **window)
    graph.plain("generator alone", model=["applied", 0])
    graph.rewarded("nothing", **NO_UPDATES | {"model": ["applied", 0]})
    graph.rewarded("generator and search", **FEW_UPDATES | {"model": ["applied", 0]})
    graph.rewarded("search", **FEW_UPDATES)
    result = Result(server, graph)
    alone = result.latents("generator alone")
    assert torch.equal(result.latents("nothing"), alone)
    both = result.latents("generator and search")
    assert not torch.equal(both, alone)
    assert not torch.equal(both, result.latents("search"))


def test_inpainting_leaves_what_the_mask_keeps(server):
    graph = Graph()
    half_masked(graph)
    graph.scored(graph.plain("plain", latent_image=["masked", 0]))
    graph.scored(graph.rewarded("rewarded", **FEW_UPDATES | {"latent_image": ["masked", 0]}))
    result = Result(server, graph)
    first, drawn = result.latents("first"), result.latents("rewarded")
    torch.testing.assert_close(drawn[..., 4:], first[..., 4:], rtol=0, atol=1e-4)
    assert not torch.equal(drawn[..., :4], result.latents("plain")[..., :4])
    assert result.scores("rewarded")[0] > result.scores("plain")[0]


def test_a_large_inpainting_is_judged_on_a_small_decode(server):
    graph = Graph(side=320)
    graph["left"] = node("SolidMask", value=1.0, width=320, height=320)
    graph["masked"] = node("SetLatentNoiseMask", samples=["empty", 0], mask=["left", 0])
    graph.rewarded("rewarded", **FEW_UPDATES | {"steps": 2, "small_decode": True, "latent_image": ["masked", 0]})
    assert Result(server, graph).latents("rewarded").shape == (1, 4, 40, 40)


def test_the_toy_vae_as_gradient_vae_changes_nothing(server):
    graph = Graph()
    graph.rewarded("one", **FEW_UPDATES)
    graph.rewarded("two", **FEW_UPDATES | {"gradient_vae": ["toy", 2]})
    result = Result(server, graph)
    assert torch.equal(result.latents("one"), result.latents("two"))
