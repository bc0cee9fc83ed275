"""paged_attention: a grid, exact means, and all that went wrong with such kernels elsewhere.

Every scene is poisoned: ``attending.Scene`` says how. Results are compared with float64, whose loops are the oracle's.
On the emulated device a specialisation of a kernel takes about a second to compile, and 16 rows of head_dim 64 over 64
positions 3 ms: there the grid is thinned, and most other tests share their shapes.
"""

import math
from typing import Any

import conftest
import numpy as np
import oracle
import pytest
from attending import DTYPES, SPLIT, Scene, of_dtypes, pairwise, slopes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cupy_pagedkv.emulator import emulate


@pytest.fixture(params=["numpy", "cupy"])
def quick_device(request, monkeypatch):
    """A device on which many shapes take little time."""
    yield from conftest._device(request.param, monkeypatch)


# The grid

GRID = pairwise({
    "lens": [
        [(1, 1328)], [(5, 18)], [(129, 463)], [(1, 2011)], [(1, 1)], [(0, 7), (1, 9)], [(1, 0), (2, 2)],
        [(1, n) for n in (15, 16, 17, 63, 64, 65)], [(2, 255), (1, 256), (3, 257), (1, 511), (1, 513)],
        [(3, 3), (16, 300), (1, 40), (0, 7), (40, 40)],
    ],
    "heads": [(4, 4), (8, 2), (5, 1), (9, 3), (28, 4), (64, 4), (40, 8), (6, 1), (7, 1)],
    "dim": [64, 80, 96, 128, 192, 256, (192, 128), (576, 512), 67, 5],
    "block_size": [1, 5, 16, 64, 128],
    "window": [-1, 0, 63, 255, 5000],
    "softcap": [0.0, 50.0],
    "sinks": [False, True],
    "alibi": [False, True],
    "dtype": DTYPES,
    "layout": ["NHD", "HND", "interleaved", "packed"],
    "causal": [True, False],
    "index": [np.int32, np.int64],
})  # fmt: skip


def scene_of(device: Any, rng: Any, case: dict[str, Any]) -> Scene:
    dim, v_dim = case["dim"] if isinstance(case["dim"], tuple) else (case["dim"], case["dim"])
    layout = case["layout"]
    if v_dim == 512:
        layout = "latent"
    elif v_dim != dim and layout == "interleaved":
        layout = "packed"
    num_heads, left = case["heads"][0], case["window"]
    return Scene(
        device, rng, case["lens"], heads=case["heads"], dim=dim, v_dim=v_dim, dtype=case["dtype"], layout=layout,
        block_size=case["block_size"], index=case["index"], causal=case["causal"],
        window_size=(left, 3 if left == 63 else -1), softcap=case["softcap"],
        alibi_slopes=slopes(num_heads) if case["alibi"] else None,
        sinks=2 * rng.standard_normal(num_heads) if case["sinks"] else None,
    )  # fmt: skip


def cost(case: dict[str, Any]) -> int:
    dim = case["dim"] if isinstance(case["dim"], int) else case["dim"][0]
    return case["heads"][0] * dim * sum(count * seq_len for count, seq_len in case["lens"])


THIN = [i for i, case in enumerate(GRID) if cost(case) < 3_000_000][:26]
"""Those that the emulated device computes, too."""
REST = [i for i in range(len(GRID)) if i not in THIN]


def ident(i: int) -> str:
    case = GRID[i]
    return f"{i}-{case['heads']}-{case['dim']}-{np.dtype(case['dtype']).name}".replace(" ", "")


@pytest.mark.parametrize("case", THIN, ids=ident)
def test_grid(device, rng, case):
    scene_of(device, rng, GRID[case]).check()


@pytest.mark.parametrize("case", REST, ids=ident)
def test_rest_of_the_grid(quick_device, rng, case):
    scene_of(quick_device, rng, GRID[case]).check()


def test_the_thin_grid_has_each_value_that_is_not_large():
    for name in GRID[0]:
        thin = [GRID[i][name] for i in THIN]
        for value in (case[name] for case in GRID):
            assert value in thin or value == [(129, 463)], (name, value)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_results_are_compared_with_is_the_oracle(data):
    """Its loops are too slow for the grid."""
    scene = any_scene(conftest.Device("numpy", np), data, DTYPES)
    out, lse = oracle.attention(
        scene.query, *scene.pools, scene.tables, scene.lens, scene.ends.tolist(), **scene.options
    )
    rows = slice(scene.ends[-1])
    exact, exact_lse = scene.exact()
    assert np.allclose(exact[rows], out[rows], 1e-12, 1e-12)
    assert np.allclose(exact_lse[rows], lse[rows], 1e-12, 1e-12)


