"""What the tiers of a manager cost: blocks on the way to host memory and back, real traffic over both, and files.

Blocks have 16 tokens, 8 KV heads of 128 float16 and 8 layers: 512 KiB. All memory is warm before anything is timed.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupy_pagedkv import KVCacheManager, LayeredPagedKVCache
from cupy_pagedkv.replay.replay import replay
from cupy_pagedkv.replay.report import Report
from cupy_pagedkv.replay.traces import read_trace, synthetic_trace

from .cases import BLOCK_SIZE
from .output import bar
from .timing import in_turns

LAYERS, HEADS, HEAD_DIM = 8, 8, 128
BLOCK_BYTES = 2 * LAYERS * BLOCK_SIZE * HEADS * HEAD_DIM * 2
MEBIBYTES, LARGE = (1, 4, 16, 64, 256), 16
AT_LEAST = 0.8
"""Of a copy of the same bytes, from ``LARGE`` MiB on."""
TRACE = Path(__file__).resolve().parents[2] / "shared" / "traces" / "mooncake_synthetic_head.jsonl"
POOL_BLOCKS, HOST_RATIO = 9000, 8  # the longest request of the trace needs 8,448

Timed = Callable[[], float]


@dataclass(frozen=True)
class Move:
    """What was measured of so many bytes of K and V; seconds are medians, of one call."""

    name: str
    num_bytes: int
    seconds: float
    floor: str
    floor_seconds: float
    in_bar: bool

    @property
    def label(self) -> str:
        return f"{self.name}, {self.num_bytes / 2**20:.0f} MiB"

    def share_of_floor(self) -> float:
        return self.floor_seconds / self.seconds


class Timer:
    """Seconds of a call, and of what it queues."""

    def __init__(self, xp: Any) -> None:
        self._synchronize = (lambda: None) if xp is np else lambda: xp.cuda.Device().synchronize()

    def __call__(self, call: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - start


def a_cache(num_blocks: int, device: str) -> LayeredPagedKVCache:
    """With something in it."""
    cache = LayeredPagedKVCache(LAYERS, num_blocks, BLOCK_SIZE, HEADS, HEAD_DIM, "float16", device)
    for i, layer in enumerate(cache):
        for j, pool in enumerate((layer.k_cache, layer.v_cache)):
            pool[...] = 1 + 2 * i + j
    return cache


def expect(what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise SystemExit(f"{what}: {got}, expected {wanted}")


class Parked:
    """A sequence that is parked and comes back, the whole pool each time: nothing of it is found, and so is copied."""

    def __init__(self, num_blocks: int, device: str, timer: Timer) -> None:
        self._manager = KVCacheManager(a_cache(num_blocks, device), prefix_caching=False, host_blocks=num_blocks)
        self._num_blocks, self._timer = num_blocks, timer
        self._sequence = self._manager.add(np.zeros(num_blocks * BLOCK_SIZE, np.int32))
        self._manager.commit(self._manager.prepare({self._sequence: self._sequence.remaining}))

    def offload(self) -> float:
        if self._sequence.num_host_blocks:
            self.restore()
        before = self._manager.stats().offloaded
        seconds = self._timer(self._sequence.offload)
        expect("blocks offloaded", self._manager.stats().offloaded - before, self._num_blocks)
        return seconds

    def restore(self) -> float:
        if not self._sequence.num_host_blocks:
            self.offload()
        before = self._manager.stats().restored
        seconds = self._timer(lambda: self._manager.commit(self._manager.prepare({self._sequence: []})))
        expect("blocks restored", self._manager.stats().restored - before, self._num_blocks)
        return seconds


class Evicted:
    """A prompt that is evicted by another sequence, which goes, and is found again."""

    def __init__(self, num_blocks: int, device: str, timer: Timer) -> None:
        self._manager = KVCacheManager(a_cache(num_blocks + 1, device), host_blocks=num_blocks)
        self._num_blocks, self._timer = num_blocks, timer
        self._prompt = np.arange(num_blocks * BLOCK_SIZE + 1, dtype=np.int32)
        self._on_host = False

    def evict(self) -> float:
        self._manager.reset_prefix_cache()  # or the host would have it already
        with self._manager.add(self._prompt) as sequence:
            self._manager.commit(self._manager.prepare({sequence: sequence.remaining}))
        before = self._manager.stats().offloaded
        with self._manager.add([]) as other:
            seconds = self._timer(lambda: self._manager.prepare({other: -1 - self._prompt}))
            [batch] = self._manager.open_batches
            self._manager.rollback(batch)
        expect("blocks evicted to the host", self._manager.stats().offloaded - before, self._num_blocks)
        self._on_host = True
        return seconds

    def come_back(self) -> float:
        if not self._on_host:
            self.evict()
        before = self._manager.stats().restored
        with self._manager.add(self._prompt) as sequence:
            seconds = self._timer(lambda: self._manager.commit(self._manager.prepare({sequence: sequence.remaining})))
        expect("blocks that came back", self._manager.stats().restored - before, self._num_blocks)
        self._on_host = False
        return seconds


def copies(num_bytes: int, xp: Any, timer: Timer) -> tuple[Timed, Timed]:
    """A copy of as many bytes to the host, and one from there: on a GPU of pinned memory, on one stream."""
    here = xp.ones(num_bytes, xp.uint8)
    if xp is np:
        there = np.ones(num_bytes, np.uint8)
        return lambda: timer(lambda: np.copyto(there, here)), lambda: timer(lambda: np.copyto(here, there))
    pinned = xp.cuda.alloc_pinned_memory(num_bytes)
    stream = xp.cuda.Stream(non_blocking=True)
    return (
        lambda: timer(lambda: here.data.copy_to_host_async(pinned.ptr, num_bytes, stream)),
        lambda: timer(lambda: here.data.copy_from_host_async(pinned.ptr, num_bytes, stream)),
    )


def moves(quick: bool, device: str, xp: Any) -> Iterator[Move]:
    """To host memory and back, of a sequence that is parked, and of a prompt that is evicted and found again."""
    timer = Timer(xp)
    for mebibytes in MEBIBYTES[:2] if quick else MEBIBYTES:
        num_blocks = mebibytes * 2**20 // BLOCK_BYTES
        num_bytes, rounds = num_blocks * BLOCK_BYTES, 3 if quick else max(11, min(101, 2048 // mebibytes))
        parked, evicted = Parked(num_blocks, device, timer), Evicted(num_blocks, device, timer)
        to_host, from_host = copies(num_bytes, xp, timer)
        calls = {"offload": parked.offload, "restore": parked.restore, "evict": evicted.evict}
        calls |= {"find again": evicted.come_back, "to": to_host, "from": from_host}
        for call in calls.values():
            call()
        seconds = in_turns(calls, rounds)
        for name, floor in (("offload", "to"), ("restore", "from"), ("evict", "to"), ("find again", "from")):
            text = "np.copyto" if xp is np else f"a copy {floor} pinned memory"
            yield Move(name, num_bytes, seconds[name], text, seconds[floor], mebibytes >= LARGE)


def files(quick: bool, device: str, xp: Any, folder: str | None = None) -> Iterator[Move]:
    """Saved and loaded, against a file of the same bytes that is written and synchronised, and read."""
    timer = Timer(xp)
    for mebibytes in MEBIBYTES[1:2] if quick else MEBIBYTES[2:]:
        num_blocks = mebibytes * 2**20 // BLOCK_BYTES
        cache, other = a_cache(num_blocks, device), a_cache(num_blocks, device)
        manager = KVCacheManager(cache)
        with manager.add(np.arange(num_blocks * BLOCK_SIZE, dtype=np.int32)) as sequence:
            manager.commit(manager.prepare({sequence: sequence.remaining}))
        array = np.ones(num_blocks * BLOCK_BYTES, np.uint8)
        with tempfile.TemporaryDirectory(dir=folder) as there:
            saved, plain = Path(there, "saved"), Path(there, "plain")

            def write(path: Path = plain, array: np.ndarray = array) -> None:
                with path.open("wb", buffering=0) as file:
                    file.write(array)
                    os.fsync(file.fileno())

            def read(path: Path = plain, array: np.ndarray = array) -> None:
                with path.open("rb", buffering=0) as file:
                    expect("bytes read", file.readinto(array), len(array))

            def load(path: Path = saved, cache: LayeredPagedKVCache = other, num_blocks: int = num_blocks) -> None:
                expect("blocks loaded", KVCacheManager.load(cache, path).stats().cached_blocks, num_blocks)

            def save(manager: KVCacheManager = manager, path: Path = saved) -> None:
                manager.save(path)

            calls = {"save": save, "write": write, "load": load, "read": read}
            for call in calls.values():
                call()
            timed: dict[str, Timed] = {name: lambda call=call: timer(call) for name, call in calls.items()}
            seconds = in_turns(timed, 3 if quick else 9)
        for name, floor, text in (("save", "write", "write and fsync"), ("load", "read", "read")):
            yield Move(name, array.nbytes, seconds[name], text, seconds[floor], False)


def move_lines(measured: Iterable[Move]) -> Iterator[str]:
    yield f"{'to the host and back, files':<30}{'ms':>9}{'GB/s':>8}   of the speed of"
    for move in measured:
        speed = move.num_bytes / move.seconds / 1e9
        yield f"{move.label:<30}{move.seconds * 1e3:>9.2f}{speed:>8.2f}   {move.floor} {move.share_of_floor():.2f}"


def move_bars(measured: Sequence[Move]) -> Iterator[str]:
    for name in dict.fromkeys(move.name for move in measured if move.in_bar):
        of_name = [move for move in measured if move.name == name and move.in_bar]
        yield from bar(f"{name} >= {AT_LEAST} of {of_name[0].floor} from {LARGE} MiB", AT_LEAST,
                       [(move.share_of_floor(), move.label) for move in of_name])  # fmt: skip


def replays(quick: bool, device: str, trace: str | None) -> Iterator[tuple[str, Report]]:
    """A trace through a pool alone, and with eight times as many blocks in host memory."""
    path = trace or (TRACE if TRACE.exists() else None)
    requests = synthetic_trace(500) if path is None else read_trace(path)
    name = "synthetic" if path is None else Path(path).name
    for host_blocks in (0, HOST_RATIO * POOL_BLOCKS):
        report = replay(
            requests[:40] if quick else requests, num_blocks=POOL_BLOCKS, block_size=BLOCK_SIZE, num_layers=2,
            num_heads=2, head_dim=16, dtype="float16", device=device, host_blocks=host_blocks, skip_oversized=True,
        )  # fmt: skip
        yield name, report


def replay_lines(measured: Iterable[tuple[str, Report]]) -> Iterator[str]:
    yield f"{'replay':<34}{'pool':>8}{'host':>8}{'hits':>6}{'tokens saved':>14}{'rate':>7}{'parked':>8}{'seconds':>9}"
    for name, report in measured:
        yield (
            f"{name:<34}{report.num_blocks:>8,}{report.host_blocks:>8,}{report.hits:>6}{report.tokens_saved:>14,}"
            f"{report.hit_rate:>7.1%}{report.offloads:>8,}{report.seconds:>9.1f}"
        )
