"""merge_attention_states: attention over the union of two sets of keys."""

import math
from typing import Any

import numpy as np
import pytest
from attending import DTYPES, Scene, bits, of_dtypes, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cupy_pagedkv import merge_attention_states, paged_attention
from cupy_pagedkv.emulator import emulate


def merged(device: Any, *states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out, lse = merge_attention_states(*map(device.array, states))
    return device.numpy(out), device.numpy(lse)


def exact(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[np.ndarray, np.ndarray]:
    """In float64, a row at a time."""
    out, lse = np.zeros(out_a.shape), np.full(lse_a.shape, -math.inf)
    for row in np.ndindex(lse_a.shape):
        a, b = float(lse_a[row]), float(lse_b[row])
        most = max(a, b)
        if most == -math.inf:
            continue
        wa, wb = math.exp(a - most), math.exp(b - most)
        lse[row] = most + math.log(wa + wb)
        for weight, values in ((wa, out_a), (wb, out_b)):
            if weight:
                out[row] += weight / (wa + wb) * values[row].astype(np.float64)
    return out, lse


def check(device: Any, *states: np.ndarray) -> None:
    got, expected = merged(device, *states), exact(*states)
    dtype = states[0].dtype
    assert (got[0].dtype, got[1].dtype) == (dtype, np.float32)
    ulp = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-22}[dtype.name]
    # 2^-21 of both terms of a sum, and the one rounding.
    size = np.maximum(*(np.abs(np.nan_to_num(out.astype(np.float64))) for out in (states[0], states[2])))
    lses = [np.where(np.isfinite(x), np.abs(x), 0) for x in (states[1], states[3])]
    slack = (2**-20 * (1 + np.maximum(*lses)))[..., None] * size
    assert (np.abs(got[0].astype(np.float64) - expected[0]) <= ulp * np.abs(expected[0]) + slack + 1e-7).all()
    assert np.allclose(got[1], expected[1], 1e-6, 1e-6)


def states(rng: np.random.Generator, shape: tuple[int, int, int], dtype: Any, spread: float = 3) -> list[np.ndarray]:
    result = []
    for _ in "ab":
        result.append(rng.standard_normal(shape).astype(dtype))
        result.append((spread * rng.standard_normal(shape[:2])).astype(np.float32))
    return result


@pytest.mark.parametrize("dim", [1, 5, 64, 128, 129, 512])
@of_dtypes
def test_grid(device, rng, dtype, dim):
    for spread in (0, 3, 60):
        check(device, *states(rng, (7, 3, dim), dtype, spread))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_states(device, data):
    """Also sums of exponentials that are near the ends of float32's, and none."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    arrays = states(rng, (data.draw(st.integers(0, 5)), 2, 16), data.draw(st.sampled_from(DTYPES)))
    for lse in arrays[1::2]:
        for row in np.ndindex(lse.shape):
            lse[row] = data.draw(st.sampled_from([-math.inf, -1e5, -88, 0, 88, 1e5]) | st.floats(-100, 100, width=32))
    check(device, *arrays)


@of_dtypes
def test_one_without_keys_is_the_other_bit_for_bit(device, rng, dtype):
    """Whatever its rows hold."""
    out_a, lse_a, out_b, lse_b = states(rng, (6, 2, 16), dtype)
    lse_b[...] = -math.inf
    out_b[...] = math.nan
    out, lse = merged(device, out_a, lse_a, out_b, lse_b)
    assert np.array_equal(bits(out), bits(out_a))
    assert np.allclose(lse, lse_a, 1e-6, 1e-7)
    out, lse = merged(device, out_b, lse_b, out_a, lse_a)
    assert np.array_equal(bits(out), bits(out_a))
    assert np.allclose(lse, lse_a, 1e-6, 1e-7)


@of_dtypes
def test_what_is_not_finite_shows_however_little_it_counts(device, dtype):
    """Weights that come out as 0 are weights: only a set without keys brings nothing."""
    out, nan = (np.full((1, 2, 16), value, dtype) for value in (1, math.nan))
    for lse in (1, 30, 1000):
        one, other = np.zeros((1, 2), np.float32), np.full((1, 2), -lse, np.float32)
        for states in ((out, one, nan, other), (nan, other, out, one)):
            assert np.isnan(merged(device, *states)[0].astype(np.float32)).all()


@of_dtypes
def test_two_without_keys(device, rng, dtype):
    out_a, lse_a, out_b, lse_b = states(rng, (3, 2, 16), dtype)
    lse_a[1:], lse_b[:2] = -math.inf, -math.inf
    out_a[1], out_b[1] = math.nan, math.inf
    out, lse = merged(device, out_a, lse_a, out_b, lse_b)
    assert not out[1].astype(np.float32).any()
    assert np.isneginf(lse[1]).all()
    assert np.array_equal(bits(out[[0, 2]]), bits(np.stack([out_a[0], out_b[2]])))


@of_dtypes
def test_equal_halves_are_what_they_are(device, rng, dtype):
    out_a, lse_a, _, _ = states(rng, (3, 2, 16), dtype)
    out, lse = merged(device, out_a, lse_a, out_a, lse_a)
    assert np.array_equal(bits(out), bits(out_a))
    assert np.allclose(lse, lse_a + math.log(2), 1e-6, 1e-6)


def test_the_order_does_not_matter_much_and_nothing_is_written_to(device, rng):
    arrays = states(rng, (6, 2, 16), np.float32)
    on_device = [device.array(array) for array in arrays]
    one = [device.numpy(array) for array in merge_attention_states(*on_device)]
    other = merged(device, *arrays[2:], *arrays[:2])
    assert np.allclose(one[0], other[0], 1e-5, 1e-6)
    assert np.allclose(one[1], other[1], 1e-6, 1e-6)
    for array, before in zip(on_device, arrays, strict=True):
        assert np.array_equal(bits(device.numpy(array)), bits(before))


@of_dtypes
def test_states_of_any_strides(device, rng, dtype):
    arrays = states(rng, (6, 4, 16), dtype)
    expected = merged(device, *arrays)
    for wide, narrow in (
        (lambda a: np.repeat(a, 2, axis=0), lambda a: a[1::2]),
        (lambda a: np.ascontiguousarray(a[::-1]), lambda a: a[::-1]),
        (lambda a: np.ascontiguousarray(a.T), lambda a: a.T),
        (lambda a: np.repeat(a, 3, axis=-1), lambda a: a[..., ::3]),
    ):
        got = merge_attention_states(*(narrow(device.array(wide(array))) for array in arrays))
        assert same_bits(tuple(map(device.numpy, got)), expected)


def test_no_rows(device):
    for shape in ((0, 2, 16), (3, 0, 16)):
        out, lse = np.zeros(shape, np.float16), np.zeros(shape[:2], np.float32)
        got = merged(device, out, lse, out, lse)
        assert (got[0].shape, got[1].shape) == (shape, shape[:2])


def test_every_access_checked(kernel_device, rng):
    if kernel_device.name == "cupy":
        pytest.skip("checks are the emulated device's")
    with emulate(check=True):
        for dtype in DTYPES:
            check(kernel_device, *states(rng, (3, 2, 130), dtype))


# Of attention over parts of the keys


@pytest.mark.parametrize("prefix", [16, 256, 320])
@of_dtypes
def test_a_shared_prefix_once_for_a_batch(device, rng, dtype, prefix):
    """A cascade: all queries over the prefix, as one sequence, and each over its own keys. One part has sinks."""
    lens = [(1, prefix + 70), (5, prefix + 5), (1, prefix + 1), (20, prefix + 300)]
    scene = Scene(device, rng, lens, heads=(4, 2), dim=16, dtype=dtype, sinks=[1, -1, 0, 3], softcap=20.0)
    columns = prefix // 16
    for i in range(1, len(lens)):
        for pool in scene.pools:
            pool[scene.tables[i, :columns]] = math.nan
    scene.tables[1:, :columns] = scene.tables[0, :columns]
    scene.arguments["block_tables"] = device.array(scene.tables)
    scene.load().check()

    arguments = {**scene.arguments, "return_lse": True}
    num_tokens = len(scene.query)
    shared = {
        "block_tables": device.array(scene.tables[:1, :columns]), "seq_lens": device.array(np.array([prefix])),
        "cu_seqlens_q": device.array(np.array([0, num_tokens])), "causal": False, "sinks": None,
    }  # fmt: skip
    own = {
        "block_tables": scene.arguments["block_tables"][:, columns:],
        "seq_lens": device.array(np.array(scene.lens) - prefix),
    }
    first, second = (paged_attention(**{**arguments, **part}) for part in (shared, own))
    out, lse = map(device.numpy, merge_attention_states(*first, *second))
    exact_out, exact_lse = scene.exact()
    # Two roundings to the dtype in place of one: twice what is allowed elsewhere.
    allowed = 6 * np.abs(scene.naive()[0] - exact_out).max() + 2e-5
    assert np.abs(out.astype(np.float64) - exact_out).max() <= allowed
    assert np.allclose(lse, exact_lse, 1e-5, 2e-5)


@of_dtypes
def test_a_sequence_in_parts(device, rng, dtype):
    """As over several devices, left to right; one part is empty."""
    scene = Scene(device, rng, [(1, 700)], heads=(4, 2), dim=16, dtype=dtype)
    whole = scene.exact()
    parts = []
    for start, end in ((0, 256), (256, 256), (256, 400), (400, 700)):
        tables = scene.arguments["block_tables"][:, start // 16 :]
        lens = device.array(np.array([end - start], np.int32))
        parts.append(paged_attention(**{**scene.arguments, "block_tables": tables, "seq_lens": lens}, return_lse=True))
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge_attention_states(out, lse, *part)
    allowed = 8 * np.abs(scene.naive()[0] - whole[0]).max() + 2e-5
    assert np.abs(device.numpy(out).astype(np.float64) - whole[0]).max() <= allowed
    assert np.allclose(device.numpy(lse), whole[1], 1e-5, 1e-5)
