"""Files that are never half written, and none of a person's that is replaced without being asked."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from maskunet_core.errors import MaskUNetError


class Occupied(MaskUNetError):
    """A file lies where another is to be written."""


def user_path(text: str) -> Path:
    """With `~` for the user's home. A name of no user's stays as it is, where `Path.expanduser` raises."""
    return Path(os.path.expanduser(text))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_free(path: Path, overwrite: bool) -> None:
    """To be asked before the work whose result goes to `path`. Raises Occupied."""
    if path.is_dir():
        raise Occupied(f"'{path}' is a folder: name a file to write by --output, for instance '{path / 'result'}'.")
    if path.exists() and not overwrite:
        raise Occupied(f"'{path}' exists: name another file or folder, or replace it by --overwrite.")


def require_folder(path: Path) -> None:
    """Raises Occupied where a file lies in the folder's place, or in that of one above it."""
    for part in (path, *path.parents):
        if part.is_file():
            raise Occupied(f"'{part}' is a file, so that '{path}' cannot be a folder: name another one.")


def free_path(path: Path) -> Path:
    """`path`, or with the first number behind its name that no file has: samples.png, samples_2.png and so on."""
    found, number = path, 2
    while found.exists():
        found, number = path.with_name(f"{path.stem}_{number}{path.suffix}"), number + 1
    return found
