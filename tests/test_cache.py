"""PagedKVCache and LayeredPagedKVCache."""

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest

import cupy_pagedkv.devices.backend as backend
from cupy_pagedkv import BlockAllocator, LayeredPagedKVCache, OutOfBlocksError, PagedKVCache


def test_pools_are_zero_filled_and_where_they_were_asked_for(device):
    cache = PagedKVCache(4, 8, 2, 6, "bfloat16", device.of_caches, v_head_dim=3)
    for pool, dim in ((cache.k_cache, 6), (cache.v_cache, 3)):
        host = device.numpy(pool)
        assert host.shape == (4, 8, 2, dim)
        assert host.dtype == ml_dtypes.bfloat16
        assert not host.view(np.uint16).any()
    assert (cache.num_blocks, cache.block_size, cache.num_heads, cache.head_dim, cache.v_head_dim) == (4, 8, 2, 6, 3)
    assert cache.dtype == ml_dtypes.bfloat16
    assert cache.device == ("cuda:0" if device.name == "cupy" else "cpu")
    assert repr(cache) == (
        "PagedKVCache(num_blocks=4, block_size=8, num_heads=2, head_dim=6, v_head_dim=3, dtype=bfloat16, "
        f"device='{cache.device}')"
    )


def test_update_and_gather_are_the_operations_on_its_pools(device, rng):
    cache = PagedKVCache(4, 8, 2, 6, np.float16, device.of_caches)
    key, value = oracle.random_array(rng, (2, 11, 2, 6), np.float16)
    slots = [*range(16, 24), 3 * 8, 3 * 8 + 1, -1]
    cache.update(device.array(key), device.array(value), slots)
    k, v = cache.gather([[2, 3]], [10])
    assert device.numpy(k).tobytes() == key[:10].tobytes()
    assert device.numpy(v).tobytes() == value[:10].tobytes()
    out = (device.xp.zeros((2, 2, 6), np.float16), device.xp.zeros((2, 2, 6), np.float16))
    assert cache.gather([[2, 3]], [10], seq_starts=[8], out=out) is out
    assert device.numpy(out[1]).tobytes() == value[8:10].tobytes()


@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved", "packed"])
def test_from_pools_shares_them(device, rng, layout):
    size, views = oracle.pools(layout, 4, 8, 2, 6, np.float16)
    expected = oracle.random_bytes(rng, size)
    buffer = device.array(expected)
    cache = PagedKVCache.from_pools(*views(buffer))
    key = oracle.random_array(rng, (3, 2, 6), np.float16)
    cache.update(device.array(key), device.array(key), [31, 0, 9])
    for pool in views(expected):
        oracle.scatter(key, pool, [31, 0, 9])
    assert np.array_equal(device.numpy(buffer), expected)


def test_from_pools_checks_them(device):
    pool = device.xp.zeros((4, 8, 2, 6), np.float16)
    with pytest.raises(ValueError, match="pools of one layer have 4 axes, got k_cache of 5"):
        PagedKVCache.from_pools(pool[None], pool[None])
    with pytest.raises(ValueError, match="must agree in all axes but head_dim"):
        PagedKVCache.from_pools(pool, pool[1:])
    with pytest.raises(ValueError, match="last axis of k_cache must be contiguous"):
        PagedKVCache.from_pools(pool[..., ::2], pool)
    with pytest.raises(TypeError, match="v_cache must be a NumPy or CuPy array"):
        PagedKVCache.from_pools(pool, [1])


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("kind", [PagedKVCache, LayeredPagedKVCache])
def test_sizes_are_checked(device, kind, position):
    sizes: list[Any] = [2, 4, 8, 2, 6][-4 if kind is PagedKVCache else -5 :]
    for wrong, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=r"must be at least 1|must be a whole number"):
            kind(*sizes[:position], wrong, *sizes[position + 1 :], np.float16, device.of_caches)
    with pytest.raises(TypeError, match="expected a dtype"):
        kind(*sizes, object, device.of_caches)
    if kind is PagedKVCache:
        with pytest.raises(ValueError, match="v_head_dim must be at least 1"):
            kind(*sizes, np.float16, device.of_caches, v_head_dim=0)


def layered(device: Any, num_layers: int = 3, num_blocks: int = 6, block_size: int = 4) -> LayeredPagedKVCache:
    return LayeredPagedKVCache(num_layers, num_blocks, block_size, 2, 6, np.float16, device.of_caches)


def test_layers_share_one_allocation_and_overlap_nowhere(device):
    cache = layered(device)
    pools = [pool for layer in cache for pool in (layer.k_cache, layer.v_cache)]
    for i, pool in enumerate(pools):
        pool[...] = i + 1
    for i, pool in enumerate(pools):
        assert device.numpy(pool).tobytes() == np.full(pool.shape, i + 1, np.float16).tobytes()
    address = (
        backend.backend_of(("pool",), pools[0])._address if device.name != "numpy" else lambda pool: pool.ctypes.data
    )
    step = pools[0].nbytes
    assert [address(pool) - address(pools[0]) for pool in pools] == [step * i for i in range(6)]


def test_layers_by_index(device):
    cache = layered(device)
    assert (cache.num_layers, len(cache), cache.block_size, cache.seq_len) == (3, 3, 4, 0)
    assert [cache.layer(i) for i in range(3)] == [cache[i] for i in range(3)] == list(cache)
    assert cache[-1] is cache[2]
    assert len({id(cache.block_table(i)) for i in range(3)}) == 1
    for call in (cache.layer, cache.__getitem__, cache.block_table, cache.block_table_device_format):
        with pytest.raises(IndexError):
            call(3)


