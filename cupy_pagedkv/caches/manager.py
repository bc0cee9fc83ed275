"""Many sequences over one pool of blocks: prefix sharing, copy on write, rollback and eviction.

>>> import numpy as np
>>> from cupy_pagedkv import LayeredPagedKVCache
>>> cache = LayeredPagedKVCache(
...     num_layers=2, num_blocks=64, block_size=4, num_kv_heads=1, head_dim=8, dtype="float16", device="cpu"
... )
>>> manager = KVCacheManager(cache)
>>> prompt = [11, 12, 13, 14, 15, 16]
>>> first = manager.add(prompt)
>>> with manager.prepare({first: first.remaining}) as batch:
...     for layer in cache:
...         layer.update(np.ones((6, 1, 8), np.float16), np.ones((6, 1, 8), np.float16), batch.slot_mapping)
>>> second = manager.add(prompt)
>>> second.num_cached_tokens, first.num_tokens
(4, 6)
>>> batch = manager.prepare({first: [17], second: second.remaining})
>>> batch.seq_lens, batch.cu_seqlens, batch.positions, batch.slot_mapping
(array([7, 6], dtype=int32), array([0, 1, 3], dtype=int32), array([6, 4, 5]), array([6, 8, 9]))
>>> batch.block_tables
array([[0, 1],
       [0, 2]], dtype=int32)
>>> manager.rollback(batch)

The life of a sequence, in positions of its tokens::

    add(tokens)         [0, num_cached_tokens)          in the cache already, in blocks shared with whoever wrote them
    prepare({seq: new}) [num_tokens, num_tokens + new)  have slots, and the layers write their K and V
    commit(batch)       [0, num_tokens)                 is in the cache: num_tokens has grown by new, or by what was
                                                        accepted of it, and blocks now full are found by other prompts
    rollback(batch)     [num_tokens, num_tokens + new)  are forgotten
    free(seq)           [0, 0)                          full blocks stay findable until they are needed

        0          num_cached_tokens        num_tokens     num_tokens + new
        |---- shared ----|------ written ------|---- prepared ----|.... rest of the last block

All bookkeeping is on the host. The only work on the device is to send a batch's arrays there, and to copy a block that
two sequences share before one of them writes to it; both are queued on CuPy's current stream, which has to be the one
that the layers work on.
"""

import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..bookkeeping.arguments import MAX_BLOCKS, at_least
from ..bookkeeping.pool import BlockPool, Run
from ..bookkeeping.rows import NewTokens, SequenceRows
from ..bookkeeping.salts import Salt
from ..devices.backend import backend_of
from ..devices.dlpack import array_of
from . import files
from .batch import Batch, BatchBuffers
from .cache import LayeredPagedKVCache
from .sequence import CachedSequence
from .tier import BlockMover, Returning, block_bytes, places_in_reserve

__all__ = ["CachedSequence", "KVCacheManager", "KVCacheStats"]

Tokens: TypeAlias = npt.NDArray[np.integer] | Sequence[int]
"""An array ``[n]`` of whole numbers in host memory, or a list of ints, each from −2³¹ to 2³¹ − 1."""

_Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class KVCacheStats:
    """What :meth:`KVCacheManager.stats` found. Blocks and sequences are those of the moment, the rest are totals."""

    total_blocks: int
    """Of the pool; so are the next three."""
    free_blocks: int
    """That no sequence owns, and that hold nothing that is found."""
    live_blocks: int
    """That sequences own."""
    cached_blocks: int
    """That no sequence owns, but that are found by their tokens until they are needed."""
    num_sequences: int
    prompts: int
    """Sequences that came by ``add``, counted when the first new token of each is committed; one that was preempted,
    freed and added again counts again, and finds its own blocks."""
    hits: int
    """Those of them that shared a block."""
    prompt_tokens: int
    """Tokens that ``add`` was given for them."""
    tokens_saved: int
    """Those of the tokens that needed no computing."""
    evictions: int
    """Cached blocks that were taken for other tokens, whether or not they went to the host."""
    copies: int
    """Blocks copied because another sequence shared them."""
    host_blocks: int
    """Blocks that there is host memory for. Those of no kind below are free, or hold what the pool holds, too."""
    live_host_blocks: int
    """That sequences own, which were offloaded, or which found them and are not prepared yet."""
    cached_host_blocks: int
    """That no sequence owns, but that are found there, and only there, by their tokens."""
    offloaded: int
    """Blocks that were copied to the host."""
    restored: int
    """Blocks that were copied from the host to the pool."""

    @property
    def utilisation(self) -> float:
        """The share of the pool's blocks that sequences own."""
        return self.live_blocks / self.total_blocks

    @property
    def hit_rate(self) -> float:
        """The share of the prompts' tokens that need no computing."""
        return self.tokens_saved / max(1, self.prompt_tokens)


