"""Where the weights of generators and rewards lie: beside a model, on scarce or dynamic memory, on several devices."""

import contextlib

import pytest
import torch

from maskunet_core.seam.attach import OPTION

CARD = torch.device("meta")
"""Plays a graphics card: what was moved there says so, and meets nothing that lies elsewhere."""


@pytest.fixture
def management(monkeypatch):
    """The host's memory management on a machine with a card. `management.free` bytes are free there."""
    import comfy.model_management as management

    def get_free_memory(dev=None, torch_free_too=False):
        return (management.free, management.free) if torch_free_too else management.free

    monkeypatch.setattr(management, "free", 1 << 40, raising=False)
    monkeypatch.setattr(management, "get_free_memory", get_free_memory)
    monkeypatch.setattr(management, "get_torch_device", lambda: CARD)
    monkeypatch.setattr(management, "soft_empty_cache", lambda *_: None)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(management, "MIN_WEIGHT_MEMORY_RATIO", 0.0)
    monkeypatch.setattr(management, "current_loaded_models", [])
    return management


class Pages:
    """In the place of the library that keeps pages of weights on a card. evicted: bytes that the host asked back."""

    evicted = 0

    def __init__(self, size, index):
        self.size = 0

    def prioritize(self): ...

    def alloc(self, size):
        self.size += size
        return self, 0, size

    def loaded_size(self):
        return self.size

    def free_memory(self, size):
        Pages.evicted += size
        return 0


class HostBuffer:
    size = 0

    def __init__(self, *_): ...


@pytest.fixture
def dynamic(management, monkeypatch):
    """The same where the host streams weights: its default on NVIDIA cards."""
    import comfy.memory_management
    import comfy.model_patcher
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar

    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", Pages)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbars_analyze", lambda *_: 0)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", HostBuffer)
    monkeypatch.setattr(Pages, "evicted", 0)
    return management


@pytest.fixture
def either(request):
    """The two kinds of memory management."""
    return request.getfixturevalue(request.param)


BOTH = pytest.mark.parametrize("either", ["management", "dynamic"], indirect=True)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


@pytest.fixture
def loaded(extension):
    """A generator as MaskUNet Loader gives it."""
    with torch.inference_mode():
        return extension("generator").MaskUNetLoader.execute("toy_shapes.safetensors").result[0]


@pytest.fixture
def reward(extension):
    rewards = extension("rewards")
    with torch.inference_mode():
        return rewards.MaskUNetRewardLoader.execute(rewards.TOY_REWARD, "auto", False).result[0]


def tensors(module):
    return dict([*module.named_parameters(), *module.named_buffers()])


def devices(module):
    return {tensor.device.type for tensor in tensors(module).values()}


@BOTH
def test_a_generator_lies_on_one_device_where_memory_is_scarce(either, loaded):
    copies, patcher = loaded.in_dtype(torch.float16)
    either.free = either.minimum_inference_memory() + patcher.model_size() // 2
    with torch.inference_mode():
        either.load_models_gpu([patcher])
    assert devices(patcher.model) == {"meta"}
    assert patcher.loaded_size() >= patcher.model_size()
    for block in copies.structure.blocks:
        inputs = torch.zeros(2, block.channels, 8, 8, device=CARD), torch.zeros(2, copies.structure.embedding)
        for layer, code in copies.condition(block, *inputs).items():
            assert copies.layer_logits(layer, code).above(0.0).device == CARD


def test_the_host_takes_a_generator_off_the_card_as_a_whole(dynamic, loaded):
    _, patcher = loaded.in_dtype(torch.float16)
    with torch.inference_mode():
        dynamic.load_models_gpu([patcher])
        dynamic.free = 0
        dynamic.free_memory(1000, CARD)
    assert devices(patcher.model) == {"cpu"}
    assert patcher.loaded_size() == 0


