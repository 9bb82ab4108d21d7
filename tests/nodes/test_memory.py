"""The nodes where weights are streamed in, evicted, or moved away during a run: the same masks, the same pictures."""

import gc
from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import comfy.sd
import pytest
import torch

from maskunet_core.files import checkpoint
from tests.builders import make_generator
from tests.host.memory import CARD, card, dynamic_vram, run_as_executor, shrinking_memory, streamed
from tests.nodes.reward_graphs import PROMPT, SAMPLING
from tests.tiny_models import CONTEXT, QUANTISED, controlnet, kl_vae, lora, taesd_vae, write_unet

SAMPLED = SAMPLING | {"steps": 3}
SEARCH = {"preset": "custom", "iterations": 2, "start_percent": 0.4, "lr": 0.1, "candidates": 2}
SEARCH |= {"candidate_percent": 0.5}
HOSTS_OWN = ("_v", "_pin", "comfy_", "prev_comfy_", "weight_", "bias_", "seed_key")
"""Beginnings of attributes that the host itself sets on layers when it loads a model."""


class Scene:
    """Models, conditioning and a reward as the executor makes them, and the nodes that use them.

    Made where the host's memory already is as a test wants it.
    """

    def __init__(self, extension, kind: str, files=None):
        self.extension = extension
        self.sampler = extension("reward_sampler").MaskUNetRewardSampler.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        with torch.inference_mode():
            self.model, clip, vae = extension("toy").MaskUNetToyModel.execute().result
            self.texts = {
                name: clip.encode_from_tokens_scheduled(clip.tokenize(text))
                for name, text in [("positive", PROMPT), ("negative", "")]
            }
            rewards = extension("rewards")
            self.reward = rewards.MaskUNetRewardLoader.execute(rewards.TOY_REWARD, "auto", False).result[0]
            self.inputs = {"vae": vae}
            self.modules = [self.model.model]
            getattr(self, f"_{kind}")(files)

    def _toy(self, files):
        pass

    def _kl(self, files):
        self.inputs |= {"vae": kl_vae(), "branches": "positive"}
        self.modules.append(self.inputs["vae"].first_stage_model)

    def _taesd(self, files):
        self.inputs |= {"vae": kl_vae(), "gradient_vae": taesd_vae()}
        self.modules.append(self.inputs["gradient_vae"].first_stage_model)

    def _control(self, files):
        self.inputs |= {"vae": kl_vae()}
        net = controlnet(self.model, comfy.model_management.get_torch_device())
        self.modules.append(net.control_model)
        self.texts = {
            name: [[text, {**more, "control": net, "control_apply_to_uncond": True}] for text, more in conditioning]
            for name, conditioning in self.texts.items()
        }

    def _lora(self, files):
        self.model = comfy.sd.load_lora_for_models(self.model, None, lora(self.model), 1.0, 0.0)[0]

    def _bypass(self, files):
        self.model = comfy.sd.load_bypass_lora_for_models(self.model, None, lora(self.model), 1.0, 0.0)[0]

    def _latent(self, files):
        self.inputs |= {"latent_lr": 0.05}

    def _unet(self, path):
        self.model = comfy.sd.load_diffusion_model(str(path))
        self.inputs |= {"vae": kl_vae(), "branches": "positive"}
        self.modules = [self.model.model]
        stream = torch.Generator().manual_seed(1)
        self.texts = {name: [[torch.randn(1, 7, CONTEXT, generator=stream), {}]] for name in ("positive", "negative")}

    def search(self, batch=1, **changes):
        """(latents, MASKUNET_MASKS, curve)"""
        inputs = {"model": self.model, "reward": self.reward, "prompt": PROMPT, "masks": True, **self.texts}
        inputs |= {"latent_image": {"samples": torch.zeros(batch, 4, 8, 8)}, **SAMPLED, **SEARCH}
        return run_as_executor(self.sampler.execute, **inputs | self.inputs | changes).result

    def stock(self, model=None, batch=1):
        """What a stock KSampler draws."""
        return run_as_executor(self._stock, model or self.model, batch)

    def _stock(self, model, batch):
        empty, options = torch.zeros(batch, 4, 8, 8), dict(SAMPLED)
        settings = [options.pop(name) for name in ("steps", "cfg", "sampler_name", "scheduler")]
        start = comfy.sample.prepare_noise(empty, options["seed"])
        texts = (self.texts["positive"], self.texts["negative"])
        return comfy.sample.sample(model, start, *settings, *texts, empty, disable_pbar=True, **options)

    def masked(self, generator_file):
        """(what MaskUNet Apply draws, what the replay of its recorded masks draws)"""
        node = self.extension
        loaded = node("generator").LoadedGenerator(checkpoint.load(generator_file))
        with torch.inference_mode():
            masked = node("generator").MaskUNetApply.execute(self.model, loaded, 1.0, 0.0, 1.0, False, 0).result[0]
            recording = node("record_masks").MaskUNetRecordMasks.execute(masked).result[0]
            samples = self.stock(recording)
            masks = node("record_masks").MaskUNetMasksOfRun.execute({"samples": samples}).result[0]
            replaying = node("masks").MaskUNetApplyMasks.execute(self.model, masks, 1.0).result[0]
        return samples, self.stock(replaying)

    def state(self):
        """(weights by name, attributes and hooks of each layer) of a model that lies at rest."""
        with torch.inference_mode():
            comfy.model_management.unload_all_models()
        weights, marks = [], []
        for module in self.modules:
            weights.append({name: _bytes(value) for name, value in module.state_dict().items()})
            for name, part in module.named_modules():
                own = sorted(key for key in part.__dict__ if not key.startswith(HOSTS_OWN))
                hooks = len(part._forward_pre_hooks), len(part._forward_hooks)
                functions = [*getattr(part, "weight_function", ()), *getattr(part, "bias_function", ())]
                foreign = [function for function in functions if not getattr(function, "is_lowvram_patch", False)]
                marks.append((name, type(part), own, hooks, foreign, "forward_comfy_cast_weights" in part.__dict__))
        return weights, marks


