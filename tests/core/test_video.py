"""How frames of a video begin, and how they look at each other, by published values and by what may influence what."""

import json
import math
from pathlib import Path

import comfy.sample
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from maskunet_core.errors import MaskUNetError
from maskunet_core.masks.call import NEGATIVE, POSITIVE, Call, Chunk
from maskunet_core.masks.sources import GeneratorMasks
from maskunet_core.seam.attach import attach
from maskunet_core.toy.model import load_toy_model
from maskunet_core.video.cross_frame import CrossFrameAttention, NoCrossFrameAttention, crossed, self_attentions
from maskunet_core.video.motion import Motion, foregrounds, later_frames, moved, smoothed_background
from maskunet_core.video.sampling import VideoSettings, draw_video
from maskunet_core.video.shared_masks import FirstFrameMasks
from tests.builders import make_generator
from tests.families.models import TINY, load
from tests.tiny_models import controlnet

GOLDEN = Path(__file__).with_name("published")
MOTIONS = json.loads((GOLDEN / "motion_golden.json").read_text(encoding="utf-8"))
STEPS, SEED = 3, 5


# Motion --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOTIONS)
def test_a_moved_latent_takes_the_published_cells(name):
    motion = Motion(*MOTIONS[name]["motion"])
    for frame, cells in MOTIONS[name]["frames"].items():
        rows, columns = cells["rows"], cells["columns"]
        latent = torch.arange(len(rows) * len(columns)).view(len(rows), len(columns))
        expected = latent[torch.tensor(rows)[:, None], torch.tensor(columns)]
        assert torch.equal(moved(latent, motion, int(frame)), expected)


def test_published_levels_are_those_of_ddims_third_and_sixth_step(toy):
    sampling = toy[0].get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", 50)
    settings = VideoSettings(t1=sampling.percent_to_sigma(0.058), t0=sampling.percent_to_sigma(0.118))
    assert settings.steps(sigmas) == VideoSettings().steps(sigmas) == (2, 5)
    t1, t0 = sigmas[2], sigmas[5]
    assert float(t1**2 - t0**2) ** 0.5 == pytest.approx(7.176, abs=1e-3)
    # How much of the signal is left after noise is added, in the network's variance preserving scale.
    assert float((1 + t0**2) / (1 + t1**2)) == pytest.approx(0.5305335521697998, rel=1e-5)
    assert settings.images(sigmas) == 389


def test_a_frames_noise_comes_from_the_seed_and_its_number_alone():
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    three, five = (later_frames(latent, frames, Motion(), 2.0, seed=7) for frames in (3, 5))
    assert three.shape == (2, 4, 8, 8)
    assert torch.equal(three, five[:2])
    assert not torch.equal(three, later_frames(latent, 3, Motion(), 2.0, seed=8))
    noises = later_frames(torch.zeros(1, 4, 64, 64), 3, Motion(), 2.0, seed=7)
    assert noises.std((1, 2, 3)).tolist() == pytest.approx([2.0, 2.0], rel=0.02)
    assert abs(float(torch.corrcoef(noises.flatten(1))[0, 1])) < 0.03


def test_backgrounds_are_mostly_the_first_frames():
    motion = Motion(128.0, 0.0)  # two of eight cells
    starts = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 64, 64)
    mask[:, :8, 56:] = 1.0
    foreground = foregrounds(mask, 2, motion, 8, 8)
    assert foreground[0].nonzero().amin(0).tolist() == [0, 5]  # the last cell, and two to each side
    assert foreground[1].any()
    found = smoothed_background(starts, foreground, motion)
    column = starts[0][:, :, 2]  # of the first frame comes to the second one's first column
    torch.testing.assert_close(found[1][:, :, 0], 0.4 * starts[1][:, :, 0] + 0.6 * column)
    covered = foreground[1] | moved(foreground[0], motion, 1)
    assert covered.any()
    assert not covered.all()
    assert torch.equal(found[1][:, covered], starts[1][:, covered])
    torch.testing.assert_close(found[0], starts[0])


# Steps and chunks ----------------------------------------------------------------------------------------------------


def test_frames_are_drawn_in_chunks_that_begin_with_the_first():
    drawn, sigmas = [], torch.linspace(10.0, 0.0, 6)

    def draw(x, start, end):
        drawn.append((1 if x is None else len(x), start, end))
        return torch.zeros(1, 1, 2, 2) if x is None else x

    settings = VideoSettings(frames=6, chunk=3, t1=6.0, t0=2.0)
    video = draw_video(draw, sigmas, settings)
    assert len(video) == 6
    assert settings.chunks() == [[0, 1, 2], [0, 3, 4], [0, 5]]
    assert drawn == [(1, 0, 2), (1, 2, 4), (3, 2, 5), (3, 2, 5), (2, 2, 5)]
    assert settings.images(sigmas) == sum(n * (end - start) for n, start, end in drawn)
    assert VideoSettings(frames=1).chunks() == [[0]]


