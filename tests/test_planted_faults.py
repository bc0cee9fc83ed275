"""Faults planted in the kernels: the checked mode finds each by what is touched. All data is zeros, and the bytes would
come out right."""

import math
from typing import Any

import numpy as np
import pytest

import cupy_pagedkv.devices.backend as backend
from cupy_pagedkv import PagedKVCache, paged_attention
from cupy_pagedkv.devices.emulated_backend import EmulatedBackend
from cupy_pagedkv.devices.sources import source_of
from cupy_pagedkv.emulator import KernelError, RawKernel, emulate


def launch(kernel: str, good: str, bad: str, dim: int = 16) -> None:
    """``kernel`` with ``bad`` for ``good``, on five tokens, sequences and pairs, and blocks of four warps."""

    class Edited(EmulatedBackend):
        def _build_kernel(self, name: str, defines: Any) -> RawKernel:
            source = source_of(name, defines)
            if name == kernel:
                assert good in source
                source = source.replace(good, bad)
            return RawKernel(source, name)

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
                lengths = apart((5,), np.int32)
                lengths[:] = 8, 3, 8, 5, 8
                cache.gather(np.array([[0], [1], [2], [3], [9]], np.int32), lengths)
            elif kernel in ("paged_attention", "merge_splits"):
                attend(dim)
            else:
                cache.copy_blocks(np.arange(5), np.arange(5, 10))
    finally:
        backend._emulated, backend.EMULATE = usual


def apart(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros at the end of a megabyte, so that no other array of a launch lies where a fault reads past the end."""
    size = math.prod(shape)
    return np.zeros(1 << 20, dtype)[-size:].reshape(shape)


def attend(dim: int) -> None:
    """A decode step over two splits that are merged, and prefills of some rows of a tile and of all; by tensor
    cores, if head_dim is a multiple of 16, or by plain loops."""
    k_cache, v_cache = apart((40, 8, 1, dim), np.float16), apart((40, 8, 1, dim), np.float16)
    tables = np.arange(39, -1, -1, dtype=np.int32).reshape(1, 40)
    for new in (1, 9, 32):
        query, out = apart((new, 2, dim), np.float16), apart((new, 2, dim), np.float16)
        paged_attention(query, k_cache, v_cache, tables, [320], [0, new], window_size=(290, 0), out=out)


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
        ("gather_cache", "if (first + u * 32 < end) load", "if (first + u * 32 <= end) load", "past the end"),
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


NOT_WRITTEN = "race|no thread of the block has written"
OUTSIDE = "past the end|before the beginning"
WHOLE = "__syncthreads_and(whole[i])"
PLACE = "there ? block * {0}_block + slot * {0}_slot"


@pytest.mark.parametrize(
    ("kernel", "good", "bad", "message"),
    [
        ("paged_attention", "__syncthreads();  // the tile is there\n", "\n", f"{NOT_WRITTEN}|waited for"),
        ("paged_attention", "__syncthreads_and(there)", "there", "race|in flight|waited for"),
        ("paged_attention", "__syncthreads();  // shared.rows is there\n", "\n", NOT_WRITTEN),
        ("paged_attention", WHOLE, "whole[i]", NOT_WRITTEN),
        ("paged_attention", "if constexpr (COLUMN_WARPS > 1) __syncthreads();", "", NOT_WRITTEN),
        ("paged_attention", "before);\n    }\n    sync_rows();", "before);\n    }", NOT_WRITTEN),
        ("paged_attention", "cp_async_wait<STAGES - 1>();", "cp_async_wait<STAGES>();", "waited for"),
        ("paged_attention", "any.has(position(tile))", "any.first <= position(tile)", OUTSIDE),
        ("paged_attention", PLACE.format("k"), "there ? block * k_block * 2", OUTSIDE),
        ("paged_attention", PLACE.format("v"), "there ? block * v_block * 2", OUTSIDE),
        ("paged_attention", "(int)threadIdx.x : 0) < ALL", "(int)threadIdx.x : 0) <= ALL", "race|is to arrive"),
        ("paged_attention", "if (row.token < 0) continue;", "", "race|before the beginning of an array"),
        ("merge_splits", "column >= V_DIM", "column > V_DIM", "race|past the end"),
        ("merge_splits", "blockIdx.x * (V_DIM + 2LL)", "blockIdx.x * (V_DIM + 9999LL)", OUTSIDE),
    ],
)  # fmt: skip
def test_a_fault_planted_in_attention_is_found(kernel, good, bad, message):
    with pytest.raises(KernelError, match=message) as error:
        launch(kernel, good, bad)
    assert f"{kernel}: kernels/" in str(error.value)


LOST = "= sum;\n        }\n    sync_rows();"
COMMITTED = "k_pool, v_pool);\n        cp_async_commit();\n"


@pytest.mark.parametrize(
    ("kernel", "good", "bad", "message"),
    [
        ("paged_attention", LOST, LOST.replace("sync_rows();", ""), "race"),
        ("paged_attention", "__syncwarp();\n    else", ";\n    else", "race"),
        ("paged_attention", "__syncwarp();\n            if", "if", "race"),
        ("paged_attention", "__syncwarp();  // for", "// for", "race"),
        ("paged_attention", COMMITTED, "k_pool, v_pool);\n", "waited for"),
        ("paged_attention", "if (threadIdx.x >= TILE) return true;", "", "race"),
        ("paged_attention", "shared.united[w][row] = Sum();", ";", "no thread of the block has written"),
        ("paged_attention", "exists ? (int)(first_token + token) : -1", "(int)(first_token + token)", "past the end"),
        ("paged_attention", "if (!FULL && chunk >= V_DIM / 8) break;", "", "is to arrive|race"),
        ("paged_attention", "row.token >= 0 && column + 1 < V_DIM", "row.token >= 0", "race|past the end"),
        ("paged_attention", "row.token >= 0 && column + 1 < V_DIM", "column + 1 < V_DIM", "before the beginning"),
        ("paged_attention", "row.token >= 0 && part == 0 && column_warp() == 0", "row.token >= 0", "race"),
        ("merge_splits", "blockDim.x + threadIdx.x;", "threadIdx.x / 2;", "race"),
        ("merge_splits", "first % (int)num_splits", "first + (int)num_splits", "past the end"),
    ],
)  # fmt: skip
def test_a_lost_guard_or_barrier_of_attention_is_found(kernel, good, bad, message):
    with pytest.raises(KernelError, match=message) as error:
        launch(kernel, good, bad)
    assert f"{kernel}: kernels/" in str(error.value)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("place != NOWHERE && column < V_DIM", "place != NOWHERE"),
        ("d < HEAD_DIM;", "d <= HEAD_DIM;"),
        ("if (column < V_DIM)\n", "\n"),
        ("if (column < V_DIM) of_row", "of_row"),
    ],
)
def test_a_fault_planted_in_plain_loops_is_found(good, bad):
    with pytest.raises(KernelError, match="past the end|race|no thread of the block has written"):
        launch("paged_attention", good, bad, dim=15)


def test_attention_without_a_fault():
    for kernel in ("paged_attention", "merge_splits"):
        for dim in (15, 16):
            launch(kernel, "{", "{", dim)
