"""Scatter and gather against a copy of the same bytes, and against what else there is: verified, then timed.

    python bench.py                             every size and shape, on a GPU where there is one
    python bench.py gather_cache --only 8x128   some of them
    python bench.py reshape_and_cache --watch   waits for a save of the kernel, then a verdict in seconds
    python bench.py manager                     the host's work for many sequences
    python bench.py --kernels                   what the compiler makes of the kernels, with no GPU and no driver

PyTorch, Triton and xxhash compete where they are installed. Everybody is handed the same: tokens, pools and slots to
scatter; pools, block tables and lengths to gather, with an `out` where the interface has one.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "tests"))

import oracle  # noqa: E402

import cupy_pagedkv.devices.backend as backend  # noqa: E402
from cupy_pagedkv import (  # noqa: E402
    KVCacheManager,
    LayeredPagedKVCache,
    PagedKVCache,
    copy_blocks,
    reshape_and_cache,
)
from cupy_pagedkv.devices import nvrtc  # noqa: E402
from cupy_pagedkv.devices.cuda_backend import CudaBackend, source_of  # noqa: E402
from cupy_pagedkv.devices.emulator import EmulatedBackend  # noqa: E402
from cupy_pagedkv.devices.layout import layout_of  # noqa: E402

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
try:
    import xxhash
except ImportError:
    xxhash = None

BLOCK_SIZE = 16
TOKENS = (1, 16, 64, 512, 4096, 32768)
SHAPES = ((8, 128, "float16"), (1, 576, "float16"), (32, 128, "float32"), (8, 64, "float16"), (8, 46, "float16"))
LONGEST_SEQUENCE = 4096
OPERATIONS = {
    "scatter blocks": "reshape_and_cache",  # slots run through whole blocks, which lie anywhere
    "scatter slots": "reshape_and_cache",  # slots lie anywhere
    "gather": "gather_cache",
}
KERNELS = tuple(sorted(path.stem for path in (ROOT / "kernels").glob("*.cu")))
MANAGER = "manager"
OURS, FLOOR = "cupy_pagedkv", "copy"

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    operation: str
    heads: int
    dim: int
    dtype: str
    tokens: int

    @property
    def shape(self) -> str:
        return f"{self.heads}x{self.dim} {self.dtype}"

    @property
    def label(self) -> str:
        return f"{self.operation} {self.shape} tokens={self.tokens}"

    @property
    def bytes(self) -> int:
        """Of K and V; an operation reads and writes as many."""
        return 2 * self.tokens * self.heads * self.dim * np.dtype(self.dtype).itemsize


@dataclass
class Row:
    """What was measured of a case; times in seconds, medians, of one call."""

    case: Case
    seconds: dict[str, float]
    eager: dict[str, float] = field(default_factory=dict)
    """Host time of one call on a GPU: of ours, and of launching the same kernel with the same arguments."""

    def share_of_copy(self, name: str = OURS) -> float:
        return self.seconds[FLOOR] / self.seconds[name]

    def ratio_to(self, name: str) -> float:
        """How many times as fast as `name` this package is."""
        return self.seconds[name] / self.seconds[OURS]


class Problem:
    """The arrays of a case: `sets` of inputs that share nothing, over one pair of pools."""

    def __init__(self, case: Case, sets: int, xp: Any) -> None:
        rng = np.random.default_rng(0)
        n, shape = case.tokens, (case.heads, case.dim)
        lengths = np.array([min(LONGEST_SEQUENCE, n - i) for i in range(0, n, LONGEST_SEQUENCE)], np.int32)
        num_seqs, longest = len(lengths), -(-int(lengths.max()) // BLOCK_SIZE)
        num_blocks = sets * num_seqs * longest * 5 // 4 + 1
        tables = rng.permutation(num_blocks)[: sets * num_seqs * longest].reshape(sets, num_seqs, longest)
        slots = (tables[..., None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(sets, -1)[:, :n]
        if case.operation == "scatter slots":
            slots = rng.permutation(num_blocks * BLOCK_SIZE)[: sets * n].reshape(sets, n)
        self.case, self.sets, self.xp = case, sets, xp
        self.host_pools = random_tokens(rng, (2, num_blocks, BLOCK_SIZE, *shape), case.dtype)
        self.host_tokens = random_tokens(rng, (2, sets, n, *shape), case.dtype)
        self.host_slots, self.host_tables, self.host_lengths = slots, tables, lengths
        self.pools = xp.array(self.host_pools)
        self.flat = self.pools.reshape(2, -1, *shape)  # by slot
        self.tokens = xp.array(self.host_tokens)
        self.out = xp.zeros(self.tokens.shape, self.tokens.dtype)
        self.slots, self.tables = xp.asarray(slots), xp.asarray(tables.astype(np.int32))
        self.lengths = xp.asarray(lengths)
        self.cache = PagedKVCache.from_pools(self.pools[0], self.pools[1])

    def expected(self) -> np.ndarray:
        """The bytes after the first set: both pools of a scatter, or K and V of a gather."""
        if self.case.operation != "gather":
            pools = self.host_pools.copy()
            for tokens, pool in zip(self.host_tokens[:, 0], pools, strict=True):
                oracle.scatter(tokens, pool, self.host_slots[0])
            return pools
        starts = [0] * len(self.host_lengths)
        return np.stack(
            [oracle.gather(pool, self.host_tables[0], self.host_lengths, starts) for pool in self.host_pools]
        )

    def verify(self, name: str, call: Call, expected: np.ndarray) -> None:
        """Run a contender's call for the first set, and compare all bytes that it may have touched."""
        if name == FLOOR:
            self.out[...] = 0
            call()
            got, expected = self.out[:, 0], self.host_tokens[:, 0]
        elif self.case.operation == "gather":
            self.out[...] = 0
            got = self.xp.stack([self.xp.asarray(array) for array in call()])
        else:
            self.pools[...] = self.xp.asarray(self.host_pools)
            call()
            got = self.pools
        wrong = wrong_bytes(got, expected, self.xp)
        if len(wrong):
            raise SystemExit(f"{self.case.label}: {name} is wrong in {len(wrong)} bytes, the first at {wrong[0]}")


