"""The rules of many sequences over one pool, one by one; ``test_manager_model`` mixes them."""

import copy
import gc
import itertools
import mmap
import pickle
import weakref
from array import array
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import Host, Served

from cupy_pagedkv import KVCacheManager, LayeredPagedKVCache, OutOfBlocksError
from cupy_pagedkv.bookkeeping.pool import BlockPool
from cupy_pagedkv.devices.numpy_backend import HostStaging


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    return Served(Host(), 10)


# What is shared


def test_blocks_of_a_common_prefix_are_shared(served):
    """vLLM's test_prefill: 55 tokens take four blocks; 48 of them and 7 others hit three and take one."""
    first = served.run(range(55))
    assert first.num_cached_tokens == 0
    assert first.block_table.tolist() == [0, 1, 2, 3]
    second = served.add([*range(48), *range(100, 107)])
    assert second.num_cached_tokens == 48
    assert served.owners() == {0: 2, 1: 2, 2: 2, 3: 1}
    served.append(second, range(100, 107))
    assert second.block_table.tolist() == [0, 1, 2, 4]
    stats = served.manager.stats()
    assert (stats.prompts, stats.hits, stats.prompt_tokens, stats.tokens_saved) == (2, 1, 110, 48)
    assert (stats.live_blocks, stats.free_blocks, stats.cached_blocks, stats.utilisation) == (5, 5, 0, 0.5)
    assert stats.hit_rate == 48 / 110


