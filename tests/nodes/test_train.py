"""MaskUNet Train as the host's executor runs it, on the toy model."""

import contextlib
import gc
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from maskunet_core.files import checkpoint
from maskunet_core.training.cost import Cost
from tests.host.memory import dynamic_vram, run_as_executor, streamed, tensors_alive
from tests.nodes.scene import Scene, same_state
from trainer.config_file import parse_config
from trainer.toy.world import render, sample_captioned
from trainer.train import start

STEPS = 4
INTERRUPT = comfy.model_management.InterruptProcessingException


def drawn(count=12):
    """(pictures [N, 64, 64, 3], captions) of the toy world."""
    stream = torch.Generator().manual_seed(1)
    scenes, captions = sample_captioned(count, stream, 0.0, False)
    return render(scenes, stream).movedim(1, -1), [str(caption) for caption in captions]


class Workshop:
    """The node with the toy model, pictures, and folders of its own."""

    def __init__(self, extension, folder: Path):
        self.node = extension("train").MaskUNetTrain.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        self.scene = Scene(extension, "toy")
        with torch.inference_mode():
            _, self.clip, self.vae = extension("toy").MaskUNetToyModel.execute().result
        self.images, self.captions = drawn()
        self.folder, self.generators = folder, folder / "maskunet"

    def train(self, **changes):
        """(MASKUNET, file name, curve, pictures before and after)"""
        inputs = {"model": self.scene.model, "clip": self.clip, "vae": self.vae, "images": self.images}
        inputs |= {"captions": "\n".join(self.captions), "goal": "style", "steps": STEPS, "name": "mine", "seed": 3}
        inputs |= {"resolution": 0, "batch": 2, "rate": 0.0, "held_out": 0, "targets": "decoder attention"}
        inputs |= {"minutes": 0.0, "pictures": 0, "picture_cfg": 5.0}
        lists = {name: value if isinstance(value, list) else [value] for name, value in (inputs | changes).items()}
        return run_as_executor(self.node.execute, **lists).result

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.generators / name)

    def unfinished(self) -> list[Path]:
        return sorted((self.folder / "output" / "maskunet_training").glob("*/state/last.pt"))


@contextlib.contextmanager
def watching(look):
    """`look` is called with steps that the node's bar shows, not with each: the host leaves out some."""
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: look(value) if total == STEPS else None
    )
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)


def interrupting(step: int):
    """Interrupts the host where the bar shows `step` or a later one."""
    return lambda value: comfy.model_management.interrupt_current_processing() if value >= step else None


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.fixture
def workshop(extension, tmp_path, monkeypatch):
    for name in ("maskunet", "output"):
        (tmp_path / name).mkdir()
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "maskunet", ([str(tmp_path / "maskunet")], {".safetensors"})
    )
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return Workshop(extension, tmp_path)


def test_what_was_trained_is_saved_listed_and_handed_on(workshop):
    generator, name, curve, _ = workshop.train(held_out=-1)
    assert name == "mine_00001_.safetensors"
    assert name in folder_paths.get_filename_list("maskunet")
    loaded = checkpoint.load(workshop.generators / name)
    assert loaded.training["config"]["loop"]["steps"] == STEPS
    assert loaded.training["validation"]["step"] <= STEPS
    for one, other in zip(loaded.generator.state_dict().values(), generator.file.generator.state_dict().values()):
        assert torch.equal(one, other)
    assert curve.shape[0] == 1
    assert curve.shape[-1] == 3
    assert workshop.unfinished() == []


def test_pictures_before_on_the_way_and_after(workshop):
    previews = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: previews.append(preview[1]) if preview else None
    )
    try:
        *_, pictures = workshop.train(pictures=2, picture_cfg=1.0)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    # Before on the left, in all of them the same; beside it the masks of a step.
    assert len(previews) == 3
    assert pictures.shape[0] == 2
    before, after = pictures[:, :128, :128], pictures[:, :128, -128:]
    assert (before - after).abs().amax((1, 2, 3)).min() > 0.02
    assert not torch.equal(before[0], before[1])
    for preview in previews:
        shown = torch.from_numpy(np.array(preview))[:128, :128] / 255
        torch.testing.assert_close(shown, before[0], atol=3e-3, rtol=0)


def test_the_command_line_makes_the_same_numbers_of_the_same_pictures(workshop, tmp_path):
    name = workshop.train(pictures=1)[1]
    config = checkpoint.load(workshop.generators / name).training["config"]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, (picture, caption) in enumerate(zip(workshop.images, workshop.captions)):
        Image.fromarray((picture * 255).round().byte().numpy()).save(pictures / f"{number:02}.png")
        (pictures / f"{number:02}.txt").write_text(caption)
    config["data"] |= {"path": str(pictures), "cache": str(tmp_path / "cache"), "resolution": 64}
    by_command = load_file(start(parse_config(config | {"output": str(tmp_path / "run")})))
    assert same_tensors(workshop.tensors(name), by_command)


