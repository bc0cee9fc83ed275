"""What users say in numbers, made exact: sizes, and ids of blocks."""

import operator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_BLOCKS", "at_least", "block_ids"]

MAX_BLOCKS = int(np.iinfo(np.int32).max)
"""Block ids are int32."""


def at_least(minimum: int, name: str, value: Any) -> int:
    """``value`` as an ``int``, if it is a whole number of at least ``minimum``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def block_ids(blocks: npt.ArrayLike, total: int) -> npt.NDArray[np.int32]:
    """``blocks`` as int32 ``[n]``, if they are whole numbers from 0 to ``total`` − 1."""
    ids = np.asarray(blocks)
    if ids.size == 0 and not isinstance(blocks, np.ndarray):
        ids = ids.astype(np.int32)  # an empty list came out as float64
    if ids.dtype.kind not in "iu":
        raise TypeError(f"block ids must be whole numbers, got dtype {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"block ids must have one axis, got shape {ids.shape}")
    if len(ids) and (ids.min() < 0 or ids.max() >= total):
        wrong = ids[(ids < 0) | (ids >= total)][0]
        raise ValueError(f"a block id must be from 0 to {total - 1}, got {wrong}")
    return ids.astype(np.int32, copy=False)
