"""What the compiler makes of a kernel, with no GPU and no driver, and whether the kernel is right."""

import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import oracle

from cupy_pagedkv import PagedKVCache, copy_blocks, merge_attention_states, paged_attention, reshape_and_cache
from cupy_pagedkv.devices import backend
from cupy_pagedkv.devices.cuda_backend import source_of
from cupy_pagedkv.devices.emulated_backend import EmulatedBackend
from cupy_pagedkv.devices.layout import layout_of
from cupy_pagedkv.emulator import nvrtc

from .cases import BLOCK_SIZE, SHAPES, wrong_bytes

GROUP = 4  # query heads of a KV head

SOURCES = Path(__file__).resolve().parents[1] / "kernels"
KERNELS = tuple(sorted(path.stem for path in SOURCES.glob("*.cu")))


class Unlaunched:
    """A kernel that does nothing."""

    max_dynamic_shared_size_bytes = 0

    def __call__(self, *arguments: Any, shared_mem: int = 0) -> None:
        pass


class RecordingBackend(EmulatedBackend):
    """Writes down what would be compiled and launched, and does neither."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[str, Any]] = []

    def _build_kernel(self, name: str, defines: Any) -> Any:
        self.recorded.append((name, defines))
        return Unlaunched()


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
            query = np.zeros((1, GROUP * heads, dim), dtype)
            out, lse = cache.attend(query, np.zeros((1, 64), np.int32), [1], return_lse=True)
            merge_attention_states(out, lse, out, lse)
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


def print_reports(kernels: Iterable[str], architectures: Sequence[int]) -> int:
    for kernel in kernels:
        try:
            reports = compiler_reports(kernel, architectures, SHAPES)
        except Exception as error:  # NVRTC's text names the line
            print(error, file=sys.stderr)
            return 1
        for label, report in reports.items():
            print(f"{label:<46}{report}")
    return 0


CHECKED = (  # heads, dim, dim of V, dtype, layout, first element, tokens, sequences
    (8, 128, 128, np.float16, "NHD", 0, 37, 3),
    (3, 46, 40, np.float16, "HND", 0, 19, 34),  # more sequences than a warp has lanes
    (5, 67, 30, np.uint8, "packed", 1, 40, 3),  # single bytes, and more of them than a warp takes
)
NUM_BLOCKS, SMALL_BLOCK = 12, 8
ATTENTION = ("paged_attention", "merge_splits", "merge_attention_states")


def check_kernel(kernel: str, xp: Any) -> str | None:
    """What is wrong with `kernel`, on the GPU or the emulated device, or nothing.

    Two layers, K and V of their own shapes, padding, and what is not in the pool: all bytes against plain loops.
    """
    rng = np.random.default_rng(1)
    if kernel in ATTENTION:
        return check_attention(rng, xp)
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


def check_attention(rng: Any, xp: Any) -> str | None:
    """What is wrong with attention, if anything: a decode step and a prefill, by tensor cores and without, over splits
    that are merged; and two halves of the keys, merged, against the whole."""
    lens, counts = [300, 5, 0], [20, 1, 3]
    ends = np.cumsum([0, *counts])
    for heads, dim, dtype, error in ((2, 64, np.float16, 2e-3), (1, 40, np.float32, 2e-6)):
        k_cache, v_cache = rng.standard_normal((2, 50, SMALL_BLOCK, heads, dim)).astype(dtype)
        query = rng.standard_normal((sum(counts), 3 * heads, dim)).astype(dtype)
        tables = rng.permutation(50)[:40].repeat(3).reshape(40, 3).T.astype(np.int32)
        on_device = [xp.asarray(array) for array in (query, k_cache, v_cache, tables)]
        options = {"window_size": (270, -1), "sinks": np.linspace(-1, 1, 3 * heads, dtype=np.float32)}
        expected = oracle.attention(query, k_cache, v_cache, tables, lens, ends, **options)
        last = xp.asarray(ends[1:] - 1)
        decode = paged_attention(on_device[0][last], *on_device[1:], lens, return_lse=True, **options)
        whole = paged_attention(*on_device, lens, ends, return_lse=True, **options)
        q, k, v, t = (array[:1] if i in (0, 3) else array for i, array in enumerate(on_device))
        halves = [
            paged_attention(q, k, v, half, [160], causal=False, return_lse=True) for half in (t[:, :20], t[:, 20:])
        ]
        merged = merge_attention_states(*halves[0], *halves[1])
        of_both = oracle.attention(query[:1], k_cache, v_cache, tables[:1], [320], causal=False)
        for name, got, wanted in (
            ("prefill", whole, expected), ("decode", decode, [array[ends[1:] - 1] for array in expected]),
            ("merged", merged, of_both),
        ):  # fmt: skip
            for array, exact in zip(got, wanted, strict=True):
                host = np.asarray(array if xp is np else xp.asnumpy(array)).astype(np.float64)
                if not np.allclose(host, exact, rtol=0, atol=error):
                    return (
                        f"{name}, {heads}x{dim} {np.dtype(dtype)}: off by up to {np.nanmax(np.abs(host - exact)):.3g}"
                    )
    return None
