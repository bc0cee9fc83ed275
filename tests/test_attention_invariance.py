"""On a GPU a token's result has the same bits, however it was batched, chunked or spread. All here compares bits."""

import functools
import math
from typing import Any

import numpy as np
import pytest
from attending import DTYPES, Scene, bits, same_bits

import cupy_pagedkv.devices.backend as backend
from cupy_pagedkv import paged_attention
from cupy_pagedkv.devices.cuda_backend import CudaBackend
from cupy_pagedkv.devices.emulated_backend import EmulatedBackend
from cupy_pagedkv.emulator import emulate

FIRST, LAST = 190, 300
"""New tokens, of which some are in the first split of positions and some in the second."""

KINDS: dict[str, dict[str, Any]] = {
    "float16": {"dtype": DTYPES[0]},
    "bfloat16": {"dtype": DTYPES[1]},
    "float32": {"dtype": DTYPES[2]},
    "window": {"window_size": (70, -1), "alibi_slopes": [0.5, 0.25]},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": [2.0, -1.0]},
    "everything": {"dtype": DTYPES[2], "window_size": (200, -1), "softcap": 3.0, "sinks": [2.0, -1.0]},
    "group of 3": {"heads": (3, 1)},
    "odd head_dim": {"dim": 35},
}


@pytest.fixture(params=KINDS)
def scene(request, kernel_device, rng) -> Scene:
    """One sequence, whose last tokens are new."""
    return Scene(kernel_device, rng, [(LAST - FIRST, LAST)], **{"heads": (2, 1), "dim": 32, **KINDS[request.param]})


