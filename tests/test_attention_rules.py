"""What paged_attention and its kin refuse, on every device, and that a refusal leaves everything as it was."""

import math
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from attending import Scene, bits
from test_rules import fake_cupy as fake_cupy  # a fixture

from cupy_pagedkv import (
    AttentionBuffers,
    PagedKVCache,
    attention_buffers,
    merge_attention_states,
    paged_attention,
)
from cupy_pagedkv.devices.cuda_backend import CudaBackend


@pytest.fixture
def good(device, rng):
    """(device, arguments) that a test spoils: 7 tokens of 3 sequences, 4 heads over 2, head_dim 16, V's 8."""
    scene = Scene(device, rng, [(1, 30), (2, 2), (4, 20)], heads=(4, 2), dim=16, v_dim=8)
    out = device.array(np.full((7, 4, 8), 7, np.float16))
    lse = device.array(np.full((7, 4), 7, np.float32))
    scratch = device.array(np.full(100_000, 7, np.float32))
    yield device, {**scene.arguments, "out": AttentionBuffers(out, lse, scratch)}
    for array in (out, lse, scratch):
        assert (device.numpy(array) == 7).all()
    assert np.array_equal(device.numpy(scene.on_device), scene.buffer)


def refused(good: Any, error: type, message: str, **spoiled: Any) -> None:
    _, arguments = good
    with pytest.raises(error, match=message):
        paged_attention(**{**arguments, **spoiled})


def test_the_scene_itself_is_fine(device, rng):
    Scene(device, rng, [(1, 30), (2, 2), (4, 20)], heads=(4, 2), dim=16, v_dim=8, layout="packed").check()


def test_things_that_are_no_arrays(good):
    for name in ("query", "k_cache", "v_cache"):
        refused(good, TypeError, f"{name} must be a NumPy or CuPy array, or speak DLPack, got list", **{name: [1.0]})
        refused(good, TypeError, f"{name} must be a NumPy or CuPy array, or speak DLPack, got NoneType", **{name: None})
    buffers = good[1]["out"]
    refused(good, TypeError, "out must be .*, or speak DLPack, got list", out=[1.0])
    refused(good, TypeError, "out must be .*, or speak DLPack, got tuple", out=tuple(buffers))
    refused(good, TypeError, "out must be .*, or speak DLPack, got list", out=buffers._replace(out=[1.0]))
    for name in ("lse", "scratch"):
        message = f"{name} must be an array where the others are, got list"
        refused(good, TypeError, message, out=buffers._replace(**{name: [1.0]}))


def test_shapes(good):
    device, arguments = good
    zeros = device.xp.zeros
    f16 = np.float16
    message = r"query must be \[num_tokens, num_heads, 16\], num_heads a multiple of 2, .*got "
    for shape in [(7, 64), (7, 4, 16, 1), (7, 4, 8), (7, 3, 16), (7, 1, 16), (7, 0, 16), (16,)]:
        refused(good, ValueError, message, query=zeros(shape, f16))
    pool = arguments["k_cache"].shape
    for name in ("k_cache", "v_cache"):
        refused(good, ValueError, f"{name} must be .num_blocks", **{name: zeros((4, 16, 32), f16)})
        refused(good, ValueError, f"{name} must be .num_blocks", **{name: zeros((0, 16, 2, 16), f16)})
        refused(good, ValueError, f"the last axis of {name} must be contiguous",
                **{name: zeros((*pool[:3], 32), f16)[..., ::2]})  # fmt: skip
    layers = zeros((1, *pool), f16)
    refused(good, ValueError, "k_cache must be the pool of one layer", k_cache=layers, v_cache=layers)
    refused(good, ValueError, "must agree in all axes but head_dim", v_cache=zeros((pool[0], 8, 2, 8), f16))
    refused(good, ValueError, "must agree in all axes but head_dim", v_cache=zeros((pool[0] + 1, 16, 2, 8), f16))
    refused(good, ValueError, "must agree in all axes but head_dim", v_cache=zeros((pool[0], 16, 1, 8), f16))
    for shape in [(6, 4, 8), (7, 4, 16), (7, 2, 8), (7, 32)]:
        message = r"out must have shape \(7, 4, 8\), got "
        refused(good, ValueError, message, out=zeros(shape, f16))
        refused(good, ValueError, message, out=arguments["out"]._replace(out=zeros(shape, f16)))
    refused(good, ValueError, r"lse must have shape \(7, 4\), got \(4, 7\)",
            out=arguments["out"]._replace(lse=zeros((4, 7), np.float32)))  # fmt: skip