def test_a_sequence_through_all_layers(device, rng):
    """A prompt and single tokens, with the other blocks' bytes compared too."""
    cache = layered(device)
    allocator = BlockAllocator(6, 4)
    allocator.allocate(1)
    expected = np.zeros((3, 2, 6, 4, 2, 6), np.float16)
    tokens = oracle.random_array(rng, (3, 2, 11, 2, 6), np.float16)
    for start, count in [(0, 6), (6, 1), (7, 1), (8, 1), (9, 2)]:
        cache.allocate_blocks(count, allocator)
        slots = cache.compute_slot_mapping(start, count)
        assert slots.dtype == np.int64
        for i, layer in enumerate(cache):
            key, value = tokens[i, :, start : start + count]
            layer.update(device.array(key), device.array(value), slots)
            oracle.scatter(key, expected[i, 0], slots)
            oracle.scatter(value, expected[i, 1], slots)
        cache.set_seq_len(start + count)
    assert cache.seq_len == 11
    assert cache.block_table_device_format(2).tolist() == [1, 2, 3]
    for i, layer in enumerate(cache):
        assert device.numpy(layer.k_cache).tobytes() == expected[i, 0].tobytes()
        assert device.numpy(layer.v_cache).tobytes() == expected[i, 1].tobytes()
        k, v = layer.gather([cache.block_table_device_format(i)], [cache.seq_len])
        assert device.numpy(k).tobytes() == tokens[i, 0].tobytes()
        assert device.numpy(v).tobytes() == tokens[i, 1].tobytes()


@pytest.fixture
def cache(device) -> LayeredPagedKVCache:
    return layered(device)


def test_asking_twice_takes_nothing_twice(cache):
    allocator = BlockAllocator(6, 4)
    for _ in range(3):
        cache.allocate_blocks(5, allocator)
        assert cache.block_table(0).blocks.tolist() == [0, 1]
    cache.allocate_blocks(0, allocator)
    cache.set_seq_len(5)
    cache.allocate_blocks(3, allocator)
    assert allocator.free_block_count == 4
    cache.allocate_blocks(4, allocator)
    assert cache.block_table(1).blocks.tolist() == [0, 1, 2]


def test_too_few_blocks_leave_everything_as_it_was(cache):
    allocator = BlockAllocator(6, 4)
    cache.allocate_blocks(4, allocator)
    cache.set_seq_len(3)
    before = allocator.stats()
    with pytest.raises(OutOfBlocksError, match="6 blocks wanted, 5 of 6 are free"):
        cache.allocate_blocks(22, allocator)
    with pytest.raises(ValueError, match="additional_tokens must be at least 0"):
        cache.allocate_blocks(-1, allocator)
    assert allocator.stats() == before
    assert (cache.seq_len, cache.block_table(0).blocks.tolist()) == (3, [0])


@pytest.mark.parametrize("other", [BlockAllocator(6, 8), BlockAllocator(7, 4)])
def test_an_allocator_of_another_pool_is_refused(cache, other):
    with pytest.raises(ValueError, match="the allocator has .* the cache 6 of 4; make them alike"):
        cache.allocate_blocks(1, other)
    assert other.free_block_count == other.total_blocks


def test_the_length_cannot_pass_the_capacity(cache):
    cache.allocate_blocks(5, BlockAllocator(6, 4))
    cache.set_seq_len(8)
    with pytest.raises(ValueError, match="9 tokens do not fit in 2 blocks of 4"):
        cache.set_seq_len(9)
    with pytest.raises(ValueError, match="at least 0"):
        cache.set_seq_len(-1)
    assert cache.seq_len == 8


def test_slots_of_positions_without_a_block_are_an_error(cache):
    cache.allocate_blocks(5, BlockAllocator(6, 4))
    assert cache.compute_slot_mapping(3, 5).tolist() == [3, 4, 5, 6, 7]
    assert cache.compute_slot_mapping(8, 0).tolist() == []
    with pytest.raises(IndexError, match="no block for token position 8"):
        cache.compute_slot_mapping(3, 6)
    for start, count in ((-1, 2), (0, -1)):
        with pytest.raises(ValueError, match="at least 0"):
            cache.compute_slot_mapping(start, count)


def test_set_blocks_leaves_no_stale_length(cache):
    cache.allocate_blocks(20, BlockAllocator(6, 4))
    cache.set_seq_len(20)
    cache.set_blocks(np.array([5, 3]))
    assert (cache.seq_len, cache.block_table(0).blocks.tolist()) == (0, [5, 3])
    cache.set_seq_len(8)
    for wrong, error in (([0, 6], ValueError), ([-1], ValueError), ([0.5], TypeError), ([[1]], ValueError)):
        with pytest.raises(error, match="block id"):
            cache.set_blocks(wrong)
    assert (cache.seq_len, cache.block_table(0).blocks.tolist()) == (8, [5, 3])


def test_reset_forgets_the_mapping_but_frees_and_clears_nothing(device):
    cache, allocator = layered(device), BlockAllocator(6, 4)
    cache.allocate_blocks(5, allocator)
    cache.set_seq_len(5)
    ones = device.xp.ones((5, 2, 6), np.float16)
    cache[1].update(ones, ones, cache.compute_slot_mapping(0, 5))
    cache.reset()
    assert (cache.seq_len, cache.block_table(0).num_blocks) == (0, 0)
    assert allocator.free_block_count == 4
    expected = np.zeros((24, 2, 6), np.float16)
    expected[:5] = 1
    assert device.numpy(cache[1].k_cache).tobytes() == expected.tobytes()
