"""MaskUNet Reward Sampler in the host's own process: the reward curve, ControlNet, and models that it cannot mask."""

import importlib
import sys
from functools import partial

import pytest
import torch

from tests.host.extension import NAME, core_module
from tests.nodes.reward_graphs import FEW_UPDATES, NO_UPDATES, PROMPT, SAMPLING

COLOURS = [(0x60, 0xA5, 0xFA), (0xFB, 0x92, 0x3C), (0x4A, 0xDE, 0x80)]
"""Of the first three images."""
PAPER, INK = (0x18, 0x18, 0x1B), (0xE4, 0xE4, 0xE7)
TARGETS = "decoder attention"


@pytest.fixture(scope="module")
def sample(extension):
    """Runs the node as the executor does, on models and conditioning that were made as the executor makes them."""
    node = extension("reward_sampler").MaskUNetRewardSampler.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    rewards = extension("rewards")
    with torch.inference_mode():
        model, clip, vae = extension("toy").MaskUNetToyModel.execute().result
        texts = {
            name: clip.encode_from_tokens_scheduled(clip.tokenize(t))
            for name, t in [("positive", PROMPT), ("negative", "")]
        }
        reward = rewards.MaskUNetRewardLoader.execute(rewards.TOY_REWARD, "auto", False).result[0]
        twice = rewards.MaskUNetRewardCombine.execute(reward, 1.0, reward, 1.0).result[0]

    def run(batch=1, watched=False, **changes):
        latent = {"samples": torch.zeros(batch, 4, 8, 8)}
        inputs = {"model": model, "vae": vae, "reward": reward, "prompt": PROMPT, "latent_image": latent, "masks": True}
        inputs |= {"watch": twice if watched else None, **texts, **SAMPLING, **FEW_UPDATES}
        with torch.inference_mode():
            return node.execute(**inputs | changes).result

    run.model, run.texts = model, texts
    return run


def pixels(curve: torch.Tensor, colour: tuple[int, int, int]) -> int:
    return int(((255 * curve - torch.tensor(colour)).abs() < 2).all(-1).sum())


def dark(curve: torch.Tensor) -> float:
    """Share of the picture that is empty."""
    return pixels(curve, PAPER) / curve[..., 0].numel()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_curve_has_a_line_per_image_and_nothing_is_clipped(sample, batch):
    pytest.importorskip("matplotlib")
    curve = sample(batch)[2]
    assert curve.shape == (1, 462, 704, 3)
    assert [pixels(curve, colour) > 10 for colour in COLOURS] == [n < batch for n in range(3)]
    for edge in (curve[:, :2], curve[:, -2:], curve[:, :, :2], curve[:, :, -2:]):
        assert dark(edge) == 1


def test_a_watched_reward_adds_a_line_and_an_axis(sample):
    pytest.importorskip("matplotlib")
    alone, watched = sample()[2], sample(watched=True)[2]
    assert pixels(watched, INK) > pixels(alone, INK) + 100
    assert pixels(watched, COLOURS[0]) > 200


def test_a_run_without_updates_says_so(sample):
    pytest.importorskip("matplotlib")
    curve = sample(**NO_UPDATES)[2]
    assert 0.9 < dark(curve) < 0.999
    candidates = sample(**NO_UPDATES | {"candidates": 2})[2]
    assert pixels(candidates, COLOURS[0]) > pixels(curve, COLOURS[0]) + 40


def test_the_title_of_the_curve_tells_the_finished_image_beside_the_plain_one(extension):
    title_of = extension("reward_curve").title_of
    plain, first, final = torch.tensor([-20.0, -10.0]), torch.tensor([-4.0, -2.0]), torch.tensor([-0.5, -0.25])
    assert title_of([plain[:1]], first[:1], final[:1]) == "final -0.500 (plain -20.000, chosen -4.000)"
    assert title_of([plain], first, final) == "mean of 2: final -0.375 (plain -15.000, chosen -3.000)"
    assert title_of([], None, final[:1]) == "final -0.500"


FRAME = (0.13, 0.77, 0.37)


