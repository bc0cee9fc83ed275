"""reshape_and_cache: after every call the whole buffer that the pools lie in is compared with a loop's."""

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import Device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cupy_pagedkv import PagedKVCache, reshape_and_cache
from cupy_pagedkv.emulator import emulate

LAYOUTS = ["NHD", "HND", "interleaved"]
HEAD_DIMS = [64, 80, 256, 1, 46, 96, 100, 576]
DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32, np.uint8]


def check(
    device: Device,
    rng: np.random.Generator,
    key: np.ndarray,
    value: np.ndarray,
    slots: Any,
    size: int,
    views: oracle.Pools,
    on_device: Any = None,
) -> None:
    """Scatter on the device and in a loop, and compare all bytes. ``on_device`` makes the two inputs there."""
    expected = oracle.random_bytes(rng, size)
    buffer = device.array(expected)
    k_cache, v_cache = views(buffer)
    device_key, device_value = (device.array(key), device.array(value)) if on_device is None else on_device
    reshape_and_cache(device_key, device_value, k_cache, v_cache, slots)
    for tokens, pool in zip((key, value), views(expected), strict=True):
        oracle.scatter(tokens, pool, device.numpy(slots) if isinstance(slots, device.xp.ndarray) else slots)
    assert np.array_equal(device.numpy(buffer), expected)


