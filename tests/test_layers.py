"""update_all and gather_all: all layers in one call, and on a GPU in one launch."""

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import Device

from cupy_pagedkv import LayeredPagedKVCache, gather_cache, reshape_and_cache

SLOTS = [9, -1, 0, 23, 10, 4]
TABLES = np.array([[1, 5, -7], [0, 99, 99], [2, 4, 3]], np.int32)
LENS, STARTS = [7, 0, 12], [2, 0, 1]


def filled(device: Device, rng: np.random.Generator, dtype: Any) -> tuple[LayeredPagedKVCache, np.ndarray]:
    """A cache of random bytes, 3 layers of 6 blocks of 4, and its pools on the host, ``[3, 2, 6, 4, 2, 5]``."""
    cache = LayeredPagedKVCache(3, 6, 4, 2, 5, dtype, device.of_caches)
    pools = oracle.random_array(rng, (3, 2, 6, 4, 2, 5), dtype)
    for layer, (k_cache, v_cache) in zip(cache, pools, strict=True):
        layer.k_cache[...] = device.array(k_cache)
        layer.v_cache[...] = device.array(v_cache)
    return cache, pools


def bytes_of(device: Device, cache: LayeredPagedKVCache) -> bytes:
    pools = [pool for layer in cache for pool in (layer.k_cache, layer.v_cache)]
    return b"".join(oracle.opaque(device.numpy(pool)).tobytes() for pool in pools)


def layer_first(tokens: Any) -> Any:
    return tokens


def token_first(tokens: Any) -> Any:
    """The same shape with the layers' axis inside: of ``[tokens, layers, …]``."""
    return tokens.swapaxes(0, 1).copy().swapaxes(0, 1)


@pytest.mark.parametrize("order", [layer_first, token_first])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.complex128], ids=lambda d: np.dtype(d).name)
def test_update_all(device, rng, dtype, order):
    cache, expected = filled(device, rng, dtype)
    keys, values = oracle.random_array(rng, (2, 3, 6, 2, 5), dtype)
    cache.update_all(order(device.array(keys)), order(device.array(values)), SLOTS)
    for layer in range(3):
        oracle.scatter(keys[layer], expected[layer, 0], SLOTS)
        oracle.scatter(values[layer], expected[layer, 1], SLOTS)
    assert bytes_of(device, cache) == expected.tobytes()


@pytest.mark.parametrize("order", [layer_first, token_first])
@pytest.mark.parametrize("starts", [None, STARTS])
def test_gather_all(device, rng, starts, order):
    cache, pools = filled(device, rng, np.float16)
    before = bytes_of(device, cache)
    expected = [[oracle.gather(pool, TABLES, LENS, starts or [0] * 3).tobytes() for pool in layer] for layer in pools]
    gathered = cache.gather_all(TABLES, LENS, seq_starts=starts)
    total = sum(LENS) - sum(starts or [0])
    assert [array.shape for array in gathered] == [(3, total, 2, 5)] * 2
    memory = device.array(np.full((2, 3, total + 4, 2, 5), 7, np.float16))
    inner = order(memory[0, :, 1:-1]), order(memory[1, :, 1:-1])
    assert cache.gather_all(TABLES, LENS, seq_starts=starts, out=inner) is inner
    for tensor in range(2):
        for layer in range(3):
            assert device.numpy(gathered[tensor][layer]).tobytes() == expected[layer][tensor]
            assert device.numpy(inner[tensor][layer, :total]).tobytes() == expected[layer][tensor]
    beside = np.array([device.numpy(array[:, total:]) for array in inner])
    assert (beside == 7).all()
    if order is layer_first:
        assert (device.numpy(memory)[:, :, [0, -1]] == 7).all()
    assert bytes_of(device, cache) == before


