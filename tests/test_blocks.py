"""Bookkeeping: the numbers of the seed's modules, a model that checks every step, and threads."""

import threading
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cupy_pagedkv import BlockAllocator, BlockAllocatorStats, BlockTable, OutOfBlocksError

# Facts of the seed


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_blocks_needed(tokens, blocks):
    assert BlockTable.blocks_needed(tokens, 16) == blocks


@pytest.mark.parametrize(("more", "blocks"), [(12, 0), (13, 1), (30, 2)])
def test_additional_blocks_needed(more, blocks):
    table = BlockTable(16)
    table.append_blocks([0, 1])
    table.set_num_tokens(20)
    assert table.additional_blocks_needed(more) == blocks


@pytest.mark.parametrize(("position", "slot"), [(0, (5, 0)), (15, (5, 15)), (16, (10, 0)), (32, (15, 0)), (48, None)])
def test_get_slot(position, slot):
    table = BlockTable(16)
    table.append_blocks([5, 10, 15])
    assert table.get_slot(position) == slot


def test_integrity_of_an_allocator():
    allocator = BlockAllocator(10, 4)
    allocator.free(allocator.allocate(7)[::-1])
    allocator.check_integrity()
    allocator.allocate(8)
    allocator.check_integrity()
    allocator._is_free[3] = True
    with pytest.raises(RuntimeError, match="2 free blocks are counted, 2 stand in line, 3 are marked as free"):
        allocator.check_integrity()


def test_memory_sizes():
    assert BlockAllocator(1, 16).block_memory_size(32, 128, np.float16) == 262_144
    assert BlockAllocator(10, 16).total_memory_size(32, 128, "float16") == 2_621_440
    assert BlockAllocator.from_memory_budget(2**30, 16, 32, 128, np.float16).total_blocks == 4096
    assert BlockAllocator.from_memory_budget(262_144 * 2 - 1, 16, 32, 128, np.float16).total_blocks == 1
    assert BlockAllocator(1, 16).block_memory_size(32, 128, "bfloat16") == 262_144
    assert BlockAllocator(1, 16).block_memory_size(32, 128, "float8_e4m3fn") == 131_072
    with pytest.raises(ValueError, match="a block of K and V takes 262144 bytes, the budget is 262143"):
        BlockAllocator.from_memory_budget(262_143, 16, 32, 128, np.float16)


def test_blocks_come_back_first_in_first_out():
    allocator = BlockAllocator(10, 16)
    first, second = allocator.allocate(5), allocator.allocate(5)
    assert first.tolist() == [0, 1, 2, 3, 4]
    assert second.tolist() == [5, 6, 7, 8, 9]
    allocator.free(first)
    assert allocator.allocate(3).tolist() == [0, 1, 2]


# Allocator


def test_allocate_returns_an_array_of_the_callers_own():
    allocator = BlockAllocator(4, 1)
    blocks = allocator.allocate(4)
    assert blocks.dtype == np.int32
    blocks[:] = 0
    allocator.free([3, 2, 1, 0])
    assert allocator.allocate(4).tolist() == [3, 2, 1, 0]


def test_out_of_blocks_says_the_numbers_and_takes_nothing():
    allocator = BlockAllocator(4, 1)
    allocator.allocate(1)
    before = allocator.stats()
    with pytest.raises(OutOfBlocksError, match="4 blocks wanted, 3 of 4 are free") as caught:
        allocator.allocate(4)
    assert (caught.value.wanted, caught.value.free, caught.value.total) == (4, 3, 4)
    assert allocator.stats() == before
    assert allocator.allocate(3).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ([0, 4], ValueError, "from 0 to 3, got 4"),
        ([0, -1], ValueError, "from 0 to 3, got -1"),
        ([0, 2**32], ValueError, "got 4294967296"),
        ([0, 3], ValueError, "cannot free block 3: it is free already"),
        ([0, 1, 0], ValueError, "cannot free block 0 twice in one call"),
        ([0.0, 1.0], TypeError, "whole numbers, got dtype float64"),
        ([True], TypeError, "whole numbers, got dtype bool"),
        ([[0, 1]], ValueError, r"one axis, got shape \(1, 2\)"),
        (0, ValueError, "one axis"),
    ],
)
def test_free_checks_everything_first(blocks, error, message):
    allocator = BlockAllocator(4, 16)
    allocator.allocate(3)
    before = allocator.stats()
    with pytest.raises(error, match=message):
        allocator.free(blocks)
    assert allocator.stats() == before
    allocator.free([2, 0, 1])
    assert allocator.allocate(4).tolist() == [3, 2, 0, 1]


