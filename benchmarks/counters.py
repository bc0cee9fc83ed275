"""What a GPU's profiler counts of some launches, beside what the emulated device says of the same."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from cupy_pagedkv.emulator import LaunchProfile, profile

from .cases import SHAPES
from .kernels import emulated_by
from .traffic import ATTENDED, FullSize, attend, launch

KERNELS = ("reshape_and_cache", "gather_cache", "copy_blocks")


def each_launch(xp: Any) -> Iterator[str]:
    """Makes the launches of one case after another; gives what each is called, when it has been made."""
    for kernel in KERNELS:
        for heads, dim, dtype in (*SHAPES[:3], SHAPES[4]):
            launch(kernel, (heads, dim, dtype), xp=xp)
            yield f"{kernel} {heads}x{dim} {dtype}"
    for label, case in ATTENDED.items():
        attend(*case, xp=xp)
        yield label


def emulated() -> Iterator[tuple[str, LaunchProfile]]:
    with emulated_by(FullSize()), profile() as launches:
        for label in each_launch(np):
            yield from ((label, each) for each in launches)
            launches.clear()


if __name__ == "__main__":
    import cupy

    for _ in each_launch(cupy):
        cupy.cuda.Device().synchronize()
    sys.exit()
