"""Recording and inspecting masks in a real ComfyUI server, and the diagrams."""

import copy
import io
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from maskunet_core.files import mask_file
from maskunet_core.records.recorded import RecordedMasks
from maskunet_core.records.statistics import MaskStatistics
from tests.host.extension import core_module
from tests.host.graph import load_workflow, titled, to_prompt
from tests.host.server import ExecutionError, Server
from tests.recording import random_masks

DIAGRAMS = ("Keep ratio", "Over time", "Histograms", "Difference")


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}


@pytest.fixture(scope="module")
def shipped(server):
    return to_prompt(load_workflow("inspect"), server.object_info())


@pytest.fixture
def graph(shipped):
    """The shipped graph with few steps; every test may change it."""
    prompt = copy.deepcopy(shipped)
    for word in ("one", "another"):
        titled(prompt, f"Sample {word} prompt").update(steps=4, scheduler="normal", sampler_name="euler")
    return resampled(prompt)


def resampled(prompt: dict) -> dict:
    """Digits mean nothing to the toy's text encoder, but make the server sample again."""
    prompt = copy.deepcopy(prompt)
    titled(prompt, "Negative prompt")["text"] = str(time.monotonic_ns())
    return prompt


def identity(prompt: dict, title: str) -> str:
    return next(key for key, value in prompt.items() if value["_meta"]["title"] == title)


class Result:
    """What the server made of a graph."""

    def __init__(self, server: Server, prompt: dict):
        self.server, self.prompt, self.outputs = server, prompt, server.run(prompt)

    def picture(self, title: str) -> np.ndarray:
        (image,) = self.outputs[identity(self.prompt, title)]["images"]
        return np.asarray(Image.open(io.BytesIO(self.server.view(image))).convert("RGB"))

    def table(self) -> list[dict[str, str]]:
        header, *lines = self.outputs[identity(self.prompt, "Table")]["text"][0].splitlines()
        header, *lines = ([cell.strip() for cell in line.split("\t")] for line in (header, *lines))
        return [dict(zip(header, line)) for line in lines]

    def numbers(self, column: str) -> np.ndarray:
        """[steps, layers]"""
        values = np.array([float(row[column] or "nan") for row in self.table()])
        return values.reshape(-1, 32)


def test_the_shipped_graph_shows_its_masks(server, graph):
    pytest.importorskip("matplotlib")
    result = Result(server, graph)
    for title in DIAGRAMS:
        picture = result.picture(title)
        assert picture.shape[1] == 770
        assert picture.std() > 10
        for edge in (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:]):
            assert (edge == 255).all(), f"{title} is clipped"
    assert len(result.table()) == 4 * 32
    keep, differing = result.numbers("keep_ratio"), result.numbers("differing")
    assert 0.5 < keep.min() < 0.97
    assert keep.max() <= 1
    assert 0 < differing.max() < 0.2
    assert np.isnan(result.numbers("flipped")[0]).all()
    assert result.numbers("flipped")[1:].max() > 0.001


def test_the_columns_of_the_table_stand_under_their_headings(server, graph):
    result = Result(server, graph)
    lines = result.outputs[identity(result.prompt, "Table")]["text"][0].splitlines()
    assert len({tuple(place for place, sign in enumerate(line) if sign == "\t") for line in lines}) == 1
    assert result.table()[0]["layer"] == "up.0.0 attn1 q"
    assert not any("e-" in line for line in lines)


def test_an_empty_branch_is_said_in_words(extension):
    """Not as a map of one colour."""
    pytest.importorskip("matplotlib")
    empty = MaskStatistics((), ("up.0",), (3.0, 1.0), torch.zeros(1, 2), torch.zeros(1, 2), None)
    said = extension("mask_plots").keep_map(empty, "negative branch")
    assert said.shape[1] < 200


