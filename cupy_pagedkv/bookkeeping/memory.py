"""Host memory for large tables of which little is ever written."""

import mmap
from contextlib import suppress

import numpy as np
import numpy.typing as npt

__all__ = ["lazy_zeros"]

_HUGE = 2**22  # bytes, from which on NumPy asks for huge pages


def lazy_zeros(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeros that take memory where something else is written, a small page at a time.

    NumPy asks for huge pages, of which each of thousands of short rows would take one, as soon as one row is long.
    """
    if num_bytes < _HUGE or not hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux has it
        return np.zeros(num_bytes, np.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel that has no huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)
