"""Tensors on disk by key: written in one go, checked when read."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from maskunet_core.replacing import replacing
from maskunet_core.training.data import compact, sha256

FORMAT_VERSION = "1"


def key_of(*parts: str | int | bool) -> str:
    """A key that differs wherever a part, their number or this file's format differs."""
    return sha256(json.dumps([FORMAT_VERSION, *parts]).encode())


class TensorStore:
    """Dictionaries of tensors, each in a safetensors file `folder/ab/abcd….safetensors` named by its key.

    The metadata holds the key and a checksum, so that a damaged or misplaced file counts as missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors as they are stored, or None where they are missing or damaged."""
        try:
            # Read whole instead of mapped: a mapped file cannot be replaced on Windows.
            data = self.path(key).read_bytes()
            if _header(data)["__metadata__"] != {"key": key, "sha256": _checksum(data)}:
                return None
            return load(data)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError):
            return None

    def write(self, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stores tensors, fp32 as fp16 unless a value overflows. Returns them as they are stored."""
        kept = {name: compact(tensor) for name, tensor in tensors.items()}
        data = save(kept, {"key": key, "sha256": _checksum(save(kept))})
        with replacing(self.path(key)) as temporary:
            temporary.write_bytes(data)
        return kept


def _header(data: bytes) -> dict:
    """Names, kinds and places of the tensors, and the metadata: JSON behind eight bytes with its length."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _checksum(data: bytes) -> str:
    """Of everything in a safetensors file but its metadata."""
    header = {name: value for name, value in _header(data).items() if name != "__metadata__"}
    content = data[8 + int.from_bytes(data[:8], "little") :]
    return sha256(json.dumps(header, sort_keys=True).encode() + content)
