"""Masks on a real host model: the toy's U-Net in ComfyUI's own ModelPatcher, sampled by ComfyUI's own samplers."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskunet_core.errors import MaskUNetError
from maskunet_core.masks.call import Call
from maskunet_core.masks.sources import GeneratorMasks, RandomMasks, noise_generator
from maskunet_core.models.structure import NothingToMask, inspect_model
from maskunet_core.records.recorded import RecordedSource
from maskunet_core.records.recorder import masks_of_run, recording
from maskunet_core.seam.attach import attach, structure_of
from maskunet_core.seam.layers import masked, modules_of
from tests import device
from tests.builders import call_of, make_generator


class ConstantMasks:
    """Masks that a test chooses: `value(layer, weight)`."""

    def __init__(self, structure, value):
        self.structure = structure
        self.value = value

    def begin(self, call: Call):
        return self.value


def ones(layer, weight):
    return torch.ones_like(weight)


def context(clip, texts):
    return torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in texts])


def sample(model, clip, texts=("a red circle",), seeds=(1,), steps=4, cfg=5.0, sampler="euler"):
    """Latents of one prompt and seed each, in one batch."""
    import comfy.sample

    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        "normal",
        [[context(clip, texts), {}]],
        [[context(clip, [""]), {}]],
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )


def snapshot(model):
    """All weights, and every instance attribute and hook of every module of the diffusion model."""
    unet = model.model.diffusion_model
    weights = {key: value.clone() for key, value in unet.state_dict().items()}
    attributes = {name: sorted(module.__dict__) for name, module in unet.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in unet.named_modules()}
    return weights, attributes, hooks


def assert_untouched(model, before):
    weights, attributes, hooks = snapshot(model)
    assert attributes == before[1]
    assert hooks == before[2]
    assert all(torch.equal(weights[key], value) for key, value in before[0].items())


@pytest.fixture
def lively(toy_structure):
    return make_generator(toy_structure, lively=True)


def test_masks_change_the_picture(toy, lively):
    model, clip, _ = toy
    masked = attach(model, GeneratorMasks(lively), 1.0, 0.0, 1.0)
    assert (sample(masked, clip) - sample(model, clip)).abs().max() > 1e-3


def test_all_ones_equal_the_stock_model_bit_for_bit(toy, toy_structure):
    model, clip, _ = toy
    stock = sample(model, clip, texts=["a red circle", "a blue ring"], seeds=(1, 2))
    shared = ConstantMasks(toy_structure, ones)
    none = ConstantMasks(toy_structure, lambda layer, weight: None)
    untrained = GeneratorMasks(make_generator(toy_structure))
    for source in (shared, none, untrained):
        masked = attach(model, source, 1.0, 0.0, 1.0)
        assert torch.equal(sample(masked, clip, texts=["a red circle", "a blue ring"], seeds=(1, 2)), stock)


def test_inside_of_autocast_the_host_gives_weights_in_its_dtype(toy, toy_structure):
    """A weight that is stored in half precision is not widened for a layer whose input is wide, as after a norm."""
    seen = set()

    def alternate(layer, weight):
        seen.add(weight.dtype)
        return torch.arange(weight.numel()).view(weight.shape) % 2 == 0

    unet = toy[0].model.diffusion_model
    modules, layer = modules_of(unet), next(iter(toy_structure.layers))
    linear = modules[layer]
    x = torch.randn(2, 3, linear.in_features)
    with masked(modules, [(ConstantMasks(toy_structure, alternate), 1.0)]), torch.autocast("cpu", torch.bfloat16):
        found = linear(x)
    assert seen == {torch.bfloat16}
    weight = linear.weight.detach().to(torch.bfloat16)
    expected = torch.nn.functional.linear(x.to(torch.bfloat16), weight * alternate(layer, weight))
    if linear.bias is not None:
        expected = expected + linear.bias.detach().to(torch.bfloat16)
    torch.testing.assert_close(found, expected)


def test_one_source_may_keep_a_layer_that_another_masks(toy, toy_structure):
    model, clip, _ = toy
    none = ConstantMasks(toy_structure, lambda layer, weight: None)
    masked = attach(model, RandomMasks(toy_structure, 0.9, 1, per_step=False), 1.0, 0.0, 1.0)
    assert torch.equal(sample(attach(masked, none, 1.0, 0.0, 1.0), clip), sample(masked, clip))


def test_strength_zero_does_not_patch_at_all(toy, lively):
    model, clip, _ = toy
    masked = attach(model, GeneratorMasks(lively), 0.0, 0.0, 1.0)
    assert masked is not model
    assert masked.wrappers == model.wrappers
    assert "maskunet" not in masked.model_options.get("transformer_options", {})
    assert torch.equal(sample(masked, clip), sample(model, clip))


def test_patch_leaves_original_model_untouched(toy, lively):
    model, clip, _ = toy
    stock = sample(model, clip)
    before = snapshot(model)
    masked = attach(model, GeneratorMasks(lively), 1.0, 0.0, 1.0)
    sample(masked, clip)
    assert_untouched(model, before)
    assert torch.equal(sample(model, clip), stock)
    again = masked.clone()
    assert torch.equal(sample(again, clip), sample(masked, clip))


@pytest.mark.parametrize(
    "error", [RuntimeError("inside the U-Net"), torch.OutOfMemoryError("full"), KeyboardInterrupt()]
)
def test_an_exception_inside_the_unet_leaves_nothing_behind(toy, lively, error):
    model, clip, _ = toy
    stock = sample(model, clip)
    before = snapshot(model)
    masked = attach(model, GeneratorMasks(lively), 1.0, 0.0, 1.0)
    calls = []

    def fail_at_the_third(args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return args["h"], args["hsp"]

    def output_patch(h, hsp, options):
        return fail_at_the_third({"h": h, "hsp": hsp})

    failing = masked.clone()
    failing.set_model_output_block_patch(output_patch)
    with pytest.raises(type(error)):
        sample(failing, clip)
    assert_untouched(model, before)
    assert torch.equal(sample(model, clip), stock)


class Recorder:
    """Keeps the masks of one layer, call by call."""

    def __init__(self, layer):
        self.layer = layer
        self.masks = []

    def __call__(self, layer, mask):
        if layer == self.layer:
            self.masks.append(mask.clone())


@pytest.mark.parametrize("seed", [None, 5])
def test_a_sample_does_not_depend_on_who_else_is_in_the_batch(toy, toy_structure, lively, seed):
    """Float noise between batch sizes may carry single bits across the threshold, and the image with them a little."""
    model, clip, _ = toy
    texts = ["a red circle", "a blue ring", "a green star and a black cross", "a white square"]

    def run(texts, seeds):
        recorder = Recorder(list(toy_structure.layers)[-1])
        source = GeneratorMasks(lively, seed=seed, observe=recorder)
        return sample(attach(model, source, 1.0, 0.0, 1.0), clip, texts, seeds), recorder.masks

    together, masks = run(texts, (1, 2, 3, 4))
    for n, text in enumerate(texts):
        alone, own = run([text], (n + 1,))
        assert (together[n] - alone[0]).abs().max() < 0.02
        assert (together[n] - together[(n + 1) % 4]).abs().max() > 0.5
        # Rows of a call: the samples of one branch of CFG, then those of the other.
        flipped = [(mask[n::4] != single).float().mean() for mask, single in zip(masks, own)]
        assert len(flipped) == 4
        assert max(flipped) < 1e-3
        other = [(mask[(n + 1) % 4 :: 4] != single).float().mean() for mask, single in zip(masks, own)]
        assert min(other) > 10 * max(max(flipped), 1e-4)


def test_a_split_of_cond_and_uncond_gives_the_same_image(toy, lively, monkeypatch):
    import comfy.model_base

    model, clip, _ = toy
    masked = attach(model, GeneratorMasks(lively), 1.0, 0.0, 1.0)
    together = sample(masked, clip, seeds=(1,))
    batches = []
    apply_model = comfy.model_base.BaseModel.apply_model

    def counting(self, x, *args, **kwargs):
        batches.append(len(x))
        return apply_model(self, x, *args, **kwargs)

    monkeypatch.setattr(comfy.model_base.BaseModel, "apply_model", counting)
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *args, **kwargs: 1e15)
    split = sample(masked, clip, seeds=(1,))
    assert set(batches) == {1}
    torch.testing.assert_close(split, together, rtol=1e-3, atol=1e-3)


def test_two_sources_act_as_the_product_of_their_masks(toy, toy_structure):
    model, clip, _ = toy
    first, second = (RandomMasks(toy_structure, 0.9, seed, per_step=False) for seed in (1, 2))

    def product(layer, weight):
        masks = [source.begin(Call())(layer, weight) for source in (first, second)]
        return masks[0] & masks[1]

    expected = sample(attach(model, ConstantMasks(toy_structure, product), 1.0, 0.0, 1.0), clip)
    for order in ((first, second), (second, first)):
        stacked = attach(attach(model, order[0], 1.0, 0.0, 1.0), order[1], 1.0, 0.0, 1.0)
        assert torch.equal(sample(stacked, clip), expected)


def lora_file(structure, rank=2):
    """A LoRA on two masked layers and a convolution, in the kohya layout."""
    torch.manual_seed(3)
    tensors = {}
    layers = list(structure.layers.values())
    for layer in (layers[0], layers[-1]):
        key = "lora_unet_" + layer.name.replace(".", "_")
        tensors[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, rank) * 0.3
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, layer.in_features) * 0.3
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    return tensors


def test_lora_before_or_after_gives_the_same_bits(toy, toy_structure, lively):
    import comfy.sd

    model, clip, _ = toy

    def with_lora(patcher):
        return comfy.sd.load_lora_for_models(patcher, None, lora_file(toy_structure), 1.0, 0.0)[0]

    source = GeneratorMasks(lively)
    before = attach(with_lora(model), source, 1.0, 0.0, 1.0)
    after = with_lora(attach(model, source, 1.0, 0.0, 1.0))
    assert len(before.patches) == len(after.patches) == 2
    result = sample(before, clip)
    assert torch.equal(result, sample(after, clip))
    assert (result - sample(attach(model, source, 1.0, 0.0, 1.0), clip)).abs().max() > 1e-3


@pytest.mark.skipif(device.NAME != "cpu", reason="cards stream in their own ways: tests/gpu")
def test_a_model_that_is_streamed_in_gives_the_same_bits(toy, toy_structure, lively, streamed_in):
    """Its LoRA is added to each weight as that is used, so masks must see the weight as the layer gets it."""
    import comfy.sd

    model, clip, _ = toy
    with_lora = comfy.sd.load_lora_for_models(model, None, lora_file(toy_structure), 1.0, 0.0)[0]
    masked = attach(with_lora, GeneratorMasks(lively), 1.0, 0.0, 1.0)
    whole = sample(masked, clip)
    assert masked.loaded_size() == masked.model_size()
    with streamed_in():
        assert torch.equal(sample(masked, clip), whole)
        assert masked.loaded_size() < masked.model_size() / 10


def test_masks_act_inside_the_window_alone(toy, toy_structure):
    model, clip, _ = toy
    seen = []

    def recording(layer, weight):
        if layer == next(iter(toy_structure.layers)):
            seen.append(layer)
        return torch.ones_like(weight)

    windows = {(0.0, 1.0): 10, (0.0, 0.5): 5, (0.5, 1.0): 5, (1.0, 1.0): 0}
    for (start, end), expected in windows.items():
        seen.clear()
        sample(attach(model, ConstantMasks(toy_structure, recording), 1.0, start, end), clip, steps=10)
        assert len(seen) == expected, (start, end)


def test_a_window_in_the_wrong_order_gets_a_sentence(toy, toy_structure):
    with pytest.raises(MaskUNetError, match=r"start_percent \(0.8\) lies after end_percent \(0.2\)"):
        attach(toy[0], ConstantMasks(toy_structure, ones), 1.0, 0.8, 0.2)


def test_stochastic_masks_leave_the_random_stream_as_it_was(toy, toy_structure):
    """At start 30 everything is kept even when masks are drawn: nothing may change, ancestral noise included."""
    model, clip, _ = toy
    generator = make_generator(toy_structure, start=30.0)
    masked = attach(model, GeneratorMasks(generator, seed=7), 1.0, 0.0, 1.0)
    stock = sample(model, clip, sampler="euler_ancestral")
    assert torch.equal(sample(masked, clip, sampler="euler_ancestral"), stock)


def test_stochastic_masks_repeat_with_their_seed_and_differ_without(toy, lively):
    model, clip, _ = toy
    first, again, other = (
        sample(attach(model, GeneratorMasks(lively, seed=seed), 1.0, 0.0, 1.0), clip) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_masks_keep_their_share_and_change_per_step(toy_structure):
    layer = next(iter(toy_structure.layers))
    weight = torch.zeros(400, 400)
    masks = {}
    for per_step in (True, False):
        source = RandomMasks(toy_structure, 0.9, 3, per_step)
        masks[per_step] = [source.begin(call_of(sigma))(layer, weight) for sigma in (14.6, 1.0)]
        assert all(abs(mask.float().mean() - 0.9) < 0.01 for mask in masks[per_step])
    assert not torch.equal(*masks[True])
    assert torch.equal(*masks[False])


def test_weights_of_the_generator_go_through_the_host(toy, lively):
    import comfy.model_management
    import comfy.model_patcher

    model, _, _ = toy
    device = comfy.model_management.get_torch_device()
    weights = comfy.model_patcher.ModelPatcher(lively, load_device=device, offload_device=device)
    once = attach(model, GeneratorMasks(lively), 1.0, 0.0, 1.0, weights)
    twice = attach(once, GeneratorMasks(lively), 1.0, 0.0, 1.0, weights)
    assert [len(patcher.get_additional_models()) for patcher in (model, once, twice)] == [0, 1, 1]


@pytest.mark.parametrize("neighbour", ["hypertile", "freeu", "pag"])
def test_the_hosts_own_patches_work_beside_all_ones(toy, toy_structure, neighbour):
    model, clip, _ = toy
    patched = with_neighbour(model, neighbour)
    masked = attach(patched, ConstantMasks(toy_structure, ones), 1.0, 0.0, 1.0)
    result = sample(masked, clip)
    assert torch.equal(result, sample(patched, clip))
    if neighbour != "hypertile":  # a latent of 8x8 is one tile
        assert not torch.equal(result, sample(model, clip))


def with_neighbour(model, name):
    from comfy_extras.nodes_freelunch import FreeU_V2
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    if name == "hypertile":
        return HyperTile.execute(model, 32, 2, 0, False)[0]
    if name == "freeu":
        # FreeU acts on levels twice and four times as wide as the first; all of the toy's are of one width.
        config = model.model.model_config.unet_config
        with mock.patch.dict(config, model_channels=config["model_channels"] // 2):
            return FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)[0]
    return PerturbedAttentionGuidance.execute(model, 3.0)[0]


def test_a_mixed_precision_layer_is_masked(toy_structure):
    """fp8 storage: the weight that is masked is the one after the host's cast."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from maskunet_core.toy.model import UNET_CONFIG, read_weights

    unet = UNetModel(**UNET_CONFIG, device="cpu", operations=comfy.ops.manual_cast)
    unet.load_state_dict(read_weights("unet")[0])
    unet.requires_grad_(False)
    for name in toy_structure.layers:
        layer = unet.get_submodule(name)
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    torch.manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 128)

    def run(*sources):
        with torch.no_grad(), masked(modules_of(unet), sources):
            return unet(x, torch.tensor([10.0, 900.0]), context=text, transformer_options={})

    stock = run()
    assert torch.equal(run((ConstantMasks(toy_structure, ones), 1.0)), stock)
    assert not torch.equal(run((RandomMasks(toy_structure, 0.5, 0, False), 1.0)), stock)


