"""The NumPy backend's ways of copying much at once: whole blocks, and several threads."""

import functools
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cupy_pagedkv.devices.backend as backend
import cupy_pagedkv.devices.numpy_backend as numpy_backend
import cupy_pagedkv.devices.threads as threads
from cupy_pagedkv import gather_cache, reshape_and_cache

PADDED = np.dtype({"names": ["a", "b"], "formats": ["u1", "u4"], "offsets": [0, 4], "itemsize": 8})


@pytest.fixture(autouse=True, scope="module")
def everything_is_much():
    """As if a few tokens were worth several threads; with helpers even on a machine of one core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "EMULATE", False)
        patch.setattr(numpy_backend, "_MANY_TOKENS", 4)
        patch.setattr(threads, "SHARED_BYTES", 300)
        patch.setattr(threads, "_HEAD_START", 20)
        patch.setattr(threads, "_LARGEST_JOB", 200)
        patch.setattr(numpy_backend, "_MANY_ITEMS", 3)
        patch.setattr(numpy_backend, "_FEW_BYTES", 0)
        patch.setattr(numpy_backend, "_WORTHWHILE_TOKENS", 1)
        patch.setattr(os, "sched_getaffinity", lambda pid: range(4))
        threads._helpers.reset()
        yield
    threads._helpers.reset()


def scatter_and_compare(rng: Any, layout: str, block_size: int, dtype: Any, slots: Any, step: int = 1) -> None:
    size, views = oracle.pools(layout, 12, block_size, 2, 6, dtype)
    expected = oracle.random_bytes(rng, size)
    buffer = expected.copy()
    key, value = oracle.random_array(rng, (2, len(slots) * abs(step), 2, 6), dtype)[:, ::step]
    reshape_and_cache(key, value, *views(buffer), slots)
    for tokens, pool in zip((key, value), views(expected), strict=True):
        oracle.scatter(tokens, pool, slots)
    assert np.array_equal(buffer, expected)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_mixture_of_whole_blocks_and_other_slots(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    block_size = data.draw(st.sampled_from([1, 4]))
    blocks = data.draw(st.permutations(range(12)))
    slots: list[int] = []
    for block in blocks[: data.draw(st.integers(0, 12))]:
        first, last = sorted(data.draw(st.tuples(st.integers(0, block_size), st.integers(0, block_size))))
        part = list(range(block_size)) if data.draw(st.booleans()) else list(range(first, last))
        if data.draw(st.integers(0, 9)) == 0:
            part = data.draw(st.permutations(part))
        slots += [block * block_size + offset for offset in part]
        slots += [-1] * data.draw(st.sampled_from([0, 0, 0, 2]))
    layout = data.draw(st.sampled_from(["NHD", "HND", "interleaved", "packed"]))
    dtype = data.draw(st.sampled_from([np.float16, ml_dtypes.bfloat16, PADDED]))
    step = data.draw(st.sampled_from([1, 2, -1]))
    scatter_and_compare(rng, layout, block_size, dtype, slots, step)


@pytest.mark.parametrize("offset", [0, 1])
def test_an_axis_of_one_has_any_stride(rng, offset):
    """It is in nobody's way; nor are items at odd addresses."""
    shape, strides = (6, 4, 1, 8), (64, 16, 1000, 2)
    before = oracle.random_bytes(rng, 6 * 64 + offset)
    for num_tokens in (1, 5, 20):
        key = oracle.random_array(rng, (num_tokens, 1, 8), np.float16)
        odd = np.lib.stride_tricks.as_strided(key, key.shape, (16, 6, 2) if num_tokens > 1 else (6, 1000, 2))
        slots = rng.permutation(24)[:num_tokens]
        buffer, expected = before.copy(), before.copy()
        pool, expected_pool = (
            np.lib.stride_tricks.as_strided(memory[offset:].view(np.float16), shape, strides)
            for memory in (buffer, expected)
        )
        reshape_and_cache(odd, odd, pool, pool, slots)
        oracle.scatter(key, expected_pool, slots)
        assert np.array_equal(buffer, expected)
        out = np.zeros((2, 20 * 16 + offset), np.uint8)
        pair = [np.lib.stride_tricks.as_strided(m[offset:].view(np.float16), (20, 1, 8), (16, 6, 2)) for m in out]
        gather_cache(pool, pool, [[3, 0, 5, 1, 2]], [20], out=(pair[0], pair[1]))
        rows = oracle.gather(pool, np.array([[3, 0, 5, 1, 2]]), [20], [0])
        assert all(m[offset:].tobytes() == rows.tobytes() for m in out)


