"""Blocks that several sequences own, and blocks that are found again by the tokens whose K and V they hold.

A block is *free*, *live* (it has owners) or *cached* (it has none, but is found by its tokens until it is needed for
others), and free + live + cached is always the whole pool.

What is found is an exact trie, whose nodes are runs of blocks::

    root ── run [the, cat | sat, on] ─┬─ run [a, mat]
                                      └─ run [the, roof | and, sang]

Tokens are compared, and no key is a hash of anything. A run is split where a prompt parts from it, and where a part of
it gains or loses its owners: so all of its blocks are live, or all are cached, and were let go at once. As who owns a
block owns those before it, or twins of theirs, what lies behind a cached run is cached and was let go before; therefore
what is evicted is always the end of a run that nothing lies behind.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from .allocator import BlockAllocator, OutOfBlocksError

__all__ = ["BlockPool", "Run", "Salt"]

Salt: TypeAlias = str | bytes | int | None

_Blocks: TypeAlias = npt.NDArray[np.int32]


class Run:
    """Blocks one behind the other, and the int32 tokens that they hold. A root is a run of none.

    Who holds a prefix of so many blocks remembers a run in which it ends, or one behind that, and asks :meth:`at` for
    the former: where a run is split, or joined with the one before, the object goes on as the last part.
    """

    __slots__ = ("__weakref__", "blocks", "children", "first", "newer", "older", "parent", "tokens")

    def __init__(self, parent: "Run | None" = None, first: int = 0) -> None:
        self.parent = parent
        self.first = first
        """Blocks before it."""
        self.blocks = array("i")
        self.tokens = bytearray()
        self.children: dict[bytes, Run] = {}
        """By the tokens of their first block."""
        self.older: Run | None = None  # in the line of cached runs; None in none
        self.newer: Run | None = None

    @property
    def end(self) -> int:
        """Blocks before it and in it."""
        return self.first + len(self.blocks)

    def at(self, count: int) -> "Run":
        """Where the prefix of ``count`` blocks ends: this run, or one before it."""
        run = self
        while run.first >= count and run.parent is not None:
            run = run.parent
        return run


class BlockPool:
    """Counts the owners of each block of a :class:`~cupy_pagedkv.BlockAllocator`, and finds full blocks by tokens.

    >>> pool = BlockPool(num_blocks=4, block_size=1)
    >>> blocks = pool.take(2)
    >>> run = pool.remember(pool.root(None), 0, blocks, b"the cat ")  # tokens of four bytes each
    >>> pool.release(blocks, 0, run, 2)
    >>> pool.num_available, pool.num_cached
    (4, 2)
    >>> run, blocks = pool.find(pool.root(None), b"the dog ")
    >>> blocks
    array([0], dtype=int32)

    A call costs what its own blocks cost, and to copy the tokens of runs that it splits or joins, whatever the size of
    the pool, but for :meth:`clear` and :meth:`check`, and for the growth of Python's dictionaries. A call that raises
    changes nothing. Not thread-safe.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._allocator = BlockAllocator(num_blocks, block_size)
        self._bytes = 4 * block_size  # of the tokens of a block
        self._owners = np.zeros(num_blocks, np.int32)
        self._roots: WeakValueDictionary[tuple[type, Salt], Run] = WeakValueDictionary()
        self._line = _Line()
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
        return self._line.num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that :meth:`take` could give at once: the free and the cached ones."""
        return self._allocator.free_block_count + self._line.num_blocks

    def take(self, count: int) -> _Blocks:
        """``count`` blocks with one owner each, all or none; cached ones, the one longest without an owner first, where
        there are not enough free ones. Raises :class:`~cupy_pagedkv.OutOfBlocksError`."""
        if count > self.num_available:
            raise OutOfBlocksError(count, self.num_available, self.num_blocks)
        missing = count - self._allocator.free_block_count
        if missing > 0:
            self._evict(missing)
            self.evictions += missing
        blocks = self._allocator.allocate(count)
        self._owners[blocks] = 1
        return blocks

    def share(self, blocks: _Blocks, run: Run, known: int) -> None:
        """Give each of ``blocks``, live or cached and all different, one more owner, the first ``known`` of which are
        the prefix that ends at ``run``."""
        self._owners[blocks] += 1
        run = run.at(known)
        if run.newer is not None and known < run.end:
            run = self._split(run, known)
        while run.newer is not None:
            self._line.remove(run)
            assert run.parent is not None
            run = run.parent

    def release(self, blocks: _Blocks, first: int = 0, run: Run | None = None, known: int = 0) -> None:
        """Take an owner from each of ``blocks``, which are all different, and a sequence's from its block ``first`` on;
        its first ``known`` blocks are the prefix that ends at ``run``.

        Those that are left without are cached, if they are found by their tokens, and free otherwise; the last of them
        will be the first to be used again, since nothing is found behind a block that is gone.
        """
        self._owners[blocks] -= 1
        gone = self._owners[blocks] == 0
        cached = gone.copy()
        cached[max(0, known - first) :] = False
        if self._twins:  # what they hold is found in another block
            at = run
            for i in np.flatnonzero(cached)[::-1].tolist():
                assert at is not None
                at = at.at(first + i + 1)
                cached[i] = not self._leave_to_twin(at, first + i, int(blocks[i]))
        self._allocator.free(blocks[gone & ~cached][::-1])
        if cached.any():  # and then all behind that are known, too
            assert run is not None
            self._retire(run.at(known), first + int(cached.argmax()))

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

    def root(self, salt: Salt) -> Run:
        """The run before the first token of all sequences with this salt. Salts of two types are never equal."""
        key = (type(salt), salt)
        root = self._roots.get(key)
        if root is None:  # and it goes when no block and no sequence needs it
            self._roots[key] = root = Run()
        return root

    def find(self, root: Run, tokens: bytes) -> tuple[Run, _Blocks]:
        """The blocks that hold the first of ``tokens``, those of whole blocks, and the run in which they end."""
        run, blocks, start = root, array("i"), 0
        while start < len(tokens):
            child = run.children.get(tokens[start : start + self._bytes])
            if child is None:
                break
            run, same = child, self._same(child, child.first, tokens, start)
            blocks += run.blocks[:same]
            start += same * self._bytes
            if same < len(run.blocks):
                break
        return run, np.array(blocks, np.int32)

    def remember(self, run: Run, column: int, blocks: _Blocks, tokens: bytes) -> Run:
        """Let ``tokens``, behind the prefix of ``column`` live blocks that ends at ``run``, be found in the live
        ``blocks``, which hold them. Returns the run in which they end.

        Where another live block holds the same already, that one is found as before, and this one takes its place when
        the other loses its last owner. A cached one is freed: its content is now in use, and need not be there twice.
        """
        run, done = run.at(column), 0
        while done < len(blocks):
            start, here = done * self._bytes, column + done
            if here == run.end:
                child = run.children.get(tokens[start : start + self._bytes])
                if child is None:
                    return self._append(run, blocks[done:], tokens[start:])
                run = child
            same = self._same(run, here, tokens, start)
            if same == 0:
                return self._append(self._split(run, here), blocks[done:], tokens[start:])
            run = self._adopt(run, here, blocks[done : done + same])
            done += same
        return run

    def forget(self, run: Run, column: int, block: int) -> None:
        """Let ``block``, the last of the prefix of ``column + 1`` that ends at ``run``, be found no more, because its
        only owner will write something else to it, nor what came behind it.

        The latter can only be cached, since who owns a block owns those before it, or twins of theirs; it is freed.
        """
        run = run.at(column + 1)
        if self._leave_to_twin(run, column, block):
            return
        assert column + 1 == run.end
        unreachable, behind = array("i"), [*run.children.values()]
        run.children.clear()
        while behind:
            gone = behind.pop()
            behind += gone.children.values()
            gone.children.clear()  # or runs and their parents would keep each other
            self._line.remove(gone)
            unreachable += gone.blocks
        self._shorten(run, 1)
        self._allocator.free(np.array(unreachable, np.int32))

    def tokens_at(self, run: Run, column: int) -> npt.NDArray[np.int32]:
        """The tokens of block ``column`` of a prefix that ends at ``run``."""
        run = run.at(column + 1)
        start = (column - run.first) * self._bytes
        return np.frombuffer(bytes(run.tokens[start : start + self._bytes]), np.int32)

    def clear(self) -> None:
        """Free all cached blocks."""
        self._evict(self._line.num_blocks)

    def check(self, owners: npt.NDArray[np.integer], prefixes: Iterable[tuple[Run, _Blocks]]) -> None:
        """Raise ``RuntimeError`` unless all adds up, with ``owners`` ``[num_blocks]`` as counted from the sequences,
        and with the known blocks of each and the run that they end at."""
        live = int(np.count_nonzero(self._owners))
        free, cached, total = self._allocator.free_block_count, self._line.num_blocks, self.num_blocks
        if free + live + cached != total:
            raise RuntimeError(f"{free} free + {live} live + {cached} cached blocks are not the pool's {total}")
        wrong = np.flatnonzero(self._owners != owners)
        if len(wrong):
            block = wrong[0]
            raise RuntimeError(f"block {block} counts {self._owners[block]} owners, but {owners[block]} hold it")
        self._allocator.check_integrity()

        found: set[int] = set()
        in_line = {id(run): i for i, run in enumerate(self._line)}
        counted = 0
        runs = [*self._roots.values()]
        for run in runs:  # which grows
            name = f"the run of blocks {run.blocks.tolist()}"
            is_cached = id(run) in in_line
            if len(run.tokens) != len(run.blocks) * self._bytes:
                raise RuntimeError(f"{name} has {len(run.tokens)} bytes of tokens")
            if not found.isdisjoint(run.blocks) or len(set(run.blocks)) < len(run.blocks):
                raise RuntimeError(f"{name} has blocks that are found elsewhere, too")
            if any(bool(self._owners[block]) is is_cached for block in run.blocks):
                raise RuntimeError(f"{name} is {'' if is_cached else 'not '}cached, but has the owners "
                                   f"{[int(self._owners[block]) for block in run.blocks]}")  # fmt: skip
            if any(self._allocator._is_free[block] for block in run.blocks):
                raise RuntimeError(f"{name} is found, but not all of its blocks are taken")
            found.update(run.blocks)
            counted += len(run.blocks) * is_cached
            for key, child in run.children.items():
                if child.parent is not run or child.first != run.end or child.tokens[: self._bytes] != key:
                    raise RuntimeError(f"{name} does not lead to that of blocks {child.blocks.tolist()}")
                if is_cached and not in_line.get(id(child), len(in_line)) < in_line[id(run)]:
                    raise RuntimeError(f"{name} would be evicted before what is behind it")
                runs.append(child)
        if not cached == counted == sum(len(run.blocks) for run in self._line):
            raise RuntimeError(f"{cached} cached blocks are counted, {counted} are found")
        for block, twins in self._twins.items():
            if block not in found or not twins or (self._owners[[block, *twins]] == 0).any():
                raise RuntimeError(f"block {block} has the twins {sorted(twins)}, but not all of them are live")
        reached = set(runs)
        for end, blocks in prefixes:
            run, column = end.at(len(blocks)), len(blocks)
            while column:
                if run not in reached:
                    raise RuntimeError(f"the run of blocks {run.blocks.tolist()} is known, but not found")
                for block, at in zip(blocks[run.first : column].tolist(), run.blocks, strict=False):
                    if block != at and block not in self._twins.get(at, ()):
                        raise RuntimeError(f"block {block} is known, but its tokens lead to block {at}")
                run, column = run.at(run.first), run.first

    def _evict(self, count: int) -> None:
        evicted = array("i")
        while count:
            run = self._line.oldest
            cut = min(count, len(run.blocks))
            evicted += run.blocks[: -cut - 1 : -1]
            self._shorten(run, cut)
            count -= cut
        self._allocator.free(np.array(evicted, np.int32))

    def _shorten(self, run: Run, count: int) -> None:
        """Cut the last ``count`` blocks of a run that nothing lies behind."""
        assert run.parent is not None
        is_cached = run.newer is not None
        if count == len(run.blocks):
            if is_cached:
                self._line.remove(run)
            del run.parent.children[bytes(run.tokens[: self._bytes])]
        else:
            del run.blocks[-count:], run.tokens[-count * self._bytes :]
            self._line.num_blocks -= count * is_cached

    def _same(self, run: Run, column: int, tokens: bytes, start: int) -> int:
        """How many blocks of a run, from ``column`` on, hold what ``tokens`` have from ``start`` on."""
        own = run.tokens[(column - run.first) * self._bytes :] if column > run.first else run.tokens
        if tokens.startswith(own, start):
            return run.end - column
        count = min(len(own), len(tokens) - start) // 4
        differ = np.frombuffer(own, np.int32, count) != np.frombuffer(tokens, np.int32, count, start)
        first = int(differ.argmax()) if differ.any() else count
        return 4 * first // self._bytes

    def _split(self, run: Run, column: int) -> Run:
        """Split a run before ``column``; returns the first part, which is live if the run was."""
        parent, count = run.parent, column - run.first
        assert parent is not None
        head = Run(parent, run.first)
        head.blocks, run.blocks = run.blocks[:count], run.blocks[count:]
        head.tokens, run.tokens = run.tokens[: count * self._bytes], run.tokens[count * self._bytes :]
        parent.children[bytes(head.tokens[: self._bytes])] = head
        head.children[bytes(run.tokens[: self._bytes])] = run
        run.parent, run.first = head, column
        if run.newer is not None:
            self._line.insert(head, run.newer)
        return head

    def _append(self, run: Run, blocks: _Blocks, tokens: bytes) -> Run:
        """Let live blocks follow a live run, or a root."""
        if run.parent is None or run.children:
            run.children[tokens[: self._bytes]] = run = Run(run, run.end)
        run.blocks.frombytes(blocks.tobytes())
        run.tokens += tokens
        return run

    def _adopt(self, run: Run, column: int, blocks: _Blocks) -> Run:
        """Live blocks hold what a run does from ``column`` on; returns the run in which they end."""
        end = column + len(blocks)
        if run.newer is None:
            for found, block in zip(run.blocks[column - run.first :], blocks.tolist(), strict=False):
                self._twins.setdefault(found, set()).add(block)
        else:  # it begins at `column`, since what comes before is live
            if end < run.end:
                run = self._split(run, end)
            self._line.remove(run)
            self._allocator.free(np.array(run.blocks, np.int32))
            run.blocks = array("i", blocks.tobytes())
        return run

    def _leave_to_twin(self, run: Run, column: int, block: int) -> bool:
        """Whether a live block has a twin, in which its tokens are found from now on."""
        found = run.blocks[column - run.first]
        twins = self._twins.pop(found, None)
        if twins is None:
            return False
        if block == found:
            found = run.blocks[column - run.first] = twins.pop()
        else:
            twins.remove(block)
        if twins:
            self._twins[found] = twins
        return True

    def _retire(self, run: Run, start: int) -> None:
        """Nobody owns the last blocks of a prefix any more, from ``start`` to the end of ``run``: put them in line, and
        join runs that no prompt parts from any more."""
        while run.end > start:
            if run.first < start:
                self._split(run, start)
            above: list[Run] = []
            parent = run.parent
            assert parent is not None
            while parent.end > start and len(parent.children) == 1:
                if parent.first < start:
                    self._split(parent, start)
                above.append(parent)
                assert parent.parent is not None
                parent = parent.parent
            if above:
                parts = [*above[::-1], run]
                run.blocks = array("i", b"".join(part.blocks.tobytes() for part in parts))
                run.tokens = bytearray().join(part.tokens for part in parts)
                run.parent, run.first = parent, above[-1].first
                for part in above:
                    part.children.clear()  # or they would keep each other
                parent.children[bytes(run.tokens[: self._bytes])] = run
            self._line.append(run)
            run = parent


class _Line:
    """Cached runs, those longest there first, linked in a ring; any of them can leave. Counts their blocks."""

    def __init__(self) -> None:
        self.num_blocks = 0
        self._ends = Run()
        self._ends.older = self._ends.newer = self._ends

    @property
    def oldest(self) -> Run:
        assert self._ends.newer is not None
        return self._ends.newer

    def append(self, run: Run) -> None:
        self.num_blocks += len(run.blocks)
        self.insert(run, self._ends)

    def insert(self, run: Run, newer: Run) -> None:
        """Put a run before another. Its blocks are counted already."""
        older = newer.older
        assert older is not None
        run.older, run.newer = older, newer
        older.newer = newer.older = run

    def remove(self, run: Run) -> None:
        older, newer = run.older, run.newer
        assert older is not None
        assert newer is not None
        older.newer, newer.older = newer, older
        run.older = run.newer = None
        self.num_blocks -= len(run.blocks)

    def __iter__(self) -> Iterator[Run]:
        run = self.oldest
        while run is not self._ends:
            yield run
            assert run.newer is not None
            run = run.newer
