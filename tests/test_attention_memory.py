"""paged_attention: what it may read and write, wherever that lies, and what must not reach a result."""

import math
from typing import Any

import numpy as np
import oracle
import pytest
from attending import Scene, bits, of_dtypes, same_bits
from conftest import Device
from test_attention import check_means, mean_scene
from test_offsets import sparse

import cupy_pagedkv.devices.backend as backend
from cupy_pagedkv import AttentionBuffers, KVCacheManager, LayeredPagedKVCache, PagedKVCache, paged_attention
from cupy_pagedkv.devices.backend import backend_of
from cupy_pagedkv.devices.layout import UNBOUNDED, Scoring, attention_layout_of
from cupy_pagedkv.emulator import emulate

# What a row does not see


@pytest.mark.parametrize("pool", [0, 1], ids="KV")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@of_dtypes
def test_what_later_tokens_see_does_not_reach_earlier_ones(device, rng, dtype, value, pool):
    """In the same tile, the same block and the same split as what they see, and behind a split's edge."""
    for changed in (39, 69, 255, 256):
        scene = Scene(device, rng, [(3, 20), (270, 300)], heads=(2, 1), dim=16, dtype=dtype)
        before = scene.attend()
        scene.pools[pool][scene.places(1, changed)] = value
        with np.errstate(invalid="ignore"):  # of inf − inf, on NumPy
            out, lse = scene.load().attend()
        first = 3 + max(0, changed - 30)  # that sees it
        untouched = slice(0, first)
        scene.pools[pool][scene.places(1, changed)] = 0  # exact() multiplies what is not seen by zeros
        exact, exact_lse = scene.exact()
        assert np.allclose(out[untouched].astype(np.float64), exact[untouched], 0, 0.02)
        assert np.allclose(lse[untouched], exact_lse[untouched], 1e-4, 1e-4)
        if device.name != "numpy":
            assert same_bits((out[untouched], lse[untouched]), (before[0][untouched], before[1][untouched]))
        if pool == 1:  # whereas those that see it show it
            assert np.array_equal(out[first:].astype(np.float64), np.full_like(out[first:], value), equal_nan=True)
        elif math.isnan(value):
            assert np.isnan(out[first:].astype(np.float64)).all()
            assert np.isnan(lse[first:]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_number_of_a_later_token_does_not_reach_earlier_ones(device, rng, value):
    """Wherever it is among those that are looked at together."""
    k_cache, v_cache = rng.standard_normal((2, 2, 16, 1, 16)).astype(np.float16)
    query = rng.standard_normal((20, 2, 16)).astype(np.float16)
    arguments = {"block_tables": [[0, 1]], "seq_lens": [20], "cu_seqlens_q": [0, 20]}
    clean = device.numpy(paged_attention(*map(device.array, (query, k_cache, v_cache)), **arguments))
    for element in range(16):
        spoiled = v_cache.copy()
        spoiled[1, 2, 0, element] = value
        got = device.numpy(paged_attention(*map(device.array, (query, k_cache, spoiled)), **arguments))
        assert np.array_equal(got[:18], clean[:18])
        assert np.array_equal(np.delete(got, element, 2), np.delete(clean, element, 2))
        assert not np.isfinite(got[18:, :, element]).any()


@pytest.mark.parametrize("pool", [0, 1], ids="KV")
def test_what_left_the_window_does_not_reach_a_row(device, rng, pool):
    """Tokens before it see it; the window is each row's, not a tile's."""
    scene = Scene(device, rng, [(40, 300)], heads=(2, 1), dim=16, window_size=(5, -1))
    scene.pools[pool][scene.places(0, 270)] = math.nan
    out, _ = scene.load().attend()
    wrong = np.isnan(out.astype(np.float32)).all(axis=(1, 2))
    assert np.flatnonzero(wrong).tolist() == list(range(10, 16))
    assert np.isfinite(out[~wrong].astype(np.float32)).all()


@of_dtypes
def test_query_tokens_do_not_reach_each_other(device, rng, dtype):
    scene = Scene(device, rng, [(9, 30), (1, 5)], heads=(4, 2), dim=16, dtype=dtype)
    before = scene.attend()
    scene.query[4, 1] = math.nan
    out, lse = scene.load().attend()
    assert np.isnan(out[4, 1].astype(np.float32)).all()
    assert np.isnan(lse[4, 1])
    out[4, 1], lse[4, 1] = before[0][4, 1], before[1][4, 1]
    if device.name == "numpy":
        assert np.allclose(out.astype(np.float32), before[0].astype(np.float32), 0.01, 0.01)
    else:
        assert same_bits((out, lse), before)


@of_dtypes
def test_scores_far_from_zero(device, rng, dtype):
    """About ±10⁶: further than any finite number that a mask might be."""
    for sign in (-1, 1):
        scene = Scene(device, rng, [(1, 600), (20, 300), (1, 3)], heads=(2, 1), dim=16, dtype=dtype, softmax_scale=8.0)
        scene.query[...] = 100
        for i in range(3):
            blocks, offsets = scene.places(i)
            scene.pools[0][blocks, offsets] = sign * 80
            scene.pools[0][blocks[::7], offsets[::7]] = sign * 80.5  # 6400 more, or less
            scene.pools[1][blocks, offsets] = rng.integers(-99, 100, (len(blocks), 1, 16))
        out, lse = scene.load().attend()
        exact, exact_lse = scene.exact()
        assert (np.abs(exact_lse) > 1e6).all()
        assert np.allclose(out.astype(np.float64), exact, 2**-8, 1e-3)
        assert np.allclose(lse, exact_lse, 1e-6)


@of_dtypes
def test_scores_of_which_all_but_one_vanish(device, rng, dtype):
    """ALiBi's slopes make warps' parts and whole splits as good as masked, beside those that are, by a window."""
    scene = Scene(
        device, rng, [(1, 900), (30, 400)], heads=(2, 1), dim=16, dtype=dtype, window_size=(700, -1), scale=0.1,
        alibi_slopes=[500.0, 6e4],
    )  # fmt: skip
    out, lse = scene.attend()
    assert np.allclose(lse, scene.exact()[1], 1e-3, 1e-5)
    for i, (count, seq_len) in enumerate(zip(scene.counts, scene.lens, strict=True)):
        own = scene.pools[1][scene.places(i, np.arange(seq_len - count, seq_len))]
        assert np.array_equal(out[scene.ends[i] : scene.ends[i + 1]], own.repeat(2, axis=1))


def test_the_boundary_mask_where_it_is_not_causal(device, rng):
    """Each token sees all of its sequence and nothing behind: the rest of its block, tile and split."""
    for seq_len in (1, 31, 32, 33, 63, 65, 100, 255, 257):
        check_means(mean_scene(device, rng, [(1, seq_len), (min(20, seq_len), seq_len)], causal=False))


@pytest.mark.parametrize(
    ("group", "dtype"), [*((group, np.float16) for group in (1, 2, 3, 5, 6, 7, 16, 17, 33)), (7, np.float32)]
)
def test_each_query_head_reads_its_kv_head(device, rng, group, dtype):
    """All scores are 0, and each KV head's values are one number: that is what its heads must be."""
    scene = Scene(device, rng, [(1, 300), (5, 40)], heads=(3 * group, 3), dim=16, dtype=dtype, scale=0)
    for i in range(2):
        scene.pools[1][scene.places(i)] = np.array([1, 2, 4])[:, None]
    out, _ = scene.load().attend()
    assert np.array_equal(out, np.broadcast_to(np.array([1, 2, 4]).repeat(group)[:, None], out.shape))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@of_dtypes
def test_sinks_are_neither_scaled_nor_capped_and_count_once(device, rng, dtype, softcap):
    """Also where the whole of a split, the first or the last, is out of sight."""
    sinks = [7.0, -math.inf, 0.0, -20.0]
    for window in (-1, 100):
        scene = Scene(
            device, rng, [(1, 1100), (2, 257), (1, 0), (3, 2)], heads=(4, 2), dim=16, dtype=dtype, sinks=sinks,
            softmax_scale=0.5, softcap=softcap, window_size=(window, -1),
        )  # fmt: skip
        scene.check()
        _, lse = scene.attend()
        assert np.allclose(lse[3], sinks)  # it has no keys
        assert np.allclose(lse[4], sinks)  # it stands before the first


# Results that were something else before


@of_dtypes
def test_buffers_full_of_nan(device, rng, dtype):
    """Results and scratch; and again, as a captured graph would, when lengths have grown from one split to many."""
    lens = [(1, 1500), (1, 1), (1, 700), (1, 0)]
    scene = Scene(device, rng, lens, heads=(4, 2), dim=16, dtype=dtype, packed=False, sinks=[0.5, -1, 2, 0])
    buffers = scene.buffers()
    for seq_lens in ([1, 0, 1, 0], scene.lens, [1500, 1, 256, 0]):
        scene.lens[:] = seq_lens
        scene.seen = [(0, n) for n in seq_lens]
        lengths = device.array(np.array(seq_lens, np.int32))
        assert paged_attention(**{**scene.arguments, "seq_lens": lengths}, out=buffers) is buffers.out
        scene.check((device.numpy(buffers.out), device.numpy(buffers.lse)))
        buffers.scratch[...] = math.nan


def test_buffers_of_prefill_are_the_result_bit_for_bit(device, rng):
    for lens in ([(40, 600), (3, 3), (1, 300)], [(1, 900)], [(2, 300), (0, 5)]):
        scene = Scene(device, rng, lens, heads=(4, 2), dim=16)
        expected = scene.attend()
        for most in (None, max(scene.counts), 1000):
            buffers = scene.buffers(max_seqlen_q=most)
            got = paged_attention(**scene.arguments, out=buffers, max_seqlen_q=most, return_lse=True)
            assert got == (buffers.out, buffers.lse)
            assert same_bits(tuple(device.numpy(array) for array in got), expected)


def test_buffers_without_room_for_scratch_serve_as_well(device, rng):
    scene = Scene(device, rng, [(1, 1500), (3, 700)], heads=(4, 2), dim=16)
    out, lse, scratch = scene.buffers()
    odd = device.xp.zeros(scratch.size + 1, np.float32)[1:]  # where pairs of floats cannot be written
    for room in (scratch[:0], scratch[:1], scratch[: scratch.size // 2], odd):
        buffers = AttentionBuffers(out, lse, room)
        got = paged_attention(**scene.arguments, out=buffers, return_lse=True)
        assert same_bits(tuple(device.numpy(array) for array in got), scene.attend())


def test_scratch_that_starts_at_any_float(device, rng):
    """A kernel writes two at a time."""
    scene = Scene(device, rng, [(1, 1500), (3, 700)], heads=(4, 2), dim=16)
    out, lse, scratch = scene.buffers()
    for first in (0, 1):
        memory = device.xp.zeros(scratch.size + 1, np.float32)[first:]
        got = paged_attention(**scene.arguments, out=AttentionBuffers(out, lse, memory), return_lse=True)
        assert same_bits(tuple(device.numpy(array) for array in got), scene.attend())


def test_a_captured_graph_replays_with_longer_sequences(gpu, rng):
    """Captured at length 1; nothing is allocated in it."""
    import cupy

    scene = Scene(Device("cupy", cupy), rng, [(1, 5000), (1, 1), (1, 700)], heads=(8, 2), packed=False, sinks=[1] * 8)
    buffers = scene.buffers()
    lens = scene.arguments["seq_lens"]
    expected = scene.attend()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        lens[...] = 1
        paged_attention(**scene.arguments, out=buffers)  # a capture allows neither to compile nor to load
        stream.begin_capture()
        paged_attention(**scene.arguments, out=buffers)
        graph = stream.end_capture()
        for array in buffers:
            array[...] = math.nan
        lens[...] = cupy.array(scene.lens)
        graph.launch(stream)
    stream.synchronize()
    assert same_bits((cupy.asnumpy(buffers.out), cupy.asnumpy(buffers.lse)), expected)


def test_rows_of_no_sequence(device, rng):
    """They stay as they are in a given ``out``; new ones are zeros and −inf."""
    scene = Scene(device, rng, [(1, 300), (4, 20)], heads=(4, 2), dim=16, padding=3)
    out, lse = scene.attend()
    assert not bits(out[5:]).any()
    assert np.isneginf(lse[5:]).all()
    scene.check((out, lse))
    given = device.array(np.full(out.shape, 7, out.dtype))
    assert paged_attention(**scene.arguments, out=given) is given
    assert (device.numpy(given)[5:] == 7).all()
    assert np.array_equal(bits(device.numpy(given)[:5]), bits(out[:5]))
    out, lse, scratch = scene.buffers()
    out[5:], lse[5:] = 7, 7
    paged_attention(**scene.arguments, out=AttentionBuffers(out, lse, scratch))
    assert (device.numpy(out)[5:] == 7).all()
    assert (device.numpy(lse)[5:] == 7).all()
    assert np.isfinite(device.numpy(lse)[:5]).all()


def test_out_alone_and_lse_alone(device, rng):
    scene = Scene(device, rng, [(1, 300), (4, 20)], heads=(4, 2), dim=16)
    out, _ = scene.attend()
    assert np.array_equal(bits(device.numpy(paged_attention(**scene.arguments))), bits(out))
    given = device.array(np.full(out.shape, math.nan, out.dtype))
    result, lse = paged_attention(**scene.arguments, out=given, return_lse=True)
    assert result is given
    scene.check((device.numpy(result), device.numpy(lse)))


# Arrays that lie anywhere

VIEWS = {
    "backwards": ((7, 4, 16), lambda a: a[::-1]),
    "every other token": ((14, 4, 16), lambda a: a[::2]),
    "every third dim": ((7, 4, 48), lambda a: a[..., ::3]),
    "of q, k and v": ((7, 12, 16), lambda a: a[:, 4:8]),
    "head first": ((4, 7, 16), lambda a: a.transpose(1, 0, 2)),
    "all axes reversed": ((16, 4, 7), lambda a: a.transpose(2, 1, 0)),
    "from the second element on": ((449,), lambda a: a[1:].reshape(7, 4, 16)),
    "dims backwards": ((7, 4, 16), lambda a: a[..., ::-1]),
}


@pytest.mark.parametrize("view", VIEWS)
@of_dtypes
def test_query_and_out_of_any_strides(device, rng, dtype, view):
    shape, make = VIEWS[view]
    scene = Scene(device, rng, [(2, 300), (5, 17)], heads=(4, 2), dim=16, dtype=dtype)
    plain = scene.attend()
    memory = np.full(shape, math.nan, dtype)
    make(memory)[...] = scene.query
    query = make(device.array(memory))
    for packed in (scene, decode_of(scene)):
        before = np.full(shape, 7, dtype)
        on_device = device.array(before)
        got = packed.attend(query=query, out=make(on_device))
        if device.name == "numpy":
            scene.check(got)
        else:
            assert same_bits(got, plain)
        make(before)[...] = got[0]  # and no byte around it
        assert np.array_equal(bits(device.numpy(on_device)), bits(before))


def decode_of(scene: Scene) -> Scene:
    """The same tokens, each as a sequence of its own."""
    rows = [i for i, count in enumerate(scene.counts) for _ in range(count)]
    lens = [n - count + j + 1 for count, n in zip(scene.counts, scene.lens, strict=True) for j in range(count)]
    other = object.__new__(Scene)
    other.__dict__.update(scene.__dict__)
    tables = scene.device.array(np.ascontiguousarray(scene.tables[rows]))
    seq_lens = scene.device.array(np.array(lens, np.int32))
    other.arguments = {**scene.arguments, "block_tables": tables, "seq_lens": seq_lens, "cu_seqlens_q": None}
    return other


def test_lse_of_any_strides(device, rng):
    scene = Scene(device, rng, [(2, 300), (5, 17)], heads=(4, 2), dim=16)
    out, _, scratch = scene.buffers()
    memory = device.array(np.full((4, 21), 7, np.float32))
    buffers = AttentionBuffers(out, memory.T[1::3], scratch)
    scene.check(tuple(map(device.numpy, paged_attention(**scene.arguments, out=buffers, return_lse=True))))
    assert (device.numpy(memory)[:, [*range(0, 21, 3), *range(2, 21, 3)]] == 7).all()


@pytest.mark.parametrize("first", [1, 2, 4, 8])
@pytest.mark.parametrize("dim", [16, 7])
@of_dtypes
def test_pools_that_start_at_any_element(device, rng, dtype, dim, first):
    Scene(device, rng, [(1, 300), (20, 50)], heads=(4, 2), dim=dim, dtype=dtype, first=first).check()


@pytest.mark.parametrize("which", ["K", "V"])
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["block", "slot", "head"])
def test_a_stride_of_one_pool_that_allows_less_than_all_others(device, rng, axis, which):
    """By an element; on a GPU too wide an access is a fault, at which the emulated device stops, too."""
    scene = Scene(device, rng, [(1, 40), (20, 50)], heads=(4, 2), dim=16)
    pool = scene.pools["KV".index(which)]
    strides = [pool.shape[1] * 128, 128, 48, 1]  # of elements: 16 bytes divide all
    strides[axis] += 1
    memory = device.array(np.full(pool.shape[0] * (strides[0] + 64), math.nan, np.float16))
    view = device.xp.lib.stride_tricks.as_strided(memory, pool.shape, [2 * stride for stride in strides])
    view[...] = device.array(pool)
    scene.check(scene.attend(**{f"{which.lower()}_cache": view}))


@pytest.mark.parametrize("kind", ["list", "host", "strided"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_kinds_of_indices(device, rng, dtype, kind):
    scene = Scene(device, rng, [(1, 30), (0, 3), (7, 20)], heads=(4, 2), dim=16, sinks=[1, 2, 3, 4])
    tables, lens, ends = scene.tables.astype(dtype), np.array(scene.lens, dtype), scene.ends.astype(dtype)
    if kind == "list":
        indices = [tables.tolist(), lens.tolist(), ends.tolist()]
    elif kind == "host":
        indices = [tables, lens, ends]
    else:
        indices = [
            device.array(np.repeat(tables, 2, axis=1))[:, 1::2],
            device.array(np.repeat(lens, 3))[::3],
            device.array(ends[::-1].copy())[::-1],
        ]
    arguments = dict(zip(("block_tables", "seq_lens", "cu_seqlens_q"), indices, strict=True))
    sinks = [1, 2, 3, 4] if kind == "list" else device.array(np.repeat(scene.options["sinks"], 2))[::2]
    scene.check(scene.attend(**arguments, sinks=sinks))


def test_a_pool_past_2_32_bytes(device, rng):
    """Interleaved, so that the strides of blocks are twice as large; its last block, and those on both sides of 2³¹."""
    num_blocks, block_size, heads, dim = 2**11 + 2**6, 1024, 8, 64
    memory = sparse(device, num_blocks * 2 * block_size * heads * dim * 2)
    both = memory.view(np.float16).reshape(num_blocks, 2, block_size, heads, dim)
    edge = 2**31 // (2 * block_size * heads * dim * 2)
    blocks = [0, edge - 1, edge, 2 * edge - 1, 2 * edge, num_blocks - 1]
    rows = rng.standard_normal((len(blocks), 2, 1, heads, dim)).astype(np.float16)
    for block, row in zip(blocks, rows, strict=True):
        both[block, :, :1] = device.array(row)
    query = device.array(np.ones((len(blocks), heads, dim), np.float16))
    tables = device.array(np.array(blocks, np.int32)[:, None])
    lens = device.array(np.ones(len(blocks), np.int32))
    out = paged_attention(query, both[:, 0], both[:, 1], tables, lens)
    assert np.array_equal(bits(device.numpy(out)), bits(rows[:, 1, 0]))


def test_positions_past_2_31(device, rng):
    """Nobody has such a sequence, but a length may say so: of large blocks, all of which are one."""
    pools = device.xp.zeros((2, 1, 2**20, 1, 16), np.float16)
    query = device.array(rng.standard_normal((1, 2, 16)).astype(np.float16))
    pools[1] = 1
    tables = device.array(np.zeros((1, 2**11 + 8), np.int32))
    out = paged_attention(query, *pools, tables, [2**31 + 5000], window_size=(100, -1))
    assert (device.numpy(out) == 1).all()


# Indices that are wrong


def test_blocks_outside_the_pool_raise_on_numpy_and_are_zeros_from_the_kernel(device, rng):
    scene = mean_scene(device, rng, [(1, 40), (3, 20)])
    tables = scene.tables.copy()
    num_blocks = scene.pools[0].shape[0]
    for block in (num_blocks, -1, 2**31 - 1, -(2**31)):
        tables[0, 1] = block
        out = device.array(np.full((4, 4, 16), 7, np.float16))
        spoiled = {**scene.arguments, "block_tables": device.array(tables), "out": out}
        if device.checks_indices:
            message = rf"block_tables\[0, 1\] is {block}, but the pool has blocks 0 to {num_blocks - 1}; sequence 0 "
            with pytest.raises(IndexError, match=message):
                paged_attention(**spoiled)
            assert (out == 7).all()
        else:
            values = scene.pools[1][scene.places(0)].astype(np.float32)
            values[16:32] = 0
            paged_attention(**spoiled)
            mean = (values.sum(0) / np.float32(40)).astype(np.float16).repeat(2, axis=0)
            assert np.array_equal(device.numpy(out)[0], mean)
            assert np.array_equal(device.numpy(out)[1:], scene.attend()[0][1:])


def launch(scene: Scene, lens: Any, ends: Any, out: Any, lse: Any, scratch: Any, sinks: Any = None) -> None:
    """Without the checks, which lengths on a GPU do not get, and on the emulated device are all in host memory."""
    names = ("query", "k_cache", "v_cache")
    arrays = [scene.arguments[name] for name in names]
    backend = backend_of(names, *arrays)
    scoring = Scoring(0.25, 0.0, UNBOUNDED, 0)
    backend.paged_attention(
        *arrays, scene.arguments["block_tables"], scene.device.array(np.array(lens)),
        None if ends is None else scene.device.array(np.array(ends)), None, None, sinks, out, lse, scratch, scoring,
        attention_layout_of(*arrays),
    )  # fmt: skip


MOST = 2**63 - 1
ODD_LENGTHS = [
    ([300, 20, 33], [0, 2, 5, 6]),
    ([MOST, -5, -MOST], [0, 2, 5, 6]),
    ([2**31, 2**32 + 3, 2**31 - 1], [0, 2, 5, 6]),
    ([-5, 3 - 2**32, -MOST], [0, 2, 5, 6]),
    ([40, 20, 33], [3, 3, 3, 3]),
    ([40, 20, 33], [-MOST, 2, 5, 2**33]),
    ([0, 0, 0], [MOST] * 4),
]
DESCENDING = [([40, 20, 33], [0, 2, MOST, 6]), ([40, 20, 33], [-MOST, 5, 2, 9]), ([40, 20, 33], [6, 4, 2, 0])]
"""Two sequences may write the same rows, which is a race, in checked mode an error."""


@pytest.mark.parametrize("group", [2, 16])
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
def test_the_kernel_bears_any_lengths_on_the_device(kernel_device, rng, checked, group):
    """Nobody can check these. It reads and writes nothing outside the arrays."""
    device = kernel_device
    if device.name == "cupy" and checked:
        pytest.skip("checks are the emulated device's")
    scene = Scene(device, rng, [(2, 300), (3, 20), (1, 33)], heads=(2 * group, 2), dim=16)
    scene.on_device[...] = 0
    memory = device.array(np.full((10, 2 * group, 16), 7, np.float16))
    lse = device.array(np.full((10, 2 * group), 7, np.float32))
    scratch = device.xp.zeros(100_000, np.float32)
    with emulate(check=checked):
        for lens, ends in ODD_LENGTHS + ([] if checked else DESCENDING):
            for room in (scratch, scratch[:0]):
                memory[...], lse[...] = 7, 7
                launch(scene, lens, ends, memory[2:8], lse[2:8], room)
                result = device.numpy(memory)
                assert (result[[0, 1, 8, 9]] == 7).all()
                assert (device.numpy(lse)[[0, 1, 8, 9]] == 7).all()
                assert ((result == 0) | (result == 7)).all()
                assert max(lens) > 0 or not np.isin(device.numpy(lse), (7, -math.inf), invert=True).any()


def test_tiles_ahead_of_their_sequence_are_none(kernel_device, rng):
    """As many numbers of tiles as the second sequence's are below one that begins in front of it: it has no such rows,
    and no such heads."""
    device = kernel_device
    scene = Scene(device, rng, [(400, 400)], heads=(6, 2), dim=16)
    scene.on_device[...] = 0
    scene.arguments["block_tables"] = device.array(scene.tables.repeat(5, axis=0))
    sinks = device.array(np.array([math.nan] * 6 + [1.0] * 6 + [math.nan] * 6, np.float32))[6:12]
    out, lse, scratch = (device.xp.zeros(shape, np.float32) for shape in ((400, 6, 16), (400, 6), 0))
    out = out.astype(np.float16)
    launch(scene, [400] * 5, [0, 200, 400, 0, 0, 0], out, lse, scratch, sinks)
    assert not device.numpy(out).any()
    assert np.isfinite(device.numpy(lse)).all()


# With the other classes


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_batch_of_a_manager_fits_as_it_is(device, rng, dtype, spare):
    """Prefill in parts, decode beside it, and a shared prefix; also in buffers that have room to spare."""
    cache = LayeredPagedKVCache(2, 40, 16, 2, 16, dtype, device.of_caches)
    manager = KVCacheManager(cache)
    pools = rng.standard_normal((2, 2, 400, 1, 2, 16)).astype(dtype)  # of each layer, K and V of each token id
    buffers = manager.buffers(num_seqs=4, num_tokens=120, max_blocks=20) if spare else None
    known: dict[Any, list[int]] = {}

    def step(new: dict[Any, list[int]]) -> None:
        for sequence, tokens in new.items():
            known.setdefault(sequence, []).extend(tokens)
        tables = [known[sequence] + [-1] * 200 for sequence in new]
        lens, ends = [len(known[sequence]) for sequence in new], np.cumsum([0, *map(len, new.values())])
        with manager.prepare(new, buffers=buffers) as batch:
            rows = len(batch.slot_mapping)
            tokens = np.zeros(rows, int)
            tokens[: ends[-1]] = np.concatenate(list(new.values()))
            query = rng.standard_normal((rows, 4, 16)).astype(dtype)
            for layer, (k, v) in zip(cache, pools, strict=True):
                layer.update(*(device.array(pool[tokens, 0]) for pool in (k, v)), batch.slot_mapping)
                got = layer.attend(
                    device.array(query), batch.block_tables, batch.seq_lens, batch.cu_seqlens,
                    max_seqlen_q=batch.max_seqlen_q, return_lse=True,
                )  # fmt: skip
                expected = oracle.attention(query[: ends[-1]], k, v, tables, lens, ends.tolist())
                for result, exact in zip(got, expected, strict=True):
                    assert len(result) == rows
                    assert np.allclose(device.numpy(result)[: ends[-1]].astype(np.float64), exact, 2e-3, 2e-3)

    prompt = list(range(100))
    one, two = manager.add(prompt), manager.add([5, 6, 7])
    step({one: prompt[:70], two: [5, 6, 7]})
    step({one: prompt[70:], two: [8]})
    step({one: [200], two: [9]})
    three = manager.add([*prompt, 300, 301])
    known[three] = prompt[: three.num_cached_tokens]
    assert len(known[three]) == 96
    step({two: [10], three: [*prompt[96:], 300, 301], one: [201]})


def test_attend_is_paged_attention_on_the_pools(device, rng):
    scene = Scene(device, rng, [(1, 30), (7, 20)], heads=(4, 2), dim=16, softcap=5.0, window_size=(9, 0), sinks=[1] * 4)
    arguments = dict(scene.arguments)
    cache = PagedKVCache.from_pools(arguments.pop("k_cache"), arguments.pop("v_cache"))
    arrays = [arguments.pop(name) for name in ("query", "block_tables", "seq_lens", "cu_seqlens_q")]
    got = cache.attend(*arrays, max_seqlen_q=7, return_lse=True, **arguments)
    assert same_bits(tuple(map(device.numpy, got)), scene.attend())


@pytest.mark.parametrize("dim", [16, 15])
def test_a_query_between_multiples_of_what_an_access_could_have(rng, monkeypatch, dim):
    """Rows, the first of them, or elements that lie so that wide accesses would not be aligned."""
    monkeypatch.setattr(backend, "EMULATE", True)
    pools, tables = rng.standard_normal((2, 3, 8, 1, dim)).astype(np.float16), np.array([[2, 0, 1]])
    query = rng.standard_normal((3, 2, dim)).astype(np.float16)
    rows, first, elements = np.zeros((3, 3, dim + 1)), np.zeros(query.size + 1), np.zeros((3, 2, dim, 2))
    rows, first, elements = (array.astype(np.float16) for array in (rows, first, elements))
    views = rows[:, :2, :dim], first[1:].reshape(query.shape), elements[..., 1], query[::-1]
    with emulate(check=True):
        expected = paged_attention(query, *pools, tables, [20], [0, 3])
        for view in views:
            view[...] = query.copy()
            assert same_bits([paged_attention(view, *pools, tables, [20], [0, 3])], [expected])
