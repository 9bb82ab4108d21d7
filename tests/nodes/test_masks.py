"""Recorded masks in a real ComfyUI server: applied, saved, loaded, and refused."""

import errno
import io
import os
import time
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image

from maskunet_core.files import checkpoint, mask_file
from maskunet_core.records.recorded import RecordedMasks
from tests.builders import make_generator
from tests.damage import newer_version, no_safetensors, parts_of, truncated
from tests.host.extension import core_module
from tests.host.server import ExecutionError, Server, ServerError
from tests.recording import random_masks


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}


def drawing(name: str | None, batch: int = 1, strength: float = 1.0, **settings) -> dict:
    """The graph that draws with the masks of a file, or with the stock model."""
    sampling = {"seed": 3, "steps": 4, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    graph = {
        "toy": node("MaskUNetToyModel"),
        "positive": node("CLIPTextEncode", clip=["toy", 1], text="a red circle"),
        # Digits mean nothing to the toy's text encoder, but make the server sample again.
        "negative": node("CLIPTextEncode", clip=["toy", 1], text=str(time.monotonic_ns())),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=batch),
        "sampler": node(
            "KSampler",
            model=["apply" if name else "toy", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            **sampling | settings,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["toy", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="drawn"),
    }
    if name:
        graph["load"] = node("MaskUNetLoadMasks", masks_name=name)
        graph["apply"] = node("MaskUNetApplyMasks", model=["toy", 0], masks=["load", 0], strength=strength)
    return graph


def pictures(server: Server, graph: dict) -> np.ndarray:
    images = server.run(graph)["save"]["images"]
    return np.stack([np.asarray(Image.open(io.BytesIO(server.view(image)))) for image in images])


def put(server: Server, name: str, masks: RecordedMasks) -> str:
    mask_file.save(server.base / "models" / "maskunet_masks" / name, masks)
    return name


@pytest.fixture
def one(server, toy_structure) -> str:
    """Name of a file with masks of one image."""
    return put(server, "one.safetensors", random_masks(toy_structure, record={"prompt": "a red circle"}))


def choices(server: Server) -> list[str]:
    info = server.get("/object_info/MaskUNetLoadMasks")["MaskUNetLoadMasks"]["input"]["required"]["masks_name"]
    return info[1]["options"] if info[0] == "COMBO" else info[0]


def test_masks_change_the_picture_and_strength_zero_does_not(server, one):
    stock = pictures(server, drawing(None))
    masked = pictures(server, drawing(one))
    assert not np.array_equal(masked, stock)
    assert np.array_equal(pictures(server, drawing(one)), masked)
    assert np.array_equal(pictures(server, drawing(one, strength=0.0)), stock)
    assert np.array_equal(pictures(server, drawing(None)), stock)


def test_what_was_saved_can_be_loaded_at_once_and_draws_the_same(server, one):
    graph = {
        "load": node("MaskUNetLoadMasks", masks_name=one),
        "save": node("MaskUNetSaveMasks", masks=["load", 0], filename_prefix="masks/again"),
    }
    output = server.run(graph)["save"]
    assert output["masks"] == [{"filename": "again_00001_.safetensors", "subfolder": "masks", "type": "output"}]
    saved = server.base / "output" / "masks" / "again_00001_.safetensors"
    assert output["text"] == [f"Saved as masks/again_00001_.safetensors ({saved.stat().st_size / 1e6:.1f} MB)"]
    (tensors, metadata), original = parts_of(saved), parts_of(server.base / "models" / "maskunet_masks" / one)
    assert metadata == original[1]
    assert tensors.keys() == original[0].keys()
    assert all(torch.equal(tensors[key], value) for key, value in original[0].items())
    assert {one, saved.name} <= set(choices(server))
    assert np.array_equal(pictures(server, drawing(saved.name)), pictures(server, drawing(one)))


def test_saving_counts_on_and_stays_inside_the_output_folder(server, one):
    def save(prefix):
        graph = {"load": node("MaskUNetLoadMasks", masks_name=one)}
        graph["save"] = node("MaskUNetSaveMasks", masks=["load", 0], filename_prefix=prefix)
        return server.run(graph)["save"]["masks"][0]["filename"]

    assert save("masks/counted") == "counted_00001_.safetensors"
    assert save("masks/counted_b") == "counted_b_00001_.safetensors"
    assert save("masks/./counted") == "counted_00002_.safetensors"
    with pytest.raises(ExecutionError, match="outside the output folder"):
        save("../counted")


@pytest.fixture
def save(extension, monkeypatch, tmp_path, toy_structure):
    """MaskUNet Save Masks in this process, with an output folder of its own."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    masks = random_masks(toy_structure)
    saver = extension("masks").MaskUNetSaveMasks.PREPARE_CLASS_CLONE({"hidden_inputs": {}})

    def execute(prefix: str) -> str:
        (saved,) = saver.execute(masks, prefix).ui["masks"]
        return f"{saved['subfolder']}/{saved['filename']}"

    return execute


def test_without_a_name_masks_are_saved_under_the_usual_one_and_never_over_others(save, tmp_path):
    names = [save(prefix) for prefix in ("", " ", ".", "..", "/", "masks/maskunet")]
    assert names == [f"masks/maskunet_0000{n}_.safetensors" for n in range(1, 7)]
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_servers_on_one_output_folder_do_not_take_the_same_number(save, tmp_path, monkeypatch):
    """The other one saves between the look at the folder and the writing of the file."""
    look = folder_paths.get_save_image_path

    def looks_too_early(*arguments):
        found = look(*arguments)
        Path(found[0], f"{found[1]}_{found[2]:05}_.safetensors").write_text("of the other server")
        return found

    monkeypatch.setattr(folder_paths, "get_save_image_path", looks_too_early)
    assert save("a") == "/a_00002_.safetensors"
    assert (tmp_path / "a_00001_.safetensors").read_text() == "of the other server"


@pytest.mark.parametrize(
    ("prefix", "sentence"),
    [
        ("n" * 300, r"cannot be saved as 'n+' .*File name too long.* Choose a shorter filename_prefix"),
        ("f" * 300 + "/n", "File name too long.* Choose a shorter filename_prefix"),
        ("file/n", "Not a directory.* Choose another name or folder by filename_prefix"),
        ("../n", "outside the output folder. Give a name inside of it, such as masks/maskunet"),
        ("/n", "outside the output folder"),
    ],
)
def test_a_name_that_cannot_be_written_gets_a_sentence(save, tmp_path, prefix, sentence):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=sentence) as caught:
        save(prefix)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "No space left.* Free some space"),
        (errno.EDQUOT, "quota.* Free some of the space"),
        (errno.EROFS, "Read-only file.* Make the output folder writ"),
    ],
)
def test_a_folder_that_takes_no_file_gets_a_sentence(save, tmp_path, monkeypatch, number, sentence):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(core_module("tensor_file"), "save_file", refuse)
    with pytest.raises(ValueError, match=sentence):
        save("n")
    assert list(tmp_path.iterdir()) == []


def test_masks_of_a_batch_fit_that_batch_alone(server, toy_structure):
    name = put(server, "three.safetensors", random_masks(toy_structure, 3))
    assert pictures(server, drawing(name, batch=3)).shape == (3, 64, 64, 3)
    with pytest.raises(ExecutionError, match="for a batch of 3 images, but the batch that is sampled has 1") as caught:
        server.run(drawing(name))
    assert caught.value.node_type == "KSampler"


@pytest.mark.parametrize(
    "settings", [{"steps": 7}, {"batch": 2}, {"sampler_name": "dpmpp_2m", "scheduler": "karras"}, {"denoise": 0.5}]
)
def test_other_settings_than_recorded_work(server, one, settings):
    assert not np.array_equal(pictures(server, drawing(one, **settings)), pictures(server, drawing(None, **settings)))


def test_masks_of_another_family_are_refused_before_sampling(server, sd15_structure):
    foreign = RecordedMasks(sd15_structure, 1)
    foreign.add(1.0, {})
    with pytest.raises(ExecutionError, match=r"recorded on SD 1\.5, but the connected model is the Mask") as caught:
        server.run(drawing(put(server, "sd15.safetensors", foreign)))
    assert caught.value.node_type == "MaskUNetApplyMasks"


@pytest.mark.parametrize("damage", [no_safetensors, truncated, newer_version])
def test_a_bad_file_gets_its_sentence(server, toy_structure, damage):
    name = put(server, f"{damage.__name__}.safetensors", random_masks(toy_structure))
    damage(server.base / "models" / "maskunet_masks" / name)
    with pytest.raises(ExecutionError) as caught:
        server.run(drawing(name))
    assert caught.value.node_type == "MaskUNetLoadMasks"
    assert name in caught.value.exception_message


def test_a_generator_among_the_masks_is_told_where_it_belongs(server, toy_structure):
    path = server.base / "models" / "maskunet_masks" / "generator.safetensors"
    checkpoint.save(path, make_generator(toy_structure), "decoder attention", {})
    with pytest.raises(ExecutionError, match=r"'generator\.safetensors' is a mask generator: choose it in MaskUNet Lo"):
        server.run(drawing(path.name))


@pytest.mark.parametrize("name", ["none.safetensors", "../../output/drawn_00001_.png"])
def test_a_name_that_is_not_listed_is_refused(server, name):
    with pytest.raises(ServerError, match="is neither in models/maskunet_masks nor in masks/ of the output folder"):
        server.run(drawing(name))


def test_a_file_that_was_replaced_is_read_again(server, toy_structure):
    name = put(server, "replaced.safetensors", random_masks(toy_structure))
    before = pictures(server, drawing(name))
    time.sleep(0.05)
    put(server, name, random_masks(toy_structure, keep=0.9))
    assert not np.array_equal(pictures(server, drawing(name)), before)
