"""Files of `torch.save`: never half written, read without running anything in them, errors of one kind."""

from pathlib import Path
from typing import Any

import torch

from .errors import MaskUNetError
from .replacing import replacing


class Damaged(MaskUNetError):
    """A file that is cut off, or holds more than tensors and plain values. reason: in torch's words."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"'{path}' is damaged ({reason}). Remove it, or put a whole copy in its place.")
        self.reason = reason


def write_torch(path: Path, content: Any) -> None:
    """Raises OSError, also where the disk is full, for which torch has an error of its own."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            cause = error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, cause.strerror, str(path)) from None


def read_torch(path: Path) -> Any:
    """The content, its tensors on the CPU. Raises OSError and Damaged."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Damaged(path, reason) from None