def test_the_host_cannot_take_a_part_of_a_generator_off_the_card(management, loaded):
    _, patcher = loaded.in_dtype(torch.float16)
    with torch.inference_mode():
        management.load_models_gpu([patcher])
        assert patcher.partially_unload(torch.device("cpu"), 1000) == 0
    assert devices(patcher.model) == {"meta"}


@BOTH
@DTYPE
def test_the_file_stays_as_it_was_read(either, loaded, dtype):
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in tensors(loaded.file.generator).items()}
    with torch.inference_mode():
        for used in (dtype, torch.bfloat16):
            _, patcher = loaded.in_dtype(used)
            either.load_models_gpu([patcher])
    for name, tensor in tensors(loaded.file.generator).items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


@DTYPE
def test_packed_logits_lie_in_memory_once_after_the_host_unloaded_them(dynamic, loaded, dtype):
    _, patcher = loaded.in_dtype(dtype)
    with torch.inference_mode():
        dynamic.load_models_gpu([patcher])
        assert devices(patcher.model) == {"meta"}
        patcher.detach()
    own, packed = tensors(loaded.file.generator), 0
    for name, tensor in tensors(patcher.model).items():
        if tensor.dtype == own[name].dtype:
            assert tensor.data_ptr() == own[name].data_ptr()
            packed += name.endswith(".packed")
    assert packed == 32


def test_packed_logits_lie_in_memory_once_after_they_came_back_from_a_card(loaded):
    """A card of the older kind of memory management, which copies weights back when it unloads them."""
    _, patcher = loaded.in_dtype(torch.float16)
    own = tensors(loaded.file.generator)
    for owner in list(patcher.model.modules()):
        for name, tensor in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, tensor.clone())
    assert not {own[name].data_ptr() for name in own} & {t.data_ptr() for t in tensors(patcher.model).values()}
    with torch.inference_mode():
        patcher.detach()
    for name, tensor in tensors(patcher.model).items():
        if name.endswith(".packed"):
            assert tensor.data_ptr() == own[name].data_ptr()


@BOTH
@DTYPE
def test_weights_that_were_loaded_in_inference_mode_can_be_unloaded_outside_of_it(either, loaded, dtype):
    """As the host does when a person asks it to free memory."""
    _, patcher = loaded.in_dtype(dtype)
    with torch.inference_mode():
        either.load_models_gpu([patcher])
    if not patcher.is_dynamic():
        # Nothing can come back from the device that plays the card.
        patcher.model.to_empty(device="cpu")
    patcher.detach()
    assert devices(patcher.model) == {"cpu"}
    assert not any(t.is_inference() for m in (patcher.model, loaded.file.generator) for t in tensors(m).values())


def test_loading_a_generator_or_a_reward_takes_nothing_from_models_that_stream(dynamic, loaded, reward):
    import comfy.model_patcher
    import comfy.ops

    streaming = torch.nn.Sequential(comfy.ops.manual_cast.Linear(512, 512))
    streaming[0].weight = torch.nn.Parameter(torch.zeros(512, 512), requires_grad=False)
    other = comfy.model_patcher.CoreModelPatcher(streaming, CARD, torch.device("cpu"))
    with torch.inference_mode():
        dynamic.load_models_gpu([other])
        assert other.loaded_size() > 0
        dynamic.free = 0
        for patcher in (loaded.in_dtype(torch.float16)[1], *reward.patchers()):
            dynamic.load_models_gpu([patcher])
            assert devices(patcher.model) == {"meta"}
    assert Pages.evicted == 0


@BOTH
def test_weights_of_a_reward_are_ordinary_tensors_that_stay_where_they_are(either, reward):
    (patcher,) = reward.patchers()
    with torch.inference_mode():
        either.load_models_gpu([patcher])
        first = tensors(patcher.model)
        either.load_models_gpu([patcher])
        second = tensors(patcher.model)
    assert devices(patcher.model) == {"meta"}
    assert not any(tensor.is_inference() for tensor in first.values())
    assert all(second[name] is tensor for name, tensor in first.items())


