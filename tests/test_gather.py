"""gather_cache: every byte of the result, and of the memory around a preallocated one, against a loop's."""

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import Device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_scatter import DTYPES, EVERY_DTYPE, HEAD_DIMS, LAYOUTS

from cupy_pagedkv import gather_cache, reshape_and_cache
from cupy_pagedkv.devices.backend import backend_of
from cupy_pagedkv.devices.cuda_backend import CudaBackend
from cupy_pagedkv.devices.layout import layout_of

LENGTHS = [0, 1, 15, 16, 17, 45, 400, 203]


def filled_pools(device: Device, rng: np.random.Generator, size: int, views: oracle.Pools) -> tuple[Any, Any]:
    """Pools of random bytes, on the host and on the device."""
    host = oracle.random_bytes(rng, size)
    return views(host), views(device.array(host))


def poisoned_tables(rng: np.random.Generator, num_blocks: int, block_size: int, lens: Any, spare: int = 3) -> Any:
    """A permuted table for each sequence, int32, whose entries past its need are no blocks."""
    needed = [-(-n // block_size) for n in lens]
    tables = rng.choice(
        [-1, -(2**31), num_blocks, 2**31 - 1], (len(lens), max(needed, default=0) + spare), replace=True
    ).astype(np.int32)
    blocks = rng.permutation(num_blocks)
    for row, n in zip(tables, needed, strict=True):
        row[:n], blocks = blocks[:n], blocks[n:]
    return tables


def check(device: Device, pools: Any, tables: Any, lens: Any, starts: Any = None, host_indices: Any = None) -> None:
    """Gather with a new result, and into one with room to spare, whose other rows have to stay as they are."""
    host_pools, device_pools = pools
    host_tables, host_lens, host_starts = host_indices or (tables, lens, [0] * len(lens) if starts is None else starts)
    expected = [oracle.gather(pool, host_tables, host_lens, host_starts) for pool in host_pools]
    got = gather_cache(*device_pools, tables, lens, seq_starts=starts)
    for array, rows, pool in zip(got, expected, host_pools, strict=True):
        result = device.numpy(array)
        assert result.dtype == pool.dtype
        assert result.shape == rows.shape
        assert np.array_equal(oracle.opaque(result), rows)

    rest = np.random.default_rng(0)
    memory = [oracle.random_array(rest, (len(rows) + 3, *rows.shape[1:]), rows.dtype) for rows in expected]
    out = tuple(device.array(array.view(pool.dtype)) for array, pool in zip(memory, host_pools, strict=True))
    assert gather_cache(*device_pools, tables, lens, seq_starts=starts, out=out) is out
    for array, before, rows in zip(out, memory, expected, strict=True):
        before[: len(rows)] = rows
        assert np.array_equal(oracle.opaque(device.numpy(array)), before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_grid_of_rows(device, rng, dim, dtype, layout):
    lens = [0, 1, 15, 16, 17, 45, 33]
    pools = filled_pools(device, rng, *oracle.pools(layout, 16, 16, 8, dim, dtype))
    check(device, pools, poisoned_tables(rng, 16, 16, lens), lens)


@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
def test_grid_of_lengths(device, rng, block_size):
    pools = filled_pools(device, rng, *oracle.pools("NHD", 1024, block_size, 2, 64, ml_dtypes.bfloat16))
    lens = rng.permutation(LENGTHS)
    tables = poisoned_tables(rng, 1024, block_size, lens)
    check(device, pools, tables, lens)
    starts = np.array([rng.integers(0, n + 1) for n in lens])
    check(device, pools, tables, lens, starts)


@pytest.mark.parametrize("lens", [[45], [4096], [45, 8, 25], [45, 8, 25, 22], [7, 0, 0, 9], [0], [0, 0], []], ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_batches(device, rng, lens, block_size):
    pools = filled_pools(device, rng, *oracle.pools("NHD", 4200 // block_size, block_size, 1, 16, np.float16))
    check(device, pools, poisoned_tables(rng, 4200 // block_size, block_size, lens), lens)


def test_starts_around_block_edges(device, rng):
    pools = filled_pools(device, rng, *oracle.pools("HND", 200, 16, 2, 8, np.float16))
    pairs = [(start, n) for n in (1, 15, 16, 17, 31, 32, 33, 48) for start in (0, 1, 15, 16, 17, 31, 32, 47, 48)]
    starts, lens = zip(*(pair for pair in pairs if pair[0] <= pair[1]), strict=True)
    check(device, pools, poisoned_tables(rng, 200, 16, lens), list(lens), list(starts))


def test_a_sequence_with_nothing_to_copy_needs_no_block(device, rng):
    pools = filled_pools(device, rng, *oracle.pools("NHD", 6, 4, 1, 8, np.float16))
    check(device, pools, [[-1, 99], [3, -1], [99, -1]], [7, 2, 0], [7, 1, 0])


def test_nothing_to_copy_is_no_launch(kernel_device, rng, monkeypatch):
    _, device_pools = filled_pools(kernel_device, rng, *oracle.pools("NHD", 6, 4, 1, 8, np.float16))
    monkeypatch.setattr(CudaBackend, "_launch", None)
    for tables, lens in (([[0], [1]], [0, 0]), ([], []), ([[]], [0])):
        for array in gather_cache(*device_pools, tables, lens):
            assert kernel_device.numpy(array).shape == (0, 1, 8)
    nothing = kernel_device.xp.zeros((0, 1, 8), np.float16)
    gather_cache(*device_pools, [[0]], kernel_device.array(np.array([0])), out=(nothing, nothing))
    reshape_and_cache(nothing, nothing, *device_pools, [])


def test_two_tokens_on_both_sides_of_an_edge(device, rng):
    """The most blocks that rows can touch: the grid has to be large enough for these."""
    pools = filled_pools(device, rng, *oracle.pools("NHD", 200, 16, 1, 8, np.float16))
    for num_seqs in (1, 2, 40):
        lens = [17] * num_seqs
        check(device, pools, poisoned_tables(rng, 200, 16, lens), lens, [15] * num_seqs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_blocks", [1024, 10000])
@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
def test_grid_of_pools(device, rng, block_size, num_blocks, layout):
    pools = filled_pools(device, rng, *oracle.pools(layout, num_blocks, block_size, 2, 16, ml_dtypes.bfloat16))
    lens = [0, 1, 15, 16, 17, 45, 400]
    check(device, pools, poisoned_tables(rng, num_blocks, block_size, lens), lens, [0, 0, 3, 16, 1, 44, 7])


@pytest.mark.parametrize("num_seqs", [1, 2, 31, 32, 33, 100, 1024, 1025, 1500])
def test_numbers_of_sequences(device, rng, num_seqs):
    """The kernel looks for a row's sequence 32 at a time: one, two and three rounds."""
    lens = rng.integers(0, 4, num_seqs)
    lens[rng.integers(0, num_seqs)] = 11
    starts = np.minimum(lens, rng.integers(0, 2, num_seqs))
    pools = filled_pools(device, rng, *oracle.pools("NHD", 3000, 2, 1, 2, np.uint8))
    check(device, pools, poisoned_tables(rng, 3000, 2, lens), lens, starts)


@pytest.mark.parametrize("layout", ["NHD", "HND", "packed"])
@pytest.mark.parametrize(("dim", "v_dim"), [(576, 512), (192, 128), (46, 3), (1, 64)])
def test_v_of_another_head_dim(device, rng, dim, v_dim, layout):
    pools = filled_pools(device, rng, *oracle.pools(layout, 12, 8, 2, dim, np.float16, v_dim))
    check(device, pools, poisoned_tables(rng, 12, 8, [9, 30]), [9, 30], [2, 0])


@pytest.mark.parametrize("first", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("dim", "dtype"), [(1, np.float16), (3, np.float16), (46, np.float16), (576, np.float16),
                                            (5, np.uint8)])  # fmt: skip
def test_pools_that_start_at_any_element(device, rng, dim, dtype, first):
    pools = filled_pools(device, rng, *oracle.pools("NHD", 12, 8, 1, dim, dtype, first=first))
    check(device, pools, poisoned_tables(rng, 12, 8, [9, 30]), [9, 30])


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_every_dtype_bit_for_bit(device, rng, dtype):
    device.skip_unless_it_has(dtype)
    for layout in ("NHD", "HND"):
        pools = filled_pools(device, rng, *oracle.pools(layout, 8, 4, 3, 5, dtype))
        check(device, pools, poisoned_tables(rng, 8, 4, [9, 6]), [9, 6], [1, 0])


OUTS = {
    "backwards": ((7, 2, 5), lambda a: a[::-1]),
    "every third dim": ((7, 2, 15), lambda a: a[..., ::3]),
    "fused": ((7, 3, 2, 5), lambda a: a[:, 1]),
    "head first": ((2, 7, 5), lambda a: a.transpose(1, 0, 2)),
    "all axes reversed": ((5, 2, 7), lambda a: a.transpose(2, 1, 0)),
    "from the second element on": ((71,), lambda a: a[1:].reshape(7, 2, 5)),
}


@pytest.mark.parametrize("view", OUTS)
def test_out_of_any_strides(device, rng, view):
    (host_k, host_v), device_pools = filled_pools(device, rng, *oracle.pools("NHD", 8, 4, 2, 5, np.float16))
    tables = poisoned_tables(rng, 8, 4, [2, 7])
    shape, make = OUTS[view]
    memory = oracle.random_array(rng, (2, *shape), np.uint16).view(np.float16)
    on_device = device.array(memory)
    gather_cache(*device_pools, tables, [2, 7], seq_starts=[0, 2], out=(make(on_device[0]), make(on_device[1])))
    for array, pool in zip(memory, (host_k, host_v), strict=True):
        oracle.opaque(make(array))[...] = oracle.gather(pool, tables, [2, 7], [0, 2])
    assert np.array_equal(device.numpy(on_device).view(np.uint16), memory.view(np.uint16))


@pytest.mark.parametrize("kind", ["list", "numpy", "device", "strided"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_kinds_of_indices(device, rng, dtype, kind):
    pools = filled_pools(device, rng, *oracle.pools("NHD", 30, 4, 1, 4, np.float16))
    lens, starts = np.array([9, 0, 30], dtype), np.array([2, 0, 29], dtype)
    tables = poisoned_tables(rng, 30, 4, lens).astype(dtype)
    host = (tables, lens, starts)
    if kind == "list":
        indices = [array.tolist() for array in host]
    elif kind == "numpy":
        indices = list(host)
    elif kind == "device":  # lengths on a GPU need `out`: see the next test
        indices = [device.array(tables), lens, starts]
    else:
        indices = [device.array(np.repeat(tables, 2, axis=1))[:, ::2], np.repeat(lens, 3)[::3], starts[::-1][::-1]]
    check(device, pools, *indices, host_indices=host)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_everything_on_the_device_with_out(device, rng, dtype):
    """What a captured CUDA graph needs: no length on the host, rows to spare, lengths that change between calls."""
    (host_k, host_v), device_pools = filled_pools(device, rng, *oracle.pools("NHD", 30, 4, 1, 4, np.float16))
    tables = poisoned_tables(rng, 30, 4, [40, 40, 40]).astype(dtype)
    device_tables, lens, starts = (
        device.array(tables),
        device.array(np.zeros(3, dtype)),
        device.array(np.zeros(3, dtype)),
    )
    before = oracle.random_array(rng, (2, 100, 1, 4), np.uint16).view(np.float16)
    memory = device.array(before)
    out = (memory[0], memory[1])
    for new_lens, new_starts in [([9, 0, 30], [2, 0, 29]), ([40, 1, 40], [0, 0, 0]), ([0, 0, 0], [0, 0, 0])]:
        lens[...] = device.array(np.array(new_lens, dtype))
        starts[...] = device.array(np.array(new_starts, dtype))
        assert gather_cache(*device_pools, device_tables, lens, seq_starts=starts, out=out) is out
        for array, pool in zip(before, (host_k, host_v), strict=True):
            rows = oracle.gather(pool, tables, new_lens, new_starts)
            oracle.opaque(array)[: len(rows)] = rows
        assert np.array_equal(device.numpy(memory).view(np.uint16), before.view(np.uint16))


def test_blocks_outside_the_pool_raise_on_numpy_and_are_zeros_from_the_kernel(device, rng):
    (host_k, _), device_pools = filled_pools(device, rng, *oracle.pools("NHD", 6, 4, 2, 5, np.float16))
    tables = np.array([[1, 6, 2], [-1, 3, -1], [0, 2**31 - 1, 0]], np.int32)
    lens = [12, 7, 4]
    memory = device.array(np.full((2, 30, 2, 5), 7, np.float16))
    out = (memory[0], memory[1])
    if device.checks_indices:
        with pytest.raises(IndexError, match=r"block_tables\[0, 1\] is 6, but the pool has blocks 0 to 5; sequence 0 "):
            gather_cache(*device_pools, tables, lens, out=out)
        assert (memory == 7).all()
        return
    key = device.numpy(gather_cache(*device_pools, tables, lens, out=out)[0])
    good = [*range(4), *range(8, 12), *range(16, 19), *range(19, 23)]
    expected = [host_k[1], host_k[2], host_k[3, :3], host_k[0]]
    assert key[good].tobytes() == b"".join(rows.tobytes() for rows in expected)
    assert not key[[*range(4, 8), *range(12, 16)]].view(np.uint16).any()
    assert (key[23:] == 7).all()


def test_debug_refuses_blocks_outside_the_pool_before_it_writes(debug, rng):
    _, device_pools = filled_pools(debug, rng, *oracle.pools("NHD", 6, 4, 2, 5, np.float16))
    memory = debug.array(np.full((2, 30, 2, 5), 7, np.float16))
    tables = debug.array(np.array([[1, 2, 3], [0, -1, 6]], np.int32))
    with pytest.raises(IndexError, match=r"block_tables\[1, 1\] is -1"):
        gather_cache(*device_pools, tables, debug.array(np.array([12, 5])), out=(memory[0], memory[1]))
    assert (debug.numpy(memory) == 7).all()


def launch(out: Any, k_cache: Any, v_cache: Any, tables: Any, lens: Any, starts: Any) -> None:
    """Without the checks, which lengths on a GPU do not get, and on the emulated device are all in host memory."""
    layout = layout_of(("out[0]", "out[1]"), *out, k_cache, v_cache)
    backend = backend_of(("k_cache",), k_cache)
    backend.gather_cache(*out, k_cache, v_cache, tables, lens, starts, len(out[0]), layout)


def test_kernel_stays_inside_the_pool_and_the_result_whatever_the_lengths_on_the_device_say(kernel_device, rng):
    """Lengths that only the device knows cannot be checked: the kernel has to bear any."""
    device = kernel_device
    (host_k, _), (k_cache, v_cache) = filled_pools(device, rng, *oracle.pools("NHD", 6, 4, 2, 5, np.float16))
    memory = device.array(np.full((2, 16, 2, 5), 7, np.float16))
    inner = memory[:, 2:13]
    tables = device.array(np.array([[1, 2], [3, 4]], np.int64))

    def gather(lens, starts):
        memory[...] = 7
        lens, starts = device.array(np.array(lens)), device.array(np.array(starts))
        launch((inner[0], inner[1]), k_cache, v_cache, tables, lens, starts)
        result = device.numpy(memory)
        assert (result[:, :2] == 7).all()
        assert (result[:, 13:] == 7).all()
        return result[0, 2:13]

    key = gather([8, 8], [0, 0])  # 16 rows for 11 places
    assert key.tobytes() == np.concatenate([host_k[1], host_k[2], host_k[3, :3]]).tobytes()
    key = gather([11, 8], [4, 7])  # past the end of its table row
    assert key[:5].tobytes() == host_k[2].tobytes() + host_k[4, 3].tobytes()
    assert (key[5:] == 7).all()
    key = gather([-5, 3], [0, -2])
    assert key[:3].tobytes() == host_k[3, :3].tobytes()
    key = gather([2, 3], [6, 1])  # a start past the end is an empty sequence
    assert key[:2].tobytes() == host_k[3, 1:3].tobytes()
    assert gather([2**63 - 1, 3], [2**63 - 1, 2])[:1].tobytes() == host_k[3, 2].tobytes()


def test_lengths_on_the_device_that_no_sum_can_hold(kernel_device, rng):
    device = kernel_device
    (host_k, _), (k_cache, v_cache) = filled_pools(device, rng, *oracle.pools("NHD", 6, 1, 1, 2, np.float16))
    memory = device.array(np.full((2, 90, 1, 2), 7, np.float16))
    tables = device.array(np.full((70, 1), 5, np.int32))
    lens = device.array(np.full(70, 2**63 - 1))
    launch((memory[0, 10:], memory[1, 10:]), k_cache, v_cache, tables, lens, None)
    key = device.numpy(memory)[0]
    assert (key[:10] == 7).all()
    assert key[10:80].tobytes() == host_k[5].tobytes() * 70
    assert (key[80:] == 7).all()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch(device, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    heads, dim, layout = data.draw(st.sampled_from([(1, 8, "NHD"), (3, 5, "NHD"), (3, 5, "HND")]))
    block_size = data.draw(st.sampled_from([1, 4]))
    lens = data.draw(st.lists(st.integers(0, 13), max_size=40))
    starts = [data.draw(st.integers(0, n)) for n in lens]
    num_blocks = max(1, sum(-(-n // block_size) for n in lens))
    pools = filled_pools(device, rng, *oracle.pools(layout, num_blocks, block_size, heads, dim, np.uint8))
    check(device, pools, poisoned_tables(rng, num_blocks, block_size, lens), lens, starts)
