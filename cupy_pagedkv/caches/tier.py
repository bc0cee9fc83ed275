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

__all__ = ["BlockMover", "Returning", "block_bytes"]

_Ids: TypeAlias = npt.NDArray[np.int32]


def block_bytes(cache: LayeredPagedKVCache) -> int:
    """Bytes of K and V of a block in all layers."""
    return 2 * len(cache) * int(cache[0].k_cache.nbytes) // cache.num_blocks


class BlockMover:
    """``num_places`` places for blocks of ``cache`` in host memory, which is pinned where the cache is on a GPU.

    A block lies in one piece, ``[2, num_layers, block_size, num_kv_heads, head_dim]``, K before V. Blocks are packed
    and unpacked on the current stream by the kernels that gather and scatter tokens, to which a block is one long
    token; between a GPU and the host they travel on a stream of their own.
    """

    def __init__(self, cache: LayeredPagedKVCache, num_places: int) -> None:
        pool = cache[0].k_cache
        backend = backend_of(("the cache",), pool)
        layers, num_bytes = len(cache), block_bytes(cache)
        self._shape = (2, layers, 1, num_bytes // (2 * layers))
        self._k_pools, self._v_pools = (
            pools.view(np.uint8).reshape(layers, cache.num_blocks, 1, 1, self._shape[-1])
            for pools in (cache._k_caches, cache._v_caches)
        )
        self._lane = backend.lane(num_places, num_bytes, pool.device)
        self._first = cache.num_blocks

    def store(self, blocks: _Ids, places: _Ids) -> None:
        """Copy blocks of the cache to places, whose ids go on behind those of all blocks.

        On a GPU the copy is queued: what the current stream does to the blocks from now on comes later.
        """
        places = places - self._first
        for piece in self._lane.pieces(places):
            with self._lane.to_host(places[piece]) as packed:
                tables, out = blocks[None, piece], self._as_tokens(packed)
                gather_cache(self._k_pools, self._v_pools, tables, [len(packed)], out=out)

    def fetch(self, places: _Ids, blocks: _Ids) -> None:
        """Copy what is in places to blocks of the cache. On a GPU this is queued, and the current stream waits for
        it."""
        order = np.argsort(places)
        places, blocks = places[order] - self._first, blocks[order]
        for piece in self._lane.pieces(places):
            with self._lane.from_host(places[piece]) as packed:
                key, value = self._as_tokens(packed)
                reshape_and_cache(key, value, self._k_pools, self._v_pools, blocks[piece])

    def read(self, places: _Ids) -> npt.NDArray[np.uint8]:
        """A copy of what is in places, ``[n, bytes of a block]``, once all copies that were queued are done."""
        num_bytes: npt.NDArray[np.uint8] = self._lane.read(places - self._first)
        return num_bytes

    def _as_tokens(self, packed: Any) -> tuple[Any, Any]:
        """K and V of packed blocks, ``[n, bytes of a block]``, as tokens ``[num_layers, n, 1, bytes of a layer]``."""
        of_layers = packed.reshape(len(packed), *self._shape)
        return of_layers[:, 0].swapaxes(0, 1), of_layers[:, 1].swapaxes(0, 1)


class Returning:
    """What some sequences have on the host, on its way back into the pool: :meth:`take`, :meth:`fetch`, and then
    :meth:`finish`, or else :meth:`give_up`.

    Sequences that have the same places get the same blocks, and those that the pool still has. A begun block that its
    owner is about to write to becomes a block of its own.
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
            first = int(np.count_nonzero(table < pool.num_blocks))
            self._parts.append(_Part(i, row, sequences[i]._run, first, table[first:], int(i in writing)))
        self.owners = np.concatenate([_NONE, *(np.full(len(part.places), part.index) for part in self._parts)])
        """Of each block that comes back: whose it is, as a place in ``sequences``."""
        self.columns = np.concatenate([_NONE, *(part.first + np.arange(len(part.places)) for part in self._parts)])
        """Where it is in the block table."""
        self.blocks = _NONE.astype(np.int32)
        """And which it is, once there is room."""
        self._fetched = self.blocks, self.blocks  # places and blocks

    @property
    def num_fetched(self) -> int:
        """Blocks that are copied."""
        return len(self._fetched[0])

    def take(self, count: int) -> _Ids:
        """``count`` blocks of the pool for something else, and room for what comes back: all or none."""
        pool = self._pool
        if not self._parts:
            return pool.take(count)
        read = np.concatenate([part.read for part in self._parts])
        found = pool.blocks_of(read)
        fresh, written = np.unique(read[found < 0]), [part.written for part in self._parts]
        places = np.concatenate([fresh, *written])
        wanted = count + len(places) + pool.num_to_keep(found[found >= 0])
        if wanted > pool.num_available:
            raise OutOfBlocksError(wanted, pool.num_available, pool.num_blocks)
        for part in self._parts:
            of_part = pool.blocks_of(part.read)
            part.kept = of_part[of_part >= 0]  # the first ones, since what is behind goes to the host first
            pool.share(part.kept, part.run, part.first + len(part.kept), part.first)
        try:
            taken = pool.take(count + len(places))
        except BaseException:
            self._let_go_of_kept()
            raise
        taken, blocks = taken[:count], taken[count:]
        self._fetched = places, blocks
        begun = iter(blocks[len(fresh) :])
        for part in self._parts:
            new = blocks[np.searchsorted(fresh, part.read[len(part.kept) :])]
            part.blocks = np.concatenate([part.kept, new, [next(begun) for _ in part.written]]).astype(np.int32)
        self.blocks = np.concatenate([part.blocks for part in self._parts])
        return taken

    def fetch(self, mover: BlockMover | None) -> None:
        """Copy, or queue the copies."""
        if mover is not None and self.num_fetched:
            mover.fetch(*self._fetched)

    def give_up(self) -> None:
        """Nothing comes back."""
        self._pool.release(self._fetched[1])
        self._let_go_of_kept()

    def finish(self) -> None:
        """The tables have the blocks. Begun blocks that are about to be written to leave their places to the caller."""
        if not self._parts:
            return
        self._pool.divide(np.concatenate([part.blocks[len(part.kept) : len(part.read)] for part in self._parts]))
        for part in self._parts:
            known = min(int(self._rows.known[part.row]), part.first + len(part.read))
            self._pool.come_back(part.run, known, part.first, part.read, part.blocks[: len(part.read)])
            self._rows.on_host[part.row] = False

    def _let_go_of_kept(self) -> None:
        for part in self._parts:
            self._pool.release(part.kept, part.first, part.run, part.first + len(part.kept))


class _Part:
    """What one sequence has on the host."""

    def __init__(self, index: int, row: int, run: Run, first: int, places: _Ids, writes: int) -> None:
        self.index, self.row, self.run = index, row, run
        self.first = first
        """Blocks of its table before these."""
        self.places = places
        self.read, self.written = places[: len(places) - writes], places[len(places) - writes :]
        self.kept: _Ids
        """Blocks that the pool still has, for the first of these."""
        self.blocks: _Ids


_NONE = np.zeros(0, np.int64)