def test_a_reward_gives_gradients_after_it_went_to_and_fro_in_inference_mode(dynamic, reward, monkeypatch):
    """On a card that holds values, which the host takes for another device than the CPU."""
    from maskunet_core.rewards.reward import value_and_gradient

    card = torch.device("cpu", 0)
    (patcher,) = reward.patchers()
    patcher.load_device = card
    patcher.register_load_device(card)
    with torch.inference_mode():
        for _ in range(2):
            dynamic.load_models_gpu([patcher])
            images = torch.rand(1, 3, 64, 64)
            _, gradient = value_and_gradient(reward.reward.bind("a red circle"), images)
            assert gradient.abs().sum() > 0
            patcher.detach()


@pytest.fixture
def masked(extension, loaded):
    """(stock MODEL, MODEL with MaskUNet Apply, CLIP)"""
    with torch.inference_mode():
        model, clip, _ = extension("toy").MaskUNetToyModel.execute().result
        masked = extension("generator").MaskUNetApply.execute(model, loaded, 1.0, 0.0, 1.0, False, 0).result[0]
    return model, masked, clip


def sampled(model, clip):
    import comfy.sample

    texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red circle", "")]
    latent = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 5)
    with torch.inference_mode():
        return comfy.sample.sample(model, noise, 3, 5.0, "euler", "normal", *texts, latent, disable_pbar=True, seed=5)


def test_a_masked_model_can_be_cloned_for_another_device(masked):
    """As Select Model Device and MultiGPU CFG Split do."""
    _, here, _ = masked
    with torch.inference_mode():
        there = here.deepclone_multigpu(new_load_device=CARD)
        (first,), (second,) = (model.get_additional_models_with_key(OPTION) for model in (here, there))
        assert (first.load_device.type, second.load_device) == ("cpu", CARD)
        assert second.model is not first.model
        second.partially_load(CARD, 1 << 40)
    assert (devices(first.model), devices(second.model)) == ({"cpu"}, {"meta"})
    (attachment,) = there.model_options["transformer_options"][OPTION]
    assert attachment.source.generator.on(CARD) is second.model
    assert attachment.source.generator.on(torch.device("cpu")) is first.model


def test_a_clone_for_another_device_masks_as_the_model_does(masked):
    stock, here, clip = masked
    expected = sampled(here, clip)
    assert not torch.equal(expected, sampled(stock, clip))
    there = here.deepclone_multigpu(new_load_device=torch.device("cpu", 0))
    assert torch.equal(sampled(there, clip), expected)


def test_two_devices_share_the_work_of_a_masked_model(masked, monkeypatch):
    import comfy.model_management as management
    import comfy.multigpu

    _, here, clip = masked
    expected = sampled(here, clip)
    pair = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(management, "get_all_torch_devices", lambda exclude_current=False: pair)
    monkeypatch.setattr(management, "set_torch_device", lambda device: None)
    used = []
    with torch.inference_mode():
        split = comfy.multigpu.create_multigpu_deepclones(here, 2)
    (other,) = split.get_additional_models_with_key("multigpu")
    with contextlib.ExitStack() as stack:
        handle = other.model.diffusion_model.register_forward_pre_hook(lambda *_: used.append(other))
        stack.callback(handle.remove)
        drawn = sampled(split, clip)
    assert used
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


def test_a_file_that_was_written_over_is_read_again(extension, tmp_path, monkeypatch):
    import os

    import folder_paths

    path = tmp_path / "one.safetensors"
    path.write_bytes(b"12")
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda *_: str(path))
    stamp = extension("generator").MaskUNetLoader.fingerprint_inputs
    first = stamp("one.safetensors")
    assert stamp("one.safetensors") == first
    times = path.stat()
    path.write_bytes(b"123")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert stamp("one.safetensors") != first
