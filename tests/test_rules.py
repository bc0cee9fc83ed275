"""What is refused, on every device, and that a refusal leaves everything as it was."""

import os
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest

import cupy_pagedkv.devices.backend as backend
from cupy_pagedkv import PagedKVCache, copy_blocks, gather_cache, reshape_and_cache
from cupy_pagedkv.bookkeeping.dtypes import as_dtype


@pytest.fixture
def scene(device, rng):
    """Good arguments for both operations, which a test spoils, and the buffer that must stay as it is."""
    size, views = oracle.pools("NHD", 4, 8, 2, 4, np.float16)
    before = oracle.random_bytes(rng, size)
    buffer = device.array(before)
    k_cache, v_cache = views(buffer)
    key = device.array(oracle.random_array(rng, (3, 2, 4), np.float16))
    scatter: dict[str, Any] = {
        "key": key,
        "value": key,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slot_mapping": [1, 5, 9],
    }
    out = device.array(np.zeros((2, 5, 2, 4), np.float16))
    gather: dict[str, Any] = {
        "k_cache": k_cache, "v_cache": v_cache, "block_tables": [[0, 1], [2, -1]], "seq_lens": [9, 2],
        "seq_starts": [6, 0], "out": (out[0], out[1]),
    }  # fmt: skip
    yield device, scatter, gather
    assert np.array_equal(device.numpy(buffer), before)
    assert not device.numpy(out).any()


def refused(call: Any, arguments: dict[str, Any], error: type, message: str, **spoiled: Any) -> None:
    with pytest.raises(error, match=message):
        call(**{**arguments, **spoiled})


def test_the_scene_itself_is_fine(device, rng):
    key = device.array(oracle.random_array(rng, (3, 2, 4), np.float16))
    cache = PagedKVCache(4, 8, 2, 4, np.float16, device.of_caches)
    cache.update(key, key, [1, 5, 9])
    out = device.array(np.zeros((2, 5, 2, 4), np.float16))
    cache.gather([[0, 1], [2, -1]], [9, 2], seq_starts=[6, 0], out=(out[0], out[1]))


def test_masked_arrays_are_refused_by_name(scene):
    """Their mask would be lost in a pool; in indices it hides nothing."""
    device, scatter, gather = scene
    if device.name == "cupy":
        pytest.skip("masked arrays are NumPy's")

    def masked(array: np.ndarray) -> Any:
        return np.ma.array(array, mask=np.ones(array.shape, bool))

    for name in ("key", "value", "k_cache", "v_cache"):
        message = rf"{name} must not be a masked array.*give {name}\.data or {name}\.filled\(0\)"
        refused(reshape_and_cache, scatter, TypeError, message, **{name: masked(scatter[name])})
    for name in ("k_cache", "v_cache"):
        message = f"{name} must not be a masked array"
        refused(gather_cache, gather, TypeError, message, **{name: masked(gather[name])})
        refused(copy_blocks, {**gather_pools(gather), "src": [0], "dst": [1]}, TypeError, message,
                **{name: masked(gather[name])})  # fmt: skip
    key, value = gather["out"]
    refused(gather_cache, gather, TypeError, r"out\[1\] must not be a masked array", out=(key, masked(value)))
    with pytest.raises(TypeError, match="v_cache must not be a masked array"):
        PagedKVCache.from_pools(scatter["k_cache"], masked(scatter["v_cache"]))


def gather_pools(gather: dict[str, Any]) -> dict[str, Any]:
    return {name: gather[name] for name in ("k_cache", "v_cache")}


def test_a_memory_map_is_an_array(device, tmp_path):
    if device.name == "cupy":
        pytest.skip("memory maps are NumPy's")
    key = np.memmap(tmp_path / "key", np.uint8, "w+", shape=(3, 1, 4))
    key[...] = 7
    cache = PagedKVCache(2, 4, 1, 4, np.uint8, "cpu")
    cache.update(key, key, [0, 1, 5])
    assert cache.k_cache[..., 0, 0].tolist() == [[7, 7, 0, 0], [0, 7, 0, 0]]


