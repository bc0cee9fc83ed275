"""Arrays of other libraries, by DLPack: views, never copies; results of their kind; errors that name the way out."""

import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_pagedkv import (
    BlockAllocator,
    KVCacheManager,
    LayeredPagedKVCache,
    PagedKVCache,
    attention_buffers,
    copy_blocks,
    gather_cache,
    merge_attention_states,
    paged_attention,
    reshape_and_cache,
)
from cupy_pagedkv.devices.dlpack import array_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Foreign:
    """An array of a library that NumPy knows nothing of but DLPack."""

    def __init__(self, array: np.ndarray, device_type: int = 1) -> None:
        self._array, self._device_type = array, device_type
        self.dtype = array.dtype

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device_type, 0

    def __array_namespace__(self) -> Any:
        return Foreign

    @staticmethod
    def from_dlpack(array: np.ndarray) -> "Foreign":
        return Foreign(np.from_dlpack(array))


def of(array: Any) -> np.ndarray:
    """What a foreign array holds."""
    assert type(array) is Foreign
    return array._array


@pytest.fixture
def pools(rng):
    return rng.standard_normal((2, 6, 4, 2, 16)).astype(np.float32)


def test_copies(rng, pools):
    key, value = rng.standard_normal((2, 3, 2, 16)).astype(np.float32)
    expected = pools.copy()
    slots = np.array([5, -1, 20])
    reshape_and_cache(key, value, *expected, slots)
    reshape_and_cache(*map(Foreign, (key, value, *pools, slots)))
    assert np.array_equal(pools, expected)

    tables, lens, starts = np.array([[1, 5]]), np.array([6]), np.array([1])
    for gathered in (
        gather_cache(*map(Foreign, (*pools, tables, lens)), seq_starts=Foreign(starts)),
        gather_cache(Foreign(pools[0]), Foreign(pools[1]), [[1, 5]], [6], seq_starts=[1]),
    ):
        for got, wanted in zip(gathered, gather_cache(*pools, tables, lens, seq_starts=starts), strict=True):
            assert np.array_equal(of(got), wanted)
    memory = np.zeros((2, 5, 2, 16), np.float32)
    out = Foreign(memory[0]), Foreign(memory[1])
    assert gather_cache(*pools, tables, lens, seq_starts=starts, out=out) is out
    assert np.array_equal(memory, np.stack(gather_cache(*pools, tables, lens, seq_starts=starts)))

    copy_blocks(*map(Foreign, (*pools, np.array([1]), np.array([2]))))
    assert np.array_equal(pools[:, 1], pools[:, 2])


def test_attention(rng, pools):
    query = rng.standard_normal((5, 4, 16)).astype(np.float32)
    tables, lens, ends = np.array([[1, 5], [2, 0]]), np.array([6, 3]), np.array([0, 4, 5])
    slopes, sinks = np.array([0.1, 0.2, 0.3, 0.4], np.float32), np.array([1, 2, 3, 4], np.float32)
    plain = {"alibi_slopes": slopes, "sinks": sinks}
    foreign = {name: Foreign(array) for name, array in plain.items()}
    wanted = paged_attention(query, *pools, tables, lens, ends, return_lse=True, **plain)
    arguments = tuple(map(Foreign, (query, *pools, tables, lens, ends)))
    got = paged_attention(*arguments, return_lse=True, **foreign)
    assert all(np.array_equal(of(a), b) for a, b in zip(got, wanted, strict=True))
    assert np.array_equal(of(paged_attention(*arguments, **foreign)), wanted[0])
    for out in (Foreign(np.zeros_like(query)), attention_buffers(*arguments[:4])):
        result, lse = paged_attention(*arguments, return_lse=True, out=out, **foreign)
        assert result is (out if isinstance(out, Foreign) else out.out)
        assert isinstance(out, Foreign) or lse is out.lse
        assert np.array_equal(of(result), wanted[0])
        assert np.array_equal(of(lse), wanted[1])
    assert paged_attention(*arguments, out=out, **foreign) is out.out

    merged = merge_attention_states(*map(Foreign, wanted + wanted))
    assert all(np.array_equal(of(a), b) for a, b in zip(merged, merge_attention_states(*wanted, *wanted), strict=True))


def test_what_is_ours_comes_back_as_ours(pools):
    query = np.ones((1, 2, 16), np.float32)
    assert type(paged_attention(query, Foreign(pools[0]), Foreign(pools[1]), [[0]], [3])) is np.ndarray
    assert type(of(paged_attention(Foreign(query), *pools, [[0]], [3]))) is np.ndarray


