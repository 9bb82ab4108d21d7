"""Ways in which a generator file can be bad: each takes the path of a good one and spoils it."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def parts_of(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 - no dict


def rewritten(path, tensors=None, metadata=None):
    """The same file with other tensors or metadata."""
    old_tensors, old_metadata = parts_of(path)
    save_file(old_tensors if tensors is None else tensors, path, old_metadata if metadata is None else metadata)
    return path


def no_safetensors(path):
    path.write_text("hello")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def header_cut(path):
    path.write_bytes(path.read_bytes()[:100])


def empty(path):
    path.write_bytes(b"")


def other_format(path):
    rewritten(path, metadata={"format": "pt"})


def newer_version(path):
    rewritten(path, metadata=parts_of(path)[1] | {"format_version": "99"})


def unknown_architecture(path):
    rewritten(path, metadata=parts_of(path)[1] | {"architecture": "transformer"})


def damaged_metadata(path):
    rewritten(path, metadata=parts_of(path)[1] | {"base_model": "{}"})


def unknown_setting(path):
    rewritten(path, metadata=parts_of(path)[1] | {"hyper_parameters": '{"depth": 3}'})


def _metadata_changed(path, key, change):
    """One part of the metadata, read from its JSON, replaced by what `change` makes of it."""
    metadata = parts_of(path)[1]
    rewritten(path, metadata=metadata | {key: json.dumps(change(json.loads(metadata[key])))})


def infinite_size(path):
    _metadata_changed(path, "base_model", lambda structure: structure | {"embedding": float("inf")})


def nested_too_deep(path):
    rewritten(path, metadata=parts_of(path)[1] | {"base_model": "[" * 200_000})


def infinite_temperature(path):
    _metadata_changed(path, "hyper_parameters", lambda settings: settings | {"tau": float("inf")})


def blocks_twice(path):
    _metadata_changed(path, "base_model", lambda structure: structure | {"blocks": 2 * structure["blocks"]})


def layer_twice(path):
    def doubled(structure):
        first, *others = structure["blocks"]
        return structure | {"blocks": [first | {"layers": [first["layers"][0], *first["layers"]]}, *others]}

    _metadata_changed(path, "base_model", doubled)


def training_no_record(path):
    _metadata_changed(path, "training", lambda _: [])


def maps_no_record(path):
    _metadata_changed(path, "hyper_parameters", lambda _: {"maps": 5})
    rewritten(path, metadata=parts_of(path)[1] | {"architecture": "reference"})


def missing_tensor(path):
    tensors, _ = parts_of(path)
    del tensors[max(tensors)]
    rewritten(path, tensors)


def extra_tensor(path):
    rewritten(path, parts_of(path)[0] | {"extra": torch.zeros(2)})


def misshapen_tensor(path):
    tensors, _ = parts_of(path)
    rewritten(path, tensors | {max(tensors): torch.zeros(3, 2)})


def wrong_kind(path):
    tensors, _ = parts_of(path)
    key = next(key for key in tensors if key.endswith(".packed"))
    rewritten(path, tensors | {key: tensors[key].half()})


def not_finite(path):
    tensors, _ = parts_of(path)
    key = next(key for key in tensors if key.endswith(".u"))
    tensors[key][0, 0] = float("nan")
    rewritten(path, tensors)
