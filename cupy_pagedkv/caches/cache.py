"""The pools of one attention layer, and of a whole model over one block table."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bookkeeping.allocator import BlockAllocator
from ..bookkeeping.arguments import at_least, block_ids
from ..bookkeeping.dtypes import as_dtype
from ..bookkeeping.table import BlockTable
from ..devices.backend import backend_of, backend_on
from ..devices.dlpack import arrays_of
from ..devices.layout import pools_of
from ..operations.arguments import Array, IndexArray
from ..operations.attention import AttentionBuffers, paged_attention
from ..operations.copies import copy_blocks, gather_cache, scatter

__all__ = ["LayeredPagedKVCache", "PagedKVCache"]


class PagedKVCache:
    """K and V of one attention layer in ``num_blocks`` blocks of ``block_size`` tokens, zero-filled.

    >>> import numpy as np
    >>> cache = PagedKVCache(num_blocks=4, block_size=8, num_heads=2, head_dim=4, dtype="float32", device="cpu")
    >>> key = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    >>> cache.update(key, -key, slot_mapping=[0, 1, 9])
    >>> cache.k_cache[1, 1, 0]
    array([16., 17., 18., 19.], dtype=float32)
    >>> k, v = cache.gather(block_tables=[[0]], seq_lens=[2])
    >>> k.shape, bool((v == -key[:2]).all())
    ((2, 2, 4), True)

    device
        ``None`` for a GPU where one is usable and NumPy otherwise, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    v_head_dim
        Of V, where it is not that of K.

    Raises ``ValueError`` for a size below 1, ``TypeError`` for a dtype whose items have no fixed size, and what
    asking for a GPU that is not there raises (``RuntimeError``, or ``ValueError`` for its number).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        head_dim: int,
        dtype: npt.DTypeLike,
        device: str | None = None,
        *,
        v_head_dim: int | None = None,
    ) -> None:
        shape = (
            at_least(1, "num_blocks", num_blocks),
            at_least(1, "block_size", block_size),
            at_least(1, "num_heads", num_heads),
        )
        k_dim = at_least(1, "head_dim", head_dim)
        v_dim = k_dim if v_head_dim is None else at_least(1, "v_head_dim", v_head_dim)
        dtype = as_dtype(dtype)
        backend, place = backend_on(device)
        self._k_cache = backend.zeros((*shape, k_dim), dtype, place)
        self._v_cache = backend.zeros((*shape, v_dim), dtype, place)

    @classmethod
    def from_pools(cls, k_cache: Array, v_cache: Array) -> "PagedKVCache":
        """A cache over pools that exist already and are not copied: ``[num_blocks, block_size, num_heads, head_dim]``
        of any strides with a contiguous last axis; NumPy's, CuPy's or, as views, of what speaks DLPack. Raises as
        :func:`~cupy_pagedkv.gather_cache` does.

        >>> import numpy as np
        >>> hnd = np.zeros((2, 4, 2, 8, 16), np.float16)  # [K and V, num_blocks, num_heads, block_size, head_dim]
        >>> PagedKVCache.from_pools(*hnd.transpose(0, 1, 3, 2, 4)).block_size
        8
        """
        k_cache, v_cache = arrays_of(("k_cache", "v_cache"), k_cache, v_cache)
        backend_of(("k_cache", "v_cache"), k_cache, v_cache)
        pools_of(k_cache, v_cache)
        if k_cache.ndim != 4:
            raise ValueError(f"pools of one layer have 4 axes, got k_cache of {k_cache.ndim}; take one layer of them")
        cache = cls.__new__(cls)
        cache._k_cache, cache._v_cache = k_cache, v_cache
        return cache

    @property
    def k_cache(self) -> Array:
        """The pool of keys, ``[num_blocks, block_size, num_heads, head_dim]``; writing to it writes to the cache."""
        return self._k_cache

    @property
    def v_cache(self) -> Array:
        """The pool of values, ``[num_blocks, block_size, num_heads, v_head_dim]``; not a copy, either."""
        return self._v_cache

    @property
    def num_blocks(self) -> int:
        """Blocks in each pool."""
        return int(self._k_cache.shape[0])

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return int(self._k_cache.shape[1])

    @property
    def num_heads(self) -> int:
        """Heads of K and V."""
        return int(self._k_cache.shape[2])

    @property
    def head_dim(self) -> int:
        """Elements of K in one head."""
        return int(self._k_cache.shape[3])

    @property
    def v_head_dim(self) -> int:
        """Elements of V in one head."""
        return int(self._v_cache.shape[3])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the elements of K."""
        return np.dtype(self._k_cache.dtype)

    @property
    def device(self) -> str:
        """Where the pools are: ``"cpu"``, ``"cuda:0"``, …"""
        return backend_of(("k_cache",), self._k_cache).device_name(self._k_cache)

    def __repr__(self) -> str:
        return (
            f"PagedKVCache(num_blocks={self.num_blocks}, block_size={self.block_size}, num_heads={self.num_heads}, "
            f"head_dim={self.head_dim}, v_head_dim={self.v_head_dim}, dtype={self.dtype}, device={self.device!r})"
        )

    def update(self, key: Array, value: Array, slot_mapping: IndexArray) -> None:
        """Write the K and V of new tokens to their slots: :func:`~cupy_pagedkv.reshape_and_cache` on these pools."""
        scatter(("key", "value"), key, value, self._k_cache, self._v_cache, slot_mapping)

    def gather(
        self,
        block_tables: IndexArray,
        seq_lens: IndexArray,
        *,
        seq_starts: IndexArray | None = None,
        out: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array]:
        """Copy sequences out, packed: :func:`~cupy_pagedkv.gather_cache` on these pools."""
        return gather_cache(self._k_cache, self._v_cache, block_tables, seq_lens, seq_starts=seq_starts, out=out)

    def attend(
        self,
        query: Array,
        block_tables: IndexArray,
        seq_lens: IndexArray,
        cu_seqlens_q: IndexArray | None = None,
        *,
        max_seqlen_q: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        sinks: Any = None,
        return_lse: bool = False,
        out: Array | AttentionBuffers | None = None,
    ) -> Any:
        """Attention of new tokens over these pools: :func:`~cupy_pagedkv.paged_attention`."""
        return paged_attention(
            query, self._k_cache, self._v_cache, block_tables, seq_lens, cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
            alibi_slopes=alibi_slopes, sinks=sinks, return_lse=return_lse, out=out,
        )  # fmt: skip

    def copy_blocks(self, src: IndexArray, dst: IndexArray) -> None:
        """Copy whole blocks onto others: :func:`~cupy_pagedkv.copy_blocks` on these pools."""
        copy_blocks(self._k_cache, self._v_cache, src, dst)


class LayeredPagedKVCache:
    """K and V of all layers of a model, for one sequence at a time.

    >>> import numpy as np
    >>> allocator = BlockAllocator(num_blocks=8, block_size=4)
    >>> cache = LayeredPagedKVCache(2, 8, 4, num_kv_heads=1, head_dim=2, dtype="float16", device="cpu")
    >>> cache.allocate_blocks(6, allocator)
    >>> slots = cache.compute_slot_mapping(cache.seq_len, 6)
    >>> key = value = np.ones((6, 1, 2), np.float16)
    >>> for layer in cache:
    ...     layer.update(key, value, slots)
    >>> cache.set_seq_len(6)
    >>> cache.block_table_device_format(0)
    array([0, 1], dtype=int32)

    A block holds the same tokens in every layer, so that there is one block table. The pools of all layers are one
    zero-filled allocation, ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]``. ``device`` and what is
    raised are as for :class:`PagedKVCache`.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: npt.DTypeLike,
        device: str | None = None,
    ) -> None:
        shape = (
            at_least(1, "num_layers", num_layers),
            2,
            at_least(1, "num_blocks", num_blocks),
            at_least(1, "block_size", block_size),
            at_least(1, "num_kv_heads", num_kv_heads),
            at_least(1, "head_dim", head_dim),
        )
        backend, place = backend_on(device)
        pools = backend.zeros(shape, as_dtype(dtype), place)
        self._k_caches, self._v_caches = pools[:, 0], pools[:, 1]
        self._layers = [PagedKVCache.from_pools(layer[0], layer[1]) for layer in pools]
        self._block_table = BlockTable(block_size)

    def layer(self, index: int) -> PagedKVCache:
        """One layer's cache; its pools are views. Raises ``IndexError`` past the last. Also ``cache[index]``."""
        return self._layers[index]

    def __getitem__(self, index: int) -> PagedKVCache:
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[PagedKVCache]:
        return iter(self._layers)

    def update_all(self, keys: Array, values: Array, slot_mapping: IndexArray) -> None:
        """Write the K and V of new tokens in every layer, in one launch.

        keys, values
            ``[num_layers, num_tokens, num_kv_heads, head_dim]``.

        Otherwise as :func:`~cupy_pagedkv.reshape_and_cache`.
        """
        scatter(("keys", "values"), keys, values, self._k_caches, self._v_caches, slot_mapping)

    def gather_all(
        self,
        block_tables: IndexArray,
        seq_lens: IndexArray,
        *,
        seq_starts: IndexArray | None = None,
        out: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array]:
        """Copy sequences out of every layer, packed, in one launch: ``(keys, values)``, each
        ``[num_layers, sum(seq_lens − seq_starts), num_kv_heads, head_dim]``.

        Otherwise as :func:`~cupy_pagedkv.gather_cache`; ``out`` has the axis of layers, too.

        >>> import numpy as np
        >>> cache = LayeredPagedKVCache(3, 4, 8, num_kv_heads=1, head_dim=2, dtype="float32", device="cpu")
        >>> keys = np.arange(3 * 5 * 2, dtype=np.float32).reshape(3, 5, 1, 2)
        >>> cache.update_all(keys, -keys, slot_mapping=[16, 17, 18, 19, 20])
        >>> gathered, _ = cache.gather_all(block_tables=[[2]], seq_lens=[5])
        >>> bool((gathered == keys).all())
        True
        """
        return gather_cache(self._k_caches, self._v_caches, block_tables, seq_lens, seq_starts=seq_starts, out=out)

    def copy_blocks(self, src: IndexArray, dst: IndexArray) -> None:
        """Copy whole blocks onto others, in every layer and in one launch: :func:`~cupy_pagedkv.copy_blocks`."""
        copy_blocks(self._k_caches, self._v_caches, src, dst)

    @property
    def num_layers(self) -> int:
        """Layers of the model; also ``len(cache)``."""
        return len(self._layers)

    @property
    def num_blocks(self) -> int:
        """Blocks in each pool."""
        return self._layers[0].num_blocks

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_table.block_size

    @property
    def seq_len(self) -> int:
        """Tokens of the sequence whose K and V are in the cache."""
        return self._block_table.num_tokens

    def set_seq_len(self, seq_len: int) -> None:
        """Say that the first ``seq_len`` tokens are in the cache. Raises ``ValueError`` if the blocks cannot hold so
        many."""
        self._block_table.set_num_tokens(seq_len)

    def block_table(self, index: int) -> BlockTable:
        """The sequence's block table, the same object for every layer. Raises ``IndexError`` past the last layer.

        It can be changed, but does not know the pool: blocks are checked by :meth:`set_blocks`, not by its own methods.
        """
        self._layers[index]
        return self._block_table

    def block_table_device_format(self, index: int) -> npt.NDArray[np.int32]:
        """The block ids as an int32 NumPy array of the caller's own, a row of ``block_tables``."""
        return self.block_table(index).to_device_format()

    def allocate_blocks(self, additional_tokens: int, allocator: BlockAllocator) -> None:
        """Make room for ``additional_tokens`` tokens past ``seq_len``; room that is there already is not taken twice.

        Raises :class:`~cupy_pagedkv.OutOfBlocksError` if the allocator has too few blocks, ``ValueError`` if its
        blocks are not those of this cache; then nothing has changed.
        """
        if allocator.block_size != self.block_size or allocator.total_blocks > self.num_blocks:
            raise ValueError(
                f"the allocator has {allocator.total_blocks} blocks of {allocator.block_size} tokens, "
                f"the cache {self.num_blocks} of {self.block_size}; make them alike"
            )
        needed = self._block_table.additional_blocks_needed(additional_tokens)
        if needed:
            self._block_table.append_blocks(allocator.allocate(needed))

    def compute_slot_mapping(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """The slots of positions ``start`` … ``start + count − 1``, int64 ``[count]``, the same for every layer.

        A NumPy array: on a GPU, copy it there once (``cupy.asarray``) and give that to every layer's ``update``.
        Raises ``IndexError`` if a position has no block yet, ``ValueError`` if ``start`` or ``count`` is negative.
        """
        return self._block_table.slots(start, count)

    def set_blocks(self, blocks: npt.ArrayLike) -> None:
        """Map the sequence to ``blocks``, ids ``[n]`` that hold its K and V already, such as a shared prefix.

        ``seq_len`` becomes 0; say with :meth:`set_seq_len` how many tokens are in them. The blocks mapped before are
        not freed. Raises ``ValueError`` for an id that is not in the pool, and then nothing has changed.
        """
        ids = block_ids(blocks, self.num_blocks)
        self._block_table.clear()
        self._block_table.append_blocks(ids)

    def reset(self) -> None:
        """Forget the sequence: no blocks, ``seq_len`` 0. Frees no block and clears no K or V."""
        self._block_table.clear()