def test_negative_lengths_of_32_bits_are_below_no_capacity():
    """As unsigned numbers they are below 2**32, which is what these tables have blocks for."""
    pool, tables = np.zeros((1, 2**20, 1, 1), np.int8), np.zeros((2, 2**12), np.int32)
    out = np.ones((2, 8, 1, 1), np.int8)
    with pytest.raises(ValueError, match="sequence 0 has seq_starts 0 and seq_lens -1"):
        gather_cache(pool, pool, tables, np.array([-1, 5], np.int32), out=(out[0], out[1]))
    assert out.all()


def test_a_mask_hides_no_slot():
    pool, key = np.zeros((3, 4, 1, 8), np.int8), np.ones((5, 1, 8), np.int8)
    slots = np.ma.array([1, 2, 5000, 3, 4], mask=[0, 0, 1, 0, 0])
    with pytest.raises(IndexError, match=r"slot_mapping\[2\] is 5000"):
        reshape_and_cache(key, key, pool, pool, slots)
    assert not pool.any()


def test_what_counts_as_a_whole_block():
    def stretches(*slots: int) -> list[tuple[int, int, bool]]:
        return list(numpy_backend._stretches(np.array(slots), 4))

    assert stretches(8, 9, 10, 11, 0, 1, 2, 3) == [(0, 8, True)]
    assert stretches(2, 3, 4, 5, 6, 7, 8, 9) == [(0, 2, False), (2, 6, True), (6, 8, False)]
    assert stretches(8, 10, 9, 11) == [(0, 4, False)]  # the first and the last alone do not make a block
    assert stretches(6, 7, 8, 9) == [(0, 4, False)]  # four in a row, of two blocks
    assert stretches(5) == [(0, 1, False)]
    assert stretches(7, 3, 8, 9, 10, 11, 4, 5, 6, 7, 1) == [(0, 2, False), (2, 10, True), (10, 11, False)]
    assert stretches(7, 3, 1, 8, 9, 10, 11, 5, 2) == [(0, 9, False)]  # one block of nine tokens is not worth it
    assert list(numpy_backend._stretches(np.array([1, 2, 3, 4, 5, 6, 7, 0]), 3)) == [
        (0, 2, False), (2, 5, True), (5, 8, False)
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved", "packed"])
@pytest.mark.parametrize("dtype", [np.float16, PADDED], ids=["float16", "padded"])
def test_gathering_much(rng, layout, dtype):
    size, views = oracle.pools(layout, 40, 4, 2, 6, dtype)
    pools = views(oracle.random_bytes(rng, size))
    tables, lens, starts = rng.permutation(40).reshape(4, 10), [40, 3, 17, 29], [0, 1, 4, 6]
    memory = np.full((2, 85, 2, 6), 0, dtype)
    memory.view(np.uint8)[...] = 7
    for out in ((memory[0, 2:], memory[1, 2:]), None):
        gathered = gather_cache(*pools, tables, lens, seq_starts=starts, out=out)
        for array, pool in zip(gathered, pools, strict=True):
            rows = oracle.gather(pool, tables, lens, starts)
            assert oracle.opaque(array)[: len(rows)].tobytes() == rows.tobytes()
    assert (oracle.opaque(memory)[:, [0, 1, -1, -2, -3, -4, -5]].view(np.uint8) == 7).all()


def test_ragged_batches_go_row_by_row(monkeypatch):
    monkeypatch.setattr(numpy_backend, "_WORTHWHILE_TOKENS", 128)
    ragged = np.concatenate([np.arange(24) + 32 * i for i in range(100)])
    assert list(numpy_backend._stretches(ragged, 16)) == [(0, 2400, False)]
    assert len(list(numpy_backend._stretches(np.arange(4095), 16))) == 2


@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved", "packed"])
@pytest.mark.parametrize("dtype", [np.float16, PADDED], ids=["float16", "padded"])
def test_many_short_sequences(rng, monkeypatch, layout, dtype):
    monkeypatch.setattr(numpy_backend, "_WORTHWHILE_TOKENS", 128)
    size, views = oracle.pools(layout, 200, 4, 2, 6, dtype)
    pools = views(oracle.random_bytes(rng, size))
    tables = rng.permutation(200).reshape(50, 4).astype(np.int32)
    lens = rng.integers(0, 17, 50)
    for starts in (None, rng.integers(0, lens + 1)):
        total = int(lens.sum() - (0 if starts is None else starts.sum()))
        memory = np.zeros((2, total + 3, 2, 6), dtype)
        memory.view(np.uint8)[...] = 7
        gather_cache(*pools, tables, lens, seq_starts=starts, out=(memory[0], memory[1]))
        for array, pool in zip(memory, pools, strict=True):
            rows = oracle.gather(pool, tables, lens, [0] * 50 if starts is None else starts)
            assert oracle.opaque(array)[:total].tobytes() == rows.tobytes()
            assert (oracle.opaque(array)[total:].copy().view(np.uint8) == 7).all()


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("slots", [[9, 3, 4, -1, -7], [-1, 9, 3, 4, -1], [-1] * 5, [9, -1, 3, -1, 4]])
def test_padding_at_the_end_and_elsewhere(rng, slots, step):
    scatter_and_compare(rng, "NHD", 4, np.float16, slots, step)


def test_strided_outputs(rng):
    size, views = oracle.pools("NHD", 10, 4, 2, 6, np.float16)
    pools = views(oracle.random_bytes(rng, size))
    tables = rng.permutation(10)[None]
    memory = np.full((2, 33, 3, 2, 6), 7, np.float16)
    gather_cache(*pools, tables, [33], out=(memory[0, :, 1], memory[1, ::-1, 1]))
    for array, pool in zip((memory[0, :, 1], memory[1, ::-1, 1]), pools, strict=True):
        assert array.tobytes() == oracle.gather(pool, tables, [33], [0]).tobytes()
    assert (memory[:, :, [0, 2]] == 7).all()


def test_helpers_take_part():
    """With a job for each, all threads have to be at work at once for any to go on; the last job is nobody's else."""
    meeting = threading.Barrier(4, timeout=20)
    doers = []
    threads.run([meeting.wait] * 4 + [lambda: doers.append(threading.current_thread())], 10**6)
    assert doers == [threading.current_thread()]


def test_an_error_is_raised_once_nothing_runs_any_more():
    running = []

    def fails() -> None:
        raise MemoryError("no room")

    def slow() -> None:
        running.append(1)
        time.sleep(0.05)
        running.pop()

    for jobs in ([slow, fails, slow, slow], [fails, slow, slow, slow], [slow, slow, slow, fails]):
        with pytest.raises(MemoryError, match="no room"):
            threads.run(jobs, 10**6)
        assert not running


@pytest.mark.parametrize("fails_in", ["the caller", "a helper"])
def test_after_an_error_no_job_is_begun(fails_in):
    begun = []

    def job() -> None:
        begun.append(1)
        if (threading.current_thread() is threading.main_thread()) == (fails_in == "the caller"):
            raise MemoryError("no room")
        time.sleep(0.02)

    with pytest.raises(MemoryError, match="no room"):
        threads.run([job] * 60, 10**6)
    at_once = len(begun)
    time.sleep(0.1)
    assert len(begun) == at_once < 30


def test_nothing_keeps_the_arrays_of_an_error():
    class Tokens:
        pass

    def job(tokens: Tokens) -> None:
        time.sleep(0.01)
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room")

    tokens = Tokens()
    alive = weakref.ref(tokens)
    gc.disable()
    try:
        with suppress(MemoryError):
            threads.run([functools.partial(job, tokens)] * 8, 10**6)
        del tokens
        assert alive() is None
    finally:
        gc.enable()


def test_first_callers_start_each_helper_once():
    threads._helpers.reset()
    before = set(threading.enumerate())
    meeting = threading.Barrier(8, timeout=20)

    def first(_: int) -> int:
        meeting.wait()
        return threads._helpers.count()

    with ThreadPoolExecutor(8) as callers:
        assert list(callers.map(first, range(8))) == [3] * 8
    assert sum(thread.name.startswith("cupy_pagedkv") for thread in set(threading.enumerate()) - before) == 3


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("dim", [3, 40])
def test_read_only_tokens_of_any_size(rng, read_only, dim):
    pool, expected = np.zeros((2, 12, 4, 1, dim), np.uint8)
    key = oracle.random_bytes(rng, 30 * dim).reshape(30, 1, dim)
    key.flags.writeable = not read_only
    slots = rng.permutation(48)[:30]
    reshape_and_cache(key, key, pool, pool, slots)
    oracle.scatter(key, expected, slots)
    assert np.array_equal(pool, expected)


def test_a_block_of_two_gibibytes():
    pools = np.zeros((2, 1, 2**31, 1, 1), np.int8)
    key = np.array([[[1]], [[2]], [[3]]], np.int8)
    reshape_and_cache(key, key, pools[0], pools[1], [5, 2**31 - 1, 6])
    for array in gather_cache(pools[0], pools[1], [[0]], [2**31], seq_starts=[2**31 - 1]):
        assert array.tobytes() == b"\x02"


def test_callers_on_many_threads_share_the_helpers(rng):
    """Each gets its own tokens back, and an error of one is nobody else's."""
    size, views = oracle.pools("NHD", 64, 4, 2, 6, np.float16)
    k_cache, v_cache = views(oracle.random_bytes(rng, size))
    refused = []

    def work(number: int) -> None:
        generator = np.random.default_rng(number)
        for _ in range(100):
            blocks = number * 16 + generator.permutation(16)
            slots = (blocks[:, None] * 4 + np.arange(4)).ravel()
            key, value = oracle.random_array(generator, (2, 64, 2, 6), np.float16)
            reshape_and_cache(key, value, k_cache, v_cache, slots)
            got = gather_cache(k_cache, v_cache, blocks[None], [64])
            assert [array.tobytes() for array in got] == [key.tobytes(), value.tobytes()]
            with pytest.raises(IndexError):
                reshape_and_cache(key, value, k_cache, v_cache, slots + 256)
            refused.append(number)

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(work, range(4)))
    assert len(refused) == 400


