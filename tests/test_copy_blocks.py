"""copy_blocks: after every call the whole buffer that the pools lie in is compared with a loop's."""

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import Device
from test_scatter import EVERY_DTYPE

from cupy_pagedkv import LayeredPagedKVCache, PagedKVCache, copy_blocks


def check(device: Device, rng: np.random.Generator, src: Any, dst: Any, size: int, views: oracle.Pools) -> None:
    expected = oracle.random_bytes(rng, size)
    buffer = device.array(expected)
    copy_blocks(*views(buffer), src, dst)
    for pool in map(oracle.opaque, views(expected)):
        for source, target in zip(device_list(device, src), device_list(device, dst), strict=True):
            for offset in range(pool.shape[1]):
                pool[target, offset] = pool[source, offset]
    assert np.array_equal(device.numpy(buffer), expected)


def device_list(device: Device, blocks: Any) -> list[int]:
    array = device.numpy(blocks) if isinstance(blocks, device.xp.ndarray) else np.array(blocks, int)
    return [int(block) for block in array]


@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved", "packed"])
@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.bfloat16, np.complex128], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(("heads", "dim"), [(8, 64), (3, 5), (1, 46), (8, 1), (1, 1)])
@pytest.mark.parametrize("block_size", [1, 8])
def test_grid(device, rng, block_size, heads, dim, dtype, layout):
    blocks = rng.permutation(24)
    check(device, rng, blocks[:9], blocks[9:18], *oracle.pools(layout, 24, block_size, heads, dim, dtype))


def test_256_copies(device, rng):
    blocks = rng.permutation(1024).astype(np.int32)
    check(device, rng, blocks[:256], blocks[256:512], *oracle.pools("NHD", 1024, 8, 2, 16, np.float16))


@pytest.mark.parametrize(("dim", "v_dim"), [(576, 512), (46, 3), (1, 64)])
@pytest.mark.parametrize("layout", ["NHD", "HND", "packed"])
def test_v_of_another_head_dim(device, rng, dim, v_dim, layout):
    check(device, rng, [0, 3], [5, 1], *oracle.pools(layout, 6, 8, 2, dim, np.float16, v_dim))


@pytest.mark.parametrize("first", [1, 3])
def test_pools_that_start_at_any_element(device, rng, first):
    check(device, rng, [0, 3], [5, 1], *oracle.pools("NHD", 6, 8, 2, 16, np.uint8, first=first))


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_every_dtype_bit_for_bit(device, rng, dtype):
    device.skip_unless_it_has(dtype)
    check(device, rng, [0, 3], [5, 1], *oracle.pools("HND", 6, 8, 3, 5, dtype))


def test_padding_between_fields_is_copied_too(device, rng):
    dtype = np.dtype({"names": ["a", "b"], "formats": ["u1", "u4"], "offsets": [0, 4], "itemsize": 8})
    device.skip_unless_it_has(dtype)
    check(device, rng, [0, 3], [5, 1], *oracle.pools("NHD", 6, 8, 3, 5, dtype))


def test_one_source_for_many_and_a_block_onto_itself(device, rng):
    check(device, rng, [2, 2, 2], [0, 1, 5], *oracle.pools("NHD", 6, 8, 2, 16, np.float16))
    check(device, rng, [4], [4], *oracle.pools("NHD", 6, 8, 2, 16, np.float16))


@pytest.mark.parametrize("src", [np.int32, np.int64, list, "strided"])
@pytest.mark.parametrize("dst", [np.int32, np.int64, list, "strided"])
def test_kinds_of_blocks(device, rng, src, dst):
    def made(numbers: list[int], kind: Any) -> Any:
        if kind is list:
            return numbers
        if kind == "strided":
            return device.array(np.repeat(numbers, 3))[::3]
        return device.array(np.array(numbers, kind))

    check(device, rng, made([0, 3, 4], src), made([5, 1, 2], dst), *oracle.pools("NHD", 6, 8, 2, 16, np.float16))


def test_no_blocks(device, rng):
    check(device, rng, [], [], *oracle.pools("NHD", 6, 8, 2, 16, np.float16))