def test_shapes_and_ranks(scene):
    device, scatter, gather = scene
    zeros = device.xp.zeros
    f16 = np.float16
    for name in ("key", "value"):
        for shape in [(3, 8), (3, 2, 4, 1), (3, 4, 2), (3, 2, 5), (3, 1, 4)]:
            refused(reshape_and_cache, scatter, ValueError, rf"{name} must be \[num_tokens, 2, 4\].*got ",
                    **{name: zeros(shape, f16)})  # fmt: skip
        refused(reshape_and_cache, scatter, ValueError, "key and value must have as many tokens as each other, got",
                **{name: zeros((2, 2, 4), f16)})  # fmt: skip
    for call, arguments in ((reshape_and_cache, scatter), (gather_cache, gather)):
        for name in ("k_cache", "v_cache"):
            refused(call, arguments, ValueError, f"{name} must be .num_blocks", **{name: zeros((4, 8, 8), f16)})
            refused(call, arguments, ValueError, f"{name} must be .num_blocks", **{name: zeros((0, 8, 2, 4), f16)})
        refused(call, arguments, ValueError, "must agree in all axes but head_dim", v_cache=zeros((4, 4, 2, 4), f16))
        refused(call, arguments, ValueError, "must agree in all axes but head_dim", v_cache=zeros((5, 8, 2, 4), f16))
    refused(reshape_and_cache, scatter, ValueError, r"one axis|1 axis", slot_mapping=[[1, 5, 9]])
    refused(reshape_and_cache, scatter, ValueError, "one entry for each of 3 tokens, got 2", slot_mapping=[1, 5])
    refused(reshape_and_cache, scatter, ValueError, "one entry for each of 3 tokens, got 0", slot_mapping=[])
    refused(gather_cache, gather, ValueError, "block_tables must have 2 axes", block_tables=[0, 1])
    refused(gather_cache, gather, ValueError, "rows of one length", block_tables=[[0, 1], [2]])
    refused(gather_cache, gather, ValueError, "block_tables must have one entry for each of 2", block_tables=[[0, 1]])
    refused(gather_cache, gather, ValueError, "seq_starts must have one entry for each of 2", seq_starts=[0])
    refused(gather_cache, gather, ValueError, "seq_lens must have 1 axis", seq_lens=[[9, 2]])
    out = gather["out"]
    refused(gather_cache, gather, ValueError, r"out\[1\] must be", out=(out[0], zeros((5, 2, 5), f16)))
    refused(
        gather_cache,
        gather,
        ValueError,
        "as many tokens as each other, got 5 and 6",
        out=(out[0], zeros((6, 2, 4), f16)),
    )
    refused(gather_cache, gather, ValueError, "out has 4 rows, but the sequences have 5", out=(out[0][:4], out[1][:4]))


def test_dtypes(scene):
    device, scatter, gather = scene
    other = device.array(np.zeros((3, 2, 4), np.uint16))
    for name in ("key", "value"):
        refused(
            reshape_and_cache, scatter, TypeError, "must have the dtype of .*, float16, got uint16", **{name: other}
        )
    refused(reshape_and_cache, scatter, TypeError, "got float64", slot_mapping=[1.0, 2.0, 3.0])
    refused(reshape_and_cache, scatter, TypeError, "got bool", slot_mapping=[True, False, True])
    for dtype in (np.float32, np.int16, np.uint32, np.uint64):
        refused(reshape_and_cache, scatter, TypeError, f"must be int32 or int64, got {np.dtype(dtype)}",
                slot_mapping=np.array([1, 2, 3], dtype))  # fmt: skip
        refused(reshape_and_cache, scatter, TypeError, f"must be int32 or int64, got {np.dtype(dtype)}",
                slot_mapping=device.array(np.array([1, 2, 3], dtype)))  # fmt: skip
        refused(gather_cache, gather, TypeError, "seq_lens must be int32 or int64", seq_lens=np.array([9, 2], dtype))
    refused(reshape_and_cache, scatter, TypeError, "got >i4", slot_mapping=np.array([1, 2, 3], ">i4"))
    refused(reshape_and_cache, scatter, TypeError, "got object", slot_mapping=[1, 2, None])
    refused(reshape_and_cache, scatter, TypeError, "got object|got uint64", slot_mapping=[1, 2, 2**64])
    wide = device.xp.zeros((5, 2, 4), np.float32)
    refused(gather_cache, gather, TypeError, r"out\[0\] must have the dtype", out=(wide, gather["out"][1]))


