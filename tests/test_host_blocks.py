"""The second tier: what is evicted is found in host memory, sequences are parked there, and both come back."""

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from served import NUM_LAYERS, ROW, Host, Served, rows_of

from cupy_pagedkv import KVCacheManager, LayeredPagedKVCache, OutOfBlocksError
from cupy_pagedkv.bookkeeping.pool import BlockPool
from cupy_pagedkv.caches.tier import BlockMover


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    return Served(Host(), 8, host_blocks=12)


@pytest.fixture
def moves(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    return moves_of(served, monkeypatch)


def moves_of(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """How many blocks go to the host and come from there, a call each."""
    made: list[tuple[str, int]] = []
    store, fetch = served.manager._mover.store, served.manager._mover.fetch

    def storing(blocks: np.ndarray, places: np.ndarray) -> None:
        made.append(("store", len(blocks)))
        store(blocks, places)

    def fetching(places: np.ndarray, blocks: np.ndarray) -> None:
        made.append(("fetch", len(blocks)))
        fetch(places, blocks)

    monkeypatch.setattr(served.manager._pool, "_store", storing)
    monkeypatch.setattr(served.manager._mover, "fetch", fetching)
    return made


def counts(served: Served) -> tuple[int, int, int]:
    stats = served.manager.stats()
    return stats.live_host_blocks, stats.cached_host_blocks, stats.cached_blocks


# What is evicted


def test_what_is_evicted_is_found_on_the_host(served, moves):
    served.free(served.run(range(81)))
    served.free(served.run(range(100, 181)))
    assert moves == [("store", 3)]
    assert counts(served) == (0, 3, 7)
    again = served.add(range(81))
    assert (again.num_cached_tokens, again.num_host_blocks) == (80, 3)
    assert again.block_table.tolist() == [0, 1, -1, -1, -1]
    assert counts(served) == (3, 0, 5)
    assert len(moves) == 1, "nothing comes back before prepare"
    served.append(again, [80])
    assert moves[1:] == [("store", 3), ("fetch", 3)], "one transfer each way"
    assert (again.num_host_blocks, again.num_tokens) == (0, 81)


def test_nothing_is_written_back_that_did_not_change(served, moves):
    prompts = [range(start, start + 65) for start in (0, 100, 200)]
    for _ in range(5):
        for prompt in prompts:
            served.free(served.run(prompt))
    stats = served.manager.stats()
    assert stats.evictions > 30
    assert stats.offloaded == 12, "each block once"
    assert stats.restored > 30


def test_the_pool_and_the_host_hold_what_one_larger_pool_would(served):
    """Prompts of two blocks that fit both, beside one that begins a third, in whatever order they come."""
    prompts = [[i] * 32 + [0] for i in range(8)]
    for prompt in prompts:
        served.free(served.run(prompt))
    for i in np.random.default_rng(0).integers(0, 8, 50).tolist():
        sequence = served.run(prompts[i])
        assert sequence.num_cached_tokens == 32
        served.free(sequence)


def test_the_least_recently_used_blocks_are_lost(served):
    for i in range(10):
        served.free(served.run([i] * 32 + [0]))  # room for 8 + 12 blocks less the one that is begun
    assert served.manager._pool.lost == 1
    assert served.add([0] * 32 + [0]).num_cached_tokens == 16, "its last block made room"
    assert served.add([1] * 32 + [0]).num_cached_tokens == 32


def test_blocks_that_no_place_is_left_for_are_lost(served):
    parked = served.run(range(100))
    served.offload(parked)
    other = served.run(range(200, 270))
    served.offload(other)
    assert served.manager.stats().live_host_blocks == 12
    served.free(served.run(range(300, 420)))
    served.free(served.run(range(400, 520)))
    assert counts(served) == (12, 0, 7)
    assert served.manager._pool.lost == 7
    for sequence in (parked, other):
        served.append(sequence, [1])
        served.free(sequence)


def test_two_sequences_find_the_same_on_the_host(served, moves):
    served.free(served.run(range(64)))
    served.free(served.run(range(100, 228)))
    moves.clear()
    first, second = (served.add([*range(64), last]) for last in (1, 2))
    third = served.add([*range(48), 5])
    assert counts(served) == (4, 0, 8)
    served.commit(served.prepare({first: [1], second: [2]}))
    assert moves == [("store", 6), ("fetch", 4)], "once for both"
    assert (first.block_table[:4] == second.block_table[:4]).all()
    assert third.num_host_blocks == 3
    assert counts(served)[0] == 3, "the third still waits for them"
    served.commit(served.prepare({third: [5]}))
    assert len(moves) == 3, "one block of the pool was needed, which was evicted"
    assert (third.block_table[:3] == first.block_table[:3]).all()


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("pool", [4, 5])
def test_what_is_shared_comes_back_once_however_many_pieces_it_takes(monkeypatch, prefix_caching, pool):
    """Of blocks that nobody finds, too, and into a pool that has room for no more."""
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    monkeypatch.setattr("cupy_pagedkv.caches.tier._RESERVE_BYTES", 0)  # but a block there is, always
    served = Served(Host(), pool, 4, host_blocks=4, prefix_caching=prefix_caching)
    assert served.manager._pool.reserve == 1
    sequence = served.run(range(14))
    served.offload(sequence)
    fork = served.fork(sequence)
    served.free(served.run(range(100, 100 + 4 * pool)))
    restored = served.manager.stats().restored
    served.commit(served.prepare({sequence: [], fork: []}))
    assert sequence.block_table.tolist() == fork.block_table.tolist()
    assert served.manager.stats().restored - restored == 4


def test_what_the_pool_still_has_does_not_make_room_for_what_comes_back(monkeypatch):
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    monkeypatch.setattr("cupy_pagedkv.caches.tier._RESERVE_BYTES", 2 * 4 * 2 * NUM_LAYERS * ROW)
    served = Served(Host(), 8, 4, host_blocks=8)
    first = served.run(range(16))
    served.offload(first)
    for start in (500, 600):
        served.free(served.run(range(start, start + 16)))
    second = served.run(range(100, 116))
    served.offload(second)
    served.free(served.run(range(700, 708)))
    before = served.manager.stats()
    served.commit(served.prepare({first: [], second: []}))
    after = served.manager.stats()
    assert (after.restored - before.restored, after.evictions - before.evictions) == (4, 4)


@pytest.mark.parametrize("host_blocks", [12, 13])
def test_one_transfer_each_way_where_the_host_has_room(monkeypatch, host_blocks):
    """In spare places, of which there are enough or one too few; then a block at a time changes place with another."""
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    monkeypatch.setattr("cupy_pagedkv.caches.tier._RESERVE_BYTES", 1)
    served = Served(Host(), 8, host_blocks=host_blocks)
    sequence = served.run(range(64))
    served.offload(sequence)
    for prompt in (range(100, 164), range(200, 328), [*range(100, 164), 7]):
        served.free(served.run(prompt))
    places = served.manager._pool._places
    assert (places.num_free, len(places.spare)) == (0, host_blocks - 9)
    moves = moves_of(served, monkeypatch)
    served.append(sequence, [1])
    assert [count for what, count in moves if what == "fetch"] == ([4] if host_blocks == 13 else [1] * 4)


def test_a_part_of_what_another_found_comes_back_alone(served):
    served.free(served.run(range(64)))
    served.free(served.run(range(100, 228)))
    longer, shorter = served.add(range(65)), served.add(range(33))
    served.append(shorter, [32])
    assert (longer.num_host_blocks, shorter.num_host_blocks) == (4, 0)
    served.append(longer, [64])


def test_blocks_that_leave_one_by_one_are_joined_on_the_host(served):
    served.free(served.run(range(113)))
    sequence = served.run([])
    for i in range(112):
        served.append(sequence, [i + 1000])
    assert served.manager.stats().cached_host_blocks == 6
    assert len([*served.manager._pool._host_line]) == 1


def test_a_prompt_that_is_longer_than_the_pool_is_found_and_can_be_freed(monkeypatch):
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    served = Served(Host(), 4, host_blocks=20)
    sequence = served.run(range(64))
    for start in range(64, 200, 16):  # it never has more than 4 blocks
        served.truncate(sequence, 0)
        served.append(sequence, range(start, start + 64))
    with pytest.raises(OutOfBlocksError, match="make the pool larger"):
        served.prepare({sequence: range(1)})
    served.free(sequence)


def test_tokens_that_are_computed_again_make_the_place_a_spare(served):
    """A sequence that was added before the blocks went to the host computes what is there."""
    early = served.add(range(33))
    served.free(served.run(range(33)))
    served.free(served.run(range(100, 220)))
    assert counts(served)[1] == 2
    served.append(early, range(33))
    assert served.findable.spare
    assert early.num_host_blocks == 0


def test_what_is_let_go_of_on_the_host_was_used_last(served):
    """A parked sequence that is freed, and what was found there and never prepared."""
    first = served.run(range(32))
    served.offload(first)
    for start in range(100, 500, 100):
        served.free(served.run(range(start, start + 49)))
    served.free(first)
    for start in range(600, 900, 100):
        served.free(served.run(range(start, start + 49)))
    again = served.add(range(33))
    assert again.num_cached_tokens == 32
    served.free(again)
    for start in range(1000, 1300, 100):
        served.free(served.run(range(start, start + 49)))
    assert served.add(range(33)).num_cached_tokens == 32


# Parked sequences


@pytest.mark.parametrize("length", [0, 1, 16, 17, 60, 64])
@pytest.mark.parametrize("new", [0, 1, 20])
def test_a_parked_sequence_comes_back(device, length, new):
    served = Served(device, 8, host_blocks=8)
    sequence = served.run([*range(length)])
    served.offload(sequence)
    assert served.manager.stats().live_blocks == 0
    assert (sequence.num_tokens, sequence.num_host_blocks) == (length, -(-length // 16))
    assert sequence.block_table.tolist() == [-1] * -(-length // 16)
    served.free(served.run(range(500, 600)))
    served.offload(sequence)  # again, which is nothing
    served.append(sequence, range(new))
    assert sequence.num_host_blocks == 0


def test_what_is_still_in_the_pool_does_not_travel(served, moves):
    sequence = served.run(range(70))
    served.offload(sequence)
    assert moves == [("store", 5)]
    served.append(sequence, [1])
    assert moves[1:] == [("fetch", 1)], "the block that was begun"
    served.offload(sequence)
    assert moves[2:] == [("store", 1)], "only what has changed"
    assert repr(sequence) == "<CachedSequence of 71 tokens in blocks [-1, -1, -1, -1, -1]>"


def test_a_parked_sequence_shares_what_others_have(served, moves):
    first = served.run(range(40))
    second = served.run(range(40))
    served.offload(first)
    assert served.manager.stats().live_blocks == 3
    served.offload(second)
    assert moves == [("store", 3), ("store", 1)], "what is full is there"
    assert counts(served) == (4, 0, 2)
    served.commit(served.prepare({first: [1], second: [2]}))
    assert (first.block_table[:2] == second.block_table[:2]).all()


def test_parked_sequences_can_be_forked_truncated_and_freed(served):
    sequence = served.run(range(60))
    served.offload(sequence)
    fork = served.fork(sequence)
    served.truncate(fork, 40)
    deeper = served.fork(fork)
    served.truncate(sequence, 33)
    assert served.manager.stats().live_host_blocks == 3
    served.commit(served.prepare({fork: [7], sequence: [8]}))
    served.free(sequence)
    served.append(deeper, range(10))
    served.truncate(deeper, 0)
    served.append(deeper, [1])
    for each in (fork, deeper):
        served.free(each)
    assert counts(served)[0] == 0


@pytest.mark.parametrize("full", [True, False])
def test_who_writes_where_a_parked_sequence_knows_the_block_gets_it(served, moves, full):
    """What was there is found on the host from now on, and the pool can be full."""
    writer = served.run(range(48))
    parked, shorter = served.fork(writer), served.fork(writer)
    served.truncate(shorter, 32)
    served.free(served.run(range(80)))
    served.free(served.run([*range(32), *range(100, 116)]))
    served.offload(parked)
    served.offload(shorter)
    served.truncate(writer, 20)
    other = served.run(range(200, 280 if full else 200))  # by which what only the pool has goes to the host
    moves.clear()
    served.append(writer, range(500, 511))
    assert (moves, served.manager.stats().copies) == ([], 0)
    again = served.add(range(81))
    assert again.num_host_blocks == (4 if full else 2)
    served.free(again)
    served.free(other)
    served.append(writer, [511])
    served.append(shorter, [1, 2])
    served.append(parked, [1, 2])
    assert [count for what, count in moves if what == "fetch"] == [1, 1]
    fork = served.fork(parked)
    served.truncate(fork, 20)
    served.free(parked)
    served.append(fork, [5])


def test_a_run_that_a_parked_sequence_remembers_is_not_joined(monkeypatch):
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    served = Served(Host(), 6, host_blocks=3)
    first, second = (served.run([*range(32), *[i] * 16]) for i in (1, 2))
    served.free(second)
    served.free(first)
    parked = served.run([*range(32), 3])  # its prefix ends where those two parted
    served.offload(parked)
    served.run(range(500, 548))  # and one of the two is lost, since the host is full
    served.free(served.add([*range(32), *[1] * 16, 9]))
    served.append(parked, [1])


def test_the_host_is_full(served):
    sequences = [served.run(range(i, i + 64)) for i in (0, 100)]
    for sequence in sequences:
        served.offload(sequence)
    third = served.run(range(200, 281))
    before = served.state()
    with pytest.raises(
        OutOfBlocksError,
        match=r"6 places on the host wanted, 4 of 12 are free; free some, or make host_blocks larger",
    ):
        served.offload(third)
    assert served.state() == before
    served.free(sequences[0])
    served.offload(third)


def test_the_pool_is_too_small_for_what_comes_back(served):
    parked = served.run(range(64))
    served.offload(parked)
    served.run(range(100, 180))
    before = served.state()
    with pytest.raises(OutOfBlocksError, match="6 blocks wanted, 3 of 8 are free"):
        served.prepare({parked: range(20)})  # of which the pool has 3, that nobody owns
    assert served.state() == before


def test_a_manager_without_prefix_caching_parks_sequences(device):
    served = Served(device, 8, host_blocks=12, prefix_caching=False)
    sequence = served.run(range(40))
    served.offload(sequence)
    fork = served.fork(sequence)
    served.append(fork, [1])
    served.commit(served.prepare({sequence: [2] * 30, fork: [3]}))
    served.free(sequence)
    served.free(fork)
    assert counts(served) == (0, 0, 0)


def test_the_cache_cannot_be_reset_while_a_sequence_is_parked(served):
    sequence = served.run(range(20))
    served.offload(sequence)
    with pytest.raises(RuntimeError, match="2 blocks belong to live sequences; free these first"):
        served.manager.reset_prefix_cache()
    served.free(sequence)
    served.free(served.run(range(100, 220)))
    served.free(served.run(range(200, 320)))
    served.free(served.run(range(100, 133)))
    assert served.findable.spare
    assert served.findable.cached_on_host
    served.reset_prefix_cache()
    assert (counts(served), len(served.manager._pool._roots)) == ((0, 0, 0), 0)
    assert served.manager._pool._places.num_free == 12


def test_an_exception_frees_a_parked_sequence(served):
    sequence = served.manager.add(range(20))
    served.manager.commit(served.manager.prepare({sequence: range(20)}))
    with pytest.raises(ZeroDivisionError), sequence:
        sequence.offload(), 1 / 0
    assert served.manager.stats().live_host_blocks == 0


# Errors


def test_what_cannot_be_offloaded(served):
    with_none = Served(Host(), 4)
    with pytest.raises(ValueError, match=r"there is no host memory for blocks; make it KVCacheManager\(cache, host_"):
        with_none.run(range(4)).offload()
    sequence = served.run(range(4))
    with served.manager.prepare({sequence: [4]}), pytest.raises(ValueError, match="is in an open batch"):
        sequence.offload()
    served.manager.free(sequence)
    with pytest.raises(ValueError, match="has been freed"):
        sequence.offload()


@pytest.mark.parametrize(
    ("host_blocks", "error", "message"),
    [(-1, ValueError, "host_blocks must be at least 0, got -1"), (1.5, TypeError, "must be a whole number"),
     (2**31 - 4, ValueError, "host_blocks and the pool's 4 must be 2147483647 at most, together")],
)  # fmt: skip
def test_wrong_numbers_of_host_blocks(host_blocks, error, message):
    cache = LayeredPagedKVCache(1, 4, 4, 1, 1, "uint8", "cpu")
    with pytest.raises(error, match=message):
        KVCacheManager(cache, host_blocks=host_blocks)


def test_host_memory_in_bytes():
    cache = LayeredPagedKVCache(2, 4, 16, 4, 8, "float16", "cpu")
    block = 2 * 2 * 16 * 4 * 8 * 2
    assert KVCacheManager(cache, host_bytes=3 * block + block - 1).stats().host_blocks == 3
    assert KVCacheManager(cache, host_blocks=np.uint8(200)).stats().host_blocks == 200
    assert KVCacheManager(cache, host_bytes=np.uint32(2**32 - 1)).stats().host_blocks == (2**32 - 1) // block
    with pytest.raises(ValueError, match=f"host_bytes is {block - 1}, but a block takes {block} bytes"):
        KVCacheManager(cache, host_bytes=block - 1)
    with pytest.raises(ValueError, match="give host_blocks or host_bytes, not both"):
        KVCacheManager(cache, host_blocks=1, host_bytes=block)
    with pytest.raises(ValueError, match="host_bytes must be at least 0, got -1"):
        KVCacheManager(cache, host_bytes=-1)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("fails", ["store", "fetch"])
def test_a_transfer_that_fails_leaves_everything(served, monkeypatch, fails, error):
    """But for what was cached on the host and has made room."""
    parked = [served.run(range(start, start + 40)) for start in (0, 100)]
    for sequence in parked:
        served.offload(sequence)
    served.free(served.run(range(200, 328)))
    other = served.run([])
    before = served.state()

    def failing(*_: Any) -> None:
        raise error("the device is full")

    calls = [lambda: served.manager.prepare({parked[0]: [1], parked[1]: range(20), other: [5]})]
    if fails == "store":
        calls.append(lambda: served.manager.prepare({other: range(100)}))
    for call in calls:
        with monkeypatch.context() as patch:
            patch.setattr(served.manager._pool, "_store", failing) if fails == "store" else patch.setattr(
                BlockMover, "fetch", failing
            )
            with pytest.raises(error):
                call()
        served.manager.check_integrity()
        stats = served.manager.stats()
        assert (stats.live_blocks, stats.live_host_blocks) == (0, 6)
        tables = before[1]
        assert {s: (s.num_tokens, s.block_table.tolist()) for s in served.expected} == tables
    for i, sequence in enumerate(parked):
        served._check_host(sequence, 0)
        served.manager.commit(served.manager.prepare({sequence: []}))
        got = served.cache.gather_all(sequence.block_table[None], [40])[0]
        assert np.array_equal(got, rows_of(None, range(100 * i, 100 * i + 40))[0])


@pytest.mark.parametrize("fails", ["store", "fetch"])
def test_what_the_pool_still_has_is_back_after_a_failure(served, monkeypatch, fails):
    """Blocks of a parked sequence that are cached are shared before others are evicted."""
    parked = served.run(range(40))
    served.offload(parked)
    served.free(served.run(range(100, 196)))
    assert served.manager.stats().cached_blocks == 8

    def failing(*_: Any) -> None:
        raise MemoryError("the device is full")

    with monkeypatch.context() as patch:
        holder, name = (served.manager._pool, "_store") if fails == "store" else (served.manager._mover, "fetch")
        patch.setattr(holder, name, failing)
        with pytest.raises(MemoryError):
            served.manager.prepare({parked: [1]})
    served.manager.check_integrity()
    assert counts(served)[0] == parked.num_host_blocks == 1
    assert served.manager.stats().live_blocks == 2
    served.manager.commit(served.manager.prepare({parked: []}))
    assert np.array_equal(served.cache.gather_all(parked.block_table[None], [40])[0], rows_of(None, range(40))[0])


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5, "staging"])
def test_what_was_brought_back_before_a_failure_is_back(monkeypatch, fails_at, error):
    """Two blocks at once change places with what the pool has; the host is full."""
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    monkeypatch.setattr("cupy_pagedkv.caches.tier._RESERVE_BYTES", 2 * 16 * 2 * NUM_LAYERS * ROW)
    served = Served(Host(), 8, host_blocks=8)
    parked = [served.run(range(start, start + 50)) for start in (0, 100)]
    for sequence in parked:
        served.offload(sequence)
    served.free(served.run(range(200, 328)))
    calls, fetch, zeros = 0, BlockMover.fetch, served.manager._staging.zeros

    def fetching(mover: BlockMover, places: np.ndarray, blocks: np.ndarray) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            fetch(mover, places[:1], blocks[:1])
            raise error("the device is full")
        fetch(mover, places, blocks)

    def failing(num_bytes: int) -> np.ndarray:
        raise error("the host is full")

    with monkeypatch.context() as patch:
        patch.setattr(BlockMover, "fetch", fetching)
        patch.setattr(served.manager._staging, "zeros", failing if fails_at == "staging" else zeros)
        if fails_at != 5:
            with pytest.raises(error):
                served.manager.prepare({parked[0]: range(5), parked[1]: []})
        else:
            served.manager.rollback(served.manager.prepare({parked[0]: range(5), parked[1]: []}))
    served.manager.check_integrity()
    back = 8 if fails_at in (5, "staging") else 2 * (calls - 1)
    assert [sequence.num_host_blocks for sequence in parked] == [4 - min(back, 4), 4 - max(0, back - 4)]
    stats = served.manager.stats()
    assert (stats.restored, stats.live_blocks, stats.live_host_blocks) == (back, back, 8 - back)
    assert stats.cached_blocks + stats.cached_host_blocks <= 8
    for i, sequence in enumerate(parked):
        served.manager.commit(served.manager.prepare({sequence: []}))
        got = served.cache.gather_all(sequence.block_table[None], [50])[0]
        assert np.array_equal(got, rows_of(None, range(100 * i, 100 * i + 50))[0])
    assert served.manager._pool._places.num_free + len(served.manager._pool._places.spare) <= 8


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_offload_that_fails_leaves_everything(served, monkeypatch, error):
    sequence = served.run(range(40))
    before = served.state()

    def failing(*_: Any) -> None:
        raise error("the device is full")

    with monkeypatch.context() as patch:
        patch.setattr(served.manager._pool, "_store", failing)
        with pytest.raises(error):
            sequence.offload()
    assert served.state()[:7] == before[:7]  # behind it are totals of the allocators' calls
    served.offload(sequence)
    served.append(sequence, [1])
    spare = list(served.manager._pool._places.spare)
    with monkeypatch.context() as patch:
        patch.setattr(served.manager._pool, "_store", failing)
        with pytest.raises(error):
            sequence.offload()
    assert list(served.manager._pool._places.spare) == spare
    served.check()


def test_integrity_of_both_tiers(served):
    manager, pool = served.manager, served.manager._pool
    places = pool._places
    parked = served.run(range(40))
    served.offload(parked)
    served.free(served.run(range(100, 220)))
    served.free(served.run(range(200, 320)))
    spare = served.run(range(100, 133))
    cached = pool._host_line.oldest
    assert places.spare
    manager.check_integrity()

    def damaged(text: str, damage: Any, repair: Any) -> None:
        damage()
        with pytest.raises(RuntimeError, match=text):
            manager.check_integrity()
        repair()
        manager.check_integrity()

    place = next(iter(places.spare))
    block = int(places.blocks_of(np.array([place]))[0])
    damaged("1 places are spare, \\[\\d+, \\d+\\] should be",
            lambda: places.spare.pop(place), lambda: places.spare.update({place: None}))  # fmt: skip
    damaged("do not know each other",
            lambda: places._of_block.__setitem__(block, -1),
            lambda: places._of_block.__setitem__(block, place))  # fmt: skip
    damaged("8 free blocks are counted, 8 stand in line, 9 are marked as free",
            lambda: places.allocator._is_free.__setitem__(0, True),
            lambda: places.allocator._is_free.__setitem__(0, False))  # fmt: skip
    in_line = pool._host_line.num_blocks
    damaged("14 used \\+ 0 free places are not all 12",
            lambda: setattr(pool._host_line, "num_blocks", in_line + 2),
            lambda: setattr(pool._host_line, "num_blocks", in_line))  # fmt: skip
    damaged("is not on the host, but has other blocks",
            lambda: setattr(cached, "on_host", False), lambda: setattr(cached, "on_host", True))  # fmt: skip
    owner = int(manager._rows.blocks(parked._row)[0])
    damaged(f"block {owner} counts 2 owners, but 1 hold it",
            lambda: pool._owners.__setitem__(owner, 2), lambda: pool._owners.__setitem__(owner, 1))  # fmt: skip
    manager.free(spare)
    manager.check_integrity()


def test_a_pool_of_blocks_without_a_device():
    """The bookkeeping alone, which is told nothing but numbers."""
    moved: list[tuple[list[int], list[int]]] = []
    pool = BlockPool(2, 1, 3, 1, lambda blocks, places: moved.append((blocks.tolist(), places.tolist())))
    run = pool.root(None)
    blocks = pool.take(2)
    run = pool.remember(run, 0, blocks, b"the cat ")
    pool.release(blocks, 0, run, 2)
    pool.take(1)
    assert moved == [([1], [2])]
    run, blocks = pool.find(pool.root(None), b"the cat sat ")
    assert blocks.tolist() == [0, 2]
    with suppress(OutOfBlocksError):
        pool.take(2)
    assert (pool.num_places, pool.num_cached_places, pool.num_available_places, pool.offloaded) == (3, 1, 3, 1)
