"""Blocks that several sequences own, and blocks that are found again by the tokens whose K and V they hold.

A block is *free*, *live* (it has owners) or *cached* (it has none, but is found by its tokens until it is needed for
others), and free + live + cached is always the whole pool.

What is found is an exact trie of nested dictionaries: a node maps the tokens of one more block, as bytes, to the next
node. Two prompts meet in a node only if all tokens before it are equal, because no key is a hash of anything; and a
node is an object, so that no number of an old one can come back as that of a new one.
"""

from collections import deque
from collections.abc import Iterable
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from .allocator import BlockAllocator, OutOfBlocksError

__all__ = ["BlockPool", "Node", "Salt"]

Salt: TypeAlias = str | bytes | int | None

_Blocks: TypeAlias = npt.NDArray[np.int32]

_AHEAD = 1024  # places of a queue that are looked at together: no more work than a few are


class Node(dict[bytes, "Node"]):
    """The end of a prefix that fills blocks: the tokens of one more block → the node behind them."""

    __slots__ = ("__weakref__", "block", "chunk", "parent")

    def __init__(self, parent: "Node | None" = None, chunk: bytes = b"", block: int = -1) -> None:
        self.parent = parent
        self.chunk = chunk
        """The tokens of the last block."""
        self.block = block
        """Which that is; a root has none."""


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
        self._node: list[Node | None] = [None] * num_blocks  # behind the tokens of a block that is found, or a twin
        # Live blocks that hold the same as another that is found, and live: {that one: the others}.
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
        if self._twins:  # what they hold is found in another block
            self.forget([block for block in gone.tolist() if self._has_twin(block)])
        nodes = self._node
        stays = np.fromiter((nodes[block] is not None for block in gone.tolist()), np.bool_, len(gone))
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
                node = node[chunk]
                append(node.block)
        except KeyError:
            pass
        return blocks

    def remember(self, block: int, parent: Node, chunk: bytes) -> Node:
        """Let the tokens ``chunk`` behind ``parent`` be found in the live ``block``; returns the node behind them.

        Where another live block holds them already, that one is found as before, and this one takes its place when the
        other loses its last owner. A cached one is freed: its content is now in use, and need not be there twice.
        """
        node = parent.get(chunk)
        if node is None:
            parent[chunk] = node = Node(parent, chunk, block)
        elif self._owners[node.block]:
            self._twins.setdefault(node.block, set()).add(block)
        else:
            cached = np.array([node.block], np.int32)
            self._node[node.block] = None
            self._cached.remove(cached)
            self._allocator.free(cached)
            node.block = block
        self._node[block] = node
        return node

    def forget(self, blocks: Iterable[int]) -> None:
        """Let ``blocks`` be found no more, because something else will be written to them, nor what came behind them.

        The latter can only be cached, since who owns a block owns those before it, or twins of theirs; it is freed.
        """
        unreachable: list[int] = []
        for block in blocks:
            node = self._node[block]
            if node is None:
                continue
            self._node[block] = None
            twins = self._twins.pop(node.block, set())
            if node.block != block:
                twins.remove(block)
            elif twins:
                node.block = twins.pop()
            else:
                assert node.parent is not None
                del node.parent[node.chunk]
                behind = [node]
                while behind:
                    gone = behind.pop()
                    behind += gone.values()
                    unreachable += (child.block for child in gone.values())
                    gone.clear()  # or nodes and their parents would keep each other
            if twins:
                self._twins[node.block] = twins
        if unreachable:
            for block in unreachable:
                self._node[block] = None
            dropped = np.array(unreachable, np.int32)
            self._cached.remove(dropped)
            self._allocator.free(dropped)

    def node_of(self, block: int) -> Node:
        """The node behind the tokens of a block that :meth:`remember` was told of."""
        node = self._node[block]
        assert node is not None
        return node

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
        self._allocator.check_integrity()
        self._cached.check()
        for block in range(total):
            node = self._node[block]
            is_cached, is_live = self._cached.holds(block), self._owners[block] > 0
            if is_cached and (is_live or node is None):
                raise RuntimeError(f"block {block} is cached, but {'has an owner' if is_live else 'is not found'}")
            if node is None:
                continue
            parent = node.parent
            if parent is None or parent.get(node.chunk) is not node:
                raise RuntimeError(f"block {block} is remembered, but not found")
            if parent.parent is not None and self._node[parent.block] is not parent:
                raise RuntimeError(f"block {block} is remembered, but not what comes before it")
            if node.block != block and block not in self._twins.get(node.block, ()):
                raise RuntimeError(f"block {block} is remembered, but its tokens lead to block {node.block}")
            if not (is_cached or is_live):
                raise RuntimeError(f"block {block} is free, but still found")
        for block, twins in self._twins.items():
            if not (twins and (self._owners[[block, *twins]] > 0).all()):
                raise RuntimeError(f"block {block} has the twins {sorted(twins)}, but not all of them are live")

    def _has_twin(self, block: int) -> bool:
        node = self._node[block]
        return node is not None and (node.block != block or block in self._twins)


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

    def check(self) -> None:
        """Raise ``RuntimeError`` unless the runs hold each block that is in the queue once."""
        held = sum(int(np.count_nonzero(self._stamp[run] == stamp)) for stamp, run in self._runs)
        stamped = int(np.count_nonzero(self._stamp))
        if not self.count == held == stamped:
            raise RuntimeError(f"{self.count} cached blocks are counted, {held} stand in line, {stamped} are marked")

    def remove(self, blocks: _Blocks) -> None:
        self._stamp[blocks] = 0
        self.count -= len(blocks)

    def pop(self, count: int) -> _Blocks:
        popped = []
        missing = count
        while missing:
            stamp, run = self._runs.popleft()
            self._places -= len(run)
            ahead = max(missing, _AHEAD)
            held = run[:ahead][self._stamp[run[:ahead]] == stamp]
            self._put_back(stamp, run[ahead:])
            self._put_back(stamp, held[missing:])
            popped.append(held[:missing])
            missing -= len(popped[-1])
        blocks = np.concatenate(popped) if popped else np.empty(0, np.int32)
        self.remove(blocks)
        return blocks

    def _put_back(self, stamp: int, run: _Blocks) -> None:
        if len(run):
            self._runs.appendleft((stamp, run))
            self._places += len(run)

    def _append(self, stamp: int, run: _Blocks) -> None:
        if len(run):
            self._runs.append((stamp, run))
            self._places += len(run)
