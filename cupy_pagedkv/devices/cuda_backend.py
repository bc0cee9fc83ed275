"""The CUDA backend: launches the kernels in ``kernels/`` on CuPy's current stream.

A kernel is specialised, by ``#define`` lines ahead of its source, on what shapes and strides fix: the runs of bytes a
row is made of, the widest access that every address allows, the block size and the index types. What varies from call
to call is an argument. Nothing here checks its arguments (``ops`` has), and nothing waits for the stream.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..bookkeeping.ranges import runs_of
from .cuda_attention import ELEMENTS, THREADS, Shape, Spread, shape_of, spread_of
from .layout import AttentionLayout, Form, Layout, Pools, Scoring
from .sources import Defines, source_of

if TYPE_CHECKING:
    from .numpy_backend import HostLane, HostStaging

__all__ = ["CudaBackend", "PinnedLane", "PinnedStaging"]

_ACCESS_TYPES = {1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "uint2", 16: "uint4"}
_INDEX_TYPES = {4: "int", 8: "long long"}
_UNROLL = 8  # accesses of one thread, all loaded before the first is stored
_MAX_BLOCK_BYTES = 2**30  # offsets inside a block are 32-bit in the kernels
_LANE_BYTES = 2**24  # of each of two buffers on the way to the host, and of two on the way back
_MAX_WARPS = 4  # of a thread block: the kernels' __launch_bounds__
_BLOCKS_AT_ONCE = 4  # that a multiprocessor holds: the second of gather_cache's __launch_bounds__

_INDICES = {
    "reshape_and_cache": ("SLOT_T",),
    "gather_cache": ("TABLE_T", "LENS_T", "STARTS_T"),
    "copy_blocks": ("SRC_T", "DST_T"),
    "paged_attention": ("TABLE_T", "LENS_T", "CU_T"),
    "merge_splits": ("LENS_T", "CU_T"),
}
_NOTHING: AbstractContextManager[None] = nullcontext()


def _runs(tokens: Form, pool: Form) -> tuple[int, int, int]:
    """A token's row as (heads, runs of a head, bytes of a run), each run contiguous in ``tokens`` and in ``pool``."""
    heads, dim = tokens.shape[2:]
    item = tokens.dtype.itemsize
    if dim > 1 and tokens.strides[3] != item:
        return heads, dim, item
    row = dim * item
    if tokens.strides[2] == pool.strides[3] == row:
        return 1, 1, heads * row
    return heads, 1, row


def _alignment(tokens: Form, pool: Form, runs: tuple[int, int, int]) -> int:
    """The widest power of two up to 16 that divides all that a kernel adds to the addresses of both.

    Strides of axes of length 1 are not looked at: they can be anything.
    """
    heads, runs_of_head, run = runs
    lengths = (*tokens.shape[:2], heads, runs_of_head, *pool.shape[:3], heads)
    strides = (*tokens.strides, *pool.strides[:4])
    return math.gcd(16, run, _step(lengths, strides))


def _block_runs(pool: Form) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """A block as (outer, inner, bytes of a run) and the strides of the first two: its slots and heads, merged where
    they follow each other in memory."""
    run = pool.shape[4] * pool.dtype.itemsize
    axes = [(stride, n) for stride, n in zip(pool.strides[2:4], pool.shape[2:4], strict=True) if n > 1]
    runs: list[tuple[int, int]] = []
    for stride, n in sorted(axes, key=lambda axis: abs(axis[0])):
        if stride == run:
            run *= n
        else:
            runs.append((stride, n))
    (inner_stride, inner), (outer_stride, outer) = [*runs, (0, 1), (0, 1)][:2]
    return (outer, inner, run), (outer_stride, inner_stride)