def _bytes(value):
    if type(value).__name__ == "QuantizedTensor":
        return [_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0]]
    return value.detach().to("cpu", copy=True).contiguous().flatten().view(torch.uint8)


def same_bytes(one, other) -> bool:
    if isinstance(one, list):
        return all(same_bytes(*pair) for pair in zip(one, other, strict=True))
    return torch.equal(one, other)


def same_state(one, other) -> bool:
    weights = all(
        first.keys() == second.keys() and all(same_bytes(first[name], second[name]) for name in first)
        for first, second in zip(one[0], other[0], strict=True)
    )
    return weights and one[1] == other[1]


def require_same(found, plain) -> None:
    """Latents, masks, history (drawn into the curve) and scores, bit for bit."""
    (latents, masks, curve), (plain_latents, plain_masks, plain_curve) = found, plain
    assert torch.isfinite(latents["samples"]).all()
    assert masks.record["scores"] == plain_masks.record["scores"]
    assert masks.steps.keys() == plain_masks.steps.keys()
    for sigma, layers in plain_masks.steps.items():
        assert masks.steps[sigma].keys() == layers.keys()
        assert all(torch.equal(masks.steps[sigma][name], packed) for name, packed in layers.items())
    assert torch.equal(curve, plain_curve)
    assert torch.equal(latents["samples"], plain_latents["samples"])


def unload(quietly: bool = False) -> None:
    """As the host does in a later prompt."""
    with torch.inference_mode():
        comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def files(tmp_path_factory, extension):
    folder = tmp_path_factory.mktemp("units")
    unets = {kind: write_unet(folder / f"{kind}.safetensors", kind) for kind in ("fp16", *QUANTISED)}
    return unets


