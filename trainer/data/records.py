"""What a user may name as data: a folder of pictures, a Hugging Face data set, parquet files, webdataset shards."""

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .columns import disk_records, parquet_records
from .decoding import Record
from .folders import PICTURES, folder_records
from .problems import BadData, Problems
from .shards import shard_records

ON_DISK = ("dataset_dict.json", "dataset_info.json", "state.json")
CHOICE = "a folder of pictures, a Hugging Face data set on disk, .parquet files or .tar shards"
CAPTION_NAMES = ("text", "caption", "TEXT")


@dataclass(frozen=True)
class Scan:
    """records: what can be used, in an order that is the same on every system; problems: a sentence each."""

    records: list[Record]
    problems: list[str]

    def require(self) -> list[Record]:
        """The records. Raises BadData with all problems, a line each."""
        if self.problems:
            raise BadData("\n".join(self.problems))
        return self.records


def scan(path: str | Path, caption_column: str = "") -> Scan:
    """Looks through a data set without decoding a picture, and finds all its problems at once.

    path: a folder of pictures, each with its caption in NAME.txt beside it or in a `metadata.jsonl` (fields
    `file_name` and `text` or `caption`); a data set that `datasets` saved to disk (of several splits, "train");
    parquet files (columns `image`, and `text`, `caption` or `TEXT`); webdataset shards (.tar); or a folder of either.
    caption_column: the captions' column or field, where it has another name.
    """
    path, problems = Path(path).expanduser(), Problems()
    names = (caption_column,) if caption_column else CAPTION_NAMES
    records = _records(path, names, problems)
    if not records and not problems:
        problems.add("Empty", f"'{path}' holds no pictures: name {CHOICE}.")
    return Scan(records, problems.sentences())


def _records(path: Path, caption_names: tuple[str, ...], problems: Problems) -> list[Record]:
    if not path.exists():
        problems.add("Missing", f"'{path}' does not exist: name {CHOICE}.")
        return []
    if any((path / mark).is_file() for mark in ON_DISK):
        return disk_records(path, caption_names, problems)
    files = _files_below(path) if path.is_dir() else {path.name: path}
    pictures, shards, tables = (_ending(files, endings) for endings in (PICTURES, ("tar",), ("parquet",)))
    if path.is_file() and not shards and not tables:
        problems.add("Unknown", f"'{path}' is a file of a kind that holds no data set: name {CHOICE}.")
        return []
    if pictures and (shards or tables):
        other = next(iter(shards or tables))
        problems.add("Mixed", f"'{path}' holds both pictures and '{other}': name a folder with only one of them.")
        return []
    # Tools that write shards put tables of their own beside them, so that shards come first.
    if shards:
        return shard_records(shards, caption_names, problems)
    if tables:
        return parquet_records(tables, caption_names, problems)
    if not pictures:
        problems.add("Empty", f"'{path}' holds no pictures ({', '.join(PICTURES)}), .parquet files or .tar shards.")
    return folder_records(files, pictures, caption_names, problems)


def _files_below(folder: Path) -> dict[str, Path]:
    """{path relative to the folder, with slashes: path}, sorted by code points; hidden files and folders left out."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: found[name] for name in sorted(found) if not any(part.startswith(".") for part in name.split("/"))}


def _ending(files: dict[str, Path], endings: Iterable[str]) -> dict[str, Path]:
    return {name: path for name, path in files.items() if posixpath.splitext(name)[1][1:].lower() in endings}
