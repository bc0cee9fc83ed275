"""Scatter and gather between packed tokens and paged pools, and copies of blocks, on NumPy and CuPy arrays alike.

>>> import numpy as np
>>> k_cache, v_cache = np.zeros((2, 4, 8, 1, 2), np.float32)
>>> key = value = np.array([[[1, 2]], [[3, 4]], [[5, 6]]], np.float32)
>>> reshape_and_cache(key, value, k_cache, v_cache, slot_mapping=[7, -1, 8])
>>> gathered, _ = gather_cache(k_cache, v_cache, block_tables=[[0, 1]], seq_lens=[9], seq_starts=[7])
>>> gathered.tolist()
[[[1.0, 2.0]], [[5.0, 6.0]]]

Here is every check that does not depend on the device; a backend may rely on them.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ..devices import backend as devices
from ..devices.backend import backend_of
from ..devices.dlpack import arrays_of, like
from ..devices.layout import layout_of, pools_of
from .arguments import Array, IndexArray, all_below, asnumpy, check_blocks, check_writeable, indices, on_device

__all__ = ["copy_blocks", "gather_cache", "reshape_and_cache", "scatter"]

# Names that errors give to arguments.
_OUT = ("out[0]", "out[1]")
_POOLS = ("k_cache", "v_cache")
_GATHERED = (*_OUT, *_POOLS)


def reshape_and_cache(key: Array, value: Array, k_cache: Array, v_cache: Array, slot_mapping: IndexArray) -> None:
    """Write the K and V of new tokens to their slots, in place.

    key, value
        ``[num_tokens, num_kv_heads, head_dim]``, of any strides; ``value`` may have a ``head_dim`` of its own.
    k_cache, v_cache
        The pools, ``[num_blocks, block_size, num_kv_heads, head_dim]``, of the dtype of ``key`` and ``value``. Any
        strides with a contiguous last axis: an HND pool is ``pool.transpose(0, 2, 1, 3)``. They must not overlap
        ``key`` or ``value``. All four may have one more axis before the others, of layers.
    slot_mapping
        ``[num_tokens]``: token ``i`` goes to block ``slot // block_size``, offset ``slot % block_size``. A negative
        slot is padding, and nothing is written. Which of two tokens for one slot wins is undefined.

    Bytes are copied as they are. On a GPU the work is queued on CuPy's current stream, and a slot past the pool is
    skipped; no check reads the device. On NumPy such a slot is an ``IndexError``, raised before anything is written.
    ``CUPY_PAGEDKV_DEBUG=1`` brings that check to the GPU, and a ``ValueError`` for a slot that comes twice to both.

    Raises ``TypeError`` for arguments that are no arrays, for masked arrays, whose mask would be lost, for NumPy mixed
    with CuPy and for dtypes that do not agree;
    ``ValueError`` for shapes that do not agree, for two GPUs, and for pools that cannot be written.
    """
    scatter(("key", "value"), key, value, k_cache, v_cache, slot_mapping)


def scatter(
    names: tuple[str, str], key: Array, value: Array, k_cache: Array, v_cache: Array, slot_mapping: IndexArray
) -> None:
    """:func:`reshape_and_cache`, whose errors call ``key`` and ``value`` by ``names``."""
    all_names = (*names, *_POOLS)
    key, value, k_cache, v_cache = arrays_of(all_names, key, value, k_cache, v_cache)
    backend = backend_of(all_names, key, value, k_cache, v_cache)
    layout = layout_of(names, key, value, k_cache, v_cache)
    check_writeable("k_cache", k_cache)
    check_writeable("v_cache", v_cache)
    slots = indices("slot_mapping", slot_mapping, 1, backend, k_cache)
    num_tokens = layout.num_tokens
    if len(slots) != num_tokens:
        raise ValueError(f"slot_mapping must have one entry for each of {num_tokens} tokens, got {len(slots)}")
    if num_tokens == 0:
        return
    if backend.checks_indices or devices.DEBUG:
        _check_slots(asnumpy(slots, backend), layout.num_blocks * layout.block_size)
    backend.reshape_and_cache(key, value, k_cache, v_cache, on_device(slots, backend, k_cache), layout)


def gather_cache(
    k_cache: Array,
    v_cache: Array,
    block_tables: IndexArray,
    seq_lens: IndexArray,
    *,
    seq_starts: IndexArray | None = None,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Copy the K and V of sequences out of the pools: ``(key, value)``, packed in the order of the sequences.

    k_cache, v_cache
        The pools, as in :func:`reshape_and_cache`.
    block_tables
        ``[num_seqs, max_blocks]``. Only the entries that a sequence needs are looked at.
    seq_lens, seq_starts
        ``[num_seqs]``: of sequence ``i`` the positions ``seq_starts[i]`` … ``seq_lens[i] − 1`` are copied;
        ``seq_starts`` is all zeros by default. Host values, since the size of the result depends on them; with ``out``
        they may be arrays where the pools are.
    out
        ``(key, value)``, of at least as many rows as are copied and of any strides; further rows stay as they are.
        They must not overlap the pools. The tuple is returned. Without it both arrays are new:
        ``[sum(seq_lens − seq_starts), num_kv_heads, head_dim]``. Where the pools have an axis of layers before the
        others, so have these.

    On a GPU the work is queued on CuPy's current stream; with ``out`` and all indices on the device, nothing is
    allocated or transferred, and a CUDA graph can capture the call. Rows whose block is not in the pool come out as
    zeros there, and rows that ``out`` has no place for are dropped. On NumPy, and everywhere under
    ``CUPY_PAGEDKV_DEBUG=1``, such a block is an ``IndexError``, raised before anything is written.

    Raises ``TypeError`` and ``ValueError`` as :func:`reshape_and_cache` does, and ``ValueError`` for host lengths that
    are negative, below their start, beyond the table, or more than ``out`` holds.
    """
    given_pools, given_out = (k_cache, v_cache), out
    k_cache, v_cache = arrays_of(_POOLS, k_cache, v_cache)
    if out is None:
        backend = backend_of(_POOLS, k_cache, v_cache)
        pools = pools_of(k_cache, v_cache)
    else:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"out must be a tuple (key, value), got {type(out).__name__} {out!r:.40}")
        out = arrays_of(_OUT, *out)
        backend = backend_of(_GATHERED, *out, k_cache, v_cache)
        pools = layout = layout_of(_OUT, *out, k_cache, v_cache)
        check_writeable("out[0]", out[0])
        check_writeable("out[1]", out[1])
    tables = indices("block_tables", block_tables, 2, backend, k_cache)
    lens = indices("seq_lens", seq_lens, 1, backend, k_cache)
    starts = None if seq_starts is None else indices("seq_starts", seq_starts, 1, backend, k_cache)
    num_seqs = len(lens)
    if len(tables) != num_seqs or (starts is not None and len(starts) != num_seqs):
        name, got = ("block_tables", tables) if starts is None or len(tables) != num_seqs else ("seq_starts", starts)
        raise ValueError(f"{name} must have one entry for each of {num_seqs} seq_lens, got {len(got)}")

    num_rows = 0 if out is None else layout.num_tokens
    on_host = isinstance(lens, np.ndarray) and (starts is None or isinstance(starts, np.ndarray))
    if not on_host and out is None:
        raise TypeError(
            "seq_lens and seq_starts must be lists or NumPy arrays, since the size of the result depends on them; "
            "to keep them on the GPU, give out=(key, value)"
        )
    if on_host or devices.DEBUG:
        host_lens = asnumpy(lens, backend)
        host_starts = None if starts is None else asnumpy(starts, backend)
        total = _check_lengths(host_lens, host_starts, tables.shape[1] * pools.block_size)
        if out is not None and total > num_rows:
            raise ValueError(f"out has {num_rows} rows, but the sequences have {total} tokens to copy")
        if backend.checks_indices or devices.DEBUG:
            check_blocks(asnumpy(tables, backend), host_lens, host_starts, pools.num_blocks, pools.block_size)
        num_rows = total

    if out is None:
        key, value = (
            backend.empty((*pool.shape[:-4], num_rows, *pool.shape[-2:]), pool.dtype, pool.device)
            for pool in (k_cache, v_cache)
        )
        out = key, value
        layout = layout_of(_OUT, *out, k_cache, v_cache)
    if num_rows and num_seqs:
        tables, lens = on_device(tables, backend, k_cache), on_device(lens, backend, k_cache)
        starts = None if starts is None else on_device(starts, backend, k_cache)
        backend.gather_cache(*out, k_cache, v_cache, tables, lens, starts, num_rows, layout)
    return given_out or tuple(map(like, out, given_pools))


