"""The NumPy backend: the fallback where there is no GPU, and the oracle that the kernels are tested against.

The floor is ``np.copyto`` of the same bytes. A few tokens are assigned one by one, since making the arrays of an
indexing call takes longer than that. More are copied as opaque items, of a token or of a block, where these lie in one
piece. Much is shared among threads: NumPy lets go of the interpreter while it copies, and one core does not saturate
the memory of most machines.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np

from ..bookkeeping.memory import lazy_zeros
from ..bookkeeping.ranges import ranges, runs_of
from . import numpy_attention, threads
from .layout import AttentionLayout, Items, Layout, Pools, Scoring
from .threads import Job

__all__ = ["HostArrays", "HostLane", "HostStaging", "NumpyBackend"]

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_Tensor: TypeAlias = tuple[_Array, _Array, Items | None]
"""Tokens ``[num_layers, num_tokens, heads, dim]``, pools ``[num_layers, num_blocks, block_size, heads, dim]``, and what
both are in one layer."""

_FEW_TOKENS = 2
_FEW_SEQUENCES = 4
_WORTHWHILE_TOKENS = 128  # of a stretch, or of a sequence, that is copied on its own
_MANY_ITEMS = 500  # NumPy lets go of the interpreter for more opaque items than these
_FEW_BYTES = 2**18  # that take no longer than other threads can wait for the interpreter
_MUCH = 2**20  # bytes; less is still in the cache when it is copied a second time
_LONG_RUN = 2**15  # bytes of blocks that follow each other, for which an assignment takes less than a second copy
_SMALL_ITEM = 32  # bytes; smaller ones are assigned faster than put
_MANY_TOKENS = 2**14  # from here on it pays to look for whole blocks


def _tokens_of_a_job(layout: Layout, num_bytes: int) -> int:
    """Tokens in whole blocks, whose K or V in one layer a thread copies at once, if it copies ``num_bytes`` in all."""
    return -(-2 * threads.job_bytes(num_bytes) // (layout.token_bytes * layout.block_size)) * layout.block_size


def _tensors(key: _Array, value: _Array, k_cache: _Array, v_cache: _Array, layout: Layout) -> list[_Tensor]:
    """Of K and of V."""
    if layout.have_fields:  # NumPy copies structures field by field, and loses what lies between the fields
        key, value, k_cache, v_cache = (array.view(f"V{array.itemsize}") for array in (key, value, k_cache, v_cache))
    if key.ndim == 3:
        key, value, k_cache, v_cache = key[None], value[None], k_cache[None], v_cache[None]
    return [(key, k_cache, layout.k_items), (value, v_cache, layout.v_items)]


def _layers_of_jobs(tensors: list[_Tensor], num_layers: int) -> list[_Tensor]:
    """Those of so many layers each, or of one."""
    step = max(1, num_layers)
    return [
        (tokens[first : first + step], pool[first : first + step], items)
        for first in range(0, len(tensors[0][1]), step)
        for tokens, pool, items in tensors
    ]


def _stretches(slots: _Array, block_size: int) -> Iterator[tuple[int, int, bool]]:
    """(first, last, whole) of the tokens that fill whole blocks in their order, and of those between them."""
    starts_run = np.empty(len(slots), bool)  # a run is of successive slots in one block
    starts_run[0] = True
    np.not_equal(slots[1:], slots[:-1] + 1, out=starts_run[1:])
    if np.count_nonzero(starts_run) > len(slots) // 2:  # slots that lie anywhere
        yield 0, len(slots), block_size == 1
        return
    starts_run |= (slots % block_size if block_size & (block_size - 1) else slots & (block_size - 1)) == 0
    bounds = np.append(np.flatnonzero(starts_run), len(slots))
    whole = np.diff(bounds) == block_size
    edges = np.concatenate(([0], np.flatnonzero(whole[1:] != whole[:-1]) + 1, [len(whole)]))
    if len(edges) * _WORTHWHILE_TOKENS > len(slots):  # short stretches cost more than blocks save
        yield 0, len(slots), False
        return
    yield from zip(bounds[edges[:-1]].tolist(), bounds[edges[1:]].tolist(), whole[edges[:-1]].tolist(), strict=True)


def _write_slots(tokens: _Array, pool: _Array, items: Items | None, slots: _Array) -> None:
    if items is not None and (len(slots) > _MANY_ITEMS or tokens.nbytes <= _FEW_BYTES * len(tokens)):
        for i in range(len(pool)):  # three times as fast as zip()
            source, target = tokens[i].ravel().view(items.token), pool[i].ravel().view(items.token)
            if items.token.itemsize < _SMALL_ITEM or not source.flags.writeable:  # put() copies what is read-only
                target[slots] = source
            else:
                target.put(slots, source, "clip")  # there is nothing to clip: all slots have been checked
        return
    block_size = pool.shape[2]
    if pool.strides[1] == block_size * pool.strides[2]:
        pool.reshape(len(pool), -1, *pool.shape[3:])[:, slots] = tokens
    else:
        pool[:, slots // block_size, slots % block_size] = tokens


def _write_blocks(tokens: _Array, pool: _Array, slots: _Array) -> None:
    block_size = pool.shape[2]
    pool[:, slots[::block_size] // block_size] = tokens.reshape(len(pool), -1, *pool.shape[2:])


def _long_runs(blocks: _Array, num_bytes: int) -> list[slice] | None:
    """Runs of blocks that follow each other, if it pays to copy ``num_bytes`` run by run, and not by indexing, which
    makes a copy of all of them first."""
    # To look for runs takes its time, too.
    if num_bytes < _MUCH or num_bytes < min(2 * _MUCH, len(blocks) * _LONG_RUN):
        return None
    num_runs = 1 + int(np.count_nonzero(blocks[1:] != blocks[:-1] + 1))
    return list(runs_of(blocks)) if num_runs * _LONG_RUN <= num_bytes else None


def _read_blocks(
    tokens: _Array, pool: _Array, items: Items | None, blocks: _Array, runs: Sequence[slice] | None
) -> None:
    if items is not None:  # opaque items are aligned wherever they are; of others, take() would copy the whole pool
        for i in range(len(pool)):
            pool[i].ravel().view(items.block).take(blocks, 0, tokens[i].ravel().view(items.block), "clip")
        return
    into = tokens.reshape(len(pool), -1, *pool.shape[2:])
    if runs is not None:
        for run in runs:
            first = blocks.item(run.start)
            into[:, run] = pool[:, first : first + run.stop - run.start]
    else:
        _read(into, pool, blocks)


def _read_slots(tokens: _Array, pool: _Array, items: Items | None, blocks: _Array, offsets: _Array) -> None:
    if items is None:
        _read(tokens, pool, blocks, offsets)
    else:
        slots = blocks.astype(np.int64) * pool.shape[2] + offsets
        for i in range(len(pool)):
            pool[i].ravel().view(items.token).take(slots, 0, tokens[i].ravel().view(items.token), "clip")


def _read(into: _Array, pool: _Array, *index: Any) -> None:
    """By indexing, which makes a copy of all that it finds: of a layer at a time, if that is much."""
    if into.nbytes < _MUCH:
        into[...] = pool[(slice(None), *index)]
    else:
        for i in range(len(pool)):
            into[i] = pool[i][index]


def _places(
    block_tables: _Array, seq_lens: _Array, seq_starts: _Array | None, block_size: int
) -> tuple[_Array, _Array]:
    """(blocks, offsets) of the tokens of all sequences, one behind the other."""
    starts = np.zeros_like(seq_lens) if seq_starts is None else seq_starts
    counts = seq_lens - starts
    columns, offsets = np.divmod(ranges(starts, counts), block_size)
    return block_tables[np.repeat(np.arange(len(counts)), counts), columns], offsets


class HostStaging:
    """The way of bytes from the host to the host, which is none unless they have to be in a certain place."""

    def zeros(self, num_bytes: int) -> _Array:
        return lazy_zeros(num_bytes)

    def send(self, staged: _Array, device: str, out: _Array | None = None) -> _Array:
        if out is None:
            return staged
        out[:] = staged
        return out


class HostLane:
    """Places for blocks in host memory, ``[num_places, num_bytes]``, beside a pool that is there itself."""

    def __init__(self, num_places: int, num_bytes: int) -> None:
        self._memory = np.zeros((num_places, num_bytes), np.uint8)

    def pieces(self, places: _Array) -> Iterator[slice]:
        """Which of ``places``, in rising order, are side by side."""
        return runs_of(places)

    def to_host(self, places: _Array) -> AbstractContextManager[_Array]:
        """Within it, what is written to the array, ``[n, num_bytes]``, comes to ``places``, which are side by side."""
        return nullcontext(self._memory[places[0] : places[-1] + 1])

    def from_host(self, places: _Array) -> AbstractContextManager[_Array]:
        """Within it, the array holds what is in ``places``."""
        return self.to_host(places)

    def read(self, places: _Array) -> _Array:
        """A copy of what is in ``places``."""
        return self._memory[places]


class HostArrays:
    """Arrays in host memory, where NumPy and the emulated device work; ``device`` is always ``"cpu"``."""

    ndarray: Any = np.ndarray

    def device_name(self, array: _Array) -> str:
        return "cpu"

    def same_device(self, a: _Array, b: _Array) -> bool:
        return True

    def is_aligned(self, array: _Array) -> bool:
        return array.flags.aligned

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

    def staging(self) -> "HostStaging":
        return HostStaging()

    def lane(self, num_places: int, num_bytes: int, device: str) -> HostLane:
        return HostLane(num_places, num_bytes)


class NumpyBackend(HostArrays):
    """The operations by NumPy's own indexing."""

    name = "numpy"
    checks_indices = True

    def reshape_and_cache(
        self, key: _Array, value: _Array, k_cache: _Array, v_cache: _Array, slot_mapping: _Array, layout: Layout
    ) -> None:
        tensors = _tensors(key, value, k_cache, v_cache, layout)
        block_size = layout.block_size
        if layout.num_tokens <= _FEW_TOKENS:
            for token, slot in enumerate(slot_mapping.tolist()):
                if slot >= 0:
                    block, offset = divmod(slot, block_size)
                    for tokens, pool, _ in tensors:
                        pool[:, block, offset] = tokens[:, token]
            return
        if slot_mapping.item(slot_mapping.argmin()) < 0:
            written = np.flatnonzero(slot_mapping >= 0)
            slot_mapping = slot_mapping[written]
            if len(written) and written[-1] == len(written) - 1:  # all padding is at the end: nothing is copied twice
                tensors = [(tokens[:, : len(written)], pool, items) for tokens, pool, items in tensors]
            else:  # indexing would put tokens before layers
                tensors = [(tokens.take(written, 1), pool, items) for tokens, pool, items in tensors]
        num_bytes = len(slot_mapping) * layout.token_bytes * layout.num_layers
        if num_bytes < threads.SHARED_BYTES:
            for tokens, pool, items in tensors:
                _write_slots(tokens, pool, items, slot_mapping)
            return
        step = _tokens_of_a_job(layout, num_bytes)
        if layout.num_layers > 1:
            tensors = _layers_of_jobs(tensors, step // len(slot_mapping))
        jobs: list[Job] = []
        much = len(slot_mapping) >= _MANY_TOKENS
        for first, last, whole in _stretches(slot_mapping, block_size) if much else [(0, len(slot_mapping), False)]:
            for start in range(first, last, step):
                piece = slice(start, min(start + step, last))
                slots = slot_mapping[piece]
                for tokens, pool, items in tensors:
                    if whole:
                        jobs.append(functools.partial(_write_blocks, tokens[:, piece], pool, slots))
                    else:
                        jobs.append(functools.partial(_write_slots, tokens[:, piece], pool, items, slots))
        threads.run(jobs, num_bytes)

    def gather_cache(
        self,
        key: _Array,
        value: _Array,
        k_cache: _Array,
        v_cache: _Array,
        block_tables: _Array,
        seq_lens: _Array,
        seq_starts: _Array | None,
        num_rows: int,
        layout: Layout,
    ) -> None:
        """Fill the first ``num_rows`` rows of ``key`` and ``value``, which is how many the lengths say."""
        tensors = _tensors(key, value, k_cache, v_cache, layout)
        block_size = layout.block_size
        num_seqs = len(seq_lens)
        num_bytes = num_rows * layout.token_bytes * layout.num_layers
        step = _tokens_of_a_job(layout, num_bytes)
        if layout.num_layers > 1:
            tensors = _layers_of_jobs(tensors, step // num_rows)
        if num_seqs > _FEW_SEQUENCES and num_rows < num_seqs * _WORTHWHILE_TOKENS:
            blocks, offsets = _places(block_tables, seq_lens, seq_starts, block_size)
            threads.run(
                [
                    functools.partial(_read_slots, tokens[:, :num_rows], pool, items, blocks, offsets)
                    for tokens, pool, items in tensors
                ],
                num_bytes,
            )
            return
        by_runs = any(items is None for _, _, items in tensors)
        starts = None if seq_starts is None else seq_starts.tolist()
        jobs: list[Job] = []
        first = 0
        for i, end in enumerate(seq_lens.tolist()):
            start = 0 if starts is None else starts[i]
            while start < end:
                column, offset = divmod(start, block_size)
                whole = (end - start) // block_size
                if offset or not whole:
                    count = min(block_size - offset, end - start)
                    block = block_tables.item(i, column)
                    for tokens, pool, _ in tensors:
                        tokens[:, first : first + count] = pool[:, block, offset : offset + count]
                else:
                    count = min(whole * block_size, step)
                    blocks = block_tables[i, column : column + count // block_size]
                    piece = slice(first, first + count)
                    runs = _long_runs(blocks, count * layout.token_bytes // 2 * len(tensors[0][1])) if by_runs else None
                    for tokens, pool, items in tensors:
                        jobs.append(functools.partial(_read_blocks, tokens[:, piece], pool, items, blocks, runs))
                first += count
                start += count
        threads.run(jobs, num_bytes)

    def copy_blocks(self, k_cache: _Array, v_cache: _Array, src: _Array, dst: _Array, pools: Pools) -> None:
        for cache in (k_cache, v_cache):
            blocks = cache.view(f"V{cache.itemsize}")  # or NumPy loses what lies between the fields of structures
            blocks[..., dst, :, :, :] = blocks[..., src, :, :, :]

    def paged_attention(
        self,
        query: _Array,
        k_cache: _Array,
        v_cache: _Array,
        block_tables: _Array,
        seq_lens: _Array,
        cu_seqlens_q: _Array | None,
        max_seqlen_q: int | None,
        alibi_slopes: _Array | None,
        sinks: _Array | None,
        out: _Array,
        lse: _Array | None,
        scratch: _Array | None,
        scoring: Scoring,
        layout: AttentionLayout,
    ) -> None:
        numpy_attention.paged_attention(
            query,
            k_cache,
            v_cache,
            block_tables,
            seq_lens,
            cu_seqlens_q,
            alibi_slopes,
            sinks,
            out,
            lse,
            scoring,
            layout,
        )

    def attention_scratch(
        self, layout: AttentionLayout, num_seqs: int, max_blocks: int, max_seqlen_q: int | None, pool: _Array
    ) -> int:
        """Floats that attention needs between two launches: here there are none."""
        return 0

    def merge_attention_states(
        self, out_a: _Array, lse_a: _Array, out_b: _Array, lse_b: _Array, out: _Array, lse: _Array
    ) -> None:
        numpy_attention.merge_attention_states(out_a, lse_a, out_b, lse_b, out, lse)
