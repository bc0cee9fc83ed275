"""CuPy's side. Without a GPU, its real array type over host memory; with one, streams, graphs and contexts.

CuPy need not be installed for the suite; where it is not, these tests say so and skip.
"""

import ctypes
import math
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from attending import bits
from served import NUM_LAYERS, ROW, Served, rows_of

import cupy_pagedkv.devices.backend as backend
from cupy_pagedkv import (
    AttentionBuffers,
    BlockAllocator,
    CachedSequence,
    KVCacheManager,
    LayeredPagedKVCache,
    OutOfBlocksError,
    PagedKVCache,
    gather_cache,
    merge_attention_states,
    paged_attention,
    reshape_and_cache,
)
from cupy_pagedkv.devices.cuda_backend import CudaBackend
from cupy_pagedkv.devices.sources import source_of
from cupy_pagedkv.emulator import RawKernel

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")


# Without a GPU: `cupy.ndarray` in host memory, and kernels that are told its addresses.


def over(host: np.ndarray, device: int = 0) -> Any:
    """A CuPy array that is ``host``'s memory. What needs no driver works: shapes, strides, views, addresses."""
    host = np.ascontiguousarray(host)
    memory = cupy.cuda.UnownedMemory(host.ctypes.data, max(1, host.nbytes), host, device)
    flat = cupy.ndarray(host.nbytes, np.uint8, cupy.cuda.MemoryPointer(memory, 0))
    return flat.view(host.dtype).reshape(host.shape)


class AddressedKernel:
    """Takes what CuPy takes, CuPy's arrays among it. As there, a limit is set for the current device alone."""

    def __init__(self, code: str, name: str, backend: "HostMemoryBackend") -> None:
        self.kernel, self.backend, self.limits = RawKernel(code, name), backend, dict[int, int]()

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self.limits.get(self.backend.current, 48 * 1024)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, value: int) -> None:
        self.limits[self.backend.current] = self.kernel.max_dynamic_shared_size_bytes = value

    def __call__(self, grid: Any, block: Any, args: tuple[Any, ...], *, shared_mem: int = 0) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        assert all(a.data.device_id == self.backend.current for a in args if isinstance(a, cupy.ndarray))
        converted = [np.uintp(a.data.ptr) if isinstance(a, cupy.ndarray) else a for a in args]
        self.kernel(grid, block, tuple(converted), shared_mem=shared_mem)


class HostMemoryBackend(CudaBackend):
    """The CUDA backend with all that needs a driver replaced: compiling, allocating and copying."""

    def __init__(self) -> None:
        super().__init__(cupy)
        self.current = 0  # the number of the current device

    def _count_processors(self, device: int) -> int:
        return 4

    def _read_architecture(self, device: int) -> tuple[int, int]:
        return 80, 163 * 1024

    def _build_kernel(self, name: str, defines: Any) -> Any:
        return AddressedKernel(source_of(name, defines), name, self)

    @contextmanager
    def on(self, number: int) -> Iterator[None]:
        assert isinstance(number, int)
        before, self.current = self.current, number
        try:
            yield
        finally:
            self.current = before

    def _make(self, creator: Any, shape: tuple[int, ...], dtype: np.dtype[Any], device: Any) -> Any:
        return over(np.zeros(shape, dtype), device.id)

    def from_numpy(self, array: np.ndarray, device: Any) -> Any:
        return over(array, device.id)

    def empty_pinned(self, num_bytes: int) -> np.ndarray:
        return np.empty(num_bytes, np.uint8)

    def copy_async(self, staged: np.ndarray, out: Any) -> Any:
        ctypes.memmove(out.data.ptr, staged.ctypes.data, staged.nbytes)
        return Event(done=True)

    def pinned_memory(self, num_bytes: int) -> np.ndarray:
        return np.zeros(num_bytes, np.uint8)

    def new_stream(self) -> "Stream":
        return Stream()

    def current_stream(self) -> "Stream":
        return Stream()

    def event_behind(self, stream: "Stream") -> "Event":
        return stream.record()

    def copy_to_host(self, array: Any, host: np.ndarray, stream: "Stream") -> None:
        stream.do(lambda: ctypes.memmove(host.ctypes.data, array.data.ptr, array.nbytes))

    def copy_from_host(self, host: np.ndarray, array: Any, stream: "Stream") -> None:
        stream.do(lambda: ctypes.memmove(array.data.ptr, host.ctypes.data, array.nbytes))