def test_structure_of_a_model_that_is_no_unet():
    class Other(torch.nn.Module):
        pass

    with pytest.raises(NothingToMask):
        inspect_model(Other(), "decoder attention", "Other")


def test_structure_of_the_toy(toy):
    structure = structure_of(toy[0], "decoder attention")
    assert structure.family == "the MaskUNet toy model"
    assert structure.masked_weights == 524_288
    assert [block.name for block in structure.blocks] == ["up.0", "up.1"]


def test_every_sigma_has_a_noise_of_its_own():
    sigmas = torch.linspace(0.03, 14.6, 50).tolist()
    first = {torch.rand(1, generator=noise_generator(torch.device("cpu"), 1, 2, sigma)).item() for sigma in sigmas}
    assert len(first) == 50


class Waits(TorchDispatchMode):
    """Counts how often somebody waits for a number of the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten._local_scalar_dense
        return function(*args, **(kwargs or {}))


def test_masks_of_a_generator_wait_for_no_number_and_a_replay_for_one_in_a_step(toy, lively, monkeypatch):
    import comfy.model_base

    model, clip, _ = toy
    masks = masks_of_run(sample(recording(attach(model, GeneratorMasks(lively), 1.0, 0.0, 1.0)), clip))
    # Beyond the CPU equal bits are not looked for.
    monkeypatch.setattr("maskunet_core.masks.sources.shared_by_all_samples", lambda mask: mask)
    monkeypatch.setattr("maskunet_core.records.recorded.shared_by_all_samples", lambda mask: mask)
    apply_model, waits = comfy.model_base.BaseModel.apply_model, []

    def counted(self, *args, **kwargs):
        with Waits() as inside:
            result = apply_model(self, *args, **kwargs)
        waits.append(inside.count)
        return result

    def waited(patched):
        waits.clear()
        sample(patched, clip, steps=4)
        return list(waits)

    monkeypatch.setattr(comfy.model_base.BaseModel, "apply_model", counted)
    stock = waited(model)
    assert waited(attach(model, GeneratorMasks(lively), 1.0, 0.0, 1.0)) == stock
    replay = waited(attach(model, RecordedSource(masks), 1.0, 0.0, 1.0))
    assert all(more - plain <= 1 for more, plain in zip(replay, stock))


def test_a_schedule_that_is_set_behind_the_masks_moves_their_window(toy, lively):
    """As the host's nodes of that kind do, which cannot be imported beside this project's folder of the same name."""
    import comfy.model_sampling

    class Schedule(comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EPS):
        pass

    model, clip, _ = toy

    def shifted(patched):
        patched, schedule = patched.clone(), Schedule(model.model.model_config)
        schedule.set_parameters(0.1, 20.0, 1.0)
        patched.add_object_patch("model_sampling", schedule)
        return patched

    def masked(patched):
        return attach(patched, GeneratorMasks(lively), 1.0, 0.5, 1.0)

    assert torch.equal(sample(shifted(masked(model)), clip), sample(masked(shifted(model)), clip))