def test_totals_count_calls_that_moved_blocks():
    allocator = BlockAllocator(4, 16)
    allocator.allocate(0)
    allocator.free([])
    allocator.free(np.empty(0, np.int64))
    assert (allocator.stats().total_allocations, allocator.stats().total_frees) == (0, 0)
    allocator.free(allocator.allocate(3))
    allocator.allocate(1)
    assert allocator.stats() == BlockAllocatorStats(
        total_blocks=4,
        allocated_blocks=1,
        free_blocks=3,
        block_size=16,
        total_allocations=2,
        total_frees=1,
        peak_usage=3,
    )


def test_reset_is_as_new():
    allocator = BlockAllocator(4, 16)
    fresh = allocator.stats()
    allocator.free(allocator.allocate(3)[1:])
    allocator.reset()
    assert allocator.stats() == fresh
    assert allocator.allocate(4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("arguments", [(0, 16), (-1, 16), (4, 0), (4, -16), (2**31, 16)])
def test_allocator_sizes_are_checked(arguments):
    with pytest.raises(ValueError, match="must be at "):
        BlockAllocator(*arguments)


@pytest.mark.parametrize("arguments", [(4.0, 16), ("4", 16), (4, None)])
def test_allocator_sizes_are_whole_numbers(arguments):
    with pytest.raises(TypeError, match="must be a whole number"):
        BlockAllocator(*arguments)


def test_counts_are_checked():
    allocator = BlockAllocator(4, 16)
    for call in (allocator.allocate, allocator.can_allocate):
        with pytest.raises(ValueError, match="count must be at least 0, got -1"):
            call(-1)
        with pytest.raises(TypeError, match="count must be a whole number, got 1.5"):
            call(1.5)
    assert allocator.can_allocate(4)
    assert not allocator.can_allocate(5)


def test_a_million_blocks_at_once():
    allocator = BlockAllocator(1_000_000, 16)
    blocks = allocator.allocate(999_999)
    assert np.array_equal(blocks, np.arange(999_999))
    allocator.free(blocks[::-1])
    assert allocator.allocate(2).tolist() == [999_999, 999_998]
    assert allocator.free_block_count == 999_998


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator beside a deque of free blocks; after every step both agree, and no block is lost or doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 13
        self.allocator = BlockAllocator(self.total, 4)
        self.free: deque[int] = deque(range(self.total))
        self.live: list[int] = []
        self.calls = [0, 0]
        self.peak = 0

    @rule(count=st.integers(0, 15))
    def allocate(self, count: int) -> None:
        if count > len(self.free):
            assert not self.allocator.can_allocate(count)
            with pytest.raises(OutOfBlocksError):
                self.allocator.allocate(count)
            return
        assert self.allocator.can_allocate(count)
        expected = [self.free.popleft() for _ in range(count)]
        assert self.allocator.allocate(count).tolist() == expected
        self.live += expected
        self.calls[0] += count > 0
        self.peak = max(self.peak, len(self.live))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def return_some(self, data: Any) -> None:
        blocks = data.draw(st.lists(st.sampled_from(self.live), unique=True))
        self.allocator.free(np.array(blocks, data.draw(st.sampled_from([np.int32, np.int64, np.uint8]))))
        self.free.extend(blocks)
        self.live = [block for block in self.live if block not in blocks]
        self.calls[1] += len(blocks) > 0

    @rule(blocks=st.lists(st.integers(-2, 15), min_size=1))
    def return_anything(self, blocks: list[int]) -> None:
        if len(set(blocks)) == len(blocks) and set(blocks) <= set(self.live):
            return
        with pytest.raises(ValueError, match="block"):
            self.allocator.free(blocks)

    @rule()
    def reset(self) -> None:
        self.allocator.reset()
        self.free, self.live, self.calls, self.peak = deque(range(self.total)), [], [0, 0], 0

    @invariant()
    def agrees(self) -> None:
        assert self.allocator.stats() == BlockAllocatorStats(
            self.total, len(self.live), len(self.free), 4, *self.calls, self.peak
        )
        assert self.allocator.free_block_count == len(self.free)
        assert sorted([*self.free, *self.live]) == list(range(self.total))


AllocatorMachine.TestCase.settings = settings(deadline=None, max_examples=100, stateful_step_count=30)
TestAllocatorMachine = AllocatorMachine.TestCase


def test_eight_threads_lose_and_duplicate_nothing():
    allocator = BlockAllocator(64, 16)
    owner = [0] * 64
    problems: list[str] = []

    def work(me: int) -> None:
        rng = np.random.default_rng(me)
        mine: list[int] = []
        for _ in range(2000):
            if mine and rng.random() < 0.5:
                n = int(rng.integers(1, len(mine) + 1))
                back, mine = mine[:n], mine[n:]
                problems.extend(f"{block} was taken from {me}" for block in back if owner[block] != me)
                for block in back:
                    owner[block] = 0
                allocator.free(back)
            else:
                try:
                    blocks = allocator.allocate(int(rng.integers(1, 12))).tolist()
                except OutOfBlocksError:
                    continue
                problems.extend(f"{block} of {owner[block]} was given to {me}" for block in blocks if owner[block])
                for block in blocks:
                    owner[block] = me
                mine += blocks
        for block in mine:
            owner[block] = 0
        allocator.free(mine)

    threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert allocator.free_block_count == 64
    assert sorted(allocator.allocate(64).tolist()) == list(range(64))


# Table


def test_table_grows_and_keeps_its_order():
    table = BlockTable(4)
    for i in range(100):
        table.append_blocks(np.arange(i, dtype=np.int64))
    expected = [block for i in range(100) for block in range(i)]
    assert table.blocks.tolist() == expected
    assert table.num_blocks == len(expected)
    assert table.to_device_format().tolist() == expected
    assert table.to_device_format().dtype == np.int32
    assert [table.get_block(i) for i in (0, 2, len(expected) - 1, len(expected))] == [0, 1, 98, None]


def test_blocks_is_a_read_only_view_and_the_device_format_a_copy():
    table = BlockTable(4)
    table.append_blocks([3, 1])
    with pytest.raises(ValueError, match="read-only"):
        table.blocks[0] = 9
    table.to_device_format()[0] = 9
    assert table.blocks.tolist() == [3, 1]


def test_appended_blocks_are_copied():
    blocks = np.array([3, 1], np.int32)
    table = BlockTable(4)
    table.append_blocks(blocks)
    blocks[0] = 9
    assert table.blocks.tolist() == [3, 1]


def test_tokens_cannot_exceed_the_blocks():
    table = BlockTable(4)
    table.append_blocks([3, 1])
    table.set_num_tokens(8)
    with pytest.raises(ValueError, match="9 tokens do not fit in 2 blocks of 4: append 1 blocks first"):
        table.set_num_tokens(9)
    with pytest.raises(ValueError, match="num_tokens must be at least 0"):
        table.set_num_tokens(-1)
    assert table.num_tokens == 8
    table.clear()
    assert (table.num_blocks, table.num_tokens, table.blocks.tolist()) == (0, 0, [])


def test_wrong_blocks_and_positions():
    table = BlockTable(4)
    table.append_blocks([3, 1])
    for blocks in ([5, -1], [5, 2**31], [5, 2**40]):
        with pytest.raises(ValueError, match="a block id must be from 0 to"):
            table.append_blocks(blocks)
    with pytest.raises(TypeError, match="whole numbers"):
        table.append_blocks([0.5])
    assert table.blocks.tolist() == [3, 1]
    for call in (table.get_slot, table.get_block):
        with pytest.raises(ValueError, match="at least 0, got -1"):
            call(-1)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        BlockTable(0)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        BlockTable.blocks_needed(5, 0)


def test_slots_are_those_of_get_slot():
    table = BlockTable(16)
    table.append_blocks([5, 2**31 - 2, 0])
    for start, count in [(0, 48), (0, 0), (48, 0), (15, 2), (31, 17), (47, 1)]:
        expected = [table.get_slot(position) for position in range(start, start + count)]
        slots = table.slots(start, count)
        assert slots.dtype == np.int64
        assert slots.tolist() == [block * 16 + offset for block, offset in expected]
    with pytest.raises(IndexError, match="no block for token position 48: the table has 3 blocks of 16"):
        table.slots(40, 9)
    with pytest.raises(IndexError, match="no block for token position 100"):
        table.slots(100, 1)
    with pytest.raises(ValueError, match="start must be at least 0"):
        table.slots(-1, 1)


def test_repr_shows_the_state():
    table = BlockTable(4)
    table.append_blocks([3, 1])
    table.set_num_tokens(5)
    assert repr(table) == "BlockTable(block_size=4, blocks=[3, 1], num_tokens=5)"
