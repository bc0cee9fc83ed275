"""Attention by NumPy: its own conversions, memory, threads and products; what it computes is tested on every device."""

import math
import os
import threading
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest

import cupy_pagedkv.devices.backend as backend
import cupy_pagedkv.devices.numpy_attention as numpy_attention
import cupy_pagedkv.devices.threads as threads
from cupy_pagedkv import paged_attention

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
TOLERANCES = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-5}


@pytest.fixture(autouse=True)
def on_numpy(monkeypatch):
    monkeypatch.setattr(backend, "EMULATE", False)


@pytest.fixture
def many_threads(monkeypatch):
    """As if little were worth several threads; with helpers even on a machine of one core."""
    monkeypatch.setattr(threads, "SHARED_BYTES", 300)
    monkeypatch.setattr(threads, "_HEAD_START", 20)
    monkeypatch.setattr(threads, "_LARGEST_JOB", 200)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)
    threads._helpers.reset()
    yield
    threads._helpers.reset()


def batch(
    rng: np.random.Generator,
    lens: Sequence[tuple[int, int]],
    dtype: Any = np.float32,
    heads: int = 2,
    group: int = 4,
    dim: int = 32,
    block_size: int = 8,
) -> dict[str, Any]:
    """Arguments; ``lens`` are (new tokens, all tokens). What belongs to no sequence is NaN, or no block."""
    needed = [-(-n // block_size) for _, n in lens]
    blocks = rng.permutation(sum(needed) + 3)
    pools = np.full((2, len(blocks), block_size, heads, dim), np.nan, np.float32)
    tables = np.full((len(lens), max(needed) + 1), -1, np.int32)
    for row, (_, n), count in zip(tables, lens, needed, strict=True):
        row[:count], blocks = blocks[:count], blocks[count:]
        for p in range(n):
            pools[:, row[p // block_size], p % block_size] = rng.standard_normal((2, heads, dim))
    ends = np.cumsum([0, *(n for n, _ in lens)])
    return {
        "query": rng.standard_normal((ends[-1], heads * group, dim)).astype(dtype),
        "k_cache": pools[0].astype(dtype),
        "v_cache": pools[1].astype(dtype),
        "block_tables": tables,
        "seq_lens": np.array([n for _, n in lens]),
        "cu_seqlens_q": ends,
    }


def check(arguments: dict[str, Any], **options: Any) -> None:
    out, lse = paged_attention(**arguments, **options, return_lse=True)
    expected, expected_lse = oracle.attention(**arguments, **options)
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=TOLERANCES[out.dtype.name], rtol=1e-2)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


def test_every_float16():
    bits = np.arange(2**16, dtype=np.uint16).view(np.int16)
    expected = bits.view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        for some in (np.arange(2**16), np.flatnonzero(np.isfinite(expected))):
            numbers = np.empty(len(some), np.float32)
            numbers.view(np.int32)[...] = bits[some]
            numpy_attention._widen(numbers)
            assert np.array_equal(numbers, expected[some], equal_nan=True)
            assert np.array_equal(np.signbit(numbers)[numbers == 0], np.signbit(expected[some])[numbers == 0])
        numpy_attention._widen(np.empty((0, 3), np.float32))


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", ["k_cache", "v_cache"])
def test_what_is_not_finite_reaches_who_sees_it_and_nobody_else(rng, odd, dtype, pool):
    """A prefill, whose later tokens see it, and sequences that attend together, of which one has it in its tail."""
    arguments = batch(rng, [(9, 21), (1, 13), (1, 14), (1, 15)], dtype)
    clean = paged_attention(**arguments)
    arguments[pool] = arguments[pool].copy()
    arguments[pool][arguments["block_tables"][0, 2], 0, 1, 0] = odd  # position 16; the first query stands at 12
    arguments[pool][arguments["block_tables"][1, 1], 5] = odd  # position 13 of 13
    out = paged_attention(**arguments)
    sees = np.zeros(out.shape, bool)
    sees[4:9, 4:, slice(None) if pool == "k_cache" else 0] = True
    got, expected = (result[~sees].astype(np.float32) for result in (out, clean))
    np.testing.assert_allclose(got, expected, atol=TOLERANCES[out.dtype.name])  # what is set apart is added later
    if not (pool == "k_cache" and np.isinf(odd)):  # which may be −inf as a score, and then counts for nothing
        assert not np.isfinite(out[sees].astype(np.float32)).any()


@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_copy_of_a_pool(rng, dtype, layout):
    size, views = oracle.pools(layout, 2**13, 16, 2, 64, dtype)
    k_cache, v_cache = views(np.zeros(size, np.uint8))
    query = np.zeros((2, 4, 64), dtype)
    arguments = (query, k_cache, v_cache, rng.permutation(2**13)[:512].reshape(2, 256), [4096, 17])
    paged_attention(*arguments)  # leaves buffers behind
    tracemalloc.start()
    try:
        paged_attention(*arguments)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**22 < size / 15  # the buffers of a thread that had no part in the first call among it


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_blocks_are_gathered_and_large_ones_are_not(rng, monkeypatch, dtype):
    arguments = batch(rng, [(1, 40), (1, 37), (5, 30)], dtype)
    results = []
    for elements in (1, 2**30):
        monkeypatch.setattr(numpy_attention, "_LARGE_BLOCK", elements)
        check(arguments)
        results.append(paged_attention(**arguments))
    assert np.array_equal(*results)


@pytest.mark.parametrize(
    "lens",
    [
        [(1, 700)],
        [(1, 90), (1, 300), (1, 0), (1, 91), (1, 89)],
        [(40, 40), (0, 12), (3, 150), (3, 140), (7, 2)],
    ],
)
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"window_size": (50, 0)}, {"causal": False}], ids=str)
def test_threads_share_the_work(rng, monkeypatch, many_threads, lens, options):
    names = set()
    attend = numpy_attention._attend
    all_here = threading.Barrier(2, timeout=10)

    def recorded(*arguments: Any) -> Any:
        names.add(threading.current_thread().name)
        if len(names) == 1:
            all_here.wait()  # until a second thread has come
        elif all_here.n_waiting:
            all_here.wait()
        return attend(*arguments)

    monkeypatch.setattr(numpy_attention, "_attend", recorded)
    arguments = batch(rng, lens)
    if options.get("sinks"):
        options = {"sinks": rng.standard_normal(8, np.float32)}
    first = paged_attention(**arguments, **options)
    assert len(names) > 1
    monkeypatch.setattr(numpy_attention, "_attend", attend)
    check(arguments, **options)
    for _ in range(5):  # whoever does what, and whenever
        assert np.array_equal(paged_attention(**arguments, **options), first, equal_nan=True)


