"""A paged KV cache for CuPy, and for NumPy where there is no GPU.

>>> import numpy as np
>>> from cupy_pagedkv import BlockAllocator, LayeredPagedKVCache
>>> allocator = BlockAllocator(num_blocks=64, block_size=16)
>>> cache = LayeredPagedKVCache(
...     num_layers=2, num_blocks=64, block_size=16, num_kv_heads=4, head_dim=32, dtype="float16", device="cpu"
... )
>>> cache.allocate_blocks(20, allocator)
>>> slots = cache.compute_slot_mapping(start=0, count=20)
>>> key = value = np.ones((20, 4, 32), np.float16)
>>> for layer in cache:
...     layer.update(key, value, slots)
>>> cache.set_seq_len(20)
>>> k, v = cache[1].gather([cache.block_table_device_format(1)], [cache.seq_len])
>>> k.shape
(20, 4, 32)

Data flows one way, from floor to floor: ``caches`` → ``operations`` (all checks) → ``devices`` (the choice of one) →
``kernels/*.cu``, with ``bookkeeping`` below them all. ``ARCHITECTURE.md`` draws it.
"""

from .bookkeeping.allocator import BlockAllocator, BlockAllocatorStats, OutOfBlocksError
from .bookkeeping.table import BlockTable
from .caches.batch import Batch, BatchBuffers, CSRTables
from .caches.cache import LayeredPagedKVCache, PagedKVCache
from .caches.files import DamagedFileError
from .caches.manager import KVCacheManager, KVCacheStats
from .caches.sequence import CachedSequence
from .operations.attention import AttentionBuffers, attention_buffers, merge_attention_states, paged_attention
from .operations.copies import copy_blocks, gather_cache, reshape_and_cache

__all__ = [
    "AttentionBuffers",
    "Batch",
    "BatchBuffers",
    "BlockAllocator",
    "BlockAllocatorStats",
    "BlockTable",
    "CSRTables",
    "CachedSequence",
    "DamagedFileError",
    "KVCacheManager",
    "KVCacheStats",
    "LayeredPagedKVCache",
    "OutOfBlocksError",
    "PagedKVCache",
    "attention_buffers",
    "copy_blocks",
    "gather_cache",
    "merge_attention_states",
    "paged_attention",
    "reshape_and_cache",
]
