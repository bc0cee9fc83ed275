"""What the layers need to know of a batch: arrays where the cache is, all of them in one piece of memory."""

from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..bookkeeping.ranges import ranges
from ..bookkeeping.rows import NewTokens
from ..devices.backend import backend_of
from .sequence import CachedSequence

__all__ = ["Batch", "BatchBuffers", "CSRTables"]


class Manager(Protocol):
    """What a batch asks of the :class:`~cupy_pagedkv.KVCacheManager` that prepared it."""

    def commit(self, batch: "Batch") -> None: ...
    def rollback(self, batch: "Batch") -> None: ...


class BatchBuffers:
    """The arrays of a batch, where the cache is, with room for as much as :meth:`KVCacheManager.buffers` was asked for.

    Their addresses stay what they are, so that a CUDA graph that reads them can be replayed for each new batch.
    """

    slot_mapping: Any
    """int64 ``[num_tokens]``: where the K and V of each new token go; −1 behind the last."""
    positions: Any
    """int64 ``[num_tokens]``: the position of each new token in its sequence; 0 behind the last."""
    block_tables: Any
    """int32 ``[num_seqs, max_blocks]``: each sequence's blocks, and 0 behind the last, which may be of any other."""
    seq_lens: Any
    """int32 ``[num_seqs]``: tokens of each sequence, the new ones among them; 0 behind the last."""
    cu_seqlens: Any
    """int32 ``[num_seqs + 1]``: the new tokens of sequence i are those from ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``;
    their number behind the last."""

    def __init__(self, memory: Any, num_seqs: int, num_tokens: int, max_blocks: int, num_copies: int) -> None:
        """Views of ``memory``, of ``num_bytes(…)`` bytes, on whatever device it is."""
        self._memory = memory
        self._sizes = (num_seqs, num_tokens, max_blocks, num_copies)
        self._owner: Manager | None = None  # of buffers that users have
        self.positions, self.slot_mapping = memory[: 16 * num_tokens].view(np.int64).reshape(2, num_tokens)
        small = memory[16 * num_tokens :].view(np.int32)
        at = num_seqs * max_blocks
        self.block_tables = small[:at].reshape(num_seqs, max_blocks)
        self.seq_lens = small[at : at + num_seqs]
        self.cu_seqlens = small[at + num_seqs : at + 2 * num_seqs + 1]
        self._copies = small[at + 2 * num_seqs + 1 :].reshape(2, num_copies)  # blocks from and to

    @staticmethod
    def num_bytes(num_seqs: int, num_tokens: int, max_blocks: int, num_copies: int) -> int:
        """Bytes that all the arrays take."""
        return 16 * num_tokens + 4 * (num_seqs * max_blocks + 2 * num_seqs + 1 + 2 * num_copies)

    def _check_room(self, *wanted: int) -> None:
        for name, has, needs in zip(("num_seqs", "num_tokens", "max_blocks"), self._sizes, wanted, strict=False):
            if needs > has:
                raise ValueError(f"the batch needs {name} {needs}, but the buffers were made for {has}")

    def _fill(self, new: NewTokens, block_size: int) -> None:
        """Everything but the block tables, which are there already; where more is behind it, zeros are."""
        num_seqs, num_tokens = len(new.rows), len(new.tokens)
        self.positions[:num_tokens] = new.positions
        columns = new.positions // block_size  # and flat indices: half the time of divmod and of pairs of indices
        slots = self.slot_mapping[:num_tokens]
        slots[:] = self.block_tables.take(new.index * self.block_tables.shape[1] + columns)
        slots -= columns
        slots *= block_size
        slots += new.positions
        self.slot_mapping[num_tokens:] = -1
        self.seq_lens[:num_seqs] = new.ends
        self.cu_seqlens[:num_seqs] = new.first
        self.cu_seqlens[num_seqs:] = num_tokens