def test_an_error_in_a_thread_is_raised(rng, monkeypatch, many_threads):
    def failing(*arguments: Any) -> Any:
        raise MemoryError("no room for scores")

    monkeypatch.setattr(numpy_attention, "_score", failing)
    with pytest.raises(MemoryError, match="no room for scores"):
        paged_attention(**batch(rng, [(1, 700)]))


def test_calls_of_several_threads_at_once(rng):
    batches = [batch(rng, [(1, 30 + i), (4, 50 * i + 4), (1, 31)], DTYPES[i % 3]) for i in range(6)]
    expected = [paged_attention(**arguments) for arguments in batches]
    start = threading.Barrier(len(batches), timeout=30)

    def again(i: int) -> bool:
        start.wait()
        return all(np.array_equal(paged_attention(**batches[i]), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(len(batches)) as pool:
        assert all(pool.map(again, range(len(batches))))


def test_buffers_are_made_once_and_do_not_grow_with_the_sequences(rng):
    buffers = numpy_attention._buffers.memory
    buffers.clear()

    def sizes_after(length: int) -> dict[str, tuple[int, int]]:
        query, pool = np.zeros((1, 8, 64), np.float16), np.zeros((16, 16, 2, 64), np.float16)
        paged_attention(query, pool, pool.copy(), np.zeros((1, length // 16), np.int32), [length])
        return {name: (memory.ctypes.data, memory.nbytes) for name, memory in buffers.items()}

    long = sizes_after(2**15)
    assert sum(num_bytes for _, num_bytes in long.values()) < 2**20
    assert sizes_after(2**15) == sizes_after(160) == long
    assert sizes_after(2**17) == long


@pytest.mark.parametrize("lens", [[(1, 900)], [(200, 300)], [(1, 30), (1, 30)]])
@pytest.mark.parametrize("group", [1, 8])
def test_products_are_small_enough_for_one_thread_of_blas(rng, monkeypatch, lens, group):
    products = []
    matmul = np.matmul

    def recorded(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        products.append(a.shape[-2:] + b.shape[-1:])
        matmul(a, b, out=out)

    monkeypatch.setattr(np, "matmul", recorded)
    paged_attention(**batch(rng, lens, group=group, dim=128, block_size=16))
    assert max(map(math.prod, products)) <= 2**18
    assert min(columns for *_, columns in products) > 1  # or they are products of a vector, with a limit of their own


def test_sequences_of_like_length_attend_together(rng, monkeypatch):
    parts = []
    attend = numpy_attention._attend

    def recorded(call: Any, part: Any, *blocks: int) -> Any:
        parts.append(sorted(part.seq_lens.tolist()))
        return attend(call, part, *blocks)

    monkeypatch.setattr(numpy_attention, "_attend", recorded)
    arguments = batch(rng, [(1, 64), (1, 60), (1, 9), (2, 60), (1, 64), (2, 62), (1, 10)])
    check(arguments)
    assert sorted(parts) == [[9, 10], [60, 62], [60, 64, 64]]


def test_a_window_skips_blocks(rng, monkeypatch):
    loaded = []
    load = numpy_attention._load

    def recorded(pool: Any, part: Any, tile: Any) -> Any:
        loaded.extend(part.tables[:, tile.first_block : tile.last_block].ravel().tolist())
        return load(pool, part, tile)

    monkeypatch.setattr(numpy_attention, "_load", recorded)
    arguments = batch(rng, [(3, 500)])
    check(arguments, window_size=(20, 0))
    # Tokens at 497, 498 and 499 see 477 to 499, which lie in blocks 59 to 62. K and V are loaded.
    assert loaded == 2 * arguments["block_tables"][0, 59:63].tolist()
