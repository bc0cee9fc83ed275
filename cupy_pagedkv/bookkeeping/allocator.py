"""Which blocks of a pool are free."""

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .arguments import MAX_BLOCKS, at_least, block_ids
from .dtypes import as_dtype

__all__ = ["BlockAllocator", "BlockAllocatorStats", "OutOfBlocksError"]


class OutOfBlocksError(RuntimeError):
    """More blocks were wanted than are free. Nothing was taken.

    ``wanted``, ``free`` and ``total`` are the numbers of blocks, or of ``what`` else.
    """

    __module__ = "cupy_pagedkv"  # where users import it from, and so what a traceback says

    def __init__(self, wanted: int, free: int, total: int, what: str = "blocks") -> None:
        super().__init__(wanted, free, total, what)
        self.wanted = wanted
        self.free = free
        self.total = total
        self.what = what

    def __str__(self) -> str:
        remedy = f"make {'the pool' if self.what == 'blocks' else 'host_blocks'} larger"
        return f"{self.wanted} {self.what} wanted, {self.free} of {self.total} are free; free some, or {remedy}"


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
        if self._total > MAX_BLOCKS:
            raise ValueError(f"num_blocks must be at most {MAX_BLOCKS}: block ids are int32, got {self._total}")
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
