"""The nodes where weights are streamed in, evicted, or moved away during a run: the same masks, the same pictures."""

import gc
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch

from maskunet_core.files import checkpoint
from tests.builders import make_generator
from tests.host.memory import CARD, card, dynamic_vram, shrinking_memory, streamed, tensors_alive
from tests.nodes.reward_graphs import PROMPT
from tests.nodes.scene import Scene, require_same, same_state
from tests.tiny_models import QUANTISED, write_unet


def unload() -> None:
    """As the host does in a later prompt."""
    with torch.inference_mode():
        comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def files(tmp_path_factory, extension):
    folder = tmp_path_factory.mktemp("units")
    unets = {kind: write_unet(folder / f"{kind}.safetensors", kind) for kind in ("fp16", *QUANTISED)}
    return unets


BATCHES = ("toy", "control")
"""Kinds of scene that run a second time, with two images."""


@pytest.fixture(scope="module", params=["toy", "kl", "taesd", "control", "lora", "bypass", "latent"])
def case(request, extension):
    """A kind of scene, and what a host with room for everything makes of it."""
    plain = Scene(extension, request.param)
    results = SimpleNamespace(kind=request.param, stock=plain.stock(), found=plain.search())
    results.batch = plain.search(2) if request.param in BATCHES else None
    assert min(results.found[1].keep_ratio()) < 1.0
    yield results
    unload()


def test_a_search_finds_the_same_with_room_for_everything(extension, case):
    """What the others are compared with comes out the same again."""
    scene = Scene(extension, case.kind)
    require_same(scene.search(), case.found)
    assert torch.equal(scene.stock(), case.stock)


def test_a_search_finds_the_same_on_every_card(extension, case, any_card):
    scene = Scene(extension, case.kind)
    assert torch.equal(scene.stock(), case.stock)
    # The host's own LoRAs that bypass layers leave attributes behind.
    before = scene.state()
    require_same(scene.search(), case.found)
    if case.batch is not None:
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


def test_a_loaded_file_is_searched_the_same_on_every_card(extension, unet, any_card):
    scene = Scene(extension, "unet", unet.path)
    before = scene.state()
    require_same(scene.search(**unet.changes), unet.found)
    assert torch.equal(scene.stock(), unet.stock)
    assert same_state(scene.state(), before)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("memory", [card, streamed, dynamic_vram], ids=["roomy", "streamed", "dynamic"])
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
@pytest.mark.parametrize("memory", [card, dynamic_vram], ids=["roomy", "dynamic"])
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
                    # A host that takes away the whole model in the middle of a run draws on without its LoRAs.
                    if len(moved) == 2:
                        return call(self, images)
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


def test_a_generator_draws_the_same_and_is_replayed_on_every_card(extension, masked, generator_file, any_card):
    scene = Scene(extension, masked.kind)
    before = scene.state()
    for _ in range(2):
        drawn, replayed = scene.masked(generator_file)
        assert torch.equal(drawn, masked.drawn)
        assert torch.equal(replayed, masked.drawn)
    assert same_state(scene.state(), before)


# What a run leaves behind -------------------------------------------------------------------------------------------


class Failure(Exception):
    pass


class Ending:
    """Ends a run in its middle. reached: whether it came to that."""

    def __init__(self, scene, monkeypatch):
        self.scene, self.reached = scene, False
        self.install(monkeypatch)

    def install(self, monkeypatch) -> None:
        """Here: the fourth time that the reward looks."""
        looks, judge = [], type(self.scene.reward.reward.bind(PROMPT))
        own = judge.__call__

        def look(bound, images):
            looks.append(1)
            if len(looks) == 4:
                self.reached = True
                self.happen()
            return own(bound, images)

        monkeypatch.setattr(judge, "__call__", look)

    def happen(self) -> None: ...


class FailingReward(Ending):
    def happen(self) -> None:
        raise Failure("told to fail")


class Interrupt(Ending):
    """By the person at the graph: the host looks for it in every layer of the next call."""

    def happen(self) -> None:
        comfy.model_management.interrupt_current_processing()


class OutOfMemory(Ending):
    """In the tenth layer of the U-Net or the decoder that has a gradient."""

    def install(self, monkeypatch) -> None:
        own, calls = torch.nn.functional.silu, []

        def silu(*arguments, **options):
            result = own(*arguments, **options)
            if result.requires_grad:
                calls.append(1)
                if len(calls) == 10:
                    self.reached = True
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return result

        monkeypatch.setattr(torch.nn.functional, "silu", silu)


ENDS = {
    "success": None,
    "an error of the reward": FailingReward,
    "an interrupt": Interrupt,
    "out of memory": OutOfMemory,
}


def _error_of(scene, search) -> type | None:
    """What ended a run; the executor too keeps no more of it than words."""
    try:
        scene.search(**search)
    except BaseException as error:
        return type(error)
    return None


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
                ending = ENDS[end](scene, patch)
                assert _error_of(scene, search) is not None
                assert ending.reached
        left = [thing for key, thing in tensors_alive().items() if before.get(key) is not thing]
        owners = {id(value) for module in scene.modules for value in [*module.parameters(), *module.buffers()]}
        left = [tuple(thing.shape) for thing in left if id(thing) not in owners]
        assert not left
    finally:
        gc.enable()


@pytest.mark.parametrize("end", [end for end in ENDS if ENDS[end] is not None])
def test_a_run_that_ended_early_leaves_models_as_they_were(extension, end, any_card, monkeypatch):
    scene = Scene(extension, "toy")
    before, plain = scene.state(), scene.stock()
    with monkeypatch.context() as patch:
        ending = ENDS[end](scene, patch)
        assert _error_of(scene, {"candidates": 1}) is not None
        assert ending.reached
    assert torch.equal(scene.stock(), plain)
    assert same_state(scene.state(), before)
