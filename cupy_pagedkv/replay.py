"""Replays a trace of requests through a paged cache, with continuous batching, and checks every byte.

A step goes: each running sequence gets one more token; where a sequence needs a block and none is free, the youngest
one is preempted, which is to say its blocks are freed and it waits, first in line, to be written anew; if none was
preempted, waiting requests are admitted in order while blocks last; the K and V of all these tokens are scattered, one
call a layer; sequences that have all their tokens are gathered, compared and freed.

The replay is saturated: timestamps order the requests, and each is admitted as soon as blocks allow.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .backend import backend_of
from .blocks import BlockAllocator, BlockTable, at_least
from .cache import LayeredPagedKVCache
from .traces import Request

__all__ = ["MismatchError", "OversizedRequestError", "Report", "replay"]

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


@dataclass
class Report:
    """What a replay did. Shares are of tokens' places, from 0 to 1; bytes are of K and V of all layers."""

    device: str
    backend: str
    num_blocks: int
    block_size: int
    pool_bytes: int
    requests: int = 0
    skipped: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    steps: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    peak_blocks: int = 0
    peak_running: int = 0
    pool_share: float = 0.0
    """Mean over the steps of the share of the pool that held tokens."""
    pool_share_contiguous: float = 0.0
    """The same, had the pool been cut into one buffer of the longest request's length for each running request: the
    tokens of as many of the oldest running sequences as there would have been buffers."""
    taken_share: float = 0.0
    """Mean share of the memory taken by running sequences that held tokens: what is missing to 1 is the unused part of
    last blocks."""
    taken_share_contiguous: float = 0.0
    """The same with one buffer of the longest request's length for each running sequence."""
    scattered_bytes: int = 0
    scatter_seconds: float = 0.0
    gathered_bytes: int = 0
    gather_seconds: float = 0.0
    verified_bytes: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class _Sequence:
    number: int
    request: Request
    table: BlockTable
    known: int
    """Tokens that there are: the prompt and what was generated, whether or not their K and V are in the cache."""

    @property
    def length(self) -> int:
        return self.request.input_length + self.request.output_length


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
    max_num_seqs: int = 256,
    skip_oversized: bool = False,
    on_progress: Callable[[int], object] = lambda finished: None,
) -> Report:
    """Replay ``requests`` in their order through a new cache, with at most ``max_num_seqs`` running at once.

    ``on_progress`` is called with the number of requests skipped, and after each step with the number that it finished.

    Raises :class:`OversizedRequestError` before anything runs if a request cannot fit the pool (with ``skip_oversized``
    such requests are left out and counted), :class:`MismatchError` if a byte that comes out is not the one that went
    in, and what making the cache raises.
    """
    at_least(1, "max_num_seqs", max_num_seqs)
    cache = LayeredPagedKVCache(num_layers, num_blocks, block_size, num_heads, head_dim, dtype, device)
    sequences = []
    for number, request in enumerate(requests):
        sequence = _Sequence(number, request, BlockTable(block_size), known=request.input_length)
        needed = BlockTable.blocks_needed(sequence.length, block_size)
        if needed <= num_blocks:
            sequences.append(sequence)
        elif not skip_oversized:
            raise OversizedRequestError(
                request,
                f"a request of {request.input_length} + {request.output_length} tokens needs {needed} blocks of "
                f"{block_size}, but the pool has {num_blocks}; make the pool larger or skip such requests",
            )
    run = _Replay(cache, sequences, max_num_seqs)
    run.report.skipped = len(requests) - len(sequences)
    on_progress(run.report.skipped)
    start = time.perf_counter()
    while run.waiting or run.running:
        on_progress(run.step())
    run.report.seconds = time.perf_counter() - start
    return run.finished_report()