def any_scene(device: Any, data: Any, dtypes: Any, dims: Any = (16, 5), heads: Any = ((2, 1), (3, 3))) -> Scene:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_heads, kv_heads = draw(st.sampled_from(heads))
    lens = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70) | st.integers(250, 262)), max_size=5))
    sides = st.just(-1) | st.integers(0, 4) | st.integers(5, 300)
    return Scene(
        device, rng, lens, heads=(num_heads, kv_heads), dim=draw(st.sampled_from(dims)),
        dtype=draw(st.sampled_from(dtypes)), block_size=draw(st.sampled_from([1, 16])),
        layout=draw(st.sampled_from(["NHD", "HND", "packed"])), padding=draw(st.integers(0, 2)),
        causal=draw(st.booleans()), window_size=(draw(sides), draw(sides)), softcap=draw(st.sampled_from([0.0, 3.0])),
        softmax_scale=draw(st.sampled_from([None, 0.1, -1.0, 0.0])),
        alibi_slopes=slopes(num_heads) if draw(st.booleans()) else None,
        sinks=rng.standard_normal(num_heads) if draw(st.booleans()) else None,
    )  # fmt: skip


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch(quick_device, data):
    any_scene(quick_device, data, DTYPES).check()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch_of_few_shapes(device, data):
    """For the emulated device: with two head_dims and one group in place of two."""
    any_scene(device, data, [np.float16, np.float32], heads=((2, 1),)).check()


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch_with_every_access_checked(kernel_device, data):
    if kernel_device.name == "cupy":
        pytest.skip("checks are the emulated device's")
    with emulate(check=True):
        any_scene(kernel_device, data, [np.float16, np.float32], dims=(16,), heads=((2, 1),)).check()


CHECKED: dict[str, dict[str, Any]] = {
    "tensor cores": {},
    "bfloat16, odd places": {"dtype": DTYPES[1], "first": 1, "layout": "HND"},
    "float32, all options": {"dtype": DTYPES[2], "sinks": [1, 0], "softcap": 5.0, "window_size": (270, -1)},
    "odd head_dim": {"dim": 35, "v_dim": 19, "layout": "packed", "alibi_slopes": [0.1, 0.2]},
    "V of K": {"dim": 64, "v_dim": 32, "layout": "latent"},
    "many columns of V": {"dim": 16, "v_dim": 513, "layout": "packed"},
    "not causal": {"causal": False, "window_size": (3, 40), "block_size": 5, "dim": 16},
}


@pytest.mark.parametrize("options", CHECKED)
def test_every_access_checked(kernel_device, rng, options):
    """Races, reads of what was not written, accesses outside the arrays; decode in two launches and in one, prefill."""
    if kernel_device.name == "cupy":
        pytest.skip("checks are the emulated device's")
    options = {"heads": (2, 1), "dim": 32, **CHECKED[options]}
    with emulate(check=True):
        decode = Scene(kernel_device, rng, [(1, 300)], **options)
        buffers = decode.buffers()
        for scratch in (buffers.scratch, buffers.scratch[:0]):
            decode.check(decode.attend(out=buffers._replace(scratch=scratch)))
        prefill = Scene(kernel_device, rng, [(1, 3), (2, 290), (20, 40), (0, 5), (3, 1)], padding=2, **options)
        prefill.check()
        for i in range(3):  # what is not finite takes a way of its own
            prefill.pools[1][prefill.places(i, [prefill.seen[i][1] - 1])] = math.nan
        prefill.load().attend()


@pytest.mark.parametrize("arch", [75, 80, 120])
@of_dtypes
def test_other_architectures(kernel_device, rng, dtype, arch):
    """On sm_75 mma multiplies half as much at once, and bfloat16 not at all; on sm_120 shared memory is smaller."""
    if kernel_device.name == "cupy":
        pytest.skip("a GPU has one architecture")
    with emulate(arch=arch):
        Scene(kernel_device, rng, [(1, 300), (9, 70), (20, 20)], dtype=dtype, sinks=[0.5] * 8).check()
        Scene(kernel_device, rng, [(1, 70)], heads=(4, 1), dim=256, dtype=dtype).check()


@pytest.mark.parametrize(("dim", "v_dim"), [(24, 16), (20, 16), (16, 20)])
def test_a_head_dim_that_is_no_multiple_of_16_beside_one_that_is(device, rng, dim, v_dim):
    Scene(device, rng, [(1, 300), (9, 20)], heads=(4, 2), dim=dim, v_dim=v_dim, layout="packed").check()


@pytest.mark.parametrize(("dim", "v_dim"), [(144, 144), (176, 96), (272, 256)])
def test_tiles_that_are_no_whole_number_of_copies_a_thread(device, rng, dim, v_dim):
    layout = "latent" if dim == 272 else "packed"
    Scene(device, rng, [(1, 70), (9, 20)], heads=(4, 1), dim=dim, v_dim=v_dim, dtype=np.float16, layout=layout).check()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_more_columns_of_v_than_a_block_has(device, rng, dtype):
    for lens in ([(1, 300)], [(1, 257), (5, 20), (0, 3)]):
        Scene(device, rng, lens, heads=(4, 2), dim=16, v_dim=528, dtype=dtype, layout="packed").check()


# Splits