@pytest.mark.parametrize(("length", "cached"), [(0, 0), (1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (47, 32)])
def test_a_full_hit_leaves_a_token_to_compute(served, length, cached):
    served.run(range(48))
    assert served.add(range(length)).num_cached_tokens == cached


def test_only_full_blocks_and_only_when_they_are_written(served):
    sequence = served.add(range(40))
    batch = served.prepare({sequence: range(40)})
    assert served.add(range(40)).num_cached_tokens == 0
    served.rollback(batch)
    assert served.add(range(40)).num_cached_tokens == 0
    served.append(sequence, range(31))
    assert served.add(range(40)).num_cached_tokens == 16
    batch = served.prepare({sequence: [31]})
    assert served.add(range(40)).num_cached_tokens == 16
    served.commit(batch)
    assert served.add(range(40)).num_cached_tokens == 32


def test_rejected_tokens_are_never_found(served):
    sequence = served.run(range(14))
    served.commit(served.prepare({sequence: range(14, 36)}), {sequence: 1})
    assert (sequence.num_tokens, len(sequence.block_table)) == (15, 1)
    assert served.add(range(36)).num_cached_tokens == 0
    served.append(sequence, [99])
    assert served.add([*range(15), 99, 100]).num_cached_tokens == 16
    assert served.add(range(36)).num_cached_tokens == 0


def test_a_match_covers_all_tokens_before(served):
    served.run([1] * 16 + [2] * 16)
    assert served.add([3] * 16 + [2] * 17).num_cached_tokens == 0
    assert served.add([2] * 17).num_cached_tokens == 0
    assert served.add([1] * 16 + [2] * 17).num_cached_tokens == 32
    assert hash(-1) == hash(-2)
    served.run([-1] * 16)
    assert served.add([-2] * 17).num_cached_tokens == 0


def test_two_salts_never_share(served):
    salts = [None, "a", "1", b"1", 1, True, 0, "", b"", -1, -2]
    for salt in salts:
        sequence = served.run(range(17), salt)
        assert sequence.num_cached_tokens == 0
        assert served.add(range(17), salt).num_cached_tokens == 16
        for other in list(served.expected):
            served.free(other)
    for salt in salts[-5:]:  # the pool holds no more than these
        assert served.add(range(17), salt).num_cached_tokens == 16


def test_without_prefix_caching_nothing_is_shared(served):
    served = Served(Host(), 10, prefix_caching=False)
    first = served.run(range(40))
    assert served.run(range(40)).num_cached_tokens == 0
    served.truncate(first, 17)
    fork = served.fork(first)
    served.append(fork, range(20))
    served.append(first, range(20))
    served.free(first)
    assert served.manager.stats().cached_blocks == 0


# The order of reuse, and eviction


def test_the_freed_tail_comes_back_before_the_head(served):
    """vLLM's test_prefill and test_evict: free blocks go first, then what was let go longest ago, from its tail."""
    first, second = served.run(range(80)), served.run(range(100, 148))
    assert first.block_table.tolist() == [0, 1, 2, 3, 4]
    assert second.block_table.tolist() == [5, 6, 7]
    served.free(first)
    served.free(second)
    assert served.run(range(200, 264)).block_table.tolist() == [3, 4, 8, 9], "and in rising order"
    assert served.run(range(300, 348)).block_table.tolist() == [0, 1, 2]
    assert served.manager.stats().evictions == 5
    assert served.add(range(100, 149)).num_cached_tokens == 48


def test_blocks_that_hold_nothing_findable_come_back_tail_first(served):
    served = Served(Host(), 4, prefix_caching=False)
    served.free(served.run(range(64)))
    assert [served.run(range(16)).block_table.tolist() for _ in range(4)] == [[3], [2], [1], [0]]


def test_a_hit_takes_blocks_out_of_the_queue_and_evicts_nothing(served):
    served.free(served.run(range(48)))
    served.free(served.run(range(100, 148)))
    hit = served.run(range(49))
    assert hit.num_cached_tokens == 48
    assert served.manager.stats().evictions == 0
    served.run(range(200, 296))  # takes all but the four live blocks, cached ones among them
    assert served.manager.stats().live_blocks == 10
    with pytest.raises(OutOfBlocksError, match="1 blocks wanted, 0 of 10 are free"):
        served.append(hit, range(49, 65))


def test_what_was_used_last_goes_last(served):
    for stem in (0, 100, 200):
        served.free(served.run(range(stem, stem + 48)))
    served.free(served.run(range(49)))  # the first stem's three blocks, and the last free one
    served.run(range(300, 364))
    assert [served.add(range(stem, stem + 49)).num_cached_tokens for stem in (0, 100, 200)] == [48, 0, 48]


def test_a_reused_block_is_not_found_under_its_old_tokens(served):
    served.free(served.run(range(160)))
    assert served.manager.stats().cached_blocks == 10
    served.run(range(500, 660))
    assert served.add(range(160)).num_cached_tokens == 0
    assert served.add(range(500, 661)).num_cached_tokens == 160
    assert served.manager.stats().evictions == 10


def test_what_came_behind_a_block_that_is_gone_is_freed(served):
    """It could never be found again, and would be kept while blocks that can be found are evicted."""
    served.free(served.run(range(200, 248)))
    parent = served.run(range(80))
    served.truncate(parent, 10)  # its other blocks stay cached, and the first is going to be written to
    assert served.manager.stats().cached_blocks == 7
    served.append(parent, range(50, 56))
    assert served.manager.stats().cached_blocks == 3
    assert served.add(range(33)).num_cached_tokens == 0
    assert served.run(range(16)).num_cached_tokens == 0
    assert served.add(range(33)).num_cached_tokens == 16
    assert served.add([*range(10), *range(50, 56), *range(16, 33)]).num_cached_tokens == 16
    served.run(range(300, 364))
    assert served.add(range(200, 249)).num_cached_tokens == 48


def test_what_is_written_again_takes_the_place_of_what_is_cached(served):
    """Neither is there twice, nor is its head, let go long ago, evicted before its tail."""
    first, second = served.add(range(16)), served.add(range(32))
    served.append(first, range(16))
    served.free(first)
    served.append(second, range(32))
    assert (served.manager.stats().cached_blocks, served.manager.stats().live_blocks) == (0, 2)
    served.free(second)
    served.run(range(300, 300 + 9 * 16))
    assert served.add(range(33)).num_cached_tokens == 16


def test_every_block_that_is_written_to_is_forgotten(served):
    other, truncated = served.run(range(100, 105)), served.run(range(16))
    served.truncate(truncated, 10)
    served.append(truncated, [])
    assert served.add(range(17)).num_cached_tokens == 16
    served.free(list(served.expected)[-1])
    served.commit(served.prepare({other: [1], truncated: [77]}))
    assert served.add(range(17)).num_cached_tokens == 0


def test_what_a_fork_fills_is_found(served):
    fork = served.fork(served.run(range(20), "salt"))
    served.append(fork, range(20, 32))
    assert served.add(range(33)).num_cached_tokens == 0
    assert served.add(range(33), "salt").num_cached_tokens == 32


def test_no_tokens_write_nothing(served):
    parent = served.run(range(155))
    fork = served.fork(parent)
    served.commit(served.prepare({fork: [], parent: []}))  # all ten blocks are live
    assert served.manager.stats().copies == 0
    served.free(fork)
    served.truncate(parent, 10)
    served.append(parent, [])
    assert served.add(range(17)).num_cached_tokens == 16


def test_a_duplicate_neither_shadows_nor_orphans_the_first(served):
    first, second, third = (served.add(range(33)) for _ in range(3))
    served.commit(served.prepare({first: range(33), second: range(33), third: range(33)}))
    assert [s.block_table.tolist() for s in (first, second, third)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert served.add(range(33)).block_table.tolist() == [0, 1]
    served.free(list(served.expected)[-1])
    served.free(second)  # a duplicate that goes leaves the first, and is not kept
    assert served.manager.stats().cached_blocks == 0
    assert served.add(range(33)).block_table.tolist() == [0, 1]
    served.free(list(served.expected)[-1])
    served.free(first)  # and the first leaves its place to the one that is left
    assert served.manager.stats().cached_blocks == 0
    assert served.add(range(33)).block_table.tolist() == [6, 7]
    served.append(third, range(33, 49))
    assert served.add(range(50)).num_cached_tokens == 48


def test_resetting_is_refused_while_sequences_live(served):
    sequence = served.run(range(33))
    with pytest.raises(RuntimeError, match="3 blocks belong to live sequences; free these first"):
        served.manager.reset_prefix_cache()
    served.free(sequence)
    assert served.manager.stats().cached_blocks == 2
    served.add([])  # owns nothing
    served.reset_prefix_cache()
    assert not list(served.manager._pool._line)
    assert served.manager.stats().free_blocks == 10
    assert served.add(range(33)).num_cached_tokens == 0


# Room


def test_tokens_that_fit_take_no_block(served):
    """vLLM's test_decode: 55 tokens and 4 more fit in four blocks, and 19 more take a fifth."""
    sequence = served.run(range(55))
    served.append(sequence, range(4))
    assert len(sequence.block_table) == 4
    served.append(sequence, range(19))
    assert len(sequence.block_table) == 5
    served.append(sequence, [])
    served.append(sequence, range(160 - 78))  # to the last place of the last block
    with pytest.raises(OutOfBlocksError):
        served.append(sequence, [0])


def test_all_sequences_or_none(served):
    """`Served.prepare` sees that nothing has changed."""
    served.free(served.run(range(48)))
    hit, other = served.add(range(49)), served.run(range(100, 181))
    with pytest.raises(OutOfBlocksError, match="3 blocks wanted, 1 of 10 are free") as caught:
        served.prepare({hit: range(48, 64), other: range(200, 232)})
    assert (caught.value.wanted, caught.value.free, caught.value.total) == (3, 1, 10)
    assert served.owners()[0] == 1


def test_a_copy_that_finds_no_block_leaves_the_fork_as_it_was(served):
    parent = served.run(range(160 - 5))
    fork = served.fork(parent)
    with pytest.raises(OutOfBlocksError, match="1 blocks wanted, 0 of 10 are free"):
        served.append(fork, [1])
    with pytest.raises(OutOfBlocksError):
        served.prepare({fork: [1], parent: [2]})
    assert set(served.owners().values()) == {2}
    served.free(parent)
    served.append(fork, [1])
    assert served.manager.stats().copies == 0


def test_the_last_owner_writes_to_the_block_itself(served):
    parent = served.run(range(20))
    forks = [served.fork(parent) for _ in range(3)]
    served.commit(served.prepare({s: [i] for i, s in enumerate([parent, *forks])}))
    assert served.manager.stats().copies == 3
    assert served.manager.stats().live_blocks == 5
    served.append(parent, range(30))
    assert served.manager.stats().copies == 3


def test_a_rollback_keeps_the_copy_and_frees_the_rest(served):
    parent = served.run(range(20))
    fork = served.fork(parent)
    served.rollback(served.prepare({fork: range(50)}))
    assert (fork.num_tokens, len(fork.block_table)) == (20, 2)
    assert served.manager.stats().live_blocks == 3
    served.commit(served.prepare({fork: [1], parent: [2]}))
    assert served.manager.stats().copies == 1


def test_truncating_what_is_shared(served):
    parent = served.run(range(40))
    fork = served.fork(parent)
    served.truncate(fork, 20)
    assert fork.block_table.tolist() == [0, 1]
    served.append(fork, [99])
    assert fork.block_table.tolist() == [0, 3]
    served.truncate(parent, 0)
    assert parent.block_table.tolist() == []
    assert served.add(range(41)).num_cached_tokens == 32


def test_a_sequence_of_nothing(served):
    empty = served.add([])
    fork = served.fork(empty)
    served.commit(served.prepare({empty: [], fork: [1]}))
    assert (empty.num_tokens, fork.num_tokens) == (0, 1)
    batch = served.prepare({})
    assert (batch.num_tokens, len(batch), batch.block_tables.shape, batch.cu_seqlens.tolist()) == (0, 0, (0, 0), [0])
    served.commit(batch)


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_a_prompt_in_pieces(device, block_size):
    served = Served(device, 120 // block_size, block_size)
    sequence, tokens = served.add(range(60)), list(range(60))
    for piece in (tokens[:1], tokens[1:7], tokens[7:40], tokens[40:]):
        served.append(sequence, piece)
    assert served.add(range(60)).num_cached_tokens == 59 // block_size * block_size
    served.truncate(sequence, 33)
    served.append(sequence, range(33, 60))


def test_free_blocks_are_the_cached_ones_too(served):
    served.free(served.run(range(48)))
    with pytest.raises(OutOfBlocksError, match="11 blocks wanted, 10 of 10 are free"):
        served.prepare({served.add([]): range(161)})


def test_a_prompt_that_is_too_long_leaves_nothing(served):
    """Nor the room in the tables that it would have needed."""
    with pytest.raises(OutOfBlocksError):
        served.prepare({served.add([]): range(100_000)})
    served = Served(Host(), 300, 1)
    sequence, widths = served.manager.add([]), set()
    for token in range(300):
        served.manager.commit(served.manager.prepare({sequence: [token]}))
        widths.add(served.manager._rows._tables.shape[1])
    assert max(widths) == 300
    assert len(widths) < 10


def resident() -> int:
    """Bytes of memory that the process has."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the memory of the process is read from /proc, which is not there")
    [kilobytes] = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS")]
    return int(kilobytes) * 1024


def test_one_long_sequence_among_many_short_ones():
    """Takes a small page a row, and not a huge one."""
    manager = KVCacheManager(LayeredPagedKVCache(1, 2**19, 1, 1, 1, "uint8", "cpu"), prefix_caching=False)
    long = manager.add([])
    manager.commit(manager.prepare({long: np.arange(2**18)}))
    before = resident()
    for _ in range(1000):  # a table row of 1 MB each
        short = manager.add([])
        manager.commit(manager.prepare({short: [1]}))
    assert manager._rows._tables.nbytes >= 1000 * 2**20
    assert resident() - before < 100 * 2**20


def test_one_long_sequence_pads_the_others_for_nothing():
    """The padding of a batch's tables is memory that nobody touches."""
    manager = KVCacheManager(LayeredPagedKVCache(1, 2**19, 1, 1, 1, "uint8", "cpu"), prefix_caching=False)
    long = manager.add([])
    manager.commit(manager.prepare({long: np.arange(2**18)}))
    shorts = [manager.add([]) for _ in range(1000)]
    before = resident()
    batch = manager.prepare({sequence: [1] for sequence in [*shorts[:500], long, *shorts[500:]]})
    assert batch.block_tables.nbytes > 1000 * 2**20
    assert resident() - before < 100 * 2**20
    expected = [0] * (2**18 + 1)
    for i, sequence in enumerate(batch.sequences):
        if i in (0, 500, 1000):
            table = sequence.block_table.tolist()
            assert batch.block_tables[i].tolist() == table + expected[len(table) :]
    cache = manager._cache[0]
    ones = np.arange(1001, dtype=np.uint8).reshape(-1, 1, 1)
    cache.update(ones, ones, batch.slot_mapping)
    key, _ = cache.gather(batch.block_tables, batch.host_seq_lens, seq_starts=batch.host_seq_lens - 1)
    assert key.ravel().tolist() == [i % 256 for i in range(1001)]
    assert resident() - before < 100 * 2**20


def test_prompts_are_counted_when_they_are_used(served):
    served.run(range(33))
    for _ in range(100):
        served.free(served.add(range(33)))
    assert not served.manager._uncounted
    served.rollback(served.prepare({served.add(range(33)): [1]}))
    stats = served.manager.stats()
    assert (stats.prompts, stats.hits, stats.prompt_tokens, stats.tokens_saved, stats.hit_rate) == (1, 0, 33, 0, 0)
    served.append(served.fork(served.run(range(34))), [1])
    assert (served.manager.stats().prompts, served.manager.stats().tokens_saved) == (2, 32)
    cut = served.add(range(34))
    served.commit(served.prepare({cut: [1]}), {cut: 0})
    assert served.manager.stats().prompts == 2
    served.truncate(cut, 7)
    served.append(cut, range(7, 34))
    stats = served.manager.stats()
    assert (stats.prompts, stats.hits, stats.prompt_tokens, stats.tokens_saved) == (3, 2, 33 + 34 + 34, 32 + 7)


# Batches


def test_the_arrays_of_a_batch(device):
    served = Served(device, 20)
    first, second = served.run(range(15)), served.add(range(200, 240))
    served.commit(served.prepare({second: range(200, 240), first: [1, 2]}))  # `Served` compares every array
    batch = served.prepare({first: [3]})
    assert device.numpy(batch.block_tables).tolist() == [[0, 4]]
    assert device.numpy(batch.slot_mapping).tolist() == [4 * 16 + 1]
    served.commit(batch)


def test_buffers_keep_their_place(device):
    """And so a graph that was captured once writes each batch where it belongs."""
    served = Served(device, 20)
    buffers = served.manager.buffers(num_seqs=4, num_tokens=40, max_blocks=3)
    arrays = [buffers.slot_mapping, buffers.positions, buffers.block_tables, buffers.seq_lens, buffers.cu_seqlens]
    padding = [device.numpy(array).tolist() for array in arrays]
    assert padding == [[-1] * 40, [0] * 40, [[0] * 3] * 4, [0] * 4, [0] * 5]
    first, second = served.add(range(20)), served.add(range(100, 120))
    for new in ({first: range(20)}, {second: range(100, 120), first: [20]}, {first: [21], second: range(18)}, {}):
        batch = served.prepare(new, buffers)
        mine = [batch.slot_mapping, batch.positions, batch.block_tables, batch.seq_lens, batch.cu_seqlens]
        assert all(a is b for a, b in zip(mine, arrays, strict=True))
        served.commit(batch)
    fork = served.fork(first)
    served.commit(served.prepare({fork: [1], first: [2]}, buffers))
    assert served.manager.stats().copies == 1


def test_what_attention_wants_to_know(device):
    served = Served(device, 20)
    first = served.run(range(15))
    batch = served.prepare({first: [1, 2], served.add([]): range(30), served.add([]): []})
    assert (batch.max_seqlen_q, batch.max_seqlen_k) == (30, 30)
    assert batch.host_seq_lens.tolist() == [17, 30, 0]
    key, _ = served.cache[0].gather(batch.block_tables, batch.host_seq_lens)
    assert len(key) == 47
    empty = served.prepare({})
    assert (empty.max_seqlen_q, empty.max_seqlen_k) == (0, 0)


@pytest.mark.parametrize("in_buffers", [False, True])
def test_tables_as_flashinfer_takes_them(device, in_buffers):
    served = Served(device, 20)
    buffers = served.manager.buffers(num_seqs=6, num_tokens=80, max_blocks=5) if in_buffers else None
    new = {served.run(range(15)): [1, 2], served.add([]): range(16), served.add([]): [], served.add([]): range(33)}
    batch = served.prepare(new, buffers)
    csr = batch.to_csr()
    assert all(device.numpy(array).dtype == np.int32 for array in csr)
    assert all(isinstance(array, type(batch.block_tables)) for array in csr)
    indptr, indices, last = (device.numpy(array).tolist() for array in csr)
    tables = [indices[i:j] for i, j in itertools.pairwise(indptr)]
    assert tables == [sequence.block_table.tolist() for sequence in new]
    lens = [16 * (len(table) - 1) + end if table else end for table, end in zip(tables, last, strict=True)]
    assert lens == batch.host_seq_lens.tolist() == [17, 16, 0, 33]
    assert [array.tolist() for array in served.prepare({}).to_csr()] == [[0], [], []]


def test_buffers_are_those_of_one_batch_at_a_time(served):
    first, second = served.run(range(3)), served.run(range(3))
    buffers = served.manager.buffers(num_seqs=1, num_tokens=4, max_blocks=2)
    batch = served.prepare({first: [1]}, buffers)
    with pytest.raises(ValueError, match="these buffers are those of an open batch; commit it or roll it back first"):
        served.manager.prepare({second: [1]}, buffers=buffers)
    served.rollback(batch)
    served.commit(served.prepare({second: [1]}, buffers))
    for other, error, message in (
        (Served(Host(), 4).manager.buffers(1, 4, 2), ValueError, "these buffers are another manager's"),
        (3, TypeError, r"buffers must be what buffers\(\) returned, got int"),
        (batch, TypeError, r"buffers must be what buffers\(\) returned, got Batch"),
    ):
        with pytest.raises(error, match=message):
            served.manager.prepare({second: [1]}, buffers=other)


def test_copies_through_buffers_touch_no_other_block(monkeypatch):
    """Block 0 is the target of a copy, and what padding of the list of copies would name."""
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    served = Served(Host(), 3)
    first, parent = served.run(range(5)), served.run(range(100, 120))
    fork = served.fork(parent)
    served.free(first)
    served.commit(served.prepare({fork: [1]}, served.manager.buffers(4, 8, 3)))
    assert fork.block_table.tolist() == [1, 0]


def test_what_does_not_fit_the_buffers(served):
    buffers = served.manager.buffers(num_seqs=1, num_tokens=40, max_blocks=2)
    first, second = served.run(range(3)), served.run(range(3))
    before = served.state()
    for new, message in (
        ({first: [1], second: [1]}, "the batch needs num_seqs 2, but the buffers were made for 1"),
        ({first: range(41)}, "the batch needs num_tokens 41, but the buffers were made for 40"),
        ({first: range(30)}, "the batch needs max_blocks 3, but the buffers were made for 2"),
    ):
        with pytest.raises(ValueError, match=message):
            served.manager.prepare({s: list(tokens) for s, tokens in new.items()}, buffers=buffers)
        assert served.state() == before
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            served.manager.buffers(*sizes)


def test_two_batches_at_a_time(served):
    first, second = served.add(range(20)), served.add(range(20))
    one = served.prepare({first: range(20)})
    two = served.prepare({second: range(20)})
    assert set(served.manager.sequences) == {first, second}
    assert set(served.manager.open_batches) == {one, two}
    served.commit(two)
    served.rollback(one)
    assert (first.num_tokens, second.num_tokens) == (0, 20)


def test_a_batch_and_a_sequence_as_contexts(served):
    manager = served.manager
    with manager.add(range(20)) as sequence:
        with manager.prepare({sequence: range(20)}) as batch:
            pass
        assert sequence.num_tokens == 20
        with manager.prepare({sequence: range(4)}) as batch:
            manager.commit(batch, {sequence: 3})
        assert sequence.num_tokens == 23
        with pytest.raises(KeyError), manager.prepare({sequence: range(4)}) as batch:
            raise KeyError
        assert sequence.num_tokens == 23
        assert repr(batch) == "<Batch of 4 tokens of 1 sequences, rolled back>"
        assert repr(sequence) == "<CachedSequence of 23 tokens in blocks [0, 1]>"
    assert repr(sequence) == "<CachedSequence, freed>"
    other, third = manager.add(range(20)), manager.add([])
    still_open = manager.prepare({third: [1]})
    with pytest.raises(KeyError), manager.add(range(20)) as sequence:  # noqa: PT012
        batch = manager.prepare({sequence: range(100, 120), other: [1]})
        raise KeyError
    assert repr(batch) == "<Batch of 21 tokens of 2 sequences, rolled back>"
    assert manager.stats().cached_blocks == 0
    manager.commit(still_open)
    with pytest.raises(ValueError, match="is in an open batch"), manager.add([]) as sequence:
        batch = manager.prepare({sequence: range(4)})
    manager.commit(batch)
    for unfreed in (sequence, other, third):
        manager.free(unfreed)
    assert manager.stats().num_sequences == 0
    with manager.add(range(20)) as sequence:
        manager.free(sequence)
    manager.check_integrity()


# Misuse


def test_a_freed_sequence(served):
    sequence = served.run(range(20))
    served.free(sequence)
    for use in (
        lambda: served.manager.free(sequence),
        lambda: served.manager.prepare({sequence: [1]}),
        sequence.fork,
        lambda: sequence.truncate(0),
        lambda: sequence.num_tokens,
        lambda: sequence.block_table,
    ):
        with pytest.raises(ValueError, match="this sequence has been freed; add its tokens again"):
            use()
    served.check()


def test_a_sequence_is_not_copied(served):
    sequence = served.run(range(20))
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"neither copied nor pickled; fork\(\) makes a second one"):
            copying(sequence)


def test_a_sequence_in_an_open_batch(served):
    sequence, other = served.run(range(20)), served.run(range(5))
    batch = served.prepare({sequence: [1]})
    before = served.state()
    for use in (
        lambda: served.manager.free(sequence),
        lambda: served.manager.prepare({other: [1], sequence: [1]}),
        sequence.fork,
        lambda: sequence.truncate(0),
    ):
        with pytest.raises(
            ValueError,
            match=r"20 tokens in blocks \[0, 1\]> is in an open batch; commit it or roll it back",
        ):
            use()
        assert served.state() == before
    served.commit(batch)


def test_a_batch_ends_once(served):
    sequence = served.run(range(20))
    for end, name in ((served.commit, "committed"), (served.rollback, "rolled back")):
        batch = served.prepare({sequence: [1]})
        end(batch)
        for again in (served.manager.commit, served.manager.rollback):
            with pytest.raises(ValueError, match=f"this batch has been {name} already"):
                again(batch)
    served.check()


def test_what_is_anothers(served):
    other = Served(Host(), 4)
    mine, foreign = served.run(range(5)), other.run(range(5))
    batch = other.prepare({foreign: [1]})
    before = served.state()
    for end in (served.manager.commit, served.manager.rollback):
        with pytest.raises(ValueError, match="this batch belongs to another manager"):
            end(batch)
        with pytest.raises(TypeError, match=r"expected a Batch, which prepare\(\) returns, got dict"):
            end({})
    other.rollback(batch)
    for use in (lambda: served.manager.free(foreign), lambda: served.manager.prepare({mine: [1], foreign: [1]})):
        with pytest.raises(ValueError, match=r"<CachedSequence of 5 tokens in blocks \[0\]> is another manager's"):
            use()
    with pytest.raises(TypeError, match="expected {sequence: its new tokens}, got list"):
        served.manager.prepare([mine])
    with pytest.raises(TypeError, match="cache must be a LayeredPagedKVCache, got PagedKVCache"):
        KVCacheManager(served.cache[0])
    used = LayeredPagedKVCache(1, 8, 4, 1, 2, "uint8", "cpu")
    used.set_blocks([3])
    with pytest.raises(ValueError, match="the cache maps a sequence of its own to blocks"):
        KVCacheManager(used)
    used.reset()
    KVCacheManager(used)
    for nothing in (3, batch, None):
        with pytest.raises(TypeError, match=r"expected sequences, which add\(\) returns, got (int|Batch|NoneType)"):
            served.manager.prepare({mine: [1], nothing: [1]})
        with pytest.raises(TypeError, match=r"expected sequences, which add\(\) returns"):
            served.manager.free(nothing)
    assert served.state() == before


def test_what_remains_of_a_prompt(served):
    prompt = list(range(40))
    first = served.add(prompt)
    assert (first.remaining.tolist(), first.remaining.dtype) == (prompt, np.int32)
    batch = served.prepare({first: first.remaining[:18]})
    assert first.remaining.tolist() == prompt  # nothing is in the cache before the commit
    served.commit(batch)
    assert first.remaining.tolist() == prompt[18:]
    fork = served.fork(first)
    served.append(first, first.remaining)
    assert (len(first.remaining), fork.remaining.tolist()) == (0, prompt[18:])
    served.append(first, [7, 8])  # generated
    assert len(first.remaining) == 0
    served.truncate(first, 39)
    assert first.remaining.tolist() == prompt[39:]
    hit = served.add(prompt)
    assert (hit.num_cached_tokens, hit.remaining.tolist()) == (32, prompt[32:])
    with pytest.raises(ValueError, match="read-only"):
        hit.remaining[0] = 1
    served.append(hit, hit.remaining)
    buffer = np.array(prompt, np.int32)  # that its owner uses again
    hit = served.add(buffer)
    buffer += 1
    assert hit.remaining.tolist() == prompt[32:]
    served.free(hit)
    with pytest.raises(ValueError, match="this sequence has been freed"):
        _ = hit.remaining


def test_a_prompt_comes_again_behind_what_was_found_of_it(served):
    """Which is as good a text as any other: with few different tokens it is even likely."""
    prompt = [1] * 40
    served.append(served.add(prompt), prompt)
    hit = served.add(prompt)
    assert hit.num_cached_tokens == 32
    served.append(hit, prompt)
    assert served.add([1] * 80).num_cached_tokens == 64
    buffer = np.array(prompt, np.int32)
    batch = served.manager.prepare({hit: buffer})
    buffer += 1  # the manager has a copy
    served.manager.commit(batch)
    assert served.manager.add([1] * 113).num_cached_tokens == 112


def test_what_is_accepted(served):
    sequence, other = served.run(range(20)), served.run(range(5))
    third = served.run(range(7))
    batch = served.prepare({other: [9], sequence: [1, 2]})
    before = served.state()
    for accepted, error, message in (
        (3, TypeError, "accepted must be {sequence: number of tokens}, got int"),
        ({other: 0, sequence: 3}, ValueError, "3 tokens accepted of a sequence with 2 in the batch"),
        ({sequence: -1}, ValueError, "accepted must be at least 0, got -1"),
        ({sequence: 1.5}, TypeError, "accepted must be a whole number, got 1.5"),
        ({third: 0}, ValueError, r"<CachedSequence of 7 tokens in blocks \[3\]> is in accepted, but not in the batch"),
    ):
        with pytest.raises(error, match=message):
            served.manager.commit(batch, accepted)
        assert served.state() == before
    served.commit(batch, {sequence: 0})


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (5, TypeError, "tokens must be a list of ints or a NumPy array on the host, got <class 'int'>"),
        ({1}, TypeError, "got <class 'set'>"),
        ({1: 2}, TypeError, "got <class 'dict'>"),
        ("1", TypeError, "got <class 'str'>"),
        (b"1", TypeError, "got <class 'bytes'>"),
        (iter([1]), TypeError, "got <class 'list_iterator'>"),
        ([1.5], TypeError, "list of ints .* 'float' object cannot be interpreted as an integer"),
        (["a"], TypeError, "list of ints"),
        ([[1]], TypeError, "list of ints"),
        ([2**31], ValueError, r"tokens must be from -2\*\*31 to 2\*\*31 - 1"),
        ([-(2**31) - 1], ValueError, r"tokens must be from"),
        (np.array([2**31]), ValueError, "got 2147483648 to 2147483648"),
        (memoryview(np.zeros((2, 2), np.int32)), TypeError, "tokens must be a list of ints .*: multi-dimensional"),
        (np.array([1.0]), TypeError, r"tokens must be whole numbers on one axis, got float64 of shape \(1,\)"),
        (np.array([True]), TypeError, "got bool"),
        (np.array([[1]]), TypeError, r"got int64 of shape \(1, 1\)"),
        (np.array([1, -(2**31) - 1]), ValueError, "got -2147483649 to 1"),
        (np.array([2**64 - 1], np.uint64), ValueError, "got 18446744073709551615 to"),
    ],
)
def test_what_are_no_tokens(served, tokens, error, message):
    sequence, other = served.run(range(5)), served.run([])
    before = served.state()
    for use in (
        lambda: served.manager.add(tokens),
        lambda: served.manager.prepare({sequence: tokens}),
        lambda: served.manager.prepare({sequence: [1], other: tokens}),
    ):
        with pytest.raises(error, match=message):
            use()
    assert served.state() == before


