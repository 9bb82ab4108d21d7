"""The nodes with every sampler of the host: what candidates are judged by, which seeds draw a picture again, and where
the noisy latent may be changed."""

import copy
import gc

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from tests.nodes.scene import Scene
from tests.tiny_models import controlnet

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
OWN_STEPS = ("dpm_fast", "dpm_adaptive")
"""Samplers that take other steps than the schedule has."""
SEEDED = {"lcm", "ddpm", "er_sde", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece", "exp_heun_2_x0_sde"}
SEEDED |= {name for name in SAMPLERS if "ancestral" in name or name.endswith(("_sde", "_sde_gpu", "_sde_heun_gpu"))}
SEEDED |= {"dpmpp_2m_sde_heun"}
"""Samplers that draw noise on their way, by the seed and for the whole batch."""
COUPLED = SEEDED | {"dpm_adaptive"}
"""And one that chooses its steps for the whole batch."""
_NAMES = ("euler", "dpmpp_2m", "dpmpp_3m", "res_", "gradient", "ipndm")
ONE_LOOK = {name for name in SAMPLERS if name.startswith(_NAMES)}
ONE_LOOK |= {"lms", "ddpm", "lcm", "deis", "er_sde", "ddim"}
"""Samplers that ask the model once at a step and go on from the latent that it was asked about."""
OTHERS = {"dpm_2", "heun", "heunpp2", "exp_heun_2_x0", "dpm_fast", "dpmpp_sde", "dpmpp_sde_gpu", "uni_pc", "uni_pc_bh2"}
OTHERS |= {"dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "exp_heun_2_x0_sde", "dpm_adaptive"}
OTHERS |= {"seeds_2", "seeds_3", "sa_solver", "sa_solver_pece"}
STEPS, SEED = 4, 3
NOTHING = {"candidates": 1, "iterations": 0, "steps": STEPS}
FOUR = NOTHING | {"candidates": 4}


@pytest.fixture(scope="module")
def scene(extension):
    return Scene(extension, "toy")


@pytest.fixture(scope="module")
def made(scene, extension):
    """A run of the node, of which copies are made for other samplers."""
    module, found = extension("reward_run"), []

    class Noted(module.RewardRun):
        def __init__(self, **inputs):
            super().__init__(**inputs)
            found.append(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "RewardRun", Noted)
        scene.search(**NOTHING)
    return found[0]


@pytest.fixture
def run_of(made, extension):
    def run(sampler, **changes):
        run, plan = copy.copy(made), made.sampling.record | {"sampler_name": sampler} | changes
        run.sampling = extension("host_sampling").KSampling(made.model, *made.sampling._conditioning, plan)
        run.sigmas = run.sampling.sigmas.tolist()
        run.steps = len(run.sigmas) - 1
        return run

    return run


@pytest.fixture
def trials(extension, monkeypatch):
    """What samplers were tried out for."""
    trial, asked = extension("sampler_trial").SamplerTrial, []

    def noted(name):
        own = getattr(trial, name)
        return lambda self: (asked.append(name), own(self))[1]

    for name in ("draws_each_alone", "takes_up_changes"):
        monkeypatch.setattr(trial, name, noted(name))
    return asked


def drawn(scene, sampler, seed=SEED, latent=None, model=None, callback=None, **changes):
    """What KSampler draws of a latent."""
    latent = latent or {"samples": torch.zeros(1, 4, 8, 8)}
    settings = {"steps": STEPS, "cfg": 5.0, "scheduler": "normal", "denoise": 1.0} | changes
    noise = comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))
    model = model or scene.model
    options = {"denoise": settings["denoise"], "noise_mask": latent.get("noise_mask"), "seed": seed}
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            settings["steps"],
            settings["cfg"],
            sampler,
            settings["scheduler"],
            scene.texts["positive"],
            scene.texts["negative"],
            latent["samples"],
            callback=callback,
            disable_pbar=True,
            **options,
        )


