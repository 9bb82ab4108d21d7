"""What the C library does with memory that is freed; nothing happens where it is not glibc.

Fresh pages from the kernel may take half of a step's time, and most of what two equal steps differ by. Where freed
memory stays, though, a peak also holds the gaps in which nothing fits.
"""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Names of `mallopt`."""
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**17, _TRIM_THRESHOLD: 2**17}
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}


def _glibc() -> Any:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


def _set(options: dict[int, int]) -> None:
    if glibc := _glibc():
        for name, value in options.items():
            glibc.mallopt(name, value)


def keep_freed_memory() -> None:
    """From now on, for the life of the process, freed memory stays with it for the next step."""
    _set(_KEEPING)


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, large blocks go back to the system as soon as they are freed, and what was kept before does so first.

    So a peak in it is one of what is used: the size from which a block is large would otherwise have grown with
    what was freed before. Afterwards freed memory is kept.
    """
    _set(_USUAL)
    gc.collect()
    if glibc := _glibc():
        glibc.malloc_trim(0)
    try:
        yield
    finally:
        keep_freed_memory()