@pytest.mark.parametrize(("changes", "side"), [({"masks": False}, 64), (FEW_UPDATES | {"candidate_percent": 0.5}, 64)])
def test_the_candidates_of_each_image_are_shown_with_the_chosen_one_framed(sample, changes, side, monkeypatch):
    """Judged when finished, and by an estimate."""
    sheet_of = importlib.import_module(f"{NAME}.nodes.candidate_sheet").candidate_sheets
    kept = {}

    def keep(pictures, scores, seeds, chosen):
        kept.update(pictures=pictures, scores=scores, seeds=seeds, chosen=chosen)
        return sheet_of(pictures, scores, seeds, chosen)

    monkeypatch.setattr(importlib.import_module(f"{NAME}.nodes.reward_run"), "candidate_sheets", keep)
    *_, sheets, seeds = sample(2, **changes | {"candidates": 3})
    assert kept["seeds"] == [SAMPLING["seed"] + n for n in range(3)]
    assert [picture.shape for picture in kept["pictures"]] == 3 * [(2, 3, side, side)]
    best = torch.stack(kept["scores"]).argmax(0)
    assert torch.equal(best, kept["chosen"])
    assert seeds == [kept["seeds"][number] for number in best]
    assert len(sheets) == 2
    for sheet, number in zip(sheets, best.tolist()):
        framed = ((sheet - torch.tensor(FRAME)).abs() < 1e-3).all(-1).nonzero()
        (top, left), (bottom, right) = framed.min(0).values.tolist(), framed.max(0).values.tolist()
        width, height = right + 1 - left, bottom + 1 - top
        assert number == top // height * (sheet.shape[1] // width) + left // width


def test_without_candidates_the_sheet_is_a_sentence(sample):
    *_, sheets, seeds = sample(2)
    assert len(sheets) == 2
    assert sheets.std() > 0.01
    assert seeds == [SAMPLING["seed"]] * 2


def test_the_toy_reward_tells_what_it_did_not_read(sample, extension, monkeypatch):
    told = []
    monkeypatch.setattr(extension("search_progress"), "tell", lambda text, node_id: told.append(text))
    sample(prompt=f"{PROMPT} on a table, on wood", **NO_UPDATES | {"candidates": 2})
    assert told[-1].endswith("\nThe toy reward did not read: on, table, wood")
    sample(**NO_UPDATES | {"candidates": 2})
    assert "did not read" not in told[-1]


def test_few_step_with_guidance_is_told_to_be_odd(sample, extension, monkeypatch):
    told = []
    monkeypatch.setattr(extension("search_progress"), "tell", lambda text, node_id: told.append(text))
    for cfg, odd in ((5.0, True), (1.0, False)):
        sample(preset="few_step", cfg=cfg, steps=2, candidates=2, masks=False)
        assert ("few_step is for distilled models at CFG 1, but cfg is 5." in told[-1]) == odd


