import json

import pytest
import torch

from maskunet_core import tensor_file
from maskunet_core.files import checkpoint
from maskunet_core.files.checkpoint import BadCheckpoint, IncompatibleGenerator
from maskunet_core.models.structure import inspect_model
from tests.builders import make_generator, sd15_unet
from tests.damage import (
    damaged_metadata,
    empty,
    extra_tensor,
    header_cut,
    misshapen_tensor,
    missing_tensor,
    newer_version,
    no_safetensors,
    not_finite,
    other_format,
    parts_of,
    truncated,
    unknown_architecture,
    unknown_setting,
    wrong_kind,
)


@pytest.fixture
def saved(tmp_path, toy_structure):
    path = tmp_path / "generator.safetensors"
    generator = make_generator(toy_structure, lively=True)
    checkpoint.save(path, generator, "decoder attention", {"steps": 3})
    return path, generator


@pytest.mark.parametrize("bias", ["weight", "row_column"])
def test_a_generator_comes_back(tmp_path, toy_structure, bias):
    path = tmp_path / "generator.safetensors"
    generator = make_generator(toy_structure, bias=bias, lively=True)
    checkpoint.save(path, generator, "decoder attention", {"steps": 3})
    loaded = checkpoint.load(path)
    assert loaded.targets == "decoder attention"
    assert loaded.training == {"steps": 3}
    assert loaded.structure == toy_structure
    assert loaded.generator.settings == generator.settings
    state = loaded.generator.state_dict()
    for key, value in generator.state_dict().items():
        if key.endswith(".bias") and key.startswith("logits."):
            assert torch.equal(state[key] > 0, value > 0)
        else:
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in loaded.generator.parameters())


def test_saving_what_was_loaded_gives_the_same_file(saved, tmp_path):
    path, _ = saved
    loaded = checkpoint.load(path)
    again = tmp_path / "again.safetensors"
    checkpoint.save(again, loaded.generator, loaded.targets, loaded.training)
    first, second = parts_of(path), parts_of(again)
    assert first[1] == second[1]
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0])


def test_file_size_is_what_the_tensors_take(saved):
    path, generator = saved
    tensors, _ = parts_of(path)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert checkpoint.file_size(generator) == size


def test_metadata_follows_the_contract(saved):
    _, metadata = parts_of(saved[0])
    assert metadata["format"] == "maskunet"
    assert metadata["format_version"] == "1"
    assert metadata["architecture"] == "low_rank"
    assert metadata["targets"] == "decoder attention"
    assert json.loads(metadata["base_model"])["family"] == "the MaskUNet toy model"
    assert json.loads(metadata["hyper_parameters"])["rank"] == 8


def test_nothing_is_left_behind_when_saving_fails(tmp_path, toy_structure, monkeypatch):
    path = tmp_path / "generator.safetensors"
    path.write_text("the last good one")

    def no_space(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(tensor_file, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, make_generator(toy_structure), "decoder attention", {})
    assert [p.name for p in tmp_path.iterdir()] == ["generator.safetensors"]
    assert path.read_text() == "the last good one"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (no_safetensors, "is not a readable safetensors file"),
        (truncated, "may be truncated or of another kind: copy or download it again"),
        (header_cut, "is not a readable safetensors file"),
        (empty, "is not a readable safetensors file"),
        (other_format, "is a safetensors file, but not a MaskUNet generator"),
        (newer_version, "has format version 2; this extension reads version 1. Update ComfyUI-MaskUNet"),
        (unknown_architecture, "has the architecture 'transformer', which this extension does not know"),
        (damaged_metadata, "has damaged metadata"),
        (unknown_setting, "has damaged metadata"),
        (missing_tensor, "lacks tensor"),
        (extra_tensor, "holds the unknown tensor extra"),
        (misshapen_tensor, r"but should be floating point \("),
        (wrong_kind, "but should be U8"),
        (not_finite, "holds values that are not finite"),
    ],
)
def test_a_bad_file_gets_one_sentence_that_names_it(saved, damage, sentence):
    path, _ = saved
    damage(path)
    with pytest.raises(BadCheckpoint, match=sentence) as caught:
        checkpoint.load(path)
    assert "generator.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_gets_a_sentence(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"does not exist\. Put generator files into models/maskunet"):
        checkpoint.load(tmp_path / "none.safetensors")


def test_a_generator_for_another_family_is_refused(saved):
    loaded = checkpoint.load(saved[0])
    sd15 = inspect_model(sd15_unet(), "decoder attention", "SD 1.5")
    with pytest.raises(
        IncompatibleGenerator,
        match=r"was trained for the MaskUNet toy model, but the connected model is SD 1\.5: .* choose another file",
    ):
        loaded.require_fit(sd15)
