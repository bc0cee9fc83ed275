"""What is known of many sequences, a row each, in arrays: block tables, lengths, and the tokens of begun blocks.

>>> rows = SequenceRows(block_size=4, num_blocks=100)
>>> row = rows.add(np.array([7, 2], np.int32), length=6, known=0)
>>> new = NewTokens(np.array([row]), rows.lengths[[row]], np.array([3]), np.array([11, 12, 13], np.int32))
>>> new.positions
array([6, 7, 8])
>>> rows.missing(new)
(array([0]), array([2]))

Blocks are numbers here: who else owns them is not known, nor is any device. Numbers from ``num_blocks`` on are places
on the host, and come last in a table.
"""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .memory import lazy_zeros
from .ranges import ranges

__all__ = ["NewTokens", "SequenceRows"]

_Ints: TypeAlias = npt.NDArray[np.int64]
_Blocks: TypeAlias = npt.NDArray[np.int32]


class NewTokens:
    """The next tokens of some rows, those of one row behind those of the other."""

    def __init__(self, rows: _Ints, starts: _Ints, counts: _Ints, tokens: npt.NDArray[np.int32]) -> None:
        self.rows = rows
        self.starts = starts
        """The position of each row's first new token."""
        self.counts = counts
        """How many each row gets."""
        self.ends = starts + counts
        self.tokens = tokens
        self.first = np.cumsum(counts) - counts
        """Where each row's tokens begin among all."""
        self.index = np.repeat(np.arange(len(rows)), counts)
        """Of each token: whose it is, as a place in ``rows``."""
        self.positions = (starts - self.first)[self.index] + np.arange(len(tokens))


