"""Places for blocks in host memory: which are free, and which hold what a block of the pool holds, too."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .allocator import BlockAllocator

__all__ = ["Places"]

_Ids: TypeAlias = npt.NDArray[np.int32]


class Places:
    """``num_places`` places, whose ids go on behind those of ``num_blocks`` blocks of a pool; there may be none.

    >>> places = Places(num_blocks=100, num_places=4, block_size=16)
    >>> taken = places.take(2)
    >>> taken
    array([100, 101], dtype=int32)
    >>> places.pair(np.array([7, 8], np.int32), taken)  # blocks 7 and 8 of the pool hold the same
    >>> places.of(np.array([8, 9], np.int32))
    array([101,  -1], dtype=int32)
    """

    def __init__(self, num_blocks: int, num_places: int, block_size: int, reserve: int = 0) -> None:
        self.first = num_blocks
        """The id of the first place, above those of all blocks."""
        self.total = num_places
        self.reserve = reserve
        """Places more, which are lent while as many others are being left."""
        self.num_lent = 0
        self.allocator = BlockAllocator(num_places + reserve, block_size) if num_places else None
        self.spare: dict[int, None] = {}
        """Places that are paired and that nobody owns, those longest so first."""
        self._of_block = np.full(num_blocks if num_places else 0, -1, np.int32)
        self._block_of = np.full(num_places + reserve, -1, np.int32)

    @property
    def num_free(self) -> int:
        """Places that hold nothing, and are not in reserve; fewer than none where some are still to be given back."""
        return self.allocator.free_block_count - self.reserve + self.num_lent if self.allocator else 0

    def take(self, count: int) -> _Ids:
        """``count`` free places, in rising order, so that those side by side are copied at once."""
        assert self.allocator is not None
        return np.sort(self.allocator.allocate(count)) + np.int32(self.first)

    def free(self, places: _Ids) -> None:
        """Return places that are in no pair."""
        if self.allocator:
            self.allocator.free(places - np.int32(self.first))

    def of(self, blocks: _Ids) -> _Ids:
        """The place of the pair that each block is in, or −1."""
        return self._of_block[blocks] if self.total else np.full(len(blocks), -1, np.int32)

    def blocks_of(self, places: _Ids) -> _Ids:
        """The block of the pair that each place is in, or −1."""
        blocks: _Ids = self._block_of[places - self.first]
        return blocks

    def pair(self, blocks: _Ids, places: _Ids) -> None:
        """Say that each of ``blocks`` holds what the place does."""
        self._of_block[blocks] = places
        self._block_of[places - self.first] = blocks

    def part(self, blocks: _Ids) -> _Ids:
        """Undo the pairs that ``blocks`` are in; returns their places."""
        places = self.of(blocks)
        places = places[places >= 0]
        if len(places):
            self._of_block[blocks] = -1
            self._block_of[places - self.first] = -1
        return places

    def give_up_spares(self, count: int) -> None:
        """Free ``count`` of the spare places, or all of them if there are fewer."""
        given_up = np.array([place for place, _ in zip(self.spare, range(count), strict=False)], np.int32)
        self.part(self.blocks_of(given_up))
        for place in given_up.tolist():
            del self.spare[place]
        self.free(given_up)

    def check(self) -> None:
        """Raise ``RuntimeError`` unless each pair is known from both sides."""
        if self.allocator:
            self.allocator.check_integrity()
        paired = np.flatnonzero(self._block_of >= 0)
        if not np.array_equal(self._of_block[self._block_of[paired]], paired + self.first) or (
            np.count_nonzero(self._of_block >= 0) != len(paired)
        ):
            raise RuntimeError("a block of the pool and its place on the host do not know each other")
