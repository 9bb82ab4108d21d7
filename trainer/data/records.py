"""What a user may name as data: a folder of pictures, a Hugging Face data set, parquet files, webdataset shards."""

import hashlib
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maskunet_core.training.data import BadData

from .columns import disk_records, parquet_records
from .decoding import Record
from .folders import METADATA, PICTURES, folder_records
from .places import Unreachable, is_address, place_of, reaching, remote_files, remote_state
from .problems import Problems
from .shards import shard_records

ON_DISK = ("dataset_dict.json", "dataset_info.json", "state.json")
CHOICE = "a folder of pictures, a Hugging Face data set on disk, .parquet files or .tar shards"
CAPTION_NAMES = ("text", "caption", "TEXT")
TESTING = ("test", "testing", "validation", "valid", "val", "dev", "eval")


SAMPLE = 8
"""Files of a sample of shards or tables."""


@dataclass(frozen=True)
class Scan:
    """records: what can be used, in an order that is the same on every system; problems, notes: a sentence each, about
    what must be mended, and about what is left out. share: of the data that was looked at."""

    records: Sequence[Record]
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    share: float = 1.0

    @property
    def count(self) -> int:
        """Pictures, estimated where not all was looked at."""
        return round(len(self.records) / self.share)

    def require(self) -> Sequence[Record]:
        """The records. Raises BadData with all problems, a line each."""
        if self.problems:
            raise BadData("\n".join(self.problems))
        return self.records


def fingerprint(path: str | Path, caption_column: str) -> str:
    """SHA-256 of the names, sizes and times of all files of a data set; "" where there is none. Raises Unreachable."""
    path, digest = place_of(path), hashlib.sha256(caption_column.encode())
    with reaching(path):
        if not path.exists():
            return ""
        if is_address(path):
            for state in remote_state(path):
                digest.update(f"{state}\0".encode(errors="replace"))
            return digest.hexdigest()
    for file in _walk(path, frozenset()) if path.is_dir() else (path,):
        if file.exists():
            state = file.stat()
            digest.update(f"{file.relative_to(path)}\0{state.st_size}\0{state.st_mtime_ns}\0".encode(errors="replace"))
    return digest.hexdigest()


def scan(path: str | Path, caption_column: str = "", sample: bool = False) -> Scan:
    """Looks through a data set without decoding a picture, and finds all its problems at once.

    path: on this machine, or an address that `fsspec` opens, of a folder of pictures, each with its caption in NAME.txt
    beside it or in a `metadata.jsonl` (fields `file_name` and `text` or `caption`); a data set that `datasets` saved to
    disk (of several splits, "train"); parquet files (columns `image`, and `text`, `caption` or `TEXT`); webdataset
    shards (.tar); or a folder of either, of which splits that are there to test are left out where it holds several.
    caption_column: the captions' column or field, where it has another name. sample: of many shards or tables look into
    a few.
    """
    problems, names = Problems(), (caption_column,) if caption_column else CAPTION_NAMES
    try:
        path = place_of(path)
        with reaching(path):
            records, share = _records(path, names, problems, sample)
    except Unreachable as error:
        return Scan([], [str(error)], problems.notes)
    if not records and not problems:
        problems.add("Empty", f"'{path}' holds no pictures: name {CHOICE}.")
    return Scan(records, problems.sentences(), problems.notes, share)


