"""A data set that is encoded: which picture has which latent and text, in a table on disk."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from maskunet_core.replacing import replacing
from maskunet_core.training.data import EMPTY, BadData, digest_of

from .store import KEY, Damage, ShardStore, arrow, beginnings, fixed, open_tables, reading, write_table

SKIPPED = b"skipped"
_AT_ONCE = 1000


class Rows:
    """Samples of a part of a data set, as they are collected. skipped: (name, reason) of each broken picture."""

    def __init__(self):
        self._columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        self.skipped: list[tuple[str, str]] = []

    def add(
        self, name: str, caption: str, content: bytes, shape: tuple[int, ...], keys: tuple[bytes, ...], text: bytes
    ):
        """keys: of the latents, upright and, with flips, mirrored; text: key."""
        values = name, caption, content, digest_of(content, caption), "x".join(map(str, shape)), keys[0], keys[-1], text
        for column, value in zip(self._columns.values(), values):
            column.append(value)

    def write(self, path: Path) -> None:
        """Raises OSError."""
        _, pyarrow = arrow()
        columns = {
            name: pyarrow.array(values, getattr(pyarrow, kind)(*size))
            for (name, values), (kind, *size) in zip(self._columns.items(), _COLUMNS.values())
        }
        write_table(path, columns, {SKIPPED: json.dumps(self.skipped).encode()})


_KEY = ("binary", KEY)
_COLUMNS = {
    "name": ("string",),
    "caption": ("string",),
    "content": ("binary", 32),
    "digest": ("int64",),
    "shape": ("string",),
    "latent": _KEY,
    "mirrored": _KEY,
    "text": _KEY,
}


def skipped_in(parts: list[Path]) -> list[tuple[str, str]]:
    """What was left out of parts."""
    found: list[tuple[str, str]] = []
    for part in parts:
        with reading(part) as reader:
            metadata = reader.schema.metadata
        found += [(name, reason) for name, reason in json.loads(metadata[SKIPPED])]
    return found


def captions_of(parts: list[Path]) -> tuple[np.ndarray, Callable[[np.ndarray], Iterator[tuple[bytes, str]]]]:
    """(the beginnings of the different captions' keys, (key, caption) of those with some numbers)."""
    table = open_tables(parts)
    keys, rows = np.unique(beginnings(table.data.column("text")), return_index=True)

    def captions(numbers: np.ndarray) -> Iterator[tuple[bytes, str]]:
        for first in range(0, len(numbers), _AT_ONCE):
            some = numbers[first : first + _AT_ONCE]
            found = table[rows[some].tolist()]
            yield from zip(found["text"], found["caption"])

    return keys, captions


class _Index:
    """What is kept in memory of a set: digests [N]; shapes of latents, and which a picture has; the beginnings of keys
    by column. Read part by part and not from mapped files, whose pages would stay in memory for this one use."""

    def __init__(self, parts: list[Path], columns: tuple[str, ...]):
        numbers: dict[str, int] = {}
        digests, shape_of, keys = [], [], {name: [] for name in columns}
        for part in parts:
            with reading(part) as reader:
                table = reader.read_all()
            digests.append(table.column("digest").to_numpy().copy())
            shapes = table.column("shape").combine_chunks().dictionary_encode()
            known = [numbers.setdefault(shape, len(numbers)) for shape in shapes.dictionary.to_pylist()]
            shape_of.append(np.array(known, np.int32)[shapes.indices.to_numpy()])
            for name, found in keys.items():
                found.append(beginnings(table.column(name)))
        self.digests, self.shape_of = np.concatenate(digests), np.concatenate(shape_of)
        self.keys = {name: np.concatenate(found) for name, found in keys.items()}
        self.shapes = [tuple(int(side) for side in shape.split("x")) for shape in numbers]


class DiskSamples:
    """Samples whose latents and texts lie in stores. empty: key of the empty caption; damaged: a file whose presence
    says that something has to be made anew."""

    on_disk = True

    def __init__(
        self, parts: list[Path], latents: ShardStore, texts: ShardStore, empty: bytes, mirrors: bool, damaged: Path
    ):
        self.mirrors, self._latents, self._texts, self._damaged = mirrors, latents, texts, damaged
        turns = ("latent", "mirrored") if mirrors else ("latent",)
        index = _Index(parts, (*turns, "text"))
        self.digests, self.shapes, self.shape_of = index.digests, index.shapes, index.shape_of
        self._latent_rows = np.stack([latents.find(index.keys[turn]) for turn in turns])
        self._text_rows = texts.find(index.keys["text"])
        self._table = open_tables(parts)
        self._latent_keys, self._text_keys = (self._table.select_columns(list(names)) for names in (turns, ("text",)))
        self._empty, self._empty_row = empty, int(texts.find(np.frombuffer(empty[:8], np.uint64))[0])

    @property
    def contents(self) -> np.ndarray:
        return fixed(self._table.data.column("content").chunks)

    @property
    def latents_are_there(self) -> bool:
        return bool((self._latent_rows >= 0).all())

    @property
    def texts_are_there(self) -> bool:
        return self._empty_row >= 0 and bool((self._text_rows >= 0).all())

    def names(self, rows: np.ndarray) -> list[str]:
        return self._table[rows.tolist()]["name"] if len(rows) else []

    def captions(self, rows: np.ndarray) -> list[str]:
        return self._table[rows.tolist()]["caption"] if len(rows) else []

    def latents(self, rows: np.ndarray, mirrored: np.ndarray) -> list[Tensor]:
        found = self._latent_keys[rows.tolist()]
        keys = [found["mirrored" if flip else "latent"][n] for n, flip in enumerate(mirrored.tolist())]
        return [one["latent"] for one in self._read(self._latents, self._latent_rows[mirrored.astype(int), rows], keys)]

    def texts(self, rows: np.ndarray) -> list[dict[str, Tensor]]:
        there = rows != EMPTY
        found = iter(self._text_keys[rows[there].tolist()]["text"] if there.any() else ())
        keys = [next(found) if row else self._empty for row in there.tolist()]
        return self._read(self._texts, np.where(there, self._text_rows[rows], self._empty_row), keys)

    def _read(self, store: ShardStore, rows: np.ndarray, keys: list[bytes]) -> list[dict[str, Tensor]]:
        try:
            return store.read(rows.tolist(), keys)
        except Damage:
            with replacing(self._damaged) as temporary:
                temporary.touch()
            raise BadData(
                f"A file in '{store.folder}' was damaged or removed meanwhile: start the run again, which makes it "
                "anew."
            ) from None