def test_recording_does_not_change_the_picture(server, graph):
    recorded = Result(server, graph).picture("Save one prompt")
    plain = resampled(graph)
    apply = identity(plain, "Apply the masks")
    for word in ("one", "another"):
        titled(plain, f"Sample {word} prompt")["model"] = [apply, 0]
        del plain[identity(plain, f"Masks of {word} prompt")]
    for title in ("Inspect", "Table", *DIAGRAMS):
        del plain[identity(plain, title)]
    assert np.array_equal(Result(server, plain).picture("Save one prompt"), recorded)


def test_the_same_prompt_with_the_same_seed_has_the_same_masks_and_another_seed_has_not(server, graph):
    titled(graph, "Another prompt")["text"] = titled(graph, "One prompt")["text"]
    assert Result(server, graph).numbers("differing").max() == 0
    titled(graph, "Sample another prompt")["seed"] = 4
    assert Result(server, resampled(graph)).numbers("differing").max() > 0


def test_a_run_that_the_server_has_kept_still_gives_its_record(server, graph):
    """Only the inspecting nodes run again: the samplers' latents come from the cache."""
    positive = Result(server, graph).numbers("keep_ratio")
    titled(graph, "Inspect")["branch"] = "negative"
    later = copy.deepcopy(graph)
    later["late"] = node("MaskUNetMasksOfRun", latent=[identity(graph, "Sample one prompt"), 0])
    later["late inspect"] = node(
        "MaskUNetInspect",
        model=[identity(graph, "Toy model"), 0],
        masks=["late", 0],
        sample=0,
        branch="positive",
    )
    later["late table"] = node("PreviewAny", source=["late inspect", 4])
    sampled = []
    outputs = server.run(later, lambda kind, data: sampled.append(data.get("node")) if kind == "progress" else None)
    assert identity(later, "Sample one prompt") not in sampled
    late = [float(line.split("\t")[6]) for line in outputs["late table"]["text"][0].splitlines()[1:]]
    assert np.array_equal(np.array(late).reshape(-1, 32), positive)
    assert not np.array_equal(Result(server, graph).numbers("keep_ratio"), positive)


def test_a_recorded_run_is_saved_and_replayed_as_the_same_picture(server, graph):
    graph["save masks"] = node(
        "MaskUNetSaveMasks", masks=[identity(graph, "Masks of one prompt"), 0], filename_prefix="masks/run"
    )
    result = Result(server, graph)
    saved = result.outputs["save masks"]
    assert saved["text"][1] == "To draw this again, give KSampler seed 3"
    masks = mask_file.load(server.base / "output" / "masks" / saved["masks"][0]["filename"])
    assert (masks.images, masks.branches, len(masks.sigmas)) == (1, "each", 4)
    replay = resampled(graph)
    replay["load"] = node("MaskUNetLoadMasks", masks_name=saved["masks"][0]["filename"])
    replay["replay"] = node(
        "MaskUNetApplyMasks", model=[identity(graph, "Toy model"), 0], masks=["load", 0], strength=1.0
    )
    for title in ("Inspect", "Table", "Masks of one prompt", "Masks of another prompt", *DIAGRAMS):
        del replay[identity(replay, title)]
    del replay["save masks"]
    titled(replay, "Sample one prompt")["model"] = ["replay", 0]
    drawn = Result(server, replay)
    assert np.array_equal(drawn.picture("Save one prompt"), result.picture("Save one prompt"))
    assert not np.array_equal(drawn.picture("Save one prompt"), drawn.picture("Save another prompt"))


def test_two_images_of_a_batch_are_compared_through_one_recording(server, graph):
    titled(graph, "One 64x64 picture")["batch_size"] = 2
    inspect = titled(graph, "Inspect")
    inspect["other_masks"] = inspect["masks"]
    for sampled in ("one", "another"):
        del graph[identity(graph, f"Save {sampled} prompt")]
    assert Result(server, graph).numbers("differing").max() == 0
    inspect["other_sample"] = 1
    assert Result(server, graph).numbers("differing").max() > 0
    inspect["other_sample"] = 2
    with pytest.raises(ExecutionError, match="There is no image 2 in 'other_masks'") as caught:
        server.run(graph)
    assert caught.value.node_type == "MaskUNetInspect"


