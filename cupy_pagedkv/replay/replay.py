"""Replays a trace of requests through a paged cache, with continuous batching, and checks every byte.

A step goes: each running sequence gets one more token, all in one batch; where the blocks do not suffice, the youngest
sequence is preempted, which is to say it is freed and waits, first in line, to be added anew; if none was preempted,
waiting requests are admitted in order while blocks last, each prompt in a batch of its own, so that the next one can
share it; sequences that have all their tokens are gathered, compared and freed.

With a second tier, what is preempted is parked in host memory instead, where there is room, and goes on from there when
it is first in line and the pool has blocks for all of it. A parked request has none of the pool. So where nothing runs,
all blocks of the pool are there for the first in line, and each request fits the pool: nothing waits forever.

Without a clock the replay is saturated: timestamps order the requests, and each is admitted as soon as blocks allow.
With one, a step takes simulated time, and no request is admitted before it has arrived.
"""

import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bookkeeping.allocator import OutOfBlocksError
from ..bookkeeping.arguments import at_least
from ..bookkeeping.table import BlockTable
from ..caches.batch import Batch
from ..caches.cache import LayeredPagedKVCache
from ..caches.manager import CachedSequence, KVCacheManager
from ..devices.backend import backend_of
from .report import Report, Step
from .traces import HASHED_TOKENS, Request

__all__ = ["MismatchError", "OversizedRequestError", "replay"]

_CHUNK = 8192  # tokens whose K and V are made, scattered or compared at once


class MismatchError(AssertionError):
    """What was gathered is not what was scattered."""


class OversizedRequestError(ValueError):
    """A ``request`` that the pool could not hold even alone."""

    def __init__(self, request: Request, reason: str) -> None:
        super().__init__(request, reason)
        self.request = request
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False)
class _Sequence:
    number: int
    request: Request
    hash_ids: npt.NDArray[np.int64]
    contents: npt.NDArray[np.int64]
    """What the hashed parts of the prompt are, by numbers that are equal only if all before is."""
    known: int
    """Tokens that there are: the prompt and what was generated, whether or not their K and V are in the cache."""
    arrival: float
    """Seconds after the first request of all."""
    computed: int = 0
    """Of these, those that were in the cache before a preemption."""
    cached: CachedSequence | None = None
    """While it runs, and while it is parked in host memory."""

    @property
    def length(self) -> int:
        return self.request.input_length + self.request.output_length

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Its tokens: those of a hashed part are all the part's id, and all others are like no other request's."""
        return self._at(np.arange(start, stop), self.hash_ids, -1 - self.number)

    def contents_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers that two tokens at one position have in common only if all tokens before are equal, too."""
        return self._at(positions, self.contents, 2**31 + self.number)

    def _at(self, positions: npt.NDArray[np.int64], of_parts: npt.NDArray[np.int64], own: int) -> npt.NDArray[np.int64]:
        values = np.full(len(positions), own, np.int64)
        if len(of_parts):
            hashed = positions < self.request.input_length
            values[hashed] = of_parts[positions[hashed] // HASHED_TOKENS]
        return values


def replay(
    requests: Sequence[Request],
    *,
    num_blocks: int,
    block_size: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    dtype: npt.DTypeLike,
    device: str | None = None,
    prefix_caching: bool = True,
    host_blocks: int = 0,
    max_num_seqs: int = 256,
    skip_oversized: bool = False,
    step_time: float = 0.0,
    step_time_per_token: float = 0.0,
    on_progress: Callable[[int], object] = lambda finished: None,
    on_step: Callable[[Step], object] = lambda step: None,
) -> Report:
    """Replay ``requests`` in their order through a new cache, with at most ``max_num_seqs`` running at once.

    With ``prefix_caching``, prompts whose ``hash_ids`` begin alike share blocks. With ``host_blocks``, host memory has
    room for as many more: for cached blocks that are evicted, and for requests that are preempted.

    A step takes ``step_time`` seconds of simulated time, and ``step_time_per_token`` for each token that it computes.
    With either, a request is admitted neither before its timestamp nor before those ahead of it, and the report tells
    of waiting; with neither, the replay is saturated.

    ``on_progress`` is called with the number of requests skipped, and after each step with the number that it finished;
    ``on_step`` with what each step leaves.

    Raises :class:`OversizedRequestError` before anything runs if a request cannot fit the pool (with ``skip_oversized``
    such requests are left out and counted), :class:`MismatchError` if a byte that comes out is not the one that went
    in, ``ValueError`` for times that are negative or not finite, and what making the cache and its manager raises.
    """
    at_least(1, "max_num_seqs", max_num_seqs)
    for name, seconds in (("step_time", step_time), ("step_time_per_token", step_time_per_token)):
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"{name} must be a number of seconds of at least 0, got {seconds}")
    has_clock = step_time > 0 or step_time_per_token > 0
    first = min((request.timestamp for request in requests), default=0.0)
    cache = LayeredPagedKVCache(num_layers, num_blocks, block_size, num_heads, head_dim, dtype, device)
    sequences = []
    parts: dict[tuple[int, int], int] = {}  # (the part before, hash id) → part
    for number, request in enumerate(requests):
        contents = [-1]
        for hash_id in request.hash_ids:
            contents.append(parts.setdefault((contents[-1], hash_id), len(parts)))
        ids = np.array(request.hash_ids, np.int64)
        arrival = request.timestamp - first if has_clock else 0.0
        sequence = _Sequence(number, request, ids, np.array(contents[1:], np.int64), request.input_length, arrival)
        needed = BlockTable.blocks_needed(sequence.length, block_size)
        if needed <= num_blocks:
            sequences.append(sequence)
        elif not skip_oversized:
            raise OversizedRequestError(
                request,
                f"a request of {request.input_length} + {request.output_length} tokens needs {needed} blocks of "
                f"{block_size}, but the pool has {num_blocks}; make the pool larger or skip such requests",
            )
    manager = KVCacheManager(cache, prefix_caching=prefix_caching, host_blocks=host_blocks)
    run = _Replay(cache, manager, sequences, prefix_caching, max_num_seqs, step_time, step_time_per_token)
    run.report.skipped = len(requests) - len(sequences)
    on_progress(run.report.skipped)
    start = time.perf_counter()
    while run.waiting or run.running:
        on_progress(run.step())
        on_step(run.last_step())
    run.report.seconds = time.perf_counter() - start
    return run.finished_report(has_clock)


