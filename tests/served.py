"""A KVCacheManager beside a naive model of it, which keeps the K and V of each sequence whole and compares them all."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle

from cupy_pagedkv import Batch, BatchBuffers, CachedSequence, KVCacheManager, LayeredPagedKVCache, OutOfBlocksError
from cupy_pagedkv.bookkeeping.pool import BlockPool, Run

NUM_LAYERS, ROW = 2, 8  # bytes of K, or of V, of a token in one layer


@dataclass
class Expected:
    """What a sequence is: all its tokens whose K and V are in the cache."""

    salt: Any
    tokens: list[int]


def rows_of(salt: Any, tokens: Sequence[int]) -> np.ndarray:
    """K and V of tokens, which depend on all tokens before, as a model's do: uint8 ``[2, layers, tokens, 1, ROW]``."""
    digest = repr(salt).encode()
    rows = []
    for token in tokens:
        digest = hashlib.blake2b(digest + b"%d" % token, digest_size=2 * NUM_LAYERS * ROW).digest()
        rows.append(digest)
    return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 2, NUM_LAYERS, 1, ROW).transpose(1, 2, 0, 3, 4)


class Findable:
    """What has to be found, and what is evicted next, by plain lists and {block: salt, all tokens to its end}."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.contents: dict[int, Any] = {}
        self.cached: list[int] = []  # the one to be evicted first first
        self.evictions = 0

    def lookup(self, keys: Sequence[Any]) -> int:
        """How many of the keys are found before the first that is not."""
        return next((i for i, key in enumerate(keys) if key not in self.contents.values()), len(keys))

    def share(self, blocks: Sequence[int]) -> None:
        self.cached = [block for block in self.cached if block not in blocks]

    def take(self, count: int, live: int) -> None:
        while self.num_blocks - live - len(self.cached) < count:
            key = self.contents.pop(self.cached.pop(0))
            assert not self.behind(key), "a head is evicted before its tail"
            self.evictions += 1

    def write(self, block: int) -> None:
        """The only owner of a block writes to it."""
        key = self.contents.pop(block, None)
        if key is not None and key not in self.contents.values():
            for unreachable in self.behind(key):
                self.cached.remove(unreachable)
                del self.contents[unreachable]

    def fill(self, block: int, key: Any) -> None:
        for cached in [cached for cached in self.cached if self.contents[cached] == key]:
            self.cached.remove(cached)
            del self.contents[cached]
        self.contents[block] = key

    def release(self, block: int) -> None:
        """A block has lost its last owner."""
        key = self.contents.pop(block, None)
        if key is not None and key not in self.contents.values():
            self.contents[block] = key
            self.cached.append(block)

    def behind(self, key: Any) -> list[int]:
        salt, tokens = key
        return [b for b, (s, more) in self.contents.items() if s == salt and more[: len(tokens)] == tokens != more]


def runs_of(pool: BlockPool) -> list[Run]:
    """All of them, in any order that does not change by itself."""
    runs = list(pool._roots.values())
    for run in runs:
        runs += run.children.values()
    return runs


class Served:
    """Calls go to the manager and to the model, and after each the two are compared."""

    def __init__(self, device: Any, num_blocks: int, block_size: int = 16, *, prefix_caching: bool = True) -> None:
        self.device = device
        self.block_size = block_size
        self.cache = LayeredPagedKVCache(NUM_LAYERS, num_blocks, block_size, 1, ROW, "uint8", device.of_caches)
        self.manager = KVCacheManager(self.cache, prefix_caching=prefix_caching)
        self.prefix_caching = prefix_caching
        self.findable = Findable(num_blocks)
        self.expected: dict[CachedSequence, Expected] = {}
        self.open: dict[Batch, dict[CachedSequence, list[int]]] = {}

    def add(self, tokens: Sequence[int], salt: Any = None) -> CachedSequence:
        sequence = self.manager.add(np.array(tokens, np.int64), salt=salt)
        cached = sequence.num_cached_tokens
        assert cached == sequence.num_tokens == len(sequence.block_table) * self.block_size
        assert cached < max(1, len(tokens))
        assert len(sequence.block_table) == self.findable.lookup(self.keys(salt, tokens[:-1]))
        self.findable.share(sequence.block_table.tolist())
        self.expected[sequence] = Expected(salt, list(tokens[:cached]))
        self.check()
        return sequence

    def prepare(self, new: Mapping[CachedSequence, Sequence[int]], buffers: BatchBuffers | None = None) -> Batch:
        """As the manager's, and the layers write, too. All arrays are compared with plain loops."""
        before, owners = self.state(), self.owners()
        tables = {sequence: sequence.block_table.tolist() for sequence in new}
        try:
            batch = self.manager.prepare({s: list(tokens) for s, tokens in new.items()}, buffers=buffers)
        except OutOfBlocksError:
            assert self.state() == before
            self.check()
            raise
        self._check_arrays(batch, new, buffers)
        self.findable.take(len(self.owners().keys() - owners.keys()), len(owners))
        for sequence, tokens in new.items():
            column, offset = divmod(len(self.expected[sequence].tokens), self.block_size)
            if offset and len(tokens) and sequence.block_table[column] == tables[sequence][column]:
                self.findable.write(tables[sequence][column])
        assert (batch._buffers is buffers) is (buffers is not None)
        if batch.num_tokens:
            rows = []
            for sequence, tokens in new.items():
                known = self.expected[sequence]
                rows.append(rows_of(known.salt, [*known.tokens, *tokens])[:, :, len(known.tokens) :])
            keys, values = (self.device.array(array) for array in np.concatenate(rows, axis=2))
            self.cache.update_all(keys, values, batch.slot_mapping[: batch.num_tokens])
        self.open[batch] = {s: list(tokens) for s, tokens in new.items()}
        self.check()
        return batch

    def commit(self, batch: Batch, accepted: Mapping[CachedSequence, int] | None = None) -> None:
        self.manager.commit(batch, accepted)
        for sequence, tokens in self.open.pop(batch).items():
            expected = self.expected[sequence]
            had = len(expected.tokens) // self.block_size
            expected.tokens += tokens[: (accepted or {}).get(sequence, len(tokens))]
            keys = self.keys(expected.salt, expected.tokens)[had:] if self.prefix_caching else []
            for block, key in zip(sequence.block_table[had:].tolist(), keys, strict=False):
                self.findable.fill(block, key)
        self.check()

    def rollback(self, batch: Batch) -> None:
        self.manager.rollback(batch)
        del self.open[batch]
        self.check()

    def append(self, sequence: CachedSequence, tokens: Sequence[int]) -> None:
        self.commit(self.prepare({sequence: tokens}))

    def run(self, tokens: Sequence[int], salt: Any = None) -> CachedSequence:
        """A sequence with all these tokens in the cache."""
        sequence = self.add(tokens, salt)
        self.append(sequence, tokens[sequence.num_cached_tokens :])
        return sequence

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        fork = sequence.fork()
        known = self.expected[sequence]
        self.expected[fork] = Expected(known.salt, list(known.tokens))
        self.check()
        return fork

    def truncate(self, sequence: CachedSequence, num_tokens: int) -> None:
        before, table = self.owners(), sequence.block_table.tolist()
        sequence.truncate(num_tokens)
        self._release(table[-(-num_tokens // self.block_size) :], before)
        del self.expected[sequence].tokens[num_tokens:]
        self.check()

    def free(self, sequence: CachedSequence) -> None:
        before, table = self.owners(), sequence.block_table.tolist()
        self.manager.free(sequence)
        self._release(table, before)
        del self.expected[sequence]
        self.check()

    def reset_prefix_cache(self) -> None:
        self.manager.reset_prefix_cache()
        self.findable = Findable(self.cache.num_blocks)
        self.findable.evictions = self.manager.stats().evictions
        self.check()

    def _release(self, blocks: Sequence[int], owners: Mapping[int, int]) -> None:
        for block in reversed(blocks):
            if owners[block] == 1:
                self.findable.release(block)

    def keys(self, salt: Any, tokens: Sequence[int]) -> list[Any]:
        """What full blocks of these tokens are found by."""
        ends = range(self.block_size, len(tokens) + 1, self.block_size)
        return [((type(salt), salt), tuple(tokens[:end])) for end in ends]

    def state(self) -> Any:
        """All that a call which raises must leave as it was."""
        pool = self.manager._pool
        sequences = {s: (s.num_tokens, s.block_table.tolist()) for s in self.expected}
        return (
            self.manager.stats(),
            sequences,
            pool._owners.tolist(),
            [(run, run.blocks.tolist(), bytes(run.tokens)) for run in runs_of(pool)],
            list(pool._line),
            self.manager._rows._tables.shape,
            {block: set(twins) for block, twins in pool._twins.items()},
            pool._allocator.stats(),
            self.bytes(),
        )

    def bytes(self) -> bytes:
        return b"".join(
            self.device.numpy(pool).tobytes() for layer in self.cache for pool in (layer.k_cache, layer.v_cache)
        )

    def check(self) -> None:
        """All sequences, byte for byte; and the manager's own sums."""
        self.manager.check_integrity()
        stats = self.manager.stats()
        assert stats.num_sequences == len(self.expected)
        assert (stats.cached_blocks, stats.evictions) == (len(self.findable.cached), self.findable.evictions)
        in_line = [block for run in self.manager._pool._line for block in reversed(run.blocks)]
        assert in_line == self.findable.cached
        tables = [sequence.block_table for sequence in self.expected]
        assert stats.live_blocks == len({block for table in tables for block in table.tolist()})
        lengths = [len(expected.tokens) for expected in self.expected.values()]
        assert [sequence.num_tokens for sequence in self.expected] == lengths
        if not sum(lengths):
            return
        padded = np.full((len(tables), max(map(len, tables))), -1, np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        got = [self.device.numpy(array) for array in self.cache.gather_all(padded, lengths)]
        rows = np.concatenate([rows_of(e.salt, e.tokens) for e in self.expected.values()], axis=2)
        for tensor, array in enumerate(got):
            wrong = np.argwhere((array != rows[tensor]).any(axis=(0, 2, 3))).ravel()
            assert not len(wrong), f"tokens {wrong.tolist()} of {lengths} differ in {'KV'[tensor]}"

    def owners(self) -> Counter[int]:
        """How many owners each live block has."""
        return Counter(block for sequence in self.expected for block in sequence.block_table.tolist())

    def _check_arrays(self, batch: Batch, new: Mapping[CachedSequence, Sequence[int]], buffers: Any) -> None:
        slots, positions, seq_lens, cu_seqlens, tables = [], [], [], [0], []
        for sequence, tokens in new.items():
            start, table = len(self.expected[sequence].tokens), sequence.block_table.tolist()
            for position in range(start, start + len(tokens)):
                positions.append(position)
                slots.append(table[position // self.block_size] * self.block_size + position % self.block_size)
            seq_lens.append(start + len(tokens))
            cu_seqlens.append(cu_seqlens[-1] + len(tokens))
            tables.append(table)
        num_seqs, num_tokens, width = len(new), len(slots), max(map(len, tables), default=0)
        if buffers is not None:
            num_seqs, num_tokens, width, _ = buffers._sizes
        padded = [table + [0] * (width - len(table)) for table in tables]
        padded += [[0] * width] * (num_seqs - len(new))
        wanted = {
            "slot_mapping": np.array(slots + [-1] * (num_tokens - len(slots)), np.int64),
            "positions": np.array(positions + [0] * (num_tokens - len(slots)), np.int64),
            "seq_lens": np.array(seq_lens + [0] * (num_seqs - len(new)), np.int32),
            "cu_seqlens": np.array(cu_seqlens + cu_seqlens[-1:] * (num_seqs - len(new)), np.int32),
            "block_tables": np.array(padded, np.int32).reshape(num_seqs, width),
        }
        for name, array in wanted.items():
            got = self.device.numpy(getattr(batch, name))
            assert (got.dtype, got.shape) == (array.dtype, array.shape), name
            assert oracle.opaque(got).tobytes() == array.tobytes(), (name, got, array)
        assert (batch.sequences, batch.num_tokens, len(batch)) == (tuple(new), len(slots), len(new))