@pytest.mark.parametrize("splits", [1, 2, 3, 17, 64])
@of_dtypes
def test_numbers_of_splits(device, rng, dtype, splits):
    """The last one full, and of one position; with one token and with few, which share a tile of rows."""
    for count, seq_len in ((1, SPLIT * splits), (3, SPLIT * (splits - 1) + 1)):
        Scene(device, rng, [(min(count, seq_len), seq_len)], heads=(2, 1), dim=16, dtype=dtype, sinks=[1, -1]).check()


@of_dtypes
def test_the_greatest_score_in_any_split(device, rng, dtype):
    """What was summed before is scaled to it, be it 2^-100 of that, and the other way round."""
    for place in (0, 255, 256, 600, 767, 768, 999):
        scene = Scene(device, rng, [(1, 1000)], heads=(1, 1), dim=16, dtype=dtype)
        block, offset = scene.places(0, place)
        key = scene.query[0, 0].astype(np.float64)
        scene.pools[0][block, offset, 0] = 300 * key / (key @ key)
        scene.load()
        scene.check()


def test_splits_that_see_nothing(device, rng):
    """Windows leave the first splits out, whose sums nobody writes to the scratch; all others are there."""
    lens = [(1, 1500), (1, 3), (2, 800), (1, 257)]
    for window in (0, 100, 255, 256, 400):
        scene = Scene(device, rng, lens, heads=(2, 1), dim=16, window_size=(window, -1), sinks=[1, -2])
        scene.check(scene.attend(out=scene.buffers()))


# Means, which are exact: where all scores are 0, a row is the mean of what it sees

MASKS: list[dict[str, Any]] = [
    {"causal": causal, "window_size": window}
    for causal, windows in (
        (True, [(-1, -1), (0, -1), (1, 0), (15, -1), (16, 7), (255, -1), (256, 0), (257, -1)]),
        (False, [(-1, -1), (0, 0), (3, -1), (-1, 3), (-1, 0), (63, 64), (256, 1), (0, 255), (5000, 5000)]),
    )
    for window in windows
]
EDGES = [
    (1, 1), (2, 2), (1, 15), (1, 16), (1, 17), (17, 17), (33, 70), (1, 255), (1, 256), (1, 257), (3, 258), (5, 513),
    (70, 300), (0, 7), (3, 0), (5, 3), (18, 1), (1, 0),
]  # fmt: skip


def mean_scene(device: Any, rng: Any, lens: Any = EDGES, **options: Any) -> Scene:
    """Query and keys are zeros where any token sees them, values whole numbers."""
    scene = Scene(device, rng, lens, heads=(4, 2), dim=16, scale=0, **options)
    for i in range(len(lens)):
        place = scene.places(i)
        scene.pools[1][place] = rng.integers(-99, 100, scene.pools[1][place].shape)
    return scene.load()


def check_means(scene: Scene, sink: bool = False) -> None:
    out, lse = scene.attend()
    rows = scene.ends[-1]
    expected = np.zeros(out.shape, scene.query.dtype)
    seen = np.zeros(rows, np.int64)
    for i, count in enumerate(scene.counts):
        visible = scene.visible(i)
        values = scene.pools[1][scene.places(i)].astype(np.int64)
        sums = np.einsum("tp,phd->thd", visible.astype(np.int64), values).repeat(2, axis=1)
        number = visible.sum(1)
        means = sums.astype(np.float32) / np.maximum(number + sink, 1).astype(np.float32)[:, None, None]
        expected[scene.ends[i] : scene.ends[i + 1]] = means.astype(scene.query.dtype)
        seen[scene.ends[i] : scene.ends[i + 1]] = number + sink
    wrong = (out != expected).any(axis=(1, 2))
    assert not wrong.any(), f"tokens {np.flatnonzero(wrong).tolist()} of sequences {scene.counts}, {scene.lens}"
    with np.errstate(divide="ignore"):
        logs = np.log(seen.astype(np.float64))[:, None]
    assert np.allclose(lse[:rows], logs, 1e-6, 1e-6)
    assert np.isneginf(lse[rows:]).all()


@pytest.mark.parametrize(
    "mask", MASKS, ids=lambda mask: f"{'causal' if mask['causal'] else 'all'}-{mask['window_size']}"
)
@of_dtypes
def test_means_of_what_is_seen(device, rng, dtype, mask):
    check_means(mean_scene(device, rng, dtype=dtype, padding=1, **mask))


@of_dtypes
def test_means_with_a_sink_of_0(device, rng, dtype):
    """One more in the denominator, whether there is anything else or not, and once for all splits."""
    for mask in MASKS[::3]:
        check_means(mean_scene(device, rng, dtype=dtype, sinks=[0, 0, 0, 0], **mask), sink=True)


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_means_over_other_blocks(device, rng, block_size):
    for mask in (MASKS[3], MASKS[8]):
        check_means(mean_scene(device, rng, block_size=block_size, **mask))


def test_means_of_one_token_each(device, rng):
    """Without cu_seqlens_q. Some sequences have nothing."""
    lens = [(1, n) for n in (0, 1, 15, 16, 17, 255, 256, 257, 600, 0)]
    for mask in MASKS[::4]:
        check_means(mean_scene(device, rng, lens, packed=False, **mask))