def fused(device: Device, rng: np.random.Generator, num_tokens: int, heads: int, dim: int, dtype: Any) -> Any:
    """K and V as views of one [T, 3, H, D] projection, on the host and on the device."""
    qkv = oracle.random_array(rng, (num_tokens, 3, heads, dim), dtype)
    on_device = device.array(qkv)
    return (qkv[:, 1], qkv[:, 2]), (on_device[:, 1], on_device[:, 2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_grid_of_rows(device, rng, dim, dtype, layout):
    host, on_device = fused(device, rng, 42, 8, dim, dtype)
    slots = rng.permutation(64 * 16)[:42]
    check(device, rng, *host, device.array(slots), *oracle.pools(layout, 64, 16, 8, dim, dtype), on_device)


@pytest.mark.parametrize("num_blocks", [1024, 10000])
@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
def test_grid_of_pools(device, rng, block_size, num_blocks):
    dtype = ml_dtypes.bfloat16
    host, on_device = fused(device, rng, 42, 8, 64, dtype)
    slots = rng.permutation(num_blocks * block_size)[:42]
    slots[-1] = num_blocks * block_size - 1
    check(
        device, rng, *host, device.array(slots), *oracle.pools("NHD", num_blocks, block_size, 8, 64, dtype), on_device
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_blocks", [1024, 10000])
@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
def test_grid_of_pools_and_layouts(device, rng, block_size, num_blocks, layout):
    """With smaller rows, so that all of these pools fit a small machine."""
    dtype = ml_dtypes.bfloat16
    host, on_device = fused(device, rng, 42, 2, 16, dtype)
    slots = rng.permutation(num_blocks * block_size)[:42]
    check(
        device, rng, *host, device.array(slots), *oracle.pools(layout, num_blocks, block_size, 2, 16, dtype), on_device
    )


@pytest.mark.parametrize("row", [64, 96, 98, 100, 128, 256, 512, 1024])
def test_rows_of_one_head(device, rng, row):
    key, value = oracle.random_array(rng, (2, 33, 1, row), np.float16)
    check(device, rng, key, value, rng.permutation(40 * 16)[:33], *oracle.pools("NHD", 40, 16, 1, row, np.float16))


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 31, 32, 33, 127, 128, 255, 1000, 4096, 16384])
def test_numbers_of_tokens(device, rng, num_tokens):
    key, value = oracle.random_array(rng, (2, num_tokens, 2, 16), np.float32)
    slots = rng.permutation(1100 * 16)[:num_tokens]
    check(device, rng, key, value, slots, *oracle.pools("NHD", 1100, 16, 2, 16, np.float32))


@pytest.mark.parametrize("layout", ["NHD", "HND", "packed"])
@pytest.mark.parametrize(("dim", "v_dim"), [(576, 512), (192, 128), (46, 3), (1, 64)])
def test_v_of_another_head_dim(device, rng, dim, v_dim, layout):
    key = oracle.random_array(rng, (9, 2, dim), np.float16)
    value = oracle.random_array(rng, (9, 2, v_dim), np.float16)
    check(device, rng, key, value, rng.permutation(96)[:9], *oracle.pools(layout, 12, 8, 2, dim, np.float16, v_dim))


@pytest.mark.parametrize("first", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("dim", "dtype"), [*((n, np.float16) for n in (1, 3, 46, 64, 576)), (5, np.uint8), (16, np.uint8), (4, np.float64)]
)
def test_pools_and_tokens_that_start_at_any_element(device, rng, dim, dtype, first):
    """Rows of 2, 6, 92 and 1152 bytes among them. Nothing is aligned to more than an element, nor need it be."""
    size = 7 * dim * np.dtype(dtype).itemsize
    memory = oracle.random_bytes(rng, size + 64)
    on_device = device.array(memory)

    def tokens(buffer):
        start = (first - 1) * np.dtype(dtype).itemsize
        return buffer[start : start + size].view(dtype).reshape(7, 1, dim)

    pair = (tokens(on_device), tokens(on_device))
    slots = rng.permutation(64)[:7]
    sizes = oracle.pools("NHD", 8, 8, 1, dim, dtype, first=first)
    check(device, rng, tokens(memory), tokens(memory), slots, *sizes, pair)


def _transposed(array):
    return array.transpose(2, 1, 0)


VIEWS = {
    "every second token": ((10, 2, 6), lambda a: a[::2]),
    "backwards": ((5, 2, 6), lambda a: a[::-1]),
    "heads backwards": ((5, 2, 6), lambda a: a[:, ::-1]),
    "dims backwards": ((5, 2, 6), lambda a: a[..., ::-1]),
    "every third dim": ((5, 2, 18), lambda a: a[..., ::3]),
    "all axes reversed": ((6, 2, 5), _transposed),
    "head first": ((2, 5, 6), lambda a: a.transpose(1, 0, 2)),
    "part of a head": ((5, 2, 11), lambda a: a[..., 3:9]),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.complex128], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("view", VIEWS)
def test_inputs_of_any_strides(device, rng, view, dtype):
    shape, make = VIEWS[view]
    memory = oracle.random_array(rng, (2, *shape), dtype)
    on_device = device.array(memory)
    key, value = make(memory[0]), make(memory[1])
    pair = (make(on_device[0]), make(on_device[1]))
    check(device, rng, key, value, [3, 17, -1, 0, 31], *oracle.pools("HND", 4, 8, 2, 6, dtype), pair)


def test_one_token_broadcast_to_many(device, rng):
    key = oracle.random_array(rng, (1, 2, 6), np.float16)
    wide = np.broadcast_to(key, (5, 2, 6))
    pair = (device.xp.broadcast_to(device.array(key), (5, 2, 6)),) * 2
    check(device, rng, wide, wide, [3, 17, 9, 0, 31], *oracle.pools("NHD", 4, 8, 2, 6, np.float16), pair)


def test_strides_of_axes_of_length_one_mean_nothing(device, rng):
    """A pool of one block, one slot a block, one head or one element a head, with strides that fit nothing."""
    as_strided = device.xp.lib.stride_tricks.as_strided
    for shape in [(1, 8, 2, 4), (8, 1, 2, 4), (4, 8, 1, 4), (4, 8, 2, 1), (1, 1, 1, 1)]:
        expected = oracle.random_bytes(rng, 2 * 2 * int(np.prod(shape)))
        buffer = device.array(expected)
        both = buffer.view(np.float16).reshape(2, *shape)
        strides = tuple(stride if n > 1 else 34 for n, stride in zip(shape, both[0].strides, strict=True))
        pools = [as_strided(pool, shape, strides) for pool in both]
        key = oracle.random_array(rng, (1, *shape[2:]), np.float16)
        strides = tuple(stride if n > 1 else 10 for n, stride in zip(key.shape, key.strides, strict=True))
        odd_key = as_strided(device.array(key), key.shape, strides)
        reshape_and_cache(odd_key, odd_key, *pools, [shape[0] * shape[1] - 1])
        for pool in expected.view(np.float16).reshape(2, *shape):
            oracle.scatter(key, pool, [shape[0] * shape[1] - 1])
        assert np.array_equal(device.numpy(buffer), expected)


EVERY_DTYPE = [np.dtype(name) for name in [*"?bhilBHILefdFD", "M8[s]", "V3", "V12", "S5", "f2,i4"]]
EVERY_DTYPE += [np.dtype(t) for t in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)]


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_every_dtype_bit_for_bit(device, rng, dtype):
    device.skip_unless_it_has(dtype)
    key, value = oracle.random_array(rng, (2, 7, 3, 5), dtype)
    slots = rng.permutation(64)[:7]
    for layout in ("NHD", "HND"):
        check(device, rng, key, value, slots, *oracle.pools(layout, 8, 8, 3, 5, dtype))