def test_tokens_of_any_whole_numbers(served):
    sequence = served.run(range(17))
    for kind in (list, tuple, np.array, deque, lambda tokens: array("q", tokens), lambda t: np.array(t, np.uint8)):
        assert served.manager.add(kind(list(range(17)))).num_cached_tokens == 16
    strided = np.arange(34)[::2] // 2
    assert served.manager.add(strided).num_cached_tokens == 16
    batch = served.manager.prepare({sequence: np.array([1, 2], np.int16), served.manager.add([]): [3]})
    assert batch.cu_seqlens.tolist() == [0, 2, 3]
    extremes = [-(2**31), 2**31 - 1]
    for kind in (list, np.array):
        served.manager.rollback(served.manager.prepare({served.manager.add(kind(extremes)): kind(extremes)}))


def test_what_is_no_salt(served):
    for salt in (1.0, ("a",), [1]):
        with pytest.raises(TypeError, match="salt must be a str, bytes, an int or None, got (float|tuple|list)"):
            served.manager.add([1], salt=salt)
    assert served.manager.stats().num_sequences == 0


def test_truncating_to_what_is_not_there(served):
    sequence = served.run(range(20))
    before = served.state()
    with pytest.raises(ValueError, match="cannot truncate to 21 tokens: the sequence has 20"):
        sequence.truncate(21)
    with pytest.raises(ValueError, match="num_tokens must be at least 0, got -1"):
        sequence.truncate(-1)
    assert served.state() == before


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("fails", ["send", "zeros", "copy_blocks"])
def test_a_device_that_fails_leaves_everything(served, monkeypatch, fails, error):
    parent = served.run(range(20))
    fork = served.fork(parent)
    before = served.state()

    def failing(*_: Any) -> None:
        raise error("the device is full")

    with monkeypatch.context() as patch:
        patch.setattr(LayeredPagedKVCache if fails == "copy_blocks" else HostStaging, fails, failing)
        with pytest.raises(error):
            served.manager.prepare({fork: list(range(40)), parent: [1]})
    allocator = 7  # whose totals of calls have grown
    assert [part for i, part in enumerate(served.state()) if i != allocator] == [
        part for i, part in enumerate(before) if i != allocator
    ]
    served.commit(served.prepare({fork: [1], parent: [2]}))