def test_an_interrupt_leaves_nobody_writing():
    """Ctrl-C while the main thread waits for its helpers."""
    program = """
import os, signal, threading, time
import cupy_pagedkv.devices.threads as threads
os.sched_getaffinity = lambda pid: range(3)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which who runs in the background does not have
begun, asked, ended = threading.Barrier(3), [], []
def job():
    begun.wait()
    if threading.current_thread() is not threading.main_thread():
        time.sleep(0.3)  # until the main thread waits
        if not asked:
            asked.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        ended.append(1)
try:
    threads.run([job] * 3 + [lambda: None], 10**9)
except KeyboardInterrupt:
    print("interrupted, with", len(ended), "helpers at their end")
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert run.stdout == "interrupted, with 2 helpers at their end\n"


def test_a_process_that_is_ending_does_without_helpers():
    """Once the interpreter takes itself apart, a thread that is started never runs."""
    program = """
import numpy as np
import cupy_pagedkv.devices.threads as threads
from cupy_pagedkv import reshape_and_cache
class Late:
    def __init__(self):
        self.pools, self.key = np.zeros((2, 1024, 16, 8, 128), np.float16), np.ones((16384, 8, 128), np.float16)
        self.arguments = self.key, self.key, *self.pools, np.arange(16384)
        self.write, self.helpers, self.print = reshape_and_cache, threads._helpers, print
    def __del__(self):
        self.write(*self.arguments)
        ones = self.key[0, 0, :1].tobytes() * self.pools.size
        self.print(self.pools.tobytes() == ones, self.helpers._count, flush=True)