PADDED = np.dtype({"names": ["a", "b"], "formats": ["u1", "u4"], "offsets": [0, 4], "itemsize": 8})


def test_padding_between_fields_is_copied_too(device, rng):
    device.skip_unless_it_has(PADDED)
    key, value = oracle.random_array(rng, (2, 7, 3, 5), PADDED)
    slots = rng.permutation(64)[:7]
    slots[3] = -1
    check(device, rng, key, value, slots, *oracle.pools("HND", 8, 8, 3, 5, PADDED))


@pytest.mark.parametrize("v_dtype", [np.dtype(np.float32), PADDED], ids=["float32", "padded"])
def test_k_and_v_of_different_dtypes(device, rng, v_dtype):
    device.skip_unless_it_has(v_dtype)
    key = oracle.random_array(rng, (5, 2, 3), ml_dtypes.float8_e4m3fn)
    value = oracle.random_array(rng, (5, 2, 3), v_dtype)
    expected = [oracle.random_array(rng, (4, 4, 2, 3), tokens.dtype) for tokens in (key, value)]
    pools = [device.array(pool) for pool in expected]
    reshape_and_cache(device.array(key), device.array(value), *pools, [3, 15, -1, 0, 8])
    for tokens, pool, result in zip((key, value), expected, pools, strict=True):
        oracle.scatter(tokens, pool, [3, 15, -1, 0, 8])
        assert oracle.opaque(device.numpy(result)).tobytes() == oracle.opaque(pool).tobytes()


def test_nan_payloads_survive(device):
    payloads = np.arange(0x7C01, 0x7C01 + 64, dtype=np.uint16)  # signalling NaNs of float16
    key = payloads.view(np.float16).reshape(2, 4, 8)
    cache = PagedKVCache(2, 4, 4, 8, np.float16, device.of_caches)
    cache.update(device.array(key), device.array(key), [5, 2])
    assert device.numpy(cache.k_cache)[[1, 0], [1, 2]].tobytes() == payloads.tobytes()