def off_by_a_byte(device: Any, array: Any) -> Any:
    memory = device.xp.zeros(array.nbytes + 1, np.uint8)
    moved = memory[1:].view(array.dtype).reshape(array.shape)
    moved.view(np.uint8)[...] = array.view(np.uint8)
    return moved


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda dtype: np.dtype(dtype).name)
def test_elements_where_a_gpu_cannot_compute_with_them(device, rng, dtype):
    """It would fault, or, with an access narrower than an element, never end."""
    scene = Scene(device, rng, [(1, 30), (4, 20)], heads=(4, 2), dim=16, dtype=dtype, sinks=[1.0] * 4)
    buffers = scene.buffers()
    for name in ("query", "k_cache", "v_cache", "sinks"):
        with pytest.raises(ValueError, match=f"the elements of {name}, .*, must lie at multiples of [24] bytes"):
            scene.attend(**{name: off_by_a_byte(device, scene.arguments[name])})
    for name in ("out", "lse"):
        spoiled = buffers._replace(**{name: off_by_a_byte(device, getattr(buffers, name))})
        with pytest.raises(ValueError, match=f"the elements of {name}, "):
            scene.attend(out=spoiled)
    states = {"out_a": buffers.out, "lse_a": buffers.lse, "out_b": buffers.out, "lse_b": buffers.lse}
    for name, array in states.items():
        with pytest.raises(ValueError, match=f"the elements of {name}, "):
            merge_attention_states(**{**states, name: off_by_a_byte(device, array)})


def test_scratch_has_one_axis(good):
    """A kernel counts its floats from the first on, as if they lay one after the other."""
    device, arguments = good
    for scratch in (device.xp.zeros((10, 10), np.float32), device.xp.zeros(200_000, np.float32)[::2]):
        refused(good, ValueError, "scratch must", out=arguments["out"]._replace(scratch=scratch))


def test_numbers_of_sequences_and_tokens(good):
    device, arguments = good
    tables, lens = device.numpy(arguments["block_tables"]), device.numpy(arguments["seq_lens"])
    refused(good, ValueError, "block_tables must have one entry for each of 3 seq_lens, got 2", block_tables=tables[:2])
    refused(good, ValueError, "block_tables must have one entry for each of 2 seq_lens, got 3", seq_lens=lens[:2])
    refused(good, ValueError, "cu_seqlens_q must have one entry more than seq_lens, 4, got 3", cu_seqlens_q=[0, 1, 7])
    refused(good, ValueError, "query must have one token for each of 3 seq_lens, got 7; say by cu_seqlens_q",
            cu_seqlens_q=None)  # fmt: skip
    refused(good, ValueError, "block_tables must have 2 axes, got shape", block_tables=tables[0])
    refused(good, ValueError, "block_tables must be a list .rows of one length", block_tables=[[0, 1], [2], [3]])
    refused(good, ValueError, "seq_lens must have 1 axis, got shape", seq_lens=[[30, 2, 20]])
    refused(good, ValueError, "cu_seqlens_q must have 1 axis, got shape", cu_seqlens_q=[[0, 1, 3, 7]])


def test_lengths_on_the_host(good):
    _, arguments = good
    capacity = arguments["block_tables"].shape[1] * 16
    message = r"0 <= seq_lens <= {} must hold, .*; sequence 1 has {}"
    for wrong in (-1, capacity + 1, 2**31 - 1):
        refused(good, ValueError, message.format(capacity, wrong), seq_lens=[30, wrong, 20])
    message = "cu_seqlens_q must begin with 0, ascend, and end at 7 at most, the tokens of query, got "
    for ends in ([1, 1, 3, 7], [0, 3, 1, 7], [0, 1, 3, 8], [-1, 1, 3, 7], [0, 1, 3, -7]):
        refused(good, ValueError, message, cu_seqlens_q=ends)
        refused(good, ValueError, message, cu_seqlens_q=np.array(ends, np.int32))
    message = "no sequence may have more new tokens than max_seqlen_q, {}, but sequence 2 has 4"
    for most in (0, 1, 3):
        refused(good, ValueError, message.format(most), max_seqlen_q=most, cu_seqlens_q=[0, 1, 3, 7])
    refused(good, ValueError, "max_seqlen_q must be at least 0, got -1", max_seqlen_q=-1)


