"""Bookkeeping of blocks on the host: which are free, and which hold which tokens of a sequence.

>>> allocator = BlockAllocator(num_blocks=10, block_size=16)
>>> table = BlockTable(block_size=16)
>>> table.append_blocks(allocator.allocate(table.additional_blocks_needed(20)))
>>> table.set_num_tokens(20)
>>> table.blocks
array([0, 1], dtype=int32)
>>> table.get_slot(17)
(1, 1)
>>> allocator.free(table.blocks)
>>> allocator.free_block_count
10

No K or V is touched here, and no array library but NumPy.
"""

import operator
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import as_dtype

__all__ = ["BlockAllocator", "BlockAllocatorStats", "BlockTable", "OutOfBlocksError"]

_MAX_BLOCKS = int(np.iinfo(np.int32).max)


class OutOfBlocksError(RuntimeError):
    """More blocks were wanted than are free. Nothing was taken.

    ``wanted``, ``free`` and ``total`` are the numbers of blocks.
    """

    __module__ = "cupy_pagedkv"  # where users import it from, and so what a traceback says

    def __init__(self, wanted: int, free: int, total: int) -> None:
        super().__init__(wanted, free, total)
        self.wanted = wanted
        self.free = free
        self.total = total

    def __str__(self) -> str:
        return f"{self.wanted} blocks wanted, {self.free} of {self.total} are free; free some, or make the pool larger"


@dataclass(frozen=True, slots=True)
class BlockAllocatorStats:
    """What :meth:`BlockAllocator.stats` found at one moment."""

    total_blocks: int
    allocated_blocks: int
    free_blocks: int
    block_size: int
    """Tokens in a block."""
    total_allocations: int
    """Calls of ``allocate`` that took at least one block."""
    total_frees: int
    """Calls of ``free`` that returned at least one block."""
    peak_usage: int
    """The most blocks that were ever allocated at once."""


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