def peeked(run, candidate, steps):
    with torch.inference_mode(False), torch.no_grad():
        return run._peek(run._noise(candidate), candidate, steps)


def mask_of(batch=1):
    mask = torch.zeros(batch, 64, 64)
    mask[..., 32:] = 1.0
    return mask


# Candidates --------------------------------------------------------------------------------------------------------


def noting(model):
    """(a clone of a MODEL, the noise levels at which it is asked)"""
    levels, clone = [], model.clone()

    def note(executor, x, timestep, *args):
        levels.append(float(timestep.max()))
        return executor(x, timestep, *args)

    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "note", note)
    return clone, levels


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_candidate_is_judged_by_an_estimate_of_the_run_that_would_be_drawn(scene, run_of, sampler):
    estimates = []
    model, levels = noting(scene.model)
    drawn(scene, sampler, SEED + 1, model=model, callback=lambda i, x0, x, n: estimates.append((levels[-1], x0)))
    run = run_of(sampler)
    for steps in (2, 3):
        run.model, asked = noting(scene.model)
        found = peeked(run, 1, steps)
        enough = run.sigmas[steps - 1] * 1.001
        assert torch.equal(found, next((x0 for level, x0 in estimates if level <= enough), estimates[-1][1]))
        if sampler not in OWN_STEPS:
            assert torch.equal(found, estimates[steps - 1][1])
        assert asked == levels[: len(asked)]
        assert run.sigmas[steps] < asked[-1] <= enough or len(asked) == len(levels)


def test_a_sampler_that_tells_of_no_step_is_judged_by_what_it_draws(scene, run_of, monkeypatch):
    euler = comfy.samplers.sampler_object("euler").sampler_function

    def silent(model, x, sigmas, extra_args, callback, disable):
        return euler(model, x, sigmas, extra_args=extra_args, disable=True)

    monkeypatch.setattr(comfy.samplers, "sampler_object", lambda name: comfy.samplers.KSAMPLER(silent))
    expected = scene.model.model.process_latent_in(drawn(scene, "euler"))
    assert torch.equal(peeked(run_of("euler"), 0, 2), expected)


def test_leaving_a_run_leaves_nothing_behind(scene, run_of):
    control = controlnet(scene.model, torch.device("cpu"))
    run = run_of("euler")
    run.positive, run.negative = (
        [[text, {**more, "control": control, "control_apply_to_uncond": True}] for text, more in scene.texts[name]]
        for name in ("positive", "negative")
    )
    mode = run.model.hook_mode

    def guiders():
        return [thing for thing in gc.get_objects() if type(thing) is comfy.samplers.CFGGuider]

    gc.collect()
    others = guiders()
    gc.disable()
    try:
        peeked(run, 0, 2)
        assert len(guiders()) == len(others)
    finally:
        gc.enable()
    assert control.cond_hint is None
    assert control.timestep_range is None
    assert scene.model.model.current_patcher is None
    assert run.model.hook_mode == mode
    assert not run.model.hook_backup


def test_the_bar_of_a_candidate_stays_before_the_next_one_s(scene, extension, monkeypatch):
    """dpm_adaptive tells of more steps than are planned."""
    progress, bar = extension("search_progress").SearchProgress, []
    own = progress.candidate

    def candidate(self, number, scores):
        bar.append(self._done)
        own(self, number, scores)

    monkeypatch.setattr(progress, "candidate", candidate)
    scene.search(sampler_name="dpm_adaptive", **NOTHING | {"candidates": 3})
    assert bar == [2, 4, 6]


# Seeds -------------------------------------------------------------------------------------------------------------