def copy_blocks(k_cache: Array, v_cache: Array, src: IndexArray, dst: IndexArray) -> None:
    """Copy K and V of whole blocks onto other blocks of the same pools, in place.

    >>> import numpy as np
    >>> k_cache, v_cache = pools = np.arange(2 * 3 * 2, dtype=np.float32).reshape(2, 3, 2, 1, 1)
    >>> copy_blocks(k_cache, v_cache, src=[2], dst=[0])
    >>> pools[..., 0, 0].tolist()
    [[[4.0, 5.0], [2.0, 3.0], [4.0, 5.0]], [[10.0, 11.0], [8.0, 9.0], [10.0, 11.0]]]

    k_cache, v_cache
        The pools, as in :func:`reshape_and_cache`; with an axis of layers, a block is copied in all of them.
    src, dst
        ``[num_pairs]``, ids of blocks: ``src[i]`` is copied onto ``dst[i]``. What a block holds that is ``dst`` of two
        pairs, or ``dst`` of one and ``src`` of another, is undefined.

    On a GPU the work is queued on CuPy's current stream, and a pair with a block that is not in the pool is skipped. On
    NumPy such a block is an ``IndexError``, raised before anything is written. ``CUPY_PAGEDKV_DEBUG=1`` brings that
    check to the GPU, and a ``ValueError`` for a ``dst`` that comes twice or is a ``src`` to both.

    Raises ``TypeError`` and ``ValueError`` as :func:`reshape_and_cache` does.
    """
    k_cache, v_cache = arrays_of(_POOLS, k_cache, v_cache)
    backend = backend_of(_POOLS, k_cache, v_cache)
    pools = pools_of(k_cache, v_cache)
    check_writeable("k_cache", k_cache)
    check_writeable("v_cache", v_cache)
    sources, targets = indices("src", src, 1, backend, k_cache), indices("dst", dst, 1, backend, k_cache)
    if len(sources) != len(targets):
        raise ValueError(f"src and dst must have one block for each other, got {len(sources)} and {len(targets)}")
    if not len(sources):
        return
    if backend.checks_indices or devices.DEBUG:
        _check_pairs(asnumpy(sources, backend), asnumpy(targets, backend), pools.num_blocks)
    sources, targets = on_device(sources, backend, k_cache), on_device(targets, backend, k_cache)
    backend.copy_blocks(k_cache, v_cache, sources, targets, pools)


