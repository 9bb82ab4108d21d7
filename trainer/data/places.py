"""Where a data set lies: on this machine, or behind an address such as `s3://bucket/folder` or `hf://datasets/...`.

Whatever `fsspec` opens is read in place: object stores, hubs, web servers. `universal_pathlib` gives their files the
methods of a Path, so that what reads a data set need not know where it is.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskunet_core.errors import MaskUNetError
from maskunet_core.training.data import BadData

from ..files import user_path

_MARKS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")
"""What file systems call the state of a file: a hash, or the time of its last change."""


class Unreachable(BadData):
    """An address that cannot be opened, or not now."""


def place_of(text: str | Path) -> Path:
    """A Path, or for an address what has its methods. Raises Unreachable where no package opens it."""
    if not is_address(text):
        return user_path(str(text))
    with reaching(text):
        try:
            from upath import UPath
        except ImportError:
            raise Unreachable(
                f"To read '{text}', a package is needed that is not installed: run `pip install universal_pathlib`."
            ) from None
        return UPath(str(text))


def is_address(place: str | Path) -> bool:
    """Also of a file system within another, as in `simplecache::s3://`; not of a drive, which has one letter."""
    return re.match(r"[A-Za-z][\w+.-]+(::[\w+.-]+)*://", str(place)) is not None


@contextlib.contextmanager
def reaching(place: str | Path) -> Iterator[None]:
    """A block in which errors of every kind, as packages of file systems raise them, become Unreachable; for paths
    of this machine it changes nothing."""
    try:
        yield
    except MaskUNetError:
        raise
    except Exception as error:
        if not is_address(place):
            raise
        reason = str(error).rstrip(".") or type(error).__name__
        raise Unreachable(
            f"'{place}' cannot be read ({reason}): mend the address, its package, your key or the network, and start "
            "again; what is encoded is kept."
        ) from None


def remote_files(folder: Path) -> dict[str, Path]:
    """{name from the folder on: file} behind an address, sorted; hidden ones are left out."""
    return {name: folder / name for name in sorted(_found(folder)) if name}


def remote_state(place: Path) -> Iterator[str]:
    """For each file its name, size and state."""
    for name, told in sorted(_found(place).items()):
        yield "\0".join([name, str(told.get("size")), *(str(told[mark]) for mark in _MARKS if mark in told)])


def _found(place: Path) -> dict[str, dict[str, Any]]:
    """What is known of all files below a folder, or of a file, whose name is ""."""
    found, root = place.fs.find(place.path, detail=True), place.path.rstrip("/")
    names = {path: path.removeprefix(root).lstrip("/") for path in found}
    return {name: found[path] for path, name in names.items() if not any(p.startswith(".") for p in name.split("/"))}


def read_file(file: Path) -> bytes:
    with reaching(file):
        return file.read_bytes()


def read_span(file: Path, offset: int, size: int) -> bytes:
    """Some bytes of a file. Behind an address it stays open, so that neighbours, which come next, are fetched along."""
    with reaching(file):
        if is_address(file):
            return _span(_kept_open(file), offset, size)
        with file.open("rb") as opened:
            return _span(opened, offset, size)


def arrow_source(file: Path) -> Any:
    """What Arrow reads the file from."""
    return file.open("rb") if is_address(file) else file


@functools.lru_cache(1)
def _kept_open(file: Path) -> Any:
    return file.open("rb")


def _span(opened: Any, offset: int, size: int) -> bytes:
    opened.seek(offset)
    return opened.read(size)