def token_bytes(
    numbers: npt.NDArray[Any], positions: npt.NDArray[Any], layer: int, tensor: int, size: int
) -> npt.NDArray[np.uint8]:
    """The K (``tensor`` 0) or V (1) of tokens: ``size`` bytes for each request number and position, ``[n, size]``.

    Every bit of request, position, layer, tensor and place in the row counts, by way of 64 bits a row, so that rows of
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
    def __init__(self, cache: LayeredPagedKVCache, sequences: list[_Sequence], max_num_seqs: int) -> None:
        pool = cache[0].k_cache
        self.cache = cache
        self.row_shape = pool.shape[2:]
        self.row_bytes = int(np.prod(self.row_shape)) * pool.itemsize
        self.place = pool.device
        self.backend = backend_of(("pool",), pool)
        self.allocator = BlockAllocator(cache[0].num_blocks, cache.block_size)
        self.waiting = deque(sequences)
        self.running: list[_Sequence] = []  # the oldest first
        self.max_num_seqs = max_num_seqs
        self.max_length = max((sequence.length for sequence in sequences), default=0)
        # Sums over the steps, in places for a token: held in all, held in buffers, taken by blocks, by buffers.
        self.places = np.zeros(4)
        self.report = Report(
            device=cache[0].device,
            backend=self.backend.name,
            num_blocks=self.allocator.total_blocks,
            block_size=cache.block_size,
            pool_bytes=2 * len(cache) * pool.nbytes,
        )
        # One token that goes nowhere and one that was never written, so that no time includes compiling a kernel.
        nowhere = self._on_device(np.zeros((1, self.row_bytes), np.uint8))
        cache[0].update(nowhere, nowhere, self.backend.from_numpy(np.array([-1]), self.place))
        cache[0].gather(np.zeros((1, 1), np.int32), [1], seq_starts=[0])

    def step(self) -> int:
        """One step of continuous batching; returns how many requests it finished."""
        batch: list[tuple[_Sequence, int]] = []
        preempted = False
        while len(batch) < len(self.running):
            sequence = self.running[len(batch)]
            if self._make_room(sequence, 1):
                sequence.known += 1
                batch.append((sequence, 1))
            else:
                self._preempt_youngest()
                preempted = True
        while self.waiting and not preempted and len(self.running) < self.max_num_seqs:
            # With room for its next token, too, lest it be preempted at once.
            if not self._make_room(self.waiting[0], min(self.waiting[0].known + 1, self.waiting[0].length)):
                break
            self.running.append(self.waiting.popleft())
            batch.append((self.running[-1], self.running[-1].known))
        self._scatter(batch)
        self._count()

        done = [sequence for sequence in self.running if sequence.table.num_tokens == sequence.length]
        for sequence in done:
            self._verify(sequence)
            self.running.remove(sequence)
            self.allocator.free(sequence.table.blocks)
            self.report.requests += 1
            self.report.tokens_in += sequence.request.input_length
            self.report.tokens_out += sequence.request.output_length
        return len(done)

    def _make_room(self, sequence: _Sequence, num_tokens: int) -> bool:
        needed = sequence.table.additional_blocks_needed(num_tokens)
        if not self.allocator.can_allocate(needed):
            return False
        sequence.table.append_blocks(self.allocator.allocate(needed))
        return True

    def _preempt_youngest(self) -> None:
        sequence = self.running.pop()
        self.allocator.free(sequence.table.blocks)
        self.report.preemptions += 1
        self.report.recomputed_tokens += sequence.table.num_tokens
        sequence.table.clear()
        self.waiting.appendleft(sequence)

    def _scatter(self, batch: list[tuple[_Sequence, int]]) -> None:
        if not batch:
            return
        starts = [sequence.table.num_tokens for sequence, _ in batch]
        counts = [count for _, count in batch]
        numbers = np.repeat([sequence.number for sequence, _ in batch], counts)
        positions = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, counts, strict=True)])
        slots = np.concatenate([sequence.table.slots(s, n) for (sequence, n), s in zip(batch, starts, strict=True)])
        for first in range(0, len(slots), _CHUNK):
            chunk = slice(first, first + _CHUNK)
            chunk_slots = self.backend.from_numpy(slots[chunk], self.place)
            for i, layer in enumerate(self.cache):
                key, value = (
                    self._on_device(token_bytes(numbers[chunk], positions[chunk], i, tensor, self.row_bytes))
                    for tensor in (0, 1)
                )
                start = time.perf_counter()
                layer.update(key, value, chunk_slots)
                self.backend.synchronize()
                self.report.scatter_seconds += time.perf_counter() - start
                self.report.scattered_bytes += key.nbytes + value.nbytes
        for sequence, count in batch:
            sequence.table.set_num_tokens(sequence.table.num_tokens + count)

    def _on_device(self, rows: npt.NDArray[np.uint8]) -> Any:
        # As bytes, since CuPy does not take every dtype from NumPy.
        flat = self.backend.from_numpy(np.ascontiguousarray(rows).reshape(-1), self.place)
        return flat.view(self.cache[0].dtype).reshape(len(rows), *self.row_shape)

    def _verify(self, sequence: _Sequence) -> None:
        block_tables = sequence.table.to_device_format()[None]
        for first in range(0, sequence.length, _CHUNK):
            positions = np.arange(first, min(first + _CHUNK, sequence.length))
            for i, layer in enumerate(self.cache):
                start = time.perf_counter()
                gathered = layer.gather(block_tables, [int(positions[-1]) + 1], seq_starts=[first])
                self.backend.synchronize()
                self.report.gather_seconds += time.perf_counter() - start
                for tensor, rows in enumerate(gathered):
                    got = self.backend.asnumpy(rows.reshape(-1).view(np.uint8)).reshape(len(positions), -1)
                    expected = token_bytes(np.array([sequence.number]), positions, i, tensor, self.row_bytes)
                    wrong = (got != expected).any(axis=1)
                    if wrong.any():
                        raise MismatchError(
                            f"request {sequence.number + 1}, layer {i}, {'KV'[tensor]}: "
                            f"{np.count_nonzero(wrong)} tokens differ, the first at position {positions[wrong][0]}"
                        )
                    self.report.gathered_bytes += got.nbytes
                    self.report.verified_bytes += got.nbytes

    def _count(self) -> None:
        taken = self.allocator.total_blocks - self.allocator.free_block_count
        lengths = [sequence.table.num_tokens for sequence in self.running]
        num_buffers = self.allocator.total_blocks * self.cache.block_size // max(1, self.max_length)
        self.places += (
            sum(lengths),
            sum(lengths[:num_buffers]),
            taken * self.cache.block_size,
            len(lengths) * self.max_length,
        )
        self.report.steps += 1
        self.report.peak_running = max(self.report.peak_running, len(lengths))

    def finished_report(self) -> Report:
        held, held_in_buffers, taken, taken_by_buffers = self.places.tolist()
        self.report.peak_blocks = self.allocator.stats().peak_usage
        pool = self.report.steps * self.allocator.total_blocks * self.cache.block_size
        self.report.pool_share = held / max(1, pool)
        self.report.pool_share_contiguous = held_in_buffers / max(1, pool)
        self.report.taken_share = held / max(1, taken)
        self.report.taken_share_contiguous = held / max(1, taken_by_buffers)
        return self.report