def random_tokens(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return oracle.random_bytes(rng, size).view(dtype).reshape(shape)


def wrong_bytes(got: Any, expected: np.ndarray, xp: Any) -> np.ndarray:
    """Where the bytes of an array on the device differ from those of one on the host."""
    got = got if xp is np else xp.asnumpy(got)
    return np.flatnonzero(got.reshape(-1).view(np.uint8) != expected.reshape(-1).view(np.uint8))


# Who competes. Each gets one callable for each set of inputs.


def contenders(p: Problem) -> dict[str, list[Call]]:
    makers = {FLOOR: copy_calls, OURS: our_calls, "indexing": indexing_calls}
    if torch is not None and (p.xp is np or torch.cuda.is_available()):
        makers["torch"] = torch_calls
        if triton is not None and p.xp is not np and p.case.operation != "gather":
            makers["triton"] = triton_calls
    return {name: [make(p, i) for i in range(p.sets)] for name, make in makers.items()}


def copy_calls(p: Problem, i: int) -> Call:
    (k, v), (k_out, v_out) = p.tokens[:, i], p.out[:, i]

    def on_cpu() -> None:
        np.copyto(k_out, k)
        np.copyto(v_out, v)

    def on_gpu() -> None:
        k_out.data.copy_from_device_async(k.data, k.nbytes)
        v_out.data.copy_from_device_async(v.data, v.nbytes)

    return on_cpu if p.xp is np else on_gpu


def our_calls(p: Problem, i: int) -> Call:
    (key, value), slots, tables, lengths, cache = p.tokens[:, i], p.slots[i], p.tables[i], p.lengths, p.cache
    out = (p.out[0, i], p.out[1, i])
    if p.case.operation == "gather":
        return lambda: cache.gather(tables, lengths, out=out)
    return lambda: cache.update(key, value, slots)


def indexing_calls(p: Problem, i: int) -> Call:
    (key, value), (k_pool, v_pool), slots, tables = p.tokens[:, i], p.flat, p.slots[i], p.tables[i]
    k_out, v_out = p.out[:, i]
    total, each = p.case.tokens, p.xp.arange(BLOCK_SIZE)

    def scatter() -> None:
        k_pool[slots] = key
        v_pool[slots] = value

    def gather() -> Any:
        rows = (tables[..., None] * BLOCK_SIZE + each).reshape(-1)[:total]
        if p.xp is np:
            return k_pool[rows], v_pool[rows]
        return k_pool.take(rows, 0, k_out), v_pool.take(rows, 0, v_out)

    return gather if p.case.operation == "gather" else scatter


def torch_calls(p: Problem, i: int) -> Call:
    as_torch = torch.from_numpy if p.xp is np else torch.from_dlpack
    (key, value), (k_pool, v_pool) = map(as_torch, p.tokens[:, i]), map(as_torch, p.flat)
    (k_out, v_out), slots, tables = map(as_torch, p.out[:, i]), as_torch(p.slots[i]), as_torch(p.tables[i])
    total, each = p.case.tokens, torch.arange(BLOCK_SIZE, dtype=torch.int32, device=slots.device)

    def scatter() -> None:
        k_pool.index_copy_(0, slots, key)
        v_pool.index_copy_(0, slots, value)

    def gather() -> Any:
        rows = (tables[..., None] * BLOCK_SIZE + each).view(-1)[:total]
        torch.index_select(k_pool, 0, rows, out=k_out)
        torch.index_select(v_pool, 0, rows, out=v_out)
        return p.out[:, i]

    return gather if p.case.operation == "gather" else scatter


if triton is not None:

    @triton.jit
    def store(key, value, k_pool, v_pool, slots, ROW: tl.constexpr, PLACES: tl.constexpr):  # type: ignore  # noqa
        """A program a token, as the serving engines' Triton kernels have it."""
        token = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + token)
        if slot >= 0:
            places = tl.arange(0, PLACES)
            tl.store(k_pool + slot * ROW + places, tl.load(key + token * ROW + places, places < ROW), places < ROW)
            tl.store(v_pool + slot * ROW + places, tl.load(value + token * ROW + places, places < ROW), places < ROW)


def triton_calls(p: Problem, i: int) -> Call:
    arrays = [torch.from_dlpack(array) for array in (*p.tokens[:, i], *p.flat, p.slots[i])]
    row = p.case.heads * p.case.dim
    grid, places = (p.case.tokens,), triton.next_power_of_2(row)
    return lambda: store[grid](*arrays, ROW=row, PLACES=places)


# Time


def time_on_cpu(calls: dict[str, list[Call]], seconds: float) -> dict[str, float]:
    """Medians of single calls. All take turns, in an order of their own each round."""
    rng = np.random.default_rng(0)
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for name in rng.permutation(names):
            [call] = calls[name]
            call()
            for _ in range(3):
                start = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(samples[name]) for name in names}


