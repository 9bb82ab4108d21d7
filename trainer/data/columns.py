"""Records in tables: parquet files and Hugging Face data sets on disk, in the form of laion-art.

`datasets`, which brings `pyarrow`, is imported late: who trains on plain files does without it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .decoding import Record
from .listing import Listing
from .places import arrow_source, reaching
from .problems import Problems

if TYPE_CHECKING:
    import pyarrow

PICTURE_COLUMN = "image"
ROWS_AT_ONCE = 16  # of pictures, in memory


def parquet_records(files: dict[str, Path], caption_names: tuple[str, ...], problems: Problems) -> Sequence[Record]:
    """The rows of all files. files: {name for messages: path}."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        _tell_missing_package(next(iter(files)), problems)
        return []
    pictures, records = _ParquetPictures(), Listing()
    for name, path in files.items():
        try:
            with ParquetFile(arrow_source(path)) as file:
                column = _caption_column(file.schema_arrow, name, caption_names, problems)
                captions = file.read(columns=[column]).column(0).to_pylist() if column else []
        except (OSError, ValueError) as error:
            sentence = f"'{name}' is not a readable parquet file ({error}): copy or download it again."
            problems.add("Damaged parquet files", sentence)
            continue
        _add_rows(records, name, captions, partial(pictures.read, path), problems)
    return records


def disk_records(folder: Path, caption_names: tuple[str, ...], problems: Problems) -> Sequence[Record]:
    """The rows of a data set that `save_to_disk` wrote; of one with splits, those of "train"."""
    try:
        import datasets
    except ImportError:
        _tell_missing_package(folder, problems)
        return []
    try:
        data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:
        sentence = f"'{folder}' is not a readable Hugging Face data set ({error}): copy or save it again."
        problems.add("Damaged data sets", sentence)
        return []
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            sentence = f"'{folder}' has no split 'train', only {', '.join(data)}: name the folder of one of them."
            problems.add("Missing splits", sentence)
            return []
        data = data["train"]
    column = _caption_column(data.features.arrow_schema, str(folder), caption_names, problems)
    if column is None:
        return []
    data = data.with_format(None)
    pictures = data.select_columns([PICTURE_COLUMN])
    if isinstance(pictures.features[PICTURE_COLUMN], datasets.Image):
        pictures = pictures.cast_column(PICTURE_COLUMN, datasets.Image(decode=False))
    captions = data.select_columns([column])[:][column]
    records = Listing()
    _add_rows(records, folder.name, captions, lambda row: _bytes_of(pictures[row][PICTURE_COLUMN], folder), problems)
    return records


def _tell_missing_package(name: str | Path, problems: Problems) -> None:
    sentence = f"To read '{name}', a package is needed that is not installed: run `pip install datasets`."
    problems.add("Missing packages", sentence)


def _caption_column(
    schema: "pyarrow.Schema", name: str, caption_names: tuple[str, ...], problems: Problems
) -> str | None:
    """The caption column; None where it or the picture column is missing, which is told."""
    found = next((column for column in caption_names if column in schema.names), None)
    if found is not None and _holds_pictures(schema):
        return found
    wanted, columns = "' or '".join(caption_names), ", ".join(f"{field.name} ({field.type})" for field in schema)
    problems.add(
        "Tables without the needed columns",
        f"'{name}' needs a column '{PICTURE_COLUMN}' with the bytes of picture files and a caption column "
        f"('{wanted}'; another is set as data.caption_column), but has {columns}.",
    )
    return None


def _holds_pictures(schema: "pyarrow.Schema") -> bool:
    """Bytes, or a struct with the field `bytes`, as `datasets` stores pictures."""
    if PICTURE_COLUMN not in schema.names:
        return False
    kind = schema.field(PICTURE_COLUMN).type
    if str(kind).startswith("struct<"):
        kind = next((field.type for field in kind if field.name == "bytes"), None)
    return str(kind) in ("binary", "large_binary", "binary_view")


def _add_rows(
    records: Listing, name: str, captions: list[Any], read: Callable[[int], bytes], problems: Problems
) -> None:
    reader = records.reader(lambda row, _: read(row))
    for row, caption in enumerate(captions):
        if isinstance(caption, str):
            records.add(f"{name} row {row}", caption.strip(), reader, (row, 0))
        else:
            problems.add("Rows without captions", f"Row {row} of '{name}' has no caption: write one or remove the row.")


def _bytes_of(value: Any, folder: Path) -> bytes:
    """Of a cell: bytes, {"bytes", "path"} with either of them missing, or nothing. folder: of the table, from which
    paths start; one that leads nowhere from there starts from the working folder."""
    if not isinstance(value, dict):
        return value or b""
    if value.get("bytes") is None and value.get("path"):
        beside = folder / value["path"]
        return (beside if beside.is_file() else Path(value["path"])).read_bytes()
    return value.get("bytes") or b""


class _ParquetPictures:
    """Reads pictures of parquet files, a few rows in memory at a time: quick where rows are asked for in order."""

    def __init__(self):
        self._path: Path | None = None
        self._batches: Iterator[Any] = iter(())
        self._first, self._rows = 0, []

    def read(self, path: Path, row: int) -> bytes:
        """The picture file's bytes in this row, counted from 0."""
        with reaching(path):
            if path != self._path or row < self._first:
                self._open(path, row)
            while row >= self._first + len(self._rows):
                rows = next(self._batches).column(0)
                self._first, self._rows = self._first + len(self._rows), rows
            return _bytes_of(self._rows[row - self._first].as_py(), path.parent)

    def _open(self, path: Path, row: int) -> None:
        """From the row group on that holds the row."""
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(arrow_source(path))
        first = group = 0
        while row >= first + file.metadata.row_group(group).num_rows:
            first += file.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, file.num_row_groups))
        self._batches = file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[PICTURE_COLUMN])
        self._path, self._first, self._rows = path, first, []