def redrawn(scene, sampler, masks, latent, seeds=None, **changes):
    """Each image as KSampler draws it with the seed that was told, and the masks."""
    model = scene.model
    if masks is not None:
        seeds = masks.record["seeds"]
        with torch.inference_mode():
            model = scene.extension("masks").MaskUNetApplyMasks.execute(model, masks, 1.0).result[0]
    by_seed = {seed: drawn(scene, sampler, seed, latent, model, **changes) for seed in set(seeds)}
    return torch.stack([by_seed[seed][image] for image, seed in enumerate(seeds)])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeds_that_are_said_to_suffice_draw_the_images_again(scene, trials, sampler):
    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    latents, masks, *_ = scene.search(2, sampler_name=sampler, **FOUR)
    unlike = len(set(masks.record["seeds"])) > 1
    assert masks.record["seeds_suffice"] == (sampler not in COUPLED or not unlike)
    assert trials == ["draws_each_alone"] * unlike
    if masks.record["seeds_suffice"] or sampler in ("dpm_adaptive", "lcm", "euler_ancestral", "dpmpp_2m_sde"):
        same = torch.equal(redrawn(scene, sampler, masks, latent), latents["samples"])
        assert same == masks.record["seeds_suffice"]


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_ancestral", "dpmpp_2m_sde", "euler_cfg_pp"])
def test_the_seed_of_one_image_draws_it_again_with_its_masks(scene, trials, sampler):
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    changes = FOUR | {"iterations": 1, "start_percent": 1.0}
    latents, masks, *_ = scene.search(1, sampler_name=sampler, **changes)
    assert masks.record["seeds_suffice"]
    assert not trials
    assert torch.equal(redrawn(scene, sampler, masks, latent), latents["samples"])


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpm_fast", "euler_ancestral"])
def test_without_masks_images_are_their_candidates_and_need_no_more_than_seeds(scene, trials, sampler):
    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    latents, masks, *_ = scene.search(2, sampler_name=sampler, **FOUR | {"masks": False, "candidates": 8})
    assert len(set(masks.record["seeds"])) == 2
    assert masks.record["seeds_suffice"]
    assert not trials
    assert torch.equal(redrawn(scene, sampler, None, latent, masks.record["seeds"]), latents["samples"])


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_images_that_masks_have_made_worse_are_their_candidates_again(scene, sampler):
    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    changes = {"candidate_percent": 1.0, "iterations": 1, "lr": 30.0, "start_percent": 1.0}
    latents, masks, *_ = scene.search(2, sampler_name=sampler, **FOUR | changes)
    same = torch.equal(redrawn(scene, sampler, masks, latent), latents["samples"])
    assert same == masks.record["seeds_suffice"]


def test_an_inpainting_mask_makes_ddim_draw_noise_by_its_seed(scene):
    samples = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latent = {"samples": samples, "noise_mask": mask_of()}
    for sampler, suffices in (("euler", True), ("ddim", False)):
        latents, masks, *_ = scene.search(latent_image=latent, sampler_name=sampler, **FOUR | {"candidates": 8})
        assert len(set(masks.record["seeds"])) == 2
        assert masks.record["seeds_suffice"] is suffices
        assert torch.equal(redrawn(scene, sampler, masks, latent), latents["samples"]) is suffices


def test_latents_that_were_changed_are_not_drawn_again_by_masks(scene):
    _, masks, *_ = scene.search(latent_lr=0.05, **NOTHING | {"iterations": 1, "start_percent": 1.0})
    assert masks.record["seeds_suffice"] is False
    assert "latent_lr 0" in scene.extension("masks").how_to_draw_again(masks.record)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({}, None),
        ({"seeds": [3, 3]}, "To draw this again, give KSampler seed 3"),
        ({"seeds": [3, 4], "seeds_suffice": True}, "To draw this again, give KSampler seeds 3, 4 (image by image)"),
        (
            {"seeds": [3, 4], "seeds_suffice": False, "sampling": {"sampler_name": "lcm"}},
            "Found from seeds 3, 4 (image by image). KSampler draws other images from these seeds: the images were "
            "drawn as one batch, and lcm does not draw each image of a batch for itself. To have them again, save the "
            "latents, or search with a batch of one",
        ),
        (
            {"seeds": [3], "seeds_suffice": False, "settings": {"latent_lr": 0.1}},
            "Found from seed 3. KSampler draws other images from this, because latent_lr changed the noisy latents, "
            "which masks do not record. To have them again, save the latents, or search with latent_lr 0",
        ),
        ({"seeds": [3], "seeds_suffice": False, "sampling": 1}, "the sampler does not draw each image"),
    ],
)
def test_it_is_said_how_to_draw_a_picture_again(extension, record, text):
    said = extension("masks").how_to_draw_again(record)
    assert said == text or (record.get("sampling") == 1 and text in said)