class CSRTables(NamedTuple):
    """Block tables as FlashInfer takes them: what :meth:`Batch.to_csr` returns. All int32, where the cache is."""

    kv_indptr: Any
    """``[num_seqs + 1]``: the blocks of sequence i are ``kv_indices[kv_indptr[i]:kv_indptr[i + 1]]``."""
    kv_indices: Any
    """``[kv_indptr[-1]]``: the blocks of all sequences, and no padding."""
    kv_last_page_len: Any
    """``[num_seqs]``: tokens in each sequence's last block; 0 where there is none."""


class Batch:
    """The next tokens of some sequences, with room for their K and V: what :meth:`KVCacheManager.prepare` returns.

    ``slot_mapping``, ``positions``, ``block_tables``, ``seq_lens`` and ``cu_seqlens`` are as in :class:`BatchBuffers`,
    where the cache is, of the sizes that the batch has, unless buffers were given. As a context manager it is committed
    at the end, or rolled back if an exception comes.
    """

    def __init__(
        self,
        manager: Manager,
        sequences: tuple[CachedSequence, ...],
        new: NewTokens,
        arrays: BatchBuffers,
        block_size: int,
    ) -> None:
        self.sequences = sequences
        """In the order of the arrays."""
        self.slot_mapping = arrays.slot_mapping
        self.positions = arrays.positions
        self.block_tables = arrays.block_tables
        self.seq_lens = arrays.seq_lens
        self.cu_seqlens = arrays.cu_seqlens
        self._manager = manager
        self._new = new
        self._buffers = arrays
        self._block_size = block_size
        self._end = ""  # how it ended

    @property
    def num_tokens(self) -> int:
        """New tokens, of all sequences."""
        return len(self._new.tokens)

    @property
    def host_seq_lens(self) -> npt.NDArray[np.int64]:
        """The values of ``seq_lens`` on the host, int64 ``[num_seqs]``: what a gather without ``out`` needs."""
        return self._new.ends

    @property
    def max_seqlen_q(self) -> int:
        """The most new tokens of a sequence, as attention kernels that take ``cu_seqlens`` want to know."""
        return int(self._new.counts.max(initial=0))

    @property
    def max_seqlen_k(self) -> int:
        """The most tokens of a sequence, the new ones among them."""
        return int(self.host_seq_lens.max(initial=0))

    def to_csr(self) -> CSRTables:
        """``block_tables`` and ``seq_lens`` in the form of FlashInfer: new arrays, queued on CuPy's current stream;
        of a batch in buffers before another one fills them.

        >>> from cupy_pagedkv import KVCacheManager, LayeredPagedKVCache
        >>> manager = KVCacheManager(LayeredPagedKVCache(1, 8, 4, 1, 2, "float16", device="cpu"))
        >>> batch = manager.prepare({manager.add([1] * 6): [1] * 6, manager.add([2] * 4): [2] * 4})
        >>> [array.tolist() for array in batch.to_csr()]
        [[0, 2, 3], [0, 1, 2], [2, 4]]
        """
        counts = -(-self._new.ends // self._block_size)
        row_starts = np.arange(len(counts)) * self.block_tables.shape[1]
        backend, place = backend_of(("block_tables",), self.block_tables), self.block_tables.device
        kv_indptr, places, kv_last_page_len = (
            backend.from_numpy(array, place)
            for array in (
                np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
                ranges(row_starts, counts),
                (self._new.ends - np.maximum(counts - 1, 0) * self._block_size).astype(np.int32),
            )
        )
        return CSRTables(kv_indptr, self.block_tables.reshape(-1)[places], kv_last_page_len)

    def __len__(self) -> int:
        return len(self.sequences)

    def __repr__(self) -> str:
        return f"<Batch of {self.num_tokens} tokens of {len(self)} sequences, {self._end or 'open'}>"

    def __enter__(self) -> "Batch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._end:
            if kind is None:
                self._manager.commit(self)
            else:
                self._manager.rollback(self)
