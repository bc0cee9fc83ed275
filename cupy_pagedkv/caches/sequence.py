"""One of a manager's sequences, as its users hold it."""

from types import TracebackType
from typing import NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from ..bookkeeping.pool import Run
from ..bookkeeping.rows import SequenceRows

__all__ = ["CachedSequence"]


class Manager(Protocol):
    """What a sequence asks of the :class:`~cupy_pagedkv.KVCacheManager` that made it."""

    _rows: SequenceRows

    def _fork(self, sequence: "CachedSequence") -> "CachedSequence": ...
    def _offload(self, sequence: "CachedSequence") -> None: ...
    def _truncate(self, sequence: "CachedSequence", num_tokens: int) -> None: ...
    def _abandon(self, sequence: "CachedSequence") -> None: ...
    def free(self, sequence: "CachedSequence") -> None: ...


class CachedSequence:
    """A sequence of tokens in a :class:`KVCacheManager`, which makes it: ``manager.add(tokens)``.

    As a context manager it is freed at the end, and an exception rolls back the batch that it is in.
    """

    __slots__ = ("__weakref__", "_manager", "_name", "_num_cached", "_prompt", "_row", "_run")

    def __init__(self, manager: Manager, row: int, run: Run, num_cached: int, prompt: npt.NDArray[np.int32]) -> None:
        self._manager: Manager | None = manager
        self._row = row
        self._run = run  # where its known blocks end
        self._num_cached = num_cached
        self._prompt = prompt
        self._name: str | None = None

    @property
    def name(self) -> str | None:
        """That ``add`` was given; None of one that is freed, or has none, as a fork has."""
        return self._name

    @property
    def num_cached_tokens(self) -> int:
        """How many of its first tokens were in the pool, or in host memory, when it was made."""
        return self._num_cached

    @property
    def num_tokens(self) -> int:
        """Tokens whose K and V are in the cache: shared or committed."""
        return int(self._owner()._rows.lengths[self._row])

    @property
    def remaining(self) -> npt.NDArray[np.int32]:
        """The tokens of its prompt, which ``add`` was given, that are not in the cache yet; int32 ``[n]``, read-only.

        They are those behind the first ``num_tokens``: what ``prepare`` is to be given next, whole or in pieces.
        """
        num_tokens = self.num_tokens  # which says so if it has been freed
        return self._prompt[num_tokens:]

    @property
    def block_table(self) -> npt.NDArray[np.int32]:
        """Its blocks in logical order, those of an open batch among them; a copy on the host. −1 where a block is not
        in the pool, but in host memory until the next ``prepare``."""
        owner = self._owner()
        blocks = owner._rows.blocks(self._row)
        blocks[blocks >= owner._rows.first_place] = -1
        return blocks

    @property
    def num_host_blocks(self) -> int:
        """How many of its blocks are in host memory, and may need as many of the pool at the next ``prepare``."""
        return int(np.count_nonzero(self.block_table < 0))

    def fork(self) -> "CachedSequence":
        """A second sequence with the same tokens, in the same blocks. No block is taken.

        Whoever first writes to the last block, where it is not full, writes to a copy.

        Raises ``ValueError`` while this sequence is in an open batch, or is freed.
        """
        return self._owner()._fork(self)

    def offload(self) -> None:
        """Move its K and V to host memory, and let go of its blocks: it is parked until the next ``prepare`` with it.

        It can be truncated, forked and freed there. What the host has already is not copied again, and what is still in
        the pool when it comes back does not travel. On a GPU the copy is queued behind the current stream's work, and a
        CUDA graph must not capture it. Where a device fails, cached blocks on the host may be gone.

        Raises ``ValueError`` where the manager has no ``host_blocks``, while this sequence is in an open batch, or when
        it is freed, and :class:`~cupy_pagedkv.OutOfBlocksError` where other sequences leave too little room there.
        """
        self._owner()._offload(self)

    def truncate(self, num_tokens: int) -> None:
        """Forget all tokens but the first ``num_tokens``, and let go of blocks that only the others needed.

        What other sequences share stays theirs. Raises ``ValueError`` if there are fewer tokens, while this sequence is
        in an open batch, or when it is freed.
        """
        self._owner()._truncate(self, num_tokens)

    def __enter__(self) -> "CachedSequence":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        manager = self._manager
        if manager is not None:
            if kind is not None:  # lest freeing an open batch's sequence hides the exception
                manager._abandon(self)
            manager.free(self)

    def __repr__(self) -> str:
        if self._manager is None:
            return "<CachedSequence, freed>"
        return f"<CachedSequence of {self.num_tokens} tokens in blocks {self.block_table.tolist()}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a sequence can be neither copied nor pickled; fork() makes a second one of the same tokens")

    def _owner(self) -> Manager:
        if self._manager is None:
            raise ValueError("this sequence has been freed; add its tokens again")
        return self._manager
