"""What each kernel moves, measured on the emulated device, against what it has to: bars that need no GPU."""

from collections.abc import Iterable, Iterator

import numpy as np

from cupy_pagedkv import PagedKVCache
from cupy_pagedkv.devices.emulated_backend import EmulatedBackend
from cupy_pagedkv.emulator import LaunchProfile, profile
from cupy_pagedkv.emulator.architectures import ARCHITECTURES

from .cases import BLOCK_SIZE, SHAPES
from .kernels import emulated_by
from .output import bar

ARCH = 90
NUM_BLOCKS = 256


class FullSize(EmulatedBackend):
    """With as many multiprocessors as a GPU has: the launch code asks."""

    def _count_processors(self, device: str) -> int:
        return ARCHITECTURES[ARCH].multiprocessors


def launch_of(kernel: str, shape: tuple[int, int, str], num_seqs: int = 16, seq_len: int = 128) -> LaunchProfile:
    """One launch of ``kernel`` on blocks and slots that lie anywhere, of as many tokens as sequences have in all."""
    rng = np.random.default_rng(0)
    heads, dim, dtype = shape
    num_tokens = num_seqs * seq_len
    with emulated_by(FullSize()):
        num_blocks = max(NUM_BLOCKS, num_seqs * -(-seq_len // BLOCK_SIZE))
        cache = PagedKVCache(num_blocks, BLOCK_SIZE, heads, dim, dtype, "cpu")
        blocks = rng.permutation(num_blocks)
        with profile() as launches:
            if kernel == "reshape_and_cache":
                tokens = np.zeros((2, num_tokens, heads, dim), dtype)
                cache.update(*tokens, rng.permutation(num_blocks * BLOCK_SIZE)[:num_tokens])
            elif kernel == "gather_cache":
                needed = -(-seq_len // BLOCK_SIZE)
                tables = blocks[: num_seqs * needed].reshape(num_seqs, needed).astype(np.int32)
                cache.gather(tables, np.full(num_seqs, seq_len, np.int32))
            else:
                cache.copy_blocks(*blocks[: 2 * (num_blocks // 4)].reshape(2, -1))
    return launches[0]


def once(launch: LaunchProfile) -> float:
    """The share of the bytes of K and V, on both sides, that exactly one request touched."""
    of_kv = sorted(launch.arrays)[: 2 if launch.kernel == "copy_blocks" else 4]
    sides = [side for i in of_kv for side in launch.arrays[i] if side.requests]
    return sum(side.touched_once for side in sides) / sum(side.touched_once + side.touched_again for side in sides)


def index_bytes(launch: LaunchProfile) -> float:
    """What is read besides K and V, as a share of what is read of them."""
    return launch.read.bytes / launch.written.bytes - 1


def traffic_bars(kernels: Iterable[str]) -> Iterator[str]:
    for kernel in kernels:
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