def test_an_interrupt_saves_and_the_same_inputs_go_on_to_the_same_bits(workshop):
    validated = {"held_out": 1}
    whole = workshop.train(**validated, pictures=1)[1]
    before = workshop.scene.state()
    with watching(interrupting(2)), pytest.raises(INTERRUPT):
        workshop.train(name="other", **validated)
    assert same_state(workshop.scene.state(), before)
    (state,) = workshop.unfinished()
    done = torch.load(state, weights_only=True)["step"]
    assert 2 <= done < STEPS
    assert sorted(path.name for path in workshop.generators.iterdir()) == [whole]
    steps = []
    with watching(steps.append):
        resumed = workshop.train(name="other", **validated)[1]
    assert steps[0] == done + 1
    assert same_tensors(workshop.tensors(resumed), workshop.tensors(whole))
    assert workshop.unfinished() == []


def test_minutes_are_as_many_steps_as_fit_and_stay_so_many(extension, workshop, monkeypatch):
    def takes(seconds):
        monkeypatch.setattr(extension("train_run"), "estimate", lambda *_: Cost(0, seconds, 0.0, 0))

    takes(0.5)
    asked = {"steps": 100, "minutes": 2 / 60}
    with watching(interrupting(2)), pytest.raises(INTERRUPT):
        workshop.train(**asked)
    # Meanwhile the machine has become faster.
    takes(0.1)
    name = workshop.train(**asked)[1]
    config = checkpoint.load(workshop.generators / name).training["config"]
    assert config["loop"]["steps"] == STEPS
    assert workshop.unfinished() == []


def test_other_inputs_begin_anew_and_overwrite_nothing(workshop):
    for seed in (3, 4):
        with watching(interrupting(2)), pytest.raises(INTERRUPT):
            workshop.train(seed=seed)
    assert len(workshop.unfinished()) == 2
    names = [workshop.train(seed=seed)[1] for seed in (3, 4)]
    assert names == ["mine_00001_.safetensors", "mine_00002_.safetensors"]
    assert not same_tensors(*map(workshop.tensors, names))


def test_an_error_leaves_the_model_and_the_memory_as_they_were(workshop):
    workshop.train()
    before = workshop.scene.state()
    gc.collect()
    alive = len(tensors_alive())

    def fail(step):
        raise ZeroDivisionError

    with watching(fail), pytest.raises(ZeroDivisionError):
        workshop.train(seed=5)
    assert same_state(workshop.scene.state(), before)
    gc.collect()
    assert len(tensors_alive()) <= alive


@pytest.mark.parametrize(("memory", "resolution"), [(streamed, 64), (dynamic_vram, 256)])
def test_weights_that_are_lent_train_to_the_same_bits(extension, workshop, memory, resolution):
    """From 256 pixels on the masked blocks run again in the backward pass."""
    few = {"steps": 1, "batch": 1, "resolution": resolution, "images": workshop.images[:2], "captions": "a star"}
    plain = workshop.train(**few)[1]
    with memory():
        lent = Workshop(extension, workshop.folder)
        name = lent.train(**few, pictures=1, picture_cfg=1.0)[1]
    assert same_tensors(workshop.tensors(name), workshop.tensors(plain))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"captions": "one\ntwo"}, "There are 2 captions for 12 pictures. Give one for all, or one for each"),
        ({"name": "../mine"}, "name '../mine' lies outside models/maskunet. Give a name inside of it, such as"),
        ({"images": torch.zeros(0, 64, 64, 3)}, "The batch at 'images' holds no picture"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is_computed(extension, workshop, changes, sentence):
    error = extension("train").MaskUNetError
    with watching(pytest.fail), pytest.raises(error, match=sentence):
        workshop.train(**changes)


def test_captions_are_one_for_all_a_line_each_or_a_list(extension):
    captions_of = extension("train").captions_of
    assert captions_of([" a pot \n"], 2) == ["a pot", "a pot"]
    assert captions_of(["a pot\na pan\n"], 2) == ["a pot", "a pan"]
    assert captions_of(["a pot", "a pan"], 2) == ["a pot", "a pan"]
    assert captions_of([""], 3) == ["", "", ""]


def test_lists_of_pictures_of_any_size_are_trained_on(workshop):
    images = [torch.rand(1, 96, 64, 3), torch.rand(2, 64, 64, 4), torch.rand(1, 100, 180, 3)]
    name = workshop.train(images=images, captions=["a"] * 4, steps=2)[1]
    assert checkpoint.load(workshop.generators / name).training["step"] == 2
