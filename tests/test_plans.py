"""What the CUDA backend makes of shapes and strides: as few and as long runs as they allow, worked out by hand."""

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest

from cupy_pagedkv import PagedKVCache, copy_blocks, gather_cache, paged_attention, reshape_and_cache
from cupy_pagedkv.devices.cuda_attention import shape_of, spread_of
from cupy_pagedkv.devices.cuda_backend import _block_runs, _runs
from cupy_pagedkv.devices.emulated_backend import EmulatedBackend
from cupy_pagedkv.devices.layout import UNBOUNDED, AttentionLayout, Form, Pools, Scoring, attention_layout_of
from cupy_pagedkv.emulator import emulate
from cupy_pagedkv.emulator.architectures import ARCHITECTURES

F2 = np.dtype(np.float16)
POOL = Form((1, 4, 8, 3, 16), (0, 768, 96, 32, 2), F2)  # [layers, blocks, slots, heads, dim]


@pytest.mark.parametrize(
    ("shape", "strides", "pool", "expected"),
    [
        ((1, 5, 3, 16), (0, 96, 32, 2), POOL, (1, 1, 96)),  # all heads in one
        ((1, 5, 3, 16), (0, 192, 64, 2), POOL, (3, 1, 32)),  # heads apart in the tokens,
        ((1, 5, 3, 16), (0, 96, 32, 2), POOL._replace(strides=(0, 768, 32, 256, 2)), (3, 1, 32)),  # and in the pool
        ((1, 5, 3, 16), (0, 192, 64, 4), POOL, (3, 16, 2)),  # elements apart
        ((1, 5, 1, 16), (0, 96, 999, 2), POOL._replace(shape=(1, 4, 8, 1, 16)), (1, 1, 32)),  # one head, wherever
        (
            (1, 5, 3, 1),
            (0, 96, 2, 999),
            Form((1, 4, 8, 3, 1), (0, 48, 6, 2, 2), F2),
            (1, 1, 6),
        ),  # one element, likewise
    ],
)
def test_runs_of_a_token(shape, strides, pool, expected):
    assert _runs(Form(shape, strides, F2), pool) == expected


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((1, 4, 8, 3, 16), (0, 768, 96, 32, 2), ((1, 1, 768), (0, 0))),  # NHD
        ((1, 4, 8, 3, 16), (0, 768, 32, 256, 2), ((1, 1, 768), (0, 0))),  # HND
        ((1, 4, 8, 3, 16), (0, 999, 192, 32, 2), ((1, 8, 96), (0, 192))),  # slots apart
        ((1, 4, 8, 3, 16), (0, 999, 512, 64, 2), ((8, 3, 32), (512, 64))),  # slots and heads apart
        ((1, 4, 8, 3, 16), (0, 999, -96, 32, 2), ((1, 8, 96), (0, -96))),  # slots the other way round
        ((1, 4, 8, 3, 16), (0, 999, 96, -32, 2), ((8, 3, 32), (96, -32))),  # and heads
        ((1, 4, 8, 3, 16), (0, 999, -512, 64, 2), ((8, 3, 32), (-512, 64))),  # and both apart
        ((1, 4, 1, 3, 16), (0, 999, 7, 32, 2), ((1, 1, 96), (0, 0))),  # one slot, wherever
        ((1, 4, 8, 1, 16), (0, 999, 32, -5, 2), ((1, 1, 256), (0, 0))),  # one head
    ],
)
def test_runs_of_a_block(shape, strides, expected):
    assert _block_runs(Form(shape, strides, F2)) == expected


def test_elements_at_any_distance(device, rng):
    """Fields of packed structures lie where their type could not be accessed."""
    if device.name == "cupy":
        pytest.skip("CuPy has no structures")
    packed = np.dtype([("x", np.float16), ("flag", np.uint8)])
    key, value = (oracle.random_array(rng, (6, 2, 8), packed) for _ in range(2))
    pools = oracle.random_array(rng, (2, 3, 4, 2, 8), np.float16)
    expected = pools.copy()
    slots = [3, 0, 11, 5, 6, 7]
    reshape_and_cache(key["x"], value["x"], *pools, slots)
    for tokens, pool in zip((key, value), expected, strict=True):
        oracle.scatter(tokens.view(np.uint8).reshape(6, 2, 8, 3)[..., :2].copy().view(np.float16)[..., 0], pool, slots)
    assert pools.tobytes() == expected.tobytes()
    before = key["flag"].copy(), value["flag"].copy()
    gather_cache(*pools, [[0, 2]], [6], out=(key["x"], value["x"]))
    for tokens, pool, flags in zip((key, value), expected, before, strict=True):
        got = np.ascontiguousarray(tokens["x"])
        assert got.tobytes() == oracle.gather(pool, [[0, 2]], [6], [0]).tobytes()
        assert np.array_equal(tokens["flag"], flags)


@pytest.mark.parametrize("short", [0, 1])
def test_blocks_that_fill_no_whole_accesses(device, rng, short):
    """The blocks of one tensor, 15 bytes at a distance of 16, and of the other 16: all of it must be copied."""
    host = oracle.random_bytes(rng, 2 * 6 * 16).reshape(2, 6, 16)
    memory = device.array(host)

    def pools(memory):
        return [memory[i, :, None, None, : 15 if i == short else 16] for i in range(2)]

    copy_blocks(*pools(memory), [0, 5], [3, 1])
    for pool in pools(host):
        pool[[3, 1]] = pool[[0, 5]]
    assert device.numpy(memory).tobytes() == host.tobytes()