def test_dtypes(good):
    device, arguments = good
    for name in ("query", "k_cache", "v_cache"):
        other = device.xp.zeros(arguments[name].shape, np.float32)
        error = "must have the dtype of query, (float16|float32), got (float16|float32)"
        refused(good, TypeError, error, **{name: other})
    out = arguments["out"]
    wide = device.xp.zeros((7, 4, 8), np.float32)
    refused(good, TypeError, "out must have the dtype of query, float16, got float32", out=wide)
    refused(good, TypeError, "out must have the dtype of query, float16, got float32", out=out._replace(out=wide))
    half = device.xp.zeros((7, 4), np.float16)
    refused(good, TypeError, "lse must be float32, got float16", out=out._replace(lse=half))
    refused(good, TypeError, "scratch must be float32, got float16", out=out._replace(scratch=half[0]))
    for name, values in (("block_tables", np.zeros((3, 5))), ("seq_lens", np.ones(3)), ("cu_seqlens_q", np.ones(4))):
        for dtype in (np.float32, np.int16, np.uint64, bool):
            message = f"{name} must be int32 or int64, got {np.dtype(dtype)}"
            refused(good, TypeError, message, **{name: values.astype(dtype)})
            refused(good, TypeError, message, **{name: device.array(values.astype(dtype))})
    refused(good, TypeError, "seq_lens must be int32 or int64, got object", seq_lens=[30, 2, None])


@pytest.mark.parametrize(
    "dtype", [np.float64, np.int8, np.uint16, ml_dtypes.float8_e4m3fn, np.complex64, ">f2"], ids=str
)
def test_dtypes_that_cannot_be_computed_with(device, dtype):
    device.skip_unless_it_has(np.dtype(dtype))
    query, pool = device.array(np.zeros((1, 2, 4), dtype)), device.array(np.zeros((2, 16, 2, 4), dtype))
    with pytest.raises(TypeError, match="query must be float16, bfloat16 or float32, got "):
        paged_attention(query, pool, pool, [[0]], [1])
    with pytest.raises(TypeError, match="query must be float16, bfloat16 or float32, got "):
        attention_buffers(query, pool, pool, [[0]])
    lse = device.array(np.zeros((1, 2), np.float32))
    with pytest.raises(TypeError, match="out_a must be float16, bfloat16 or float32, got "):
        merge_attention_states(query, lse, query, lse)


def test_scalars(good):
    for scale in (math.nan, math.inf, -math.inf, 3e38, -1e300):
        message = re.escape(f"softmax_scale must be a number from -2**60 to 2**60, got {scale}")
        refused(good, ValueError, message, softmax_scale=scale)
    for softcap in (-1.0, math.nan, math.inf, -math.inf, 1e-300, 1e-40, 3e38, 1e300):
        message = re.escape(f"softcap must be 0, which is none, or a number from 2**-60 to 2**60, got {softcap}")
        refused(good, ValueError, message, softcap=softcap)
    for window in ((1,), (1, 2, 3), 5, None, (1.5, 0), ("a", 0), (None, 0)):
        refused(good, TypeError, r"window_size must be two whole numbers \(left, right\)", window_size=window)


@pytest.mark.parametrize("name", ["softmax_scale", "softcap", "max_seqlen_q", "alibi_slopes", "sinks"])
def test_scalars_that_are_no_numbers(good, name):
    refused(good, (TypeError, ValueError), f"{name} must be .*got", **{name: "x"})


def test_values_of_heads(good):
    device, _ = good
    for name in ("alibi_slopes", "sinks"):
        for values in ([1.0] * 3, [1.0] * 5, [[1.0] * 4], 1.0, []):
            refused(good, ValueError, f"{name} must have one entry for each of 4 heads, got shape", **{name: values})
        for dtype in (np.float64, np.float16, np.int32):
            for values in (np.ones(4, dtype), device.array(np.ones(4, dtype))):
                refused(good, TypeError, f"{name} must be float32, got {np.dtype(dtype)}", **{name: values})