late = Late()
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert run.stdout == "True 0\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_has_helpers_of_its_own():
    """Threads do not survive a fork; a pool of them that the child believes in would never answer."""
    program = """
import os, numpy as np
import cupy_pagedkv.devices.threads as threads
from cupy_pagedkv import reshape_and_cache
os.sched_getaffinity = lambda pid: range(2)
threads.SHARED_BYTES, threads._HEAD_START = 1, 0
pools, key = np.zeros((2, 8, 4, 1, 8), np.int8), np.ones((32, 1, 8), np.int8)
reshape_and_cache(key, key, *pools, np.arange(32))
child = os.fork()
if child == 0:
    pools[...] = 0
    inherited = threads._helpers._count
    reshape_and_cache(key, key, *pools, np.arange(32))
    os._exit(0 if pools.all() and (inherited, threads._helpers._count) == (0, 1) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# Blocks that lie one behind the other, or are long, are copied run by run where tokens do not lie in one piece.


RUNS_OF_BLOCKS = {
    "one run": list(range(5, 25)),
    "pairs": [8, 9, 2, 3, 30, 31, 0, 1, 17, 18],
    "none": [7, 6, 5, 4, 3, 21, 1, 39],
    "a run, none, a run at the end": [3, 4, 5, 20, 10, 37, 38, 39],
    "one": [39],
}


@pytest.mark.parametrize("blocks", RUNS_OF_BLOCKS.values(), ids=RUNS_OF_BLOCKS)
@pytest.mark.parametrize(("much", "long_run"), [(1, 1), (1, 2 * 4 * 2 * 3), (2**40, 1)])
@pytest.mark.parametrize("form", ["HND", "a wide result", "layers", "blocks as tokens"])
def test_blocks_run_by_run(monkeypatch, blocks, much, long_run, form):
    monkeypatch.setattr(threads, "SHARED_BYTES", 2**22)  # all blocks at once
    monkeypatch.setattr(numpy_backend, "_MUCH", much)
    monkeypatch.setattr(numpy_backend, "_LONG_RUN", long_run)
    block_size = 1 if form == "blocks as tokens" else 4
    pools = np.random.default_rng(0).integers(0, 2**16, (2, 2, 40, block_size, 2, 3), np.uint16).view(np.float16)
    count = len(blocks) * block_size - (block_size > 1)  # the last block is not full
    out = np.zeros((2, 2, len(blocks) * block_size, 2, 6), np.float16)[..., :3]
    if form == "HND":
        pools = pools.swapaxes(3, 4).copy().swapaxes(3, 4)
        out = np.zeros(out.shape, np.float16)
    if form == "blocks as tokens":  # as they travel to the host
        out = np.zeros((len(blocks), 2, 2, 2, 3), np.float16).transpose(1, 2, 0, 3, 4)
    expected = pools[:, :, blocks].reshape(2, 2, -1, 2, 3)[:, :, :count]
    if form in ("layers", "blocks as tokens"):
        gather_cache(*pools, [blocks], [count], out=(out[0], out[1]))
    else:
        for layer in (0, 1):
            gather_cache(*pools[:, layer], [blocks], [count], out=tuple(out[:, layer]))
    np.testing.assert_array_equal(out[:, :, :count].view(np.uint16), expected.view(np.uint16))
    assert not out[:, :, count:].any()


@pytest.mark.parametrize(
    ("blocks", "num_bytes", "runs"),
    [
        (range(100), 2**20 - 1, False),  # little
        (range(32), 2**20, True),  # each block is long
        ([*range(0, 64, 2)], 2**20, True),
        (range(33), 2**20, False),  # it is not, and to look for runs is not worthwhile
        (range(1000), 2**21, True),
        ([*range(0, 128, 2)], 2**21, True),  # 64 runs, each of one long block
        ([*range(0, 64, 2), *range(100, 164)], 2**21, True),  # 33 runs
        ([*range(0, 126, 2), 200, 201, 300, 301], 2**21, False),  # 65
    ],
)
def test_when_blocks_are_copied_run_by_run(blocks, num_bytes, runs):
    assert (numpy_backend._long_runs(np.array(blocks, np.int32), num_bytes) is not None) is runs


# Layers are copied together, as many as a thread copies at once.

LAYER = 8 * 2 * 3 * 2  # bytes of K of eight tokens


@pytest.mark.parametrize(("largest_job", "num_jobs"), [(1, 4 * 5), (LAYER, 2 * 5), (3 * LAYER, 2 * 2), (9 * LAYER, 2)])
@pytest.mark.parametrize("much", [0, 2**20])
@pytest.mark.parametrize("form", ["NHD", "HND"])
def test_layers_are_copied_together(monkeypatch, rng, largest_job, num_jobs, much, form):
    calls: list[int] = []

    def run(jobs: list[Any], num_bytes: int) -> None:
        calls.append(len(jobs))
        for job in jobs:
            job()

    monkeypatch.setattr(threads, "run", run)
    monkeypatch.setattr(threads, "_num_threads", lambda num_bytes: 1)
    monkeypatch.setattr(threads, "_HEAD_START", 0)
    monkeypatch.setattr(threads, "_LARGEST_JOB", largest_job)
    monkeypatch.setattr(numpy_backend, "_MUCH", much)

    def pools(memory: Any) -> Any:
        return memory if form == "NHD" else memory.reshape(2, 5, 6, 2, 4, 3).swapaxes(3, 4)

    expected = oracle.random_array(rng, (2, 5, 6, 4, 2, 3), np.float16)
    tokens = oracle.random_array(rng, (2, 5, 8, 2, 3), np.float16)
    buffer = expected.copy()
    for slots in (np.r_[8:12, 20:24], rng.permutation(24)[:8]):  # whole blocks, and anywhere
        reshape_and_cache(*tokens, *pools(buffer), slots)
        for tensor, layer in np.ndindex(2, 5):
            oracle.scatter(tokens[tensor, layer], pools(expected)[tensor, layer], slots)
        assert buffer.tobytes() == expected.tobytes()

    for tables, lens in (([[2, 5]], [8]), ([[1], [0], [3], [5], [2], [4]], [2, 0, 0, 2, 0, 1])):  # and a few of many
        out = np.empty_like(tokens)
        gather_cache(*pools(buffer), tables, lens, out=(out[0], out[1]))
        for tensor, layer in np.ndindex(2, 5):
            rows = oracle.gather(pools(expected)[tensor, layer], tables, lens, [0] * len(lens))
            assert out[tensor, layer, : len(rows)].tobytes() == rows.tobytes()
    assert calls == [num_jobs] * 3 + [min(num_jobs, 2 * 5)]  # tokens of many sequences are not divided
