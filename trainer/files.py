"""Files of a person, none of which is replaced without being asked."""

import errno
import os
import re
from pathlib import Path

from maskunet_core.errors import MaskUNetError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a full disk, and of a quota that is used up."""
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp")


class Occupied(MaskUNetError):
    """A file lies where another is to be written."""


def user_path(text: str) -> Path:
    """With `~` for the user's home. A name of no user's stays as it is, where `Path.expanduser` raises."""
    return Path(os.path.expanduser(text))


def remove_unfinished(folder: Path) -> None:
    """Removes what `replacing` left where a process was killed. No other process may be writing into the folder."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


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
