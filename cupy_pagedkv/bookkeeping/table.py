"""Which blocks hold which tokens of a sequence.

>>> from cupy_pagedkv import BlockAllocator
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
"""

import numpy as np
import numpy.typing as npt

from .arguments import MAX_BLOCKS, at_least, block_ids

__all__ = ["BlockTable"]


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
        ids = block_ids(blocks, MAX_BLOCKS)
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
