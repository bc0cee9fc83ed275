"""Blocks that several sequences own, and blocks that are found again by the tokens whose K and V they hold.

A block is *free*, *live* (it has owners) or *cached* (it has none, but is found by its tokens until it is needed for
others), and free + live + cached is always the whole pool.

What is found is an exact trie of nested dictionaries: a node maps the tokens of one block, as bytes, to the block that
holds them and to the node of what came after them. Two prompts meet in a node only if all tokens before it are equal,
because no key is a hash of anything; and a node is an object, so that no number of an old one can come back as that of
a new one.
"""

from collections import deque
from collections.abc import Iterable
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from .blocks import BlockAllocator, OutOfBlocksError

__all__ = ["BlockPool", "Node", "Salt"]

Salt: TypeAlias = str | bytes | int | None

_Blocks: TypeAlias = npt.NDArray[np.int32]


class Node(dict[bytes, tuple[int, "Node"]]):
    """What may follow a prefix: the tokens of one more block → (the block that holds them, the node behind it)."""

    __slots__ = ("__weakref__",)


class BlockPool:
    """Counts the owners of each block of a :class:`~cupy_pagedkv.BlockAllocator`, and finds full blocks by tokens.

    >>> pool = BlockPool(num_blocks=4, block_size=2)
    >>> blocks = pool.take(2)
    >>> node = pool.remember(0, pool.root(None), b"the ")
    >>> node = pool.remember(1, node, b"cat ")
    >>> pool.release(blocks)
    >>> pool.num_available, pool.num_cached
    (4, 2)
    >>> pool.find(pool.root(None), [b"the ", b"dog "])
    [0]

    A call costs what its own blocks cost, whatever the size of the pool, but for :meth:`check`. A call that raises
    changes nothing. Not thread-safe.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._allocator = BlockAllocator(num_blocks, block_size)
        self._owners = np.zeros(num_blocks, np.int32)
        self._cached = _Queue(num_blocks)
        self._roots: WeakValueDictionary[tuple[type, Salt], Node] = WeakValueDictionary()
        # Of a block that holds remembered tokens: where in the trie they are, and the node behind them.
        self._place: list[tuple[Node, bytes] | None] = [None] * num_blocks
        self._node: list[Node | None] = [None] * num_blocks
        # Live blocks that hold the same as one that is found: {the block that is found: the others}.
        self._twins: dict[int, set[int]] = {}
        self.evictions = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self._allocator.total_blocks

    @property
    def num_cached(self) -> int:
        """Blocks without an owner that are still found."""
        return self._cached.count

    @property
    def num_available(self) -> int:
        """Blocks that :meth:`take` could give at once: the free and the cached ones."""
        return self._allocator.free_block_count + self._cached.count

    def take(self, count: int) -> _Blocks:
        """``count`` blocks with one owner each, all or none; cached ones, the one longest without an owner first, where
        there are not enough free ones. Raises :class:`~cupy_pagedkv.OutOfBlocksError`."""
        if count > self.num_available:
            raise OutOfBlocksError(count, self.num_available, self.num_blocks)
        missing = count - self._allocator.free_block_count
        if missing > 0:
            evicted = self._cached.pop(missing)
            self.forget(evicted.tolist())
            self._allocator.free(evicted)
            self.evictions += missing
        blocks = self._allocator.allocate(count)
        self._owners[blocks] = 1
        return blocks

    def share(self, blocks: _Blocks) -> None:
        """Give each of ``blocks``, live or cached and all different, one more owner."""
        self._cached.remove(blocks[self._owners[blocks] == 0])
        self._owners[blocks] += 1

    def release(self, blocks: _Blocks) -> None:
        """Take an owner from each of ``blocks``, a sequence's in their order and all different.

        Those that are left without are cached, if they are found by their tokens, and free otherwise; the last of them
        will be the first to be used again, since nothing is found behind a block that is gone.
        """
        self._owners[blocks] -= 1
        gone = blocks[self._owners[blocks] == 0][::-1]
        places = self._place
        stays = np.fromiter((places[block] is not None for block in gone.tolist()), np.bool_, len(gone))
        if self._twins:
            for i, block in enumerate(gone.tolist()):
                if stays[i] and self._has_twin(block):
                    self.forget([block])  # what it holds is found in another one
                    stays[i] = False
        self._cached.put(gone[stays])
        self._allocator.free(gone[~stays])

    def writers_that_copy(self, blocks: npt.NDArray[np.integer]) -> list[int]:
        """Which of the owners that are about to write to ``blocks``, one for each item, must write to a copy instead.

        The last owner of a block writes to the block itself, if all others are about to write, too.
        """
        left: dict[int, int] = {}
        copying = []
        for i in np.flatnonzero(self._owners[blocks] > 1).tolist():
            block = int(blocks[i])
            owners = left.get(block, int(self._owners[block]))
            if owners > 1:
                copying.append(i)
            left[block] = owners - 1
        return copying

    def root(self, salt: Salt) -> Node:
        """The node before the first token of all sequences with this salt. Salts of two types are never equal."""
        key = (type(salt), salt)
        root = self._roots.get(key)
        if root is None:  # and it goes when no block and no sequence needs it
            self._roots[key] = root = Node()
        return root

    def find(self, root: Node, chunks: Iterable[bytes]) -> list[int]:
        """The blocks that hold ``chunks``, the tokens of a block each, as far as there are any."""
        blocks: list[int] = []
        append, node = blocks.append, root
        try:
            for chunk in chunks:
                block, node = node[chunk]
                append(block)
        except KeyError:
            pass
        return blocks

    def remember(self, block: int, node: Node, chunk: bytes) -> Node:
        """Let the tokens ``chunk`` be found in ``block`` behind ``node``; returns the node behind them.

        Where another block holds them already, that one is found as before, and this one takes its place when the
        other loses its last owner.
        """
        found = node.get(chunk)
        if found is None:
            node[chunk] = found = (block, Node())
        else:
            self._twins.setdefault(found[0], set()).add(block)
        self._place[block] = node, chunk
        self._node[block] = found[1]
        return found[1]

    def forget(self, blocks: Iterable[int]) -> None:
        """Let ``blocks`` be found no more, because something else will be written to them."""
        for block in blocks:
            place = self._place[block]
            if place is None:
                continue
            node, chunk = place
            first, behind = node[chunk]
            twins = self._twins.pop(first, None)
            if first != block:
                assert twins is not None
                twins.remove(block)
            elif twins:
                first = twins.pop()
                node[chunk] = first, behind
            else:
                del node[chunk]
            if twins:
                self._twins[first] = twins
            self._place[block] = self._node[block] = None

    def remembered(self, block: int) -> tuple[bytes, Node]:
        """The tokens of a block that :meth:`remember` was told of, and the node behind them."""
        place, node = self._place[block], self._node[block]
        assert place is not None
        assert node is not None
        return place[1], node

    def clear(self) -> None:
        """Free all cached blocks."""
        blocks = self._cached.pop(self._cached.count)
        self.forget(blocks.tolist())
        self._allocator.free(blocks)

    def check(self, owners: npt.NDArray[np.integer]) -> None:
        """Raise ``RuntimeError`` unless all adds up, with ``owners`` ``[num_blocks]`` as counted from the sequences."""
        live = int(np.count_nonzero(self._owners))
        free, cached, total = self._allocator.free_block_count, self._cached.count, self.num_blocks
        if free + live + cached != total:
            raise RuntimeError(f"{free} free + {live} live + {cached} cached blocks are not the pool's {total}")
        wrong = np.flatnonzero(self._owners != owners)
        if len(wrong):
            block = wrong[0]
            raise RuntimeError(f"block {block} counts {self._owners[block]} owners, but {owners[block]} hold it")
        for block in range(total):
            place = self._place[block]
            is_cached, is_live = self._cached.holds(block), self._owners[block] > 0
            if is_cached and (is_live or place is None):
                raise RuntimeError(f"block {block} is cached, but {'has an owner' if is_live else 'is not found'}")
            if place is None:
                continue
            first, behind = place[0].get(place[1], (-1, None))
            if behind is not self._node[block] or (first != block and block not in self._twins.get(first, ())):
                raise RuntimeError(f"block {block} is remembered, but its tokens lead to block {first}")
            if not (is_cached or is_live):
                raise RuntimeError(f"block {block} is free, but still found")
        for block, twins in self._twins.items():
            if not (twins and (self._owners[list(twins)] > 0).all()):
                raise RuntimeError(f"block {block} has the twins {sorted(twins)}, but not all of them are live")

    def _has_twin(self, block: int) -> bool:
        if block in self._twins:
            return True
        place = self._place[block]
        return place is not None and place[0][place[1]][0] != block


class _Queue:
    """Blocks, the longest there first. Any of them can leave at O(1): its place is passed over later.

    A block stands in the run whose number is its stamp, and in none where that is 0.
    """

    def __init__(self, num_blocks: int) -> None:
        self.count = 0
        self._stamp = np.zeros(num_blocks, np.int64)
        self._runs: deque[tuple[int, _Blocks]] = deque()
        self._places = 0  # in all runs, also those of blocks that have left
        self._last = 0

    def holds(self, block: int) -> bool:
        return bool(self._stamp[block])

    def put(self, blocks: _Blocks) -> None:
        if len(blocks):
            self._last += 1
            self._stamp[blocks] = self._last
            self._append(self._last, blocks)
            self.count += len(blocks)
        if self._places > 2 * self.count + 1024:  # most are empty, and have to go before they are too many
            runs, self._runs, self._places = self._runs, deque(), 0
            for stamp, run in runs:
                self._append(stamp, run[self._stamp[run] == stamp])

    def remove(self, blocks: _Blocks) -> None:
        self._stamp[blocks] = 0
        self.count -= len(blocks)

    def pop(self, count: int) -> _Blocks:
        popped = []
        missing = count
        while missing:
            stamp, run = self._runs.popleft()
            if len(run) > missing:
                self._runs.appendleft((stamp, run[missing:]))
                run = run[:missing]
            self._places -= len(run)
            run = run[self._stamp[run] == stamp]
            missing -= len(run)
            popped.append(run)
        blocks = np.concatenate(popped) if popped else np.empty(0, np.int32)
        self.remove(blocks)
        return blocks

    def _append(self, stamp: int, run: _Blocks) -> None:
        if len(run):
            self._runs.append((stamp, run))
            self._places += len(run)