class SequenceRows:
    """Tables, lengths and begun blocks; rows that are free are used again, and all tables widen together."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self.lengths: _Ints = np.zeros(0, np.int64)
        """Tokens of each row; of one that is free, 0."""
        self.num_blocks: _Ints = np.zeros(0, np.int64)
        """Blocks in each table; behind the last, tables are 0, as fresh memory reads."""
        self.known: _Ints = np.zeros(0, np.int64)
        """How many of each row's first blocks are found by their tokens."""
        self.on_host: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether the last blocks of each row are places on the host."""
        self.is_open: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether each row is about to grow, and must not be changed otherwise."""
        self._block_size = block_size
        self._max_width = num_blocks  # no table of an open row can be longer than the pool
        self.first_place = num_blocks
        """Smaller numbers are blocks of the pool."""
        self._tables = _tables(0, 8)
        self._tails = np.empty((0, block_size), np.int32)  # the tokens in the last block, where it is not full
        self._free: list[int] = []

    def __len__(self) -> int:
        """Rows that there is room for, free ones among them."""
        return len(self.lengths)

    @property
    def free(self) -> tuple[int, ...]:
        """Rows that are in no use."""
        return tuple(self._free)

    def add(self, blocks: _Blocks, length: int, known: int) -> int:
        """A row for a sequence of ``length`` tokens in ``blocks``, of which the first ``known`` are found."""
        if not self._free:
            self._add_rows()
        self.widen(len(blocks))
        row = self._free.pop()
        self._tables[row, : len(blocks)] = blocks
        self.num_blocks[row] = len(blocks)
        self.lengths[row] = length
        self.known[row] = known
        self._look_for_places(row)
        return row

    def remove(self, row: int) -> _Blocks:
        """Free a row; returns the blocks that it had."""
        self.lengths[row] = 0
        blocks = self.shrink(row)
        self._free.append(row)
        return blocks

    def shrink(self, row: int) -> _Blocks:
        """Take the blocks from a row that its tokens do not need; returns them."""
        needed, had = -(-int(self.lengths[row]) // self._block_size), int(self.num_blocks[row])
        let_go = self._tables[row, needed:had].copy()
        self._tables[row, needed:had] = 0
        self.num_blocks[row] = needed
        self._look_for_places(row)
        return let_go

    def replace(self, row: int, first: int, blocks: _Blocks) -> None:
        """Set the last blocks of a row, from its block ``first`` on."""
        self._tables[row, first : first + len(blocks)] = blocks
        self._look_for_places(row)

    def with_room_to_spare(self, rows: _Ints) -> list[int]:
        """Those of ``rows`` that have more blocks than their tokens need."""
        kept: list[int] = rows[self.num_blocks[rows] > -(-self.lengths[rows] // self._block_size)].tolist()
        return kept

    def blocks(self, row: int) -> _Blocks:
        """A copy of a row's table."""
        return self._tables[row, : self.num_blocks[row]].copy()

    def blocks_at(self, rows: _Ints, columns: _Ints) -> _Blocks:
        """The blocks at some places of the tables."""
        blocks: _Blocks = self._tables[rows, columns]
        return blocks

    def put(self, new: NewTokens, owners: _Ints, columns: _Ints, blocks: _Blocks) -> None:
        """Set blocks for new tokens: ``blocks[i]`` at ``columns[i]`` of the table of ``new.rows[owners[i]]``. The
        tables, which are wide enough, have room for all new tokens then, and the rows are open."""
        self._tables[new.rows[owners], columns] = blocks
        self.num_blocks[new.rows] = -(-new.ends // self._block_size)
        self.is_open[new.rows] = True

    def copy_tables(self, rows: _Ints, out: _Blocks) -> None:
        """The tables of ``rows`` to ``out``, zeros ``[len(rows), at most the width of the tables]``.

        Costs what their entries cost: where few are much longer than most, what is padding for the others is not
        touched.
        """
        counts = self.num_blocks[rows]
        width = min(out.shape[1], 8 + 4 * int(counts.sum()) // max(1, len(rows)))  # of four times the mean
        out[:, :width] = self._tables[rows, :width]
        if width < out.shape[1]:
            for i in np.flatnonzero(counts > width).tolist():  # a quarter of the rows at most
                out[i, width : counts[i]] = self._tables[rows[i], width : counts[i]]

    def missing(self, new: NewTokens) -> tuple[_Ints, _Ints]:
        """Of each block that the rows need for their new tokens: whose it is, as a place in ``new.rows``, and its
        column."""
        had = self.num_blocks[new.rows]
        counts = -(-new.ends // self._block_size) - had
        growing = np.flatnonzero(counts)
        counts = counts[growing]
        return np.repeat(growing, counts), ranges(had[growing], counts)

    def begun(self, new: NewTokens) -> tuple[_Ints, _Ints]:
        """Who goes on writing to a block that has tokens already, as places in ``new.rows``, and in which column."""
        writers = np.flatnonzero((new.starts % self._block_size != 0) & (new.counts > 0))
        return writers, new.starts[writers] // self._block_size

    def filled(self, new: NewTokens, ends: _Ints) -> Iterator[tuple[int, int, _Blocks, bytes]]:
        """Keep the tokens of blocks that are begun once the rows have grown to ``ends``, and yield those of blocks that
        are full then, which count as known: whose, as a place in ``new.rows``, the column of the first, the blocks, and
        all of their tokens."""
        size = self._block_size
        columns, full = new.starts // size, ends // size
        # The tokens that go on where a block was begun, of all rows at once: in a decode step these are all.
        inside = new.positions < np.minimum(ends, (columns + 1) * size)[new.index]
        self._tails[new.rows[new.index[inside]], new.positions[inside] % size] = new.tokens[inside]

        filling = np.flatnonzero(full > columns)
        rows = new.rows[filling]
        self.known[rows] = full[filling]
        goes_on = (ends > (columns + 1) * size)[filling].tolist()
        places = zip(filling.tolist(), rows.tolist(), columns[filling].tolist(), full[filling].tolist(), strict=True)
        for (i, row, column, end), more in zip(places, goes_on, strict=True):
            tokens = self._tails[row].tobytes()
            if more:
                first = new.first[i] - new.starts[i]  # where position 0 of the row would be among the tokens
                rest = new.tokens[first + (column + 1) * size : first + ends[i]]
                whole = (end - column - 1) * size
                tokens += rest[:whole].tobytes()
                self._tails[row, : len(rest) - whole] = rest[whole:]
            yield i, column, self._tables[row, column:end], tokens

    def begin(self, row: int, tail: npt.NDArray[np.int32]) -> None:
        """Say what tokens are in the row's last block: ``[block_size]``, of which the first ones count."""
        self._tails[row] = tail

    def tail(self, row: int) -> npt.NDArray[np.int32]:
        """What :meth:`begin` said, or :meth:`filled` kept."""
        tail: npt.NDArray[np.int32] = self._tails[row]
        return tail

    def widen(self, max_blocks: int) -> None:
        """Give all tables at least ``max_blocks`` columns."""
        height, width = self._tables.shape
        if max_blocks > width:
            self._resize(height, max(max_blocks, min(2 * width, self._max_width)))

    def _look_for_places(self, row: int) -> None:
        last = int(self.num_blocks[row]) - 1
        self.on_host[row] = last >= 0 and self._tables[row, last] >= self.first_place

    def _add_rows(self) -> None:
        had, width = self._tables.shape
        more = max(8, had)
        self._resize(had + more, width)
        self.lengths, self.num_blocks, self.known, self.on_host, self.is_open, self._tails = (
            np.concatenate([rows, np.zeros((more, *rows.shape[1:]), rows.dtype)])
            for rows in (self.lengths, self.num_blocks, self.known, self.on_host, self.is_open, self._tails)
        )
        self._free = list(range(had, had + more))[::-1]

    def _resize(self, height: int, width: int) -> None:
        tables = _tables(height, width)
        for row, num_blocks in enumerate(self.num_blocks.tolist()):
            tables[row, :num_blocks] = self._tables[row, :num_blocks]
        self._tables = tables


def _tables(height: int, width: int) -> _Blocks:
    return lazy_zeros(4 * height * width).view(np.int32).reshape(height, width)
