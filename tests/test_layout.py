"""What is remembered of a call: everything that its shapes fix, and nothing that they do not."""

import numpy as np
import oracle
import pytest

import cupy_pagedkv.backend as backend
from cupy_pagedkv import PagedKVCache, gather_cache, reshape_and_cache
from cupy_pagedkv.emulator import EmulatedBackend


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
