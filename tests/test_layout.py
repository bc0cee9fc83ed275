"""What is remembered of a call: everything that its shapes fix, and nothing that they do not."""

import numpy as np
import oracle
import pytest

import cupy_pagedkv.devices.backend as backend
from cupy_pagedkv import PagedKVCache, gather_cache, reshape_and_cache
from cupy_pagedkv.devices.emulated_backend import EmulatedBackend


@pytest.fixture
def plans(monkeypatch):
    """The emulated device, new, and what it has planned so far: kernels by name."""
    made = []

    class Counting(EmulatedBackend):
        def _make_plan(self, name, *arguments):
            made.append(name)
            return super()._make_plan(name, *arguments)

    instance = Counting()
    monkeypatch.setattr(backend, "EMULATE", True)
    monkeypatch.setattr(backend, "_emulated", lambda: instance)
    return made


def test_a_call_of_the_same_shapes_plans_nothing_anew(plans):
    cache = PagedKVCache(4, 8, 2, 4, np.float16, "cpu")
    for slot in range(5):
        key = np.full((1, 2, 4), slot + 1, np.float16)
        cache.update(key, key.copy(), [slot])
        out = np.empty_like(key), np.empty_like(key)
        k, _ = cache.gather(np.array([[0]]), np.array([slot + 1]), seq_starts=np.array([slot]), out=out)
        assert (k == slot + 1).all()
    assert sorted(plans) == ["gather_cache", "reshape_and_cache"]


def test_what_differs_is_planned_anew(plans, rng):
    """Each call has one thing that the one before has not, and both have to be right afterwards."""
    memory = oracle.random_bytes(rng, 4 * 8 * 2 * 8 * 2)
    tokens = oracle.random_bytes(rng, 2 * 2 * 8 * 2 + 1)
    calls = [
        (tokens[:-1].view(np.float16).reshape(2, 2, 8), memory.view(np.float16).reshape(4, 8, 2, 8)),
        (tokens[:-1].view(np.int16).reshape(2, 2, 8), memory.view(np.int16).reshape(4, 8, 2, 8)),  # the same kernel
        (tokens[:-1].view(np.float16).reshape(2, 8, 2).swapaxes(1, 2), memory.view(np.float16).reshape(4, 8, 2, 8)),
        (tokens[:-1].view(np.float16).reshape(2, 2, 8), memory.view(np.float16).reshape(4, 2, 8, 8).swapaxes(1, 2)),
        (tokens[:-1].view(np.float16).reshape(2, 2, 8), memory.view(np.float16).reshape(8, 4, 2, 8)),
        (tokens[1:].view(np.float16).reshape(2, 2, 8), memory.view(np.float16).reshape(4, 8, 2, 8)),  # misaligned
    ]
    for _ in range(2):
        for key, pool in calls:
            before = memory.copy()
            reshape_and_cache(key, key, pool, pool, [5, 30])
            after = memory.copy()
            memory[:] = before
            oracle.scatter(key, pool, [5, 30])
            assert np.array_equal(after, memory)
    assert plans == ["reshape_and_cache"] * len(calls)


def test_a_refusal_is_not_forgotten():
    """What raises is not remembered as checked."""
    pool, key = np.zeros((4, 8, 2, 4), np.float16), np.zeros((3, 2, 5), np.float16)
    for _ in range(3):
        with pytest.raises(ValueError, match=r"key must be \[num_tokens, 2, 4\]"):
            reshape_and_cache(key, key, pool, pool, [0, 1, 2])
        with pytest.raises(ValueError, match=r"out\[0\] must be \[num_tokens, 2, 4\]"):
            gather_cache(pool, pool, [[0]], [3], out=(key, key))