def test_things_that_are_no_arrays(scene):
    _, scatter, gather = scene
    for name in ("key", "value", "k_cache", "v_cache"):
        refused(
            reshape_and_cache,
            scatter,
            TypeError,
            f"{name} must be .*, or speak DLPack, got list",
            **{name: [1]},
        )
    refused(
        gather_cache,
        gather,
        TypeError,
        "k_cache must be .*, or speak DLPack, got NoneType",
        k_cache=None,
    )
    refused(gather_cache, gather, TypeError, "out must be a tuple", out=[*gather["out"]])
    refused(gather_cache, gather, TypeError, "out must be a tuple", out=gather["out"][0])
    three = (*gather["out"], 1)
    refused(gather_cache, gather, TypeError, r"must be a tuple \(key, value\), got tuple", out=three)
    refused(reshape_and_cache, scatter, TypeError, "slot_mapping must be int32 or int64", slot_mapping="159")


def test_items_of_no_size(scene):
    device, scatter, _ = scene
    if device.name == "cupy":
        pytest.skip("CuPy has no such dtype")
    key, pool = np.zeros((3, 2, 4), np.dtype([])), np.zeros((4, 8, 2, 4), np.dtype([]))
    spoiled = {"key": key, "value": key, "k_cache": pool, "v_cache": pool}
    refused(reshape_and_cache, scatter, TypeError, "items of one fixed size", **spoiled)


def test_blocks_too_large_for_the_kernels(kernel_device):
    pool = kernel_device.xp.zeros(1, np.uint8)
    pool = kernel_device.xp.lib.stride_tricks.as_strided(pool, (1, 1, 1, 2**30 + 1), (1, 1, 1, 1))
    with pytest.raises(ValueError, match="a block of K or V must have at most 1073741824 bytes here, got block_size 1"):
        reshape_and_cache(pool[0], pool[0], pool, pool, [0])


def test_pools_need_a_contiguous_last_axis(scene):
    device, scatter, gather = scene
    pool = device.xp.zeros((4, 8, 4, 2), np.float16).transpose(0, 1, 3, 2)
    for call, arguments in ((reshape_and_cache, scatter), (gather_cache, gather)):
        refused(call, arguments, ValueError, "the last axis of k_cache must be contiguous", k_cache=pool)


def test_many_indices_are_checked_as_few_are(debug, rng):
    """More than are looked through one by one."""
    size, views = oracle.pools("NHD", 40, 8, 2, 4, np.float16)
    before = oracle.random_bytes(rng, size)
    buffer = debug.array(before)
    pools = views(buffer)
    key = debug.array(oracle.random_array(rng, (100, 2, 4), np.float16))
    slots = rng.permutation(320)[:100]
    slots[77] = 320
    with pytest.raises(IndexError, match=r"slot_mapping\[77\] is 320"):
        reshape_and_cache(key, key, *pools, slots)
    assert np.array_equal(debug.numpy(buffer), before)
    tables = rng.integers(0, 40, (100, 2), np.int32)
    out = debug.array(np.zeros((2, 1600, 2, 4), np.float16))
    lens = np.full(100, 16, np.int32)
    for entry in (-1, 40):
        wrong = tables.copy()
        wrong[70, 1] = entry
        with pytest.raises(IndexError, match=rf"block_tables\[70, 1\] is {entry}"):
            gather_cache(*pools, wrong, lens, out=(out[0], out[1]))
    for length in (-1, 17):
        wrong = lens.copy()
        wrong[70] = length
        with pytest.raises(ValueError, match=f"sequence 70 has seq_starts 0 and seq_lens {length}"):
            gather_cache(*pools, tables, wrong, out=(out[0], out[1]))
    assert not debug.numpy(out).any()