@functools.lru_cache(4096)
def _step(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The greatest number of bytes that all distances between elements are multiples of."""
    return math.gcd(*(stride for stride, n in zip(strides, shape, strict=True) if n > 1))


def _check_block_bytes(pools: Pools) -> None:
    for pool in (pools.k_cache, pools.v_cache):
        row = pool.shape[3] * pool.shape[4] * pool.dtype.itemsize
        if pools.block_size * row > _MAX_BLOCK_BYTES:
            raise ValueError(
                f"a block of K or V must have at most {_MAX_BLOCK_BYTES} bytes here, got block_size {pools.block_size} "
                f"and rows of {row} bytes; use a smaller block_size"
            )


def _index_types(kernel: str, sizes: tuple[int, ...]) -> Defines:
    return tuple((name, _INDEX_TYPES[size]) for name, size in zip(_INDICES[kernel], sizes, strict=True))


def _or_null(array: Any, ndim: int) -> tuple[Any, ...]:
    """The array and its strides, or a null pointer and zeros."""
    return (0,) * (1 + ndim) if array is None else (array, *array.strides)


class _Plan(NamedTuple):
    """All of a launch but the sizes and addresses of its arrays."""

    kernel: Any
    strides: tuple[int, ...]
    row: int
    """Accesses in the longer row, of K or of V; in the longer block, where blocks are copied."""


class _AttentionKernels(NamedTuple):
    shape: Shape
    kernel: Any
    merge: Any


class _AttentionPlan(NamedTuple):
    """All of a launch but the addresses of its arrays, and the strides of those that have none in the layout."""

    kernel: Any
    merge: Any
    shared_bytes: int
    spread: Spread
    query_strides: tuple[int, ...]
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]
    inner: np.float32
    outer: np.float32
    """Factors of scores within softcap's tanh, and of exponents of 2."""


class PinnedStaging:
    """The way of bytes from the host to a GPU, without waiting: pinned memory that is kept until it has been read.

    CuPy's pool of pinned memory hands out again what is let go, whether or not a copy that was queued has read it.
    """

    def __init__(self, backend: "CudaBackend") -> None:
        self._backend = backend
        self._in_flight: deque[tuple[Any, npt.NDArray[np.uint8]]] = deque()  # (event behind the copy, its memory)

    def zeros(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Zeros in pinned memory, to be filled and given to :meth:`send`."""
        while self._in_flight and self._in_flight[0][0].done:
            self._in_flight.popleft()
        staged = self._backend.empty_pinned(num_bytes)
        staged[:] = 0
        return staged

    def send(self, staged: npt.NDArray[np.uint8], device: Any, out: Any = None) -> Any:
        """``staged`` on ``device``, or in ``out`` there, once the current stream gets to it."""
        with self._backend.on(device.id):
            if out is None:
                out = self._backend.empty(staged.shape, staged.dtype, device)
            self._in_flight.append((self._backend.copy_async(staged, out), staged))
        return out


class PinnedLane:
    """Places for blocks in pinned host memory, ``[num_places, num_bytes]``, with a stream of its own each way.

    Blocks are packed and unpacked on the current stream, in one of two buffers a way, while the other travels. Who uses
    a buffer waits for what used it last; what comes back waits for copies of the same places that are on their way, and
    what leaves is behind it anyway, since the current stream waits for what comes back. The host waits for nothing.
    """

    def __init__(self, backend: "CudaBackend", num_places: int, num_bytes: int, device: Any) -> None:
        self._backend = backend
        self._device = device
        size = min(num_places, max(1, _LANE_BYTES // num_bytes)), num_bytes
        with backend.on(device.id):
            memory = backend.pinned_memory(num_places * num_bytes)
            self._out, self._back = (_Way(backend, size, device) for _ in range(2))
        self._memory: npt.NDArray[np.uint8] = memory.reshape(num_places, num_bytes)
        self._copies: deque[Any] = deque()  # events behind the last ones to the host, but for those known to be done
        self._num_done = 0  # before these
        self._last = np.zeros(num_places, np.int64)  # which copy, from 1 on, was the last to each place

    def pieces(self, places: npt.NDArray[np.integer]) -> Iterator[slice]:
        """Which of ``places``, in rising order, fill a buffer."""
        size = len(self._out.buffers[0])
        return (slice(first, first + size) for first in range(0, len(places), size))

    @contextmanager
    def to_host(self, places: npt.NDArray[np.integer]) -> Iterator[Any]:
        """Within it, what the current stream writes to the array, ``[n, num_bytes]``, comes to ``places``."""
        with self._backend.on(self._device.id):
            way, current = self._out, self._backend.current_stream()
            turn = way.next_turn(current)
            buffer = way.buffers[turn][: len(places)]
            yield buffer
            way.stream.wait_event(self._backend.event_behind(current))
            for run in runs_of(places):
                self._backend.copy_to_host(buffer[run], self._memory[places[run.start] :], way.stream)
            way.events[turn] = event = self._backend.event_behind(way.stream)
            while self._copies and self._copies[0].done:
                self._copies.popleft()
                self._num_done += 1
            self._copies.append(event)
            self._last[places] = self._num_done + len(self._copies)

    @contextmanager
    def from_host(self, places: npt.NDArray[np.integer]) -> Iterator[Any]:
        """Within it, the array holds what is in ``places``, once the current stream gets to it."""
        with self._backend.on(self._device.id):
            way, current = self._back, self._backend.current_stream()
            turn = way.next_turn(way.stream)
            buffer = way.buffers[turn][: len(places)]
            last = int(self._last[places].max()) - self._num_done
            if last > 0:
                way.stream.wait_event(self._copies[last - 1])
            for run in runs_of(places):
                self._backend.copy_from_host(self._memory[places[run.start] :], buffer[run], way.stream)
            current.wait_event(self._backend.event_behind(way.stream))
            try:
                yield buffer
            finally:
                way.events[turn] = self._backend.event_behind(current)

    def read(self, places: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
        """A copy of what is in ``places``, once all that was queued has come there."""
        self._out.stream.synchronize()
        held: npt.NDArray[np.uint8] = self._memory[places]
        return held


class _Way:
    """A stream from or to the host, and its two buffers on the GPU."""

    def __init__(self, backend: "CudaBackend", size: tuple[int, int], device: Any) -> None:
        self.stream = backend.new_stream()
        self.buffers = [backend.empty(size, np.dtype(np.uint8), device) for _ in range(2)]
        # What had the memory before may still use it.
        self.events = [backend.event_behind(backend.current_stream())] * 2
        """Behind what used each buffer last."""
        self._turn = 0

    def next_turn(self, stream: Any) -> int:
        """Which buffer is next; ``stream`` waits until it is not used."""
        self._turn = 1 - self._turn
        stream.wait_event(self.events[self._turn])
        return self._turn


class CudaBackend:
    """Arrays and operations on the GPUs that CuPy sees.

    The emulated device is a subclass that replaces what needs CuPy. A ``device`` is what the ``device`` attribute of
    arrays holds: here a ``cupy.cuda.Device``.
    """

    name = "cuda"
    checks_indices = False  # a check would have to wait for the stream

    # Not methods, which take as long again to be called.
    _address: Callable[[Any], int] = staticmethod(attrgetter("data.ptr"))
    _device: Callable[[Any], int | str] = staticmethod(attrgetter("data.device_id"))
    """The number of the array's device, as :meth:`on` takes it."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.ndarray: Any = xp.ndarray
        self._kernel = functools.cache(self._build_kernel)
        self._plan = functools.lru_cache(4096)(self._make_plan)
        self._copy_plan = functools.lru_cache(4096)(self._make_copy_plan)
        self._attention_kernels = functools.lru_cache(4096)(self._make_attention_kernels)
        self._attention_plan = functools.lru_cache(4096)(self._make_attention_plan)
        self._processors = functools.cache(self._count_processors)
        self._architecture: Callable[[Any], tuple[int, int]] = functools.cache(self._read_architecture)

    def _build_kernel(self, name: str, defines: Defines) -> Any:
        return self.xp.RawKernel(source_of(name, defines), name, ("-std=c++17",))

    def _count_processors(self, device: Any) -> int:
        return self.xp.cuda.Device(device).attributes["MultiProcessorCount"]  # type: ignore[no-any-return]

    def _read_architecture(self, device: Any) -> tuple[int, int]:
        """The compute capability, as 90, and the bytes of shared memory that a thread block can have."""
        place = self.xp.cuda.Device(device)
        return int(place.compute_capability), place.attributes["MaxSharedMemoryPerBlockOptin"]

    def same_device(self, a: Any, b: Any) -> bool:
        return self._device(a) == self._device(b)

    def device_name(self, array: Any) -> str:
        return f"cuda:{array.device.id}"

    def is_aligned(self, array: Any) -> bool:
        """Whether its elements lie at multiples of their size."""
        return not math.gcd(self._address(array), _step(array.shape, array.strides)) % array.itemsize

    def asnumpy(self, array: Any) -> np.ndarray:
        """The array in host memory, once the current stream has got there."""
        return self.xp.asnumpy(array)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        """Wait for CuPy's current stream."""
        self.xp.cuda.get_current_stream().synchronize()

    def on(self, number: Any) -> AbstractContextManager[Any]:
        """Within it, CuPy's current device is the one of this number."""
        if number == self.xp.cuda.runtime.getDevice():
            return _NOTHING  # a switch and its return take longer than a launch's arguments
        return self.xp.cuda.Device(number)  # type: ignore[no-any-return]

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Any) -> Any:
        return self._make(self.xp.zeros, shape, dtype, device)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Any) -> Any:
        return self._make(self.xp.empty, shape, dtype, device)

    def _make(self, creator: Any, shape: tuple[int, ...], dtype: np.dtype[Any], device: Any) -> Any:
        with self.on(device.id):
            # As bytes: CuPy makes no arrays of float8 and other dtypes that its views can have.
            return creator((*shape[:-1], shape[-1] * dtype.itemsize), np.uint8).view(dtype)

    def from_numpy(self, array: npt.NDArray[Any], device: Any) -> Any:
        """A copy on ``device``, made on the current stream; ``array`` may be changed as soon as this returns."""
        with self.on(device.id):
            # CuPy stages pageable memory, but reads pinned memory whenever the stream gets there: hence a copy of ours.
            return self.xp.asarray(array.copy())

    def staging(self) -> "PinnedStaging | HostStaging":
        return PinnedStaging(self)

    def empty_pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        import cupyx

        return cupyx.empty_pinned(num_bytes, np.uint8)  # type: ignore[no-any-return]

    def lane(self, num_places: int, num_bytes: int, device: Any) -> "PinnedLane | HostLane":
        return PinnedLane(self, num_places, num_bytes, device)

    def pinned_memory(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Pinned memory of just this size: CuPy's pool would round it up to a power of two."""
        pinned = self.xp.cuda.pinned_memory
        return np.frombuffer(pinned.PinnedMemoryPointer(pinned.PinnedMemory(num_bytes), 0), np.uint8, num_bytes)

    def new_stream(self) -> Any:
        return self.xp.cuda.Stream(non_blocking=True)

    def current_stream(self) -> Any:
        return self.xp.cuda.get_current_stream()

    def event_behind(self, stream: Any) -> Any:
        return stream.record(self.xp.cuda.Event(disable_timing=True))

    def copy_to_host(self, array: Any, host: npt.NDArray[np.uint8], stream: Any) -> None:
        """Queue a copy of a contiguous array to the beginning of pinned memory."""
        array.data.copy_to_host_async(host.ctypes.data, array.nbytes, stream)

    def copy_from_host(self, host: npt.NDArray[np.uint8], array: Any, stream: Any) -> None:
        """Queue a copy from the beginning of pinned memory to a contiguous array."""
        array.data.copy_from_host_async(host.ctypes.data, array.nbytes, stream)

    def copy_async(self, staged: npt.NDArray[np.uint8], out: Any) -> Any:
        """Queue a copy from pinned memory on the current stream; returns an event behind it."""
        stream = self.current_stream()
        self.copy_from_host(staged, out, stream)
        return self.event_behind(stream)

    def reshape_and_cache(
        self, key: Any, value: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, layout: Layout
    ) -> None:
        arrays = (key, value, k_cache, v_cache)
        plan = self._plan("reshape_and_cache", layout, self._misalignment(*arrays), slot_mapping.itemsize)
        num_tokens, num_slots = layout.num_tokens, layout.num_blocks * layout.block_size
        arguments = (*arrays, slot_mapping, *plan.strides, *slot_mapping.strides, num_tokens, num_slots)
        self._launch(plan.kernel, key, num_tokens, plan.row, layout.num_layers, arguments)

    def gather_cache(
        self,
        key: Any,
        value: Any,
        k_cache: Any,
        v_cache: Any,
        block_tables: Any,
        seq_lens: Any,
        seq_starts: Any,
        num_rows: int,
        layout: Layout,
    ) -> None:
        """Fill ``key`` and ``value`` with as many rows as the lengths say, and ``num_rows`` at most."""
        arrays = (key, value, k_cache, v_cache)
        plan = self._plan(
            "gather_cache",
            layout,
            self._misalignment(*arrays),
            block_tables.itemsize,
            seq_lens.itemsize,
            seq_lens.itemsize if seq_starts is None else seq_starts.itemsize,
        )
        num_seqs, max_blocks = block_tables.shape
        starts = (0, 0) if seq_starts is None else (seq_starts, *seq_starts.strides)
        # A sequence of n rows touches at most n // block_size + 2 blocks, and never more than n.
        segments = min(num_rows, num_rows // layout.block_size + 2 * num_seqs)
        indices = (block_tables, *block_tables.strides, max_blocks, seq_lens, *seq_lens.strides, *starts, num_seqs)
        arguments = (*arrays, *plan.strides, *indices, num_rows, layout.num_blocks)
        # Each block sums all lengths: the more of these there are, the more a warp should copy.
        slices = -(-num_seqs // 32)
        self._launch(plan.kernel, key, segments, layout.block_size * plan.row, layout.num_layers, arguments, slices)

    def copy_blocks(self, k_cache: Any, v_cache: Any, src: Any, dst: Any, pools: Pools) -> None:
        arrays = (k_cache, v_cache)
        plan = self._copy_plan(pools, self._misalignment(*arrays), src.itemsize, dst.itemsize)
        arguments = (*arrays, src, dst, *plan.strides, *src.strides, *dst.strides, len(src), pools.num_blocks)
        self._launch(plan.kernel, k_cache, len(src), plan.row, pools.num_layers, arguments)

    def paged_attention(
        self,
        query: Any,
        k_cache: Any,
        v_cache: Any,
        block_tables: Any,
        seq_lens: Any,
        cu_seqlens_q: Any,
        max_seqlen_q: int | None,
        alibi_slopes: Any,
        sinks: Any,
        out: Any,
        lse: Any,
        scratch: Any,
        scoring: Scoring,
        layout: AttentionLayout,
    ) -> None:
        """Where ``scratch`` has too little room, or no pairs of floats, blocks take whole sequences, and longer."""
        num_seqs, max_blocks = block_tables.shape
        packed = cu_seqlens_q is not None
        device, k_address, v_address = self._device(query), self._address(k_cache), self._address(v_cache)
        with self.on(device):  # where CuPy compiles the kernel, and sets its limit, too
            plan = self._attention_plan(
                layout, scoring, num_seqs, max_blocks, packed, max_seqlen_q if packed else 1, k_address == v_address,
                (k_address | v_address) % 16, self._address(query) % 16, device, self._architecture(device),
                block_tables.itemsize, seq_lens.itemsize, cu_seqlens_q.itemsize if packed else seq_lens.itemsize,
            )  # fmt: skip
            spread = plan.spread
            if scratch is None and spread.scratch:
                scratch = self.empty((spread.scratch,), np.dtype(np.float32), query.device)
            elif scratch is not None and (scratch.size < spread.scratch or self._address(scratch) % 8):  # it is float2
                spread = Spread((*spread.grid[:2], 1), 0, 0)
            split = spread.splits > 0

            sequences = (seq_lens, *seq_lens.strides, *_or_null(cu_seqlens_q, 1), num_seqs, layout.num_tokens)
            num_heads = layout.query.shape[1]
            results = (*_or_null(sinks, 1), out, *out.strides, *_or_null(lse, 2))
            plan.kernel(
                spread.grid, (THREADS,),
                (
                    query, *plan.query_strides, k_cache, *plan.k_strides, v_cache, *plan.v_strides,
                    layout.num_blocks, block_tables, *block_tables.strides, max_blocks, *sequences, num_heads,
                    scoring.left, scoring.right, plan.inner, plan.outer, *_or_null(alibi_slopes, 1),
                    *results, scratch if split else 0, max(1, spread.splits),
                ),
                shared_mem=plan.shared_bytes,
            )  # fmt: skip
            if split:
                grid = (layout.num_tokens * num_heads, -(-layout.result.shape[2] // THREADS))
                plan.merge(
                    grid, (THREADS,),
                    (
                        scratch, spread.splits, *sequences, num_heads, max_blocks, scoring.left, scoring.right, *results
                    ),
                )  # fmt: skip

    def attention_scratch(
        self, layout: AttentionLayout, num_seqs: int, max_blocks: int, max_seqlen_q: int | None, pool: Any
    ) -> int:
        """Floats that attention keeps between two launches, at most."""
        device = self._device(pool)
        many_rows = self._many_rows(layout, num_seqs, max_seqlen_q)
        access = layout.query.dtype.itemsize  # any would do
        shape = shape_of(layout, many_rows, False, access, access, False, *self._architecture(device))
        packed = layout.num_tokens != num_seqs
        return spread_of(layout, shape, None, num_seqs, max_blocks, packed, self._processors(device)).scratch

    def merge_attention_states(self, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any, lse: Any) -> None:
        num_tokens, num_heads, dim = out.shape
        kernel = self._kernel("merge_attention_states", (("ELEMENT", ELEMENTS[out.dtype.name]), ("V_DIM", dim)))
        arrays = (out_a, lse_a, out_b, lse_b, out, lse)
        arguments = tuple(argument for array in arrays for argument in (array, *array.strides))
        with self.on(self._device(out)):
            kernel((num_tokens * num_heads, -(-dim // THREADS)), (THREADS,), (*arguments, num_heads))

    def _many_rows(self, layout: AttentionLayout, num_seqs: int, max_seqlen_q: int | None) -> bool:
        """Whether a sequence has more rows than a tile of the tensor cores."""
        tokens = -(-layout.num_tokens // max(1, num_seqs)) if max_seqlen_q is None else max_seqlen_q
        return tokens * layout.group > 16

    def _misalignment(self, *arrays: Any) -> int:
        """The last four bits of all addresses together: a power of two divides them all if it divides this."""
        bits = 0
        for array in arrays:
            bits |= self._address(array)
        return bits % 16

    def _make_plan(self, name: str, layout: Layout, misalignment: int, *index_sizes: int) -> _Plan:
        key, value, k_cache, v_cache = layout.key, layout.value, layout.k_cache, layout.v_cache
        k_runs, v_runs = _runs(key, k_cache), _runs(value, v_cache)
        access = math.gcd(_alignment(key, k_cache, k_runs), _alignment(value, v_cache, v_runs), misalignment)
        block_size = layout.block_size
        row = max(math.prod(k_runs), math.prod(v_runs)) // access
        _check_block_bytes(layout)
        defines: Defines = (("ACCESS_T", _ACCESS_TYPES[access]), ("UNROLL", _UNROLL), ("BLOCK_SIZE", block_size))
        for letter, (heads, runs_of_head, run) in (("K", k_runs), ("V", v_runs)):
            defines += ((f"{letter}_HEADS", heads), (f"{letter}_RUNS", runs_of_head), (f"{letter}_RUN", run // access))
        defines += _index_types(name, index_sizes)
        strides = (*key.strides, *value.strides, *k_cache.strides[:4], *v_cache.strides[:4])
        return _Plan(self._kernel(name, defines), strides, row)

    def _make_copy_plan(self, pools: Pools, misalignment: int, *index_sizes: int) -> _Plan:
        _check_block_bytes(pools)
        both = (pools.k_cache, pools.v_cache)
        (k_runs, k_strides), (v_runs, v_strides) = map(_block_runs, both)
        reached = (_step(pool.shape[:2], pool.strides[:2]) for pool in both)
        access = math.gcd(16, misalignment, k_runs[2], v_runs[2], *k_strides, *v_strides, *reached)
        defines: Defines = (("ACCESS_T", _ACCESS_TYPES[access]), ("UNROLL", _UNROLL))
        for letter, (outer, inner, run) in (("K", k_runs), ("V", v_runs)):
            defines += ((f"{letter}_OUTER", outer), (f"{letter}_INNER", inner), (f"{letter}_RUN", run // access))
        defines += _index_types("copy_blocks", index_sizes)
        strides = (*pools.k_cache.strides[:2], *k_strides, *pools.v_cache.strides[:2], *v_strides)
        return _Plan(self._kernel("copy_blocks", defines), strides, max(math.prod(k_runs), math.prod(v_runs)) // access)

    def _make_attention_plan(
        self,
        layout: AttentionLayout,
        scoring: Scoring,
        num_seqs: int,
        max_blocks: int,
        packed: bool,
        max_seqlen_q: int | None,
        same_address: bool,
        misalignment: int,
        query_misalignment: int,
        device: Any,
        architecture: tuple[int, int],
        *index_sizes: int,
    ) -> _AttentionPlan:
        query, k_cache, v_cache = layout.query, layout.k_cache, layout.v_cache
        v_is_k = same_address and k_cache.strides == v_cache.strides and v_cache.shape[4] <= k_cache.shape[4]
        shape, kernel, merge = self._attention_kernels(
            layout, self._many_rows(layout, num_seqs, max_seqlen_q), v_is_k, misalignment, query_misalignment,
            scoring.softcap > 0, device, architecture, *index_sizes,
        )  # fmt: skip
        spread = spread_of(layout, shape, scoring, num_seqs, max_blocks, packed, self._processors(device))
        inner = scoring.softmax_scale / scoring.softcap if scoring.softcap else 0.0
        outer = (scoring.softcap or scoring.softmax_scale) * math.log2(math.e)
        return _AttentionPlan(
            kernel, merge, shape.shared_bytes, spread, query.strides, k_cache.strides[1:4], v_cache.strides[1:4],
            np.float32(inner), np.float32(outer),
        )  # fmt: skip

    def _make_attention_kernels(
        self,
        layout: AttentionLayout,
        many_rows: bool,
        v_is_k: bool,
        misalignment: int,
        query_misalignment: int,
        softcap: bool,
        device: Any,
        architecture: tuple[int, int],
        *index_sizes: int,
    ) -> _AttentionKernels:
        """Of one device, since each has kernels of its own, which are told how much shared memory they may have."""
        item = layout.k_cache.dtype.itemsize
        access = math.gcd(16, misalignment, *(n * item for n in (layout.k_cache.shape[4], layout.v_cache.shape[4])))
        for pool in (layout.k_cache, layout.v_cache):
            access = math.gcd(access, _step(pool.shape[1:4], pool.strides[1:4]))
        query = layout.query
        query_access = item
        if query.strides[2] == item or query.shape[2] == 1:
            reached = _step(query.shape[:2], query.strides[:2])
            query_access = math.gcd(16, query_misalignment, query.shape[2] * item, reached)
        shape = shape_of(layout, many_rows, v_is_k, access, query_access, softcap, *architecture)
        kernel = self._kernel("paged_attention", shape.defines + _index_types("paged_attention", index_sizes))
        kernel.max_dynamic_shared_size_bytes = shape.shared_bytes
        of_merge = tuple(define for define in shape.defines if define[0] in ("ELEMENT", "V_DIM", "BLOCK_SIZE"))
        merge = self._kernel("merge_splits", of_merge + _index_types("merge_splits", index_sizes[1:]))
        return _AttentionKernels(shape, kernel, merge)

    def _launch(
        self,
        kernel: Any,
        key: Any,
        units: int,
        accesses: int,
        num_layers: int,
        arguments: tuple[Any, ...],
        slices: int = 1,
    ) -> None:
        """Launch one warp for each slice, 32 * _UNROLL of the ``accesses`` of each unit, for K and V of each layer.
        Where ``slices`` is more than 1, a warp gets as many, as long as the device is full of blocks: a kernel must
        allow for that.

        ``units`` is at least 1: CuPy would launch an empty grid as one block. Arrays are passed as their address,
        which forgets strides, and so strides are arguments of their own; every ``int`` is an int64.
        """
        warps = units * -(-accesses // (32 * _UNROLL))
        # Few warps are spread over the device, many share blocks.
        device = self._device(key)
        processors = self._processors(device)
        warps_of_block = min(max(1, warps * num_layers // processors), _MAX_WARPS)
        blocks = -(-warps // warps_of_block)
        blocks = min(blocks, max(1, processors * _BLOCKS_AT_ONCE // (2 * num_layers), blocks // slices))
        with self.on(device):
            kernel((blocks, 2, num_layers), (32 * warps_of_block,), arguments)