def test_read_only_is_no_part_of_a_layout(device, rng):
    if device.name == "cupy":
        pytest.skip("CuPy has no read-only arrays")
    pool = np.zeros((2, 4, 8, 2, 4), np.float16)
    key = oracle.random_array(rng, (1, 2, 4), np.float16)
    reshape_and_cache(key, key, *pool, [0])
    before = pool.copy()
    locked = pool.view()
    locked.flags.writeable = False
    for k_cache, v_cache, name in ((locked[0], pool[1], "k_cache"), (pool[0], locked[1], "v_cache")):
        with pytest.raises(ValueError, match=f"{name} must be writeable"):
            reshape_and_cache(key, key, k_cache, v_cache, [1])
    assert pool.tobytes() == before.tobytes()
    out = np.zeros((2, 1, 2, 4), np.float16)
    gather_cache(locked[0], locked[1], [[0]], [1], out=(out[0], out[1]))
    assert out[0].tobytes() == key.tobytes()
    locked = out.view()
    locked.flags.writeable = False
    for pair, name in (((locked[0], out[1]), r"out\[0\]"), ((out[0], locked[1]), r"out\[1\]")):
        with pytest.raises(ValueError, match=f"{name} must be writeable"):
            gather_cache(pool[0], pool[1], [[0]], [1], out=pair)


@pytest.fixture
def defined(monkeypatch):
    """Scatters, and returns what the kernel is specialised on."""
    made = []

    class Recording(EmulatedBackend):
        def _build_kernel(self, name, defines):
            made.append(dict(defines))
            return lambda grid, block, arguments: None

    monkeypatch.setattr(backend, "EMULATE", True)

    def defines_of(tokens, pool):
        monkeypatch.setattr(backend, "_emulated", lambda: instance)
        instance = Recording()
        reshape_and_cache(tokens, tokens, pool, pool, [0])
        return made.pop()

    return defines_of


def test_the_common_row_is_one_run_of_the_widest_access(defined):
    for heads, dim, run in ((8, 128, 128), (1, 576, 72), (8, 46, 46)):
        defines = defined(np.zeros((1, heads, dim), np.float16), np.zeros((4, 16, heads, dim), np.float16))
        assert (defines["ACCESS_T"], defines["K_HEADS"], defines["K_RUNS"], defines["K_RUN"]) == ("uint4", 1, 1, run)
    hnd = np.zeros((4, 8, 16, 46), np.float16).transpose(0, 2, 1, 3)
    defines = defined(np.zeros((1, 8, 46), np.float16), hnd)
    assert (defines["ACCESS_T"], defines["K_HEADS"], defines["K_RUNS"], defines["K_RUN"]) == ("unsigned int", 8, 1, 23)


def test_every_stride_that_is_walked_limits_the_access_and_no_other(defined):
    """Rows of 64 bytes at aligned addresses; one stride at a time is moved off 16."""
    as_strided = np.lib.stride_tricks.as_strided
    memory = np.zeros(4096, np.uint64).view(np.uint8)
    pool_shape = (2, 3, 4, 2, 32)
    token_strides, pool_strides = (192, 64, 32, 1), (768, 256, 64, 32, 1)

    def access(token_strides, pool_strides, token_shape, pool_shape=pool_shape):
        tokens = as_strided(memory[: memory.size // 2], token_shape, token_strides)
        pool = as_strided(memory[memory.size // 2 :], pool_shape, pool_strides)
        return defined(tokens, pool)["ACCESS_T"]

    def moved(strides, axis):
        return tuple(s + 8 * (i == axis) for i, s in enumerate(strides))

    one = (2, 1, 2, 32)  # `defined` scatters one token: the stride between tokens is not walked
    assert access(token_strides, pool_strides, one) == "uint4"
    for axis, expected in enumerate(["uint2", "uint4", "uint2"]):
        assert access(moved(token_strides, axis), pool_strides, one) == expected, f"tokens, axis {axis}"
    for axis in range(4):
        assert access(token_strides, moved(pool_strides, axis), one) == "uint2", f"pool, axis {axis}"
        single = tuple(1 if i == axis else n for i, n in enumerate(pool_shape))
        shape = (single[0], 1, single[3], 32)
        assert access(token_strides, moved(pool_strides, axis), shape, single) == "uint4", f"pool, axis {axis} of 1"
