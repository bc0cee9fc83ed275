"""How fast the emulated device is: fit to be used, or not."""

import os
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np

from cupy_pagedkv import PagedKVCache
from cupy_pagedkv.devices.emulated_backend import EmulatedBackend
from cupy_pagedkv.emulator import RawKernel

from .cases import BLOCK_SIZE, OURS
from .kernels import emulated_by
from .output import bar
from .timing import in_turns

THREADS, SHUFFLES = 128, 1000
SHUFFLING = f"""extern "C" __global__ void shuffling(int* x) {{
    int v = x[threadIdx.x];
    for (int i = 0; i < {SHUFFLES}; ++i) v = __shfl_xor_sync(0xffffffffu, v, 1);
    x[threadIdx.x] = v;
}}"""


def collectives(flags: str) -> Callable[[], float]:
    """How long a launch of threads that shuffle takes, in a build with these flags."""
    kernel, x = RawKernel(SHUFFLING, "shuffling"), np.arange(THREADS, dtype=np.int32)
    with patch.dict(os.environ, {"CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} {flags}"}):
        kernel((1,), (THREADS,), (x,))  # compiled now
    assert x.tolist() == list(range(THREADS))

    def timed() -> float:
        begun = time.perf_counter()
        kernel((1,), (THREADS,), (x,))
        return time.perf_counter() - begun

    return timed


def speed_bars(rounds: int = 20) -> Iterator[str]:
    seconds = in_turns({OURS: collectives(""), "swapcontext": collectives("-DEMULATED_UCONTEXT")}, rounds)
    rate = THREADS * SHUFFLES / seconds[OURS] / 1e6
    ratio = seconds["swapcontext"] / seconds[OURS]
    yield from bar("collectives >= 5 x those of swapcontext", 5.0, [(ratio, f"{rate:.0f} million a second")])
    with emulated_by(EmulatedBackend()):
        cache = PagedKVCache(4000, BLOCK_SIZE, 8, 128, "float16", "cpu")
        rng = np.random.default_rng(0)
        tables = rng.permutation(4000)[:3000].reshape(1500, 2).astype(np.int32)
        lengths = rng.integers(1, 2 * BLOCK_SIZE + 1, 1500)
        cache.gather(tables, lengths)
        begun = time.perf_counter()
        cache.gather(tables, lengths)
        taken = time.perf_counter() - begun
    yield from bar("1,500 sequences are gathered in a second", 1.0, [(1 / taken, f"{taken:.3f} s")])