def time_on_gpu(calls: dict[str, list[Call]], seconds: float, cupy: Any) -> dict[str, float]:
    """Medians of the device's time for one call: all sets in one CUDA graph, replayed with a cold cache."""
    flushed = cupy.zeros(2 * cupy.cuda.Device().attributes["L2CacheSize"], cupy.uint8)
    stream = cupy.cuda.Stream(non_blocking=True)
    torch_stream: Any = nullcontext()
    if "torch" in calls:
        torch_stream = torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr))
    graphs = {}
    cupy.cuda.Device().synchronize()  # what made the arrays ran on another stream
    with stream, torch_stream:
        for name, of_sets in calls.items():
            for call in of_sets:
                call()  # compiles, and leaves in the allocators what a capture cannot ask for
            stream.synchronize()
            stream.begin_capture()
            try:
                for call in of_sets:
                    call()
            except Exception as error:
                if name in (OURS, FLOOR):
                    raise
                print(f"{name} cannot be captured and is left out: {error}", file=sys.stderr)
                with suppress(Exception):
                    stream.end_capture()
            else:
                graphs[name] = stream.end_capture()
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        begin, finish = cupy.cuda.Event(), cupy.cuda.Event()
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < 20 or time.perf_counter() < end:
            for name, graph in graphs.items():
                flushed.fill(rounds % 256)
                begin.record(stream)
                graph.launch(stream)
                finish.record(stream)
                finish.synchronize()
                samples[name].append(cupy.cuda.get_elapsed_time(begin, finish) / 1e3 / len(calls[name]))
            rounds += 1
    return {name: statistics.median(times) for name, times in samples.items()}


def host_time(call: Call, cupy: Any) -> float:
    """Median host time of one call that only queues work."""
    samples = []
    for _ in range(30):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        for _ in range(20):  # fewer than a stream's queue holds
            call()
        samples.append((time.perf_counter() - start) / 20)
    return statistics.median(samples)


class Launched:
    """A kernel that remembers how it was launched last."""

    last: "Launched"

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __call__(self, *arguments: Any) -> None:
        self.arguments = arguments
        Launched.last = self
        self.kernel(*arguments)


class RememberingBackend(CudaBackend):
    def _build_kernel(self, name: str, defines: Any) -> Any:
        return Launched(super()._build_kernel(name, defines))


def bare_launch(call: Call, cupy: Any) -> Call:
    """The launch that `call` makes, and nothing else of it."""
    remembering = RememberingBackend(cupy)
    usual, backend._cuda = backend._cuda, lambda: remembering  # type: ignore[assignment]
    try:
        call()
    finally:
        backend._cuda = usual
    kernel, arguments = Launched.last.kernel, Launched.last.arguments
    return lambda: kernel(*arguments)


