"""Files under the next free number of a name: nothing that exists is written over."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ..maskunet_core.errors import MaskUNetError


@dataclass(frozen=True)
class NumberedFiles:
    """A folder whose files have names that people choose, and numbers.

    root: gives the folder. place, input_name: how messages call the folder, and the input with the name. usual: the
    name where none is given. unwritable: what to do where the folder cannot be written to.
    """

    root: Callable[[], str]
    place: str
    input_name: str
    usual: str
    unwritable: str

    def _mend(self, number: int | None) -> str:
        """What to do about an error of the system."""
        mends = {
            errno.ENAMETOOLONG: f"Choose a shorter {self.input_name}.",
            errno.ENOSPC: "Free some space on that disk.",
            errno.EDQUOT: "Free some of the space that you may use on that disk.",
            errno.EACCES: self.unwritable,
            errno.EROFS: self.unwritable,
        }
        return mends.get(number, f"Choose another name or folder by {self.input_name}.")

    def named(self, text: str) -> str:
        """The name that somebody typed, or the usual one."""
        name = text.replace("\0", "").strip()
        return name if name.strip("./\\ ") else self.usual

    def require_inside(self, name: str) -> None:
        """Raises MaskUNetError for a name outside of the folder."""
        root = self.root()
        if not Path(os.path.abspath(Path(root, name))).is_relative_to(os.path.abspath(root)):
            raise MaskUNetError(
                f"{self.input_name} '{name}' lies outside {self.place}. Give a name inside of it, such as {self.usual}."
            )

    def save(self, what: str, name: str, write: Callable[[Path], None]) -> Path:
        """Writes to the path of the next free number, and returns it. what: "The masks". Raises MaskUNetError."""
        try:
            self.require_inside(name)
            folder, stem, number, _, _ = folder_paths.get_save_image_path(name, self.root())
            path = _reserved(Path(folder), stem, number)
            try:
                write(path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise MaskUNetError(
                f"{what} cannot be saved as '{name}' in {self.place} ({error.strerror or error}). "
                f"{self._mend(error.errno)}"
            ) from None
        return path


def _reserved(folder: Path, name: str, number: int) -> Path:
    """An empty file with the first free number from `number` on, which no other server can take any more."""
    while True:
        path = folder / f"{name}_{number:05}_.safetensors"
        try:
            path.open("x").close()
        except FileExistsError:
            number += 1
        else:
            return path