def test_a_sampler_of_one_step_is_refused():
    with pytest.raises(MaskUNetError, match="at least 2 steps"):
        VideoSettings().steps(torch.tensor([10.0, 0.0]))


# Cross-frame attention -----------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    """One self-attention of the host's. tiles: into which each picture is cut before it, as by HyperTile."""

    def __init__(self, tiles=1):
        super().__init__()
        self.block, self.tiles = BasicTransformerBlock(16, 2, 8, context_dim=16), tiles
        golden = load_file(GOLDEN / "cross_frame_golden.safetensors")
        names = {"to_q": "to_q.weight", "to_k": "to_k.weight", "to_v": "to_v.weight"}
        names |= {"to_out.weight": "to_out.0.weight", "to_out.bias": "to_out.0.bias"}
        self.block.attn1.load_state_dict({name: golden[key] for key, name in names.items()})
        self.hidden, self.expected = golden["hidden"], golden["out"]

    def forward(self, x):
        pieces = x.unflatten(1, (self.tiles, -1)).flatten(0, 1)
        return self.block.attn1(pieces).unflatten(0, (len(x), -1)).flatten(1, 2)


def test_frames_that_look_at_the_first_give_the_published_values():
    network = Network()
    with torch.no_grad(), crossed(network, [0, 0, 0]):
        found = network(network.hidden)
    torch.testing.assert_close(found, network.expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(network(network.hidden), network.expected, atol=1e-3)


def test_tiles_look_at_the_same_tile_of_the_reference():
    network = Network(tiles=3)
    plain = Network()
    with torch.no_grad():
        with crossed(network, [0, 0, 1]):
            found = network(network.hidden)
        for tile in range(3):
            part = slice(3 * tile, 3 * tile + 3)
            with crossed(plain, [0, 0, 1]):
                torch.testing.assert_close(found[:, part], plain(plain.hidden[:, part]))


class Scene:
    """The toy model as the host's executor makes it, and KSampler's way of drawing three frames."""

    def __init__(self):
        self.model, self.clip, _ = load_toy_model()
        self.texts = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(t)) for t in ("a red circle", "")]

    def draw(self, model=None, noise=None, texts=None, **options):
        noise = self.noise() if noise is None else noise
        settings = (STEPS, 5.0, "euler", "normal", *(texts or self.texts), torch.zeros_like(noise))
        with torch.inference_mode():
            return comfy.sample.sample(model or self.model, noise, *settings, seed=SEED, disable_pbar=True, **options)

    def noise(self, frames=3):
        return comfy.sample.prepare_noise(torch.zeros(frames, 4, 8, 8), SEED)

    def layers(self):
        return self.model.model.diffusion_model.modules()


@pytest.fixture(scope="module")
def scene():
    with torch.inference_mode():
        return Scene()


@pytest.mark.parametrize(
    ("reference", "reached"),
    [("first", {0: [0, 1, 2], 1: [1], 2: [2]}), ("previous", {0: [0, 1, 2], 1: [1, 2], 2: [2]})],
)
def test_a_frame_changes_those_that_look_at_it(scene, reference, reached):
    model = CrossFrameAttention(reference).crossing(scene.model)
    before = scene.draw(model)
    for frame, expected in reached.items():
        noise = scene.noise()
        noise[frame] *= -1
        after = scene.draw(model, noise)
        changed = [n for n in range(3) if not torch.allclose(after[n], before[n], atol=1e-3)]
        assert changed == expected


def test_the_first_frame_is_what_it_is_alone_and_others_are_not(scene):
    plain, found = scene.draw(), scene.draw(CrossFrameAttention().crossing(scene.model))
    torch.testing.assert_close(found[0], plain[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1], plain[1], atol=1e-2)
    alone = scene.noise()[:1]
    assert torch.equal(scene.draw(CrossFrameAttention().crossing(scene.model), alone), scene.draw(noise=alone))


def test_a_step_computes_no_more_than_without(scene):
    def operations(model):
        with FlopCounterMode(display=False) as counter:
            scene.draw(model)
        return counter.get_total_flops()

    assert operations(CrossFrameAttention().crossing(scene.model)) == operations(scene.model) > 0