def test_without_matplotlib_the_curve_is_a_sentence(sample, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    curve = sample()[2]
    assert curve.shape == (1, 160, 640, 3)
    assert 0.01 < (curve < 0.5).float().mean() < 0.2


def test_the_masks_tell_how_they_were_found(sample):
    masks = sample(candidates=2)[1]
    record = masks.record
    assert (record["prompt"], record["reward"], record["preset"]) == (PROMPT, "toy reward", "custom")
    assert record["sampling"] == SAMPLING
    assert record["settings"]["iterations"] == FEW_UPDATES["iterations"]
    assert record["seeds"][0] in (3, 4)
    assert record["scores"][0] < 0
    assert len(masks.sigmas) == SAMPLING["steps"]


def tiny_control(model):
    """A ControlNet of the toy's shape with random weights, as the host's nodes hand it over."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    unet = model.model.model_config.unet_config
    unwanted = ("out_channels", "disable_unet_model_creation", "dtype")
    config = {key: value for key, value in unet.items() if key not in unwanted}
    torch.manual_seed(0)
    network = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, operations=comfy.ops.manual_cast, dtype=torch.float32
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
    return control.set_cond_hint(torch.rand(1, 3, 64, 64), 1.0)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "run again"])
@pytest.mark.parametrize("search", [{}, {"latent_lr": 0.01}, {"targets": "all attention"}], ids=str)
def test_a_controlnet_acts_beside_the_search(sample, search, recompute, monkeypatch):
    """Also where layers run again in the backward pass, as they do on cards."""
    module = core_module("search.run")
    monkeypatch.setattr(module, "RewardSearch", partial(module.RewardSearch, recompute=recompute))
    with torch.inference_mode():
        control = tiny_control(sample.model)
        guided = {
            name: [
                [text, {**more, "control": control, "control_apply_to_uncond": False}] for text, more in conditioning
            ]
            for name, conditioning in sample.texts.items()
        }
    changes = FEW_UPDATES | search
    plain, stock, found = sample(**changes)[0], sample(**NO_UPDATES | guided)[0], sample(**changes | guided)[0]
    assert torch.isfinite(found["samples"]).all()
    assert not torch.equal(found["samples"], plain["samples"])
    assert not torch.equal(found["samples"], stock["samples"])
    assert torch.equal(sample(**NO_UPDATES | guided)[0]["samples"], stock["samples"])


def test_a_model_without_a_unet_is_refused_in_one_sentence(sample):
    import comfy.model_patcher

    class Flux(torch.nn.Module):
        """What the host keeps of a model of another kind, as far as the node looks."""

        def __init__(self, like):
            super().__init__()
            self.model_config, self.latent_format = like.model_config, like.latent_format
            self.model_sampling, self.diffusion_model = like.model_sampling, torch.nn.Linear(1, 1)

    cpu = torch.device("cpu")
    foreign = comfy.model_patcher.ModelPatcher(Flux(sample.model.model), load_device=cpu, offload_device=cpu)
    with pytest.raises(ValueError, match=r"is of a kind that MaskUNet has no masks for"):
        sample(model=foreign)


def test_a_recording_model_may_go_in_and_leaves_no_record_of_its_own(sample, extension):
    """The sampler gives its masks itself; its latents may be put together from several runs."""
    random = extension("random_mask").MaskUNetRandomMask.execute(sample.model, 0.9, 1, TARGETS, True, 0.0, 1.0).result
    recorded = extension("record_masks").MaskUNetRecordMasks.execute(random[0]).result[0]
    latent, masks, *_ = sample(model=recorded)
    assert torch.equal(latent["samples"], sample(model=random[0])[0]["samples"])
    assert len(masks.sigmas) == SAMPLING["steps"]
    with pytest.raises(ValueError, match="MaskUNet Reward Sampler has an output of its own for its masks"):
        extension("record_masks").MaskUNetMasksOfRun.execute(latent)


def test_a_second_run_reads_no_weights_from_the_disk(sample, monkeypatch):
    """Models are used where the host has them; none is loaded once more for gradients."""
    import comfy.utils
    import safetensors
    import safetensors.torch

    first = sample()[0]["samples"]

    def read(*arguments, **options):
        raise AssertionError(f"weights are read: {arguments[:1]}")

    readers = ((comfy.utils, "load_torch_file"), (torch, "load"), (safetensors, "safe_open"))
    for module, name in (*readers, (safetensors.torch, "load_file")):
        monkeypatch.setattr(module, name, read)
    assert torch.equal(sample()[0]["samples"], first)


def memory_is(monkeypatch, free: int) -> None:
    import comfy.model_management

    # The host's attention asks, too: it cuts its matrices then, which changes the last bits.
    own = comfy.model_management.get_free_memory
    monkeypatch.setattr(
        comfy.model_management,
        "get_free_memory",
        lambda device=None, torch_free_too=False: own(device, True) if torch_free_too else free,
    )


def test_little_free_memory_changes_nothing(sample, monkeypatch):
    found = sample()[0]["samples"]
    memory_is(monkeypatch, 2**26)
    assert torch.equal(sample()[0]["samples"], found)


def test_areas_of_a_large_latent_are_searched(sample):
    area = {"area": (8, 8, 24, 24)}
    guided = {name: [[text, {**more, **area}] for text, more in texts] for name, texts in sample.texts.items()}
    latent = {"samples": torch.zeros(1, 4, 40, 40)}
    settings = FEW_UPDATES | {"steps": 1, "iterations": 1, "start_percent": 0.0, "small_decode": True}
    found = sample(latent_image=latent, **settings | guided)[0]["samples"]
    assert found.shape == (1, 4, 40, 40)
    assert torch.isfinite(found).all()