def test_integrity_states_its_numbers(served):
    manager, pool = served.manager, served.manager._pool
    sequence = served.run(range(40))
    served.free(served.run(range(100, 164)))
    with served.manager.add(list(range(100, 133))):  # parts the run, and is let go of last
        pass
    row, live, cached = sequence._row, sequence._run, pool._line.oldest
    assert (live.blocks.tolist(), cached.blocks.tolist(), cached.parent.blocks.tolist()) == ([0, 1], [5, 6], [3, 4])
    assert manager.stats().cached_blocks == 4

    def damaged(text: str, holder: Any, index: Any, value: Any) -> None:
        before = holder.get(index) if isinstance(holder, dict) else holder[index]
        holder[index] = value
        with pytest.raises(RuntimeError, match=text):
            manager.check_integrity()
        holder[index] = before
        if before is None:
            del holder[index]

    def set_to(text: str, holder: Any, name: str, value: Any) -> None:
        before = getattr(holder, name)
        setattr(holder, name, value)
        with pytest.raises(RuntimeError, match=text):
            manager.check_integrity()
        setattr(holder, name, before)

    damaged("block 0 counts 2 owners, but 1 hold it", pool._owners, 0, 2)
    damaged("3 free \\+ 4 live \\+ 4 cached blocks are not the pool's 10", pool._owners, 3, 1)
    set_to("3 free \\+ 3 live \\+ 3 cached blocks are not the pool's 10", pool._line, "num_blocks", 3)
    damaged(r"\[0, 0\] has blocks that are found elsewhere, too", live.blocks, 1, 0)
    damaged(r"blocks \[5, 3\] has blocks that are found elsewhere, too|\[3, 4\] has", cached.blocks, 1, 3)
    damaged(r"the run of blocks \[5, 2\] is cached, but has the owners \[0, 1\]", cached.blocks, 1, 2)
    damaged(r"the run of blocks \[5, 8\] is found, but not all of its blocks are taken", cached.blocks, 1, 8)
    damaged(r"the run of blocks \[0, 8\] is not cached, but has the owners \[1, 0\]", live.blocks, 1, 8)
    damaged("block 1 is known, but its tokens lead to block 2", live.blocks, 1, 2)
    set_to(r"the run of blocks \[0, 1\] has 64 bytes of tokens", live, "tokens", live.tokens[:64])
    set_to(r"the run of blocks \[\] does not lead to that of blocks \[0, 1\]", live, "tokens", bytearray(128))
    set_to(r"the run of blocks \[3, 4\] does not lead to that of blocks \[5, 6\]", cached, "first", 3)
    set_to(r"the run of blocks \[3, 4\] does not lead to that of blocks \[5, 6\]", cached, "parent", live)
    damaged("a sequence of 40 tokens has 4 blocks, and should have 3", manager._rows.num_blocks, row, 4)
    damaged("a sequence of 40 tokens has 2 blocks, and should have 3", manager._rows.num_blocks, row, 2)
    damaged(r"block 0 has the twins \[\], but not all of them are live", pool._twins, 0, set())
    damaged(r"block 0 has the twins \[7\], but not all of them are live", pool._twins, 0, {7})
    damaged(r"block 2 has the twins \[0\], but not all of them are live", pool._twins, 2, {0})
    pool._line.remove(cached)
    pool._line.append(cached)
    with pytest.raises(RuntimeError, match=r"the run of blocks \[3, 4\] would be evicted before what is behind it"):
        manager.check_integrity()
    pool._line.remove(cached)
    pool._line.append(cached)
    pool._line.remove(cached.parent)
    pool._line.append(cached.parent)
    children = live.parent.children
    del children[(key := next(iter(children)))]
    with pytest.raises(RuntimeError, match=r"the run of blocks \[0, 1\] is known, but not found"):
        manager.check_integrity()
    children[key] = live
    manager._rows._free.append(row)
    with pytest.raises(RuntimeError, match="8 free and 1 used rows are not all rows"):
        manager.check_integrity()
    manager._rows._free.pop()
    pool._allocator.allocate(1)
    with pytest.raises(RuntimeError, match="2 free \\+ 3 live \\+ 4 cached blocks are not the pool's 10"):
        manager.check_integrity()
    pool._allocator.reset()
    pool._allocator.allocate(7)
    pool._allocator._queue[8] = 7
    with pytest.raises(RuntimeError, match="3 free blocks are counted, 2 stand in line, 3 are marked as free"):
        manager.check_integrity()
    pool._allocator._queue[8] = 8
    manager.check_integrity()