@pytest.fixture(scope="module", params=["toy", "kl", "taesd", "control", "lora", "bypass", "latent"])
def case(request, extension):
    """A kind of scene, and what a host with room for everything makes of it."""
    plain = Scene(extension, request.param)
    results = SimpleNamespace(kind=request.param, stock=plain.stock(), found=plain.search(), batch=plain.search(2))
    assert min(results.found[1].keep_ratio()) < 1.0
    yield results
    unload()


def test_a_search_finds_the_same_with_room_for_everything(extension, case):
    """What the others are compared with comes out the same again."""
    scene = Scene(extension, case.kind)
    require_same(scene.search(), case.found)
    assert torch.equal(scene.stock(), case.stock)


def test_a_search_finds_the_same_where_weights_do_not_stay(extension, case, scarce):
    scene = Scene(extension, case.kind)
    before = scene.state()
    assert torch.equal(scene.stock(), case.stock)
    require_same(scene.search(), case.found)
    require_same(scene.search(2), case.batch)
    assert torch.equal(scene.stock(), case.stock)
    assert same_state(scene.state(), before)


@pytest.fixture(scope="module", params=["fp16", "fp8"])
def unet(request, extension, files):
    """A U-Net of SD 1.5's kind from the stock loader, and what a host with room for everything makes of it."""
    plain = Scene(extension, "unet", files[request.param])
    changes = {"iterations": 1, "start_percent": 1.0}
    found = plain.search(**changes)
    results = SimpleNamespace(path=files[request.param], stock=plain.stock(), found=found, changes=changes)
    assert min(results.found[1].keep_ratio()) < 1.0
    yield results
    unload()


def test_a_loaded_file_is_searched_the_same_where_weights_do_not_stay(extension, unet, scarce):
    scene = Scene(extension, "unet", unet.path)
    before = scene.state()
    require_same(scene.search(**unet.changes), unet.found)
    assert torch.equal(scene.stock(), unet.stock)
    assert same_state(scene.state(), before)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("memory", [card, streamed, dynamic_vram])
def test_a_quantised_model_can_be_unloaded_after_a_search(extension, files, kind, memory):
    with memory():
        scene = Scene(extension, "unet", files[kind])
        before = scene.state()
        scene.search(steps=1, iterations=1, start_percent=0.0, candidates=1)
        unload()
        assert same_state(scene.state(), before)


@pytest.mark.parametrize("loads", [1, 2, 3, 4])
def test_room_that_goes_at_any_moment_of_a_run_changes_nothing(extension, toy_case, loads):
    with shrinking_memory(plenty_for=loads) as memory:
        scene = Scene(extension, "toy")
        require_same(scene.search(), toy_case)
        assert memory.free < 1 << 30, "the room never went"


@pytest.fixture(scope="module")
def toy_case(extension):
    return Scene(extension, "toy").search()


@pytest.mark.parametrize("kind", ["toy", "lora"])
@pytest.mark.parametrize("memory", [card, dynamic_vram])
def test_models_that_are_moved_while_the_reward_looks_change_nothing(extension, kind, memory, monkeypatch):
    """As another node's model may do that is loaded in the middle of a step."""
    plain = Scene(extension, kind).search(candidates=1)
    with memory() as room:
        scene = Scene(extension, kind)
        bind, moved = scene.reward.reward.bind, []

        def moving(prompt):
            bound = bind(prompt)
            call = type(bound).__call__

            class Moving(type(bound)):
                def __call__(self, images):
                    size = scene.model.loaded_size()
                    comfy.model_management.free_memory(room.free + (4 << 20), CARD)
                    moved.append(size - scene.model.loaded_size())
                    return call(self, images)

            bound.__class__ = Moving
            return bound

        monkeypatch.setattr(scene.reward.reward, "bind", moving)
        require_same(scene.search(candidates=1), plain)
        assert max(moved) > 0