def measure(case: Case, xp: Any, seconds: float) -> Row:
    sets = 1
    if xp is not np:
        # Several times the L2 cache, where the graph stays of a reasonable length.
        l2 = xp.cuda.Device().attributes["L2CacheSize"]
        sets = min(64, max(2, -(-4 * l2 // case.bytes)))
    problem = Problem(case, sets, xp)
    calls = contenders(problem)
    expected = problem.expected()
    for name, of_sets in calls.items():
        problem.verify(name, of_sets[0], expected)
    if xp is np:
        return Row(case, time_on_cpu(calls, seconds))
    ours = calls[OURS][0]
    row = Row(case, {}, {OURS: host_time(ours, xp), "bare launch": host_time(bare_launch(ours, xp), xp)})
    if case.operation != "gather":
        empty = xp.RawKernel('extern "C" __global__ void empty() {}', "empty")
        calls["empty kernel"] = [lambda: empty((1,), (32,), ())] * sets
    row.seconds = time_on_gpu(calls, seconds, xp)
    return row


# The host's work for many sequences


@dataclass
class Chore:
    """What was measured of the manager; times in seconds, medians, the manager's first."""

    label: str
    seconds: dict[str, float]
    at_least: dict[str, float]
    """How many times as fast as others the manager sets itself to be."""

    def ratio_to(self, name: str) -> float:
        return self.seconds[name] / self.seconds[OURS]


def in_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians of what the calls say they took. All take turns, in an order of their own each round."""
    rng = np.random.default_rng(0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in rng.permutation(list(calls)):
            samples[name].append(calls[name]())
    return {name: statistics.median(times) for name, times in samples.items()}


def a_manager(num_blocks: int) -> KVCacheManager:
    return KVCacheManager(LayeredPagedKVCache(1, num_blocks, BLOCK_SIZE, 1, 1, "uint8", "cpu"))


class PlainSequence:
    """As one would write it who has no manager: lists, and a loop over the sequences."""

    def __init__(self, blocks: list[int], tokens: list[int]) -> None:
        self.blocks, self.tokens = blocks, tokens


def plain_step(sequences: Sequence[PlainSequence], new: Sequence[int], free: deque[int]) -> list[np.ndarray]:
    slots, positions, lengths, firsts, tables = [], [], [], [0], []
    for sequence in sequences:
        position = len(sequence.tokens)
        if position % BLOCK_SIZE == 0:
            sequence.blocks.append(free.popleft())
        slots.append(sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        positions.append(position)
        lengths.append(position + 1)
        firsts.append(firsts[-1] + 1)
    longest = max(len(sequence.blocks) for sequence in sequences)
    for sequence in sequences:
        tables.append(sequence.blocks + [-1] * (longest - len(sequence.blocks)))
    arrays = [np.array(slots, np.int64), np.array(positions, np.int64), np.array(lengths, np.int32)]
    arrays += [np.array(firsts, np.int32), np.array(tables, np.int32)]
    for sequence, token in zip(sequences, new, strict=True):
        sequence.tokens.append(token)
    return arrays


def decode_chore(rounds: int) -> Chore:
    """A token for each of 256 sequences, which grow from 200 to 2,000 tokens by one in each round."""
    rng = np.random.default_rng(0)
    manager = a_manager(60_000)
    sequences, plain = [], []
    for length in rng.integers(200, 2001, 256).tolist():
        tokens = rng.integers(0, 100_000, length).tolist()
        sequences.append(manager.add(tokens))
        manager.commit(manager.prepare({sequences[-1]: tokens}))
        plain.append(PlainSequence(sequences[-1].block_table.tolist(), tokens))
    used = sum(len(sequence.blocks) for sequence in plain)
    free = deque(range(used, 60_000))
    new = rng.integers(0, 100_000, 256).tolist()
    by_sequence = {sequence: [token] for sequence, token in zip(sequences, new, strict=True)}
    arrays: dict[str, list[np.ndarray]] = {}

    def ours() -> float:
        start = time.perf_counter()
        batch = manager.prepare(by_sequence)
        manager.commit(batch)
        seconds = time.perf_counter() - start
        arrays[OURS] = [batch.slot_mapping, batch.positions, batch.seq_lens, batch.cu_seqlens, batch.block_tables]
        return seconds

    def a_loop() -> float:
        start = time.perf_counter()
        arrays["plain loop"] = plain_step(plain, new, free)
        return time.perf_counter() - start

    seconds = in_turns({OURS: ours, "plain loop": a_loop}, rounds)
    for a, b in zip(*arrays.values(), strict=True):
        if a.dtype != b.dtype or not np.array_equal(a, b):
            raise SystemExit("decode: the manager and the plain loop disagree")
    return Chore("prepare + commit, a token of 256 sequences", seconds, {"plain loop": 3.0})


def add_chore(as_list: bool, rounds: int) -> Chore:
    """A prompt of 16,384 tokens that is in the pool."""
    prompt = np.random.default_rng(0).integers(0, 100_000, 16_384)
    manager = a_manager(2000)
    with manager.add(prompt) as sequence:
        manager.commit(manager.prepare({sequence: prompt}))
    tokens: Any = prompt.tolist() if as_list else prompt

    def ours() -> float:
        start = time.perf_counter()
        sequence = manager.add(tokens)
        seconds = time.perf_counter() - start
        if sequence.num_cached_tokens != len(prompt) - BLOCK_SIZE:
            raise SystemExit(f"add: {sequence.num_cached_tokens} tokens were found")
        manager.free(sequence)
        return seconds

    def hashed() -> float:
        """Each block's hash covers the one before, as nano-vllm has it."""
        start = time.perf_counter()
        hashes: list[int] = []
        for i in range(0, len(tokens), BLOCK_SIZE):
            h = xxhash.xxh64()
            if hashes:
                h.update(hashes[-1].to_bytes(8, "little"))
            h.update(np.array(tokens[i : i + BLOCK_SIZE]).tobytes())
            hashes.append(h.intdigest())
        return time.perf_counter() - start

    calls = {OURS: ours} if xxhash is None else {OURS: ours, "xxhash": hashed}
    label = f"add, 16,384 tokens that hit, {'a list' if as_list else 'an array'}"
    return Chore(label, in_turns(calls, rounds), {"xxhash": 2.0 if as_list else 4.0})


def size_chore(rounds: int, sizes: tuple[int, int] = (1000, 1_000_000)) -> Chore:
    """A prompt comes and goes in a pool in which each block is cached, so that as many have to be evicted."""

    def in_pool(num_blocks: int) -> Callable[[], float]:
        rng = np.random.default_rng(0)
        manager = a_manager(num_blocks)
        for _ in range(0, num_blocks, 1000):
            tokens = rng.integers(0, 100_000, 1000 * BLOCK_SIZE)
            with manager.add(tokens) as sequence:
                manager.commit(manager.prepare({sequence: tokens}))

        def come_and_go() -> float:
            tokens = rng.integers(0, 100_000, 400)
            start = time.perf_counter()
            with manager.add(tokens) as sequence:
                manager.commit(manager.prepare({sequence: tokens}))
                for _ in range(10):
                    manager.commit(manager.prepare({sequence: [1]}))
            return time.perf_counter() - start

        return come_and_go

    small, large = sizes
    seconds = in_turns({OURS: in_pool(large), f"{small:,} blocks": in_pool(small)}, rounds)
    return Chore(f"a prompt of 400 tokens, 10 more, free, {large:,} blocks", seconds, {f"{small:,} blocks": 1 / 1.5})


def chores(quick: bool) -> Iterator[Chore]:
    rounds = 50 if quick else 300
    yield decode_chore(rounds)
    yield add_chore(False, rounds)
    yield add_chore(True, rounds)
    yield size_chore(rounds, (1000, 20_000 if quick else 1_000_000))


def chore_lines(measured: Iterable[Chore]) -> Iterator[str]:
    yield f"{'many sequences, on the host':<58}{'µs':>9}   times as fast as"
    for chore in measured:
        cells = [f"{name} {chore.ratio_to(name):.2f}" for name in chore.seconds if name != OURS]
        yield f"{chore.label:<58}{chore.seconds[OURS] * 1e6:>9.1f}   {', '.join(cells) or 'nothing that is installed'}"


# What is printed


def table(rows: Iterable[Row]) -> Iterable[str]:
    """A header, and a line for each row as it comes."""
    rivals: list[str] = []
    for row in rows:
        if not rivals:
            rivals = [name for name in row.seconds if name not in (OURS, FLOOR, "empty kernel")]
            titles = ["µs", "GB/s", "of copy", *(f"x {name}" for name in rivals)]
            titles += ["eager µs", "bare µs"] if row.eager else []
            yield f"{'operation':<15}{'shape':<16}{'tokens':>7}" + "".join(f"{title:>12}" for title in titles)
        case, seconds = row.case, row.seconds[OURS]
        cells = [f"{seconds * 1e6:.1f}", f"{2 * case.bytes / seconds / 1e9:.1f}", f"{row.share_of_copy():.2f}"]
        cells += [f"{row.ratio_to(name):.2f}" if name in row.seconds else "" for name in rivals]
        cells += [f"{time * 1e6:.1f}" for time in row.eager.values()]
        yield f"{case.operation:<15}{case.shape:<16}{case.tokens:>7}" + "".join(f"{cell:>12}" for cell in cells)


def bar(text: str, at_least: float, measured: Iterable[tuple[float, str]]) -> Iterable[str]:
    results = sorted(measured)
    if results:
        met = sum(value >= at_least for value, _ in results)
        verdict = "met   " if met == len(results) else "MISSED"
        worst, label = results[0]
        yield f"{verdict} {text}: in {met} of {len(results)}; the least is {worst:.2f}, {label}"


def chore_bars(measured: Sequence[Chore]) -> Iterator[str]:
    for chore in measured:
        for name, at_least in chore.at_least.items():
            if name in chore.seconds:
                text = f"{chore.label} >= {at_least:.2g} of {name}"
                yield from bar(text, at_least, [(chore.ratio_to(name), chore.label)])


def bars(rows: Sequence[Row], on_gpu: bool) -> Iterable[str]:
    """What this package sets itself, and by how much it is met or missed."""

    def rivals(row: Row, *names: str) -> list[tuple[float, str]]:
        """Against each of those that took part."""
        times = {name: row.ratio_to(name) for name in names if name in row.seconds}
        return [(ratio, f"{row.case.label} against {name}") for name, ratio in times.items()]

    if on_gpu:
        large = [row for row in rows if row.case.tokens >= 16384 and row.case.shape == "8x128 float16"]
        yield from bar(">= 0.95 of a device copy from 16k tokens, 8x128 float16", 0.95,
                       [(row.share_of_copy(), row.case.label) for row in large])  # fmt: skip
        yield from bar("ahead of indexing, PyTorch and Triton", 1.0,
                       [r for row in rows for r in rivals(row, "indexing", "torch", "triton")])  # fmt: skip
        appends = [row for row in rows if row.case.tokens == 64 and "empty kernel" in row.seconds]
        yield from bar("an append of 64 tokens within 1.3 of an empty kernel (as its inverse)", 1 / 1.3,
                       [(row.ratio_to("empty kernel"), row.case.label) for row in appends])  # fmt: skip
        yield from bar("an eager call within 2.0 of a bare launch (as its inverse)", 1 / 2.0,
                       [(row.eager["bare launch"] / row.eager[OURS], row.case.label) for row in rows])  # fmt: skip
        return
    in_blocks = [row for row in rows if row.case.bytes >= 4e6 and row.case.operation != "scatter slots"]
    yield from bar(">= 0.85 of np.copyto from 4 MB, gather and slots through whole blocks", 0.85,
                   [(row.share_of_copy(), row.case.label) for row in in_blocks])  # fmt: skip
    for kernel, text in (("reshape_and_cache", "scatter"), ("gather_cache", "gather")):
        of_kernel = [row for row in rows if OPERATIONS[row.case.operation] == kernel]
        yield from bar(f"{text} >= 1.0 of NumPy indexing from 512 tokens", 1.0,
                       [r for row in of_kernel if row.case.tokens >= 512 for r in rivals(row, "indexing")])  # fmt: skip
        yield from bar(f"{text} >= 1.0 of PyTorch from 512 tokens", 1.0,
                       [r for row in of_kernel if row.case.tokens >= 512 for r in rivals(row, "torch")])  # fmt: skip
        yield from bar(f"{text} >= 1.0 of PyTorch below 512 tokens", 1.0,
                       [r for row in of_kernel if row.case.tokens < 512 for r in rivals(row, "torch")])  # fmt: skip
    single = [row for row in rows if row.case.tokens == 1 and row.case.operation != "gather"]
    yield from bar("update of one token >= 1.0 of two index_copy_", 1.0,
                   [r for row in single for r in rivals(row, "torch")])  # fmt: skip


def machine(name: str, xp: Any) -> dict[str, str]:
    facts = {
        "backend": name,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    if torch is not None:
        facts["torch"] = f"{torch.__version__}, {torch.get_num_threads()} threads"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts["cpu"] = f"{cores} cores, {platform.machine()}"
    facts["load"] = f"{os.getloadavg()[0]:.1f}"  # of others, before anything is timed
    if xp is not np:
        properties = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
        facts["gpu"] = properties["name"].decode()
        facts["driver"] = str(xp.cuda.runtime.driverGetVersion())
        facts["cupy"] = xp.__version__
        if triton is not None:
            facts["triton"] = triton.__version__
    return facts


def plot(rows: Sequence[Row], path: str) -> None:
    """Share of the floor against size: a panel for each operation and shape, a line for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    operations = list(dict.fromkeys(row.case.operation for row in rows))
    shapes = list(dict.fromkeys(row.case.shape for row in rows))
    figure, axes = pyplot.subplots(
        len(operations), len(shapes), figsize=(3.2 * len(shapes) + 1, 2.6 * len(operations) + 0.6),
        squeeze=False, sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for i, operation in enumerate(operations):
        for j, shape in enumerate(shapes):
            of_panel = [row for row in rows if (row.case.operation, row.case.shape) == (operation, shape)]
            panel = axes[i][j]
            for name in [OURS, *(n for n in rows[0].seconds if n not in (OURS, FLOOR, "empty kernel"))]:
                points = [(row.case.bytes, row.share_of_copy(name)) for row in of_panel if name in row.seconds]
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name,
                           linewidth=2 if name == OURS else 1)  # fmt: skip
            panel.axhline(1, color="grey", linewidth=0.8, linestyle="--")
            panel.set_xscale("log")
            panel.set_title(f"{operation}, {shape}", fontsize=9)
    figure.supxlabel("bytes of K and V")
    figure.supylabel("share of a copy of the same bytes")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


# The compiler's report


class RecordingBackend(EmulatedBackend):
    """Writes down what would be compiled and launched, and does neither."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[str, Any]] = []

    def _build_kernel(self, name: str, defines: Any) -> Any:
        self.recorded.append((name, defines))
        return lambda grid, block, arguments: None


@contextmanager
def emulated_by(instance: EmulatedBackend) -> Any:
    usual = backend._emulated, backend.EMULATE
    backend._emulated, backend.EMULATE = lambda: instance, True  # type: ignore[assignment]
    try:
        yield
    finally:
        backend._emulated, backend.EMULATE = usual


def specialisations(kernel: str, shapes: Iterable[tuple[int, int, str]]) -> dict[str, Any]:
    """The defines of `kernel` for each of the shapes."""
    found = {}
    for heads, dim, dtype in shapes:
        recording = RecordingBackend()
        with emulated_by(recording):
            cache = PagedKVCache(2, BLOCK_SIZE, heads, dim, dtype, "cpu")
            tokens = np.zeros((1, heads, dim), dtype)
            cache.update(tokens, tokens, np.array([0]))
            cache.gather(np.array([[0]], np.int32), np.array([1], np.int32))
            cache.copy_blocks(np.array([0]), np.array([1]))
        found[f"{heads}x{dim} {dtype}"] = dict(recording.recorded)[kernel]
    return found


def compiler_reports(
    kernel: str, architectures: Iterable[int], shapes: Iterable[tuple[int, int, str]]
) -> dict[str, nvrtc.CompilerReport]:
    """The compiler's report on each specialisation for each architecture."""
    sources = {shape: source_of(kernel, defines) for shape, defines in specialisations(kernel, shapes).items()}
    wanted = [(shape, arch) for shape in sources for arch in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        reports = threads.map(lambda pair: nvrtc.report_on(sources[pair[0]], pair[1]), wanted)
        return {f"{kernel} {shape}, sm_{arch}": report for (shape, arch), report in zip(wanted, reports, strict=True)}


# One verdict on a kernel, and one at each save


CHECKED = (  # heads, dim, dim of V, dtype, layout, first element, tokens, sequences
    (8, 128, 128, np.float16, "NHD", 0, 37, 3),
    (3, 46, 40, np.float16, "HND", 0, 19, 34),  # more sequences than a warp has lanes
    (5, 67, 30, np.uint8, "packed", 1, 40, 3),  # single bytes, and more of them than a warp takes
)
NUM_BLOCKS, SMALL_BLOCK = 12, 8


def check_kernel(kernel: str, xp: Any) -> str | None:
    """What is wrong with `kernel`, on the GPU or the emulated device, or nothing.

    Two layers, K and V of their own shapes, padding, and what is not in the pool: all bytes against plain loops.
    """
    rng = np.random.default_rng(1)
    for heads, dim, v_dim, dtype, layout, first, n, num_seqs in CHECKED:
        size, views = oracle.pools(layout, 2 * NUM_BLOCKS, SMALL_BLOCK, heads, dim, dtype, v_dim, first=first)
        host = oracle.random_bytes(rng, size)
        buffer = xp.array(host)

        def layers(pools: Any) -> list[Any]:
            return [pool.reshape(2, NUM_BLOCKS, *pool.shape[1:]) for pool in pools]

        if kernel == "gather_cache":
            got, expected = check_gather(rng, num_seqs, layers(views(host)), layers(views(buffer)), xp)
        elif kernel == "copy_blocks":
            blocks = rng.permutation(NUM_BLOCKS)
            src, dst = [*blocks[:4], NUM_BLOCKS, -1, 0, 0], [*blocks[4:10], NUM_BLOCKS, -1]  # the last four are skipped
            copy_blocks(*layers(views(buffer)), xp.asarray(src), xp.asarray(dst))
            for pool in map(oracle.opaque, layers(views(host))):
                for source, target in zip(src[:4], dst[:4], strict=True):
                    pool[:, target] = pool[:, source]
            got, expected = buffer, host
        else:
            tokens = [oracle.random_array(rng, (n, 2, heads, d), dtype).swapaxes(0, 1) for d in (dim, v_dim)]
            slots = rng.permutation(NUM_BLOCKS * SMALL_BLOCK)[:n]
            slots[[3, 5]] = -1, NUM_BLOCKS * SMALL_BLOCK
            on_device = [xp.array(array.swapaxes(0, 1)).swapaxes(0, 1) for array in tokens]
            reshape_and_cache(*on_device, *layers(views(buffer)), xp.asarray(slots))
            for array, pools in zip(tokens, layers(views(host)), strict=True):
                for layer in range(2):
                    oracle.scatter(array[layer], pools[layer], np.where(slots < NUM_BLOCKS * SMALL_BLOCK, slots, -1))
            got, expected = buffer, host
        wrong = wrong_bytes(got, expected, xp)
        if len(wrong):
            case = f"{heads}x{dim} {np.dtype(dtype)} {layout}"
            return f"{case}: {len(wrong)} of {expected.nbytes} bytes differ, the first at {wrong[0]}"
    return None


def check_gather(rng: Any, num_seqs: int, pools: list[Any], on_device: list[Any], xp: Any) -> tuple[Any, np.ndarray]:
    """What a gather of sequences leaves in memory, and what it should: blocks that are not in the pool come out as
    zeros, and rows that `out` has no place for are dropped."""
    tables = rng.integers(-1, NUM_BLOCKS + 1, (num_seqs, 3))
    lengths = rng.integers(0, 3 * SMALL_BLOCK + 1, num_seqs)
    starts = rng.integers(0, lengths + 1)
    num_rows = int((lengths - starts).sum()) - 3
    sizes = [2 * (num_rows + 2) * pool.shape[3] * pool.shape[4] for pool in pools]
    dtype = pools[0].dtype
    got, expected = xp.full(sum(sizes) * dtype.itemsize, 7, np.uint8), np.full(sum(sizes) * dtype.itemsize, 7, np.uint8)

    def outputs(memory: Any) -> list[Any]:
        parts = memory.view(dtype)[: sizes[0]], memory.view(dtype)[sizes[0] :]
        shaped = (part.reshape(2, num_rows + 2, *pool.shape[3:]) for part, pool in zip(parts, pools, strict=True))
        return [array[:, 1:-1] for array in shaped]

    out = outputs(got)
    indices = [xp.asarray(array) for array in (tables, lengths, starts)]
    layout = layout_of(("key", "value"), *out, *on_device)
    backend.backend_of(("k_cache",), on_device[0]).gather_cache(*out, *on_device, *indices, num_rows, layout)
    for array, pool in zip(outputs(expected), pools, strict=True):
        rows, blocks = oracle.opaque(array), oracle.opaque(pool)
        places = [(i, t) for i in range(num_seqs) for t in range(starts[i], lengths[i])]
        for row, (i, t) in enumerate(places[:num_rows]):
            block = tables[i, t // SMALL_BLOCK]
            inside = 0 <= block < NUM_BLOCKS
            rows[:, row] = blocks[:, block, t % SMALL_BLOCK] if inside else np.zeros_like(blocks[:, 0, 0])
    return got, expected


WATCHED = (SHAPES[0], SHAPES[-1])  # whose compiler's report is quickly made


def verdict(kernel: str, xp: Any, arch: int, last: dict[str, str | float]) -> tuple[int, dict[str, str | float]]:
    """Compile, verify and time `kernel`, or print the compiler's report; returns 1 and `last` if anything is wrong."""
    start = time.perf_counter()
    instance = EmulatedBackend()
    backend.DEBUG = False  # the check hands the kernel what that would refuse
    try:
        with nullcontext() if xp is not np else emulated_by(instance):
            wrong = check_kernel(kernel, xp)
        if wrong is None:
            results: dict[str, str | float] = {}
            if xp is np:
                try:
                    reports = compiler_reports(kernel, [arch], WATCHED)
                except RuntimeError as error:  # NVRTC or nvdisasm is not installed
                    results["no report by the compiler"] = str(error)
                else:
                    results.update({label: str(report) for label, report in reports.items()})
            else:
                for operation in [op for op, name in OPERATIONS.items() if name == kernel]:
                    for tokens in (64, 4096):
                        case = Case(operation, *SHAPES[0], tokens)
                        results[case.label] = time_on_gpu(
                            {OURS: contenders(Problem(case, 8, xp))[OURS]}, 0.05, xp
                        )[OURS]  # fmt: skip
    except Exception as error:  # whatever a broken edit may cause
        print(f"{error}\n{kernel} FAILED ({time.perf_counter() - start:.1f} s)")
        return 1, last
    seconds = time.perf_counter() - start
    if wrong is not None:
        print(f"{kernel} is WRONG: {wrong} ({seconds:.1f} s)")
        return 1, last
    where = "the emulated device" if xp is np else "the GPU"
    print(f"{kernel} is right on {where} ({seconds:.1f} s)")
    for label, result in results.items():
        before = last.get(label)
        if isinstance(result, str):
            print(f"  {label}: {result}" + (f"\n    before: {before}" if before not in (None, result) else ""))
        else:
            change = f", {result / before - 1:+.1%}" if isinstance(before, float) else ""
            print(f"  {label}: {result * 1e6:.2f} µs{change}")
    return 0, results


def watch(kernel: str, arguments: Sequence[str]) -> NoReturn:
    """At each save of the kernel, a verdict of a process of its own, which a broken kernel may take down.

    That process is started ahead, so that all it imports is there when the save comes.
    """
    path = ROOT / "kernels" / f"{kernel}.cu"

    def stamp() -> tuple[int, int] | None:
        try:
            status = path.stat()
        except FileNotFoundError:  # an editor is replacing it
            return None
        return status.st_mtime_ns, status.st_size

    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "bench.py"),
            kernel,
            "--check-when-told",
            f"{folder}/last.json",
            *arguments,
        ]
        child = subprocess.Popen(command, stdin=subprocess.PIPE)
        seen = stamp()
        print(f"waiting for a save of {path}; Ctrl-C ends", flush=True)
        try:
            while True:
                time.sleep(0.02)
                now = stamp()
                if now is None or now == seen or now[1] == 0:
                    continue
                time.sleep(0.02)
                if stamp() != now:  # it is still being written
                    continue
                seen = now
                try:
                    child.communicate(b"go\n", timeout=60)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
                    print(f"{kernel} is WRONG: no verdict after 60 s; does a loop never end?")
                else:
                    if child.returncode < 0:
                        crash = f"signal {-child.returncode}"
                        print(f"{kernel} is WRONG: it crashed ({crash}); an address outside all arrays?")
                print("waiting for the next save", flush=True)
                child = subprocess.Popen(command, stdin=subprocess.PIPE)
        finally:
            child.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", nargs="?", choices=(*KERNELS, MANAGER), help="only what runs this kernel, or the "
                        "bookkeeping alone")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default a GPU where there is one")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows with all of these words in "
                        "their name, such as gather, blocks, 8x128, float32 or tokens=512")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer sizes and shapes, and less time for each")
    parser.add_argument("--json", metavar="FILE", help="write what was measured")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the share of the floor against size")
    parser.add_argument("--watch", action="store_true", help="a verdict on KERNEL at each save")
    parser.add_argument("--kernels", action="store_true", help="what the compiler makes of the kernels")
    parser.add_argument("--arch", type=int, choices=nvrtc.ARCHITECTURES, help="for --watch (90) and --kernels (all)")
    parser.add_argument("--check-when-told", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.watch or options.kernels) and options.kernel == MANAGER:
        parser.error("the manager is no kernel")
    if options.watch and options.kernel is None:
        parser.error(f"--watch needs the kernel: {' or '.join(KERNELS)}")
    for path in filter(None, (options.json, options.plot)):
        if not Path(path).resolve().parent.is_dir():  # better known now than when all has been measured
            parser.error(f"there is no folder for {path}")
    try:
        place = backend.backend_on(options.device)[0]
    except RuntimeError as error:
        parser.error(str(error))
    xp = place.xp if isinstance(place, CudaBackend) else np

    if options.check_when_told is not None:
        memory = Path(options.check_when_told)
        if xp is np:
            with suppress(RuntimeError):  # `verdict` says so where it is not installed
                nvrtc.report_on('extern "C" __global__ void loads_the_compiler() {}', options.arch or 90)
        else:
            xp.zeros(1)
        if not sys.stdin.readline():  # whoever would tell is gone
            return 0
        last = json.loads(memory.read_text()) if memory.exists() else {}
        status, results = verdict(options.kernel, xp, options.arch or 90, last)
        memory.write_text(json.dumps(results))
        return status
    if options.watch:
        watch(options.kernel, [f"--{name}={getattr(options, name)}" for name in ("device", "arch")
                               if getattr(options, name) is not None])  # fmt: skip
    kernels = KERNELS if options.kernel is None else (options.kernel,)
    if options.kernels:
        architectures = nvrtc.ARCHITECTURES if options.arch is None else (options.arch,)
        for kernel in kernels:
            try:
                reports = compiler_reports(kernel, architectures, SHAPES)
            except Exception as error:  # NVRTC's text names the line
                print(error, file=sys.stderr)
                return 1
            for label, report in reports.items():
                print(f"{label:<46}{report}")
        return 0

    cases = [
        Case(operation, *shape, tokens)
        for operation, kernel in OPERATIONS.items()
        if kernel in kernels
        for shape in (SHAPES[:2] if options.quick else SHAPES)
        for tokens in (TOKENS[::2] if options.quick else TOKENS)
    ]
    cases = [case for case in cases if set(options.only) <= set(case.label.split())]
    with_manager = options.kernel in (None, MANAGER) and not options.only
    if not cases and not with_manager:
        if options.kernel in set(KERNELS) - set(OPERATIONS.values()):
            parser.error(f"{options.kernel} is not timed; --watch and --kernels take it")
        parser.error(f"no row has all of {options.only} in its name, such as {Case('gather', *SHAPES[0], 512).label!r}")
    facts = machine(place.name, xp)
    print(", ".join(f"{name} {fact}" for name, fact in facts.items()))
    print("GB/s count what is read and what is written. x: how many times as fast as that.\n")
    rows: list[Row] = []

    def measured() -> Iterable[Row]:
        for case in cases:
            rows.append(measure(case, xp, 0.05 if options.quick else 0.7))
            yield rows[-1]

    for line in table(measured()):
        print(line, flush=True)
    print()
    done: list[Chore] = []

    def managed() -> Iterable[Chore]:
        for chore in chores(options.quick):
            done.append(chore)
            yield chore

    if with_manager:
        for line in chore_lines(managed()):
            print(line, flush=True)
        print()
    of_operations = bars(rows, xp is not np) if place.name != "emulated" else ()  # which is not meant to be fast
    for line in (*of_operations, *chore_bars(done)):
        print(line)
    if options.json:
        measurements = {"rows": [asdict(row) for row in rows], "manager": [asdict(chore) for chore in done]}
        Path(options.json).write_text(json.dumps({"machine": facts, **measurements}, indent=1))
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
