"""Offsets past 2³¹ and 2³² elements and bytes, in pools that are mostly memory nobody ever touched."""

import mmap
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import Device

from cupy_pagedkv import gather_cache, reshape_and_cache

BLOCK_SIZE, HEADS = 16, 2


def sparse_pool(device: Device, num_blocks: int, dim: int, dtype: Any) -> Any:
    shape = (num_blocks, BLOCK_SIZE, HEADS, dim)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if device.name == "cupy":
        if device.xp.cuda.Device().mem_info[0] < size + 2**30:
            pytest.skip(f"the GPU has no {size} bytes free")
        return device.xp.zeros(shape, dtype)
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # so that looking at all of it is quick
    return np.frombuffer(memory, dtype).reshape(shape)


@pytest.mark.parametrize(
    ("elements", "dim", "dtype", "index"),
    [(2**32 + 2**26, 2048, np.uint8, np.int32), (2**31 + 2**26, 1024, np.float16, np.int64)],
    ids=["elements", "bytes"],
)
def test_first_and_last_slots_of_a_pool_past_2_32(device, rng, elements, dim, dtype, index):
    num_blocks = elements // (BLOCK_SIZE * HEADS * dim)
    num_slots, row = num_blocks * BLOCK_SIZE, HEADS * dim
    k_cache = sparse_pool(device, num_blocks, dim, dtype)
    v_cache = device.xp.zeros((num_blocks, BLOCK_SIZE, HEADS, 1), dtype)
    # The slots on both sides of 2³¹ and 2³² elements, and of as many bytes; where a 32-bit offset would wrap to.
    edges = [n // (row * size) for n in (2**31, 2**32) for size in (1, np.dtype(dtype).itemsize)]
    slots = sorted({0, num_slots - 1, *(edge + side for edge in edges for side in (-1, 0, 1) if edge < num_slots)})
    key = oracle.random_array(rng, (len(slots), HEADS, dim), dtype)
    value = oracle.random_array(rng, (len(slots), HEADS, 1), dtype)

    reshape_and_cache(device.array(key), device.array(value), k_cache, v_cache, np.array(slots, index))

    # Every byte that is not zero is one of a written row: nothing else was written anywhere.
    written = np.count_nonzero(key.view(np.uint8))
    step = num_blocks // 16 + 1
    found = sum(
        int(device.xp.count_nonzero(k_cache[i : i + step].reshape(-1).view(np.uint8)))
        for i in range(0, num_blocks, step)
    )
    assert found == written
    expected_v = np.zeros((num_blocks, BLOCK_SIZE, HEADS, 1), dtype)
    oracle.scatter(value, expected_v, slots)
    assert device.numpy(v_cache).tobytes() == expected_v.tobytes()
    for slot, token in zip(slots, key, strict=True):
        assert device.numpy(k_cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE]).tobytes() == token.tobytes()

    blocks = sorted({slot // BLOCK_SIZE for slot in slots})
    tables = np.array([[block] for block in blocks], index)
    k, _ = gather_cache(k_cache, v_cache, tables, [BLOCK_SIZE] * len(blocks))
    expected = np.zeros((len(blocks), BLOCK_SIZE, HEADS, dim), dtype)
    for slot, token in zip(slots, key, strict=True):
        expected[blocks.index(slot // BLOCK_SIZE), slot % BLOCK_SIZE] = token
    assert device.numpy(k).tobytes() == expected.tobytes()