def test_caches_and_managers(rng, pools):
    cache = PagedKVCache.from_pools(Foreign(pools[0]), Foreign(pools[1]))
    key = rng.standard_normal((1, 2, 16)).astype(np.float32)
    cache.update(Foreign(key), Foreign(key), Foreign(np.array([3], np.int32)))
    assert np.array_equal(pools[:, 0, 3], np.stack([key[0]] * 2))
    assert type(cache.k_cache) is np.ndarray
    assert of(cache.attend(Foreign(key), [[0]], [4])).shape == (1, 2, 16)

    layered = LayeredPagedKVCache(1, 8, 4, 2, 16, "float32", "cpu")
    layered.update_all(Foreign(key[None]), Foreign(key[None]), [0])
    assert np.array_equal(layered.gather_all(Foreign(np.array([[0]])), Foreign(np.array([1])))[0][0], key)
    manager = KVCacheManager(LayeredPagedKVCache(1, 8, 4, 2, 16, "float32", "cpu"))
    with manager.add(Foreign(np.arange(9))) as sequence:
        manager.commit(manager.prepare({sequence: Foreign(np.arange(9))}))
    assert manager.add(Foreign(np.arange(9, dtype=np.int32))).num_cached_tokens == 8
    with pytest.raises(TypeError, match="tokens must be whole numbers on one axis, got float64"):
        manager.add(Foreign(np.arange(9.0)))


def test_strides_of_any_sign(rng, pools):
    key = rng.standard_normal((4, 2, 16)).astype(np.float32)
    expected, slots = pools.copy(), np.array([7, 5, 3, 0])[::-1]
    reshape_and_cache(key[::-1], key[:, ::-1], expected[0, ::-1], expected[1], slots)
    reshape_and_cache(*map(Foreign, (key[::-1], key[:, ::-1], pools[0, ::-1], pools[1], slots)))
    assert np.array_equal(pools, expected)


def test_read_only_arrays_are_read_and_not_written(rng, pools):
    key = rng.standard_normal((1, 2, 16)).astype(np.float32)
    key.flags.writeable = False
    reshape_and_cache(Foreign(key), Foreign(key), *pools, [3])
    assert np.array_equal(pools[:, 0, 3], np.stack([key[0]] * 2))
    before = pools.copy()
    pools.flags.writeable = False
    query = np.ones((1, 2, 16), np.float32)
    for call in (
        lambda: reshape_and_cache(key, key, Foreign(pools[0]), Foreign(pools[1]), [3]),
        lambda: copy_blocks(Foreign(pools[0]), Foreign(pools[1]), [0], [1]),
        lambda: gather_cache(*pools, [[0]], [1], out=(Foreign(key), Foreign(key))),
        lambda: paged_attention(query, *pools, [[0]], [1], out=Foreign(key)),
    ):
        with pytest.raises(ValueError, match="must be writeable, got a read-only array"):
            call()
    assert np.array_equal(pools, before)


def test_memory_lives_as_long_as_it_is_looked_at():
    memory = np.arange(24, dtype=np.float32)
    alive = weakref.ref(memory)
    view = array_of("key", Foreign(memory))
    del memory
    gc.collect()
    assert alive() is not None
    assert view[23] == 23
    del view
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("device_type", "message"),
    [(8, "device type 8"), (10, "device type 10"), (2, "No module named .cupy.|CUDA|cuda|driver|stream")],
)
def test_memory_elsewhere_is_refused(pools, device_type, message):
    """Metal's, ROCm's; and CUDA's, where an array of the host only says that it is there."""
    key = np.ones((1, 2, 16), np.float32)
    with pytest.raises(TypeError, match=f"value, of type Foreign, cannot be shared by DLPack: .*({message})"):
        reshape_and_cache(key, Foreign(key, device_type), *pools, [0])
    with pytest.raises(TypeError, match="give a dense array in the memory of the CPU or of a CUDA GPU"):
        paged_attention(key, *pools, Foreign(np.array([[0]]), 8), [1])


def test_indices_of_a_library_without_dtypes(pools):
    """As PyArrow's arrays have none."""

    class Bare:
        def __init__(self, array: np.ndarray) -> None:
            self._array = array

        def __dlpack__(self, **kwargs: Any) -> Any:
            return self._array.__dlpack__(**kwargs)

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    key = np.ones((1, 2, 16), np.float32)
    reshape_and_cache(key, key, *pools, Bare(np.array([3])))
    assert (pools[:, 0, 3] == 1).all()


def test_what_does_not_speak_dlpack_is_refused(pools):
    with pytest.raises(TypeError, match="key must be a NumPy or CuPy array, or speak DLPack, got list"):
        reshape_and_cache([[1.0]], np.ones((1, 2, 16), np.float32), *pools, [0])