class Event:
    def __init__(self, done: bool) -> None:
        self.done = done


class Stream:
    """Work that is done at once."""

    def do(self, work: Any) -> None:
        work()

    def record(self) -> Event:
        event = Event(done=False)
        self.do(lambda: setattr(event, "done", True))
        return event

    def wait_event(self, event: Event) -> None:
        assert event.done

    def synchronize(self) -> None:
        pass


class LateStream(Stream):
    """Work that is done when :meth:`step` gets to it, and waits there."""

    def __init__(self, backend: "LateBackend") -> None:
        self.queue: deque[Any] = deque()
        self.backend = backend

    def synchronize(self) -> None:
        while self.queue:
            self.backend.advance(1)

    def do(self, work: Any) -> None:
        self.queue.append(work)

    def wait_event(self, event: Event) -> None:
        self.queue.append(event)

    def step(self) -> bool:
        """Do one thing, if there is something that can be done."""
        if not self.queue or (isinstance(self.queue[0], Event) and not self.queue[0].done):
            return False
        work = self.queue.popleft()
        if not isinstance(work, Event):
            work()
        return True


class LateBackend(HostMemoryBackend):
    """Kernels and copies are done late, in any order that the streams and their events allow."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.rng = rng
        self.streams = [LateStream(self)]  # the current one first
        self.stuck: LateStream | None = None

    def advance(self, steps: float) -> None:
        """Let the streams take turns, some of them now and then for long."""
        waiting: list[LateStream] = []
        streams = [stream for stream in self.streams if stream is not self.stuck]
        while steps > 0 and len(waiting) < len(streams):
            stream = streams[self.rng.integers(len(streams))]
            moved = sum(stream.step() for _ in range(self.rng.choice([1, 20])))
            waiting = [] if moved else list({*waiting, stream})
            steps -= moved

    def new_stream(self) -> LateStream:
        self.streams.append(LateStream(self))
        return self.streams[-1]

    def current_stream(self) -> LateStream:
        return self.streams[0]

    def copy_async(self, staged: np.ndarray, out: Any) -> Event:
        self.copy_from_host(staged, out, self.streams[0])
        return self.streams[0].record()

    def _build_kernel(self, name: str, defines: Any) -> Any:
        kernel = super()._build_kernel(name, defines)
        return lambda *arguments, **options: self.streams[0].do(lambda: kernel(*arguments, **options))


def with_buffers_of(num_blocks: int, manager: KVCacheManager) -> None:
    """Let the buffers on the way between pool and host be of so many blocks."""
    lane = manager._mover._lane
    for way in (lane._out, lane._back):
        way.buffers = [over(np.zeros((num_blocks, buffer.shape[1]), np.uint8)) for buffer in way.buffers]


def use(monkeypatch: pytest.MonkeyPatch, instance: HostMemoryBackend) -> None:
    """Let it be what works on CuPy arrays."""
    monkeypatch.setattr(backend, "_cuda", lambda: instance)
    monkeypatch.setattr("cupy_pagedkv.caches.cache.backend_on", lambda device: (instance, cupy.cuda.Device(0)))


@pytest.fixture
def host_memory(monkeypatch: pytest.MonkeyPatch) -> HostMemoryBackend:
    instance = HostMemoryBackend()
    use(monkeypatch, instance)
    return instance


class HostMemory:
    """The device of `Served` over CuPy arrays in host memory."""

    name, of_caches, xp = "cupy", "cuda", cupy

    def array(self, host: np.ndarray) -> Any:
        return over(host)

    def numpy(self, array: Any) -> np.ndarray:
        assert isinstance(array, cupy.ndarray)
        assert array.flags.c_contiguous
        return np.frombuffer(ctypes.string_at(array.data.ptr, array.nbytes), array.dtype).reshape(array.shape)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn], ids=lambda d: d.__name__)
@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved"])
def test_operations_on_cupy_arrays_in_host_memory(host_memory, rng, layout, dtype):
    size, views = oracle.pools(layout, 6, 8, 2, 4, dtype)
    expected = oracle.random_bytes(rng, size)
    buffer = expected.copy()
    pools = views(over(buffer))
    qkv = oracle.random_array(rng, (9, 3, 2, 4), dtype)
    on_device = over(qkv)
    slots = np.array([3, 40, -1, 0, 9, 10, 47, 48, 20])  # one past the pool, which the kernel skips
    reshape_and_cache(on_device[:, 1], on_device[:, 2], *pools, over(slots))
    for tensor, pool in enumerate(views(expected), 1):
        oracle.scatter(qkv[:, tensor], pool, np.where(slots == 48, -1, slots))
    assert np.array_equal(buffer, expected)

    tables, lens, starts = np.array([[0, 1], [5, -1]], np.int32), np.array([11, 3]), np.array([2, 0])
    memory = np.zeros((2, 20, 2, 4), dtype)
    out = tuple(over(array) for array in memory)
    for array, held in zip(out, memory, strict=True):
        assert array.data.ptr == held.ctypes.data
    assert gather_cache(*pools, over(tables), over(lens), seq_starts=over(starts), out=out) is out
    for array, pool in zip(memory, views(expected), strict=True):
        rows = oracle.gather(pool, tables, lens, starts)
        assert oracle.opaque(array)[:12].tobytes() == rows.tobytes()
        assert not array[12:].view(np.uint8).any()
    key, _ = gather_cache(*pools, tables.tolist(), lens, seq_starts=starts)
    assert type(key) is cupy.ndarray
    assert (key.shape, key.dtype) == ((12, 2, 4), dtype)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("device", [0, 1])
def test_attention_on_cupy_arrays_in_host_memory(host_memory, rng, device, dtype):
    """On a device that is not the current one, too: there a kernel has to be made, and told how much it may have."""
    query, pools = rng.standard_normal((2, 4, 256)).astype(dtype), rng.standard_normal((2, 40, 16, 2, 256))
    tables, lens = rng.permutation(40)[None].repeat(2, 0).astype(np.int32), np.array([600, 17])
    sinks = np.array([1, 2, 3, 4], np.float32)
    lse, scratch = (np.full(size, np.nan, np.float32) for size in (8, 3 * 2 * 4 * 258))
    buffers = AttentionBuffers(
        over(np.zeros((2, 4, 256), dtype), device), over(lse, device).reshape(2, 4), over(scratch, device)
    )
    k, v = (over(pool.astype(dtype), device) for pool in pools)
    arguments = over(query, device), k, v, over(tables, device), over(lens, device)
    paged_attention(*arguments, sinks=over(sinks, device), out=buffers)
    assert not np.isnan(scratch[: 2 * 258]).any()  # of the first sequence's first split: two launches
    result = HostMemory().numpy(buffers.out)
    expected, _ = oracle.attention(query, *pools.astype(dtype), tables, lens, sinks=sinks)
    assert np.allclose(result.astype(np.float64), expected, 0.02, 0.02)
    for given in (sinks, sinks.tolist()):
        for ends in (None, over(np.array([0, 1, 2]), device), [0, 1, 2]):
            got = paged_attention(*arguments, ends, sinks=given, max_seqlen_q=9)
            assert np.array_equal(bits(HostMemory().numpy(got)), bits(result))
    merged, _ = merge_attention_states(buffers.out, buffers.lse, buffers.out, buffers.lse)
    assert np.array_equal(bits(HostMemory().numpy(merged)), bits(result))


def test_only_another_device_is_switched_to(monkeypatch):
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 1)
    on = CudaBackend(cupy).on
    assert isinstance(on(1), nullcontext)
    assert on(0) == cupy.cuda.Device(0)


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_values_of_heads_on_another_gpu(host_memory, name):
    query, pool = over(np.zeros((1, 2, 16), np.float16)), over(np.zeros((4, 16, 2, 16), np.float16))
    with pytest.raises(ValueError, match=f"{name} must be where the pools are, on <CUDA Device 0>, got one on <CUDA D"):
        paged_attention(query, pool, pool, [[0]], [1], **{name: over(np.zeros(2, np.float32), 1)})


def test_buffers_that_are_no_arrays(host_memory):
    query, pool = over(np.zeros((1, 2, 16), np.float16)), over(np.zeros((4, 16, 2, 16), np.float16))
    buffers = AttentionBuffers(query, over(np.zeros((1, 2), np.float32)), over(np.zeros(1000, np.float32)))
    with pytest.raises(TypeError, match="out must be a NumPy or CuPy array, or speak DLPack, got list"):
        paged_attention(query, pool, pool, [[0]], [1], out=buffers._replace(out=[1.0]))
    for name in ("lse", "scratch"):
        with pytest.raises(TypeError, match=f"{name} must be an array where the others are, got list"):
            paged_attention(query, pool, pool, [[0]], [1], out=buffers._replace(**{name: [1.0]}))


@pytest.mark.parametrize("debug", [False, True])
def test_lengths_on_the_gpu_need_out(host_memory, monkeypatch, debug):
    monkeypatch.setattr(backend, "DEBUG", debug)
    pools = over(np.zeros((2, 6, 8, 2, 4), np.float16))
    with pytest.raises(TypeError, match=r"to keep them on the GPU, give out=\(key, value\)"):
        gather_cache(pools[0], pools[1], [[0]], over(np.array([3])))


def test_a_cache_over_cupy_arrays(host_memory):
    pools = over(np.zeros((2, 6, 8, 2, 4), np.float16))
    cache = PagedKVCache.from_pools(pools[0], pools[1])
    assert cache.device == "cuda:0"
    assert [array.shape for array in over(np.zeros((3, 2, 6, 8, 2, 4)))] == [(2, 6, 8, 2, 4)] * 3


def test_a_manager_over_cupy_arrays(host_memory):
    """Prefix sharing, copy on write and buffers of a fixed place, through the launch code."""
    served = Served(HostMemory(), 20)
    first = served.run(range(40))
    second = served.run(range(41))
    assert second.num_cached_tokens == 32
    fork = served.fork(first)
    served.commit(served.prepare({fork: [1, 2], first: [3]}))
    assert served.manager.stats().copies == 1
    buffers = served.manager.buffers(num_seqs=3, num_tokens=20, max_blocks=6)
    memory = buffers.slot_mapping.data.ptr
    third = served.fork(first)
    served.commit(served.prepare({third: [4], first: range(10)}, buffers))
    assert served.manager.stats().copies == 2
    assert buffers.slot_mapping.data.ptr == memory
    for batch in ({}, {first: []}, {served.add([]): []}):
        served.commit(served.prepare(batch))
        served.commit(served.prepare(batch, buffers))


def test_a_second_tier_over_cupy_arrays(host_memory, rng):
    """Evictions, what is found on the host, and parked sequences, through the buffers of the lane."""
    served = Served(HostMemory(), 12, host_blocks=40)
    with_buffers_of(3, served.manager)
    parked = []
    for _ in range(60):
        sequence = served.run(rng.integers(0, 2, 7).repeat(rng.integers(10, 20)).tolist())
        if len(parked) < 3:
            served.offload(sequence)
            parked.append(sequence)
        else:
            served.free(sequence)
            if rng.random() < 0.5:
                served.append(parked.pop(0), [5] * 20)
                served.free(next(s for s in served.expected if s not in parked))
    stats = served.manager.stats()
    assert min(stats.evictions, stats.offloaded, stats.restored, stats.hits) > 10, stats


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_streams_mixes_up_blocks(monkeypatch, seed):
    """Blocks leave and come back while neither stream has caught up: each gather, when its turn comes, is right."""
    rng = np.random.default_rng(seed)
    late = LateBackend(rng)
    use(monkeypatch, late)
    cache = LayeredPagedKVCache(NUM_LAYERS, 10, 4, 1, ROW, "uint8", "cuda")
    manager = KVCacheManager(cache, host_blocks=int(rng.choice([6, 30])))
    with_buffers_of(int(rng.integers(1, 6)), manager)
    tokens_of: dict[CachedSequence, list[int]] = {}
    gathered, kept_alive = [], []
    for _ in range(150):
        late.advance(rng.integers(0, 40))
        some = list(tokens_of)[rng.integers(len(tokens_of))] if tokens_of else None
        choice = rng.random()
        if some is None or (choice < 0.4 and len(tokens_of) < 6):
            some = manager.add(rng.integers(0, 2, 5).repeat(rng.integers(1, 7)))
            tokens_of[some] = some._prompt.tolist()
            new = some.remaining.tolist()
        elif choice < 0.6:
            manager.free(some)
            del tokens_of[some]
            continue
        elif choice < 0.75:
            with suppress(OutOfBlocksError):
                some.offload()
            continue
        else:
            new = rng.integers(0, 2, rng.integers(0, 6)).tolist()
            tokens_of[some] = tokens_of[some] + new
        known = tokens_of[some]
        try:
            batch = manager.prepare({some: new})
        except OutOfBlocksError:
            manager.free(some)
            del tokens_of[some]
            continue
        rows = rows_of(None, known)
        if new:
            key, value = (over(array) for array in rows[:, :, len(known) - len(new) :])
            cache.update_all(key, value, batch.slot_mapping)
        out = over(np.zeros_like(rows[0])), over(np.zeros_like(rows[1]))
        cache.gather_all(over(some.block_table[None]), over(np.array([len(known)])), out=out)
        gathered.append((out, rows))
        kept_alive.append(batch)
        manager.commit(batch)
        parked = next((each for each in tokens_of if each.num_host_blocks == len(each.block_table) > 0), None)
        if parked is not None and rng.random() < 0.2:  # as save() does
            held = manager._mover.read(manager._rows.blocks(parked._row)).reshape(-1, 2, NUM_LAYERS, 4, 1, ROW)
            held = held.transpose(1, 2, 0, 3, 4, 5).reshape(2, NUM_LAYERS, -1, 1, ROW)[:, :, : parked.num_tokens]
            assert np.array_equal(held, rows_of(None, tokens_of[parked][: parked.num_tokens]))
        manager.check_integrity()
    late.advance(math.inf)
    assert not any(stream.queue for stream in late.streams)
    for out, rows in gathered:
        for array, expected in zip(out, rows, strict=True):
            assert np.array_equal(HostMemory().numpy(array), expected)
    stats = manager.stats()
    assert min(stats.evictions, stats.offloaded, stats.restored) > 0, stats


def test_compute_waits_for_nothing_but_what_it_reads(monkeypatch):
    """What comes back is there while what the same call sends, and what was sent before, has not even left."""
    late = LateBackend(np.random.default_rng(0))
    use(monkeypatch, late)
    cache = LayeredPagedKVCache(NUM_LAYERS, 6, 4, 1, ROW, "uint8", "cuda")
    manager = KVCacheManager(cache, host_blocks=12)
    current, out, back = late.streams
    sequences, sent = [], []
    for start in (0, 100, 200):
        sequences.append(manager.add(range(start, start + 12)))
        batch = manager.prepare({sequences[-1]: range(start, start + 12)})
        key, value = (over(array) for array in rows_of(None, range(start, start + 12)))
        cache.update_all(key, value, batch.slot_mapping)
        manager.commit(batch)
        sequences[-1].offload()
        sent.append(len(out.queue))
    with manager.prepare({sequences[0]: []}):
        pass
    assert manager.stats().restored == 3
    gathered = tuple(over(np.zeros((NUM_LAYERS, 12, 1, ROW), np.uint8)) for _ in range(2))
    cache.gather_all(over(sequences[0].block_table[None]), over(np.array([12])), out=gathered)
    late.stuck = out
    late.advance(math.inf)
    assert current.queue
    assert all(out.step() for _ in range(sent[0]))  # and then it is stuck
    late.advance(math.inf)
    assert (len(current.queue), len(back.queue), bool(out.queue)) == (0, 0, True)
    for array, expected in zip(gathered, rows_of(None, range(12)), strict=True):
        assert np.array_equal(HostMemory().numpy(array), expected)
    # But what is still on its way to the host is waited for.
    with manager.prepare({sequences[1]: []}):
        pass
    assert manager.stats().restored == 6
    late.advance(math.inf)
    assert current.queue
    late.stuck = None
    late.advance(math.inf)
    assert not any(stream.queue for stream in late.streams)
    # And a copy begins before the current stream gets there.
    manager.free(sequences[0])
    late.stuck = current
    with manager.prepare({sequences[2]: []}):
        pass
    assert manager.stats().restored == 9
    late.advance(math.inf)
    assert (bool(current.queue), len(back.queue)) == (True, 0)


def test_what_comes_back_waits_for_the_last_of_its_places():
    late = LateBackend(np.random.default_rng(0))
    lane = late.lane(2, 8, cupy.cuda.Device(0))
    current, out, back = late.streams
    for place in (1, 0):
        with lane.to_host(np.array([place])) as buffer:
            current.do(lambda buffer=buffer, place=place: ctypes.memset(buffer.data.ptr, place + 1, 8))
        if place:
            late.advance(math.inf)
            late.stuck = out
    with lane.from_host(np.array([0, 1])) as buffer:
        pass
    late.advance(math.inf)
    assert back.queue
    late.stuck = None
    late.advance(math.inf)
    assert HostMemory().numpy(buffer).tolist() == [[1] * 8, [2] * 8]


def test_memory_that_a_copy_still_reads_is_not_used_again(host_memory, monkeypatch, rng):
    """A stream that gets to the copies late, and pinned memory that is handed out again as soon as it is let go."""
    free: dict[int, list[bytearray]] = {}
    stream: deque[tuple[np.ndarray, int, Event]] = deque()

    def empty_pinned(num_bytes: int) -> np.ndarray:
        held = free.setdefault(num_bytes, [])
        memory = held.pop() if held else bytearray(num_bytes)
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, held.append, memory)
        return array

    def copy_async(staged: np.ndarray, out: Any) -> Event:
        event = Event(done=False)
        address = np.frombuffer(staged.base, np.uint8) if staged.base is not None else staged
        stream.append((address, out.data.ptr, event))
        return event

    def catch_up(count: int) -> None:
        for _ in range(min(count, len(stream))):
            host, target, event = stream.popleft()
            ctypes.memmove(target, host.ctypes.data, host.nbytes)
            event.done = True

    monkeypatch.setattr(host_memory, "empty_pinned", empty_pinned)
    monkeypatch.setattr(host_memory, "copy_async", copy_async)
    manager = KVCacheManager(LayeredPagedKVCache(1, 200, 16, 1, 4, "uint8", "cuda"))
    sequence = manager.add([])
    sent = []
    for step in range(200):
        batch = manager.prepare({sequence: [step] * 4})
        sent.append((batch, sequence.block_table, 4 * step))
        manager.commit(batch)
        catch_up(rng.integers(0, 4))
        assert len(manager._staging._in_flight) <= len(stream) + 4
    catch_up(len(stream))
    for batch, table, start in sent:
        positions = np.arange(start, start + 4)
        arrays = map(HostMemory().numpy, (batch.positions, batch.slot_mapping, batch.block_tables))
        expected = positions, table[positions // 16] * 16 + positions % 16, table[None]
        assert [array.tolist() for array in arrays] == [array.tolist() for array in expected]
    assert sum(map(len, free.values())) < 150  # it was used again


def test_a_driver_that_is_not_there_is_no_gpu():
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        count = 0
    assert backend._usable_gpus()[0] == count
    if not count:
        with pytest.raises(RuntimeError, match="device 'cuda' was asked for, but CuPy"):
            PagedKVCache(4, 8, 2, 4, np.float16, "cuda")


# With a GPU.


def tokens(n: int, value: float) -> Any:
    return cupy.full((n, 2, 64), value, np.float16)


def test_work_goes_to_the_current_stream(gpu):
    """An update waits there for what comes before it, and sees what that leaves; the host does not wait."""
    cache = PagedKVCache(64, 16, 2, 64, np.float16, "cuda")
    key, slots, go = tokens(1024, 0), cupy.arange(1024), threading.Event()
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)

    def step() -> None:
        key[...] += 1
        cache.update(key, key, slots)

    with stream:
        step()  # compiles and loads, for which the host may have to wait
        stream.synchronize()
        stream.launch_host_func(lambda _: go.wait(10), None)
        step()
        assert not stream.done, "the update waited for the stream"
        go.set()
        k, _ = cache.gather(np.arange(64)[None], [1024])
    stream.synchronize()
    assert (k == 2).all()


def test_two_streams_do_not_race(gpu):
    caches = [PagedKVCache(64, 16, 2, 64, np.float16, "cuda") for _ in range(2)]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    for turn in range(1, 51):
        results = []
        for cache, stream, sign in zip(caches, streams, (1, -1), strict=True):
            with stream:
                key = tokens(1024, sign * turn)
                cache.update(key, key, np.random.default_rng(turn).permutation(1024))
                results.append(cache.gather(np.arange(64)[None], [1024]))
        for stream, (k, v), sign in zip(streams, results, (1, -1), strict=True):
            stream.synchronize()
            assert (k == sign * turn).all()
            assert (v == sign * turn).all()


def test_a_captured_graph_replays_with_other_slots_and_lengths(gpu):
    cache = PagedKVCache(4, 8, 2, 64, np.float16, "cuda")
    key, slots = tokens(3, 1), cupy.array([0, 1, 2])
    tables, lens = cupy.array([[0, 1], [3, 2]], dtype=np.int32), cupy.array([3, 0])
    out = (tokens(12, 7), tokens(12, 7))

    def step() -> None:
        cache.update(key, key, slots)
        cache.gather(tables, lens, out=out)

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        step()  # the first call of each shape compiles and loads its kernel, which a capture does not allow
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        key[...] = 2
        slots[...] = cupy.array([24, -1, 31])
        lens[...] = cupy.array([2, 8])
        graph.launch(stream)
    stream.synchronize()
    expected = np.repeat([1, 1, 2, 0, 0, 0, 0, 0, 0, 2, 7, 7], 2 * 64).reshape(12, 2, 64)
    for array in out:
        assert np.array_equal(cupy.asnumpy(array), expected)


def test_a_graph_over_a_managers_buffers(gpu):
    """Captured once, it writes every later batch to its own slots, however far the host runs ahead."""
    cache = LayeredPagedKVCache(2, 64, 16, 1, 64, np.float16, "cuda")
    manager = KVCacheManager(cache)
    sequences = [manager.add([]) for _ in range(8)]
    key = cupy.zeros((8, 1, 64), np.float16)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        buffers = manager.buffers(num_seqs=8, num_tokens=8, max_blocks=8)

        def step() -> None:
            key[...] += 1
            for layer in cache:
                layer.update(key, key, buffers.slot_mapping)

        step()
        key[...] = 0
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        for turn in range(100):
            batch = manager.prepare({s: [turn] for s in sequences[: 1 + turn % 8]}, buffers=buffers)
            graph.launch(stream)
            manager.commit(batch)
    stream.synchronize()
    for i, sequence in enumerate(sequences):
        k, _ = cache[1].gather(sequence.block_table[None], [sequence.num_tokens])
        turns = [turn + 1 for turn in range(100) if turn % 8 >= i]
        assert cupy.asnumpy(k[:, 0, 0]).tolist() == turns


def test_importing_creates_no_context(gpu):
    program = (
        "import cupy_pagedkv, cupy; from cuda.bindings import driver; driver.cuInit(0); "
        "print(driver.cuDevicePrimaryCtxGetState(0)[2])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "0\n"


def test_layers_on_a_gpu(gpu):
    allocator = BlockAllocator(8, 4)
    cache = LayeredPagedKVCache(2, 8, 4, 2, 64, "bfloat16", "cuda")
    cache.allocate_blocks(6, allocator)
    key = tokens(6, 3).view(ml_dtypes.bfloat16)
    for layer in cache:
        layer.update(key, key, cupy.asarray(cache.compute_slot_mapping(0, 6)))
    k, _ = cache[1].gather([cache.block_table_device_format(1)], [6])
    assert (k.view(np.float16) == 3).all()