def test_blocks_outside_the_pool_raise_on_numpy_and_are_skipped_by_the_kernel(device, rng):
    size, views = oracle.pools("NHD", 6, 8, 2, 16, np.float16)
    for src, dst, name in (([0, 6], [1, 2], "src"), ([0, -1], [1, 2], "src"), ([0, 3], [1, 6], "dst"),
                           ([0, 3], [1, -6], "dst"), ([0, 2**40], [1, 2], "src")):  # fmt: skip
        expected = oracle.random_bytes(rng, size)
        buffer = device.array(expected)
        if device.checks_indices:
            with pytest.raises(IndexError, match=rf"{name}\[1\] is .*, but the pool has blocks 0 to 5"):
                copy_blocks(*views(buffer), src, dst)
        else:
            copy_blocks(*views(buffer), src, dst)
            for pool in views(expected):
                pool[1] = pool[0]
        assert np.array_equal(device.numpy(buffer), expected)


def test_debug_refuses_what_is_undefined(debug, rng):
    size, views = oracle.pools("NHD", 6, 8, 2, 16, np.float16)
    before = oracle.random_bytes(rng, size)
    buffer = debug.array(before)
    for src, dst, message in (([0, 1], [5, 5], "block 5 comes more than once in dst"),
                              ([0, 1], [1, 2], "block 1 is in src and in dst; make it two calls")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            copy_blocks(*views(buffer), debug.array(np.array(src)), debug.array(np.array(dst)))
    with pytest.raises(IndexError, match=r"dst\[1\] is 6"):
        copy_blocks(*views(buffer), debug.array(np.array([0, 1])), debug.array(np.array([5, 6])))
    copy_blocks(*views(buffer), [2, 4], [2, 4])  # onto themselves
    assert np.array_equal(debug.numpy(buffer), before)


def test_all_layers(device, rng):
    cache = LayeredPagedKVCache(3, 6, 4, 2, 5, np.float16, device.of_caches)
    expected = oracle.random_array(rng, (3, 2, 6, 4, 2, 5), np.float16)
    for layer, (k_cache, v_cache) in zip(cache, expected, strict=True):
        layer.k_cache[...] = device.array(k_cache)
        layer.v_cache[...] = device.array(v_cache)
    cache.copy_blocks([0, 5], [3, 1])
    expected.view(np.uint16)[:, :, [3, 1]] = expected.view(np.uint16)[:, :, [0, 5]]
    for layer, (k_cache, v_cache) in zip(cache, expected, strict=True):
        assert device.numpy(layer.k_cache).tobytes() == k_cache.tobytes()
        assert device.numpy(layer.v_cache).tobytes() == v_cache.tobytes()


def test_one_layer_of_a_model(device):
    cache = PagedKVCache(3, 4, 2, 5, np.float16, device.of_caches)
    cache.k_cache[1] = 3
    cache.v_cache[1] = 5
    cache.copy_blocks([1], [2])
    for pool, value in ((cache.k_cache, 3), (cache.v_cache, 5)):
        assert device.numpy(pool)[:, 0, 0, 0].tolist() == [0, value, value]
        assert (device.numpy(pool)[2] == value).all()


def test_one_launch(launches):
    LayeredPagedKVCache(5, 6, 4, 2, 5, np.float16, "cpu").copy_blocks([0, 5], [3, 1])
    assert [(name, grid[1:]) for name, grid in launches] == [("copy_blocks", (2, 5))]


def test_what_is_refused(device):
    pool = device.xp.zeros((2, 6, 8, 2, 4), np.float16)
    k_cache, v_cache = pool
    for src, dst, error, message in (
        ([0], [1, 2], ValueError, "src and dst must have one block for each other, got 1 and 2"),
        ([[0]], [1], ValueError, "src must have 1 axis"),
        ([0], [1.0], TypeError, "dst must be int32 or int64, got float64"),
    ):
        with pytest.raises(error, match=message):
            copy_blocks(k_cache, v_cache, src, dst)
    with pytest.raises(ValueError, match="must agree in all axes but head_dim"):
        copy_blocks(k_cache, v_cache[:5], [0], [1])
    with pytest.raises(TypeError, match="v_cache must be a NumPy or CuPy array, or speak DLPack, got list"):
        copy_blocks(k_cache, [1], [0], [1])
    assert not device.numpy(pool).any()