class BlockAllocator:
    """Hands out the blocks 0 … ``num_blocks`` − 1 of a pool, the one longest free first.

    >>> allocator = BlockAllocator(num_blocks=4, block_size=16)
    >>> allocator.allocate(3)
    array([0, 1, 2], dtype=int32)
    >>> allocator.free([1])
    >>> allocator.allocate(2)
    array([3, 1], dtype=int32)
    >>> allocator.allocate(1)
    Traceback (most recent call last):
    cupy_pagedkv.OutOfBlocksError: 1 blocks wanted, 0 of 4 are free; free some, or make the pool larger

    All methods may be called from several threads. A call that raises changes nothing. Taking or returning n blocks
    costs a few array operations over n items, whatever the size of the pool.

    Raises ``ValueError`` unless 1 ≤ ``num_blocks`` < 2³¹ and ``block_size`` ≥ 1.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._total = at_least(1, "num_blocks", num_blocks)
        self._block_size = at_least(1, "block_size", block_size)
        if self._total > _MAX_BLOCKS:
            raise ValueError(f"num_blocks must be at most {_MAX_BLOCKS}: block ids are int32, got {self._total}")
        self._lock = threading.Lock()
        self._scratch = np.empty(self._total, np.int32)
        self.reset()

    def reset(self) -> None:
        """Make the allocator as new: all blocks free, in order from 0, and all counts of :meth:`stats` at zero."""
        with self._lock:
            self._queue = np.arange(self._total, dtype=np.int32)  # a ring of the free blocks
            self._head = 0
            self._free = self._total
            self._is_free = np.ones(self._total, np.bool_)
            self._allocations = self._frees = self._peak = 0

    @classmethod
    def from_memory_budget(
        cls, budget_bytes: int, block_size: int, num_heads: int, head_dim: int, dtype: npt.DTypeLike
    ) -> "BlockAllocator":
        """An allocator for as many blocks as fit in ``budget_bytes`` of K and V of one layer.

        >>> BlockAllocator.from_memory_budget(2**30, 16, 32, 128, "float16").total_blocks
        4096

        Raises ``ValueError`` where not even one block fits.
        """
        block = _block_bytes(block_size, num_heads, head_dim, dtype)
        num_blocks = at_least(0, "budget_bytes", budget_bytes) // block
        if num_blocks == 0:
            raise ValueError(f"a block of K and V takes {block} bytes, the budget is {budget_bytes}")
        return cls(num_blocks, block_size)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_size

    @property
    def total_blocks(self) -> int:
        """Blocks of the pool, free and allocated."""
        return self._total

    @property
    def free_block_count(self) -> int:
        """Blocks that are free at this moment."""
        return self._free

    def can_allocate(self, count: int) -> bool:
        """Whether ``count`` blocks are free at this moment; another thread may take them in the next."""
        return at_least(0, "count", count) <= self._free

    def allocate(self, count: int) -> npt.NDArray[np.int32]:
        """Take ``count`` blocks, all or none: int32 ids ``[count]``, in an array of the caller's own.

        Raises :class:`OutOfBlocksError` if fewer are free, ``ValueError`` if ``count`` is negative.
        """
        count = at_least(0, "count", count)
        with self._lock:
            if count > self._free:
                raise OutOfBlocksError(count, self._free, self._total)
            blocks = self._queue.take(np.arange(self._head, self._head + count), mode="wrap")
            self._head = (self._head + count) % self._total
            self._free -= count
            self._is_free[blocks] = False
            self._allocations += count > 0
            self._peak = max(self._peak, self._total - self._free)
            return blocks

    def free(self, blocks: npt.ArrayLike) -> None:
        """Return blocks, in any order and of any number of :meth:`allocate` calls: integer ids ``[n]``.

        They will be handed out again in the order given, after all that are free already. Raises ``ValueError`` if an
        id is outside the pool, is free already or comes twice, and then returns none of them.
        """
        ids = block_ids(blocks, self._total)
        n = len(ids)
        if n == 0:
            return
        with self._lock:
            if self._is_free[ids].any():
                raise ValueError(f"cannot free block {ids[self._is_free[ids]][0]}: it is free already")
            # Of ids that come twice, the scratch keeps one position; it needs no clearing, whatever it held.
            positions = np.arange(n)
            self._scratch[ids] = positions
            if (self._scratch[ids] != positions).any():
                twice = ids[self._scratch[ids] != positions][0]
                raise ValueError(f"cannot free block {twice} twice in one call")
            self._queue.put(positions + (self._head + self._free), ids, mode="wrap")
            self._free += n
            self._is_free[ids] = True
            self._frees += 1

    def stats(self) -> BlockAllocatorStats:
        """All counts, as of one moment."""
        with self._lock:
            return BlockAllocatorStats(
                total_blocks=self._total,
                allocated_blocks=self._total - self._free,
                free_blocks=self._free,
                block_size=self._block_size,
                total_allocations=self._allocations,
                total_frees=self._frees,
                peak_usage=self._peak,
            )

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` unless each free block stands in line once, and no other. Walks the whole pool."""
        with self._lock:
            line = self._queue.take(np.arange(self._head, self._head + self._free), mode="wrap")
            marked = np.flatnonzero(self._is_free)
            if not np.array_equal(np.sort(line), marked):
                raise RuntimeError(
                    f"{self._free} free blocks are counted, {len(np.unique(line))} stand in line, "
                    f"{len(marked)} are marked as free; the same ones they must be"
                )

    def block_memory_size(self, num_heads: int, head_dim: int, dtype: npt.DTypeLike) -> int:
        """Bytes of K and V together in one block of one layer.

        >>> BlockAllocator(1, block_size=16).block_memory_size(32, 128, "float16")
        262144
        """
        return _block_bytes(self._block_size, num_heads, head_dim, dtype)

    def total_memory_size(self, num_heads: int, head_dim: int, dtype: npt.DTypeLike) -> int:
        """Bytes of K and V together in all blocks of one layer."""
        return self._total * self.block_memory_size(num_heads, head_dim, dtype)


def _block_bytes(block_size: int, num_heads: int, head_dim: int, dtype: npt.DTypeLike) -> int:
    items = at_least(1, "block_size", block_size)
    items *= at_least(1, "num_heads", num_heads) * at_least(1, "head_dim", head_dim)
    return 2 * items * as_dtype(dtype).itemsize


