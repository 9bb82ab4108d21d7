"""Files that are never half written."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # No longer than the shortest name, so that what a file system takes as a name can be written, too.
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # A write names no file, and nobody knows the temporary one; of an error in words alone a name would hide them.
        if error.errno is not None and (error.filename is None or Path(error.filename) == temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
