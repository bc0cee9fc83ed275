"""One address of one array that allows less than all others: each access is as narrow as the narrowest of them needs.

On a GPU a wider one is a fault; the emulated device stops at it, too.
"""

from typing import Any

import numpy as np
import oracle
import pytest

from cupy_pagedkv import copy_blocks, gather_cache, reshape_and_cache

LAYERS, BLOCKS, SLOTS, HEADS, DIM, TOKENS = 2, 5, 4, 3, 16, 9
TOKEN_SHAPE, POOL_SHAPE = (LAYERS, TOKENS, HEADS, DIM), (LAYERS, BLOCKS, SLOTS, HEADS, DIM)
SHAPES = {"key": TOKEN_SHAPE, "value": TOKEN_SHAPE, "k_cache": POOL_SHAPE, "v_cache": POOL_SHAPE}
AXES = {"key": ("layer", "token", "head"), "k_cache": ("layer", "block", "slot", "head")}
AXES.update(value=AXES["key"], v_cache=AXES["k_cache"])
PLACES = [(name, place) for name in SHAPES for place in ("base", *AXES[name])]


class Memory:
    """Bytes, and an array in them: all its strides are multiples of 16, but for what is said to be less."""

    def __init__(self, device: Any, rng: np.random.Generator, name: str, weak: str | None, amount: int) -> None:
        self.shape, self.offset, strides, step = SHAPES[name], amount if weak == "base" else 0, [1], DIM
        for axis in reversed(range(len(self.shape) - 1)):
            strides.insert(0, step + 16 + (amount if weak == AXES[name][axis] else 0))
            step = -(-strides[0] * self.shape[axis] // 16) * 16
        self.strides = strides
        host = rng.integers(0, 256, step + 64, dtype=np.uint8)
        self.host = np.empty(len(host) + 16, np.uint8)
        self.host = self.host[-self.host.ctypes.data % 16 :][: len(host)]
        self.host[:] = host
        if device.name == "cupy":
            self.bytes = device.array(host)
        else:
            self.bytes = np.empty(len(host) + 16, np.uint8)
            self.bytes = self.bytes[-self.bytes.ctypes.data % 16 :][: len(host)]
            self.bytes[:] = host
        self.array = device.xp.lib.stride_tricks.as_strided(self.bytes[self.offset :], self.shape, strides)
        self.expected = np.lib.stride_tricks.as_strided(self.host[self.offset :], self.shape, strides)


@pytest.fixture(params=[1, 2, 4, 8])
def amount(request):
    return request.param


@pytest.fixture(params=PLACES, ids="-".join)
def memories(request, device, rng, amount):
    weak, place = request.param
    return {name: Memory(device, rng, name, place if name == weak else None, amount) for name in SHAPES}


def check(device: Any, memories: dict[str, Memory]) -> None:
    for name, memory in memories.items():
        assert device.numpy(memory.bytes).tobytes() == memory.host.tobytes(), name


def test_scatter(device, rng, memories):
    slots = rng.permutation(BLOCKS * SLOTS)[:TOKENS]
    reshape_and_cache(*(memory.array for memory in memories.values()), device.array(slots))
    for tokens, pool in (("key", "k_cache"), ("value", "v_cache")):
        for layer in range(LAYERS):
            oracle.scatter(memories[tokens].expected[layer], memories[pool].expected[layer], slots)
    check(device, memories)


def test_gather(device, rng, memories):
    tables, lens = rng.permutation(BLOCKS)[:4].reshape(2, 2), [6, 3]
    key, value, k_cache, v_cache = (memory.array for memory in memories.values())
    gather_cache(k_cache, v_cache, tables, lens, out=(key, value))
    for tokens, pool in (("key", "k_cache"), ("value", "v_cache")):
        for layer in range(LAYERS):
            rows = oracle.gather(memories[pool].expected[layer], tables, lens, [0, 0])
            oracle.opaque(memories[tokens].expected)[layer, : len(rows)] = rows
    check(device, memories)


def test_copy_blocks(device, rng, memories):
    src, dst = rng.permutation(BLOCKS)[:4].reshape(2, 2)
    copy_blocks(memories["k_cache"].array, memories["v_cache"].array, src, dst)
    for pool in ("k_cache", "v_cache"):
        for layer in range(LAYERS):
            blocks = memories[pool].expected[layer]
            blocks[dst] = blocks[src]
    check(device, memories)


def test_a_call_on_aligned_arrays_is_the_widest(device, rng, monkeypatch):
    """Or the tests above would show nothing."""
    if device.name != "emulated":
        pytest.skip("the kernel's parameters are looked at on the emulated device")
    from cupy_pagedkv.devices.emulated_backend import EmulatedBackend

    made = []
    monkeypatch.setattr(EmulatedBackend, "_build_kernel", lambda self, name, defines: made.append(dict(defines)))
    monkeypatch.setattr("cupy_pagedkv.devices.backend._emulated", EmulatedBackend)
    arrays = [Memory(device, rng, name, None, 1).array for name in SHAPES]
    with pytest.raises(TypeError, match="not callable"):
        reshape_and_cache(*arrays, np.arange(TOKENS))
    assert [defines["ACCESS_T"] for defines in made] == ["uint4"]
