import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maskunet_core import tensor_file, toy
from maskunet_core.errors import MaskUNetError
from maskunet_core.files import checkpoint, mask_file
from maskunet_core.files.checkpoint import BadCheckpoint, IncompatibleGenerator
from maskunet_core.masks.generator import LowRankGenerator
from maskunet_core.models.structure import Structure, inspect_model
from tests.builders import make_generator, sd15_unet
from tests.damage import (
    blocks_twice,
    damaged_metadata,
    empty,
    extra_tensor,
    header_cut,
    infinite_size,
    infinite_temperature,
    layer_twice,
    maps_no_record,
    misshapen_tensor,
    missing_tensor,
    nested_too_deep,
    newer_version,
    no_safetensors,
    not_finite,
    other_format,
    parts_of,
    rewritten,
    training_no_record,
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


@pytest.mark.parametrize(("bias", "version"), [("weight", "1"), ("row_column", "1"), ("group", "3")])
def test_a_generator_comes_back(tmp_path, toy_structure, bias, version):
    path = tmp_path / "generator.safetensors"
    generator = make_generator(toy_structure, bias=bias, lively=True)
    checkpoint.save(path, generator, "decoder attention", {"steps": 3})
    loaded = checkpoint.load(path)
    assert checkpoint.read_metadata(path)["format_version"] == version
    assert loaded.targets == "decoder attention"
    assert loaded.training == {"steps": 3}
    assert loaded.structure == toy_structure
    assert loaded.generator.settings == generator.settings
    for key, value in generator.named_parameters():
        if key.endswith(".bias") and key.startswith("logits."):
            assert torch.equal(loaded.generator.get_submodule(key).whole() > 0, value > 0)
        else:
            torch.testing.assert_close(loaded.generator.get_parameter(key), value, rtol=1e-3, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in loaded.generator.parameters())


def test_saving_what_was_loaded_gives_the_same_file(saved, tmp_path):
    path, _ = saved
    loaded = checkpoint.load(path)
    again = tmp_path / "again.safetensors"
    checkpoint.save(again, loaded.generator, loaded.targets, loaded.training)
    first, second = parts_of(path), parts_of(again)
    assert first[1] == second[1]
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0])


def unpacked(path):
    """The generator of a file with every bias per weight in full: level times step."""
    tensors, metadata = parts_of(path)
    structure = Structure.from_dict(json.loads(metadata["base_model"]))
    generator = LowRankGenerator.from_hyper_parameters(structure, json.loads(metadata["hyper_parameters"]))
    state = {key: value.float() for key, value in tensors.items() if not key.endswith((".packed", ".step"))}
    for key, parameter in generator.named_parameters():
        if key not in state:
            packed = tensors[f"{key}.packed"]
            levels = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[: parameter.numel()]
            state[key] = ((levels.float() - 7.5) * tensors[f"{key}.step"]).reshape(parameter.shape)
    generator.load_state_dict(state)
    return generator.eval().requires_grad_(False)


@pytest.mark.parametrize("shipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masks_are_those_of_the_unpacked_file(saved, shipped, dtype):
    path = Path(toy.__file__).with_name("generators") / "toy_shapes.safetensors" if shipped else saved[0]
    expected, found = unpacked(path).to(dtype), checkpoint.load(path).generator.to(dtype)
    torch.manual_seed(5)
    kept = []
    for block in expected.structure.blocks:
        inputs = torch.randn(2, block.channels, 4, 4), torch.randn(2, expected.structure.embedding)
        conditions = expected.condition(block, *inputs)
        for layer, code in found.condition(block, *inputs).items():
            assert torch.equal(code, conditions[layer])
            ours, theirs = found.layer_logits(layer, code), expected.layer_logits(layer, code)
            assert torch.equal(ours.above(found.threshold), theirs.above(expected.threshold))
            assert torch.equal(ours.full(), theirs.full())
            kept.append(ours.above(found.threshold).float().mean())
    assert len(kept) == len(expected.structure.layers)
    assert 0.05 < torch.stack(kept).mean() < 1


def test_a_loaded_generator_takes_little_more_than_its_file(saved):
    generator = checkpoint.load(saved[0]).generator
    tensors = [*generator.parameters(), *generator.buffers()]
    biases = sum(layer.out_features * layer.in_features for layer in generator.structure.layers.values()) // 2
    others = 4 * sum(parameter.numel() for parameter in generator.parameters())
    tables = 2048 * len(generator.structure.layers)
    assert sum(tensor.nbytes for tensor in tensors) == biases + others + tables


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_writing_over_the_file_changes_nothing_that_was_loaded(saved, dtype):
    path, _ = saved
    tensors, metadata = parts_of(path)
    cast = {key: value if key.endswith((".packed", ".step")) else value.to(dtype) for key, value in tensors.items()}
    rewritten(path, cast, metadata)
    state = checkpoint.load(path).generator.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    with path.open("r+b") as file:
        file.seek(header)
        file.write(bytes(path.stat().st_size - header))
    assert all(torch.equal(state[key], value) for key, value in before.items())


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
        (newer_version, "has format version 99; this extension reads version 1 and 2 and 3. Update ComfyUI-MaskUNet"),
        (unknown_architecture, "has the architecture 'transformer', which this extension does not know"),
        (damaged_metadata, "has damaged metadata"),
        (unknown_setting, "has damaged metadata"),
        (infinite_size, r"has damaged metadata \(OverflowError"),
        (nested_too_deep, r"has damaged metadata \(RecursionError"),
        (infinite_temperature, r"has damaged metadata \(ValueError: .* tau above 0 and finite"),
        (blocks_twice, r"has damaged metadata \(ValueError: it names up\.0 more than once"),
        (layer_twice, r"has damaged metadata \(ValueError: it names .*to_q more than once"),
        (training_no_record, r"has damaged metadata \(TypeError: training is a list"),
        (maps_no_record, r"has damaged metadata \(AttributeError"),
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_up_blocks_0_attentions_0.lora_up.weight", "is a LoRA, .* models/loras"),
        ("unet.up_blocks.0.attn1.to_q.lora_A.weight", "is a LoRA"),
        ("model.diffusion_model.input_blocks.0.0.weight", "is a checkpoint, .* models/checkpoints"),
        ("control_model.input_hint_block.0.weight", "is a ControlNet"),
        ("decoder.conv_in.weight", "is a VAE"),
        ("double_blocks.0.img_attn.qkv.weight", "is a diffusion model"),
    ],
)
@pytest.mark.parametrize(
    ("load", "noun"), [(checkpoint.load, "MaskUNet generator"), (mask_file.load, "file of recorded masks")]
)
def test_a_file_of_another_kind_is_named_as_what_it_is(tmp_path, name, kind, load, noun):
    path = tmp_path / "misplaced.safetensors"
    save_file({name: torch.zeros(1)}, path)
    with pytest.raises(MaskUNetError, match=kind) as caught:
        load(path)
    assert f"not a {noun}" in str(caught.value)
