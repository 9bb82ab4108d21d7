import errno
import json
import math
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from maskunet_core import tensor_file
from maskunet_core.files import checkpoint, mask_file
from maskunet_core.files.checkpoint import BadCheckpoint
from maskunet_core.files.mask_file import BadMaskFile
from maskunet_core.records.recorded import RecordedMasks
from tests.builders import make_generator
from tests.damage import (
    damaged_metadata,
    empty,
    extra_tensor,
    header_cut,
    misshapen_tensor,
    missing_tensor,
    newer_version,
    no_safetensors,
    other_format,
    parts_of,
    rewritten,
    truncated,
)
from tests.recording import random_masks

RECORD = {"prompt": "ein roter Kreis \N{LARGE RED CIRCLE}", "rewards": ["toy"], "seed": 7, "settings": {"steps": 15}}


@pytest.fixture
def saved(tmp_path, toy_structure):
    path = tmp_path / "found.safetensors"
    masks = random_masks(toy_structure, 3, record=RECORD)
    masks.add(0.1 + 0.2, {})
    mask_file.save(path, masks)
    return path, masks


def assert_equal(first: RecordedMasks, second: RecordedMasks) -> None:
    assert first.structure == second.structure
    assert (first.images, first.targets, first.record) == (second.images, second.targets, second.record)
    assert first.sigmas == second.sigmas
    for sigma in first.sigmas:
        ours, theirs = first.steps[sigma], second.steps[sigma]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_masks_come_back(saved):
    path, masks = saved
    assert_equal(mask_file.load(path), masks)
    assert masks.bytes < path.stat().st_size < masks.bytes + 40_000


@pytest.mark.parametrize("targets", ["decoder attention", "all attention"])
def test_the_target_set_comes_back(tmp_path, toy_structure, targets):
    path = tmp_path / "found.safetensors"
    mask_file.save(path, RecordedMasks(toy_structure, 1, targets=targets))
    assert mask_file.load(path).targets == targets


def test_masks_that_keep_everything_come_back(tmp_path, toy_structure):
    path = tmp_path / "found.safetensors"
    masks = RecordedMasks(toy_structure, 2)
    masks.add(3.0, {})
    mask_file.save(path, masks)
    loaded = mask_file.load(path)
    assert loaded.sigmas == [3.0]
    assert loaded.at(3.0) == {}
    assert loaded.keep_ratio() == [1.0]