def _check_slots(slots: npt.NDArray[Any], num_slots: int) -> None:
    if slots.item(slots.argmax()) >= num_slots:
        token = int(np.argmax(slots >= num_slots))
        raise IndexError(f"slot_mapping[{token}] is {slots[token]}, but the pool has slots 0 to {num_slots - 1}")
    if devices.DEBUG:
        distinct, counts = np.unique(slots[slots >= 0], return_counts=True)
        if (counts > 1).any():
            slot = distinct[np.argmax(counts > 1)]
            tokens = np.flatnonzero(slots == slot).tolist()
            raise ValueError(f"slot {slot} comes more than once in slot_mapping, for tokens {tokens}")


def _check_lengths(lens: npt.NDArray[Any], starts: npt.NDArray[Any] | None, capacity: int) -> int:
    """The number of tokens to copy, if every sequence fits its row of the table."""
    if starts is None and all_below(capacity + 1, lens):
        return sum(lens.tolist())
    starts = np.zeros_like(lens) if starts is None else starts
    wrong = (starts < 0) | (lens < starts) | (lens > capacity)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"0 <= seq_starts <= seq_lens <= {capacity} must hold, the tokens that a row of block_tables has blocks "
            f"for; sequence {i} has seq_starts {starts[i]} and seq_lens {lens[i]}"
        )
    return int((lens - starts).sum(dtype=np.int64))


def _check_pairs(src: npt.NDArray[Any], dst: npt.NDArray[Any], num_blocks: int) -> None:
    for name, blocks in (("src", src), ("dst", dst)):
        if not all_below(num_blocks, blocks):
            i = int(np.argmax((blocks < 0) | (blocks >= num_blocks)))
            raise IndexError(f"{name}[{i}] is {blocks[i]}, but the pool has blocks 0 to {num_blocks - 1}")
    if devices.DEBUG:
        distinct, counts = np.unique(dst, return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"block {distinct[np.argmax(counts > 1)]} comes more than once in dst")
        both = np.intersect1d(src[src != dst], dst)
        if both.size:
            raise ValueError(f"block {both[0]} is in src and in dst; make it two calls")