def test_the_node_says_where_its_seeds_do_not_draw_the_images_again(scene, extension, monkeypatch):
    told = []
    monkeypatch.setattr(extension("search_progress").SearchProgress, "tell", lambda self, text: told.append(text))
    scene.search(2, sampler_name="euler_ancestral", **FOUR)
    assert "KSampler draws other images from these seeds" in told[-1]
    scene.search(2, sampler_name="euler", **FOUR)
    assert told[-1].endswith("(image by image)")


def test_a_trial_runs_no_network_and_looks_at_no_conditioning(scene, extension):
    model, levels = noting(scene.model)
    sigmas = comfy.samplers.KSampler(model, 20, model.load_device, "heun", "normal", 0.5).sigmas
    sampler = comfy.samplers.sampler_object("heun")
    trial = extension("sampler_trial").SamplerTrial(model, sampler, sigmas, torch.zeros(3, 4, 8, 8))
    assert trial.draws_each_alone()
    assert not trial.takes_up_changes()
    assert not levels


def test_a_sampler_that_cannot_be_tried_out_is_promised_nothing(scene, extension):
    def foreign(model, x, sigmas, extra_args, callback, disable):
        return x / model.inner_model.inner_model.what_only_it_knows

    sampler = comfy.samplers.KSAMPLER(foreign)
    trial = extension("sampler_trial").SamplerTrial(
        scene.model, sampler, torch.arange(4.0, -1, -1), torch.zeros(2, 4, 8, 8)
    )
    assert not trial.draws_each_alone()
    assert not trial.takes_up_changes()


# The noisy latent --------------------------------------------------------------------------------------------------


def test_every_sampler_is_known():
    assert sorted(SAMPLERS) == sorted([*ONE_LOOK, *OTHERS])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_are_changed_only_where_the_sampler_goes_on_from_them(run_of, sampler):
    run = run_of(sampler, steps=6)
    assert run._trial().takes_up_changes() is (sampler in ONE_LOOK)
    run.latent = run.latent | {"noise_mask": mask_of()}
    assert run._trial().takes_up_changes() is (sampler in ONE_LOOK)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("sampler", "goes_on"), [*((name, True) for name in sorted(ONE_LOOK)), ("uni_pc", False)])
def test_what_is_written_into_the_latent_is_what_the_step_goes_on_from(scene, sampler, goes_on, masked):
    """From a clean picture, of which the network says that it is clean, a step leads to that picture and own noise."""
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    latent_of_sampler = scene.extension("sampler_trial").before_each_call
    latent = {"samples": torch.zeros(1, 4, 8, 8)} | ({"noise_mask": mask_of()} if masked else {})

    def latents(sign):
        given, model = [], scene.model.clone()

        def written(held):
            given.append(held.value.clone())
            held.value.copy_(sign * picture)

        def estimated(executor, x, timestep, model_options, seed):
            clean = sign * picture
            for function in model_options.get("sampler_post_cfg_function", []):
                function({"denoised": clean, "uncond_denoised": clean})
            return clean

        def sampled(executor, *args, **kwargs):
            with latent_of_sampler(executor.class_obj, written):
                return executor(*args, **kwargs)

        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "write", sampled)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "write", estimated)
        drawn(scene, sampler, latent=latent, model=model, steps=5)
        return torch.stack(given[1:])[..., 4:]

    changed = (latents(1) - latents(-1)) / 2
    assert torch.allclose(changed, picture[..., 4:].expand_as(changed), atol=1e-3) is goes_on


