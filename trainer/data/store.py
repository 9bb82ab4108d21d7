"""Tensors on disk by key, in Arrow files that `datasets` reads in place.

A row is found by its number, so that the rows of a batch may be any: this is why `datasets` serves here, and not a
format that is read from one end, where a run that goes on could not begin in the middle. Nothing of it is in memory
but eight bytes for each key and each row.
"""

import contextlib
import json
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load, save
from torch import Tensor

from maskunet_core.replacing import replacing
from maskunet_core.training.data import compact, content_of

from ..host import MissingPackage

FORMAT_VERSION = "3"
_ENDING = f".v{FORMAT_VERSION}.arrow"
SHARD = 2048
"""Rows of a file, unless it grows too large or is long in the making."""
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 60.0
KEY = 16
"""Bytes of a key, and of a checksum."""


class Damage(Exception):
    """A row that is not what was written."""


def key_of(*parts: str | int | bool) -> bytes:
    """Bytes that differ wherever a part, their number or this format differs."""
    return content_of(json.dumps([FORMAT_VERSION, *parts]).encode())[:KEY]


def _checksum(key: bytes, data: bytes) -> bytes:
    return content_of(key + data)[:KEY]


def arrow() -> tuple[Any, Any]:
    """The packages (datasets, pyarrow). Raises MissingPackage."""
    try:
        import datasets
        import pyarrow
    except ImportError:
        raise MissingPackage(
            "Pictures are kept by a package that is not installed: run `pip install datasets`."
        ) from None
    return datasets, pyarrow


def write_table(path: Path, columns: dict[str, Any], metadata: dict[bytes, bytes] | None = None) -> None:
    """An Arrow stream, in one go. columns: Arrow arrays by name."""
    _, pyarrow = arrow()
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    with (
        replacing(path) as temporary,
        pyarrow.OSFile(str(temporary), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)


def open_tables(paths: Iterable[Path]) -> Any:
    """Tables with the same columns as one Dataset, read in place; those that are damaged are left out. None for no
    rows."""
    datasets, pyarrow = arrow()
    from datasets.table import MemoryMappedTable, concat_tables

    found = []
    for path in paths:
        # Removed meanwhile, cut off, or no such file.
        with contextlib.suppress(OSError, ValueError, pyarrow.ArrowException):
            found.append(MemoryMappedTable.from_file(str(path)))
    found = [table for table in found if len(table)]
    # What it is made of needs no name of its own: working one out takes milliseconds a file.
    return datasets.Dataset(concat_tables(found), fingerprint="shards") if found else None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Arrow's reader of a table. Raises Damage where the file is cut off or of another kind."""
    _, pyarrow = arrow()
    try:
        with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as reader:
            yield reader
    except (OSError, pyarrow.ArrowException) as error:
        raise Damage from error


def fixed(chunks: list[Any]) -> np.ndarray:
    """Chunks of an Arrow column of so many bytes as an array; of one chunk no copy."""
    kind = np.dtype(f"V{chunks[0].type.byte_width}" if chunks else f"V{KEY}")
    parts = [np.frombuffer(c.buffers()[1], kind, len(c), c.offset * kind.itemsize) for c in chunks if len(c)]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, kind)


def beginnings(column: Any) -> np.ndarray:
    """The first eight bytes of each key of an Arrow column: enough to find a row, whose key is compared when read."""
    parts = [fixed([part]).view(np.uint64).reshape(-1, KEY // 8)[:, 0].copy() for part in column.chunks if len(part)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


class ShardStore:
    """Dictionaries of tensors by key, in the files of a folder, to which several processes may add.

    A row holds its key and a checksum, so that a damaged one is noticed. Where a key was written twice, the later one
    counts. beside: a store whose rows are taken over where this one lacks them.
    """

    def __init__(self, folder: Path, beside: "ShardStore | None" = None):
        self.folder, self.beside = folder, beside
        self._waiting: dict[bytes, bytes] = {}
        self._bytes, self._since = 0, time.monotonic()
        self.refresh()

    def refresh(self) -> None:
        """See what other processes have written meanwhile."""
        # Names begin with the time.
        self._table = open_tables(sorted(self.folder.glob(f"*{_ENDING}")))
        there = np.empty(0, np.uint64) if self._table is None else beginnings(self._table.data.column("key"))
        self._order = np.argsort(there, kind="stable")
        self._sorted = there[self._order]

    # Reading ----------------------------------------------------------------------------------------------------

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """The rows of keys, [N]; -1 for those that are not there. wanted: their beginnings."""
        if not len(self._sorted):
            return np.full(len(wanted), -1)
        last = np.searchsorted(self._sorted, wanted, side="right") - 1
        return np.where((last >= 0) & (self._sorted[last] == wanted), self._order[last], -1)

    def read(self, rows: list[int], keys: list[bytes]) -> list[dict[str, Tensor]]:
        """The tensors as they are stored. keys: which they are to be of. Raises Damage."""
        if not rows:
            return []
        try:
            found = self._table[rows]
        except (OSError, LookupError, ValueError) as error:
            raise Damage from error
        tensors = []
        for wanted, key, checksum, data in zip(keys, found["key"], found["sha256"], found["tensors"]):
            if key != wanted or _checksum(key, data) != checksum:
                raise Damage
            tensors.append(load(data))
        return tensors

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The tensors of one key, or None where they are missing or damaged."""
        if key in self._waiting:
            return load(self._waiting[key])
        (row,) = self.find(np.frombuffer(key[:8], np.uint64))
        if row >= 0:
            with contextlib.suppress(Damage):
                return self.read([int(row)], [key])[0]
        found = self.beside.get(key) if self.beside else None
        return None if found is None else self.add(key, found)

    # Writing ----------------------------------------------------------------------------------------------------

    def add(self, key: bytes, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keeps tensors, fp32 as fp16 unless a value overflows; on disk after `flush`. Returns what is kept."""
        kept = {name: compact(tensor) for name, tensor in tensors.items()}
        self.add_saved(key, save(kept))
        return kept

    def add_saved(self, key: bytes, data: bytes) -> None:
        """data: tensors as safetensors holds them."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting[key] = data
        self._bytes += len(data)

    @property
    def due(self) -> bool:
        """Whether enough waits for a file."""
        late = bool(self._waiting) and time.monotonic() - self._since > SHARD_SECONDS
        return late or len(self._waiting) >= SHARD or self._bytes >= SHARD_BYTES

    def flush(self) -> None:
        """Writes what waits, as one file. Raises OSError."""
        if not self._waiting:
            return
        _, pyarrow = arrow()
        keys, data = list(self._waiting), list(self._waiting.values())
        columns = {
            "key": pyarrow.array(keys, pyarrow.binary(KEY)),
            "sha256": pyarrow.array(
                [_checksum(key, value) for key, value in self._waiting.items()], pyarrow.binary(KEY)
            ),
            "tensors": pyarrow.array(data, pyarrow.large_binary()),
        }
        write_table(self.folder / f"{time.time_ns():020}-{uuid.uuid4().hex[:8]}{_ENDING}", columns)
        self._waiting.clear()
        self._bytes = 0

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What was added in the block is on disk after it, also where it was interrupted."""
        try:
            yield
        finally:
            self.flush()
            self.refresh()