def rows(scene: Scene, start: int, end: int, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of the tokens at positions ``start`` … ``end`` − 1, computed by themselves."""
    array = scene.device.array
    return scene.attend(
        query=scene.arguments["query"][start - FIRST : end - FIRST], seq_lens=array(np.array([end], np.int32)),
        cu_seqlens_q=array(np.array([0, end - start], np.int32)), **arguments,
    )  # fmt: skip


def assert_same(got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    if not same_bits(got, expected):
        out, lse = (bits(a) != bits(b) for a, b in zip(got, expected, strict=True))
        wrong = np.flatnonzero(out.any(axis=(1, 2)) | lse.any(axis=1))
        pytest.fail(f"{len(wrong)} of {len(lse)} tokens differ, the first at {wrong[:8].tolist()}", pytrace=False)


def test_one_prefill_is_its_chunks(scene):
    whole = scene.attend()
    scene.check(whole)
    for size in (1, 7, 16, 100):
        # By single tokens only around the split's edge, and at both ends: 110 launches take long.
        starts = [FIRST, 251, 252, 253, 254, 255, 256, 257, LAST - 1] if size == 1 else range(FIRST, LAST, size)
        for start in starts:
            end = min(start + size, LAST)
            assert_same(rows(scene, start, end), tuple(array[start - FIRST : end - FIRST] for array in whole))


def test_one_prefill_is_a_batch_of_its_tokens(scene):
    """Each a sequence of its own, with the same blocks, by both ways to say so."""
    whole = scene.attend()
    array, count = scene.device.array, LAST - FIRST
    tokens = {
        "block_tables": array(scene.tables.repeat(count, axis=0)),
        "seq_lens": array(np.arange(FIRST + 1, LAST + 1, dtype=np.int32)),
    }
    assert_same(scene.attend(**tokens, cu_seqlens_q=None), whole)
    assert_same(scene.attend(**tokens, cu_seqlens_q=array(np.arange(count + 1, dtype=np.int32))), whole)


def test_alone_as_among_17_others(scene, rng):
    """The first, the last, and in the middle; the others prefill, decode, or have nothing."""
    whole = scene.attend()
    others = [(1, 260), (30, 40), (0, 9), *((1, int(n)) for n in rng.integers(1, 90, 8)), (17, 280), (2, 3), (1, 1),
              (5, 300), (0, 0), (40, 256)]  # fmt: skip
    assert len(others) == 17
    for place in (0, 9, 17):
        lens = [*others[:place], (LAST - FIRST, LAST), *others[place:]]
        dim, dtype, num_heads = scene.query.shape[2], scene.query.dtype, scene.query.shape[1]
        batch = Scene(scene.device, rng, lens, dim=dim, dtype=dtype, heads=(num_heads, 1), **scene.options)
        for pool, mine in zip(batch.pools, scene.pools, strict=True):
            pool[batch.places(place)] = mine[scene.places(0)]
        new = slice(batch.ends[place], batch.ends[place + 1])
        batch.query[new] = scene.query
        out, lse = batch.load().attend()
        assert_same((out[new], lse[new]), whole)
        if place == 9:
            batch.check((out, lse))


def test_other_block_ids_and_wider_tables(scene, rng):
    whole = scene.attend()
    num_blocks = scene.pools[0].shape[0]
    order = rng.permutation(num_blocks)
    array = scene.device.array
    arguments = {"k_cache": scene.pools[0][order], "v_cache": scene.pools[1][order]}
    arguments = {name: array(np.ascontiguousarray(pool)) for name, pool in arguments.items()}
    new_id = np.argsort(order)
    inside = (scene.tables >= 0) & (scene.tables < num_blocks)
    tables = np.where(inside, new_id[np.where(inside, scene.tables, 0)], scene.tables).astype(np.int32)
    assert_same(scene.attend(block_tables=array(tables), **arguments), whole)
    for more in (1, 17, 1000):
        wide = np.concatenate([tables, np.full((1, more), -1, np.int32)], axis=1)
        assert_same(scene.attend(block_tables=array(wide), **arguments), whole)
        got = rows(scene, 270, 271, block_tables=array(wide), **arguments)
        assert_same(got, tuple(a[270 - FIRST : 271 - FIRST] for a in whole))


def test_other_strides_and_other_index_types(scene):
    whole = scene.attend()
    item = scene.query.itemsize
    for name, pool in zip(("k_cache", "v_cache"), scene.pools, strict=True):
        memory = scene.device.array(np.frombuffer(bytes(item) + pool.tobytes() + bytes(8), np.uint8))
        moved = memory[item : item + pool.size * item].view(pool.dtype).reshape(pool.shape)  # less aligned
        assert_same(scene.attend(**{name: moved}), whole)
    assert_same(scene.attend(
        block_tables=scene.tables.astype(np.int64), seq_lens=[LAST], cu_seqlens_q=[0, LAST - FIRST]
    ), whole)  # fmt: skip


def test_whatever_is_said_of_the_most_new_tokens(scene):
    """It decides how many rows a tile has."""
    whole = scene.attend()
    for most in (LAST - FIRST, 10_000):
        assert_same(scene.attend(max_seqlen_q=most), whole)
    one = tuple(array[260 - FIRST : 261 - FIRST] for array in whole)
    for most in (None, 1, 64):
        assert_same(rows(scene, 260, 261, max_seqlen_q=most), one)


def test_any_number_of_multiprocessors(scene, monkeypatch, launches):
    """With many, splits are spread and merged by a second launch; with one, a block takes whole sequences."""
    whole, parts = scene.attend(), [rows(scene, start, start + 5) for start in (190, 254, 295)]
    kinds = set()
    for processors in (1, 2, 132, 10_000):
        use(monkeypatch, scene.device, processors)
        launches.clear()
        assert_same(scene.attend(), whole)
        for start, part in zip((190, 254, 295), parts, strict=True):
            assert_same(rows(scene, start, start + 5), part)
        kinds.add(tuple(launches))
    assert len(kinds) > 1 or scene.device.name != "emulated"


def use(monkeypatch: pytest.MonkeyPatch, device: Any, processors: int) -> None:
    kind, maker = (EmulatedBackend, "_emulated") if device.name == "emulated" else (CudaBackend, "_cuda")
    monkeypatch.setattr(kind, "_count_processors", lambda self, place: processors)
    arguments = () if device.name == "emulated" else (device.xp,)
    monkeypatch.setattr(backend, maker, functools.cache(functools.partial(kind, *arguments)))


def test_with_and_without_scratch(scene):
    whole = scene.attend()
    for room in (0, None):
        buffers = scene.buffers()
        got = paged_attention(**scene.arguments, out=buffers._replace(scratch=buffers.scratch[:room]), return_lse=True)
        assert_same(tuple(map(scene.device.numpy, got)), whole)


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled:3"])
def test_any_order_of_threads(scene, order):
    if scene.device.name == "cupy":
        pytest.skip("a GPU has its own")
    whole, part = scene.attend(), rows(scene, 250, 257)
    with emulate(order=order):
        assert_same(scene.attend(), whole)
        assert_same(rows(scene, 250, 257), part)


@pytest.mark.parametrize("pool", [0, 1], ids="KV")
def test_a_nan_in_a_later_token(scene, pool):
    """Values that are not finite take a way of their own through the tensor cores' kernel."""
    whole = scene.attend()
    scene.pools[pool][scene.places(0, 280)] = math.nan
    spoiled = scene.load().attend()
    assert_same(tuple(array[: 280 - FIRST] for array in spoiled), tuple(array[: 280 - FIRST] for array in whole))
    for start, end in ((190, 280), (275, 280), (275, 285), (279, 280)):
        got = rows(scene, start, end)
        new = slice(0, min(end, 280) - start)
        expected = tuple(array[start - FIRST : min(end, 280) - FIRST] for array in whole)
        assert_same(tuple(array[new] for array in got), expected)


def test_repeated_calls(scene):
    whole = scene.attend()
    for _ in range(3):
        assert_same(scene.attend(), whole)
