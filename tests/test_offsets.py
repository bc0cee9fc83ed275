"""Offsets past 2³¹ and 2³² elements and bytes, in memory that is mostly never touched."""

import mmap
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import Device

from cupy_pagedkv import gather_cache, reshape_and_cache

BLOCK_SIZE, HEADS = 16, 2


def sparse(device: Device, size: int) -> Any:
    """So many zero bytes."""
    if device.name == "cupy":
        if device.xp.cuda.Device().mem_info[0] < size + 2**30:
            pytest.skip(f"the GPU has no {size} bytes free")
        return device.xp.zeros(size, np.uint8)
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # so that looking at all of it is quick
    return np.frombuffer(memory, np.uint8)


def count_nonzero(device: Device, memory: Any) -> int:
    step = 2**28
    return sum(int(device.xp.count_nonzero(memory[i : i + step])) for i in range(0, memory.size, step))


@pytest.mark.parametrize(
    ("elements", "dim", "dtype", "index", "large"),
    [(2**32 + 2**26, 2048, np.uint8, np.int32, "K"), (2**31 + 2**26, 1024, np.float16, np.int64, "V")],
    ids=["elements of K", "bytes of V"],
)
def test_first_and_last_slots_of_a_pool_past_2_32(device, rng, elements, dim, dtype, index, large):
    """One of both pools is large; the other has one element a head, and is compared whole."""
    num_blocks = elements // (BLOCK_SIZE * HEADS * dim)
    num_slots, row = num_blocks * BLOCK_SIZE, HEADS * dim
    memory = sparse(device, num_slots * row * np.dtype(dtype).itemsize)
    large_pool = memory.view(dtype).reshape(num_blocks, BLOCK_SIZE, HEADS, dim)
    small_pool = device.xp.zeros((num_blocks, BLOCK_SIZE, HEADS, 1), dtype)
    # The slots on both sides of 2³¹ and 2³² elements, and of as many bytes.
    edges = [n // (row * size) for n in (2**31, 2**32) for size in (1, np.dtype(dtype).itemsize)]
    slots = sorted({0, num_slots - 1, *(edge + side for edge in edges for side in (-1, 0, 1) if edge < num_slots)})
    rows = oracle.random_array(rng, (len(slots), HEADS, dim), dtype)
    small_rows = oracle.random_array(rng, (len(slots), HEADS, 1), dtype)
    turn = 1 if large == "K" else -1
    pools, tokens = (large_pool, small_pool)[::turn], (device.array(rows), device.array(small_rows))[::turn]

    reshape_and_cache(*tokens, *pools, np.array(slots, index))

    # The rows are there, and no byte but theirs is anything but zero: nothing was written elsewhere.
    for slot, token in zip(slots, rows, strict=True):
        assert device.numpy(large_pool[slot // BLOCK_SIZE, slot % BLOCK_SIZE]).tobytes() == token.tobytes()
    assert count_nonzero(device, memory) == np.count_nonzero(rows.view(np.uint8))
    expected_small = np.zeros((num_blocks, BLOCK_SIZE, HEADS, 1), dtype)
    oracle.scatter(small_rows, expected_small, slots)
    assert device.numpy(small_pool).tobytes() == expected_small.tobytes()

    blocks = sorted({slot // BLOCK_SIZE for slot in slots})
    tables = np.array([[block] for block in blocks], index)
    gathered = gather_cache(*pools, tables, [BLOCK_SIZE] * len(blocks))[::turn][0]
    expected = np.zeros((len(blocks), BLOCK_SIZE, HEADS, dim), dtype)
    for slot, token in zip(slots, rows, strict=True):
        expected[blocks.index(slot // BLOCK_SIZE), slot % BLOCK_SIZE] = token
    assert device.numpy(gathered).tobytes() == expected.tobytes()


def test_tokens_and_results_that_lie_far_apart(device, rng):
    """Three rows, 2³² + 2²⁰ bytes from the first to the last."""
    far = 2**31 + 2**19
    memory = sparse(device, 2 * far + 64)
    as_strided = device.xp.lib.stride_tricks.as_strided
    tokens = as_strided(memory, (3, 2, 16), (far, 32, 1))
    key = oracle.random_array(rng, (3, 2, 16), np.uint8)
    tokens[...] = device.array(key)
    pools = device.xp.zeros((2, 2, 4, 2, 16), np.uint8)
    reshape_and_cache(tokens, tokens, *pools, [0, 7, 1])
    expected = np.zeros((2, 4, 2, 16), np.uint8)
    oracle.scatter(key, expected, [0, 7, 1])
    for pool in pools:
        assert device.numpy(pool).tobytes() == expected.tobytes()

    tokens[...] = 0
    result = device.xp.zeros((3, 2, 16), np.uint8)
    gather_cache(*pools, [[1, 0]], [6], seq_starts=[3], out=(tokens, result))
    assert device.numpy(result).tobytes() == np.concatenate([expected[1, 3:], expected[0, :2]]).tobytes()
    for i in range(3):
        assert device.numpy(tokens[i]).tobytes() == device.numpy(result[i]).tobytes()
    assert count_nonzero(device, memory) == np.count_nonzero(device.numpy(result))