@pytest.mark.parametrize("sampler", ["heun", "uni_pc", "dpm_adaptive", "sa_solver"])
@pytest.mark.parametrize("more", [{}, {"noise_mask": mask_of()}])
def test_other_samplers_are_refused_in_one_sentence(scene, sampler, more):
    latent = {"samples": torch.zeros(1, 4, 8, 8)} | more
    with pytest.raises(ValueError, match=rf"{sampler} does not go on from what was changed.*euler or dpmpp_2m\.$"):
        scene.search(sampler_name=sampler, latent_image=latent, latent_lr=0.05, **NOTHING | {"iterations": 1})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim", "euler_ancestral"])
def test_a_search_for_latents_changes_what_is_drawn_where_a_mask_lets_it(scene, sampler, masked):
    changes = NOTHING | {"iterations": 2, "start_percent": 0.6, "masks": False, "latent_lr": 0.05}
    kept = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latent = {"samples": kept} | ({"noise_mask": mask_of()} if masked else {})
    plain = scene.search(latent_image=latent, sampler_name=sampler, **NOTHING | {"candidates": 1})[0]["samples"]
    found, masks, *_ = scene.search(latent_image=latent, sampler_name=sampler, **changes)
    differs = (found["samples"] - plain).abs()
    assert float(differs[..., 4:].min()) > 0
    if masked:
        torch.testing.assert_close(found["samples"][..., :4], kept[..., :4])
    assert masks.record["seeds_suffice"] is False


# Unusual inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "dpm_fast", "uni_pc", "sa_solver", "lms", "dpmpp_2m_sde"])
def test_few_steps_and_little_noise_raise_nothing(scene, sampler):
    few = {"steps": 2, "candidate_percent": 0.0}
    for changes in ({"steps": 1}, few, {"steps": 3, "denoise": 0.4}, {"denoise": 0.0}):
        latents, *_ = scene.search(2, sampler_name=sampler, **FOUR | {"candidates": 2, "cfg": 1.0} | changes)
        assert torch.isfinite(latents["samples"]).all()


def test_seeds_of_a_part_of_a_batch_draw_it_again(scene):
    whole = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latent = {"samples": whole[2:], "batch_index": [2, 3], "noise_mask": mask_of(2)}
    latents, masks, *_ = scene.search(latent_image=latent, sampler_name="dpmpp_2m", denoise=0.7, **FOUR)
    assert masks.record["seeds_suffice"]
    assert torch.equal(redrawn(scene, "dpmpp_2m", masks, latent, denoise=0.7), latents["samples"])


def estimate_of(scene, sampler, seed, latent, steps, after):
    """What a stock run of so many steps takes for the clean latent after some of them."""
    estimates = []
    drawn(scene, sampler, seed, latent, steps=steps, callback=lambda i, x0, x, n: estimates.append(x0))
    return estimates[after - 1].clone()


@pytest.mark.parametrize("preset", ["fast", "quality"])
def test_the_presets_choose_the_candidate_that_a_reader_of_full_runs_would(scene, made, preset):
    """Each candidate's stock run, its estimate where the preset looks, and the same reward."""
    steps, sampler, candidates = 6, "dpmpp_2m_sde", 4
    changes = {"preset": preset, "steps": steps, "sampler_name": sampler, "candidates": candidates, "seconds": 0.01}
    _, masks, *_ = scene.search(2, **changes)
    latent, scores = {"samples": torch.zeros(2, 4, 8, 8)}, []
    for candidate in range(candidates):
        # Pictures of 64 pixels are looked at in full.
        estimate = estimate_of(scene, sampler, SEED + candidate, latent, steps, after=3)
        scores.append(made.judge.scores(estimate))
    assert masks.record["seeds"] == [SEED + int(best) for best in torch.stack(scores).argmax(0)]