def test_the_last_setting_counts(scene):
    twice = CrossFrameAttention("previous").crossing(CrossFrameAttention("first").crossing(scene.model))
    assert torch.equal(scene.draw(twice), scene.draw(CrossFrameAttention("previous").crossing(scene.model)))


def test_outside_of_its_window_frames_look_at_themselves(scene):
    def estimates(model):
        steps = []
        scene.draw(model, callback=lambda step, x0, x, total: steps.append(x0.clone()))
        return steps

    windows = (0.0, 1.0), (0.0, 0.5), (0.5, 1.0)
    whole, early, late = (estimates(CrossFrameAttention("first", *window).crossing(scene.model)) for window in windows)
    plain = estimates(scene.model)
    assert torch.equal(late[0], plain[0])
    assert torch.equal(early[0], whole[0])
    assert not torch.equal(late[-1], plain[-1])
    assert not torch.equal(early[-1], whole[-1])
    with pytest.raises(MaskUNetError, match="cross-frame attention would never act"):
        CrossFrameAttention("first", 0.8, 0.2).crossing(scene.model)


def test_controlnets_blocks_are_treated_alike(scene):
    net = controlnet(scene.model, torch.device("cpu"))
    hinted = {"control": net, "control_apply_to_uncond": True}
    texts = [[[text, more | hinted] for text, more in conditioning] for conditioning in scene.texts]
    residuals = []
    hook = net.control_model.register_forward_hook(lambda module, args, output: residuals.append(output["middle"][0]))
    plain = scene.draw(texts=texts)
    first_alone = residuals[0]
    residuals.clear()
    found = scene.draw(CrossFrameAttention().crossing(scene.model), texts=texts)
    hook.remove()
    frames = first_alone.unflatten(0, (-1, 3)), residuals[0].unflatten(0, (-1, 3))
    torch.testing.assert_close(frames[1][:, 0], frames[0][:, 0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(frames[1][:, 1:], frames[0][:, 1:], atol=1e-3)
    assert not torch.allclose(found[1], plain[1], atol=1e-3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.control_model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_stock_model_is_bitwise_the_same_afterwards(scene, error):
    plain = scene.draw()

    def stop(step, *_):
        raise error

    model = CrossFrameAttention(share_masks=True).crossing(scene.model)
    scene.draw(model)
    with pytest.raises(error):
        scene.draw(model, callback=stop)
    broken = next(iter(self_attentions(scene.model.model.diffusion_model)))
    hook = broken.register_forward_pre_hook(stop)
    with pytest.raises(error):
        scene.draw(model)
    hook.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in scene.layers())
    assert torch.equal(scene.draw(), plain)


def test_models_without_a_unet_are_refused():
    with pytest.raises(NoCrossFrameAttention, match="works in U-Nets"):
        CrossFrameAttention().crossing(load(TINY["Z-Image"]))


def test_a_compiled_model_is_refused(scene):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = scene.model.clone()
    set_torch_compile_wrapper(model, backend="eager")
    with pytest.raises(NoCrossFrameAttention, match="without TorchCompileModel"):
        scene.draw(CrossFrameAttention().crossing(model))


# Masks ---------------------------------------------------------------------------------------------------------------


def test_shared_masks_are_those_of_the_first_frame_of_each_branch(toy_structure):
    source = GeneratorMasks(make_generator(toy_structure, lively=True))
    block = toy_structure.blocks[0]
    stream = torch.Generator().manual_seed(1)
    features = torch.randn(6, block.channels, 4, 4, generator=stream)
    t_emb = torch.randn(6, toy_structure.embedding, generator=stream)
    layer = block.layers[0]
    weight = torch.zeros(layer.out_features, layer.in_features)

    def masks(of, rows):
        call = Call(rows=len(rows), chunks=(Chunk(POSITIVE), Chunk(NEGATIVE, "negative.0")))
        mask = of.begin(call)
        call.enter(block.name, features[rows], t_emb[rows])
        return mask(layer.name, weight)

    own, shared = masks(source, list(range(6))), masks(FirstFrameMasks(source), list(range(6)))
    assert len({bytes(each.numpy().tobytes()) for each in own}) > 2
    assert torch.equal(shared, masks(source, [0, 3]).repeat_interleave(3, 0))


def test_a_generators_masks_are_shared_where_told(scene, toy_structure):
    masked = attach(scene.model, GeneratorMasks(make_generator(toy_structure, lively=True)), 1.0, 0.0, 1.0)
    own, shared = (scene.draw(CrossFrameAttention(share_masks=share).crossing(masked)) for share in (False, True))
    torch.testing.assert_close(shared[0], own[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(shared[1:], own[1:], atol=1e-3)
    assert math.isfinite(float(shared.sum()))