def test_scalars_of_any_kind(device, rng):
    """Python's and NumPy's, of any size; each side of a window by itself."""
    scene = Scene(device, rng, [(1, 30), (4, 20)], heads=(4, 2), dim=16)
    plain = scene.attend()
    for window in ((-1, -1), (-7, -(2**70)), (2**70, 2**31), (np.int64(2**40), np.int8(-1)), [2**63, 2**63]):
        for causal in (True, False):
            same = scene.attend(window_size=window, causal=causal)
            expected = plain if causal else scene.attend(causal=False)
            assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(same, expected, strict=True))
    with np.errstate(all="raise"):
        for options in ({"softmax_scale": 2.0**60, "softcap": 2.0**-60}, {"softmax_scale": 0, "softcap": 2.0**60}):
            assert np.isfinite(scene.attend(**options)[0].astype(np.float32)).all()
    for options in ({"softmax_scale": np.float32(0.25)}, {"softmax_scale": 0.25}, {"softcap": np.int32(0)}):
        got = scene.attend(**options)
        assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(got, plain, strict=True))


def test_blocks_outside_the_pool_under_debug(debug, rng):
    """On each device, wherever the tables are, before anything is written; but not those that no token sees."""
    scene = Scene(debug, rng, [(1, 30), (2, 40), (0, 9)], heads=(4, 2), dim=16, window_size=(9, -1))
    scene.check()  # all other entries are no blocks
    num_blocks = scene.pools[0].shape[0]
    out = debug.array(np.full((3, 4, 16), 7, np.float16))
    for i, column in ((0, 1), (1, 2), (1, 1)):
        for block in (-1, num_blocks, -(2**31), 2**31 - 1):
            tables = scene.tables.copy()
            tables[i, column] = block
            for given in (tables, debug.array(tables), tables.tolist()):
                with pytest.raises(IndexError, match=rf"block_tables\[{i}, {column}\] is {block}, but the pool has "):
                    paged_attention(**{**scene.arguments, "block_tables": given, "out": out})
    assert (debug.numpy(out) == 7).all()


def test_lengths_on_the_device_under_debug(debug, rng):
    scene = Scene(debug, rng, [(1, 30), (2, 40)], heads=(4, 2), dim=16)
    out = debug.array(np.full((3, 4, 16), 7, np.float16))
    for name, values, message in (
        ("seq_lens", [30, -1], "sequence 1 has -1"),
        ("seq_lens", [10_000, 40], "sequence 0 has 10000"),
        ("cu_seqlens_q", [0, 2, 1], "cu_seqlens_q must begin with 0"),
        ("cu_seqlens_q", [0, 1, 4], "cu_seqlens_q must begin with 0"),
    ):
        spoiled = {name: debug.array(np.array(values, np.int64))}
        with pytest.raises(ValueError, match=message):
            paged_attention(**{**scene.arguments, **spoiled, "out": out})
    assert (debug.numpy(out) == 7).all()


def test_many_blocks_are_checked_as_few_are(debug, rng):
    """More than are looked through at once."""
    pool = debug.array(np.zeros((40, 8, 1, 16), np.float16))
    query = debug.array(np.ones((100, 1, 16), np.float16))
    tables = rng.integers(0, 40, (100, 700), np.int32)
    lens = np.full(100, 17, np.int32)
    tables[:, 3:] = -1
    assert np.isfinite(debug.numpy(paged_attention(query, pool, pool, tables, lens)).astype(np.float32)).all()
    tables[70, 2] = 40
    with pytest.raises(IndexError, match=r"block_tables\[70, 2\] is 40"):
        paged_attention(query, pool, pool, tables, lens)


# Nothing to do


def test_nothing_to_do(device, rng):
    """Empty batches, no tokens, sequences of no tokens, in right-shaped results."""
    xp = device.xp
    pool = xp.full((2, 16, 2, 16), math.nan, np.float16)
    for num_tokens, num_seqs, ends in ((0, 0, None), (0, 0, [0]), (3, 0, [0]), (0, 2, [0, 0, 0]), (3, 2, [0, 0, 0])):
        query = xp.full((num_tokens, 4, 16), math.nan, np.float16)
        tables, lens = np.full((num_seqs, 1), -1), np.array([9, 0][:num_seqs], int)
        out, lse = paged_attention(query, pool, pool[..., :8], tables, lens, ends, return_lse=True)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((num_tokens, 4, 8), "f2", (num_tokens, 4), "f4")
        assert not device.numpy(out).view(np.uint16).any()
        assert np.isneginf(device.numpy(lse)).all()
        buffers = attention_buffers(query, pool, pool[..., :8], tables)
        buffers.out[...], buffers.lse[...] = 7, 7
        assert paged_attention(query, pool, pool[..., :8], tables, lens, ends, out=buffers) is buffers.out
        assert (device.numpy(buffers.out) == 7).all()
        assert (device.numpy(buffers.lse) == 7).all()
    for tables in ([[]], np.zeros((1, 0), np.int32)):  # no room for a block
        out, lse = paged_attention(xp.ones((1, 4, 16), np.float16), pool, pool, tables, [0], return_lse=True)
        assert not device.numpy(out).view(np.uint16).any()
        assert np.isneginf(device.numpy(lse)).all()


