"""What each kernel moves, measured on the emulated device, against what it has to: bars that need no GPU."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cupy_pagedkv import PagedKVCache, paged_attention
from cupy_pagedkv.devices.emulated_backend import EmulatedBackend
from cupy_pagedkv.emulator import LaunchProfile, profile
from cupy_pagedkv.emulator.architectures import ARCHITECTURES
from cupy_pagedkv.emulator.profiling import SharedTraffic, Traffic

from .cases import BLOCK_SIZE, SHAPES
from .kernels import ATTENTION, GROUP, SOURCES, emulated_by
from .output import bar

ARCH = 90
NUM_BLOCKS = 256


class FullSize(EmulatedBackend):
    """With as many multiprocessors as a GPU has: the launch code asks."""

    processors = ARCHITECTURES[ARCH].multiprocessors

    def _count_processors(self, device: str) -> int:
        return self.processors


def launch(kernel: str, shape: tuple[int, int, str], num_seqs: int = 16, seq_len: int = 128, xp: Any = np) -> None:
    """One launch of ``kernel`` on blocks and slots that lie anywhere, of as many tokens as sequences have in all."""
    rng = np.random.default_rng(0)
    heads, dim, dtype = shape
    num_tokens = num_seqs * seq_len
    num_blocks = max(NUM_BLOCKS, num_seqs * -(-seq_len // BLOCK_SIZE))
    cache = PagedKVCache(num_blocks, BLOCK_SIZE, heads, dim, dtype, "cpu" if xp is np else "cuda")
    blocks = rng.permutation(num_blocks)
    if kernel == "reshape_and_cache":
        tokens = xp.zeros((2, num_tokens, heads, dim), dtype)
        cache.update(*tokens, xp.asarray(rng.permutation(num_blocks * BLOCK_SIZE)[:num_tokens]))
    elif kernel == "gather_cache":
        needed = -(-seq_len // BLOCK_SIZE)
        tables = blocks[: num_seqs * needed].reshape(num_seqs, needed).astype(np.int32)
        cache.gather(xp.asarray(tables), np.full(num_seqs, seq_len, np.int32))
    else:
        cache.copy_blocks(*xp.asarray(blocks[: 2 * (num_blocks // 4)]).reshape(2, -1))


def launch_of(kernel: str, shape: tuple[int, int, str], num_seqs: int = 16, seq_len: int = 128) -> LaunchProfile:
    with emulated_by(FullSize()), profile() as launches:
        launch(kernel, shape, num_seqs, seq_len)
    return launches[0]


def once(launch: LaunchProfile) -> float:
    """The share of the bytes of K and V, on both sides, that exactly one request touched."""
    of_kv = sorted(launch.arrays)[: 2 if launch.kernel == "copy_blocks" else 4]
    sides = [side for i in of_kv for side in launch.arrays[i] if side.requests]
    return sum(side.touched_once for side in sides) / sum(side.touched_once + side.touched_again for side in sides)


def index_bytes(launch: LaunchProfile) -> float:
    """What is read besides K and V, as a share of what is read of them."""
    return launch.read.bytes / launch.written.bytes - 1


def define(launch: LaunchProfile, name: str) -> int:
    found = re.search(rf"^#define {name} (\d+)$", launch.code, re.M)
    assert found
    return int(found[1])


ATTENDED = {  # heads, head_dim of K and of V, dtype, query heads of a KV head, sequences, new tokens, window
    "decode 8x128 float16": (8, 128, 128, "float16", GROUP, 4, 1, 1024),
    "decode 8x128 float16, window 300": (8, 128, 128, "float16", GROUP, 4, 1, 300),
    "decode 8x128 float32, window 300": (8, 128, 128, "float32", GROUP, 4, 1, 300),
    "decode 1x576 float16, V of 512 in it": (1, 576, 512, "float16", 16, 4, 1, 1024),
    "prefill 20 8x128 float16, window 300": (8, 128, 128, "float16", GROUP, 2, 20, 300),
}
SEEN_OF = 1000  # tokens of a sequence


def attend(
    heads: int, dim: int, v_dim: int, dtype: str, group: int, num_seqs: int, new: int, window: int, xp: Any = np
) -> None:
    """Attention over blocks that lie anywhere: a launch, and one more where splits are merged."""
    rng = np.random.default_rng(0)
    needed = -(-SEEN_OF // BLOCK_SIZE)
    k_cache = xp.zeros((num_seqs * needed, BLOCK_SIZE, heads, dim), dtype)
    v_cache = k_cache.copy() if v_dim == dim else k_cache[..., :v_dim]
    tables = rng.permutation(num_seqs * needed).reshape(num_seqs, needed).astype(np.int32)
    query = xp.zeros((num_seqs * new, heads * group, dim), dtype)
    ends = np.arange(num_seqs + 1, dtype=np.int32) * new
    paged_attention(query, k_cache, v_cache, xp.asarray(tables), np.full(num_seqs, SEEN_OF), ends, max_seqlen_q=new,
                    window_size=(window - 1, 0))  # fmt: skip


def attention_of(
    heads: int, dim: int, v_dim: int, dtype: str, group: int, num_seqs: int, new: int, window: int
) -> tuple[LaunchProfile, int]:
    """The launch over the pools, and the bytes of K and V that it has to read: in each row tile of a KV head once, what
    one of its rows sees."""
    with emulated_by(FullSize()), profile() as launches:
        attend(heads, dim, v_dim, dtype, group, num_seqs, new, window)
    rows, positions = define(launches[0], "ROWS"), 0
    for first in range(0, new * group, rows):
        first_token, last_token = first // group, min(first + rows - 1, new * group - 1) // group
        before = SEEN_OF - new
        positions += before + last_token + 1 - max(0, before + first_token - window + 1)
    row_bytes = (dim + (v_dim if v_dim == dim else 0)) * np.dtype(dtype).itemsize
    return launches[0], num_seqs * heads * positions * row_bytes


def attention_bars() -> Iterator[str]:
    launches = {label: attention_of(*case) for label, case in ATTENDED.items()}

    def pools(launch: LaunchProfile) -> Traffic:
        return launch.arrays[4].read + (launch.arrays[8].read if 8 in launch.arrays else Traffic())

    source = (SOURCES / "paged_attention.cu").read_text().splitlines()
    [copies] = [f"kernels/paged_attention.cu:{i}" for i, line in enumerate(source, 1) if "cp_async<ACCESS>(" in line]

    def without_conflicts(launch: LaunchProfile) -> float:
        stored = sum((line.shared for line in launch.lines if line.place == copies), SharedTraffic())
        assert stored.requests
        return min(1 / traffic.ways for traffic in (stored, launch.matrices))

    yield from bar("paged_attention reads what a row tile sees of K and V, and once", 1.0,
                   [(wanted / pools(launch).bytes, label) for label, (launch, wanted) in launches.items()])  # fmt: skip
    by_tensor_cores = {label: launch for label, (launch, _) in launches.items() if define(launch, "TENSOR")}
    yield from bar("paged_attention uses 0.97 of their sectors, by tensor cores", 0.97,
                   [(pools(launch).used, label) for label, launch in by_tensor_cores.items()])  # fmt: skip
    yield from bar("paged_attention has no bank conflicts in ldmatrix and cp.async", 1.0,
                   [(without_conflicts(launch), label) for label, launch in by_tensor_cores.items()])  # fmt: skip
    yield from bar("paged_attention reads 1% more for tables and lengths at most (0.99)", 0.99,
                   [(1 - sum(launch.arrays[i].read.bytes for i in (13, 17, 19)) / pools(launch).bytes, label)
                    for label, (launch, _) in launches.items()])  # fmt: skip
    in_flight = [(float(np.divide(*launch.in_flight(ARCH))), label) for label, (launch, _) in launches.items()]
    yield from bar("paged_attention has in flight what Little's law asks (1)", 1.0, in_flight)
    for label, (launch, _) in launches.items():
        yield f"  {label}: {launch.resources(ARCH).spills} B spilled; {launch.device_report(ARCH)}"


def traffic_bars(kernels: Iterable[str]) -> Iterator[str]:
    if "paged_attention" in kernels:
        yield from attention_bars()
    for kernel in (kernel for kernel in kernels if kernel not in ATTENTION):
        launches = {
            f"{heads}x{dim} {dtype}": launch_of(kernel, (heads, dim, dtype)) for heads, dim, dtype in SHAPES[:3]
        }
        texts = {
            "touches each byte of K and V once": (1.0, once),
            "uses 0.97 of its sectors": (0.97, lambda launch: (launch.read + launch.written).used),
            "reads 1% more for indices at most (0.99)": (0.99, lambda launch: 1 - index_bytes(launch)),
            "has in flight what Little's law asks (1)": (1.0, lambda launch: np.divide(*launch.in_flight(ARCH))),
        }
        for text, (at_least, value) in texts.items():
            yield from bar(f"{kernel} {text}", at_least, [(value(launch), label) for label, launch in launches.items()])
        for label, launch in launches.items():
            yield f"  {label}: {launch.device_report(ARCH)}"
    if "gather_cache" in kernels:
        many = launch_of("gather_cache", SHAPES[1], num_seqs=1000, seq_len=64)
        yield f"gather_cache of 1,000 sequences of 64 tokens, 1x576: {index_bytes(many):.1%} more for indices"