class BlockTable:
    """The blocks of one sequence in logical order, and how many of its tokens are in the cache.

    >>> table = BlockTable(block_size=16)
    >>> table.append_blocks([5, 10, 15])
    >>> [table.get_slot(position) for position in (0, 16, 47, 48)]
    [(5, 0), (10, 0), (15, 15), None]

    Position ``t`` lies in ``blocks[t // block_size]`` at offset ``t % block_size``. Appending costs O(1) a block,
    amortised. Raises ``ValueError`` unless ``block_size`` ≥ 1. Not thread-safe: a sequence belongs to one thread.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = at_least(1, "block_size", block_size)
        self._buffer = np.empty(8, np.int32)
        self._num_blocks = 0
        self._num_tokens = 0

    def __repr__(self) -> str:
        return (
            f"BlockTable(block_size={self._block_size}, blocks={self.blocks.tolist()}, num_tokens={self._num_tokens})"
        )

    @staticmethod
    def blocks_needed(num_tokens: int, block_size: int) -> int:
        """Blocks that ``num_tokens`` tokens fill or begin.

        >>> [BlockTable.blocks_needed(n, block_size=16) for n in (0, 1, 16, 17)]
        [0, 1, 1, 2]
        """
        return -(-at_least(0, "num_tokens", num_tokens) // at_least(1, "block_size", block_size))

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_size

    @property
    def num_blocks(self) -> int:
        """Blocks in the table."""
        return self._num_blocks

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence that are in the cache, at most ``num_blocks * block_size``."""
        return self._num_tokens

    @property
    def blocks(self) -> npt.NDArray[np.int32]:
        """Block ids in logical order, int32 ``[num_blocks]``: a read-only view, good until the table next changes."""
        view = self._buffer[: self._num_blocks]
        view.flags.writeable = False
        return view

    def additional_blocks_needed(self, additional_tokens: int) -> int:
        """Blocks still missing for ``additional_tokens`` tokens past ``num_tokens``."""
        tokens = self._num_tokens + at_least(0, "additional_tokens", additional_tokens)
        return max(0, self.blocks_needed(tokens, self._block_size) - self._num_blocks)

    def append_blocks(self, blocks: npt.ArrayLike) -> None:
        """Put integer ids ``[n]`` at the end; they are copied. Raises ``ValueError`` for one that is no block id."""
        ids = block_ids(blocks, _MAX_BLOCKS)
        end = self._num_blocks + len(ids)
        if end > len(self._buffer):
            # A new buffer rather than a resized one: views handed out stay as they are.
            self._buffer = np.concatenate([self._buffer, np.empty(end, np.int32)])
        self._buffer[self._num_blocks : end] = ids
        self._num_blocks = end

    def set_num_tokens(self, num_tokens: int) -> None:
        """Say that the first ``num_tokens`` tokens are in the cache. Raises ``ValueError`` if the blocks cannot hold
        so many."""
        num_tokens = at_least(0, "num_tokens", num_tokens)
        capacity = self._num_blocks * self._block_size
        if num_tokens > capacity:
            raise ValueError(
                f"{num_tokens} tokens do not fit in {self._num_blocks} blocks of {self._block_size}: "
                f"append {self.blocks_needed(num_tokens, self._block_size) - self._num_blocks} blocks first"
            )
        self._num_tokens = num_tokens

    def clear(self) -> None:
        """Forget all blocks and tokens. No block is freed."""
        self._num_blocks = self._num_tokens = 0

    def get_block(self, index: int) -> int | None:
        """The id of the ``index``-th block; ``None`` past the last. Raises ``ValueError`` if ``index`` is negative."""
        index = at_least(0, "index", index)
        return int(self._buffer[index]) if index < self._num_blocks else None

    def get_slot(self, position: int) -> tuple[int, int] | None:
        """``(block, offset)`` of a token position; ``None`` past the last block. Raises ``ValueError`` if
        ``position`` is negative."""
        index, offset = divmod(at_least(0, "position", position), self._block_size)
        block = self.get_block(index)
        return None if block is None else (block, offset)

    def slots(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """The slots of positions ``start`` … ``start + count − 1``, int64 ``[count]``: a slot mapping.

        >>> table = BlockTable(block_size=4)
        >>> table.append_blocks([7, 2])
        >>> table.slots(2, 4)
        array([30, 31,  8,  9])

        Raises ``IndexError`` if a position has no block, ``ValueError`` if ``start`` or ``count`` is negative.
        """
        start, count = at_least(0, "start", start), at_least(0, "count", count)
        if count and start + count > self._num_blocks * self._block_size:
            raise IndexError(
                f"no block for token position {max(start, self._num_blocks * self._block_size)}: "
                f"the table has {self._num_blocks} blocks of {self._block_size}; allocate more first"
            )
        positions = np.arange(start, start + count, dtype=np.int64)
        return self._buffer[positions // self._block_size] * np.int64(self._block_size) + positions % self._block_size

    def to_device_format(self) -> npt.NDArray[np.int32]:
        """A copy of :attr:`blocks`, contiguous: a row of ``block_tables``."""
        return self._buffer[: self._num_blocks].copy()