@pytest.mark.parametrize("v_dim", [5, 3])
def test_k_and_v_whose_layers_lie_differently(device, rng, v_dim):
    """K layer by layer, V with the layers inside and of another head_dim: each has strides of its own."""
    k_host = oracle.random_array(rng, (3, 6, 4, 2, 5), np.float16)
    v_host = oracle.random_array(rng, (6, 3, 4, 2, v_dim), np.float16).swapaxes(0, 1)
    k_cache, v_cache = device.array(k_host), device.array(v_host.swapaxes(0, 1)).swapaxes(0, 1)
    keys = oracle.random_array(rng, (6, 3, 2, 5), np.float16).swapaxes(0, 1)
    values = oracle.random_array(rng, (3, 6, 2, v_dim), np.float16)
    on_device = device.array(keys.swapaxes(0, 1)).swapaxes(0, 1)
    reshape_and_cache(on_device, device.array(values), k_cache, v_cache, SLOTS)
    for layer in range(3):
        oracle.scatter(keys[layer], k_host[layer], SLOTS)
        oracle.scatter(values[layer], v_host[layer], SLOTS)
    assert device.numpy(k_cache).tobytes() == k_host.tobytes()
    assert device.numpy(v_cache).tobytes() == v_host.tobytes()

    out_k = device.array(np.zeros((16, 3, 2, 5), np.float16)).swapaxes(0, 1)
    out_v = device.array(np.zeros((3, 16, 2, v_dim), np.float16))
    gather_cache(k_cache, v_cache, TABLES, LENS, seq_starts=STARTS, out=(out_k, out_v))
    for layer in range(3):
        for out, pool in ((out_k, k_host), (out_v, v_host)):
            expected = oracle.gather(pool[layer], TABLES, LENS, STARTS)
            assert device.numpy(out[layer]).tobytes() == expected.tobytes()


def test_one_launch_for_all_layers(rng, launches):
    cache, _ = filled(Device("emulated", np), rng, np.float16)
    keys = oracle.random_array(rng, (3, 6, 2, 5), np.float16)
    cache.update_all(keys, keys, SLOTS)
    cache.gather_all(TABLES, LENS)
    assert [(name, grid[1:]) for name, grid in launches] == [("reshape_and_cache", (2, 3)), ("gather_cache", (2, 3))]


def test_nothing_to_do(device, rng):
    cache, pools = filled(device, rng, np.float16)
    empty = device.array(np.empty((3, 0, 2, 5), np.float16))
    cache.update_all(empty, empty, [])
    assert [array.shape for array in cache.gather_all(TABLES, [0, 0, 0])] == [(3, 0, 2, 5)] * 2
    assert bytes_of(device, cache) == pools.tobytes()


def test_what_is_refused(device, rng):
    cache, pools = filled(device, rng, np.float16)
    xp = device.xp
    tokens = xp.zeros((3, 6, 2, 5), np.float16)
    for wrong in (tokens[:2], tokens[0], tokens[None], tokens[:, :, :1], tokens[..., :4]):
        with pytest.raises(ValueError, match=r"^values must be \[3, num_tokens, 2, 5\], as v_cache is"):
            cache.update_all(tokens, wrong, SLOTS)
        with pytest.raises(ValueError, match=r"out\[0\] must be \[3, num_tokens, 2, 5\], as k_cache is"):
            cache.gather_all(TABLES, LENS, out=(wrong, tokens))
        with pytest.raises(ValueError, match=r"^keys must be \[3, num_tokens, 2, 5\], as k_cache is"):
            cache.update_all(wrong, tokens, SLOTS)
    with pytest.raises(ValueError, match="^keys and values must have as many tokens as each other, got 6 and 5"):
        cache.update_all(tokens, tokens[:, :5], SLOTS)
    with pytest.raises(TypeError, match="^keys must have the dtype of k_cache, float16, got float32"):
        cache.update_all(xp.zeros((3, 6, 2, 5), np.float32), tokens, SLOTS)
    with pytest.raises(TypeError, match="^values must be a NumPy or CuPy array, or speak DLPack, got list"):
        cache.update_all(tokens, [], SLOTS)
    with pytest.raises(ValueError, match="slot_mapping must have one entry for each of 6 tokens, got 3"):
        cache.update_all(tokens, tokens, [0, 1, 2])
    layers = xp.zeros((3, 4, 8, 2, 5), np.float16)
    with pytest.raises(ValueError, match="must agree in all axes but head_dim"):
        reshape_and_cache(tokens, tokens, layers, layers[:2], SLOTS)
    with pytest.raises(ValueError, match="or have one more axis before these, of layers"):
        gather_cache(layers[None], layers[None], TABLES, LENS)
    assert bytes_of(device, cache) == pools.tobytes()
