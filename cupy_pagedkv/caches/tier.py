"""Blocks in host memory, beside a cache: where they lie, and how they get there and back."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..bookkeeping.allocator import OutOfBlocksError
from ..bookkeeping.pool import BlockPool, Run
from ..bookkeeping.rows import SequenceRows
from ..devices.backend import backend_of
from ..operations.copies import gather_cache, reshape_and_cache
from .cache import LayeredPagedKVCache
from .sequence import CachedSequence

__all__ = ["BlockMover", "BlockPacker", "Returning", "block_bytes", "places_in_reserve"]

_Ids: TypeAlias = npt.NDArray[np.int32]

_RESERVE_BYTES = 2**25  # of blocks that change places at once


def block_bytes(cache: LayeredPagedKVCache) -> int:
    """Bytes of K and V of a block in all layers."""
    return 2 * len(cache) * int(cache[0].k_cache.nbytes) // cache.num_blocks


def places_in_reserve(cache: LayeredPagedKVCache, host_blocks: int) -> int:
    """How many places more there are to be, for what leaves while as much is still on its way back."""
    return min(cache.num_blocks, host_blocks, max(1, _RESERVE_BYTES // block_bytes(cache)))


class BlockPacker:
    """Blocks of ``cache`` in one piece each, as bytes: ``[2, num_layers, block_size, num_kv_heads, head_dim]``, K
    before V. On the current stream they are packed and unpacked by the kernels that gather and scatter tokens, to which
    a block is one long token."""

    def __init__(self, cache: LayeredPagedKVCache) -> None:
        layers = len(cache)
        self.num_bytes = block_bytes(cache)
        """Of a block."""
        self._shape = (2, layers, 1, self.num_bytes // (2 * layers))
        self._k_pools, self._v_pools = (
            pools.view(np.uint8).reshape(layers, cache.num_blocks, 1, 1, self._shape[-1])
            for pools in (cache._k_caches, cache._v_caches)
        )

    def pack(self, blocks: _Ids, packed: Any) -> None:
        """Copy ``blocks`` of the cache to ``packed``, bytes ``[n, num_bytes]`` on its device."""
        gather_cache(self._k_pools, self._v_pools, blocks[None], [len(packed)], out=self._as_tokens(packed))

    def unpack(self, packed: Any, blocks: _Ids) -> None:
        """Copy ``packed`` to ``blocks`` of the cache."""
        reshape_and_cache(*self._as_tokens(packed), self._k_pools, self._v_pools, blocks)

    def _as_tokens(self, packed: Any) -> tuple[Any, Any]:
        """K and V as tokens ``[num_layers, n, 1, bytes of a layer]``."""
        of_layers = packed.reshape(len(packed), *self._shape)
        return of_layers[:, 0].swapaxes(0, 1), of_layers[:, 1].swapaxes(0, 1)


class BlockMover:
    """``num_places`` places for blocks of ``cache`` in host memory, which is pinned where the cache is on a GPU.

    A block is packed there; between a GPU and the host blocks travel on streams of their own.
    """

    def __init__(self, cache: LayeredPagedKVCache, num_places: int) -> None:
        pool = cache[0].k_cache
        backend = backend_of(("the cache",), pool)
        self._packer = BlockPacker(cache)
        self._lane = backend.lane(num_places, self._packer.num_bytes, pool.device)
        self._first = cache.num_blocks

    def store(self, blocks: _Ids, places: _Ids) -> None:
        """Copy blocks of the cache to places, whose ids go on behind those of all blocks.

        On a GPU the copy is queued: what the current stream does to the blocks from now on comes later.
        """
        places = places - self._first
        for piece in self._lane.pieces(places):
            with self._lane.to_host(places[piece]) as packed:
                self._packer.pack(blocks[piece], packed)

    def fetch(self, places: _Ids, blocks: _Ids) -> None:
        """Copy what is in places to blocks of the cache. On a GPU this is queued, and the current stream waits for
        it."""
        order = np.argsort(places)
        places, blocks = places[order] - self._first, blocks[order]
        for piece in self._lane.pieces(places):
            with self._lane.from_host(places[piece]) as packed:
                self._packer.unpack(packed, blocks[piece])

    def read(self, places: _Ids) -> npt.NDArray[np.uint8]:
        """A copy of what is in places, ``[n, bytes of a block]``, once all copies that were queued are done."""
        num_bytes: npt.NDArray[np.uint8] = self._lane.read(places - self._first)
        return num_bytes


class Returning:
    """What some sequences have on the host, on its way back into the pool.

    Sequences that have the same places get the same blocks, and those that the pool still has. A begun block that its
    owner is about to write to, one of ``writers``, becomes a block of its own.
    """

    def __init__(
        self,
        pool: BlockPool,
        rows: SequenceRows,
        sequences: tuple[CachedSequence, ...],
        in_rows: npt.NDArray[np.int64],
        writers: npt.NDArray[np.int64],
    ) -> None:
        self._pool, self._rows = pool, rows
        self._parts = []
        writing = set(writers.tolist())
        for i in np.flatnonzero(rows.on_host[in_rows]).tolist():
            row = int(in_rows[i])
            table = rows.blocks(row)
            column = int(np.count_nonzero(table < pool.num_blocks))
            self._parts.append(_Part(row, sequences[i]._run, column, table[column:], i in writing))
        self._read = np.concatenate([part.read for part in self._parts])
        self._blocks: dict[int, int] = {}  # where what was in each place is now, if somebody may share it

    def are_shared(self, blocks: _Ids) -> npt.NDArray[np.bool_]:
        """Which of the pool's blocks some of the sequences are going to share."""
        return np.isin(self._pool.places_of(blocks), self._read)

    def take(self, count: int, mover: BlockMover) -> _Ids:
        """Bring back everything, and take ``count`` blocks of the pool for something else.

        Raises :class:`~cupy_pagedkv.OutOfBlocksError`, and then has done nothing. If a device fails, some of it is
        back.
        """
        pool = self._pool
        wanted = count + sum(len(part.places) for part in self._parts)
        if wanted > pool.num_available:  # or fewer, where blocks are shared
            found = pool.blocks_of(self._read)
            fresh = len(np.unique(self._read[found < 0]))
            wanted += fresh - len(self._read) + pool.num_to_keep(found[found >= 0])
            if wanted > pool.num_available:
                raise OutOfBlocksError(wanted, pool.num_available, pool.num_blocks)
        parts = self._without_what_is_here(self._parts)
        num_places = sum(len(part.places) for part in parts)
        if pool.can_keep_all(count + num_places):
            return self._bring_back(parts, count, mover)
        *first, last = self._pieces(parts) or [[]]
        for piece in first:
            self._bring_back(piece, 0, mover)
        return self._bring_back(last, count, mover)

    def _pieces(self, parts: "list[_Part]") -> "list[list[_Part]]":
        """In the order of the sequences, what has as many places as are in reserve."""
        pieces: list[list[_Part]] = []
        room = 0
        for part in parts:
            done = 0
            while done < len(part.places):
                if not room:
                    pieces.append([])
                    room = self._pool.reserve
                pieces[-1].append(part.piece(done, done + room))
                done += len(pieces[-1][-1].places)
                room -= len(pieces[-1][-1].places)
        return pieces

    def _bring_back(self, parts: "list[_Part]", count: int, mover: BlockMover) -> _Ids:
        """Bring back all of ``parts`` at once, and take ``count`` blocks."""
        if self._blocks:
            parts = self._without_what_is_here(parts)
        pool = self._pool
        fresh = np.unique(np.concatenate([_NONE, *(part.read for part in parts)]))
        places = np.concatenate([fresh, *(part.written for part in parts)])
        taken = _NONE
        try:
            taken = pool.take(count + len(places), np.concatenate([_NONE, *(part.places for part in parts)]))
            blocks = taken[count:]
            if len(places):
                mover.fetch(places, blocks)
        except BaseException:
            pool.release(taken)
            pool.settle()
            raise

        shared = [blocks[np.searchsorted(fresh, part.read)] for part in parts]
        if len(parts) > 1:
            pool.divide(np.concatenate(shared))
        if len(self._parts) > 1:
            self._blocks.update(zip(fresh.tolist(), blocks.tolist(), strict=False))
        begun = blocks[len(fresh) :]
        for part, read in zip(parts, shared, strict=True):
            own, begun = begun[: len(part.written)], begun[len(part.written) :]
            self._are_back(part, np.concatenate([read, own]))
        pool.settle()
        pool.restored += len(places)
        return taken[:count]

    def _without_what_is_here(self, parts: "list[_Part]") -> "list[_Part]":
        """Let sequences have the blocks that the pool still has, or has again, and return the rest. These are the first
        of each, since what is behind goes to the host first."""
        rest = []
        for part in parts:
            here = self._pool.blocks_of(part.read)
            if self._blocks:
                here = np.fromiter(map(self._blocks.get, part.read.tolist(), here.tolist()), np.int32, len(here))
            count = int(np.count_nonzero(here >= 0))
            if count:
                known = min(int(self._rows.known[part.row]), part.column + count)
                self._pool.share(here[:count], part.run, known, part.column)
                self._are_back(part.piece(0, count), here[:count])
            if count < len(part.places):
                rest.append(part.piece(count, len(part.places)))
        return rest

    def _are_back(self, part: "_Part", blocks: _Ids) -> None:
        """A sequence has ``blocks``, which it owns, and not the places of a part any more."""
        pool, rows = self._pool, self._rows
        rows.replace(part.row, part.column, blocks)
        known, end = int(rows.known[part.row]), part.column + len(part.read)
        pool.come_back(part.run, min(known, end), part.column, part.read, blocks[: len(part.read)])
        if len(part.written):
            pool.release(part.written, end, part.run, known)
            rows.known[part.row] = min(known, end)


class _Part:
    """What comes back at once of what one sequence has on the host."""

    def __init__(self, row: int, run: Run, column: int, places: _Ids, writes: bool) -> None:
        self.row, self.run = row, run
        self.column = column
        """Of the first of these in its table."""
        self.places = places
        self.read, self.written = places[: len(places) - writes], places[len(places) - writes :]

    def piece(self, first: int, last: int) -> "_Part":
        writes = len(self.written) > 0 and last >= len(self.places)
        return _Part(self.row, self.run, self.column + first, self.places[first:last], writes)


_NONE = np.zeros(0, np.int32)
