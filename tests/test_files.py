"""What a manager saves, loads, and makes of files that are damaged, cut short or forged."""

import errno
import itertools
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import safetensors.numpy
import xxhash
from served import NUM_LAYERS, ROW, Expected, Findable, Host, Served, rows_of

from cupy_pagedkv import DamagedFileError, KVCacheManager, LayeredPagedKVCache, OutOfBlocksError
from cupy_pagedkv.bookkeeping.dtypes import as_dtype
from cupy_pagedkv.caches import files

STEMS = [[stem * 1000 + i for i in range(64)] for stem in (1, 2)]
SALTS = [None, "1", b"1", 1, True, 0, False, "None", -(2**90), "\ud800é", b""]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    monkeypatch.setattr("cupy_pagedkv.devices.backend.DEBUG", False)
    return Host()


def run(served: Served, name: str | None, tokens: Sequence[int], salt: Any = None, length: int | None = None) -> Any:
    """A sequence with the first ``length`` of the tokens of its prompt in the cache."""
    tokens = list(tokens)
    sequence = served.add(tokens, salt, name)
    cached = sequence.num_cached_tokens
    try:
        served.append(sequence, tokens[cached : len(tokens) if length is None else max(length, cached)])
    except OutOfBlocksError:
        served.free(sequence)
        raise
    return sequence


def found(manager: KVCacheManager) -> dict[Any, int]:
    """The block that is found for each ``((type of the salt, salt), all tokens to its end)``."""
    blocks, size = {}, manager._pool._bytes // 4
    behind = [(run, key, ()) for key, root in manager._pool._roots.items() for run in root.children.values()]
    for run, salt, before in behind:  # which grows
        tokens = (*before, *np.frombuffer(run.tokens, np.int32).tolist())
        for i, block in enumerate(run.blocks):
            blocks[salt, tokens[: len(before) + (i + 1) * size]] = block
        behind += [(child, salt, tokens) for child in run.children.values()]
    return blocks


def load(served: Served, path: Any, block_size: int = 0, num_blocks: int = 0, **options: Any) -> Served:
    """A cache and its manager from a file, beside the model of what it has then."""
    block_size, num_blocks = block_size or served.block_size, num_blocks or served.cache.num_blocks
    loaded = Served(served.device, num_blocks, block_size, prefix_caching=options.get("prefix_caching", True))
    loaded.manager = KVCacheManager.load(loaded.cache, path, **options)
    loaded.findable = Findable(num_blocks, loaded.block_size)
    blocks = found(loaded.manager)
    loaded.findable.contents = {block: key for key, block in blocks.items()}
    loaded.findable.cached = [block for run in loaded.manager._pool._line for block in reversed(run.blocks)]
    for name, sequence in loaded.manager.named.items():
        known = served.expected[served.manager.named[name]]
        keys = loaded.keys(known.salt, known.tokens)
        loaded.expected[sequence] = Expected(known.salt, list(known.tokens), keys, [])
    assert set(loaded.expected) == set(loaded.manager.sequences)
    loaded.check()  # all named sequences byte for byte, and that all adds up
    check_found(loaded, blocks)
    stats = loaded.manager.stats()
    counted = (stats.prompts, stats.hits, stats.prompt_tokens, stats.tokens_saved, stats.evictions, stats.copies)
    assert counted == (0,) * 6
    for sequence in loaded.expected:
        saved = served.manager.named[sequence.name]
        assert sequence.num_cached_tokens == saved.num_cached_tokens
        assert (sequence.remaining.tolist(), sequence._prompt.tolist()) == (
            saved.remaining.tolist(), saved._prompt.tolist(),
        )  # fmt: skip
        assert (sequence._prompt.dtype, sequence._prompt.flags.writeable) == (np.int32, False)
    return loaded


def check_found(served: Served, blocks: dict[Any, int]) -> None:
    """What is found has the bytes that a plain computation gives."""
    pools = [
        np.stack([served.device.numpy(layer.k_cache) for layer in served.cache]),
        np.stack([served.device.numpy(layer.v_cache) for layer in served.cache]),
    ]
    for ((_, salt), tokens), block in blocks.items():
        wanted = rows_of(salt, tokens)[:, :, -served.block_size :]
        for got, rows in zip(pools, wanted, strict=True):
            assert (got[:, block] == rows).all(), f"block {block} of {tokens}"


def cuts(served: Served, block_size: int) -> set[Any]:
    """What is found of everything in blocks of another size."""
    keys = {*found(served.manager)}
    for sequence in served.manager.named.values():
        expected = served.expected[sequence]
        keys.add(((type(expected.salt), expected.salt), tuple(expected.tokens)))
    ends = ((salt, tokens, end) for salt, tokens in keys for end in range(block_size, len(tokens) + 1, block_size))
    return {(salt, tokens[:end]) for salt, tokens, end in ends}


def in_line(served: Served) -> list[Any]:
    """What is evicted, in order."""
    return [served.findable.contents[block] for block in served.findable.cached]


def fill(served: Served, rng: np.random.Generator, steps: int = 40) -> None:
    """Prompts that share prefixes come, grow, part, and go; some have names, and some batches stay open."""
    numbers = itertools.count(10_000)
    names = itertools.count(int(rng.integers(1 << 40)))
    for _ in range(steps):
        busy = {s for new in served.open.values() for s in new}
        idle = [sequence for sequence in served.expected if sequence not in busy]
        what = rng.integers(9)
        with suppress(OutOfBlocksError):
            if what < 4 or not idle:
                stem = STEMS[rng.integers(2)][: rng.integers(65)]
                tokens = [*stem, *itertools.islice(numbers, int(rng.integers(12)))]
                name = f"n{next(names)}" if rng.random() < 0.5 else None
                salt = SALTS[rng.integers(len(SALTS))] if rng.random() < 0.3 else None
                length = None if rng.random() < 0.7 else int(rng.integers(len(tokens) + 1))
                run(served, name, tokens, salt, length)
                continue
            sequence = idle[rng.integers(len(idle))]
            if what == 4:
                served.append(sequence, [*itertools.islice(numbers, int(rng.integers(1, 9)))])
            elif what == 5:
                served.fork(sequence)
            elif what == 6:
                served.truncate(sequence, int(rng.integers(sequence.num_tokens + 1)))
            elif what == 7 and rng.random() < 0.5:
                served.prepare({sequence: [*itertools.islice(numbers, int(rng.integers(1, 9)))]})
            else:
                served.free(sequence)


def sample(host: Any, block_size: int = 4, num_blocks: int = 64) -> Served:
    """A small manager with something of everything."""
    served = Served(host, num_blocks, block_size)
    stem = STEMS[0]
    served.free(run(served, None, stem[:18]))
    run(served, "a", [*stem[:9], 7, 7, 7, 7, 7])
    served.free(run(served, None, [*stem[:12], 8, 8, 8, 8], "salt"))
    run(served, "b", [5] * 3, b"\x00")
    run(served, "c", [9] * 12, length=6)
    served.free(run(served, None, [*stem[:13], 3, 3, 3]))
    served.truncate(run(served, "d", [4] * 9), 6)
    served.truncate(run(served, "e", [*STEMS[1][:9]]), 0)
    return served


# Round trips


@pytest.mark.parametrize("seed", range(4))
def test_all_is_found_again_in_the_same_order(device, tmp_path, seed):
    rng = np.random.default_rng(seed)
    served = Served(device, 40, 4)
    fill(served, rng)
    before = served.state()
    served.manager.save(tmp_path / "cache", fingerprint="é")
    assert served.state() == before
    loaded = load(served, tmp_path / "cache", fingerprint="é")
    check_same(served, loaded)
    fill(loaded, rng)  # and life goes on