def test_nothing_to_do_is_no_launch(kernel_device, monkeypatch):
    monkeypatch.setattr(CudaBackend, "paged_attention", None)
    monkeypatch.setattr(CudaBackend, "merge_attention_states", None)
    xp = kernel_device.xp
    pool, nothing = xp.zeros((2, 16, 2, 16), np.float16), xp.zeros((0, 4, 16), np.float16)
    paged_attention(nothing, pool, pool, [], [])
    paged_attention(nothing, pool, pool, [[0]], [3], [0, 0])
    lse = xp.zeros((0, 4), np.float32)
    merge_attention_states(nothing, lse, nothing, lse)


def test_more_queries_than_tokens(device, rng):
    """The first ones stand before the sequence: without keys, unless a window looks ahead."""
    for options in ({}, {"causal": False}, {"causal": False, "window_size": (2, 2)}, {"window_size": (0, 0)}):
        scene = Scene(device, rng, [(9, 4), (30, 1), (5, 0), (40, 39)], heads=(4, 2), dim=16, **options)
        scene.check()


# Buffers


def test_buffers_fit_and_are_clean(device, rng):
    for lens, packed in (([(1, 900), (1, 3)], False), ([(1, 900), (30, 40)], True)):
        scene = Scene(device, rng, lens, heads=(4, 2), dim=16, v_dim=8, layout="packed", packed=packed)
        arguments = [scene.arguments[name] for name in ("query", "k_cache", "v_cache", "block_tables")]
        for most in (None, 1, 30):
            out, lse, scratch = attention_buffers(*arguments, max_seqlen_q=most)
            assert (out.shape, out.dtype) == ((len(scene.query), 4, 8), np.float16)
            assert (lse.shape, lse.dtype) == ((len(scene.query), 4), np.float32)
            assert (scratch.ndim, scratch.dtype) == (1, np.float32)
            assert not bits(device.numpy(out)).any()
            assert np.isneginf(device.numpy(lse)).all()
        with pytest.raises(ValueError, match="block_tables must have 2 axes"):
            attention_buffers(*arguments[:3], [0, 1])
        with pytest.raises(ValueError, match="query must be"):
            attention_buffers(arguments[0][0], *arguments[1:])
        with pytest.raises(TypeError, match="query must be a NumPy or CuPy array"):
            attention_buffers(None, *arguments[1:])


def test_read_only_arrays(rng, monkeypatch):
    """NumPy's alone: CuPy knows no read-only arrays."""
    cache = PagedKVCache(4, 8, 2, 4, np.float16, "cpu")
    query = np.zeros((1, 2, 4), np.float16)
    for array in (query, cache.k_cache, cache.v_cache):
        array.flags.writeable = False
    cache.attend(query, [[0]], [1])
    with pytest.raises(ValueError, match="out must be writeable"):
        cache.attend(query, [[0]], [1], out=query)
    for name in ("out", "lse", "scratch"):
        buffers = attention_buffers(query, cache.k_cache, cache.v_cache, [[0]])
        getattr(buffers, name).flags.writeable = False
        with pytest.raises(ValueError, match=f"{name} must be writeable"):
            cache.attend(query, [[0]], [1], out=buffers)


# Kinds of arrays


def test_masked_arrays_are_refused_by_name(good):
    device, arguments = good
    if device.name == "cupy":
        pytest.skip("masked arrays are NumPy's")
    for name in ("query", "k_cache", "v_cache"):
        masked = np.ma.array(arguments[name], mask=np.ones(arguments[name].shape, bool))
        refused(good, TypeError, f"{name} must not be a masked array", **{name: masked})
    out = np.ma.array(np.zeros((7, 4, 8), np.float16))
    refused(good, TypeError, "out must not be a masked array", out=out)
    lse = np.ma.array(np.zeros((7, 4), np.float32))
    state = np.zeros((7, 4, 8), np.float16)
    for i, name in enumerate(("out_a", "lse_a", "out_b", "lse_b")):
        states: list[Any] = [state, lse.data, state, lse.data]
        states[i] = np.ma.array(states[i])
        with pytest.raises(TypeError, match=f"{name} must not be a masked array"):
            merge_attention_states(*states)