def test_masked_tokens_are_what_they_hold(served):
    tokens = np.ma.masked_equal(np.arange(33), 5)
    served.free(served.run(range(33)))
    sequence = served.manager.add(tokens)
    assert sequence.num_cached_tokens == 32
    assert type(sequence.remaining) is np.ndarray
    served.manager.free(sequence)


# Cost


class Watched(np.ndarray):
    """An array that no function may be called on as a whole."""

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return self._watched(getattr(function, method), inputs, kwargs)

    def __array_function__(self, function: Any, types: Any, inputs: Any, kwargs: Any) -> Any:
        return self._watched(function, inputs, kwargs)

    @staticmethod
    def _watched(function: Any, inputs: Any, kwargs: Any) -> Any:
        inputs = [  # of which some are lists of arrays
            [np.asarray(a) if isinstance(a, Watched) else a for a in i] if isinstance(i, list) else i for i in inputs
        ]
        arrays = [*inputs, *kwargs.values(), *kwargs.get("out", ())]
        assert all(array.size < 1000 for array in arrays if isinstance(array, np.ndarray)), function
        plain = {name: value for name, value in kwargs.items() if name != "out"}
        if kwargs.get("out"):
            plain["out"] = tuple(np.asarray(array) for array in kwargs["out"])
        return function(*(np.asarray(a) if isinstance(a, Watched) else a for a in inputs), **plain)


