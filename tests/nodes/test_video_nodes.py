"""Text2Video-Zero's nodes as the host's executor runs them: the first frame is KSampler's picture, and the others hold
to it."""

import gc

import comfy.model_management
import comfy.sample
import comfy.utils
import pytest
import torch

from tests.families.models import TINY, load
from tests.host.memory import run_as_executor, tensors_alive
from tests.nodes.scene import SEARCH, Scene, same_state

STEPS = 4
LEVELS = {"t1_percent": 0.3, "t0_percent": 0.6}
"""After one and two of four steps."""


class Videos:
    """The toy model, and what the nodes draw with it."""

    def __init__(self, extension):
        self.scene = Scene(extension, "toy")
        self.sampler = extension("video").MaskUNetVideoSampler
        self.model, self.texts = self.scene.model, self.scene.texts
        self.sampling = {"seed": 3, "steps": STEPS, "cfg": 5.0, "sampler_name": "ddim", "scheduler": "normal"}

    def draw(self, model=None, frames=3, motion=32.0, **changes):
        inputs = {"model": model or self.model, "frames": frames, "motion_x": motion, "motion_y": 0.0}
        inputs |= {"latent_image": {"samples": torch.zeros(1, 4, 8, 8)}} | self.sampling | self.texts | LEVELS | changes
        return run_as_executor(self.sampler.execute, **inputs).result[0]["samples"]

    def picture(self, model=None):
        """What KSampler draws."""
        empty, settings = torch.zeros(1, 4, 8, 8), dict(self.sampling)
        seed = settings.pop("seed")
        noise = comfy.sample.prepare_noise(empty, seed)
        texts = self.texts["positive"], self.texts["negative"]
        with torch.inference_mode():
            return comfy.sample.sample(
                model or self.model, noise, *settings.values(), *texts, empty, seed=seed, disable_pbar=True
            )


@pytest.fixture(scope="module")
def videos(extension):
    return Videos(extension)


def close(one, other):
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_the_first_frame_is_ksamplers_picture_and_the_others_move_on(videos):
    frames = videos.draw()
    assert frames.shape == (3, 4, 8, 8)
    assert torch.isfinite(frames).all()
    assert close(frames[:1], videos.picture())
    assert not close(frames[1], frames[0])
    assert not close(frames[1], videos.draw(cross_frame=False)[1])


def test_frames_without_motion_and_without_new_noise_are_equal(videos):
    frames = videos.draw(motion=0.0, t0_percent=LEVELS["t1_percent"])
    assert close(frames, frames[:1].expand(3, -1, -1, -1))


def test_frames_do_not_depend_on_chunks_or_on_how_many_there_are(videos):
    whole = videos.draw(frames=4)
    assert close(videos.draw(frames=4, chunk=2), whole)
    assert close(videos.draw(frames=3), whole[:3])
    assert torch.equal(videos.draw(frames=4), whole)
    assert not close(videos.draw(frames=4, seed=4), whole)


def test_a_foreground_changes_the_background_alone(videos):
    whole, mask = torch.ones(1, 64, 64), torch.zeros(3, 64, 64)
    plain = videos.draw()
    assert torch.equal(videos.draw(foreground=whole), plain)
    held = videos.draw(foreground=mask)
    assert close(held[0], plain[0])
    assert not close(held[1], plain[1])


def test_masks_of_a_search_on_the_first_frame_are_replayed_for_all(videos, extension):
    search = SEARCH | {"candidates": 1, "iterations": 2, "start_percent": 0.0, "lr": 0.3}
    found, masks, *_ = videos.scene.search(**videos.sampling | search)
    assert any(masks.steps.values())
    replaying = extension("masks").MaskUNetApplyMasks.execute(videos.model, masks, 1.0).result[0]
    frames, plain = videos.draw(replaying), videos.draw()
    assert close(frames[:1], found["samples"])
    assert not close(frames[:1], plain[:1])
    assert not close(frames[2], plain[2])


def test_a_search_on_a_batch_of_frames_is_refused(videos, extension):
    model = extension("video").MaskUNetCrossFrame.execute(videos.model, "first", 0.0, 1.0).result[0]
    with pytest.raises(ValueError, match="Search on one picture"):
        videos.scene.search(batch=2, model=model, **SEARCH | {"candidates": 1})
    found, *_ = videos.scene.search(model=model, **SEARCH | {"candidates": 1})
    assert torch.isfinite(found["samples"]).all()


def test_what_is_connected_before_it_acts_and_gives_way(videos, extension):
    node = extension("video").MaskUNetCrossFrame
    previous = node.execute(videos.model, "previous", 0.0, 1.0).result[0]
    assert torch.equal(videos.draw(previous), videos.draw())
    apart = videos.draw(cross_frame=False)
    assert not close(videos.draw(previous, cross_frame=False)[2], apart[2])


def test_progress_runs_over_all_steps_of_all_frames(videos, monkeypatch):
    told = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: told.append((value, total)))
    videos.draw(frames=4, chunk=3)
    values, totals = zip(*told)
    # One picture for two steps, then three and two frames for the three that are left.
    assert set(totals) == {2 + (3 + 2) * 3}
    assert list(values) == sorted(values)
    assert values[-1] == totals[-1]


class Stop(Exception):
    pass


def fail(*_, **__):
    raise Stop


def interrupt(*_, **__):
    """By the person at the graph: the host looks for it in every layer of the next call."""
    comfy.model_management.interrupt_current_processing()


@pytest.mark.parametrize("happen", [None, fail, interrupt])
def test_the_stock_model_and_memory_are_as_before_however_a_run_ends(videos, happen, monkeypatch):
    videos.draw()
    before, plain = videos.scene.state(), videos.picture()
    gc.collect()
    gc.disable()
    try:
        alive = tensors_alive()
        if happen is None:
            videos.draw()
        else:
            with monkeypatch.context() as patch:
                patch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", happen)
                _end_early(videos)
        left = [thing for key, thing in tensors_alive().items() if alive.get(key) is not thing]
        weights = {id(value) for value in [*videos.model.model.parameters(), *videos.model.model.buffers()]}
        assert [tuple(thing.shape) for thing in left if id(thing) not in weights] == []
    finally:
        gc.enable()
    assert torch.equal(videos.picture(), plain)
    assert same_state(videos.scene.state(), before)


def _end_early(videos):
    """The executor too keeps no more of an error than words."""
    with pytest.raises((Stop, comfy.model_management.InterruptProcessingException)):
        videos.draw()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent_image": {"samples": torch.zeros(2, 4, 8, 8)}}, "batch_size 1"),
        ({"latent_image": {"samples": torch.zeros(1, 4, 8, 8), "noise_mask": torch.ones(1, 64, 64)}}, "batch_size 1"),
        ({"foreground": torch.ones(2, 64, 64)}, "2 masks for 3 frames"),
        ({"t1_percent": 0.7}, "Set t1_percent to the smaller"),
        ({"sampler_name": "euler_ancestral", "chunk": 2}, "Set chunk to 3"),
    ],
)
def test_what_makes_no_video_is_said_in_a_sentence(videos, changes, said):
    with pytest.raises(ValueError, match=said):
        videos.draw(**changes)


def test_a_sampler_with_noise_of_its_own_draws_all_frames_in_one_chunk(videos):
    assert torch.isfinite(videos.draw(sampler_name="euler_ancestral")).all()


def test_transformers_are_refused_in_a_sentence(videos):
    model = load(TINY["Z-Image"])
    with pytest.raises(ValueError, match=r"works in U-Nets.*, and the connected model is Z-Image"):
        videos.draw(model)