def test_a_model_without_masks_gets_a_sentence(server, graph):
    titled(graph, "Apply the masks")["strength"] = 0.0
    with pytest.raises(ExecutionError, match="The sampler ran without masks") as caught:
        server.run(graph)
    assert caught.value.node_type == "MaskUNetMasksOfRun"


def test_a_latent_that_was_not_recorded_gets_a_sentence(server, graph):
    for word in ("one", "another"):
        titled(graph, f"Sample {word} prompt")["model"] = [identity(graph, "Apply the masks"), 0]
    with pytest.raises(ExecutionError, match="Put MaskUNet Record Masks in front of the sampler") as caught:
        server.run(graph)
    assert caught.value.node_type == "MaskUNetMasksOfRun"


def with_files(prompt: dict, server: Server, **files: RecordedMasks) -> dict:
    """The inspecting part of the graph, on files of masks instead of runs: `masks` and, if given, `other_masks`."""
    names = ("Toy model", "Inspect", "Table", *DIAGRAMS)
    prompt = {key: value for key, value in copy.deepcopy(prompt).items() if value["_meta"]["title"] in names}
    inspect = titled(prompt, "Inspect")
    del inspect["other_masks"]
    for name, masks in files.items():
        file = f"{name}_{time.monotonic_ns()}.safetensors"
        mask_file.save(server.base / "models" / "maskunet_masks" / file, masks)
        prompt[name] = node("MaskUNetLoadMasks", masks_name=file)
        inspect[name] = [name, 0]
    return prompt


def test_masks_of_a_file_are_shown_and_nothing_to_compare_is_said(server, graph, toy_structure):
    masks = random_masks(toy_structure, keep=0.9)
    result = Result(server, with_files(graph, server, masks=masks))
    assert len(result.table()) == 3 * 32
    assert {row["differing"] for row in result.table()} == {""}
    assert result.numbers("keep_ratio").mean(1) == pytest.approx([(31 * 0.9 + 1) / 32] * 3, abs=0.003)
    assert result.numbers("keep_ratio")[:, -1].tolist() == [1.0] * 3
    assert result.picture("Difference").shape[0] < 250


def test_masks_of_another_family_are_refused(server, graph, toy_structure, sd15_structure):
    foreign = RecordedMasks(sd15_structure, 1)
    foreign.add(1.0, {})
    masks = random_masks(toy_structure)
    with pytest.raises(ExecutionError, match=r"recorded on SD 1\.5, but the connected model is the MaskUNet toy"):
        server.run(with_files(graph, server, masks=foreign))
    sentence = r"'other_masks' on SD 1\.5 .* so they cannot be compared"
    with pytest.raises(ExecutionError, match=sentence) as caught:
        server.run(with_files(graph, server, masks=masks, other_masks=foreign))
    assert caught.value.node_type == "MaskUNetInspect"


def _masks_of(model, toy_structure):
    """Random masks in the extension's own classes."""
    structure = core_module("seam.attach").structure_of(model, "decoder attention")
    masks = core_module("records.recorded").RecordedMasks(structure, 1)
    masks.steps = random_masks(toy_structure).steps
    return masks


def test_without_matplotlib_the_diagrams_are_a_sentence_and_the_table_is_there(extension, monkeypatch, toy_structure):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = extension("toy").MaskUNetToyModel.execute().result[0]
    masks = _masks_of(model, toy_structure)
    *diagrams, table = extension("inspect_masks").MaskUNetInspect.execute(model, masks, 0, "positive").result
    assert all(diagram.shape == (1, 160, 640, 3) for diagram in diagrams)
    assert len(table.splitlines()) == 1 + 3 * 32


def test_inspecting_leaves_the_model_as_it_was(extension, toy_structure):
    model = extension("toy").MaskUNetToyModel.execute().result[0]
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    masks = _masks_of(model, toy_structure)
    extension("inspect_masks").MaskUNetInspect.execute(model, masks, 0, "positive")
    after = model.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
