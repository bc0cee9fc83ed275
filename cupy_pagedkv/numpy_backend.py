"""The NumPy backend: the fallback where there is no GPU, and the oracle that the kernels are tested against."""

from typing import Any

import numpy as np

__all__ = ["HostArrays", "NumpyBackend"]

_Array = np.ndarray[Any, np.dtype[Any]]


def _opaque(tokens: _Array, pool: _Array) -> tuple[_Array, _Array]:
    """Views of both whose items NumPy moves as bytes: a whole row each where both have rows in one piece.

    ``tokens`` is ``[num_tokens, heads, dim]`` and ``pool`` ``[num_blocks, block_size, heads, dim]``; rows in one piece
    make views without the last two axes. Other dtypes would go item by item, and structured ones lose their padding.
    """
    heads, dim = tokens.shape[1:]
    item = tokens.itemsize
    whole = all(
        (dim == 1 or array.strides[-1] == item) and (heads == 1 or array.strides[-2] == dim * item)
        for array in (tokens, pool)
    )
    if not whole:
        return tokens.view(f"V{item}"), pool.view(f"V{item}")
    row = heads * dim
    return (
        tokens.reshape(len(tokens), row).view(f"V{row * item}")[:, 0],
        pool.reshape(*pool.shape[:2], row).view(f"V{row * item}")[:, :, 0],
    )


class HostArrays:
    """Arrays in host memory, where NumPy and the emulated device work; ``device`` is always ``"cpu"``."""

    ndarray: type = np.ndarray

    def device_name(self, array: _Array) -> str:
        return "cpu"

    def asnumpy(self, array: _Array) -> _Array:
        return array

    def synchronize(self) -> None:
        pass

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> _Array:
        return np.zeros(shape, dtype)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> _Array:
        return np.empty(shape, dtype)

    def from_numpy(self, array: _Array, device: str) -> _Array:
        return array


class NumpyBackend(HostArrays):
    """The operations by NumPy's own indexing."""

    name = "numpy"
    checks_indices = True

    def reshape_and_cache(
        self, key: _Array, value: _Array, k_cache: _Array, v_cache: _Array, slot_mapping: _Array
    ) -> None:
        written = slot_mapping >= 0  # a negative index would be a place counted from the end
        some_skipped = not written.all()
        blocks, offsets = np.divmod(slot_mapping[written] if some_skipped else slot_mapping, k_cache.shape[1])
        for tokens, pool in ((key, k_cache), (value, v_cache)):
            rows, slots = _opaque(tokens, pool)
            slots[blocks, offsets] = rows[written] if some_skipped else rows

    def gather_cache(
        self,
        key: _Array,
        value: _Array,
        k_cache: _Array,
        v_cache: _Array,
        block_tables: _Array,
        seq_lens: _Array,
        seq_starts: _Array | None,
    ) -> None:
        """Fill ``key`` and ``value``, which have as many rows as the lengths say."""
        starts = np.zeros_like(seq_lens) if seq_starts is None else seq_starts
        counts = seq_lens - starts
        first_rows = np.cumsum(counts) - counts
        positions = np.arange(len(key)) + np.repeat(starts - first_rows, counts)
        columns, offsets = np.divmod(positions, k_cache.shape[1])
        blocks = block_tables[np.repeat(np.arange(len(counts)), counts), columns]
        for tokens, pool in ((key, k_cache), (value, v_cache)):
            rows, slots = _opaque(tokens, pool)
            rows[...] = slots[blocks, offsets]