@pytest.mark.parametrize("kind", ["list", "tuple", "numpy", "device", "strided", "backwards", "one value"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_kinds_of_slots(device, rng, dtype, kind):
    key, value = oracle.random_array(rng, (2, 6, 2, 4), np.float16)
    numbers = np.array([9, -1, 0, 31, -(2**31), 17], dtype)
    slots = {
        "list": numbers.tolist,
        "tuple": lambda: tuple(numbers.tolist()),
        "numpy": lambda: numbers,
        "device": lambda: device.array(numbers),
        "strided": lambda: device.array(np.repeat(numbers, 3))[::3],
        "backwards": lambda: device.array(numbers[::-1])[::-1],
        "one value": lambda: device.xp.broadcast_to(device.array(np.array([-1], dtype)), (6,)),
    }[kind]()
    check(device, rng, key, value, slots, *oracle.pools("NHD", 4, 8, 2, 4, np.float16))


def test_negative_slots_write_nothing(device, rng):
    key, value = oracle.random_array(rng, (2, 4, 2, 4), np.float16)
    for slots in ([-1] * 4, [-1, 3, -(2**40), 4], [0, -31, -32, 31]):
        check(device, rng, key, value, slots, *oracle.pools("NHD", 4, 8, 2, 4, np.float16))


def test_no_tokens(device, rng):
    key = oracle.random_array(rng, (0, 2, 4), np.float16)
    for slots in ([], (), np.empty(0, np.int32), device.array(np.empty(0, np.int64))):
        check(device, rng, key, key, slots, *oracle.pools("NHD", 4, 8, 2, 4, np.float16))


def test_slots_past_the_pool_raise_on_numpy_and_are_skipped_by_the_kernel(device, rng):
    size, views = oracle.pools("HND", 4, 8, 2, 4, np.float16)
    key, value = oracle.random_array(rng, (2, 5, 2, 4), np.float16)
    slots = np.array([3, 32, 2**31 + 3, 2**32 + 4, 2**62])
    expected = oracle.random_bytes(rng, size)
    buffer = device.array(expected)
    pair = (device.array(key), device.array(value))
    if device.checks_indices:
        with pytest.raises(IndexError, match=r"slot_mapping\[1\] is 32, but the pool has slots 0 to 31"):
            reshape_and_cache(*pair, *views(buffer), slots)
    else:
        reshape_and_cache(*pair, *views(buffer), slots)
        for tokens, pool in zip((key, value), views(expected), strict=True):
            oracle.scatter(tokens[:1], pool, slots[:1])
    assert np.array_equal(device.numpy(buffer), expected)


def test_debug_refuses_slots_past_the_pool_and_duplicates_before_it_writes(debug, rng):
    size, views = oracle.pools("NHD", 4, 8, 2, 4, np.float16)
    key = debug.array(oracle.random_array(rng, (3, 2, 4), np.float16))
    expected = oracle.random_bytes(rng, size)
    buffer = debug.array(expected)
    with pytest.raises(IndexError, match=r"slot_mapping\[2\] is 32"):
        reshape_and_cache(key, key, *views(buffer), debug.array(np.array([0, 1, 32])))
    with pytest.raises(ValueError, match=r"slot 9 comes more than once in slot_mapping, for tokens \[0, 2\]"):
        reshape_and_cache(key, key, *views(buffer), debug.array(np.array([9, 1, 9])))
    assert np.array_equal(debug.numpy(buffer), expected)
    reshape_and_cache(key, key, *views(buffer), debug.array(np.array([-1, 1, -1])))  # padding may repeat


def test_duplicate_slots_hold_one_of_the_rows(device, rng):
    key = oracle.random_array(rng, (2, 2, 4), np.float16)
    cache = PagedKVCache(2, 4, 2, 4, np.float16, device.of_caches)
    with emulate(check=False):  # which would say that it is a race
        cache.update(device.array(key), device.array(key), [3, 3])
    k = device.numpy(cache.k_cache)
    assert k[0, 3].tobytes() in (key[0].tobytes(), key[1].tobytes())
    k[0, 3] = 0
    assert not k.view(np.uint16).any()


def test_the_seeds_own_example(device):
    """Slots [0, 1, 9] of a (4, 8, 2, 4) float32 pool, of which the seed looked at two numbers."""
    key = (np.arange(24, dtype=np.float32) * np.float32(0.1)).reshape(3, 2, 4)
    value = (np.arange(24, dtype=np.float32) * np.float32(0.2)).reshape(3, 2, 4)
    cache = PagedKVCache(4, 8, 2, 4, "float32", device.of_caches)
    cache.update(device.array(key), device.array(value), [0, 1, 9])
    for tokens, pool in ((key, cache.k_cache), (value, cache.v_cache)):
        expected = np.zeros((4, 8, 2, 4), np.float32)
        expected[0, 0], expected[0, 1], expected[1, 1] = tokens
        assert device.numpy(pool).tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_slots(device, data):
    """Few shapes, so that few kernels are compiled; any slots, padding, token strides and offsets."""
    seed = data.draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    heads, dim, layout = data.draw(st.sampled_from([(1, 8, "NHD"), (3, 5, "NHD"), (3, 5, "HND")]))
    num_blocks, block_size = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1, 4]))
    places = st.integers(0, num_blocks * block_size - 1)
    slots = data.draw(st.lists(places, unique=True, max_size=num_blocks * block_size))
    for place in data.draw(st.lists(st.integers(0, len(slots)), max_size=4)):
        slots.insert(place, data.draw(st.integers(-(2**63), -1)))
    step = data.draw(st.sampled_from([1, 2, -1]))
    memory = oracle.random_array(rng, (2, len(slots) * 2, heads, dim), np.uint8)
    on_device = device.array(memory)
    key, value = memory[:, ::step][:, : len(slots)]
    pair = tuple(on_device[:, ::step][:, : len(slots)])
    check(device, rng, key, value, slots, *oracle.pools(layout, num_blocks, block_size, heads, dim, np.uint8), pair)