def _sampled(files: dict[str, Path], problems: Problems) -> tuple[dict[str, Path], float]:
    """(files from the first to the last, their share of all by size)."""
    if len(files) <= 2 * SAMPLE:
        return files, 1.0
    names = list(files)
    chosen = {name: files[name] for name in (names[n * (len(names) - 1) // (SAMPLE - 1)] for n in range(SAMPLE))}
    sizes = [sum(path.stat().st_size for path in some.values()) for some in (chosen, files)]
    problems.notes.append(f"Looked into {SAMPLE} of {len(files):,} files ({', '.join(chosen)}).")
    return chosen, sizes[0] / max(sizes[1], 1)


def _records(
    path: Path, caption_names: tuple[str, ...], problems: Problems, sample: bool
) -> tuple[Sequence[Record], float]:
    """(the records, the share of the data that they are)."""
    if not path.exists():
        # Some file systems say so of a server that does not answer.
        lacks = "does not exist, or cannot be reached" if is_address(path) else "does not exist"
        problems.add("Missing", f"'{path}' {lacks}: name {CHOICE}.")
        return [], 1.0
    if any((path / mark).is_file() for mark in ON_DISK):
        return disk_records(path, caption_names, problems), 1.0
    if not path.is_dir():
        files = {path.name: path}
    else:
        files = remote_files(path) if is_address(path) else _files_below(path, problems)
    files = _of_training(files, problems)
    pictures, shards, tables = (_ending(files, endings) for endings in (PICTURES, ("tar",), ("parquet",)))
    if path.is_file() and not shards and not tables:
        problems.add("Unknown", f"'{path}' is a file of a kind that holds no data set: name {CHOICE}.")
        return [], 1.0
    if pictures and (shards or tables):
        other = next(iter(shards or tables))
        problems.add("Mixed", f"'{path}' holds both pictures and '{other}': name a folder with only one of them.")
        return [], 1.0
    # Tools that write shards put tables of their own beside them, so that shards come first.
    if shards:
        shards, share = _sampled(shards, problems) if sample else (shards, 1.0)
        return shard_records(shards, caption_names, problems), share
    if tables:
        tables, share = _sampled(tables, problems) if sample else (tables, 1.0)
        return parquet_records(tables, caption_names, problems), share
    if not pictures:
        problems.add("Empty", f"'{path}' holds no pictures ({', '.join(PICTURES)}), .parquet files or .tar shards.")
    return folder_records(files, pictures, caption_names, problems), 1.0


def _files_below(folder: Path, problems: Problems) -> dict[str, Path]:
    """{path relative to the folder, with slashes: path}, sorted by code points; hidden files and folders left out."""
    found: dict[str, Path] = {}
    dead = []
    for path in _walk(folder, frozenset()):
        name = path.relative_to(folder).as_posix()
        if not path.exists():
            dead.append(name)
            continue
        # macOS spells accents as letters of their own, captions and other systems do not.
        composed = unicodedata.normalize("NFC", name)
        found[name if composed in found else composed] = path
    problems.note("links that lead nowhere", dead, "Mend them where they are pictures or captions.")
    return {name: found[name] for name in sorted(found)}


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """Files below a folder, also behind links to folders, and links that lead nowhere. above: real paths of the folders
    on the way, so that a link to one of them ends there."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, above | {real})
        elif path.is_file() or (path.is_symlink() and not path.exists()):
            yield path


def _split_of(name: str) -> str:
    """ "train" or another split's name that a folder or the file's beginning says, or nothing."""
    first = re.split(r"[-_./]", name.lower(), maxsplit=1)[0] if name.endswith((".parquet", ".tar")) else ""
    folder = name.lower().partition("/")[0] if "/" in name else ""
    return next((word for word in (folder, first) if word in ("train", *TESTING)), "")


def _of_training(files: dict[str, Path], problems: Problems) -> dict[str, Path]:
    """Without the splits that are there to test, where another is named "train"."""
    splits = {name: _split_of(name) for name in files}
    # Whoever lists pictures in a file at the top has chosen them.
    if "train" not in splits.values() or METADATA in files:
        return files
    testing = [name for name, split in splits.items() if split in TESTING]
    problems.note("files of splits that are there to test", testing, "Name their folder or file to train on them.")
    return {name: path for name, path in files.items() if splits[name] not in TESTING}


def _ending(files: dict[str, Path], endings: Iterable[str]) -> dict[str, Path]:
    return {name: path for name, path in files.items() if posixpath.splitext(name)[1][1:].lower() in endings}
