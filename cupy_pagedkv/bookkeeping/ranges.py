"""Many ranges in one array."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ranges", "runs_of"]


def ranges(starts: npt.NDArray[np.integer[Any]], counts: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """``starts[i]``, ``starts[i] + 1``, … ``starts[i] + counts[i] − 1`` for each i, one behind the other.

    >>> ranges(np.array([5, 0]), np.array([2, 3]))
    array([5, 6, 0, 1, 2])
    """
    first = np.cumsum(counts, dtype=np.int64) - counts
    values: npt.NDArray[np.int64] = np.repeat(starts - first, counts)
    values += np.arange(len(values))
    return values


def runs_of(values: npt.NDArray[np.integer[Any]]) -> Iterator[slice]:
    """Where each value is the one before it plus 1.

    >>> list(runs_of(np.array([3, 4, 5, 9, 2])))
    [slice(0, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    bounds = [0, *(np.flatnonzero(np.diff(values) != 1) + 1).tolist(), len(values)] if len(values) else []
    return (slice(first, last) for first, last in pairwise(bounds))