@pytest.fixture(scope="module")
def generator_file(tmp_path_factory, toy_structure):
    path = tmp_path_factory.mktemp("generators") / "lively.safetensors"
    checkpoint.save(path, make_generator(toy_structure, lively=True), "decoder attention", {})
    return path


@pytest.fixture(scope="module", params=["toy", "lora"])
def masked(request, extension, generator_file):
    scene = Scene(extension, request.param)
    drawn, replayed = scene.masked(generator_file)
    assert torch.equal(drawn, replayed)
    assert not torch.equal(drawn, scene.stock())
    return SimpleNamespace(kind=request.param, drawn=drawn)


def test_a_generator_draws_the_same_and_is_replayed_where_weights_do_not_stay(
    extension, masked, generator_file, scarce
):
    scene = Scene(extension, masked.kind)
    before = scene.state()
    for _ in range(2):
        drawn, replayed = scene.masked(generator_file)
        assert torch.equal(drawn, masked.drawn)
        assert torch.equal(replayed, masked.drawn)
    assert same_state(scene.state(), before)


# What a run leaves behind -------------------------------------------------------------------------------------------


def tensors_alive() -> dict[int, torch.Tensor]:
    return {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}


class Failure(Exception):
    pass


def _fail_with(error):
    def fail(scene, monkeypatch):
        """The third time that the reward looks."""
        looks, judge = [], type(scene.reward.reward.bind(PROMPT))
        own = judge.__call__

        def look(self, images):
            looks.append(1)
            if len(looks) == 4:
                raise error
            return own(self, images)

        monkeypatch.setattr(judge, "__call__", look)

    return fail


def _interrupted(scene, monkeypatch):
    """By the person at the graph, in the middle of a U-Net's call that the search makes."""
    _fail_with(comfy.model_management.InterruptProcessingException())(scene, monkeypatch)


def _out_of_memory(scene, monkeypatch):
    """In a layer of the decoder, in the first call that has a gradient."""
    unet = scene.model.model.diffusion_model
    own = torch.nn.functional.silu

    def silu(*arguments, **options):
        result = own(*arguments, **options)
        if result.requires_grad and unet is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return result

    monkeypatch.setattr(torch.nn.functional, "silu", silu)


ENDS = {
    "success": None,
    "an error of the reward": _fail_with(Failure("told to fail")),
    "an interrupt": _interrupted,
    "out of memory": _out_of_memory,
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("search", [{"candidates": 1}, {"candidates": 2, "latent_lr": 0.05}])
def test_a_run_leaves_no_tensor_behind_without_the_garbage_collector(extension, end, search, monkeypatch):
    scene = Scene(extension, "kl")
    scene.search(**search)  # what is made once and kept: models, optimisers' modules, the plot
    gc.collect()
    gc.disable()
    try:
        before = tensors_alive()
        with monkeypatch.context() as patch:
            if ENDS[end] is None:
                results = scene.search(**search)
                del results
            else:
                ENDS[end](scene, patch)
                failed = None
                try:
                    scene.search(**search)
                except BaseException as error:
                    failed = type(error)
                    # The executor keeps the message alone.
                    del error
                assert failed is not None
        left = [thing for key, thing in tensors_alive().items() if before.get(key) is not thing]
        owners = {id(value) for module in scene.modules for value in [*module.parameters(), *module.buffers()]}
        left = [tuple(thing.shape) for thing in left if id(thing) not in owners]
        assert not left
    finally:
        gc.enable()


@pytest.mark.parametrize("end", [end for end in ENDS if ENDS[end] is not None])
def test_a_run_that_ended_early_leaves_models_as_they_were(extension, end, scarce, monkeypatch):
    scene = Scene(extension, "kl")
    before, plain = scene.state(), scene.stock()
    with monkeypatch.context() as patch:
        ENDS[end](scene, patch)
        with pytest.raises(BaseException):  # noqa: B017, PT011 - each kind of end has its own
            scene.search()
    assert torch.equal(scene.stock(), plain)
    assert same_state(scene.state(), before)
