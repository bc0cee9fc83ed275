"""What the operations' arguments are made into: arrays of indices, where they are needed, and checked.

The checks of values need them on the host: where they are not, a backend waits for its stream.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..bookkeeping.ranges import ranges
from ..devices.backend import Backend
from ..devices.dlpack import array_of

__all__ = [
    "Array",
    "IndexArray",
    "all_below",
    "asnumpy",
    "check_aligned",
    "check_blocks",
    "check_writeable",
    "indices",
    "on_device",
]

Array: TypeAlias = Any
"""A NumPy or CuPy array, or one that speaks DLPack, such as PyTorch's."""

IndexArray: TypeAlias = Any
"""A list, an array in host memory, or an array where the pools are; int32 or int64."""

_INDEX_DTYPES = frozenset((np.dtype(np.int32), np.dtype(np.int64)))

_WIDE = 2**16  # entries of block tables, to look at which takes as long as to find out which are needed


def indices(name: str, values: IndexArray, ndim: int, backend: Backend, pool: Array) -> Array:
    """``values`` as an array of int32 or int64: as it is where the pools are, else a NumPy array."""
    array = values
    if type(array) is not backend.ndarray:
        array = _index_array(name, array_of(name, array), ndim, backend)
    if isinstance(array, backend.ndarray) and not backend.same_device(array, pool):
        raise ValueError(f"{name} must be where the pools are, on {pool.device}, got one on {array.device}")
    if array.dtype not in _INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} {'axis' if ndim == 1 else 'axes'}, got shape {array.shape}")
    return array


def _index_array(name: str, values: Any, ndim: int, backend: Backend) -> Array:
    if isinstance(values, np.ndarray):
        return np.asarray(values)  # of a masked array all it holds: where a slot is hidden, a token would go astray
    if isinstance(values, backend.ndarray):
        return values
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{name} must be a list (rows of one length), a NumPy array or an array where the pools are: {error}"
        ) from None
    if array.size == 0:  # an empty list came out as float64 [0]
        array = array.astype(np.int64).reshape(array.shape if array.ndim == ndim else (0,) * ndim)
    return array


def asnumpy(array: Array, backend: Backend) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else backend.asnumpy(array)


def on_device(array: Array, backend: Backend, pool: Array) -> Array:
    return array if isinstance(array, backend.ndarray) else backend.from_numpy(array, pool.device)


def check_aligned(name: str, array: Array, backend: Backend) -> None:
    """For arithmetic, which a GPU does on elements; copies move bytes, wherever they lie."""
    if not backend.is_aligned(array):
        raise ValueError(f"the elements of {name}, {array.dtype}, must lie at multiples of {array.itemsize} bytes")


def check_writeable(name: str, array: Array) -> None:
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array")


def all_below(end: int, indices: npt.NDArray[Any]) -> bool:
    """Whether all are in 0 … ``end`` − 1."""
    if indices.size == 0:
        return True
    # Negative numbers become the greatest, and argmax() takes less time than max() where there are few.
    unsigned = indices.view(np.uint64 if indices.itemsize == 8 else np.uint32)
    return bool(unsigned.item(unsigned.argmax()) < min(end, 2 ** (8 * indices.itemsize - 1)))


def check_blocks(
    tables: npt.NDArray[Any],
    lens: npt.NDArray[Any],
    starts: npt.NDArray[Any] | None,
    num_blocks: int,
    block_size: int,
) -> None:
    if tables.size < _WIDE and all_below(num_blocks, tables):
        return
    # Only what a sequence needs has to be a block of the pool. Where one is long, most of a table is padding.
    first = np.zeros_like(lens) if starts is None else starts // block_size
    counts = -(-lens // block_size) - first
    if starts is not None:
        counts[starts >= lens] = 0
    columns = ranges(first, counts)
    needed = tables[np.repeat(np.arange(len(lens)), counts), columns]
    if not all_below(num_blocks, needed):
        wrong = int(np.argmax((needed < 0) | (needed >= num_blocks)))
        i, column = int(np.searchsorted(np.cumsum(counts), wrong, "right")), columns[wrong]
        start = 0 if starts is None else starts[i]
        raise IndexError(
            f"block_tables[{i}, {column}] is {needed[wrong]}, but the pool has blocks 0 to {num_blocks - 1}; "
            f"sequence {i} needs it for positions {start} to {lens[i] - 1}"
        )