def test_nothing_walks_all_blocks(monkeypatch):
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    manager = KVCacheManager(LayeredPagedKVCache(1, 1000, 16, 1, 1, "uint8", "cpu"))
    pool = manager._pool
    for holder, names in ((pool, ["_owners"]), (pool._allocator, ["_is_free", "_queue", "_scratch"])):
        for name in names:
            setattr(holder, name, getattr(holder, name).view(Watched))

    def walked(line: Any) -> Any:
        raise AssertionError(line)

    monkeypatch.setattr("cupy_pagedkv.bookkeeping.pool._Line.__iter__", walked)
    with pytest.raises(AssertionError):
        manager.check_integrity()
    sequences = [manager.add(list(range(i, i + 100))) for i in range(5)]
    manager.commit(manager.prepare({s: list(range(i, i + 100)) for i, s in enumerate(sequences)}))
    for sequence in sequences:
        manager.free(sequence)
    for i in range(200):  # until blocks are evicted
        tokens = list(range(100 * i, 100 * i + 100))
        with manager.add(tokens) as sequence:
            manager.commit(manager.prepare({sequence: tokens[sequence.num_cached_tokens :]}))
            fork = sequence.fork()
            manager.rollback(manager.prepare({fork: [1], sequence: [2]}))
            fork.truncate(33)
            manager.free(fork)
    assert min(manager.stats().evictions, manager.stats().copies) > 0