def token_bytes(
    numbers: npt.NDArray[Any], positions: npt.NDArray[Any], layer: int, tensor: int, size: int
) -> npt.NDArray[np.uint8]:
    """The K (``tensor`` 0) or V (1) of tokens: ``size`` bytes for each content's number and position, ``[n, size]``.

    Every bit of number, position, layer, tensor and place in the row counts, by way of 64 bits a row, so that rows of
    two places are hardly ever alike. (The constants are those of MurmurHash3's finaliser and of xxHash.)
    """
    numbers, positions = numbers.astype(np.uint32), positions.astype(np.uint32)
    tensor_seed = np.uint32((2 * layer + tensor) * 0xC2B2AE3D & 0xFFFFFFFF)
    low = _mix((numbers * np.uint32(0x9E3779B1) ^ positions * np.uint32(0x85EBCA77)) + tensor_seed)
    high = _mix((positions * np.uint32(0xC2B2AE3D) ^ numbers * np.uint32(0x27D4EB2F)) - tensor_seed)
    places = _mix(np.arange(-(-size // 4), dtype=np.uint32) + np.uint32(0x165667B1))
    words = (low[:, None] ^ places) * np.uint32(0x9E3779B1) + high[:, None]
    words ^= words >> np.uint32(15)
    return words.view(np.uint8)[:, :size]


def _mix(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return x ^ x >> np.uint32(16)


class _Replay:
    def __init__(
        self,
        cache: LayeredPagedKVCache,
        manager: KVCacheManager,
        sequences: list[_Sequence],
        prefix_caching: bool,
        max_num_seqs: int,
        step_time: float,
        step_time_per_token: float,
    ) -> None:
        pool = cache[0].k_cache
        self.manager = manager
        self.cache = cache
        self.row_shape = pool.shape[2:]
        self.row_bytes = int(np.prod(self.row_shape)) * pool.itemsize
        self.place = pool.device
        self.backend = backend_of(("pool",), pool)
        self.waiting = deque(sequences)
        self.running: list[_Sequence] = []  # the oldest first
        self.max_num_seqs = max_num_seqs
        self.step_time, self.step_time_per_token = step_time, step_time_per_token
        self.now = 0.0  # simulated seconds
        self.computed = 0  # tokens in this step
        self.prompt_tokens = 0  # of all requests that were admitted
        self.arrivals = sorted(sequence.arrival for sequence in sequences)
        self.queue: list[int] = []  # its length, at each step
        self.first_tokens: list[float] = []  # seconds from arrival on, of each request that has one
        self.max_length = max((sequence.length for sequence in sequences), default=0)
        # Sums over the steps, in places for a token: in blocks, of these with a token; in buffers, of these with one,
        # and with one of the buffers that the pool has room for.
        self.places = np.zeros(5)
        self.report = Report(
            device=cache[0].device,
            backend=self.backend.name,
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            pool_bytes=2 * len(cache) * pool.nbytes,
            prefix_caching=prefix_caching,
            host_blocks=manager.stats().host_blocks,
        )
        # One token that goes nowhere and one that was never written, so that no time includes compiling a kernel.
        nowhere = self._on_device(np.zeros((1, self.row_bytes), np.uint8))
        cache[0].update(nowhere, nowhere, self.backend.from_numpy(np.array([-1]), self.place))
        cache[0].gather(np.zeros((1, 1), np.int32), [1], seq_starts=[0])

    def step(self) -> int:
        """One step of continuous batching; returns how many requests it finished."""
        if not self.running:
            self.now = max(self.now, self.waiting[0].arrival)
        self.computed = 0
        started: list[_Sequence] = []
        preempted = False
        while self.running:
            try:
                self._compute(self.running, [sequence.known + 1 for sequence in self.running])
                break
            except OutOfBlocksError:
                self._preempt_youngest()
                preempted = True
        while self.waiting and not preempted and len(self.running) < self.max_num_seqs:
            if self.waiting[0].arrival > self.now or not self._admit(self.waiting[0]):
                break
            self.running.append(self.waiting.popleft())
            if not self.running[-1].computed and self.running[-1].request.output_length:
                started.append(self.running[-1])  # for the first time
        self.queue.append(bisect_right(self.arrivals, self.now) - self.report.requests - len(self.running))
        self.now += self.step_time + self.step_time_per_token * self.computed
        self.first_tokens += (self.now - sequence.arrival for sequence in started)
        self._count()

        done = [sequence for sequence in self.running if sequence.known == sequence.length]
        for sequence in done:
            self._verify(sequence)
            self.running.remove(sequence)
            self._free(sequence)
            self.report.requests += 1
            self.report.tokens_in += sequence.request.input_length
            self.report.tokens_out += sequence.request.output_length
        return len(done)

    def _admit(self, sequence: _Sequence) -> bool:
        """Have all tokens that the sequence has in the pool, and compute those that are in neither tier, if there is
        room."""
        parked = sequence.cached
        cached = sequence.cached = parked or self.manager.add(sequence.tokens(0, sequence.known))
        num_cached = cached.num_cached_tokens
        # With room for its next token, too, lest it be preempted at once.
        room = BlockTable.blocks_needed(min(sequence.known + 1, sequence.length), self.cache.block_size)
        in_pool = len(cached.block_table) - cached.num_host_blocks
        if room - in_pool > self.manager.num_available_blocks:
            if parked is None:
                self._free(sequence)
            return False
        self._compute([sequence], [sequence.known])
        if parked is not None:
            return True
        if sequence.computed:  # its own blocks, mostly, which say nothing of what prompts share
            self.report.recomputed_tokens += max(0, sequence.computed - num_cached)
            self.report.tokens_found_again += num_cached
        else:
            self.report.hits += num_cached > 0
            self.report.tokens_saved += num_cached
            self.prompt_tokens += sequence.known
        return True

    def _preempt_youngest(self) -> None:
        sequence = self.running.pop()
        sequence.computed = sequence.known
        self.report.preemptions += 1
        if not self._park(sequence):
            self._free(sequence)
        self.waiting.appendleft(sequence)

    def _park(self, sequence: _Sequence) -> bool:
        """Move what the sequence has to host memory, if there is room."""
        assert sequence.cached is not None
        if not self.report.host_blocks:
            return False
        try:
            sequence.cached.offload()
        except OutOfBlocksError:
            return False
        self.report.offloads += 1
        return True

    def _free(self, sequence: _Sequence) -> None:
        assert sequence.cached is not None
        self.manager.free(sequence.cached)
        sequence.cached = None

    def _compute(self, sequences: list[_Sequence], known: list[int]) -> None:
        """Bring the sequences to so many tokens, all of which are known then. Raises what ``prepare`` raises."""
        new = {}
        for sequence, count in zip(sequences, known, strict=True):
            assert sequence.cached is not None
            new[sequence.cached] = sequence.tokens(sequence.cached.num_tokens, count)
        with self.manager.prepare(new) as batch:
            self._scatter(batch, sequences, known)
            self.computed += batch.num_tokens
        for sequence, count in zip(sequences, known, strict=True):
            sequence.known = count

    def _scatter(self, batch: Batch, sequences: list[_Sequence], known: list[int]) -> None:
        ranges = [np.arange(cached.num_tokens, count) for cached, count in zip(batch.sequences, known, strict=True)]
        positions = np.concatenate(ranges)
        contents = np.concatenate([s.contents_at(span) for s, span in zip(sequences, ranges, strict=True)])
        for first in range(0, len(positions), _CHUNK):
            chunk = slice(first, first + _CHUNK)
            for i, layer in enumerate(self.cache):
                key, value = (
                    self._on_device(token_bytes(contents[chunk], positions[chunk], i, tensor, self.row_bytes))
                    for tensor in (0, 1)
                )
                start = time.perf_counter()
                layer.update(key, value, batch.slot_mapping[chunk])
                self.backend.synchronize()
                self.report.scatter_seconds += time.perf_counter() - start
                self.report.scattered_bytes += key.nbytes + value.nbytes

    def _on_device(self, rows: npt.NDArray[np.uint8]) -> Any:
        # As bytes, since CuPy does not take every dtype from NumPy.
        flat = self.backend.from_numpy(np.ascontiguousarray(rows).reshape(-1), self.place)
        return flat.view(self.cache[0].dtype).reshape(len(rows), *self.row_shape)

    def _verify(self, sequence: _Sequence) -> None:
        assert sequence.cached is not None
        block_tables = sequence.cached.block_table[None]
        for first in range(0, sequence.length, _CHUNK):
            positions = np.arange(first, min(first + _CHUNK, sequence.length))
            contents = sequence.contents_at(positions)
            for i, layer in enumerate(self.cache):
                start = time.perf_counter()
                gathered = layer.gather(block_tables, [int(positions[-1]) + 1], seq_starts=[first])
                self.backend.synchronize()
                self.report.gather_seconds += time.perf_counter() - start
                for tensor, rows in enumerate(gathered):
                    got = self.backend.asnumpy(rows.reshape(-1).view(np.uint8)).reshape(len(positions), -1)
                    expected = token_bytes(contents, positions, i, tensor, self.row_bytes)
                    wrong = (got != expected).any(axis=1)
                    if wrong.any():
                        raise MismatchError(
                            f"request {sequence.number + 1}, layer {i}, {'KV'[tensor]}: "
                            f"{np.count_nonzero(wrong)} tokens differ, the first at position {positions[wrong][0]}"
                        )
                    self.report.gathered_bytes += got.nbytes
                    self.report.verified_bytes += got.nbytes

    def _count(self) -> None:
        block_size, live = self.cache.block_size, self.manager.stats().live_blocks
        lengths = [sequence.known for sequence in self.running]
        num_buffers = self.cache.num_blocks * block_size // max(1, self.max_length)
        self.places += (
            live * block_size,
            live * block_size - sum(-length % block_size for length in lengths),  # last blocks are never shared
            len(lengths) * self.max_length,
            sum(lengths),
            sum(lengths[:num_buffers]),
        )
        self.report.steps += 1
        self.report.peak_blocks = max(self.report.peak_blocks, live)
        self.report.peak_running = max(self.report.peak_running, len(lengths))

    def last_step(self) -> Step:
        stats = self.manager.stats()
        return Step(
            self.now, stats.live_blocks, stats.cached_blocks, len(self.running), self.queue[-1], self.prompt_tokens,
            self.report.tokens_saved, stats.live_host_blocks + stats.cached_host_blocks,
        )  # fmt: skip

    def finished_report(self, has_clock: bool) -> Report:
        if has_clock:
            waits = np.array(self.first_tokens or [0.0])
            self.report.simulated_seconds = self.now
            self.report.first_token_mean = float(waits.mean())
            self.report.first_token_median, self.report.first_token_p99, self.report.first_token_max = np.percentile(
                waits, (50, 99, 100)
            ).tolist()
            self.report.queue_mean = float(np.mean(self.queue or [0]))
            self.report.queue_max = max(self.queue, default=0)
        taken, held, taken_by_buffers, held_in_buffers, held_in_room = self.places.tolist()
        stats = self.manager.stats()
        pool = self.report.steps * self.cache.num_blocks * self.cache.block_size
        self.report.pool_share = held / max(1, pool)
        self.report.pool_share_contiguous = held_in_room / max(1, pool)
        self.report.taken_share = held / max(1, taken)
        self.report.taken_share_contiguous = held_in_buffers / max(1, taken_by_buffers)
        self.report.hit_rate = self.report.tokens_saved / max(1, self.prompt_tokens)
        self.report.evictions, self.report.copies = stats.evictions, stats.copies
        block_bytes = self.report.pool_bytes // self.cache.num_blocks
        self.report.host_bytes = stats.host_blocks * block_bytes
        self.report.offloaded_blocks, self.report.offloaded_bytes = stats.offloaded, stats.offloaded * block_bytes
        self.report.restored_blocks, self.report.restored_bytes = stats.restored, stats.restored * block_bytes
        return self.report