class KVCacheManager:
    """Sequences over the blocks of a :class:`~cupy_pagedkv.LayeredPagedKVCache`, all of which it hands out itself.

    With ``prefix_caching``, a new sequence shares the full blocks that hold its first tokens already, whether their
    sequence lives or is gone. A match is exact: all tokens before the block, and the salt, are compared, not hashed.

    A call that raises leaves everything as it was, but for what :meth:`prepare` and :meth:`CachedSequence.offload` say.
    Not thread-safe. The cost of a call depends on what it is given, not on the size of the pool or on how many
    sequences there are, but for :meth:`check_integrity`, :meth:`reset_prefix_cache` and, now and then, the growth of
    its own tables.

    With ``host_blocks``, host memory has room for so many blocks more, or as many as fit in ``host_bytes``, pinned
    where the cache is on a GPU. Cached blocks that are evicted go there, the least recently used ones make room for
    them, and ``add`` finds them there, too; and :meth:`CachedSequence.offload` parks a sequence. :meth:`prepare` brings
    back what its sequences need; where the host is full, this and what it pushes out of the pool change places, 32 MiB
    at a time, for which there is as much memory more. On a GPU copies travel on streams of their own, and the current
    stream waits for what comes back.

    A cache has one manager, and nobody else hands out its blocks. Raises ``TypeError`` for another kind of cache, and
    ``ValueError`` for one that has blocks in its own block table, for negative ``host_blocks``, and for ``host_bytes``
    that hold no block or come with ``host_blocks``.

    >>> cache = LayeredPagedKVCache(1, 8, 4, num_kv_heads=1, head_dim=2, dtype="float16", device="cpu")
    >>> manager = KVCacheManager(cache)
    >>> sequence = manager.add([1, 2, 3])
    >>> manager.commit(manager.prepare({sequence: sequence.remaining}))
    >>> draft = manager.prepare({sequence: [4, 5, 6]})  # a speculative run, of which one token is accepted
    >>> manager.commit(draft, accepted={sequence: 1})
    >>> branch = sequence.fork()
    >>> sequence.num_tokens, branch.num_tokens, manager.stats().live_blocks
    (4, 4, 1)
    >>> manager.free(sequence)
    """

    def __init__(
        self, cache: LayeredPagedKVCache, *, prefix_caching: bool = True, host_blocks: int = 0, host_bytes: int = 0
    ) -> None:
        if not isinstance(cache, LayeredPagedKVCache):
            raise TypeError(f"cache must be a LayeredPagedKVCache, got {type(cache).__name__}")
        if cache.block_table(0).num_blocks:
            raise ValueError(
                "the cache maps a sequence of its own to blocks; a manager hands out all of them: reset it"
            )
        self._cache = cache
        self._place = cache[0].k_cache.device
        self._staging = backend_of(("the cache",), cache[0].k_cache).staging()
        self._prefix_caching = prefix_caching
        self._block_size = cache.block_size
        host_blocks = at_least(0, "host_blocks", host_blocks)
        if num_bytes := at_least(0, "host_bytes", host_bytes):
            if host_blocks:
                raise ValueError("give host_blocks or host_bytes, not both")
            host_blocks = num_bytes // block_bytes(cache)
            if not host_blocks:
                raise ValueError(f"host_bytes is {num_bytes}, but a block takes {block_bytes(cache)} bytes")
        reserve = places_in_reserve(cache, host_blocks)
        if host_blocks > MAX_BLOCKS - cache.num_blocks - reserve:
            raise ValueError(f"host_blocks and the pool's {cache.num_blocks} must be {MAX_BLOCKS} at most, together")
        self._mover = BlockMover(cache, host_blocks + reserve) if host_blocks else None
        store = {"store": self._mover.store} if self._mover else {}
        self._pool = BlockPool(cache.num_blocks, cache.block_size, host_blocks, reserve, **store)
        self._rows = SequenceRows(cache.block_size, cache.num_blocks)
        self._sequences: set[CachedSequence] = set()
        self._named: dict[str, CachedSequence] = {}
        self._batches: set[Batch] = set()
        self._uncounted: set[CachedSequence] = set()  # whose prompts have not grown yet
        self._prompts = self._hits = self._prompt_tokens = self._tokens_saved = self._copies = 0

    @property
    def sequences(self) -> tuple[CachedSequence, ...]:
        """All that are not freed, in no order."""
        return tuple(self._sequences)

    @property
    def named(self) -> dict[str, CachedSequence]:
        """Those of them that have a name, by it, the one named first first; a dict of the caller's own."""
        return dict(self._named)

    @property
    def open_batches(self) -> tuple[Batch, ...]:
        """All that are neither committed nor rolled back, in no order."""
        return tuple(self._batches)

    @property
    def num_available_blocks(self) -> int:
        """Blocks of the pool that could be taken at this moment: the free and the cached ones."""
        return self._pool.num_available

    def add(self, tokens: Tokens, *, salt: Salt = None, name: str | None = None) -> CachedSequence:
        """A new sequence that is going to begin with ``tokens``; no block is taken, and nothing is written yet.

        Full blocks that hold the first of them are shared: ``num_cached_tokens`` of the sequence says how many tokens
        that are, and is less than all of them, because somebody has to compute the next token. The others are
        ``remaining`` of the sequence, and are to be given to :meth:`prepare`, in as many pieces as suits. What is found
        in host memory stays there until then.

        salt
            Sequences share only with those of an equal salt (of the same type), such as the name of a tenant or of a
            LoRA adapter.
        name
            By which it is found in :attr:`named`, until it is freed; :meth:`save` keeps the sequences that have one.

        Raises ``TypeError`` or ``ValueError`` for what are no tokens, no salt, or no name, and ``ValueError`` for the
        name of another sequence.
        """
        prompt = _as_tokens(tokens)
        prompt.flags.writeable = False
        if not isinstance(salt, str | bytes | int | None):
            raise TypeError(f"salt must be a str, bytes, an int or None, got {type(salt).__name__}")
        if not isinstance(name, str | None):
            raise TypeError(f"name must be a str or None, got {type(name).__name__}")
        if name in self._named:
            raise ValueError(f"a sequence is named {name!r} already; free it first, or take another name")
        root = self._pool.root(salt)
        findable = max(0, len(prompt) - 1) // self._block_size * self._block_size if self._prefix_caching else 0
        run, blocks = self._pool.find(root, prompt[:findable].tobytes())
        sequence = self._new_sequence(run, blocks, len(blocks) * self._block_size, len(blocks), prompt)
        self._uncounted.add(sequence)
        if name is not None:
            sequence._name, self._named[name] = name, sequence
        return sequence

    def prepare(self, new_tokens: Mapping[CachedSequence, Tokens], *, buffers: BatchBuffers | None = None) -> Batch:
        """Room for the next tokens of each sequence: a prompt, a piece of one, one decoded token, a speculative run.

        new_tokens
            For each sequence the tokens that come behind its ``num_tokens``: of a prompt that was just added these are
            :attr:`CachedSequence.remaining`, or the first of them.
        buffers
            What :meth:`buffers` returned; they become the batch's arrays, and are filled in the order of the current
            stream. Until the batch has ended they cannot be those of another.

        Until the batch is committed or rolled back, its sequences cannot be in another, nor forked, truncated or freed.

        What a sequence has in host memory comes back to the pool, whether or not it gets new tokens.

        On a GPU this copies from the host, and so a CUDA graph must not capture it.

        Raises :class:`~cupy_pagedkv.OutOfBlocksError` if the blocks do not suffice for all of them; its ``free`` counts
        cached blocks, too. Raises ``ValueError`` for sequences that are freed, of another manager or in an open batch,
        and for buffers that are another manager's, in use or too small; ``TypeError`` and ``ValueError`` for what are
        no tokens. If a device fails, cached blocks may be gone, what was in host memory may be back, and buffers hold
        anything; all else is as it was.
        """
        if not isinstance(new_tokens, Mapping):
            raise TypeError(f"expected {{sequence: its new tokens}}, got {type(new_tokens).__name__}")
        return self._prepare(tuple(new_tokens), *_joined(list(new_tokens.values())), buffers)

    def _prepare(
        self,
        sequences: tuple[CachedSequence, ...],
        counts: _Ints,
        tokens: npt.NDArray[np.int32],
        buffers: BatchBuffers | None,
    ) -> Batch:
        """:meth:`prepare`, of so many tokens of each sequence, one behind the other."""
        in_rows = self._rows_of(sequences)
        new = NewTokens(in_rows, self._rows.lengths[in_rows], counts, tokens)
        max_blocks = -(-int(new.ends.max(initial=0)) // self._block_size)
        if buffers is not None:
            self._check_buffers(buffers)
            buffers._check_room(len(sequences), len(tokens), max_blocks)
        return self._begin(sequences, new, max_blocks, buffers)

    def _begin(
        self, sequences: tuple[CachedSequence, ...], new: NewTokens, max_blocks: int, buffers: BatchBuffers | None
    ) -> Batch:
        """:meth:`prepare`, of what is known to be right; the longest of the sequences has ``max_blocks`` then."""
        in_rows = new.rows
        owners, columns = self._rows.missing(new)
        writers, begun_columns = self._rows.begun(new)
        begun = self._rows.blocks_at(in_rows[writers], begun_columns)
        if self._mover is not None and self._rows.on_host[in_rows].any():
            in_pool = np.flatnonzero(begun < self._pool.num_blocks)
            back = Returning(self._pool, self._rows, sequences, in_rows, writers)
            copying = []
            if len(in_pool):
                shared = back.are_shared(begun[in_pool])
                copying = in_pool[self._pool.writers_that_copy(begun[in_pool], shared)].tolist()
            taken = back.take(len(owners) + len(copying), self._mover)
        else:
            copying = self._pool.writers_that_copy(begun)
            taken = self._pool.take(len(owners) + len(copying))
        copied = begun[copying]
        try:
            self._rows.widen(max_blocks)
            owners = np.concatenate([owners, writers[copying]])
            columns = np.concatenate([columns, begun_columns[copying]])
            sizes = (len(sequences), len(new.tokens), max_blocks, len(copied)) if buffers is None else buffers._sizes
            host = BatchBuffers(self._staging.zeros(BatchBuffers.num_bytes(*sizes)), *sizes)
            tables = host.block_tables[: len(sequences), :max_blocks]
            self._rows.copy_tables(in_rows, tables)
            tables[owners, columns] = taken
            host._fill(new, self._block_size)
            host._copies[:, : len(copied)] = copied, taken[len(taken) - len(copied) :]
            memory = self._staging.send(host._memory, self._place, None if buffers is None else buffers._memory)
            arrays = buffers or (host if memory is host._memory else BatchBuffers(memory, *sizes))
            if len(copied):
                self._cache.copy_blocks(*arrays._copies[:, : len(copied)])
        except BaseException:
            self._pool.release(taken)
            raise

        self._rows.put(new, owners, columns, taken)
        truncated = self._rows.known[in_rows[writers]] > begun_columns  # within a block that is found
        for i in copying:  # one by one: two may have copied one block
            column, run = int(begun_columns[i]), sequences[writers[i]]._run
            self._pool.release(begun[i : i + 1], column, run, column + 1 if truncated[i] else 0)
        for i in np.flatnonzero(truncated).tolist():
            self._rows.known[in_rows[writers[i]]] = begun_columns[i]
            if i not in copying:  # its only owner is about to write to it
                self._pool.forget(sequences[writers[i]]._run, int(begun_columns[i]), int(begun[i]))
        self._copies += len(copied)
        batch = Batch(self, sequences, new, arrays, self._block_size)
        self._batches.add(batch)
        return batch

    def commit(self, batch: Batch, accepted: Mapping[CachedSequence, int] | None = None) -> None:
        """Say that the layers have written the K and V of a batch, or that this work is queued on the current stream.

        The sequences grow by the batch's tokens, and blocks that are now full can be shared.

        accepted
            How many of its new tokens to keep, the first ones, for sequences that do not keep them all.

        Raises ``ValueError`` for a batch that has ended already or is another manager's, for sequences that are not in
        it and for more tokens than they have in it.
        """
        self._check_open(batch)
        if accepted is not None and not isinstance(accepted, Mapping):
            raise TypeError(f"accepted must be {{sequence: number of tokens}}, got {type(accepted).__name__}")
        new = batch._new
        ends = new.ends if accepted is None else new.starts + self._accepted(batch, accepted)
        if self._prefix_caching:
            self._remember(batch, ends)
        if self._uncounted:
            for sequence in self._uncounted.intersection(batch.sequences):
                self._count(sequence, new, ends)
        self._rows.lengths[new.rows] = ends
        self._close(batch, "committed")

    def rollback(self, batch: Batch) -> None:
        """Drop a batch: its sequences are what they were before, whatever the layers have written.

        A copy of a shared block is kept, by the sequence that it was made for: a fork may own one block more. What came
        back from host memory stays in the pool. Cached blocks that ``prepare`` took do not come back, nor is a block
        found again that the batch was about to write to.

        Raises ``ValueError`` for a batch that has ended already or is another manager's.
        """
        self._check_open(batch)
        self._close(batch, "rolled back")

    def free(self, sequence: CachedSequence) -> None:
        """Let go of all its blocks. Those that no other sequence owns are free, or found by their tokens until they are
        needed: first those that were let go longest ago, and of one sequence the last block first.

        Raises ``ValueError`` for a sequence that is freed already, of another manager, or in an open batch.
        """
        row = self._row_of(sequence)
        known = int(self._rows.known[row])
        self._pool.release(self._rows.remove(row), 0, sequence._run, known)
        self._sequences.remove(sequence)
        self._uncounted.discard(sequence)
        if sequence._name is not None:
            del self._named[sequence._name]
        sequence._manager = sequence._name = None
        del sequence._run, sequence._prompt  # and with the root a salt that nobody uses any more

    def buffers(self, num_seqs: int, num_tokens: int, max_blocks: int) -> BatchBuffers:
        """Arrays on the cache's device for all batches of at most so many sequences, new tokens in all, and blocks of
        one sequence: for a CUDA graph, which reads from where it read when it was captured.

        Until :meth:`prepare` fills them they are padding: nothing is written, and no sequence has a token.
        """
        num_seqs = at_least(1, "num_seqs", num_seqs)
        num_tokens, max_blocks = at_least(1, "num_tokens", num_tokens), at_least(1, "max_blocks", max_blocks)
        sizes = num_seqs, num_tokens, max_blocks, num_seqs
        host = BatchBuffers(self._staging.zeros(BatchBuffers.num_bytes(*sizes)), *sizes)
        host.slot_mapping[:] = -1
        buffers = BatchBuffers(self._staging.send(host._memory, self._place), *sizes)
        buffers._owner = self
        return buffers

    def reset_prefix_cache(self) -> None:
        """Let no block be found any more, as is right when the model's weights have changed.

        Raises ``RuntimeError`` while sequences own blocks, of the pool or in host memory.
        """
        stats = self.stats()
        live = stats.live_blocks + stats.live_host_blocks
        if live:
            raise RuntimeError(f"{live} blocks belong to live sequences; free these first")
        self._pool.clear()

    def save(self, path: str | os.PathLike[str], *, fingerprint: str | None = None) -> None:
        """Write all blocks that are found by their tokens, and all sequences that have a name, to a file for
        :meth:`load`: what is committed of them. Nothing changes here.

        fingerprint
            What else has to be the same where the file is loaded, such as a name of the model's weights.

        The file is there as a whole or not at all, and so is one that it replaces, whatever happens meanwhile; a
        process that is killed can leave a ``.kvcache-….tmp`` beside it. A block of which a sequence has a copy of its
        own is saved as it is found. Needs room for some blocks in host memory.

        Raises ``ValueError`` without ``prefix_caching``, which keeps no tokens, and for a path that is no file's;
        ``TypeError`` for a fingerprint that is no str, and for a salt of a subclass of its type; ``RuntimeError`` where
        the extra ``files`` is not installed; and ``OSError``, as of a disk that is full.
        """
        files.save(self, path, fingerprint=fingerprint)

    @classmethod
    def load(
        cls,
        cache: LayeredPagedKVCache,
        path: str | os.PathLike[str],
        *,
        fingerprint: str | None = None,
        salvage: bool = False,
        prefix_caching: bool = True,
        host_blocks: int = 0,
        host_bytes: int = 0,
    ) -> "KVCacheManager":
        """A manager of a new cache, in which all is found that :meth:`save` wrote to a file; its totals begin at 0.

        The cache may have other blocks, more or fewer, on another device. Of what is found, tokens that fill no whole
        block of it are dropped. What was found last is evicted last, as before; what live sequences had comes behind.
        With ``host_blocks`` or ``host_bytes``, what the pool has no room for is on the host then, and named sequences
        that were parked are. Where there is hardly room, the first to be evicted may be gone.

        salvage
            Of a file that is damaged, or cut short, load what is whole: blocks up to the first that is not, and the
            named sequences that have all of theirs.

        Raises :class:`~cupy_pagedkv.DamagedFileError`, a ``ValueError``, for a file that is not whole; ``ValueError``
        for one that does not go with the cache or the fingerprint, or has more than the cache has room for;
        ``TypeError`` and ``RuntimeError`` as ``save`` does; and ``OSError``, as of a file that is not there. The blocks
        of the cache hold anything then.
        """
        manager = cls(cache, prefix_caching=prefix_caching, host_blocks=host_blocks, host_bytes=host_bytes)
        files.load(manager, path, fingerprint=fingerprint, salvage=salvage)
        manager._uncounted.clear()
        manager._prompts = manager._hits = manager._prompt_tokens = manager._tokens_saved = 0
        manager._pool.evictions = manager._pool.offloaded = manager._pool.restored = manager._pool.lost = 0
        return manager

    def stats(self) -> KVCacheStats:
        """All counts, as of this moment."""
        pool = self._pool
        return KVCacheStats(
            total_blocks=pool.num_blocks,
            free_blocks=pool.num_available - pool.num_cached,
            live_blocks=pool.num_blocks - pool.num_available,
            cached_blocks=pool.num_cached,
            num_sequences=len(self._sequences),
            prompts=self._prompts,
            hits=self._hits,
            prompt_tokens=self._prompt_tokens,
            tokens_saved=self._tokens_saved,
            evictions=pool.evictions,
            copies=self._copies,
            host_blocks=pool.num_places,
            live_host_blocks=pool.num_places - pool.num_available_places,
            cached_host_blocks=pool.num_cached_places,
            offloaded=pool.offloaded,
            restored=pool.restored,
        )

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` unless all adds up: free + live + cached blocks are the pool, each live block is in as
        many tables as it counts owners, and what is found is where it is said to be. Walks the whole pool."""
        owners = np.zeros(self._pool.num_ids, np.int64)
        prefixes = []
        for sequence in self._sequences:
            row = sequence._row
            blocks, length = self._rows.blocks(row), int(self._rows.lengths[row])
            needed = -(-length // self._block_size)
            if len(blocks) < needed or (len(blocks) > needed and not self._rows.is_open[row]):
                raise RuntimeError(f"a sequence of {length} tokens has {len(blocks)} blocks, and should have {needed}")
            owners[blocks] += 1
            prefixes.append((sequence._run, blocks[: self._rows.known[row]]))
        self._pool.check(owners, prefixes)
        if any(sequence not in self._sequences or sequence._name != name for name, sequence in self._named.items()):
            raise RuntimeError(f"the names {list(self._named)} are not all those of sequences")
        free = self._rows.free
        if sorted([*free, *(sequence._row for sequence in self._sequences)]) != list(range(len(self._rows))):
            raise RuntimeError(f"{len(free)} free and {len(self._sequences)} used rows are not all rows")

    def _fork(self, sequence: CachedSequence) -> CachedSequence:
        row = self._row_of(sequence)
        length, known = int(self._rows.lengths[row]), int(self._rows.known[row])
        fork = self._new_sequence(sequence._run, self._rows.blocks(row), length, known, sequence._prompt)
        self._rows.begin(fork._row, self._rows.tail(row))
        return fork

    def _offload(self, sequence: CachedSequence) -> None:
        row = self._row_of(sequence)
        if self._mover is None:
            raise ValueError("there is no host memory for blocks; make it KVCacheManager(cache, host_blocks=…)")
        places = self._pool.offload(self._rows.blocks(row), sequence._run, int(self._rows.known[row]))
        self._rows.replace(row, 0, places)

    def _truncate(self, sequence: CachedSequence, num_tokens: int) -> None:
        row = self._row_of(sequence)
        length = int(self._rows.lengths[row])
        if at_least(0, "num_tokens", num_tokens) > length:
            raise ValueError(f"cannot truncate to {num_tokens} tokens: the sequence has {length}")
        last, offset = divmod(num_tokens, self._block_size)
        known = int(self._rows.known[row])
        if offset and last < known:  # a full block becomes the last one and is not full any more
            self._rows.begin(row, self._pool.tokens_at(sequence._run, last))
        self._rows.lengths[row] = num_tokens
        let_go = self._rows.shrink(row)
        needed = int(self._rows.num_blocks[row])
        self._rows.known[row] = min(known, needed)
        self._pool.release(let_go, needed, sequence._run, known)

    def _abandon(self, sequence: CachedSequence) -> None:
        """Roll back the batch that it is in, if there is one."""
        for batch in [batch for batch in self._batches if sequence in batch.sequences]:
            self.rollback(batch)

    def _new_sequence(
        self, run: Run, blocks: npt.NDArray[np.int32], length: int, known: int, prompt: npt.NDArray[np.int32]
    ) -> CachedSequence:
        row = self._rows.add(blocks, length, known)
        self._pool.share(blocks, run, known)
        sequence = CachedSequence(self, row, run, length, prompt)
        self._sequences.add(sequence)
        return sequence

    def _rows_of(self, sequences: tuple[CachedSequence, ...]) -> _Ints:
        """Where the sequences are, if all of them are this manager's and in no open batch."""
        try:
            rows = np.array([sequence._row for sequence in sequences if sequence._manager is self], np.int64)
            if len(rows) < len(sequences):
                for sequence in sequences:
                    if sequence._owner() is not self:  # raises for one that is freed
                        raise ValueError(f"{sequence!r} is another manager's")
        except AttributeError:
            kinds = sorted({type(sequence).__name__ for sequence in sequences} - {"CachedSequence"})
            raise TypeError(f"expected sequences, which add() returns, got {', '.join(kinds)}") from None
        is_open = self._rows.is_open[rows]
        if is_open.any():
            raise ValueError(f"{sequences[is_open.argmax()]!r} is in an open batch; commit it or roll it back first")
        return rows

    def _row_of(self, sequence: CachedSequence) -> int:
        return int(self._rows_of((sequence,))[0])

    def _check_buffers(self, buffers: BatchBuffers) -> None:
        if not isinstance(buffers, BatchBuffers):
            raise TypeError(f"buffers must be what buffers() returned, got {type(buffers).__name__}")
        if buffers._owner is not self:
            raise ValueError("these buffers are another manager's")
        if any(batch._buffers is buffers for batch in self._batches):
            raise ValueError("these buffers are those of an open batch; commit it or roll it back first")

    def _count(self, sequence: CachedSequence, new: NewTokens, ends: _Ints) -> None:
        """Count a prompt, the first time that its sequence grows."""
        i = int(np.flatnonzero(new.rows == sequence._row)[0])
        start = int(new.starts[i])
        if ends[i] > start:
            saved = min(start, sequence._num_cached)
            self._uncounted.remove(sequence)
            self._prompts += 1
            self._hits += saved > 0
            self._prompt_tokens += len(sequence._prompt)
            self._tokens_saved += saved

    def _check_open(self, batch: Batch) -> None:
        if not isinstance(batch, Batch):
            raise TypeError(f"expected a Batch, which prepare() returns, got {type(batch).__name__}")
        if batch._manager is not self:
            raise ValueError("this batch belongs to another manager")
        if batch._end:
            raise ValueError(f"this batch has been {batch._end} already")

    def _accepted(self, batch: Batch, accepted: Mapping[CachedSequence, int]) -> _Ints:
        """How many new tokens of each sequence are kept."""
        kept = batch._new.counts.copy()
        index = {sequence: i for i, sequence in enumerate(batch.sequences)}
        for sequence, count in accepted.items():
            if sequence not in index:
                raise ValueError(f"{sequence!r} is in accepted, but not in the batch")
            i = index[sequence]
            if at_least(0, "accepted", count) > kept[i]:
                raise ValueError(f"{count} tokens accepted of a sequence with {kept[i]} in the batch")
            kept[i] = count
        return kept

    def _remember(self, batch: Batch, ends: _Ints) -> None:
        """Let the blocks that a batch fills be found."""
        for i, column, blocks, tokens in self._rows.filled(batch._new, ends):
            sequence = batch.sequences[i]
            sequence._run = self._pool.remember(sequence._run, column, blocks, tokens)

    def _close(self, batch: Batch, end: str) -> None:
        in_rows = batch._new.rows
        for row in self._rows.with_room_to_spare(in_rows):
            self._pool.release(self._rows.shrink(row))
        self._rows.is_open[in_rows] = False
        self._batches.remove(batch)
        batch._end = end


def _as_tokens(tokens: Any) -> npt.NDArray[np.int32]:
    """Tokens as int32 ``[n]``, in an array of our own: whole numbers that fit."""
    tokens = array_of("tokens", tokens)
    if isinstance(tokens, np.ndarray):
        if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
            raise TypeError(f"tokens must be whole numbers on one axis, got {tokens.dtype} of shape {tokens.shape}")
        if len(tokens) and (tokens.min() < -(2**31) or tokens.max() >= 2**31):
            raise ValueError(f"tokens must be from -2**31 to 2**31 - 1, got {tokens.min()} to {tokens.max()}")
        return np.asarray(tokens).astype(np.int32)  # of a masked array all it holds
    if not isinstance(tokens, Sequence) or isinstance(tokens, str | bytes | bytearray):
        raise TypeError(f"tokens must be a list of ints or a NumPy array on the host, got {type(tokens)}")
    try:
        return np.asarray(array("i", tokens))
    except OverflowError:
        raise ValueError("tokens must be from -2**31 to 2**31 - 1") from None
    except (TypeError, NotImplementedError) as error:  # the latter of a memoryview of several axes
        raise TypeError(f"tokens must be a list of ints or a NumPy array on the host: {error}") from None


def _joined(lists: list[Any]) -> tuple[_Ints, npt.NDArray[np.int32]]:
    """The tokens of several sequences: how many of each, and all of them."""
    if set(map(type, lists)) <= {list}:  # one conversion for all, in a decode step
        joined = _as_tokens(list(chain.from_iterable(lists)))
    else:
        lists = [_as_tokens(tokens) for tokens in lists]
        joined = np.concatenate(lists)
    return np.fromiter(map(len, lists), np.int64, len(lists)), joined