def test_what_is_gone_leaves_no_cycles(served):
    """Of nodes and their parents: the last reference to a root goes with what was found behind it."""
    sequence = served.run(range(64), "salt")
    served.free(served.run([*range(48), *range(100, 116)], "salt"))  # parts within what will lie behind
    served.truncate(sequence, 20)
    gc.collect()
    gc.disable()
    try:
        behind = weakref.ref(next(iter(sequence._run.at(2).children.values())))
        assert behind().children
        served.append(sequence, range(20))
        assert behind() is None
        served.truncate(sequence, 1)
        served.append(sequence, [1])
        served.free(sequence)
        assert not len(served.manager._pool._roots)
    finally:
        gc.enable()


def test_runs_that_were_joined_leave_no_cycles(served):
    served.free(served.run(range(160), "salt"))
    gc.collect()
    gc.disable()
    try:
        for length in (97, 65, 33):
            served.free(served.add(range(length), "salt"))
        runs = [weakref.ref(run) for run in served.manager._pool._line]
        assert len(runs) == 4
        served.free(served.add(range(161), "salt"))
        assert [run() is None for run in runs] == [False, True, True, True]
        served.reset_prefix_cache()
        assert not len(served.manager._pool._roots)
    finally:
        gc.enable()


def test_a_kernel_without_huge_pages(monkeypatch):
    class Memory(mmap.mmap):
        def madvise(self, *_: Any) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr("cupy_pagedkv.bookkeeping.memory.mmap.mmap", Memory)
    manager = KVCacheManager(LayeredPagedKVCache(1, 8, 4, 1, 2, "uint8", "cpu"))
    manager.add([1])


