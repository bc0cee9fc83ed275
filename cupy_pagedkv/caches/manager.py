"""Many sequences over one pool of blocks: prefix sharing, copy on write, rollback and eviction.

>>> import numpy as np
>>> from cupy_pagedkv import LayeredPagedKVCache
>>> cache = LayeredPagedKVCache(
...     num_layers=2, num_blocks=64, block_size=4, num_kv_heads=1, head_dim=8, dtype="float16", device="cpu"
... )
>>> manager = KVCacheManager(cache)
>>> prompt = [11, 12, 13, 14, 15, 16]
>>> first = manager.add(prompt)
>>> with manager.prepare({first: prompt[first.num_cached_tokens :]}) as batch:
...     for layer in cache:
...         layer.update(np.ones((6, 1, 8), np.float16), np.ones((6, 1, 8), np.float16), batch.slot_mapping)
>>> second = manager.add(prompt)
>>> second.num_cached_tokens, first.num_tokens
(4, 6)
>>> batch = manager.prepare({first: [17], second: prompt[4:]})
>>> batch.seq_lens, batch.cu_seqlens, batch.positions, batch.slot_mapping
(array([7, 6], dtype=int32), array([0, 1, 3], dtype=int32), array([6, 4, 5]), array([6, 8, 9]))
>>> batch.block_tables
array([[0, 1],
       [0, 2]], dtype=int32)
>>> manager.rollback(batch)

The life of a sequence, in positions of its tokens::

    add(tokens)         [0, num_cached_tokens)          in the pool already, in blocks shared with whoever wrote them
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

import mmap
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from ..bookkeeping.arguments import at_least
from ..bookkeeping.pool import BlockPool, Node, Salt
from ..devices.backend import backend_of
from .batch import Batch, BatchBuffers
from .cache import LayeredPagedKVCache

__all__ = ["CachedSequence", "KVCacheManager", "KVCacheStats"]

Tokens: TypeAlias = npt.NDArray[np.integer] | Sequence[int]
"""A NumPy array ``[n]`` of whole numbers, or a list of ints, each from −2³¹ to 2³¹ − 1."""

_Ints: TypeAlias = npt.NDArray[np.int64]


class CachedSequence:
    """A sequence of tokens in a :class:`KVCacheManager`, which makes it: ``manager.add(tokens)``.

    As a context manager it is freed at the end, and an exception rolls back the batch that it is in.
    """

    __slots__ = ("__weakref__", "_manager", "_num_cached", "_root", "_row")

    def __init__(self, manager: "KVCacheManager", row: int, root: Node, num_cached: int) -> None:
        self._manager: KVCacheManager | None = manager
        self._row = row
        self._root = root
        self._num_cached = num_cached

    @property
    def num_cached_tokens(self) -> int:
        """How many of its first tokens were in the pool when it was made."""
        return self._num_cached

    @property
    def num_tokens(self) -> int:
        """Tokens whose K and V are in the cache: shared or committed."""
        return int(self._owner()._lengths[self._row])

    @property
    def block_table(self) -> npt.NDArray[np.int32]:
        """Its blocks in logical order, those of an open batch among them; a copy on the host."""
        return self._owner()._blocks_of(self._row)

    def fork(self) -> "CachedSequence":
        """A second sequence with the same tokens, in the same blocks. No block is taken.

        Whoever first writes to the last block, where it is not full, writes to a copy.

        Raises ``ValueError`` while this sequence is in an open batch, or is freed.
        """
        return self._owner()._fork(self)

    def truncate(self, num_tokens: int) -> None:
        """Forget all tokens but the first ``num_tokens``, and let go of blocks that only the others needed.

        What other sequences share stays theirs. Raises ``ValueError`` if there are fewer tokens, while this sequence is
        in an open batch, or when it is freed.
        """
        self._owner()._truncate(self, num_tokens)

    def __enter__(self) -> "CachedSequence":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        manager = self._manager
        if manager is not None:
            if kind is not None:  # lest freeing an open batch's sequence hides the exception
                for batch in [batch for batch in manager._batches if self in batch.sequences]:
                    manager.rollback(batch)
            manager.free(self)

    def __repr__(self) -> str:
        if self._manager is None:
            return "<CachedSequence, freed>"
        return f"<CachedSequence of {self.num_tokens} tokens in blocks {self.block_table.tolist()}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a sequence can be neither copied nor pickled; fork() makes a second one of the same tokens")

    def _owner(self) -> "KVCacheManager":
        if self._manager is None:
            raise ValueError("this sequence has been freed; add its tokens again")
        return self._manager


@dataclass(frozen=True, slots=True)
class KVCacheStats:
    """What :meth:`KVCacheManager.stats` found. Blocks and sequences are those of the moment, the rest are totals."""

    total_blocks: int
    free_blocks: int
    """That no sequence owns, and that hold nothing that is found."""
    live_blocks: int
    """That sequences own."""
    cached_blocks: int
    """That no sequence owns, but that are found by their tokens until they are needed."""
    num_sequences: int
    prompts: int
    """Sequences that came by ``add``, counted when the first new token of each is committed."""
    hits: int
    """Those of them that shared a block."""
    prompt_tokens: int
    """Tokens that ``add`` was given for them."""
    tokens_saved: int
    """Those of the tokens that needed no computing."""
    evictions: int
    """Cached blocks that were taken for other tokens."""
    copies: int
    """Blocks copied because another sequence shared them."""

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

    A call that raises leaves everything as it was, but for what :meth:`prepare` says. Not thread-safe. The cost of a
    call depends on what it is given, not on the size of the pool or on how many sequences there are, but for
    :meth:`check_integrity`, :meth:`reset_prefix_cache` and, now and then, the growth of its own tables.

    A cache has one manager, and nobody else hands out its blocks. Raises ``TypeError`` for another kind of cache, and
    ``ValueError`` for one that has blocks in its own block table.

    >>> cache = LayeredPagedKVCache(1, 8, 4, num_kv_heads=1, head_dim=2, dtype="float16", device="cpu")
    >>> manager = KVCacheManager(cache)
    >>> prompt = [1, 2, 3]
    >>> sequence = manager.add(prompt)
    >>> manager.commit(manager.prepare({sequence: prompt[sequence.num_cached_tokens :]}))
    >>> draft = manager.prepare({sequence: [4, 5, 6]})  # a speculative run, of which one token is accepted
    >>> manager.commit(draft, accepted={sequence: 1})
    >>> branch = sequence.fork()
    >>> sequence.num_tokens, branch.num_tokens, manager.stats().live_blocks
    (4, 4, 1)
    >>> manager.free(sequence)
    """

    def __init__(self, cache: LayeredPagedKVCache, *, prefix_caching: bool = True) -> None:
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
        self._pool = BlockPool(cache.num_blocks, cache.block_size)
        # A row for each sequence. Tables hold ids plus one: behind the last block they are 0, as fresh memory reads.
        self._lengths = np.zeros(0, np.int64)
        self._num_blocks = np.zeros(0, np.int64)
        self._tables = _lazy_zeros(0, 8)
        self._tails = np.empty((0, self._block_size), np.int32)  # the tokens in the last block, where it is not full
        self._is_open = np.zeros(0, np.bool_)  # whether it is in a batch that has not ended
        self._sequences: set[CachedSequence] = set()
        self._batches: set[Batch] = set()
        self._free_rows: list[int] = []
        # The prompts of sequences that have not grown yet.
        self._uncounted: dict[CachedSequence, npt.NDArray[np.int32]] = {}
        self._prompts = self._hits = self._prompt_tokens = self._tokens_saved = self._copies = 0

    @property
    def sequences(self) -> tuple[CachedSequence, ...]:
        """All that are not freed, in no order."""
        return tuple(self._sequences)

    @property
    def open_batches(self) -> tuple[Batch, ...]:
        """All that are neither committed nor rolled back, in no order."""
        return tuple(self._batches)

    @property
    def num_available_blocks(self) -> int:
        """Blocks that could be taken at this moment: the free and the cached ones."""
        return self._pool.num_available

    def add(self, tokens: Tokens, *, salt: Salt = None) -> CachedSequence:
        """A new sequence that is going to begin with ``tokens``; no block is taken, and nothing is written yet.

        Full blocks that hold the first of them are shared: ``num_cached_tokens`` of the sequence says how many tokens
        that are, and is less than all of them, because somebody has to compute the next token. The others are to be
        given to :meth:`prepare`, in as many pieces as suits.

        salt
            Sequences share only with those of an equal salt (of the same type), such as the name of a tenant or of a
            LoRA adapter.

        Raises ``TypeError`` or ``ValueError`` for what are no tokens, or no salt.
        """
        prompt = _as_tokens(tokens)
        if not isinstance(salt, str | bytes | int | None):
            raise TypeError(f"salt must be a str, bytes, an int or None, got {type(salt).__name__}")
        root = self._pool.root(salt)
        findable = max(0, len(prompt) - 1) // self._block_size * self._block_size if self._prefix_caching else 0
        found = self._pool.find(root, self._chunks(prompt[:findable]))
        blocks = np.fromiter(found, np.int32, len(found))
        num_cached = len(blocks) * self._block_size
        sequence = self._new_sequence(root, num_cached, blocks)
        self._uncounted[sequence] = prompt
        return sequence

    def prepare(self, new_tokens: Mapping[CachedSequence, Tokens], *, buffers: BatchBuffers | None = None) -> Batch:
        """Room for the next tokens of each sequence: a prompt, a piece of one, one decoded token, a speculative run.

        new_tokens
            For each sequence the tokens that come behind its ``num_tokens``; of a prompt that was just added these are
            ``prompt[sequence.num_cached_tokens :]``, since the others are there.
        buffers
            What :meth:`buffers` returned; they become the batch's arrays, and are filled in the order of the current
            stream. Until the batch has ended they cannot be those of another.

        Until the batch is committed or rolled back, its sequences cannot be in another, nor forked, truncated or freed.

        On a GPU this copies from the host, and so a CUDA graph must not capture it.

        Raises :class:`~cupy_pagedkv.OutOfBlocksError` if the blocks do not suffice for all of them; its ``free`` counts
        cached blocks, too. Raises ``ValueError`` for sequences that are freed, of another manager or in an open batch,
        for a whole prompt of which a part was found, and for buffers that are another manager's, in use or too small;
        ``TypeError`` and ``ValueError`` for what are no tokens. If a device fails, cached blocks may be gone, and
        buffers hold anything; all else is as it was.
        """
        if not isinstance(new_tokens, Mapping):
            raise TypeError(f"expected {{sequence: its new tokens}}, got {type(new_tokens).__name__}")
        sequences = tuple(new_tokens)
        rows = self._rows_of(sequences)
        counts, tokens = _joined(list(new_tokens.values()))
        size = self._block_size
        starts = self._lengths[rows]
        ends = starts + counts
        num_blocks, needed = -(-starts // size), -(-ends // size)
        max_blocks = int(needed.max(initial=0))
        if buffers is not None:
            self._check_buffers(buffers)
            buffers._check_room(len(rows), len(tokens), max_blocks)
        batch = Batch(self, sequences, rows, tokens, starts, counts)
        for sequence in self._uncounted.keys() & new_tokens.keys():
            self._check_prompt(sequence, batch)

        # Who writes to a block that is begun already, and to which.
        writers = np.flatnonzero((starts % size != 0) & (counts > 0))
        begun = self._tables[rows[writers], starts[writers] // size] - 1
        copying = self._pool.writers_that_copy(begun)
        copied, written = begun[copying], np.delete(begun, copying) if copying else begun
        copiers = writers[copying]
        # For each new block: whose it is, and its place in that table.
        grown = needed - num_blocks
        growing = np.flatnonzero(grown)
        owners = np.repeat(growing, grown[growing])
        columns = _ranges(num_blocks[growing], grown[growing])

        taken = self._pool.take(len(owners) + len(copiers))
        try:
            self._widen(max_blocks)
            seq = np.concatenate([owners, copiers])
            column = np.concatenate([columns, starts[copiers] // size])
            sizes = (len(rows), len(tokens), max_blocks, len(copied)) if buffers is None else buffers._sizes
            host = BatchBuffers(self._staging.empty(BatchBuffers.num_bytes(*sizes)), *sizes)
            if buffers is not None:
                host._pad()
            tables = host.block_tables[: len(rows), :max_blocks]
            np.subtract(self._tables[rows, :max_blocks], 1, out=tables)
            tables[seq, column] = taken
            batch._fill(host, tables, size)
            host._copies[:, : len(copied)] = copied, taken[len(owners) :]
            memory = self._staging.send(host._memory, self._place, None if buffers is None else buffers._memory)
            arrays = buffers or (host if memory is host._memory else BatchBuffers(memory, *sizes))
            if len(copied):
                self._cache.copy_blocks(*arrays._copies[:, : len(copied)])
        except BaseException:
            self._pool.release(taken)
            raise

        self._tables[rows[seq], column] = taken + 1
        self._num_blocks[rows] = needed
        for i in range(len(copied)):
            self._pool.release(copied[i : i + 1])  # one by one: two may have copied one block
        self._pool.forget(written.tolist())  # their only owner is about to write to them
        self._copies += len(copied)
        batch._take(arrays)
        self._batches.add(batch)
        self._is_open[rows] = True
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
        kept = batch._counts if accepted is None else self._accepted(batch, accepted)
        ends = batch._starts + kept
        if self._prefix_caching:
            self._remember(batch, ends)
        self._lengths[batch._rows] = ends
        if self._uncounted:
            for i in np.flatnonzero(kept).tolist():
                self._count(batch.sequences[i], int(batch._starts[i]))
        self._close(batch, "committed")

    def rollback(self, batch: Batch) -> None:
        """Drop a batch: its sequences are what they were before, whatever the layers have written.

        A copy of a shared block is kept, by the sequence that it was made for: a fork may own one block more. Cached
        blocks that ``prepare`` took do not come back, nor is a block found again that the batch was about to write to.

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
        self._lengths[row] = 0
        self._shrink(row)
        self._free_rows.append(row)
        self._sequences.remove(sequence)
        self._uncounted.pop(sequence, None)
        sequence._manager = None
        del sequence._root  # and with it a salt that nobody uses any more

    def buffers(self, num_seqs: int, num_tokens: int, max_blocks: int) -> BatchBuffers:
        """Arrays on the cache's device for all batches of at most so many sequences, new tokens in all, and blocks of
        one sequence: for a CUDA graph, which reads from where it read when it was captured.

        Until :meth:`prepare` fills them they are padding: nothing is written, and no sequence has a token.
        """
        num_seqs = at_least(1, "num_seqs", num_seqs)
        num_tokens, max_blocks = at_least(1, "num_tokens", num_tokens), at_least(1, "max_blocks", max_blocks)
        sizes = num_seqs, num_tokens, max_blocks, num_seqs
        host = BatchBuffers(self._staging.empty(BatchBuffers.num_bytes(*sizes)), *sizes)
        host._pad()
        buffers = BatchBuffers(self._staging.send(host._memory, self._place), *sizes)
        buffers._owner = self
        return buffers

    def reset_prefix_cache(self) -> None:
        """Let no block be found any more, as is right when the model's weights have changed.

        Raises ``RuntimeError`` while sequences own blocks.
        """
        live = self._pool.num_blocks - self._pool.num_available
        if live:
            raise RuntimeError(f"{live} blocks belong to live sequences; free these first")
        self._pool.clear()

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
        )

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` unless all adds up: free + live + cached blocks are the pool, each live block is in as
        many tables as it counts owners, and what is found is where it is said to be. Walks the whole pool."""
        owners = np.zeros(self._pool.num_blocks, np.int64)
        for sequence in self._sequences:
            blocks, length = self._blocks_of(sequence._row), int(self._lengths[sequence._row])
            needed = -(-length // self._block_size)
            if len(blocks) < needed or (len(blocks) > needed and not self._is_open[sequence._row]):
                raise RuntimeError(f"a sequence of {length} tokens has {len(blocks)} blocks, and should have {needed}")
            owners[blocks] += 1
        self._pool.check(owners)
        rows = sorted([*self._free_rows, *(sequence._row for sequence in self._sequences)])
        if rows != list(range(len(self._lengths))):
            raise RuntimeError(f"{len(self._free_rows)} free and {len(self._sequences)} used rows are not all rows")

    def _fork(self, sequence: CachedSequence) -> CachedSequence:
        row = self._row_of(sequence)
        length = int(self._lengths[row])
        fork = self._new_sequence(sequence._root, length, self._blocks_of(row))
        self._tails[fork._row] = self._tails[row]
        return fork

    def _truncate(self, sequence: CachedSequence, num_tokens: int) -> None:
        row = self._row_of(sequence)
        length = int(self._lengths[row])
        if at_least(0, "num_tokens", num_tokens) > length:
            raise ValueError(f"cannot truncate to {num_tokens} tokens: the sequence has {length}")
        last, offset = divmod(num_tokens, self._block_size)
        if offset and last < length // self._block_size and self._prefix_caching:
            # A full block becomes the last one and is not full any more; its tokens are in the trie.
            self._tails[row] = np.frombuffer(self._pool.node_of(int(self._tables[row, last]) - 1).chunk, np.int32)
        self._lengths[row] = num_tokens
        self._shrink(row)

    def _shrink(self, row: int) -> None:
        """Let go of the blocks that the row's tokens do not need."""
        needed = -(-int(self._lengths[row]) // self._block_size)
        self._pool.release(self._blocks_of(row)[needed:])
        self._tables[row, needed : self._num_blocks[row]] = 0
        self._num_blocks[row] = needed

    def _blocks_of(self, row: int) -> npt.NDArray[np.int32]:
        return self._tables[row, : self._num_blocks[row]] - 1

    def _new_sequence(self, root: Node, length: int, blocks: npt.NDArray[np.int32]) -> CachedSequence:
        if not self._free_rows:
            self._add_rows()
        self._widen(len(blocks))
        self._pool.share(blocks)
        row = self._free_rows.pop()
        self._tables[row, : len(blocks)] = blocks + 1
        self._num_blocks[row] = len(blocks)
        self._lengths[row] = length
        sequence = CachedSequence(self, row, root, length)
        self._sequences.add(sequence)
        return sequence

    def _add_rows(self) -> None:
        had, width = len(self._lengths), self._tables.shape[1]
        more = max(8, had)
        self._resize_tables(had + more, width)
        self._lengths, self._num_blocks, self._tails, self._is_open = (
            np.concatenate([rows, np.zeros((more, *rows.shape[1:]), rows.dtype)])
            for rows in (self._lengths, self._num_blocks, self._tails, self._is_open)
        )
        self._free_rows = list(range(had, had + more))[::-1]

    def _widen(self, max_blocks: int) -> None:
        """Give all tables at least ``max_blocks`` columns."""
        height, width = self._tables.shape
        if max_blocks > width:
            self._resize_tables(height, max(max_blocks, min(2 * width, self._pool.num_blocks)))

    def _resize_tables(self, height: int, width: int) -> None:
        tables = _lazy_zeros(height, width)
        for row, num_blocks in enumerate(self._num_blocks.tolist()):
            tables[row, :num_blocks] = self._tables[row, :num_blocks]
        self._tables = tables

    def _chunks(self, tokens: npt.NDArray[np.int32]) -> list[bytes]:
        """Tokens that fill blocks, as the bytes of each block."""
        return tokens.view(f"V{tokens.itemsize * self._block_size}").tolist() if len(tokens) else []

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
        is_open = self._is_open[rows]
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

    def _check_prompt(self, sequence: CachedSequence, batch: Batch) -> None:
        """Refuse a whole prompt behind that part of it which was found."""
        i = batch.sequences.index(sequence)
        first, start, count = int(batch._first[i]), int(batch._starts[i]), int(batch._counts[i])
        prompt = self._uncounted[sequence]
        if start and start == sequence._num_cached and np.array_equal(batch._tokens[first : first + count], prompt):
            raise ValueError(
                f"{start} of the prompt's {count} tokens are in the cache already, and would be there twice; "
                "give prepare the others, prompt[sequence.num_cached_tokens:]"
            )

    def _count(self, sequence: CachedSequence, start: int) -> None:
        """Count a prompt, the first time that its sequence grows."""
        prompt = self._uncounted.pop(sequence, None)
        if prompt is not None:
            saved = min(start, sequence._num_cached)
            self._prompts += 1
            self._hits += saved > 0
            self._prompt_tokens += len(prompt)
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
        kept = batch._counts.copy()
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
        """Let the blocks that a batch fills be found, and keep the tokens in last blocks that are not full."""
        size, remember = self._block_size, self._pool.remember
        begun, full = batch._starts // size, ends // size
        # The tokens that go on where a block was begun, of all sequences at once: in a decode step these are all.
        inside = batch._positions < np.minimum(ends, (begun + 1) * size)[batch._index]
        self._tails[batch._rows[batch._index[inside]], batch._positions[inside] % size] = batch._tokens[inside]

        filling = np.flatnonzero(full > begun)
        rows, columns = batch._rows[filling], begun[filling]
        blocks = (self._tables[rows, columns] - 1).tolist()
        before = (self._tables[rows, np.maximum(columns - 1, 0)] - 1).tolist()
        chunks = self._chunks(self._tails[rows].ravel())
        goes_on = (ends[filling] > (columns + 1) * size).tolist()
        for j, i in enumerate(filling.tolist()):
            column = columns[j]
            node = self._pool.node_of(before[j]) if column else batch.sequences[i]._root
            node = remember(blocks[j], node, chunks[j])
            if goes_on[j]:
                first = batch._first[i] - batch._starts[i]  # where position 0 of the sequence would be in the batch
                rest = batch._tokens[first + (column + 1) * size : first + ends[i]]
                later = self._tables[rows[j], column + 1 : full[i]] - 1
                whole = len(later) * size
                for block, chunk in zip(later.tolist(), self._chunks(rest[:whole]), strict=True):
                    node = remember(block, node, chunk)
                self._tails[rows[j], : len(rest) - whole] = rest[whole:]

    def _close(self, batch: Batch, end: str) -> None:
        rows = batch._rows
        for row in rows[self._num_blocks[rows] > -(-self._lengths[rows] // self._block_size)].tolist():
            self._shrink(row)
        self._is_open[rows] = False
        self._batches.remove(batch)
        batch._end = end


def _ranges(starts: _Ints, counts: _Ints) -> _Ints:
    """``starts[i]``, ``starts[i] + 1``, … ``starts[i] + counts[i] − 1`` for each i, one behind the other."""
    first = np.cumsum(counts) - counts
    shifts: _Ints = np.repeat(starts - first, counts)
    return np.arange(len(shifts)) + shifts


def _lazy_zeros(height: int, width: int) -> npt.NDArray[np.int32]:
    """Zeros ``[height, width]`` that take memory where something else is written, a small page at a time.

    NumPy asks for huge pages, of which each of thousands of short rows would take one, as soon as one row is long.
    """
    if not (height * width and hasattr(mmap, "MADV_NOHUGEPAGE")):  # Linux has it
        return np.zeros((height, width), np.int32)
    memory = mmap.mmap(-1, 4 * height * width, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel that has no huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.int32).reshape(height, width)


def _as_tokens(tokens: Any) -> npt.NDArray[np.int32]:
    """Tokens as int32 ``[n]``, in an array of our own: whole numbers that fit."""
    if isinstance(tokens, np.ndarray):
        if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
            raise TypeError(f"tokens must be whole numbers on one axis, got {tokens.dtype} of shape {tokens.shape}")
        if len(tokens) and (tokens.min() < -(2**31) or tokens.max() >= 2**31):
            raise ValueError(f"tokens must be from -2**31 to 2**31 - 1, got {tokens.min()} to {tokens.max()}")
        return tokens.astype(np.int32)
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