def test_lengths_are_checked_before_anything_is_written(scene):
    _, _, gather = scene
    message = r"0 <= seq_starts <= seq_lens <= 16 must hold.* sequence 1 has seq_starts {} and seq_lens {}"
    refused(gather_cache, gather, ValueError, message.format(0, 17), seq_lens=[9, 17])
    refused(gather_cache, gather, ValueError, message.format(0, -2), seq_lens=[9, -2])
    refused(gather_cache, gather, ValueError, message.format(3, 2), seq_starts=[6, 3])
    refused(gather_cache, gather, ValueError, message.format(-1, 2), seq_starts=[6, -1])


def test_read_only_arrays(rng, monkeypatch):
    """NumPy's alone: CuPy knows no read-only arrays."""
    cache = PagedKVCache(4, 8, 2, 4, np.float16, "cpu")
    key = np.zeros((1, 2, 4), np.float16)
    key.flags.writeable = False
    cache.update(key, key, [0])  # inputs may be
    cache.v_cache.flags.writeable = False
    cache.gather([[0]], [1])  # the pools, too, when they are read
    with pytest.raises(ValueError, match="v_cache must be writeable"):
        cache.update(key, key, [0])
    with pytest.raises(ValueError, match=r"out\[1\] must be writeable"):
        cache.gather([[0]], [1], out=(key.copy(), key))


def test_numpy_is_not_mixed_with_cupy(device):
    if device.name != "cupy":
        pytest.skip("both kinds of arrays are needed; the next test shows the rule with a stand-in")
    ours, theirs = device.xp.zeros((1, 2, 4), np.float16), np.zeros((1, 2, 4), np.float16)
    pools = np.zeros((2, 4, 8, 2, 4), np.float16)
    for key, value in ((ours, theirs), (theirs, ours), (ours, ours)):
        with pytest.raises(TypeError, match="NumPy and CuPy arrays cannot be mixed in one call: key is "):
            reshape_and_cache(key, value, *pools, [0])
    with pytest.raises(TypeError, match="slot_mapping must be"):
        reshape_and_cache(theirs, theirs, *pools, device.array(np.array([0])))


class FakeGpu:
    """Like `cupy.cuda.Device`, which can be compared but not hashed."""

    __hash__ = None

    def __init__(self, number: int) -> None:
        self.id = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeGpu) and self.id == other.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"


class FakeMemory:
    def __init__(self, device_id: int) -> None:
        self.device_id = device_id


@pytest.fixture
def fake_cupy(monkeypatch):
    """CuPy's array type alone, which is all that telling arrays apart needs."""
    module: Any = type(sys)("cupy")
    module.ndarray = type("ndarray", (), {"__module__": "cupy", "device": FakeGpu(0), "data": FakeMemory(0)})
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_mixtures_by_a_stand_in_for_cupy(fake_cupy):
    ours, theirs = np.zeros((1, 2, 4), np.float16), fake_cupy.ndarray()
    message = "cannot be mixed in one call: key is numpy.ndarray, value is cupy.ndarray, k_cache is numpy.ndarray"
    with pytest.raises(TypeError, match=message):
        reshape_and_cache(ours, theirs, ours, ours, [0])
    with pytest.raises(TypeError, match="slot_mapping must be int32 or int64"):
        reshape_and_cache(ours, ours, *np.zeros((2, 4, 8, 2, 4), np.float16), theirs)