def test_many_sequences_come_and_go(served):
    """Rows are used again, and tables grow."""
    sequences = [served.manager.add([]) for _ in range(100)]
    for sequence in sequences:
        served.manager.free(sequence)
    again = [served.manager.add([]) for _ in range(100)]
    assert len(served.manager._rows) == 128
    served.manager.check_integrity()
    for sequence in again:
        served.manager.free(sequence)
    served = Served(Host(), 300, 1)
    short, long = served.run([1]), served.run(range(290))
    served.append(short, [2])
    served.append(long, [3])


# The pool itself


def test_runs_split_where_owners_change_and_join_when_they_are_let_go_of_together(served):
    line = served.manager._pool._line

    def blocks() -> list[list[int]]:
        return [run.blocks.tolist() for run in line]

    served.free(served.run(range(160)))
    assert blocks() == [[*range(10)]]
    first, second = served.add(range(33)), served.add(range(100))
    assert blocks() == [[6, 7, 8, 9]]
    served.free(second)
    assert blocks() == [[6, 7, 8, 9], [2, 3, 4, 5]]
    served.free(first)
    assert blocks() == [[6, 7, 8, 9], [2, 3, 4, 5], [0, 1]]
    third = served.add(range(150))
    assert blocks() == [[9]]
    served.free(third)
    assert blocks() == [[9], [*range(9)]]
    served.free(served.add(range(161)))
    assert blocks() == [[*range(10)]]
    assert bytes(line.oldest.tokens) == np.arange(160, dtype=np.int32).tobytes()


def test_a_chain_of_any_length_comes_and_goes():
    """No recursion: neither in making a deep trie, nor in dropping it."""
    pool = BlockPool(100_000, 1)
    blocks, ends = pool.take(100_000), []
    run = root = pool.root("salt")
    for block in blocks.tolist():
        run = pool.remember(run, block, blocks[block : block + 1], b"%4d" % (block % 10_000))
        ends.append(run)
    tokens = b"".join(b"%4d" % (block % 10_000) for block in range(100_001))
    assert np.array_equal(pool.find(root, tokens)[1], blocks)
    pool.release(blocks, 0, run, 100_000)
    del run, root, pool, ends
