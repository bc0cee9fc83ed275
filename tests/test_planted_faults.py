"""Faults planted in the kernels: the checked mode finds each by what is touched. All data is zeros, and the bytes would
come out right."""

from typing import Any

import numpy as np
import pytest

import cupy_pagedkv.devices.backend as backend
from cupy_pagedkv import PagedKVCache
from cupy_pagedkv.devices.emulated_backend import EmulatedBackend
from cupy_pagedkv.devices.sources import source_of
from cupy_pagedkv.emulator import KernelError, RawKernel, emulate


def launch(kernel: str, good: str, bad: str) -> None:
    """``kernel`` with ``bad`` for ``good``, on five tokens, sequences and pairs, and blocks of four warps."""

    class Edited(EmulatedBackend):
        def _build_kernel(self, name: str, defines: Any) -> RawKernel:
            source = source_of(name, defines)
            assert good in source
            return RawKernel(source.replace(good, bad), name)

        def _count_processors(self, device: str) -> int:
            return 1

    usual = backend._emulated, backend.EMULATE
    backend._emulated, backend.EMULATE = Edited, True  # type: ignore[assignment]
    try:
        cache = PagedKVCache(10, 8, 2, 4, "float16", "cpu")
        with emulate(check=True):
            if kernel == "reshape_and_cache":
                cache.update(*np.zeros((2, 5, 2, 4), np.float16), np.array([39, 3, -1, 4, 32]))
            elif kernel == "gather_cache":
                # Of a megabyte, so that no other array of the launch lies where a fault reads past the end.
                lengths = np.zeros(1 << 18, np.int32)[-5:]
                lengths[:] = 8, 3, 8, 5, 8
                cache.gather(np.array([[0], [1], [2], [3], [9]], np.int32), lengths)
            else:
                cache.copy_blocks(np.arange(5), np.arange(5, 10))
    finally:
        backend._emulated, backend.EMULATE = usual


GUARDS = "if (slot < 0 || slot >= num_slots) return;"
SUMS = "before.rows[threadIdx.x + 1] = rows;\n    if (threadIdx.x == 0) before.segments[0] = before.rows[0] = 0;\n"


@pytest.mark.parametrize(
    ("kernel", "good", "bad", "message"),
    [
        ("reshape_and_cache", "if (token >= num_tokens) return;", "", "reads .* past the end of an array"),
        ("reshape_and_cache", GUARDS, "if (slot >= num_slots) return;", "writes .* before the beginning of an array"),
        ("reshape_and_cache", "if (first + u * 32 < end) *", "if (first + u * 32 <= end) *", "race|past the end"),
        ("reshape_and_cache", "slot / BLOCK_SIZE * block_stride", "slot / BLOCK_SIZE * slot_stride", "race"),
        ("reshape_and_cache", "slot % BLOCK_SIZE * slot_stride", "slot % BLOCK_SIZE * block_stride",
         "race|past the end"),
        ("gather_cache", "if (first + u * 32 < end) *", "if (first + u * 32 <= end) *", "race|past the end"),
        ("gather_cache", "if (first + u * 32 < end) acc", "if (first + u * 32 <= end) acc", "past the end"),
        ("gather_cache", "segment.row * token_stride", "segment.row * head_stride", "race"),
        ("gather_cache", "segment.offset * slot_stride, slot_stride", "0, block_stride", "past the end"),
        ("gather_cache", "if (slice >= end) return;", "", "past the end"),
        ("gather_cache", SUMS + "    __syncthreads();", SUMS, "race|no thread of the block has written"),
        ("gather_cache", "= rows;\n    __syncthreads();", "= rows;", "race|no thread of the block has written"),
        ("gather_cache", "i < min((threadIdx.x + 1) * share, lengths.num_seqs)", "i < (threadIdx.x + 1) * share",
         "past the end"),
        ("copy_blocks", "if (pair >= num_pairs) return;", "", "past the end"),
        ("copy_blocks", "pool + to * block_stride", "pool + pair * 16", "race"),
        ("copy_blocks", "if (first + u * 32 < end) *", "if (first + u * 32 <= end) *", "race|past the end"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(kernel, good, bad, message):
    launch(kernel, good, good)
    with pytest.raises(KernelError, match=message) as error:
        launch(kernel, good, bad)
    assert f"{kernel}: kernels/" in str(error.value)
