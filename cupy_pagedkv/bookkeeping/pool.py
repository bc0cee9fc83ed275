"""Blocks that several sequences own, and blocks that are found again by the tokens whose K and V they hold.

A block is *free*, *live* (it has owners) or *cached* (it has none, but is found by its tokens until it is needed for
others), and free + live + cached is always the whole pool.

Where there is a second tier, cached blocks that are needed for others go to *places* in host memory, numbered on from
the pool's blocks, and are found there. What comes back into the pool leaves its place as a *spare*: as long as nobody
needs that for something else, the block can go again without a copy. Spares are given up first, and what makes room for
blocks that come back is lent places of a reserve until these have left theirs: so pool and places together hold what
one larger pool would.

What is found is an exact trie, whose nodes are runs of blocks::

    root ── run [the, cat | sat, on] ─┬─ run [a, mat]
                                      └─ run [the, roof | and, sang]

Tokens are compared, and no key is a hash of anything. A run is split where a prompt parts from it, and where a part of
it gains or loses its owners: so all of its blocks are live, or all are cached, and were let go at once. As who owns a
block owns those before it, or twins of theirs, what lies behind a cached run is cached and was let go before; therefore
what is evicted is always the end of a run that nothing lies behind. What lies behind a run on the host is there, too.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from .allocator import BlockAllocator, OutOfBlocksError
from .places import Places
from .salts import Salt

__all__ = ["BlockPool", "Run"]

_Blocks: TypeAlias = npt.NDArray[np.int32]

_NONE: _Blocks = np.zeros(0, np.int32)


class Run:
    """Blocks one behind the other, and the int32 tokens that they hold. A root is a run of none.

    Who holds a prefix of so many blocks remembers a run in which it ends, or one behind that, and asks :meth:`at` for
    the former: where a run is split, or joined with the one before, the object goes on as the last part.
    """

    __slots__ = ("__weakref__", "blocks", "children", "first", "newer", "older", "on_host", "parent", "tokens", "used")

    def __init__(self, parent: "Run | None" = None, first: int = 0) -> None:
        self.parent = parent
        self.first = first
        """Blocks before it."""
        self.blocks = array("i")
        self.on_host = False
        """Whether ``blocks`` are places on the host."""
        self.tokens = bytearray()
        self.children: dict[bytes, Run] = {}
        """By the tokens of their first block."""
        self.used = 0
        """When it lost its last owner, as a number that rises."""
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
    changes nothing, but that where ``store`` does, cached blocks on the host may be gone. Not thread-safe.

    With ``num_places``, and a ``reserve`` of more, ``store(blocks, places)`` is to copy blocks of the pool to places in
    host memory, or to queue that before whatever is written to these blocks next.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_places: int = 0,
        reserve: int = 0,
        store: Callable[[_Blocks, _Blocks], object] = lambda blocks, places: None,
    ) -> None:
        self._allocator = BlockAllocator(num_blocks, block_size)
        self._places = Places(num_blocks, num_places, block_size, reserve)
        self._store = store
        self._bytes = 4 * block_size  # of the tokens of a block
        self._owners = np.zeros(num_blocks + num_places + reserve, np.int32)  # of places, too
        self._roots: WeakValueDictionary[tuple[type, Salt], Run] = WeakValueDictionary()
        self._line = _Line()
        self._host_line = _Line()
        self._time = 0
        # Live blocks that hold the same as another that is found, and live: {that one: the others}.
        self._twins: dict[int, set[int]] = {}
        self.evictions = 0
        self.offloaded = 0
        """Blocks that were copied to the host."""
        self.restored = 0
        """Blocks that were copied from there."""
        self.lost = 0
        """Cached blocks that made room for others, and are found no more, in the pool or on the host."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self._allocator.total_blocks

    @property
    def num_cached(self) -> int:
        """Blocks without an owner that are still found."""
        return self._line.num_blocks

    @property
    def num_places(self) -> int:
        """Places on the host."""
        return self._places.total

    @property
    def num_ids(self) -> int:
        """Blocks, and places, those of the reserve among them."""
        return len(self._owners)

    @property
    def num_cached_places(self) -> int:
        """Places that nobody owns, and that hold what is found nowhere else."""
        return self._host_line.num_blocks

    @property
    def num_available_places(self) -> int:
        """Places that could be taken at once: those that are free, spare or cached."""
        return self._places.num_free + len(self._places.spare) + self._host_line.num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that :meth:`take` could give at once: the free and the cached ones."""
        return self._allocator.free_block_count + self._line.num_blocks

    def take(self, count: int, leaving: _Blocks = _NONE) -> _Blocks:
        """``count`` blocks with one owner each, all or none; cached ones, the one longest without an owner first, where
        there are not enough free ones: these go to the host, as far as there is room. Raises
        :class:`~cupy_pagedkv.OutOfBlocksError`, and what ``store`` does.

        ``leaving`` are places, each of which is about to lose an owner for each time that it is in there: there is room
        as if they had, as far as the reserve goes. :meth:`settle` is to be called once they have, or if they do not."""
        if count > self.num_available:
            raise OutOfBlocksError(count, self.num_available, self.num_blocks)
        missing = count - self._allocator.free_block_count
        if missing > 0:
            if len(leaving):
                distinct, counts = np.unique(leaving, return_counts=True)
                num_free = int(np.count_nonzero(self._owners[distinct] == counts))
                self._places.num_lent = min(num_free, self._places.reserve)
            self._evict(missing)
            self.evictions += missing
        blocks = np.sort(self._allocator.allocate(count))  # those side by side are copied at once
        self._owners[blocks] = 1
        return blocks

    def share(self, blocks: _Blocks, run: Run, known: int, first: int = 0) -> None:
        """Give each of ``blocks``, live or cached and all different, one more owner. They are those of a sequence from
        its block ``first`` on, places behind blocks of the pool; its first ``known`` are the prefix that ends at
        ``run``."""
        self._owners[blocks] += 1
        in_pool = min(known, first + self._in_pool(blocks))
        for on_host, end in ((True, known), (False, in_pool)) if in_pool < known else ((False, known),):
            at = run.at(end)
            if at.on_host is on_host and at.newer is not None and end < at.end:
                at = self._split(at, end)
            while at.on_host is on_host and at.newer is not None:
                self._line_of(at).remove(at)
                assert at.parent is not None
                at = at.parent

    def release(self, blocks: _Blocks, first: int = 0, run: Run | None = None, known: int = 0) -> None:
        """Take an owner from each of ``blocks``, which are all different, and a sequence's from its block ``first`` on,
        places behind blocks of the pool; its first ``known`` are the prefix that ends at ``run``.

        Those that are left without are cached, if they are found by their tokens, and free otherwise; the last of them
        will be the first to be used again, since nothing is found behind a block that is gone.
        """
        in_pool = self._in_pool(blocks)
        if in_pool < len(blocks):
            self._release_places(blocks[in_pool:], first + in_pool, run, known)
            blocks, known = blocks[:in_pool], min(known, first + in_pool)
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

    def offload(self, blocks: _Blocks, run: Run, known: int) -> _Blocks:
        """Copy the blocks of a sequence to the host, and let go of those of the pool; returns the places, which it owns
        instead. Its first ``known`` blocks are the prefix that ends at ``run``.

        Raises :class:`~cupy_pagedkv.OutOfBlocksError` where too few places can be taken, and what ``store`` does.
        """
        in_pool = self._in_pool(blocks)
        ours = blocks[:in_pool]
        end = min(known, in_pool)
        found = ours[:end].copy()
        while self._twins and end:  # one of which is found, and paired
            at = run.at(end)
            found[at.first : end] = at.blocks[: end - at.first]
            end = at.first
        places = np.full(in_pool, -1, np.int32)
        places[: len(found)] = self._places.of(found)
        missing = places < 0
        wanted = int(np.count_nonzero(missing))
        available = self.num_available_places - sum(place in self._places.spare for place in places.tolist())
        if wanted > available:
            raise OutOfBlocksError(wanted, available, self.num_places, "places on the host")
        places[missing] = self._copy_out(ours[missing], places[~missing])
        self._places.pair(found, places[: len(found)])
        self._owners[places] += 1
        self.release(ours, 0, run, min(known, in_pool))
        return np.concatenate([places, blocks[in_pool:]])

    def can_keep_all(self, count: int) -> bool:
        """Whether what leaves the pool for ``count`` blocks goes to free and spare places, and nothing is lost."""
        return count - self._allocator.free_block_count <= self._places.num_free + len(self._places.spare)

    def settle(self) -> None:
        """Nothing is lent any more: give up spares, and what is cached on the host, until the reserve is whole."""
        self._places.num_lent = 0
        self._make_room_on_host(0)

    @property
    def reserve(self) -> int:
        """Places beside :attr:`num_places`."""
        return self._places.reserve

    def blocks_of(self, places: _Blocks) -> _Blocks:
        """The blocks of the pool that hold what the places do, or −1."""
        return self._places.blocks_of(places)

    def places_of(self, blocks: _Blocks) -> _Blocks:
        """The places that hold what the blocks do, or −1."""
        return self._places.of(blocks)

    def num_to_keep(self, blocks: _Blocks) -> int:
        """How many of ``blocks`` are cached, and so count as available."""
        return int(np.count_nonzero(self._owners[np.unique(blocks)] == 0))

    def divide(self, blocks: _Blocks) -> None:
        """Let each of ``blocks``, which were just taken, have as many owners as times that it is in there."""
        self._owners[blocks] = 0
        np.add.at(self._owners, blocks, 1)

    def come_back(self, run: Run, known: int, first: int, places: _Blocks, blocks: _Blocks) -> None:
        """What a sequence has in ``places`` from its block ``first`` on is in the live ``blocks``, which it owns, now,
        and it lets go of the places. Its first ``known`` blocks are the prefix that ends at ``run``."""
        count = max(0, known - first)
        at = run.at(known)
        if count and at.on_host and known < at.end:
            at = self._split(at, known)
        while at.on_host and at.end > first:
            at.blocks = array("i", blocks[at.first - first : at.end - first].tobytes())
            at.on_host = False
            assert at.parent is not None
            at = at.parent
        self._places.pair(blocks[:count], places[:count])
        self._release_places(places, first, None, 0)

    def writers_that_copy(self, blocks: _Blocks, are_shared: npt.NDArray[np.bool_] | bool = False) -> list[int]:
        """Which of the owners that are about to write to ``blocks``, one for each item, must write to a copy instead,
        when those that ``are_shared`` have got an owner more.

        The last owner of a block writes to the block itself, if all others are about to write, too.
        """
        left: dict[int, int] = {}
        copying = []
        owners_of = self._owners[blocks] + are_shared
        for i in np.flatnonzero(owners_of > 1).tolist():
            block = int(blocks[i])
            owners = left.get(block, int(owners_of[i]))
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
        """The blocks that hold the first of ``tokens``, those of whole blocks, and the run in which they end; places
        behind blocks of the pool."""
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
        A place on the host becomes a spare.
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

        The latter can only be cached, since who owns a block owns those before it, or twins of theirs; it is freed. But
        what is owned on the host, by sequences that are parked, is found there from now on.
        """
        run = run.at(column + 1)
        if self._leave_to_twin(run, column, block):
            return
        assert column + 1 == run.end
        if column > run.first:
            self._split(run, column)
        leaving = array("i")
        staying = [run]
        for at in staying:  # which grows
            blocks = np.array(at.blocks, np.int32)
            places = self._places.of(blocks)
            owned = int(np.count_nonzero(self._owners[places[places >= 0]]))  # the first ones
            if owned < len(blocks):
                leaving += self._drop_from(at, owned)
            else:
                staying += [child for child in at.children.values() if not child.on_host]
            if owned:
                if at is not run:
                    self._line.remove(at)
                leaving += at.blocks
                at.blocks, at.on_host = array("i", self._places.part(blocks[:owned]).tobytes()), True
        assert leaving[0] == block
        self._allocator.free(np.array(leaving, np.int32)[1:])

    def tokens_at(self, run: Run, column: int) -> npt.NDArray[np.int32]:
        """The tokens of block ``column`` of a prefix that ends at ``run``."""
        run = run.at(column + 1)
        start = (column - run.first) * self._bytes
        return np.frombuffer(bytes(run.tokens[start : start + self._bytes]), np.int32)

    def clear(self) -> None:
        """Free all cached blocks, and all places on the host, which nobody owns."""
        self._places.free(self._drop(self._host_line, self._host_line.num_blocks))
        self._places.give_up_spares(len(self._places.spare))
        self._allocator.free(self._drop(self._line, self._line.num_blocks))

    def check(self, owners: npt.NDArray[np.integer], prefixes: Iterable[tuple[Run, _Blocks]]) -> None:
        """Raise ``RuntimeError`` unless all adds up, with ``owners`` ``[num_ids]`` as counted from the sequences,
        and with the known blocks of each and the run that they end at."""
        places = self._places
        live = int(np.count_nonzero(self._owners[: places.first]))
        free, cached, total = self._allocator.free_block_count, self._line.num_blocks, self.num_blocks
        if free + live + cached != total:
            raise RuntimeError(f"{free} free + {live} live + {cached} cached blocks are not the pool's {total}")
        wrong = np.flatnonzero(self._owners != owners)
        if len(wrong):
            block = wrong[0]
            raise RuntimeError(f"block {block} counts {self._owners[block]} owners, but {owners[block]} hold it")
        self._allocator.check_integrity()
        places.check()
        is_free = self._allocator._is_free
        if places.allocator:
            is_free = np.concatenate([is_free, places.allocator._is_free])
            ids = np.arange(places.first, self.num_ids, dtype=np.int32)
            paired, owned = places.blocks_of(ids) >= 0, self._owners[ids] > 0
            if set(ids[paired & ~owned].tolist()) != places.spare.keys():
                raise RuntimeError(f"{len(places.spare)} places are spare, {ids[paired & ~owned].tolist()} should be")
            used = np.count_nonzero(paired | owned) + self._host_line.num_blocks
            if used + places.num_free != places.total:
                raise RuntimeError(f"{used} used + {places.num_free} free places are not all {places.total}")

        found: set[int] = set()
        in_line = {id(run): i for i, run in enumerate([*self._host_line, *self._line])}
        counted = 0
        runs = [*self._roots.values()]
        for run in runs:  # which grows
            name = f"the run of blocks {run.blocks.tolist()}"
            is_cached = id(run) in in_line
            if len(run.tokens) != len(run.blocks) * self._bytes:
                raise RuntimeError(f"{name} has {len(run.tokens)} bytes of tokens")
            if not found.isdisjoint(run.blocks) or len(set(run.blocks)) < len(run.blocks):
                raise RuntimeError(f"{name} has blocks that are found elsewhere, too")
            if any((block >= places.first) is not run.on_host for block in run.blocks):
                raise RuntimeError(f"{name} is {'' if run.on_host else 'not '}on the host, but has other blocks")
            if run.on_host and (places.blocks_of(np.array(run.blocks, np.int32)) >= 0).any():
                raise RuntimeError(f"{name} is on the host, but some of it is in the pool, too")
            if any(bool(self._owners[block]) is is_cached for block in run.blocks):
                raise RuntimeError(f"{name} is {'' if is_cached else 'not '}cached, but has the owners "
                                   f"{[int(self._owners[block]) for block in run.blocks]}")  # fmt: skip
            if any(is_free[block] for block in run.blocks):
                raise RuntimeError(f"{name} is found, but not all of its blocks are taken")
            found.update(run.blocks)
            counted += len(run.blocks) * is_cached
            for key, child in run.children.items():
                if child.parent is not run or child.first != run.end or child.tokens[: self._bytes] != key:
                    raise RuntimeError(f"{name} does not lead to that of blocks {child.blocks.tolist()}")
                if run.on_host and not child.on_host:
                    raise RuntimeError(f"{name} is on the host, but what lies behind it is not")
                if (
                    is_cached
                    and not in_line.get(id(child), -1 if child.on_host > run.on_host else len(in_line))
                    < (in_line[id(run)])
                ):
                    raise RuntimeError(f"{name} would be evicted before what is behind it")
                runs.append(child)
        lines = (self._line, self._host_line)
        if any(older.used > newer.used for line in lines for older, newer in pairwise(line)):
            raise RuntimeError("what was used later would be evicted before what was used earlier")
        if not sum(line.num_blocks for line in lines) == counted == sum(len(r.blocks) for line in lines for r in line):
            raise RuntimeError(f"{[line.num_blocks for line in lines]} cached blocks are counted, {counted} are found")
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
                    if (
                        block != at
                        and block not in self._twins.get(at, ())
                        and not (block >= places.first and int(places.blocks_of(np.array([block]))[0]) == at)
                    ):
                        raise RuntimeError(f"block {block} is known, but its tokens lead to block {at}")
                run, column = run.at(run.first), run.first

    def _evict(self, count: int) -> None:
        """Free cached blocks of the pool; those used last go to the host, as far as there is room."""
        if not self.num_places:
            self._allocator.free(self._drop(self._line, count))
            self.lost += count
            return
        parts, evicted = [], array("i")  # the oldest first
        for run in self._line:
            cut = min(count - len(evicted), len(run.blocks))
            parts.append((run, run.end - cut))
            evicted += run.blocks[: -cut - 1 : -1]
            if len(evicted) == count:
                break
        blocks = np.array(evicted, np.int32)
        places = self._places.of(blocks)
        owned = (places >= 0) & (self._owners[places] > 0)
        room = self.num_available_places
        kept = owned | (np.cumsum(~owned[::-1])[::-1] <= room)
        leaving = kept & (places < 0)
        # In the order of their run, so that blocks that follow each other do so on the host.
        places[leaving] = self._copy_out(blocks[leaving][::-1], places[kept & ~leaving])[::-1]
        self.lost += int(np.count_nonzero(~kept))
        self._places.part(blocks[kept])
        start = 0
        for run, column in parts:
            part = slice(start, start + run.end - column)
            start = part.stop
            self._move_out(run, column, places[part][kept[part]][::-1], int(np.count_nonzero(owned[part])))
        self._allocator.free(blocks)

    def _move_out(self, run: Run, column: int, places: _Blocks, num_owned: int) -> None:
        """A cached run's blocks from ``column`` on are in ``places`` from now on, the first ``num_owned`` of which have
        owners; what these do not suffice for is gone, and nothing lies behind it."""
        if column + len(places) < run.end:
            self._shorten(run, run.end - column - len(places))
        if not len(places):
            return
        if column > run.first:
            self._split(run, column)
        self._line.remove(run)
        run.blocks = array("i", places.tobytes())
        run.on_host = True
        if num_owned == len(places):
            return
        if num_owned:
            self._split(run, column + num_owned)
        # What was let go of on the host may be newer, though it was not in the pool since.
        newer, behind = self._host_line.first_after(run.used), [*run.children.values()]
        if len(behind) == 1 and behind[0] is newer.older:
            self._host_line.remove(behind[0])
            run = self._join([run, behind[0]])
        self._host_line.put(run, newer)

    def _copy_out(self, blocks: _Blocks, needed: _Blocks) -> _Blocks:
        """Copy blocks to places that hold nothing any more, which are returned: free ones, spare ones but for those
        ``needed``, which are not spare any more, and then cached ones, the oldest first. There are enough."""
        spares = [place for place in needed.tolist() if place in self._places.spare]
        for place in spares:
            del self._places.spare[place]
        count = len(blocks)
        self._make_room_on_host(count)
        places = self._places.take(count)
        if count:
            try:
                self._store(blocks, places)
            except BaseException:
                self._places.free(places)
                self._places.spare.update(dict.fromkeys(spares))
                raise
        self.offloaded += count
        return places

    def _make_room_on_host(self, count: int) -> None:
        """Let ``count`` places be free: spare ones, and then cached ones, the oldest first."""
        if count > self._places.num_free:
            self._places.give_up_spares(count - self._places.num_free)
        missing = count - self._places.num_free
        if missing > 0:
            self._places.free(self._drop(self._host_line, missing))
            self.lost += missing

    def _release_places(self, places: _Blocks, first: int, run: Run | None, known: int) -> None:
        """Of :meth:`release` what is on the host."""
        self._owners[places] -= 1
        gone = self._owners[places] == 0
        paired = self._places.blocks_of(places) >= 0
        self._places.spare.update(dict.fromkeys(places[gone & paired].tolist()))
        gone &= ~paired
        cached = gone.copy()
        cached[max(0, known - first) :] = False
        self._places.free(places[gone & ~cached])
        if cached.any():
            assert run is not None
            self._retire(run.at(known), first + int(cached.argmax()))
        if run is not None and known > first and paired[0]:
            self._touch(run, min(known, first + int(np.count_nonzero(paired))))

    def _free_spares(self, blocks: _Blocks) -> None:
        """What ``blocks`` of the pool hold is to be found no more: nor in their places on the host."""
        places = self._places.part(blocks)
        for place in places.tolist():
            del self._places.spare[place]
        self._places.free(places)

    def _in_pool(self, blocks: _Blocks) -> int:
        """How many of a sequence's blocks, the first ones, are in the pool."""
        return int(np.count_nonzero(blocks < self._places.first)) if self.num_places else len(blocks)

    def _line_of(self, run: Run) -> "_Line":
        return self._host_line if run.on_host else self._line

    def _drop(self, line: "_Line", count: int) -> _Blocks:
        """Let the oldest ``count`` blocks of a line be found no more."""
        dropped = array("i")
        while count:
            run = line.oldest
            cut = min(count, len(run.blocks))
            dropped += run.blocks[: -cut - 1 : -1]
            self._shorten(run, cut)
            count -= cut
        return np.array(dropped, np.int32)

    def _shorten(self, run: Run, count: int) -> None:
        """Cut the last ``count`` blocks of a run that nothing lies behind."""
        assert run.parent is not None
        is_cached = run.newer is not None
        line = self._line_of(run)
        if count == len(run.blocks):
            if is_cached:
                line.remove(run)
            del run.parent.children[bytes(run.tokens[: self._bytes])]
        else:
            del run.blocks[-count:], run.tokens[-count * self._bytes :]
            line.num_blocks -= count * is_cached

    def _drop_from(self, run: Run, count: int) -> "array[int]":
        """Let all but the first ``count`` blocks of a run, and what lies behind, be found no more; nobody owns places
        of theirs, which are freed. Returns the blocks of the pool."""
        unreachable = {False: run.blocks[count:], True: array("i")}
        behind = [*run.children.values()]
        run.children.clear()
        while behind:
            gone = behind.pop()
            behind += gone.children.values()
            gone.children.clear()  # or runs and their parents would keep each other
            self._line_of(gone).remove(gone)
            unreachable[gone.on_host] += gone.blocks
        self._shorten(run, len(run.blocks) - count)
        self._free_spares(np.array(unreachable[False], np.int32))
        self._places.free(np.array(unreachable[True], np.int32))
        return unreachable[False]

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
        head.on_host, head.used = run.on_host, run.used
        head.blocks, run.blocks = run.blocks[:count], run.blocks[count:]
        head.tokens, run.tokens = run.tokens[: count * self._bytes], run.tokens[count * self._bytes :]
        parent.children[bytes(head.tokens[: self._bytes])] = head
        head.children[bytes(run.tokens[: self._bytes])] = run
        run.parent, run.first = head, column
        if run.newer is not None:
            self._line_of(run).insert(head, run.newer)
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
        if run.newer is None and not run.on_host:
            for found, block in zip(run.blocks[column - run.first :], blocks.tolist(), strict=False):
                self._twins.setdefault(found, set()).add(block)
        else:  # it begins at `column`, since what comes before is live
            if end < run.end:
                run = self._split(run, end)
            if run.newer is not None:
                self._line_of(run).remove(run)
            old = np.array(run.blocks, np.int32)
            if run.on_host:
                run.on_host = False
                self._places.pair(blocks, old)
                self._places.spare.update(dict.fromkeys(old[self._owners[old] == 0].tolist()))
            else:
                self._pass_on(old, blocks)
                self._allocator.free(old)
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
            self._pass_on(np.array([block], np.int32), np.array([found], np.int32))
        else:
            twins.remove(block)
        if twins:
            self._twins[found] = twins
        return True

    def _is_awaited(self, run: Run) -> bool:
        """Whether somebody owns places of what a run in the pool holds, and may remember that run."""
        if run.on_host or not self.num_places:
            return False
        place = int(self._places.of(np.array(run.blocks[:1], np.int32))[0])
        return place >= 0 and bool(self._owners[place])

    def _pass_on(self, old: _Blocks, new: _Blocks) -> None:
        """What ``old`` blocks held is found in the ``new`` ones: their places go with it."""
        has_place = self._places.of(old) >= 0
        if has_place.any():
            self._places.pair(new[has_place], self._places.part(old))

    def _retire(self, run: Run, start: int) -> None:
        """Nobody owns the last blocks of a prefix any more, from ``start`` to the end of ``run``: put them in line, and
        join runs that no prompt parts from any more."""
        while run.end > start:
            if run.first < start:
                self._split(run, start)
            above: list[Run] = []
            parent = run.parent
            assert parent is not None
            while parent.end > start and len(parent.children) == 1 and not self._is_awaited(parent):
                if parent.first < start:
                    self._split(parent, start)
                above.append(parent)
                assert parent.parent is not None
                parent = parent.parent
            if above:
                run = self._join([*above[::-1], run])
            self._line_up(run)
            run = parent

    def _touch(self, run: Run, end: int) -> None:
        """A prefix of ``end`` blocks, which the pool has, was in use until now, though nobody owned these blocks."""
        run = run.at(end)
        if run.newer is not None and end < run.end:
            run = self._split(run, end)
        while run.newer is not None:
            self._line.remove(run)
            self._line_up(run)
            assert run.parent is not None
            run = run.parent

    def _line_up(self, run: Run) -> None:
        self._time += 1
        run.used = self._time
        self._line_of(run).append(run)

    def _join(self, parts: list[Run]) -> Run:
        """Runs one behind the other, in no line, as the last of them."""
        *above, run = parts
        parent, first = above[0].parent, above[0].first
        assert parent is not None
        run.blocks = array("i", b"".join(part.blocks.tobytes() for part in parts))
        run.tokens = bytearray().join(part.tokens for part in parts)
        run.parent, run.first, run.used = parent, first, above[0].used
        for part in above:
            part.children.clear()  # or they would keep each other
        parent.children[bytes(run.tokens[: self._bytes])] = run
        return run


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

    def first_after(self, used: int) -> Run:
        """The oldest run that was used later, or what stands behind the last."""
        newer = self._ends
        while newer.older is not None and newer.older is not self._ends and newer.older.used > used:
            newer = newer.older
        return newer

    def append(self, run: Run) -> None:
        self.put(run, self._ends)

    def put(self, run: Run, newer: Run) -> None:
        """Put a run before another, and count its blocks."""
        self.num_blocks += len(run.blocks)
        self.insert(run, newer)

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