def check_same(served: Served, loaded: Served) -> None:
    assert found(loaded.manager).keys() == found(served.manager).keys()
    assert loaded.manager.named.keys() == served.manager.named.keys()
    assert in_line(loaded)[: len(served.findable.cached)] == in_line(served)


@pytest.mark.parametrize("seed", range(30))
def test_any_history_in_any_blocks(host, tmp_path, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    served = Served(host, 60, int(rng.choice([1, 4, 5, 16])))
    fill(served, rng, 60)
    served.manager.save(tmp_path / "cache")
    monkeypatch.setattr(files, "CHUNK", int(rng.choice([1, 500, 1 << 20])))
    check_same(served, load(served, tmp_path / "cache"))
    saved_again = load(served, tmp_path / "cache")
    saved_again.manager.save(tmp_path / "again")
    check_same(saved_again, load(saved_again, tmp_path / "again"))
    for block_size in (1, 3, 8, 32):
        loaded = load(served, tmp_path / "cache", block_size, 4000)
        assert found(loaded.manager).keys() == cuts(served, block_size)


@pytest.mark.parametrize("block_size", [8, 32, 5])
def test_blocks_of_another_size(device, tmp_path, block_size):
    served = Served(device, 20, 16)
    served.free(run(served, None, STEMS[0][:64]))
    run(served, "a", [*STEMS[0][:38], 7, 7, 7], length=40)
    served.free(run(served, None, [*STEMS[0][:32], *[3] * 16], "salt"))
    served.manager.save(tmp_path / "cache")
    loaded = load(served, tmp_path / "cache", block_size, 100)
    assert found(loaded.manager).keys() == cuts(served, block_size)
    assert loaded.manager.named["a"].remaining.tolist() == [7]


def test_without_prefix_caching_named_sequences_are_loaded_alone(host, tmp_path):
    served = sample(host)
    served.manager.save(tmp_path / "cache")
    loaded = load(served, tmp_path / "cache", prefix_caching=False)
    assert loaded.manager.named.keys() == {"a", "b", "c", "d", "e"}
    assert loaded.manager.stats().cached_blocks == 0


def test_without_prefix_caching_nothing_is_saved(host, tmp_path):
    served = Served(host, 8, 4, prefix_caching=False)
    with pytest.raises(ValueError, match="prefix_caching=False keeps no tokens"):
        served.manager.save(tmp_path / "cache")
    assert not [*tmp_path.iterdir()]


def test_salts_are_told_apart_by_type(host, tmp_path):
    served = Served(host, 40, 4)
    for i, salt in enumerate(SALTS):
        run(served, f"{i}", [1, 2, 3, 4, 5], salt)
        served.free(run(served, None, [6] * 4, salt))
    served.manager.save(tmp_path / "cache")
    check_same(served, load(served, tmp_path / "cache"))


def test_a_salt_of_a_subclass_cannot_be_saved(host, tmp_path):
    served = Served(host, 40, 4)
    run(served, None, [1, 2, 3, 4], np.str_("a"))
    with pytest.raises(TypeError, match="only str, bytes, int, bool and None can be saved"):
        served.manager.save(tmp_path / "cache")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("num_blocks", [8, 9, 100])
def test_pools_of_other_sizes(host, tmp_path, monkeypatch, num_blocks):
    served = Served(host, 20, 4)
    served.free(run(served, None, range(16)))
    served.free(run(served, None, [*range(8), 9, 9, 9, 9]))
    run(served, "a", [*range(12), 7, 7, 7])
    run(served, "b", [8] * 8)
    run(served, "c", [8] * 3)
    served.manager.save(tmp_path / "cache")  # 4 + 1 + 2 blocks, and 2 that are begun
    if num_blocks == 8:
        with monkeypatch.context() as patch:
            patch.setattr(files._Reader, "read", None)  # all is not read first
            with pytest.raises(ValueError, match="9 blocks of 4 tokens, and the cache with 8 of 4 has no room"):
                load(served, tmp_path / "cache", num_blocks=8)
        with pytest.raises(ValueError, match="9 blocks of 4 tokens, and the cache with 4 of 8 has no room"):
            load(served, tmp_path / "cache", 8, 4)
        with pytest.raises(ValueError, match="9 blocks of 4 tokens, and the cache with 8 of 4 has no room"):
            load(served, tmp_path / "cache", num_blocks=8, salvage=True)
    else:
        check_same(served, load(served, tmp_path / "cache", num_blocks=num_blocks))


def test_named_sequences_alone_have_to_fit(host, tmp_path):
    served = Served(host, 20, 4)
    run(served, "a", range(16))
    run(served, "b", [*range(8), 9, 9, 9])
    served.manager.save(tmp_path / "cache")  # of which nothing is shared then
    load(served, tmp_path / "cache", num_blocks=7, prefix_caching=False)
    with pytest.raises(ValueError, match="5 blocks of 4 tokens, and the cache with 6 of 4 has no room"):
        load(served, tmp_path / "cache", num_blocks=6, prefix_caching=False)


def test_a_pool_that_is_full_is_loaded_into_one_as_large(host, tmp_path):
    """Where a sequence was truncated within a block, that is its last one, and found by others: there once."""
    served = Served(host, 4, 4)
    served.truncate(run(served, "a", range(16)), 14)
    assert served.manager.num_available_blocks == 0
    served.manager.save(tmp_path / "cache")
    check_same(served, load(served, tmp_path / "cache"))


def test_sequences_that_were_loaded_go_on_and_count_as_no_prompts(host, tmp_path):
    served = sample(host)
    served.manager.save(tmp_path / "cache")
    loaded = load(served, tmp_path / "cache")
    for sequence in [*loaded.expected]:
        loaded.append(sequence, [*sequence.remaining.tolist(), 1, 2, 3])
    assert loaded.manager.stats().prompts == 0
    run(loaded, "new", STEMS[0][:18])
    stats = loaded.manager.stats()
    assert (stats.prompts, stats.hits, stats.tokens_saved) == (1, 1, 16)


def test_nothing_is_saved_and_loaded(host, tmp_path):
    served = Served(host, 4, 4)
    served.manager.save(tmp_path / "cache")
    loaded = load(served, tmp_path / "cache")
    assert (loaded.manager.named, loaded.manager.stats().free_blocks) == ({}, 4)


DTYPES = [
    "uint8", "float16", ">f4", "complex128", "bfloat16", "float8_e4m3fn", "int4", "datetime64[ms]",
    np.dtype([("a", "u1"), ("b", "<f4", 2)], align=True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_keep_all_bits(device, rng, tmp_path, dtype):
    cache = LayeredPagedKVCache(2, 6, 4, 2, 3, "uint8", device.of_caches)  # for the error below
    make = lambda: LayeredPagedKVCache(2, 6, 4, 2, 3, dtype, device.of_caches)  # noqa: E731
    one, other = make(), make()
    device.skip_unless_it_has(one[0].dtype)
    manager = KVCacheManager(one)
    sequence = manager.add(range(11), name="a")
    keys, values = oracle.random_array(rng, (2, 2, 11, 2, 3), one[0].dtype)
    with manager.prepare({sequence: sequence.remaining}) as batch:
        one.update_all(device.array(keys), device.array(values), batch.slot_mapping)
    manager.save(tmp_path / "cache")
    loaded = KVCacheManager.load(other, tmp_path / "cache")
    got = other.gather_all(loaded.named["a"].block_table[None], [11])
    for array, wanted in zip(got, (keys, values), strict=True):
        assert device.numpy(array).tobytes() == wanted.tobytes()
    if dtype != "uint8":
        with pytest.raises(ValueError, match=r"the file has dtype .*, the cache has '\|u1'; they must be the same"):
            KVCacheManager.load(cache, tmp_path / "cache")


def test_dtypes_that_differ_have_different_names():
    dtypes: list[Any] = [
        "<f2", ">f2", "V2", "u1", "i1", "V1", "M8[ms]", "M8[s]",
        *(as_dtype(name) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4")),
        [("a", "u1")], [("b", "u1")], [("a", "u1", 2)], [("a", "f2")], [("a", as_dtype("bfloat16"))],
        {"names": ["a"], "formats": ["u1"], "itemsize": 2}, {"names": ["a"], "formats": ["u1"], "offsets": [1]},
    ]  # fmt: skip
    assert len({files.name_of(np.dtype(dtype)) for dtype in dtypes}) == len(dtypes)
    assert files.name_of(np.dtype("float16")) == files.name_of(np.dtype("<f2"))


# Names


def test_names(host):
    manager = Served(host, 8, 4).manager
    a, b = manager.add([1, 2], name="a"), manager.add([1, 2], name="")
    assert (a.name, b.name, manager.add([1]).name) == ("a", "", None)
    assert manager.named == {"a": a, "": b}
    manager.named.clear()
    assert manager.named == {"a": a, "": b}
    fork = a.fork()
    assert fork.name is None
    with pytest.raises(ValueError, match="a sequence is named 'a' already; free it first"):
        manager.add([3], name="a")
    for wrong in (1, b"a", ["a"]):
        with pytest.raises(TypeError, match="name must be a str or None, got"):
            manager.add([3], name=wrong)
    assert len(manager.sequences) == 4
    manager.free(a)
    assert (a.name, manager.named) == (None, {"": b})
    assert manager.add([3], name="a").name == "a"
    manager.check_integrity()


# What must agree


def test_what_does_not_agree_with_the_cache(host, tmp_path):
    served = sample(host)
    path = tmp_path / "cache"
    served.manager.save(path, fingerprint="model 1")
    for fingerprint in ("model 2", None):
        match = f"the file has fingerprint 'model 1', load was given {fingerprint!r}"
        with pytest.raises(ValueError, match=match) as caught:
            KVCacheManager.load(served.cache, path, fingerprint=fingerprint)
        assert not isinstance(caught.value, DamagedFileError)
    shape = {"num_layers": NUM_LAYERS, "num_kv_heads": 1, "head_dim": ROW, "dtype": "|u1"}
    for name, wrong in [("num_layers", 3), ("num_kv_heads", 2), ("head_dim", 4), ("dtype", "|i1")]:
        other = {**shape, name: wrong}
        cache = LayeredPagedKVCache(num_blocks=64, block_size=4, device="cpu", **other)
        for salvage in (False, True):
            with pytest.raises(ValueError, match=name) as caught:
                KVCacheManager.load(cache, path, fingerprint="model 1", salvage=salvage)
            assert str(caught.value) == (
                f"the file has {name} {shape[name]!r}, the cache has {wrong!r}; they must be the same"
            )
            assert not isinstance(caught.value, DamagedFileError)
    served.manager.save(path)
    with pytest.raises(ValueError, match="the file has fingerprint None, load was given 'model 1'"):
        KVCacheManager.load(served.cache, path, fingerprint="model 1")
    for call in (served.manager.save, lambda path, **options: KVCacheManager.load(served.cache, path, **options)):
        with pytest.raises(TypeError, match="fingerprint must be a str or None, got int"):
            call(path, fingerprint=1)


def test_a_file_that_is_not_there(host, tmp_path):
    with pytest.raises(FileNotFoundError):
        KVCacheManager.load(sample(host).cache, tmp_path / "cache")
    with pytest.raises(FileNotFoundError):
        sample(host).manager.save(tmp_path / "folder" / "cache")


@pytest.mark.parametrize("module", ["xxhash", "tqdm", "safetensors"])
def test_what_is_missing_is_said(host, tmp_path, monkeypatch, module):
    served = sample(host)
    served.manager.save(tmp_path / "cache")
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"files need the package {module}; pip install 'cupy_pagedkv\[files\]'"
    with pytest.raises(RuntimeError, match=message):
        KVCacheManager.load(served.cache, tmp_path / "cache")
    if module != "safetensors":
        with pytest.raises(RuntimeError, match=message):
            served.manager.save(tmp_path / "other")
        assert [*tmp_path.iterdir()] == [tmp_path / "cache"]


def test_the_package_can_be_imported_without_them():
    code = """
import sys
sys.modules.update(dict.fromkeys(["xxhash", "tqdm", "safetensors"]))
import cupy_pagedkv
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# The file


def unpack(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """As the package safetensors reads it."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["index"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def pack(path: Path, index: dict[str, Any], tensors: dict[str, np.ndarray], rehash: bool = True) -> None:
    """A file that is whole, whatever is in it, as the package safetensors writes it: in its own order."""
    if rehash:
        names = ("runs", "order", "tokens", "prompts", "digests")
        index["checksum"] = xxhash.xxh3_128(b"".join(tensors[n].tobytes() for n in names if n in tensors)).hexdigest()
    text = json.dumps(index)
    metadata = {"index": text, "checksum": xxhash.xxh3_128(text.encode()).hexdigest()}
    safetensors.numpy.save_file(tensors, path, metadata)


def test_safetensors_reads_what_is_documented(host, tmp_path):
    served = sample(host)
    served.truncate(served.manager.named["a"], 13)  # which had one more in the same block
    served.manager.save(tmp_path / "cache", fingerprint="f")
    index, tensors = unpack(tmp_path / "cache")
    assert (index["block_size"], index["fingerprint"], index["dtype"]) == (4, "f", "|u1")
    salts = {"None": None, "str": str, "bytes": bytes.fromhex}
    salts = [salts[kind] and salts[kind](value) for kind, value in index["salts"]]
    paths: list[tuple[Any, list[int], bytes]] = []  # salt, tokens, digest
    keys, at = {}, 0
    for parent, count in tensors["runs"].tolist():
        seed = lambda salt: xxhash.xxh3_128(json.dumps(index["salts"][salt]).encode()).digest()  # noqa: E731
        salt, tokens, digest = paths[parent] if parent >= 0 else (salts[-1 - parent], [], seed(-1 - parent))
        for i in range(at, at + count):
            tokens = [*tokens, *tensors["tokens"][i].tolist()]
            rows = tensors["blocks"][i].reshape(2, NUM_LAYERS, 4, 1, ROW)
            assert (rows == rows_of(salt, tokens)[:, :, -4:]).all()
            digest = xxhash.xxh3_128(digest + tensors["tokens"][i].tobytes() + rows.tobytes()).digest()
            assert tensors["digests"][i].tobytes() == digest
            keys[(type(salt), salt), tuple(tokens)] = i
        at += count
        paths.append((salt, tokens, digest))
    assert keys.keys() == found(served.manager).keys()
    begun = {s["name"]: s["num_tokens"] - 4 * s["num_known"] for s in index["sequences"]}
    assert begun == {"a": 1, "b": 3, "c": 2, "d": -2, "e": 0}
    for name, i in zip("abc", range(at, at + 3), strict=True):
        expected = served.expected[served.manager.named[name]]
        rows = tensors["blocks"][i].reshape(2, NUM_LAYERS, 4, 1, ROW)
        tail = rows_of(expected.salt, expected.tokens)[:, :, -begun[name] :]
        assert (rows[:, :, : begun[name]] == tail).all()
        assert not rows[:, :, begun[name] :].any()  # nobody else's leftovers
        assert tensors["tokens"][i].tolist() == expected.tokens[-begun[name] :] + [0] * (4 - begun[name])
    assert len(tensors["blocks"]) == at + 3


def test_what_safetensors_has_written_again_is_loaded(host, tmp_path):
    served = sample(host)
    served.manager.save(tmp_path / "cache")
    pack(tmp_path / "again", *unpack(tmp_path / "cache"), rehash=False)
    assert (tmp_path / "again").read_bytes() != (tmp_path / "cache").read_bytes()
    check_same(served, load(served, tmp_path / "again"))


def test_blocks_are_written_in_the_order_in_which_they_are_read(host, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 1)
    served = Served(host, 200, 4)
    fill(served, np.random.default_rng(5), 60)
    served.manager.save(tmp_path / "cache")
    read, places = files._Reader.read, []

    def recording(self: Any, wanted: Any) -> Any:
        places.extend(wanted.tolist())
        return read(self, wanted)

    monkeypatch.setattr(files._Reader, "read", recording)
    load(served, tmp_path / "cache")
    total = len(unpack(tmp_path / "cache")[1]["blocks"])
    assert places == [*range(total)]
    assert total > 30


def test_what_a_later_version_wrote_is_not_read(host, tmp_path):
    served = sample(host)
    served.manager.save(tmp_path / "cache")
    index, tensors = unpack(tmp_path / "cache")
    pack(tmp_path / "cache", {**index, "version": 2}, tensors)
    with pytest.raises(ValueError, match="version 2 of the format, and version 1 is read") as caught:
        load(served, tmp_path / "cache")
    assert not isinstance(caught.value, DamagedFileError)


# Writing


def test_links_paths_and_modes(host, tmp_path):
    served = sample(host)
    served.manager.save(tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "cache")
    mask = os.umask(0o027)
    try:
        served.manager.save(tmp_path / "link")
    finally:
        os.umask(mask)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "cache").read_bytes() == whole
    assert (tmp_path / "folder" / "cache").stat().st_mode & 0o777 == 0o640
    assert len([*(tmp_path / "folder").iterdir()]) == 1
    served.manager.save(os.fsencode(tmp_path / "bytes"))
    check_same(served, load(served, str(tmp_path / "bytes")))
    for wrong in (tmp_path, "/dev/null"):
        with pytest.raises(ValueError, match="is no regular file, and would be replaced by one"):
            served.manager.save(wrong)
    long = tmp_path / ("x" * 250)
    served.manager.save(long)
    assert long.read_bytes() == whole


def test_two_save_at_once(host, tmp_path, monkeypatch):
    served, read = sample(host), files._read

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(files, "_read", read)
        served.manager.save(tmp_path / "cache")
        (tmp_path / "cache").rename(tmp_path / "other")
        return read(*arguments)

    monkeypatch.setattr(files, "_read", meanwhile)
    served.manager.save(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == (tmp_path / "other").read_bytes()
    assert len([*tmp_path.iterdir()]) == 2


@contextmanager
def limited(num_bytes: int) -> Iterator[None]:
    """No file gets longer: as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_is_full(host, tmp_path, there):
    served = sample(host)
    path = tmp_path / "cache"
    served.manager.save(path)
    size, old = path.stat().st_size, b"old"
    path.unlink()
    if there:
        path.write_bytes(old)
    before = served.state()
    for limit in [*range(0, size, 199), size - 1]:
        with limited(limit), pytest.raises(OSError) as caught:  # noqa: PT011
            served.manager.save(path)
        assert caught.value.errno == errno.EFBIG
        assert [(p, p.read_bytes()) for p in tmp_path.iterdir()] == ([(path, old)] if there else [])
        assert served.state() == before
    with limited(size):
        served.manager.save(path)
    check_same(served, load(served, path))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    "what", ["os.fsync", "os.replace", "builtins.open", "cupy_pagedkv.caches.files._read", "xxhash.xxh3_128"]
)
@pytest.mark.parametrize("late", [False, True], ids=["at its first call", "behind it"])
def test_whatever_fails_leaves_the_old_file(host, tmp_path, monkeypatch, what, error, late):
    served = sample(host)
    path = tmp_path / "cache"
    path.write_bytes(b"old")
    before = served.state()
    module, _, name = what.rpartition(".")
    real = getattr(sys.modules[module], name)

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if late and (what != "xxhash.xxh3_128" or len(calls) < 20):
            result = real(*arguments, **options)
            if what == "xxhash.xxh3_128":
                return result
            if what == "builtins.open":
                result.close()
        raise error

    calls: list[int] = []
    monkeypatch.setattr(sys.modules[module], name, failing)
    with pytest.raises(error):
        served.manager.save(path)
    monkeypatch.undo()
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    assert [*tmp_path.iterdir()] == [path]
    if (what, late) == ("os.replace", True):  # it is there already
        check_same(served, load(served, path))
    else:
        assert path.read_bytes() == b"old"
    assert served.state() == before


def test_what_is_written_is_on_the_disk_before_its_name_is(host, tmp_path, monkeypatch):
    served, calls = sample(host), []
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def replacing(source: Any, target: Any) -> None:
        calls.append((source, target))
        assert os.path.getsize(source) > 4000
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    served.manager.save(tmp_path / "cache")
    temporary = calls[0]
    assert os.path.dirname(temporary) == str(tmp_path)
    assert calls == [temporary, (temporary, str(tmp_path / "cache")), str(tmp_path)]


KILLED = """
import os, random, signal, sys, time
import numpy as np
from cupy_pagedkv import KVCacheManager, LayeredPagedKVCache
import cupy_pagedkv.caches.files as files

files.CHUNK = 1 << 14
path, num_kills = sys.argv[1], int(sys.argv[2])
managers = []
for state in range(2):
    cache = LayeredPagedKVCache(2, 64, 16, 2, 64, "float16", device="cpu")
    manager = KVCacheManager(cache)
    sequence = manager.add([state] * (600 + 300 * state), name="a")
    with manager.prepare({sequence: sequence.remaining}) as batch:
        keys = np.random.default_rng(state).random((2, batch.num_tokens, 2, 64)).astype(np.float16)
        cache.update_all(keys, -keys, batch.slot_mapping)
    managers.append(manager)
whole = []
seconds = 0
for manager in managers:
    started = time.perf_counter()
    manager.save(path)
    seconds += time.perf_counter() - started
    whole.append(open(path, "rb").read())
    loaded = KVCacheManager.load(LayeredPagedKVCache(2, 64, 16, 2, 64, "float16", device="cpu"), path)
    assert loaded.named["a"].num_tokens == manager.named["a"].num_tokens
random.seed(0)
left, counts, before = 0, [0, 0], 1
for _ in range(num_kills):
    child = os.fork()
    if not child:
        while True:
            for manager in managers:
                manager.save(path)
    time.sleep(random.uniform(0, 1.5 * seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    now = whole.index(open(path, "rb").read())  # or ValueError: neither the one nor the other
    counts[now] += 1
    seconds = min(1, seconds * (1.05 if now == before else 0.95))  # a save takes longer now and then
    before = now
    for name in os.listdir(os.path.dirname(path)):
        if name != os.path.basename(path):
            assert name.startswith(".kvcache-") and name.endswith(".tmp"), name
            left += 1
            os.unlink(os.path.join(os.path.dirname(path), name))
print(*counts, left)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    (tmp_path / "folder").mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "folder" / "cache"), "200"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stderr
    first, second, left = map(int, ran.stdout.split())
    assert first + second == 200
    assert min(first, second, left) > 10  # the kills came in all places


# Damage


def damage(path: Path, at: int, by: int = 0x5A) -> None:
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ by]))


class Judge:
    """Loads changed bytes of a sample's file, and compares what is there then."""

    def __init__(self, host: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.served = sample(host)
        self.path = path
        self.served.manager.save(path)
        self.whole = path.read_bytes()
        self.data = 8 + int.from_bytes(self.whole[:8], "little")
        self.blocks = len(self.whole) - unpack(path)[1]["blocks"].nbytes  # where they begin
        self.cache = LayeredPagedKVCache(NUM_LAYERS, 64, 4, 1, ROW, "uint8", "cpu")
        self.pools = self.cache._k_caches, self.cache._v_caches
        self.rows = {}
        for salt, tokens in found(self.served.manager):
            self.rows[salt, tokens] = rows_of(salt[1], tokens)[:, :, -4:]
        self.named = {
            name: (sequence._prompt.tolist(), sequence.num_cached_tokens, expected.tokens, expected.salt)
            for name, sequence in self.served.manager.named.items()
            for expected in [self.served.expected[sequence]]
        }
        self.tails = {name: rows_of(salt, tokens) for name, (_, _, tokens, salt) in self.named.items()}
        self.everything = self.state(KVCacheManager.load(self.cache, path))
        assert self.everything[0] == self.rows.keys()
        assert self.everything[2] == self.named.keys()

    def state(self, manager: KVCacheManager) -> Any:
        """What is loaded, all of which has to be right: what is found, in which order, and the sequences."""
        blocks = found(manager)
        assert blocks.keys() <= self.rows.keys()
        for key, block in blocks.items():
            for pool, rows in zip(self.pools, self.rows[key], strict=True):
                assert (pool[:, block] == rows).all()
        for name, sequence in manager.named.items():
            prompt, num_cached, tokens, _ = self.named[name]
            assert (sequence._prompt.tolist(), sequence.num_cached_tokens) == (prompt, num_cached)
            assert sequence.num_tokens == len(tokens)
            if tokens:
                table, wanted = sequence.block_table, self.tails[name]
                for pool, rows in zip(self.pools, wanted, strict=True):
                    got = pool[:, table].reshape(NUM_LAYERS, -1, 1, ROW)[:, : len(tokens)]
                    assert (got == rows).all()
        keys = {block: key for key, block in blocks.items()}
        line = [keys[block] for run in manager._pool._line for block in reversed(run.blocks)]
        return blocks.keys(), line, manager.named.keys()

    def __call__(self, changed: bytes, salvage: bool) -> Any:
        """What is loaded; None where an error says that the file is damaged."""
        self.path.write_bytes(changed)
        self.cache._k_caches[:] = self.cache._v_caches[:] = 0
        try:
            manager = KVCacheManager.load(self.cache, self.path, salvage=salvage)
        except DamagedFileError:
            return None
        return self.state(manager)

    def strict(self, changed: bytes) -> bool:
        """Whether it is loaded, and then it is everything."""
        state = self(changed, False)
        assert state is None or state == self.everything
        return state is not None


@pytest.fixture
def judge(host, tmp_path, monkeypatch) -> Judge:
    return Judge(host, tmp_path / "cache", monkeypatch)


def flipped(whole: bytes, at: int, by: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ by]) + whole[at + 1 :]


def test_any_structural_byte(judge, rng):
    assert len(judge.whole) < 20_000
    loaded = []
    for at in range(judge.blocks):
        changed = flipped(judge.whole, at, int(rng.integers(1, 256)))
        if judge.strict(changed):
            loaded.append(at)
        judge(changed, True)
    assert all(judge.whole[at : at + 1] == b" " for at in loaded)  # what JSON has between its parts


def test_any_length(judge):
    for length in range(len(judge.whole)):
        assert not judge.strict(judge.whole[:length])
    salvaged = []
    for length in range(judge.blocks - 1, len(judge.whole) + 1, 11):
        state = judge(judge.whole[:length], True)
        salvaged.append(len(state[0]) if state else 0)
    assert salvaged == sorted(salvaged)
    assert (salvaged[0], salvaged[-1]) == (0, len(judge.rows))
    assert judge(judge.whole, True) == judge.everything
    assert judge(judge.whole + b"more", True) == judge.everything
    assert not judge.strict(judge.whole + b"more")


def test_ten_thousand_bytes(judge, rng):
    for at, by in zip(rng.integers(0, len(judge.whole), 10_000), rng.integers(1, 256, 10_000), strict=True):
        changed = flipped(judge.whole, int(at), int(by))
        assert not judge.strict(changed) or judge.whole[at : at + 1] == b" "
        judge(changed, True)


def test_any_block(judge):
    """Salvage leaves out what is damaged and what is behind, and nothing else."""
    index, tensors = unpack(judge.path)
    block_bytes = tensors["blocks"].shape[1]
    keys = {}
    for (salt, tokens), rows in judge.rows.items():
        place = (tensors["blocks"] == rows.reshape(-1)).all(axis=1).argmax()
        keys[int(place)] = (salt, tokens)
    assert len(keys) == index["num_blocks"]
    begun = dict(enumerate("abc", index["num_blocks"]))
    for place in range(len(tensors["blocks"])):
        changed = flipped(judge.whole, judge.blocks + place * block_bytes + 17, 1)
        assert not judge.strict(changed)
        left, _, named = judge(changed, True)
        if place in begun:
            assert (left, named) == (judge.rows.keys(), judge.named.keys() - {begun[place]})
            continue
        salt, tokens = keys[place]
        behind = {key for key in judge.rows if key[0] == salt and key[1][: len(tokens)] == tokens}
        assert left == judge.rows.keys() - behind
        known = {name: 4 * s["num_known"] for s in index["sequences"] for name in [s["name"]]}
        gone = set()
        for name, (_, _, all_tokens, s) in judge.named.items():
            path = tuple([4] * 8 if name == "d" else all_tokens[: known[name]])
            if ((type(s), s), path) in behind:
                gone.add(name)
        assert named == judge.named.keys() - gone
        assert all(name not in named for name in gone)


@pytest.mark.parametrize("options", [{"prefix_caching": False}, {"block_size": 1000}], ids=str)
def test_what_is_not_loaded_has_to_be_whole_too(judge, options):
    """Of blocks that fill none of another size, and of those that nobody finds."""
    total, block_bytes = unpack(judge.path)[1]["blocks"].shape
    load(judge.served, judge.path, **options)
    for place in range(total):
        judge.path.write_bytes(flipped(judge.whole, judge.blocks + (place + 1) * block_bytes - 1, 1))
        with pytest.raises(DamagedFileError, match=f"block {place} of {total} in the file is damaged"):
            load(judge.served, judge.path, **options)


@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_salvage_in_blocks_of_another_size(judge, block_size, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 300)
    _, tensors = unpack(judge.path)
    total, block_bytes = tensors["blocks"].shape
    everything = cuts(judge.served, block_size)
    for place in range(total):
        judge.path.write_bytes(flipped(judge.whole, judge.blocks + place * block_bytes, 1))
        loaded = load(judge.served, judge.path, block_size, 400, salvage=True)
        left = found(loaded.manager).keys()
        assert left <= everything
        rows = tensors["blocks"][place].reshape(2, NUM_LAYERS, 4, 1, ROW)
        gone = [(s, t[:-4]) for (s, t), wanted in judge.rows.items() if (wanted == rows).all()]
        if gone:  # what begins in the block, or behind it
            ((salt, before),) = gone
            behind = {
                k for k in everything if k[0] == salt and k[1][: len(before)] == before and len(k[1]) > len(before)
            }
            assert everything - left <= behind
        else:
            assert len(everything - left) <= 3 // block_size


def test_an_order_that_was_changed_is_damage(judge):
    """Even if it is one; nothing else would tell."""
    index, tensors = unpack(judge.path)
    tensors["order"][:2] = tensors["order"][1::-1]
    pack(judge.path, index, tensors, rehash=False)
    changed = judge.path.read_bytes()
    with pytest.raises(DamagedFileError, match="the runs, tokens, prompts or digests in the file are damaged"):
        KVCacheManager.load(judge.cache, judge.path)
    left, line, named = judge(changed, True)
    assert (left, named) == (judge.rows.keys(), judge.named.keys())
    assert line != judge.everything[1]


def test_a_bad_order_is_not_kept(judge):
    index, tensors = unpack(judge.path)
    tensors["order"][0] = tensors["order"][1]
    pack(judge.path, index, tensors)
    changed = judge.path.read_bytes()
    assert not judge.strict(changed)
    left, _, named = judge(changed, True)
    assert (left, named) == (judge.rows.keys(), judge.named.keys())


# Forgeries


def set_sequence(**fields: Any) -> Callable[..., None]:
    return lambda index, tensors: index["sequences"][0].update(fields)


def set_index(**fields: Any) -> Callable[..., None]:
    return lambda index, tensors: index.update(fields)


def set_runs(at: Any, value: Any) -> Callable[..., None]:
    def forge(index: Any, tensors: Any) -> None:
        tensors["runs"][at] = value

    return forge


def add_twin(index: Any, tensors: Any) -> None:
    """The last run begins as the first one does, and all digests are right."""
    tensors["runs"] = np.array([*tensors["runs"].tolist(), [-1, 1]], np.int32)
    tensors["order"] = np.array([*tensors["order"].tolist(), len(tensors["order"])], np.int32)
    n = index["num_blocks"]
    for name in ("tokens", "digests", "blocks"):
        tensors[name] = np.insert(tensors[name], n, tensors[name][0], axis=0)
    index["num_blocks"] += 1
    index["num_runs"] += 1


def two_names(index: Any, tensors: Any) -> None:
    index["sequences"][1]["name"] = index["sequences"][0]["name"]


def lose_a_block(index: Any, tensors: Any) -> None:
    counts = tensors["runs"][:, 1]
    counts[counts.argmax()] -= 1


def cast(name: str, dtype: Any) -> Callable[..., None]:
    def forge(index: Any, tensors: Any) -> None:
        tensors[name] = tensors[name].astype(dtype)

    return forge


NUMBERS = [-1, 1.0, True, None, "1", float("nan"), [], 2**31, 2**70, -(2**70)]
FORGERIES: list[tuple[str, Callable[..., None], str]] = [
    ("a run behind itself", set_runs((0, 0), 0), "run 0 in the file comes behind run 0"),
    ("a circle", set_runs((0, 0), 1), "run 0 in the file comes behind run 1"),
    ("a run behind a salt that is not there", set_runs((0, 0), -99), "comes behind run -99"),
    ("a negative count", set_runs((0, 1), -1), "run 0 in the file has -1 blocks"),
    ("an empty run", set_runs((1, 1), 0), "run 1 in the file has 0 blocks"),
    ("too many blocks", set_runs((0, 1), 2**31 - 1), "run 0 in the file has 2147483647 blocks"),
    ("too few blocks", lose_a_block, "the runs in the file have .* blocks, expected"),
    ("twins", add_twin, "begins as another one does"),
    ("no order", lambda index, tensors: tensors["order"].fill(0), "the order in the file"),
    ("a negative order", lambda index, tensors: tensors["order"].put(0, -1), "the order in the file"),
    ("a tensor less", lambda index, tensors: tensors.pop("order"), "the file has the tensors"),
    ("a tensor more", lambda index, tensors: tensors.update(x=np.zeros(1)), "the file has the tensors"),
    ("runs in int64", cast("runs", np.int64), "the tensor runs is I64"),
    ("float tokens", cast("tokens", np.float32), "the tensor tokens is F32"),
    ("blocks in int8", cast("blocks", np.int8), "the tensor blocks is I8"),
    ("the same names", two_names, "a sequence's name twice"),
    ("another format", set_index(format="gguf"), "of the format 'gguf', expected 'cupy_pagedkv'"),
    ("no salts", set_index(salts=None), "the index has no salts of type list"),
    ("a salt twice", set_index(salts=[["str", "a"]] * 5), "a salt twice"),
    ("an empty salt", set_index(salts=[[]]), "the index has the salt"),
    ("a salt of another kind", set_index(salts=[["float", "1"]]), "the index has the salt"),
    ("a salt that is no text", set_index(salts=[["str", 1]]), "the index has the salt"),
    ("a salt of a list", set_index(salts=[[[], ""]]), "the index has the salt"),
    ("a salt in decimals", set_index(salts=[["int", "10"]]), "the index has the salt"),
    ("a bool of two", set_index(salts=[["bool", "0x2"]]), "the index has the salt"),
    ("capital digits", set_index(salts=[["bytes", "AB"]]), "the index has the salt"),
    ("sequences of none", set_index(sequences={}), "the index has no sequences of type list"),
    ("a sequence of none", set_index(sequences=[1]), "sequence 0 in the index has no"),
    ("a name of none", set_sequence(name=1), "sequence 0 in the index has no name of type str"),
    ("no run", set_sequence(run=99), "sequence 0 in the index has the run 99, expected"),
    ("no salt", set_sequence(run=-99), "sequence 0 in the index has the run -99, expected"),
    ("another prompt", set_sequence(checksum="0" * 32), "blocks that are not there, or another prompt"),
    ("more than the run has", set_sequence(num_tokens=402, num_known=100), "blocks that are not there"),
    ("more known than needed", set_sequence(num_known=5), "the num_known 5, expected"),
    ("too many cached", set_sequence(num_cached=99), "the num_cached 99, expected 0 to"),
    ("a large block_size", set_index(block_size=2**31 - 1), "the tensor|num_known"),
    ("no version", set_index(version="1"), "no version of type int"),
    ("no checksum", set_index(checksum=0), "no checksum of type str"),
    ("layers in floats", set_index(num_layers=2.0), "the index has the num_layers 2.0"),
    ("heads in bools", set_index(num_kv_heads=True), "the index has the num_kv_heads True"),
    ("a fingerprint of none", set_index(fingerprint=0), "the index has the fingerprint 0"),
    *(
        (f"{name} {number}", set_sequence(**{name: number}), "sequence 0 in the|the tensor prompts|no JSON")
        for name in ("run", "num_known", "num_tokens", "num_cached", "prompt")
        for number in NUMBERS
        if (name, number) != ("run", -1)
    ),
    *(
        (f"{name} {number}", set_index(**{name: number}), "the index has|the tensor|num_known")
        for name in ("block_size", "num_runs", "num_blocks")
        for number in [*NUMBERS, 0, 2**62]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("forge", "match"), [pytest.param(f, m, id=name) for name, f, m in FORGERIES])
def test_forgeries(judge, forge, match):
    index, tensors = unpack(judge.path)
    forge(index, tensors)
    pack(judge.path, index, tensors, rehash=index["checksum"] != 0)
    changed = judge.path.read_bytes()
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError, match=match):
            KVCacheManager.load(judge.cache, judge.path)
        with suppress(DamagedFileError):
            KVCacheManager.load(judge.cache, judge.path, salvage=True)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    judge(changed, True)  # whatever is there then is right


def header_of(text: bytes, claimed: int | None = None) -> bytes:
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text


def entry(**fields: Any) -> Callable[[Any], None]:
    return lambda header: header["runs"].update(fields)


def offsets(name: str, forge: Callable[[int, int], Any]) -> Callable[[Any], None]:
    """Other offsets of a tensor, made from the right ones."""
    return lambda header: header[name].update(data_offsets=forge(*header[name]["data_offsets"]))


HEADERS: list[tuple[str, Callable[[Any], None]]] = [
    ("offsets that overlap", offsets("order", lambda begin, end: [0, end - begin])),
    ("blocks that overlap", offsets("blocks", lambda begin, end: [begin - 8, end - 8])),
    ("blocks past the end", offsets("blocks", lambda begin, end: [begin + 2**40, end + 2**40])),
    ("blocks at a huge offset", offsets("blocks", lambda begin, end: [begin + 2**64, end + 2**64])),
    ("offsets past the end", offsets("runs", lambda begin, end: [begin + 2**40, end + 2**40])),
    ("huge offsets", offsets("runs", lambda begin, end: [begin + 2**64, end + 2**64])),
    ("negative offsets", offsets("runs", lambda begin, end: [begin - end, 0])),
    ("offsets backwards", offsets("runs", lambda begin, end: [end, begin])),
    ("too short", offsets("runs", lambda begin, end: [begin, end - 8])),
    ("float offsets", offsets("runs", lambda begin, end: [float(begin), float(end)])),
    ("offsets of bools", offsets("runs", lambda begin, end: [False, end])),
    ("three offsets", offsets("runs", lambda begin, end: [begin, end, end])),
    ("no offsets", offsets("runs", lambda begin, end: None)),
    ("a giant shape", entry(shape=[2**40, 2])),
    ("a shape that overflows", entry(shape=[2**62, 4])),
    ("a negative shape", entry(shape=[-7, -2])),
    ("no shape", entry(shape=7)),
    ("another dtype", entry(dtype="F32")),
    ("no dtype", entry(dtype=None)),
    ("no tensor", lambda header: header.update(runs=1)),
    ("no metadata", lambda header: header.pop("__metadata__")),
    ("metadata of a list", lambda header: header.update(__metadata__=[])),
    ("no index", lambda header: header["__metadata__"].pop("index")),
    ("an index of none", lambda header: header["__metadata__"].update(index=1)),
    ("another checksum", lambda header: header["__metadata__"].update(checksum="")),
    ("surrogates", lambda header: header["__metadata__"].update(index="\ud800")),
]


@pytest.mark.parametrize("forge", [pytest.param(forge, id=name) for name, forge in HEADERS])
def test_forged_headers(judge, forge):
    header = json.loads(judge.whole[8 : judge.data])
    forge(header)
    changed = header_of(json.dumps(header).encode()) + judge.whole[judge.data :]
    assert judge(changed, False) is None
    state = judge(changed, True)
    if forge in [forge for _, forge in HEADERS[1:4]]:  # then no block is whole
        assert (*map(len, state),) == (0, 0, 1)  # but a sequence needs none
    else:
        assert state is None or forge is HEADERS[0][1]  # where the order is read elsewhere


def test_a_name_that_comes_twice(judge):
    """Readers do not agree on which of the two counts."""
    header = judge.whole[8 : judge.data].decode()
    text = json.loads(header)["__metadata__"]["index"]
    twice = text.replace("{", '{"version": 2, ', 1)
    checksum = xxhash.xxh3_128(twice.encode()).hexdigest()
    fields = {**json.loads(header), "__metadata__": {"index": twice, "checksum": checksum}}
    for forged in (header.replace("{", '{"runs": 1, ', 1), json.dumps(fields)):
        judge.path.write_bytes(header_of(forged.encode()) + judge.whole[judge.data :])
        with pytest.raises(DamagedFileError, match="is no JSON: a name comes twice"):
            KVCacheManager.load(judge.cache, judge.path, salvage=True)


def test_giant_claims(judge):
    """By an index and a header that agree with each other."""
    header = json.loads(judge.whole[8 : judge.data])
    index = json.loads(header["__metadata__"]["index"])
    for name, number in [("num_blocks", 2**40), ("num_runs", 2**40), ("num_blocks", 2**61), ("block_size", 2**30)]:
        forged = {
            **index,
            name: number,
            "sequences": [{**s, "num_tokens": 0, "num_known": 0} for s in index["sequences"]],
        }
        size, num_blocks, num_runs = forged["block_size"], forged["num_blocks"], forged["num_runs"]
        shapes = {
            "runs": [num_runs, 2], "order": [num_runs], "tokens": [num_blocks, size],
            "prompts": header["prompts"]["shape"], "digests": [num_blocks, 16],
            "blocks": [num_blocks, 2 * NUM_LAYERS * ROW * size],
        }  # fmt: skip
        text, end = json.dumps(forged), 0
        entries: dict[str, Any] = {
            "__metadata__": {"index": text, "checksum": xxhash.xxh3_128(text.encode()).hexdigest()}
        }
        for tensor, shape in shapes.items():
            begin, end = end, end + int(np.prod(shape, dtype=object)) * (1 if tensor in ("digests", "blocks") else 4)
            kind = "U8" if tensor in ("digests", "blocks") else "I32"
            entries[tensor] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
        judge.path.write_bytes(header_of(json.dumps(entries).encode()) + judge.whole[judge.data :])
        for salvage in (False, True):
            tracemalloc.start()
            with pytest.raises(DamagedFileError, match="safetensors" if not salvage else "ends within the tensor"):
                KVCacheManager.load(judge.cache, judge.path, salvage=salvage)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 1_000_000


def index_of(text: str) -> bytes:
    """A file with an index that has its checksum."""
    checksum = xxhash.xxh3_128(text.encode()).hexdigest()
    return header_of(json.dumps({"__metadata__": {"index": text, "checksum": checksum}}).encode())


BYTES = {
    "nothing": b"",
    "seven bytes": b"\x02" + bytes(6),
    "no header": bytes(8),
    "a huge header": header_of(b"{}", 2**63),
    "a header past the end": header_of(b"{}", 3),
    "no JSON": header_of(b"{]"),
    "no object": header_of(b"[]"),
    "no text": header_of(b'"\xff"'),
    "a deep header": header_of(b'{"a":' * 100_000),
    "a deep list": header_of(b'{"__metadata__":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "a number of many digits": header_of(b'{"__metadata__":' + b"9" * 5000 + b"}"),
    "a name twice": header_of(b'{"__metadata__":{},"__metadata__":{}}'),
    "metadata alone": header_of(b'{"__metadata__":{}}'),
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "a deep index": index_of("[" * 100_000),
    "an index of many digits": index_of("9" * 5000),
    "an index of a list": index_of("[]"),
    "an index with a name twice": index_of('{"format":1,"format":1}'),
    "an empty index": index_of("{}"),
    "an index that ends": index_of("{"),
}


@pytest.mark.parametrize("salvage", [False, True])
@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_file(host, tmp_path, name, salvage):
    path = tmp_path / "cache"
    path.write_bytes(BYTES[name])
    cache = sample(host).cache
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError):
            KVCacheManager.load(LayeredPagedKVCache(1, 1, 1, 1, 1, cache[0].dtype, "cpu"), path, salvage=salvage)
        assert tracemalloc.get_traced_memory()[1] < 30 * (len(BYTES[name]) + 10_000)
    finally:
        tracemalloc.stop()


def test_files_larger_than_memory(host, tmp_path, monkeypatch):
    """A file of 32 MB goes through a megabyte or two."""
    monkeypatch.setattr(files, "CHUNK", 1 << 18)
    make = lambda: LayeredPagedKVCache(4, 260, 16, 4, 128, "float32", "cpu")  # noqa: E731
    caches = [make(), make(), LayeredPagedKVCache(4, 600, 7, 4, 128, "float32", "cpu")]
    manager = KVCacheManager(caches[0])
    for i in range(4):
        sequence = manager.add([i] * 1000, name=f"{i}")
        manager.commit(manager.prepare({sequence: sequence.remaining}))
    tracemalloc.start()
    try:
        manager.save(tmp_path / "cache")
        for cache in caches[1:]:
            assert len(KVCacheManager.load(cache, tmp_path / "cache").named) == 4
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = (tmp_path / "cache").stat().st_size
    assert size > 32e6
    assert peak < size / 10


def test_a_long_chain_is_loaded_in_no_more_than_its_length(host, tmp_path, monkeypatch):
    """Each block is read once, and no K or V of those before it."""
    served = Served(host, 300, 4)
    stem = [*range(800)]
    for end in range(8, 800, 16):  # a prompt parts from the stem every four blocks
        manager = served.manager
        for tokens in (stem[:end], [*stem[:end], *[-end] * 4]):
            sequence = manager.add(tokens)
            manager.commit(manager.prepare({sequence: sequence.remaining}))
            manager.free(sequence)
    manager.save(tmp_path / "cache")
    cache = LayeredPagedKVCache(NUM_LAYERS, 300, 4, 1, ROW, "uint8", "cpu")
    reads = []
    read = files._Reader.read
    files._Reader.read = lambda self, places: reads.append(len(places)) or read(self, places)
    try:
        KVCacheManager.load(cache, tmp_path / "cache")
    finally:
        files._Reader.read = read
    assert sum(reads) == manager.stats().cached_blocks == len(unpack(tmp_path / "cache")[1]["blocks"]) > 200

    damage(tmp_path / "cache", -manager.stats().cached_blocks * 2 * NUM_LAYERS * 4 * ROW)  # the first block of all
    num_bytes = []
    into = files._read_into
    monkeypatch.setattr(files, "_read_into", lambda out, *rest: num_bytes.append(out.nbytes) or into(out, *rest))
    assert KVCacheManager.load(cache, tmp_path / "cache", salvage=True).stats().cached_blocks == 0
    assert sum(num_bytes) < (tmp_path / "cache").stat().st_size


def test_bars_are_for_terminals(host, tmp_path, capfd):
    served = sample(host)
    served.manager.save(tmp_path / "cache")
    load(served, tmp_path / "cache")
    assert capfd.readouterr() == ("", "")


# Both tiers


def of_both_tiers(device: Any) -> Served:
    """Prompts that went to the host, some in part, and sequences that are parked, that run, and that found something
    there."""
    served = Served(device, 12, 4, host_blocks=50)
    for i in range(9):
        served.free(run(served, None, [*range(8), *[i] * 14], "salt" if i % 3 else None))
    for i, length in enumerate((16, 18, 5)):
        parked = run(served, f"parked {i}", [*range(8), *[20 + i] * length])
        served.offload(parked)
    served.truncate(served.manager.named["parked 0"], 10)  # within a block that is found
    run(served, "runs", [*range(8), 30, 30])
    served.add([*range(8), *[0] * 14], name="has found")
    stats = served.manager.stats()
    assert min(stats.cached_host_blocks, stats.live_host_blocks, stats.cached_blocks, stats.live_blocks) > 0
    return served


def lines(served: Served) -> list[Any]:
    """What is lost, in order."""
    return sorted([*served.findable.cached_on_host, *in_line(served)], key=served.findable.used.__getitem__)


@pytest.mark.parametrize(("num_blocks", "host_blocks"), [(12, 50), (12, 40), (8, 60), (100, 0), (100, 30)])
def test_both_tiers_are_saved_and_loaded(device, tmp_path, num_blocks, host_blocks):
    served = of_both_tiers(device)
    before = served.state()
    served.manager.save(tmp_path / "kv")
    assert served.state() == before
    cache = LayeredPagedKVCache(NUM_LAYERS, num_blocks, 4, 1, ROW, "uint8", device.of_caches)
    manager = KVCacheManager.load(cache, tmp_path / "kv", host_blocks=host_blocks)
    manager.check_integrity()
    assert found(manager).keys() == found(served.manager).keys()
    assert np.array_equal(kv_of(manager, device), kv_of(served.manager, device))
    stats = manager.stats()
    assert (stats.evictions, stats.offloaded, stats.restored, stats.prompts, stats.tokens_saved) == (0,) * 5
    for name, sequence in manager.named.items():
        saved = served.manager.named[name]
        is_parked = name.startswith("parked") and host_blocks > 0
        assert (sequence.num_host_blocks == len(sequence.block_table)) is is_parked, name
        expected = served.expected[saved]
        assert (sequence.num_tokens, sequence.remaining.tolist()) == (saved.num_tokens, saved.remaining.tolist())
        with manager.prepare({sequence: []}):
            rows = rows_of(expected.salt, expected.tokens)
            table = sequence.block_table[None]
            for got, wanted in zip(cache.gather_all(table, [sequence.num_tokens]), rows, strict=True):
                assert np.array_equal(device.numpy(got), wanted), name
        if is_parked:
            sequence.offload()
    if num_blocks == 100:
        keys = {block: key for key, block in found(manager).items()}
        order = [keys[block] for run in manager._pool._line for block in reversed(run.blocks)]
        ours = {key for sequence in served.manager.named.values() for key in served.expected[sequence].keys}
        assert [key for key in order if key not in ours] == [key for key in lines(served) if key not in ours]


def kv_of(manager: KVCacheManager, device: Any) -> np.ndarray:
    """The bytes of all that is found, in the order of its tokens, wherever it is."""
    cache = manager._cache
    pools = np.stack([[device.numpy(pool) for pool in (layer.k_cache, layer.v_cache)] for layer in cache])
    rows = []
    for _, block in sorted(found(manager).items(), key=lambda item: (str(item[0][0]), item[0][1])):
        if block < cache.num_blocks:
            rows.append(pools[:, :, block].swapaxes(0, 1).tobytes())
        else:
            rows.append(manager._mover.read(np.array([block], np.int32)).tobytes())
    return np.array(rows)


def test_both_tiers_have_no_room(host, tmp_path):
    served = of_both_tiers(host)
    served.manager.save(tmp_path / "kv")
    for num_blocks, host_blocks, where in ((12, 20, " and 20 on the host"), (30, 0, "")):
        cache = LayeredPagedKVCache(NUM_LAYERS, num_blocks, 4, 1, ROW, "uint8", "cpu")
        with pytest.raises(ValueError, match=f"the cache with {num_blocks} of 4{where} has no room for them"):
            KVCacheManager.load(cache, tmp_path / "kv", host_blocks=host_blocks)
    larger = LayeredPagedKVCache(NUM_LAYERS, 14, 2, 1, ROW, "uint8", "cpu")
    with pytest.raises(ValueError, match="the cache with 14 of 2 and 40 on the host has no room for them"):
        KVCacheManager.load(larger, tmp_path / "kv", host_blocks=40)


def test_a_prefix_that_stayed_in_use_is_loaded_again(host, tmp_path):
    """Into a pool and host memory of the same sizes, both full; and it is the last to be lost."""
    served = Served(host, 4, 1, host_blocks=4)
    prompt = served.add([1, 2, 9])
    served.append(prompt, [1, 2, 9])
    for token in range(10, 16):
        served.free(served.run([token]))
    served.free(served.run([1, 2, 4]))
    served.truncate(prompt, 2)
    served.free(prompt)
    served.manager.save(tmp_path / "kv")
    cache = LayeredPagedKVCache(NUM_LAYERS, 4, 1, 1, ROW, "uint8", "cpu")
    manager = KVCacheManager.load(cache, tmp_path / "kv", host_blocks=4)
    manager.check_integrity()
    for token in range(100, 105):
        with manager.add([token]) as sequence:
            manager.commit(manager.prepare({sequence: [token]}))
    assert manager.add([1, 2, 0]).num_cached_tokens == 2


def test_a_file_keeps_its_permissions(host, tmp_path):
    served = Served(host, 4, 4)
    served.free(served.run(range(8)))
    served.manager.save(tmp_path / "kv")
    (tmp_path / "kv").chmod(0o600)
    served.manager.save(tmp_path / "kv")
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o600


def test_there_is_no_folder(host, tmp_path):
    path = tmp_path / "nowhere" / "kv"
    with pytest.raises(FileNotFoundError, match=f"there is no folder for: '{path}'"):
        Served(host, 4, 4).manager.save(path)
