"""Many ranges in one array."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ranges"]


def ranges(starts: npt.NDArray[np.integer[Any]], counts: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """``starts[i]``, ``starts[i] + 1``, … ``starts[i] + counts[i] − 1`` for each i, one behind the other.

    >>> ranges(np.array([5, 0]), np.array([2, 3]))
    array([5, 6, 0, 1, 2])
    """
    first = np.cumsum(counts, dtype=np.int64) - counts
    values: npt.NDArray[np.int64] = np.repeat(starts - first, counts)
    values += np.arange(len(values))
    return values