def test_metadata_follow_the_contract(saved, toy_structure):
    tensors, metadata = parts_of(saved[0])
    assert metadata["format"] == "maskunet_masks"
    assert metadata["format_version"] == "1"
    assert metadata["targets"] == "decoder attention"
    assert metadata["images"] == "3"
    assert json.loads(metadata["base_model"])["family"] == "the MaskUNet toy model"
    assert json.loads(metadata["sigmas"]) == [14.6, 3.0, 0.5, 0.30000000000000004]
    assert json.loads(metadata["record"]) == RECORD
    layers = len(toy_structure.layers)
    assert json.loads(metadata["stored"]) == ["1" * (layers - 1) + "0"] * 3 + ["0" * layers]
    first = next(iter(toy_structure.layers.values()))
    assert tensors[f"0.{first.name}"].shape == (3, first.out_features * first.in_features // 8)


def test_masks_outlive_their_file(saved):
    path, masks = saved
    loaded = mask_file.load(path)
    with path.open("r+b") as file:
        file.seek(-100_000, 2)
        file.write(b"\0" * 100_000)
    assert_equal(loaded, masks)


def test_nothing_is_left_behind_when_saving_fails(saved, monkeypatch):
    path, masks = saved
    before = path.read_bytes()

    def no_space(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(tensor_file, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        mask_file.save(path, masks)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_full_disk_is_an_error_of_the_system_with_its_number(saved):
    """safetensors raises an error of its own, which nobody who waits for OSError would catch."""
    path, masks = saved
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            mask_file.save(path.with_name("new.safetensors"), masks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_longest_name_that_a_file_may_have_can_be_saved(saved):
    path, masks = saved
    longest = path.with_name("n" * (255 - len(".safetensors")) + ".safetensors")
    mask_file.save(longest, masks)
    assert_equal(mask_file.load(longest), masks)


def with_raw_metadata(**changes):
    return lambda path: rewritten(path, metadata=parts_of(path)[1] | changes)


def with_structure(change):
    def damage(path):
        structure = json.loads(parts_of(path)[1]["base_model"])
        change(structure)
        rewritten(path, metadata=parts_of(path)[1] | {"base_model": json.dumps(structure)})

    return damage


def whole_numbers(path):
    tensors, _ = parts_of(path)
    rewritten(path, {name: tensor.int() for name, tensor in tensors.items()})


def with_metadata(**changes):
    def damage(path):
        rewritten(path, metadata=parts_of(path)[1] | {key: json.dumps(value) for key, value in changes.items()})

    return damage


def without(key):
    def damage(path):
        rewritten(path, metadata={name: value for name, value in parts_of(path)[1].items() if name != key})

    return damage


def floating_point(path):
    tensors, _ = parts_of(path)
    rewritten(path, {name: tensor.half() for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (no_safetensors, r"is not a readable safetensors file.* copy or save it again"),
        (truncated, "may be truncated or of another kind: copy or save it again"),
        (header_cut, "is not a readable safetensors file"),
        (empty, "is not a readable safetensors file"),
        (other_format, r"but not a file of recorded masks .* Choose a file that MaskUNet Save Masks wrote"),
        (newer_version, "has format version 99; this extension reads version 1 and 2. Update ComfyUI-MaskUNet"),
        (missing_tensor, "lacks tensor 2.output_blocks"),
        (extra_tensor, "holds the unknown tensor extra"),
        (misshapen_tensor, r"but should be U8 \(3, 2048\)"),
        (floating_point, r"is F16 .* but should be U8"),
        (damaged_metadata, "has damaged metadata"),
        (without("targets"), "has damaged metadata"),
        (without("stored"), "has damaged metadata"),
        (with_metadata(targets="no such set"), "there is no target set"),
        (with_metadata(images=0), "for 1 image or more, not for 0"),
        (with_metadata(images="3"), "images must be a whole number"),
        (with_metadata(images=2), r"but should be U8 \(2, "),
        (with_metadata(record=[1]), "record an object"),
        (with_metadata(sigmas=[14.6, 3.0]), "there are 2 sigmas, but stored has 4 steps"),
        (with_metadata(sigmas=[3.0, 14.6, 0.5, 0.3]), "sigmas must be positive, finite and descending"),
        (with_metadata(sigmas=[3.0, 3.0, 0.5, 0.3]), "sigmas must be positive, finite and descending"),
        (with_metadata(sigmas=[3.0, 2.0, 1.0, 0.0]), "sigmas must be positive, finite and descending"),
        (with_metadata(sigmas=[3.0, 2.0, math.nan, 0.1]), "sigmas must be positive, finite and descending"),
        (with_metadata(sigmas=5), "has damaged metadata"),
        (with_metadata(stored=["1"] * 4), "stored must hold a digit 0 or 1 per layer"),
        (with_metadata(stored=5), "has damaged metadata"),
        (with_metadata(images=True), "images must be a whole number"),
        (with_metadata(sigmas=[10**400, 3.0, 0.5, 0.3]), "has damaged metadata .OverflowError"),
        (with_structure(lambda structure: structure.update(embedding=math.inf)), "has damaged metadata .OverflowError"),
        (with_structure(lambda structure: structure["blocks"].extend(structure["blocks"])), "more than once"),
        (with_raw_metadata(base_model="[" * 200_000), "has damaged metadata .RecursionError"),
        (with_raw_metadata(record='{"a":' * 100_000 + "1" + "}" * 100_000), "has damaged metadata .RecursionError"),
        (whole_numbers, r"is I32 .* but should be U8"),
    ],
)
def test_a_bad_file_gets_one_sentence_that_names_it(saved, damage, sentence):
    path, _ = saved
    damage(path)
    with pytest.raises(BadMaskFile, match=sentence) as caught:
        mask_file.load(path)
    assert "found.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_not_taken_for_floating_point(tmp_path):
    path = tmp_path / "numbers.safetensors"
    save_file({"whole": torch.zeros(2, dtype=torch.int32), "real": torch.zeros(2)}, path)
    expected = {"whole": (None, (2,)), "real": (None, (2,))}
    with pytest.raises(BadMaskFile, match=r"Tensor whole of 'numbers.safetensors' is I32 .* should be floating point"):
        mask_file.KIND.read_tensors(path, expected)


def test_a_missing_file_gets_a_sentence(tmp_path):
    with pytest.raises(BadMaskFile, match=r"does not exist\. Put files of recorded masks into models/maskunet_masks"):
        mask_file.load(tmp_path / "none.safetensors")


def test_a_generator_and_masks_are_not_taken_for_each_other(tmp_path, saved, toy_structure):
    generator = tmp_path / "generator.safetensors"
    checkpoint.save(generator, make_generator(toy_structure), "decoder attention", {})
    with pytest.raises(BadMaskFile, match=r"'generator\.safetensors' is a mask generator: choose it in MaskUNet Lo"):
        mask_file.load(generator)
    with pytest.raises(BadCheckpoint, match=r"'found\.safetensors' holds recorded masks: choose it in MaskUNet Load M"):
        checkpoint.load(saved[0])