def test_numpy_is_not_mixed_with_cupy(device, rng):
    if device.name != "cupy":
        pytest.skip("both kinds of arrays are needed; the next test shows the rule with a stand-in")
    scene = Scene(device, rng, [(1, 30)], heads=(4, 2), dim=16)
    for name in ("query", "k_cache", "v_cache"):
        with pytest.raises(TypeError, match="NumPy and CuPy arrays cannot be mixed in one call: query is "):
            paged_attention(**{**scene.arguments, name: device.numpy(scene.arguments[name])})
    with pytest.raises(TypeError, match="NumPy and CuPy arrays cannot be mixed in one call: out is "):
        paged_attention(**scene.arguments, out=np.zeros((1, 4, 16), np.float16))
    buffers = scene.buffers()
    for name in ("lse", "scratch"):
        mixed = buffers._replace(**{name: device.numpy(getattr(buffers, name))})
        with pytest.raises(TypeError, match=f"{name} must be an array where the others are"):
            paged_attention(**scene.arguments, out=mixed)


def test_mixtures_by_a_stand_in_for_cupy(fake_cupy):
    ours, theirs = np.zeros((1, 2, 4), np.float16), fake_cupy.ndarray()
    pools = np.zeros((2, 4, 8, 2, 4), np.float16)
    message = "cannot be mixed in one call: query is cupy.ndarray, k_cache is numpy.ndarray, v_cache is numpy.ndarray"
    with pytest.raises(TypeError, match=message):
        paged_attention(theirs, *pools, [[0]], [1])
    with pytest.raises(TypeError, match="cannot be mixed in one call: out is cupy.ndarray, query is numpy.ndarray"):
        paged_attention(ours, *pools, [[0]], [1], out=theirs)
    lse = np.zeros((1, 2), np.float32)
    with pytest.raises(TypeError, match="cannot be mixed in one call: out_a is numpy.ndarray, lse_a is cupy.ndarray"):
        merge_attention_states(ours, theirs, ours, lse)
    with pytest.raises(TypeError, match="seq_lens must be int32 or int64"):
        paged_attention(ours, *pools, [[0]], theirs)


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_values_of_heads_that_are_elsewhere(fake_cupy, name):
    pools = np.zeros((2, 4, 8, 2, 4), np.float16)
    with pytest.raises(TypeError, match=f"{name} must be .*got"):
        paged_attention(np.zeros((1, 2, 4), np.float16), *pools, [[0]], [1], **{name: fake_cupy.ndarray()})


def test_merge_refuses_states_that_do_not_agree(device):
    xp = device.xp
    out, lse = xp.zeros((3, 2, 8), np.float16), xp.zeros((3, 2), np.float32)
    good = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse}
    for name in good:
        with pytest.raises(TypeError, match=f"{name} must be a NumPy or CuPy array, or speak DLPack, got list"):
            merge_attention_states(**{**good, name: [1.0]})
    for spoiled, error, message in (
        ({"out_a": out[0]}, ValueError, r"out_a must be \[num_tokens, num_heads, v_head_dim\], got shape \(2, 8\)"),
        ({"out_b": out[:2]}, ValueError, r"out_b must have shape \(3, 2, 8\), got \(2, 2, 8\)"),
        ({"out_b": out.astype(np.float32)}, TypeError, "out_b must have the dtype of out_a, float16, got float32"),
        ({"lse_a": lse.T}, ValueError, r"lse_a must have shape \(3, 2\), got \(2, 3\)"),
        ({"lse_b": lse[:2]}, ValueError, r"lse_b must have shape \(3, 2\), got \(2, 2\)"),
        ({"lse_a": lse.astype(np.float64)}, TypeError, "lse_a must be float32, got float64"),
        ({"lse_b": lse.astype(np.float16)}, TypeError, "lse_b must be float32, got float16"),
    ):
        with pytest.raises(error, match=message):
            merge_attention_states(**{**good, **spoiled})