def test_two_gpus_are_not_mixed(fake_cupy):
    a, b = fake_cupy.ndarray(), fake_cupy.ndarray()
    b.device, b.data = FakeGpu(1), FakeMemory(1)
    with pytest.raises(ValueError, match="must be on one GPU, got key on <CUDA Device 0>, value on <CUDA Device 1>"):
        reshape_and_cache(a, b, a, a, [0])


# The choice of a device


def test_names_of_devices(monkeypatch):
    monkeypatch.setattr(backend, "EMULATE", False)
    cache = PagedKVCache(4, 8, 2, 4, np.float16, "cpu")
    assert cache.device == "cpu"
    for name in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", 0):
        with pytest.raises(ValueError, match="device must be None, 'cpu', 'cuda' or 'cuda:N', got "):
            PagedKVCache(4, 8, 2, 4, np.float16, name)  # type: ignore[arg-type]


def test_a_gpu_that_is_not_there_is_an_error_and_none_is_a_fallback(monkeypatch):
    monkeypatch.setattr(backend, "_usable_gpus", lambda: (0, "CuPy sees no GPU"))
    for name in ("cuda", "cuda:0", "cuda:1"):
        with pytest.raises(RuntimeError, match=f"device '{name}' was asked for, but CuPy sees no GPU; device='cpu'"):
            PagedKVCache(4, 8, 2, 4, np.float16, name)
    assert PagedKVCache(4, 8, 2, 4, np.float16).device == "cpu"


def test_the_number_of_a_gpu(device):
    if device.name != "cupy":
        pytest.skip("numbers of GPUs are CuPy's")
    assert PagedKVCache(4, 8, 2, 4, np.float16, "cuda:0").device == "cuda:0"
    with pytest.raises(ValueError, match="CuPy sees"):
        PagedKVCache(4, 8, 2, 4, np.float16, "cuda:99")


def test_environment_is_read_at_import():
    program = (
        "import numpy as np, cupy_pagedkv.devices.backend as b; "
        "print(b.EMULATE, b.DEBUG, type(b.backend_of(('x',), np.zeros(1))).__name__, b.backend_on(None)[1])"
    )
    for emulate, debug, expected in [
        ("1", "0", "True False EmulatedBackend cpu"),
        ("0", "1", "False True NumpyBackend"),
    ]:
        environment = {**os.environ, "CUPY_PAGEDKV_EMULATE": emulate, "CUPY_PAGEDKV_DEBUG": debug}
        run = subprocess.run([sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True,
                             text=True, check=True)  # fmt: skip
        assert run.stdout.startswith(expected)
        assert run.stderr == ""


def test_environment_takes_no_other_value():
    environment = {**os.environ, "CUPY_PAGEDKV_DEBUG": "true"}
    command = [sys.executable, "-c", "import cupy_pagedkv"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "ValueError: the environment variable CUPY_PAGEDKV_DEBUG must be 1 or 0, got 'true'" in run.stderr


def test_import_loads_neither_cupy_nor_a_compiler():
    program = "import sys, cupy_pagedkv; print({'cupy', 'cupy_pagedkv.emulator', 'ml_dtypes'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


# dtypes


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_ml_dtypes_by_name(name):
    assert as_dtype(name) == np.dtype(getattr(ml_dtypes, name))


@pytest.mark.parametrize(
    "dtype", ["object", "S", "V0", "(2,)f4", "finfo", "no_such", "i4,,", [], 7, np.dtypes.StringDType()]
)
def test_dtypes_without_items_of_one_size(dtype):
    with pytest.raises(TypeError, match="expected a dtype"):
        as_dtype(dtype)


def test_without_ml_dtypes_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match="need the package ml_dtypes"):
        as_dtype("float8_no_such_name")
