"""What the C library does with memory that is freed; nothing happens where it is not glibc.

Fresh pages from the kernel may take half of a step's time, and most of what two equal steps differ by.
"""

import ctypes
import gc
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Names of `mallopt`."""


def _glibc() -> Any:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


def keep_freed_memory() -> None:
    """From now on, for the life of the process, freed memory stays with it for the next step."""
    if glibc := _glibc():
        glibc.mallopt(_MMAP_MAX, 0)
        glibc.mallopt(_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Now, once: so that the next step's peak is its own."""
    gc.collect()
    if glibc := _glibc():
        glibc.malloc_trim(0)
