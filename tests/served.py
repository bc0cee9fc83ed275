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


class Host:
    """The device of tests that are of bookkeeping alone."""

    name, of_caches, xp = "numpy", "cpu", np

    def array(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    numpy = array


@dataclass
class Expected:
    """What a sequence is: all its tokens whose K and V are in the cache."""

    salt: Any
    tokens: list[int]
    keys: list[Any]
    """What its first blocks are found by, those of which it knows."""
    host: list[Any]
    """Its last blocks, if they are on the host: such keys, and an object of its own for what nobody finds."""

    def fork(self) -> "Expected":
        return Expected(self.salt, list(self.tokens), list(self.keys), list(self.host))


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

    def __init__(self, num_blocks: int, block_size: int, num_places: int = 0) -> None:
        self.num_blocks, self.block_size, self.num_places = num_blocks, block_size, num_places
        self.contents: dict[int, Any] = {}
        self.cached: list[int] = []  # the one to be evicted first first
        self.evictions = 0
        # Keys of what is on the host, and objects for what nobody finds.
        self.cached_on_host: list[Any] = []  # and not in the pool; the one to be lost first first
        self.spare: list[Any] = []  # which the pool has, too
        self.held: Counter[Any] = Counter()  # by how many sequences
        self.num_lent = 0  # places more, while others are being left
        self.offloaded = self.restored = 0
        self.used: dict[Any, int] = {}  # when each key was let go of

    def in_pool(self, key: Any) -> bool:
        return key in self.contents.values()

    def lookup(self, keys: Sequence[Any]) -> int:
        """How many of the keys are found before the first that is not."""
        found = [*self.contents.values(), *self.cached_on_host, *self.held]
        return next((i for i, key in enumerate(keys) if key not in found), len(keys))

    def share(self, blocks: Sequence[int]) -> None:
        self.cached = [block for block in self.cached if block not in blocks]

    def take(self, count: int, live: int) -> None:
        gone = []
        while self.num_blocks - live - len(self.cached) < count:
            key = self.contents.pop(self.cached.pop(0))
            assert not self.behind(key), "a head is evicted before its tail"
            self.evictions += 1
            gone.append(key)
        room, kept = self.num_places + self.num_lent - len(self.held), []
        for key in reversed(gone):
            if key not in self.held:
                if room:
                    room -= 1
                    kept.insert(0, key)
                elif key in self.spare:
                    self.spare.remove(key)
        self.put_on_host(kept)
        for key in kept:
            at = sum(self.used[other] <= self.used[key] for other in self.cached_on_host)
            self.cached_on_host.insert(at, key)

    def put_on_host(self, keys: Sequence[Any]) -> None:
        """Those of the keys that are not there are copied there; spare places, and then the oldest, make room."""
        missing = [key for key in keys if key not in self.spare and key not in self.held]
        self.spare = [key for key in self.spare if key not in keys]
        others = [key for key in keys if key not in missing and key not in self.held]
        self.make_room(len(others) + len(missing))
        self.offloaded += len(missing)

    def make_room(self, count: int) -> None:
        while len(self.spare) + len(self.cached_on_host) + len(self.held) + count > self.num_places + self.num_lent:
            if self.spare:
                self.spare.pop(0)
            else:
                lost = self.cached_on_host.pop(0)
                assert not self.behind_on_host(lost), "a head is lost before its tail"

    def settle(self) -> None:
        """What was returning has left its places."""
        self.num_lent = 0
        self.make_room(0)

    def hold(self, keys: Sequence[Any]) -> None:
        self.cached_on_host = [key for key in self.cached_on_host if key not in keys]
        self.spare = [key for key in self.spare if key not in keys]
        self.held.update(keys)

    def let_go(self, keys: Sequence[Any]) -> None:
        """A sequence needs what it had on the host no more, in the order of its tokens."""
        self.held.subtract(keys)
        gone = [key for key in keys if not self.held[key]]
        self.held = +self.held
        self.spare += [key for key in gone if self.in_pool(key)]
        for key in reversed(gone):
            if isinstance(key, tuple) and not self.in_pool(key):
                self.use(key)
                self.cached_on_host.append(key)
        if paired := [key for key in keys if isinstance(key, tuple) and self.in_pool(key)]:
            salt, tokens = paired[-1]
            cached = [b for b in self.cached if self.contents[b] == (salt, tokens[: len(self.contents[b][1])])]
            for block in sorted(cached, key=lambda block: -len(self.contents[block][1])):
                self.cached.remove(block)
                self.cached.append(block)
                self.use(self.contents[block])

    def use(self, key: Any) -> None:
        self.used.pop(key, None)
        self.used[key] = 1 + max(self.used.values(), default=0)

    def write(self, block: int) -> None:
        """The only owner of a block writes to it."""
        key = self.contents.pop(block, None)
        if key is not None and key not in self.contents.values():
            lost = {key, *self.behind_on_host(key)}
            there = [one for one in lost if one in self.held or one in self.cached_on_host]
            for unreachable in self.behind(key):
                self.cached.remove(unreachable)
                lost.add(self.contents.pop(unreachable))
            # What a parked sequence knows is found on the host, and so is what lies behind it there.
            for one in sorted(there, key=lambda one: len(one[1])):
                if lost.isdisjoint(self.between(key, one)):
                    lost.remove(one)
            assert not lost & self.held.keys(), "a parked sequence loses what it knows"
            self.cached_on_host = [key for key in self.cached_on_host if key not in lost]
            self.spare = [key for key in self.spare if key not in lost]

    def between(self, key: Any, other: Any) -> list[Any]:
        """The keys of a prefix from one on, and before the other."""
        ends = range(len(key[1]), len(other[1]), self.block_size)
        return [(key[0], other[1][:end]) for end in ends]

    def fill(self, block: int, key: Any) -> None:
        for cached in [cached for cached in self.cached if self.contents[cached] == key]:
            self.cached.remove(cached)
            del self.contents[cached]
        if key in self.cached_on_host:
            self.cached_on_host.remove(key)
            self.spare.append(key)
        self.contents[block] = key

    def release(self, block: int) -> None:
        """A block has lost its last owner."""
        key = self.contents.pop(block, None)
        if key is not None and key not in self.contents.values():
            self.contents[block] = key
            self.cached.append(block)
            self.use(key)

    def behind(self, key: Any) -> list[int]:
        salt, tokens = key
        return [b for b, (s, more) in self.contents.items() if s == salt and more[: len(tokens)] == tokens != more]

    def behind_on_host(self, key: Any) -> list[Any]:
        salt, tokens = key
        keys = [key for key in [*self.cached_on_host, *self.spare, *self.held] if isinstance(key, tuple)]
        return [(s, more) for s, more in keys if s == salt and more[: len(tokens)] == tokens != more]


def runs_of(pool: BlockPool) -> list[Run]:
    """All of them, in any order that does not change by itself."""
    runs = list(pool._roots.values())
    for run in runs:
        runs += run.children.values()
    return runs


class Served:
    """Calls go to the manager and to the model, and after each the two are compared."""

    def __init__(
        self,
        device: Any,
        num_blocks: int,
        block_size: int = 16,
        *,
        prefix_caching: bool = True,
        host_blocks: int = 0,
    ) -> None:
        self.device = device
        self.block_size = block_size
        self.cache = LayeredPagedKVCache(NUM_LAYERS, num_blocks, block_size, 1, ROW, "uint8", device.of_caches)
        self.manager = KVCacheManager(self.cache, prefix_caching=prefix_caching, host_blocks=host_blocks)
        self.prefix_caching = prefix_caching
        self.findable = Findable(num_blocks, block_size, host_blocks)
        self.expected: dict[CachedSequence, Expected] = {}
        self.open: dict[Batch, dict[CachedSequence, list[int]]] = {}

    def add(self, tokens: Sequence[int], salt: Any = None, name: str | None = None) -> CachedSequence:
        sequence = self.manager.add(np.array(tokens, np.int64), salt=salt, name=name)
        cached = sequence.num_cached_tokens
        assert cached == sequence.num_tokens == len(sequence.block_table) * self.block_size
        assert cached < max(1, len(tokens))
        keys = self.keys(salt, tokens[:-1]) if self.prefix_caching else []
        keys = keys[: self.findable.lookup(keys)]
        assert len(sequence.block_table) == len(keys)
        in_pool = sum(map(self.findable.in_pool, keys))
        self.findable.share(sequence.block_table[:in_pool].tolist())
        self.findable.hold(keys[in_pool:])
        self.expected[sequence] = Expected(salt, list(tokens[:cached]), keys, keys[in_pool:])
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
        self._take_room(batch, new, tables, owners)
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
            if keys:
                expected.keys[had:] = keys
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
        self.expected[fork] = self.expected[sequence].fork()
        self.findable.hold(self.expected[fork].host)
        self.check()
        return fork

    def offload(self, sequence: CachedSequence) -> None:
        before, owners, table = self.state(), self.owners(), sequence.block_table.tolist()
        expected = self.expected[sequence]
        keys = [expected.keys[i] if i < len(expected.keys) else object() for i in range(len(table))]
        keys[len(table) - len(expected.host) :] = expected.host
        going = keys[: len(table) - len(expected.host)]
        there = [key for key in going if key in self.findable.held or key in self.findable.spare]
        room = self.findable.num_places - len(self.findable.held) - sum(key in self.findable.spare for key in there)
        try:
            sequence.offload()
        except OutOfBlocksError as error:
            assert (error.wanted, error.free) == (len(going) - len(there), room)  # noqa: PT017
            assert self.state() == before
            self.check()
            raise
        assert len(going) - len(there) <= room
        self.findable.put_on_host(going)
        self.findable.hold(going)
        self._release(table[: len(going)], owners)
        expected.host = keys
        self.check()

    def truncate(self, sequence: CachedSequence, num_tokens: int) -> None:
        before, table = self.owners(), sequence.block_table.tolist()
        sequence.truncate(num_tokens)
        needed, expected = -(-num_tokens // self.block_size), self.expected[sequence]
        in_pool = len(table) - len(expected.host)
        self.findable.let_go(expected.host[max(0, needed - in_pool) :])
        self._release(table[needed:in_pool], before)
        del expected.tokens[num_tokens:], expected.keys[needed:], expected.host[max(0, needed - in_pool) :]
        self.check()

    def free(self, sequence: CachedSequence) -> None:
        before, table = self.owners(), sequence.block_table.tolist()
        self.manager.free(sequence)
        expected = self.expected.pop(sequence)
        self.findable.let_go(expected.host)
        self._release(table[: len(table) - len(expected.host)], before)
        self.check()

    def reset_prefix_cache(self) -> None:
        self.manager.reset_prefix_cache()
        old, self.findable = self.findable, Findable(self.cache.num_blocks, self.block_size, self.findable.num_places)
        self.findable.evictions, self.findable.offloaded = old.evictions, old.offloaded
        self.findable.restored = old.restored
        self.check()

    def _take_room(
        self,
        batch: Batch,
        new: Mapping[CachedSequence, Sequence[int]],
        tables: Mapping[CachedSequence, Sequence[int]],
        owners: Mapping[int, int],
    ) -> None:
        """What the manager has done to the blocks, told the model: by what the tables were and are."""
        findable, live = self.findable, len(owners)
        begun = []
        for sequence, tokens in new.items():
            column, offset = divmod(len(self.expected[sequence].tokens), self.block_size)
            if offset and len(tokens):
                begun.append((sequence, tables[sequence][column], int(sequence.block_table[column])))
        others = sum(len(sequence.block_table) - len(tables[sequence]) for sequence in new)
        others += sum(old >= 0 and block != old for _, old, block in begun)

        returning = []  # what is on the host: of whom, which key, in which block it is now, and who writes to it
        for sequence in new:
            host, writes = self.expected[sequence].host, (sequence, -1) in [(s, old) for s, old, _ in begun]
            for i, block in enumerate(sequence.block_table[len(tables[sequence]) - len(host) :][: len(host)].tolist()):
                returning.append((sequence, host[i], block, writes and i == len(host) - 1))
        # What the pool still has travels not at all, and what several share travels once.
        there = [each for each in returning if findable.in_pool(each[1]) and not each[3]]
        returning = [each for each in returning if each not in there]
        kept = [block for block in findable.cached if findable.contents[block] in [key for _, key, _, _ in there]]
        findable.share(kept)
        live += len(kept)
        for sequence in dict.fromkeys(sequence for sequence, *_ in there):
            findable.let_go([key for s, key, _, _ in there if s is sequence])
        restored = findable.restored + len({(key, writes and s) for s, key, _, writes in returning})
        back: set[Any] = set()
        at_once = max(1, len(returning))
        if live + others + len(returning) - (findable.num_blocks - len(findable.cached)) > (
            findable.num_places - len(findable.held) - len(findable.cached_on_host)
        ):  # what leaves the pool has to take the places of what comes back
            at_once = max(1, self.manager._pool.reserve)
        rounds = [returning[i : i + at_once] for i in range(0, len(returning), at_once)] or [[]]
        for piece in rounds:
            again = [each for each in piece if each[1] in back and not each[3]]
            for sequence in dict.fromkeys(sequence for sequence, *_ in again):
                findable.let_go([key for s, key, _, _ in again if s is sequence])
            some = [each for each in piece if each not in again]
            read = [key for _, key, _, writes in some if not writes]
            fetched = len(set(read)) + len(some) - len(read)
            back.update(read)
            leaving = Counter(key for _, key, _, _ in some)
            findable.num_lent = sum(findable.held[key] == count for key, count in leaving.items())
            findable.num_lent = min(findable.num_lent, self.manager._pool.reserve)
            findable.take(fetched + (others if piece is rounds[-1] else 0), live)
            findable.restored += fetched
            live += fetched
            for _, key, block, writes in some:
                if isinstance(key, tuple) and not writes:
                    findable.contents[block] = key
            for sequence in dict.fromkeys(sequence for sequence, *_ in some):
                findable.let_go([key for s, key, _, writes in some if s is sequence and not writes])
                findable.let_go([key for s, key, _, writes in some if s is sequence and writes])
            findable.settle()
        assert findable.restored == restored
        for _, old, block in begun:
            if block == old:
                findable.write(old)
        for sequence, _, _ in begun:
            del self.expected[sequence].keys[len(self.expected[sequence].tokens) // self.block_size :]
        for sequence in new:
            self.expected[sequence].host = []

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
            list(pool._host_line),
            list(pool._places.spare),
            pool._places._of_block.tolist(),
            self.manager._rows.on_host.tolist(),
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
        self.check_lines()
        on_host = self.manager._rows.on_host
        assert [on_host[sequence._row] for sequence in self.expected] == [bool(e.host) for e in self.expected.values()]
        in_pool = [len(sequence.block_table) - len(self.expected[sequence].host) for sequence in self.expected]
        for sequence, count in zip(self.expected, in_pool, strict=True):
            assert (sequence.block_table[:count] >= 0).all()
            assert (sequence.block_table[count:] < 0).all()
            self._check_host(sequence, count)
        tables = [sequence.block_table[:count] for sequence, count in zip(self.expected, in_pool, strict=True)]
        assert stats.live_blocks == len({block for table in tables for block in table.tolist()})
        lengths = [len(expected.tokens) for expected in self.expected.values()]
        assert [sequence.num_tokens for sequence in self.expected] == lengths
        lengths = [min(n, count * self.block_size) for n, count in zip(lengths, in_pool, strict=True)]
        if not sum(lengths):
            return
        padded = np.full((len(tables), max(map(len, tables))), -1, np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        got = [self.device.numpy(array) for array in self.cache.gather_all(padded, lengths)]
        rows = np.concatenate(
            [rows_of(e.salt, e.tokens[:n]) for e, n in zip(self.expected.values(), lengths, strict=True)], axis=2
        )
        for tensor, array in enumerate(got):
            wrong = np.argwhere((array != rows[tensor]).any(axis=(0, 2, 3))).ravel()
            assert not len(wrong), f"tokens {wrong.tolist()} of {lengths} differ in {'KV'[tensor]}"

    def check_lines(self) -> None:
        """What would be evicted, in which order, and what is on the host."""
        pool, findable = self.manager._pool, self.findable
        assert [block for run in pool._line for block in reversed(run.blocks)] == findable.cached
        if not findable.num_places:
            return
        salts = {id(root): (kind, salt) for (kind, salt), root in pool._roots.items()}
        keys = []
        for run in pool._host_line:
            tokens, above = bytes(run.tokens), run.parent
            while above.parent is not None:
                tokens, above = bytes(above.tokens) + tokens, above.parent
            numbers = np.frombuffer(tokens, np.int32).tolist()
            ends = range(run.end * self.block_size, run.first * self.block_size, -self.block_size)
            keys += [(salts[id(above)], tuple(numbers[:end])) for end in ends]
        assert keys == findable.cached_on_host, (keys, findable.cached_on_host)
        stats = self.manager.stats()
        assert (stats.live_host_blocks, stats.cached_host_blocks) == (len(findable.held), len(keys))
        spare = pool._places.blocks_of(np.array(list(pool._places.spare), np.int32)).tolist()
        assert [findable.contents[block] for block in spare] == findable.spare
        counts = stats.offloaded, stats.restored
        assert counts == (findable.offloaded, findable.restored), (counts, findable.offloaded, findable.restored)

    def _check_host(self, sequence: CachedSequence, first: int) -> None:
        """K and V of a sequence's blocks from ``first`` on, which are on the host."""
        expected = self.expected[sequence]
        tokens = expected.tokens[first * self.block_size :]
        if tokens:
            mover, places = self.manager._mover, self.manager._rows.blocks(sequence._row)[first:]
            held = mover.read(places).reshape(-1, 2, NUM_LAYERS, self.block_size, 1, ROW).transpose(1, 2, 0, 3, 4, 5)
            held = held.reshape(2, NUM_LAYERS, -1, 1, ROW)[:, :, : len(tokens)]
            assert (held == rows_of(expected.salt, expected.tokens)[:, :, first * self.block_size :]).all()

    def owners(self) -> Counter[int]:
        """How many owners each live block of the pool has."""
        return Counter(block for sequence in self.expected for block in sequence.block_table.tolist() if block >= 0)

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
