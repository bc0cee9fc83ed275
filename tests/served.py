"""A KVCacheManager beside a naive model of it, which keeps the K and V of each sequence whole and compares them all."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle

from cupy_pagedkv import Batch, BatchBuffers, CachedSequence, KVCacheManager, LayeredPagedKVCache, OutOfBlocksError

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


class Served:
    """Calls go to the manager and to the model, and after each the two are compared."""

    def __init__(self, device: Any, num_blocks: int, block_size: int = 16, *, prefix_caching: bool = True) -> None:
        self.device = device
        self.block_size = block_size
        self.cache = LayeredPagedKVCache(NUM_LAYERS, num_blocks, block_size, 1, ROW, "uint8", device.of_caches)
        self.manager = KVCacheManager(self.cache, prefix_caching=prefix_caching)
        self.expected: dict[CachedSequence, Expected] = {}
        self.open: dict[Batch, dict[CachedSequence, list[int]]] = {}

    def add(self, tokens: Sequence[int], salt: Any = None) -> CachedSequence:
        sequence = self.manager.add(np.array(tokens, np.int64), salt=salt)
        cached = sequence.num_cached_tokens
        assert cached == sequence.num_tokens == len(sequence.block_table) * self.block_size
        assert cached < max(1, len(tokens))
        # What a live sequence has written is found.
        found = (
            common_blocks(tokens[:-1], other.tokens, self.block_size)
            for other in self.expected.values()
            if (type(other.salt), other.salt) == (type(salt), salt)
        )
        assert len(sequence.block_table) >= max(found, default=0) * self.manager._prefix_caching
        self.expected[sequence] = Expected(salt, list(tokens[:cached]))
        self.check()
        return sequence

    def prepare(self, new: Mapping[CachedSequence, Sequence[int]], buffers: BatchBuffers | None = None) -> Batch:
        """As the manager's, and the layers write, too. All arrays are compared with plain loops."""
        before = self.state()
        try:
            batch = self.manager.prepare({s: list(tokens) for s, tokens in new.items()}, buffers=buffers)
        except OutOfBlocksError:
            assert self.state() == before
            self.check()
            raise
        self._check_arrays(batch, new, buffers)
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
            self.expected[sequence].tokens += tokens[: (accepted or {}).get(sequence, len(tokens))]
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
        sequence.truncate(num_tokens)
        del self.expected[sequence].tokens[num_tokens:]
        self.check()

    def free(self, sequence: CachedSequence) -> None:
        self.manager.free(sequence)
        del self.expected[sequence]
        self.check()

    def state(self) -> Any:
        """All that a call which raises must leave as it was."""
        pool = self.manager._pool
        sequences = {s: (s.num_tokens, s.block_table.tolist()) for s in self.expected}
        return (
            self.manager.stats(),
            sequences,
            pool._owners.tolist(),
            list(pool._node),
            [(node and node.block) for node in pool._node],
            self.manager._tables.shape,
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
        padded = [table + [-1] * (width - len(table)) for table in tables]
        padded += [[-1] * width] * (num_seqs - len(new))
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


def common_blocks(a: Sequence[int], b: Sequence[int], block_size: int) -> int:
    """Full blocks that two runs of tokens have in common at their beginnings."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n // block_size