# PyTorch


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pytorch(rng, torch, dtype):
    kind = getattr(torch, dtype)
    pools = torch.zeros(2, 6, 4, 2, 16, dtype=kind)
    key = torch.from_numpy(rng.standard_normal((5, 4, 16)).astype(np.float32)).to(kind)[:, ::2]
    slots = torch.tensor([3, 4, 5, -1, 23])
    cache = PagedKVCache.from_pools(pools[0], pools[1])
    assert cache.dtype.name == dtype
    cache.update(key, key, slots)
    flat = pools.flatten(1, 2)
    written = [(i, slot) for i, slot in enumerate(slots.tolist()) if slot >= 0]
    assert all(torch.equal(flat[tensor, slot], key[i]) for tensor in (0, 1) for i, slot in written)
    assert int(torch.count_nonzero(pools.float().abs().amax((-1, -2)))) == 2 * 4

    gathered, _ = gather_cache(pools[0], pools[1], torch.tensor([[0, 1]]), torch.tensor([6]), seq_starts=[3])
    assert torch.equal(gathered, key[:3])
    assert gathered.dtype is kind
    query = torch.ones(1, 4, 16, dtype=kind)
    result, lse = cache.attend(query, torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([6]), return_lse=True)
    assert (result.dtype, tuple(result.shape), lse.dtype) == (kind, (1, 4, 16), torch.float32)
    out = torch.zeros(1, 4, 16, dtype=kind)
    assert cache.attend(query, [[0, 1]], [6], out=out) is out
    assert torch.equal(out, result)
    assert torch.equal(merge_attention_states(result, lse, result, lse)[0], out)
    buffers = attention_buffers(query, pools[0], pools[1], [[0, 1]])
    assert torch.equal(cache.attend(query, [[0, 1]], [6], out=buffers), result)
    assert buffers.out.dtype is kind


def test_pytorch_float8_moves_as_bytes(torch):
    for name in ("float8_e4m3fn", "float8_e5m2"):
        tokens = torch.arange(32, dtype=torch.uint8).view(getattr(torch, name)).view(1, 2, 16)
        pool = torch.zeros(6, 4, 2, 16, dtype=torch.uint8).view(getattr(torch, name))
        reshape_and_cache(tokens, tokens, pool, pool.clone(), [5])
        assert pool[1, 1].view(torch.uint8).flatten().tolist() == list(range(32))
        assert gather_cache(pool, pool, [[1]], [2])[0].dtype is getattr(torch, name)


def test_a_subclass_of_pytorchs_tensor(torch, pools):
    class Parameter(torch.Tensor):
        pass

    query = torch.ones(1, 2, 16).as_subclass(Parameter)
    assert isinstance(paged_attention(query, *pools, [[0]], [3]), torch.Tensor)
    half = torch.zeros(2, 6, 4, 2, 16, dtype=torch.bfloat16)
    result = paged_attention(query.to(torch.bfloat16), half[0], half[1], [[0]], [3])
    assert result.dtype is torch.bfloat16


def test_pytorch_tokens_and_blocks(torch):
    manager = KVCacheManager(LayeredPagedKVCache(1, 8, 4, 2, 16, "float32", "cpu"))
    sequence = manager.add(torch.arange(9))
    manager.commit(manager.prepare({sequence: torch.arange(9)}))
    assert manager.add(torch.arange(9, dtype=torch.int32)).num_cached_tokens == 8
    allocator = BlockAllocator(4, 16)
    allocator.allocate(4)
    allocator.free(torch.tensor([2, 3]))
    assert allocator.free_block_count == 2


def test_pytorch_tensors_that_cannot_be_shared(torch, pools):
    key = torch.ones(1, 2, 16)
    for bad, message in (
        (torch.ones(1, 2, 16, requires_grad=True), r"gradients of key are wanted, .*; give key.detach\(\)"),
        (torch.ones(1, 2, 16, dtype=torch.complex64).conj().imag, r"negative .*; give key.resolve_neg\(\)"),
        (key.to_sparse(), "key, of type Tensor, cannot be shared by DLPack: .*give a dense array"),
        (key.to("meta"), "key, of type Tensor, cannot be shared by DLPack: .*meta"),
        (torch.ones(1, 2, 16, dtype=torch.complex64).conj(), "cannot be shared by DLPack: .*conjugate"),
    ):
        with pytest.raises(TypeError, match=message):
            reshape_and_cache(bad, key, *pools, [0])
    assert np.isfinite(pools).all()


# JAX


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax(rng, dtype):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    host = rng.standard_normal((3, 2, 16)).astype(kind)
    pools = np.zeros((2, 6, 4, 2, 16), kind)
    key = jax.numpy.asarray(host)
    reshape_and_cache(key, key, *pools, jax.numpy.asarray([0, 1, 2], dtype="int32"))
    assert pools[1].reshape(-1)[: host.size].tobytes() == host.tobytes()
    result = paged_attention(jax.numpy.asarray(host[:1]), *pools, [[0]], [3])
    assert isinstance(result, jax.Array)
    assert np.asarray(result).tobytes() == paged_attention(host[:1], *pools, [[0]], [3]).tobytes()
    with pytest.raises(ValueError, match="out must be writeable, got a read-only array"):
        paged_attention(host[:1], *pools, [[0]], [3], out=jax.numpy.asarray(host[:1]))