def plan_of_blocks(k_shape: tuple[int, ...], strides: tuple[int, ...], v_dim: int = 16) -> Any:
    """Of copies between pools of uint8 that differ in head_dim alone, whatever their size."""
    k_cache = Form(k_shape, strides, np.dtype(np.uint8))
    v_cache = k_cache._replace(shape=(*k_shape[:4], v_dim))
    return EmulatedBackend()._make_copy_plan(Pools(k_cache, v_cache, *k_shape[:3]), 0, 8, 8)


def test_strides_of_axes_of_one_mean_nothing():
    assert "#define ACCESS_T uint4" in plan_of_blocks((1, 1, 4, 1, 16), (7, 9, 16, 3, 1)).kernel.code
    assert "#define ACCESS_T uint4" not in plan_of_blocks((2, 1, 4, 1, 16), (7, 9, 16, 3, 1)).kernel.code


@pytest.mark.parametrize("large", ["K", "V"])
def test_offsets_within_a_block_have_32_bits(large):
    def plan(dim: int) -> Any:
        k_dim, v_dim = (dim, 1) if large == "K" else (1, dim)
        return plan_of_blocks((1, 2, 2**20, 1, k_dim), (0, 2**31, 2**11, 1, 1), v_dim)

    assert plan(2**10).row >= 2**26
    with pytest.raises(
        ValueError, match=r"a block of K or V must have at most 1073741824 bytes here, got block_size 1048"
    ):
        plan(2**10 + 1)


def attention_of(dtype: Any, dim: int, v_dim: int, num_tokens: int = 1) -> AttentionLayout:
    k_cache, v_cache = (np.zeros((1, 16, 2, d), dtype) for d in (dim, v_dim))
    return attention_layout_of(np.zeros((num_tokens, 4, dim), dtype), k_cache, v_cache)


@pytest.mark.parametrize(
    ("dtype", "dim", "v_dim", "many_rows", "v_is_k", "arch", "expected"),
    [
        (np.float16, 128, 128, True, False, 90, (1, 64, 64, 2, 1)),
        (np.float16, 128, 128, False, False, 90, (1, 16, 64, 2, 1)),
        (np.float16, 144, 128, True, False, 90, (1, 64, 32, 2, 1)),  # K and V of 64 positions would be too much
        (np.float16, 128, 128, True, False, 75, (1, 32, 64, 1, 1)),  # fewer registers, and 64 KiB of shared memory
        (ml_dtypes.bfloat16, 128, 128, True, False, 75, (0, 32, 32, 1, 1)),  # which its tensor cores do not have
        (np.float16, 512, 512, False, False, 75, (0, 16, 32, 1, 1)),  # one tile of K and V is all of 64 KiB
        (np.float16, 576, 512, True, True, 120, (1, 16, 32, 2, 1)),
        (np.float16, 576, 512, True, False, 120, (1, 16, 32, 1, 1)),
        (np.float16, 67, 67, True, False, 90, (0, 64, 32, 1, 1)),
        (np.float16, 64, 528, True, False, 90, (0, 16, 32, 1, 2)),  # two blocks share the columns of V
        (np.float32, 128, 128, True, False, 90, (0, 64, 32, 1, 1)),
        (np.float32, 576, 64, True, False, 120, (0, 32, 32, 1, 1)),  # 64 rows of the query would take 154 KiB
    ],
)
def test_what_a_block_of_attention_is_made_for(dtype, dim, v_dim, many_rows, v_is_k, arch, expected):
    room = ARCHITECTURES[arch].shared_memory_of_block
    shape = shape_of(attention_of(dtype, dim, v_dim), many_rows, v_is_k, 16, 16, False, arch, room)
    defines = dict(shape.defines)
    assert (*(defines[name] for name in ("TENSOR", "ROWS", "TILE", "STAGES")), shape.parts) == expected
    assert shape.shared_bytes <= room


def test_a_query_that_shared_memory_has_no_room_for(kernel_device):
    if kernel_device.name == "cupy":
        pytest.skip("a GPU has one architecture")
    pool, query = np.zeros((1, 16, 1, 2000), np.float32), np.zeros((1, 1, 2000), np.float32)
    paged_attention(query, pool, pool, [[0]], [1])
    with emulate(arch=75), pytest.raises(ValueError, match="2000 needs 132736 bytes .* has at most 65536 here"):
        paged_attention(query, pool, pool, [[0]], [1])


def test_scratch_of_long_tables_serves_a_window():
    """Sums of all splits would be more than are kept; those of a window's splits are not."""
    layout = attention_of(np.float16, 64, 64, num_tokens=64)
    shape = shape_of(layout, False, False, 16, 16, False, 90, ARCHITECTURES[90].shared_memory_of_block)
    long_tables = (64, 2**24 // 16, False, 132)
    windowed = spread_of(layout, shape, Scoring(0.125, 0.0, 4096, 0), *long_tables)
    assert (windowed.splits, windowed.grid[2]) == (18, 18)
    assert 0 < windowed.scratch <= spread_of(layout, shape, None, *long_tables).scratch == 2**26
    assert spread_of(layout, shape, Scoring(0.125, 0.0, UNBOUNDED, 0), *long_tables).scratch == 0


def test_the_more_sequences_there_are_the_more_a_warp_gathers(launches):
    """Each thread block reads all of their lengths."""
    cache = PagedKVCache(256, 16, 1, 128, np.float16, "cpu")
    for num_seqs in (1, 32, 64, 256):
        tables = np.arange(256, dtype=np.int32).reshape(num_seqs, -1)
        cache.gather(tables, np.full(num_seqs, 4096 // num_seqs))
    slices = 256 + 2 * np.array([1, 32, 64, 256])  # at most
    assert [grid[0] for _, grid in launches] == (-(-slices // 4) // [1, 1, 2, 8]).tolist()
