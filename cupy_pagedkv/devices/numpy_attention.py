"""Attention by NumPy: tiles of positions that stay in the cache, folded one after the other, by BLAS and ufuncs.

A call is cut into parts: rows that attend together, of one sequence or of a few short ones. A part walks through its
positions a tile at a time: K and V are gathered and become float32, and an online softmax folds them into the state of
each row. A row is a token and one of the query heads that share a KV head. Rows lie along the last axis of all that is
computed, so that what is done to one is done to many at once:

    queries      [sequences, KV heads, pieces, head_dim, rows of a piece]
    K and V      [sequences, positions, KV heads, head_dim]
    scores       [sequences, positions, KV heads, rows]
    most, total  [sequences, KV heads, rows]
    sums         [sequences, v_head_dim, KV heads, rows]

Products are cut into pieces that BLAS computes in the thread that asks for them. Its own threads wait for each other
spinning, and where others use the cores they take 30 times as long; :mod:`threads` shares the parts instead.
"""

import functools
import math
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from . import threads
from .layout import AttentionLayout, Scoring

__all__ = ["merge_attention_states", "paged_attention"]

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_PART_ROWS = 512  # of all KV heads and sequences
_PIECE_ROWS = 32
_PIECE_PRODUCTS = 2**18  # that OpenBLAS computes in one thread
_LOADED = 2**17  # floats of K or V at once
_SCORED = 2**16  # scores at once
_LARGE_BLOCK = 2**12  # elements, which are converted where they lie rather than gathered first
_MOST_WASTE = 1.25  # positions that a sequence of several walks through, of those that it sees
_ENOUGH_JOBS = 16  # for all threads, though some be held up
_PRODUCTS_PER_BYTE = 6  # that take as long as to read one

_LOWEST = np.float32(np.finfo(np.float32).min)  # where a maximum begins; what is masked is -inf


class _Call(NamedTuple):
    """What the parts of a call share."""

    query: _Array
    k_cache: _Array
    v_cache: _Array
    alibi_slopes: _Array | None
    sinks: _Array | None
    out: _Array
    lse: _Array | None
    scoring: Scoring
    layout: AttentionLayout
    v_in_k: bool
    """Whether V is the beginning of K."""


class _Part(NamedTuple):
    """Rows that attend together, and what they see."""

    tokens: _Array
    """``[sequences, tokens]``, of the query."""
    positions: _Array
    """``[sequences, tokens]``: where these stand."""
    seq_lens: _Array
    heads: slice
    """KV heads."""
    tables: _Array
    """``[sequences, blocks]``, from the one that holds ``start``."""
    start: int
    end: int
    all_see: range
    """The positions that every row sees."""


class _Tile(NamedTuple):
    """Some blocks of a part's tables, and the positions of these that it sees."""

    first_block: int
    last_block: int
    first: int
    last: int
    skipped: int
    """Positions of the first block before ``first``."""


class _State(NamedTuple):
    """Of each row: the greatest score, the sum of exponentials of what scores are less, and that of these times V."""

    most: _Array
    total: _Array
    sums: _Array


class _Buffers(threading.local):
    """What a thread computes in: made once, by name, and as large as it was ever needed, which the tiles limit."""

    def __init__(self) -> None:
        self.memory: dict[str, _Array] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> _Array:
        size = math.prod(shape)
        if name not in self.memory or len(self.memory[name]) < size:
            self.memory[name] = np.empty(size, np.float32)
        return self.memory[name][:size].reshape(shape)


_buffers = _Buffers()


class _Fold:
    """The states of the stretches that a part is split into. Who brings the last one writes the result."""

    def __init__(self, call: _Call, part: _Part, num_stretches: int) -> None:
        self.call, self.part = call, part
        self.states: list[Any] = [None] * num_stretches
        self.missing = num_stretches
        self.lock = threading.Lock()

    def attend(self, i: int, first: int, last: int) -> None:
        with np.errstate(all="ignore"):  # inf and NaN that are seen are results
            self.states[i] = _attend(self.call, self.part, first, last)
            with self.lock:
                self.missing -= 1
                if self.missing:
                    return
            _write(self.call, self.part, functools.reduce(_merged, self.states))


def paged_attention(
    query: _Array,
    k_cache: _Array,
    v_cache: _Array,
    block_tables: _Array,
    seq_lens: _Array,
    cu_seqlens_q: _Array | None,
    alibi_slopes: _Array | None,
    sinks: _Array | None,
    out: _Array,
    lse: _Array | None,
    scoring: Scoring,
    layout: AttentionLayout,
) -> None:
    v_in_k = (
        k_cache.__array_interface__["data"] == v_cache.__array_interface__["data"]
        and k_cache.strides == v_cache.strides
        and k_cache.shape[3] >= v_cache.shape[3]
    )
    call = _Call(query, k_cache, v_cache, alibi_slopes, sinks, out, lse, scoring, layout, v_in_k)
    parts = list(_parts(call, block_tables, seq_lens, cu_seqlens_q))
    if not parts:
        return
    work = sum(_work(call, part) for part in parts)
    stretches = -(-min(_ENOUGH_JOBS, work // threads.job_bytes(work)) // len(parts))
    threads.run([job for part in parts for job in _jobs(call, part, max(1, stretches))], work)


def merge_attention_states(
    out_a: _Array, lse_a: _Array, out_b: _Array, lse_b: _Array, out: _Array, lse: _Array
) -> None:
    with np.errstate(all="ignore"):  # inf and NaN that are there are results
        most = np.maximum(lse_a, lse_b)
        shift = np.where(most == -math.inf, np.float32(0), most)
        a, b = np.exp(lse_a - shift), np.exp(lse_b - shift)
        total = a + b
        lse[...] = shift + np.log(total)
        total[total == 0] = 1
        # What has no keys brings nothing, whatever its row holds.
        of_a, of_b = (
            np.where((part == -math.inf)[..., None], 0, rows.astype(np.float32) * (weight / total)[..., None])
            for rows, part, weight in ((out_a, lse_a, a), (out_b, lse_b, b))
        )
        out[...] = of_a + of_b


# How a call is cut.


def _parts(call: _Call, block_tables: _Array, seq_lens: _Array, cu_seqlens_q: _Array | None) -> Iterator[_Part]:
    left, right = call.scoring.left, call.scoring.right
    group, block_size, num_heads = call.layout.group, call.layout.block_size, call.k_cache.shape[2]
    ends = np.arange(len(seq_lens) + 1) if cu_seqlens_q is None else cu_seqlens_q.astype(np.int64)
    all_lens, counts = seq_lens.astype(np.int64), np.diff(ends)
    for alike in _alike(call, all_lens, counts):
        lens, n = all_lens[alike], int(counts[alike[0]])
        token_step = _even_step(n, _PART_ROWS // group)
        head_step = _even_step(num_heads, _PART_ROWS // (token_step * group))
        for j in range(0, n, token_step):
            new = np.arange(j, min(n, j + token_step))
            tokens, positions = ends[alike][:, None] + new, (lens - n)[:, None] + new
            starts = np.maximum(0, positions[:, 0] - left)
            stops = np.minimum(lens, positions[:, -1] + (right + 1))
            start, stop = int(starts.min()), int(stops.max())
            if stop <= start:
                start = stop = 0
            all_see = range(int(positions[:, -1].max()) - left, int(min(lens.min(), positions[:, 0].min() + right + 1)))
            columns = np.arange(start // block_size, -(-stop // block_size))
            tables = block_tables[alike][:, columns]
            if len(alike) > 1:  # what a shorter sequence does not see may be no block
                seen = (columns * block_size < stops[:, None]) & ((columns + 1) * block_size > starts[:, None])
                tables = np.where(seen, tables, 0)
            for head in range(0, num_heads, head_step):
                heads = slice(head, min(num_heads, head + head_step))
                yield _Part(tokens, positions, lens, heads, tables, start, stop, all_see)


def _alike(call: _Call, lens: _Array, counts: _Array) -> Iterator[list[int]]:
    """Sequences that attend together: of as many new tokens, and so few positions that all fit in a tile."""
    num_heads, dim = call.k_cache.shape[2:]
    starts = np.maximum(0, lens - counts - call.scoring.left).tolist()
    alike: list[int] = []
    for i in np.lexsort((lens, counts)).tolist():
        if not counts[i]:
            continue
        if alike:
            columns = (len(alike) + 1) * num_heads
            span = int(lens[i]) - starts[alike[0]]
            if (
                counts[i] == counts[alike[0]]
                and columns * call.layout.group * counts[i] <= _PART_ROWS
                and columns * span * dim <= _LOADED
                and span <= _MOST_WASTE * (lens[alike[0]] - starts[alike[0]])
            ):
                alike.append(i)
                continue
            yield alike
        alike = [i]
    if alike:
        yield alike


def _even_step(total: int, most: int) -> int:
    """The size of pieces of ``total``, as few and as even as can be."""
    return -(-total // -(-total // max(1, most)))


def _work(call: _Call, part: _Part) -> int:
    """The bytes that are read in the time that a part takes."""
    num_seqs, num_tokens = part.tokens.shape
    dims = call.k_cache.shape[3] + call.v_cache.shape[3]
    per_element: int = call.layout.query.dtype.itemsize + num_tokens * call.layout.group // _PRODUCTS_PER_BYTE
    return int(num_seqs) * (part.end - part.start) * _num_heads(part) * int(dims) * per_element


def _num_heads(part: _Part) -> int:
    return len(range(part.heads.start, part.heads.stop))


def _jobs(call: _Call, part: _Part, most_stretches: int) -> Iterator[threads.Job]:
    num_blocks = part.tables.shape[1]
    step = max(1, -(-num_blocks // most_stretches))
    stretches = [(first, min(num_blocks, first + step)) for first in range(0, num_blocks, step)] or [(0, 0)]
    fold = _Fold(call, part, len(stretches))
    return (functools.partial(fold.attend, i, *stretch) for i, stretch in enumerate(stretches))


# What becomes of a part.


def _attend(call: _Call, part: _Part, first_block: int, last_block: int) -> _State:
    """The state of a part's rows after the blocks from ``first_block`` to before ``last_block`` of its tables."""
    queries = _queries(call, part)
    num_seqs, num_heads, num_pieces, dim, piece_rows = queries.shape
    columns, num_rows, v_dim = num_seqs * num_heads, num_pieces * piece_rows, call.v_cache.shape[3]
    most = np.full((num_seqs, num_heads, num_rows), _LOWEST)
    total = np.zeros_like(most)
    sums = np.zeros((num_seqs, v_dim, num_heads, num_rows), np.float32)
    products = _buffers.take("products", sums.shape)
    loaded = _LOADED // (columns * dim)
    scored = _SCORED // (columns * num_rows)
    for tile in _tiles(call, part, first_block, last_block, min(loaded, scored) if call.v_in_k else scored):
        scores = _buffers.take("scores", (num_seqs, tile.last - tile.first, num_heads, num_rows))
        pieces = [
            (piece, slice(piece.first - tile.first, piece.last - tile.first))
            for piece in _tiles(call, part, tile.first_block, tile.last_block, loaded)
        ]
        hidden = _hidden(call, part, tile)
        for piece, here in pieces:
            k = _load(call.k_cache, part, piece)
            _multiply(k.transpose(0, 2, 1, 3)[:, :, None], queries, _pieces(scores[:, here], piece_rows))
        _score(call, part, scores, tile, hidden)

        before, most = most, np.maximum(most, scores.max(1))
        scores -= most[:, None]
        weights = np.exp(scores, out=scores)
        shrink = np.exp(before - most)
        total *= shrink
        total += weights.sum(1)

        sums *= shrink[:, None]
        for piece, here in pieces:
            v = k[..., :v_dim] if call.v_in_k else _load(call.v_cache, part, piece)
            apart = [] if hidden is None else _take_out_hidden(v, hidden[:, here])
            _multiply(
                v.transpose(0, 2, 3, 1)[:, :, None],
                _pieces(weights[:, here], piece_rows),
                _pieces(products, piece_rows),
            )
            for i, position, value, hidden_from in apart:
                weight = _by_token(call, part, weights[i, here][position])
                _by_token(call, part, products[i])[...] += np.where(hidden_from, 0, weight * value.T[..., None, None])
            sums += products
    return _State(most, total, sums)


def _tiles(call: _Call, part: _Part, first_block: int, last_block: int, num_positions: int) -> Iterator[_Tile]:
    """Of so many positions, but of one block at least."""
    block_size = call.layout.block_size
    step, origin = max(1, num_positions // block_size), part.start // block_size
    for block in range(first_block, last_block, step):
        end = min(block + step, last_block)
        first, last = (origin + block) * block_size, (origin + end) * block_size
        yield _Tile(block, end, max(part.start, first), min(part.end, last), max(0, part.start - first))


def _pieces(columns: _Array, piece_rows: int) -> _Array:
    """A view of ``[sequences, n, heads, rows]`` as ``[sequences, heads, pieces, n, rows of a piece]``."""
    num_seqs, n, num_heads, _ = columns.shape
    return columns.reshape(num_seqs, n, num_heads, -1, piece_rows).transpose(0, 2, 3, 1, 4)


def _by_token(call: _Call, part: _Part, rows: _Array) -> _Array:
    """A view of ``rows`` as ``[..., group, tokens]``, without those that only fill a piece."""
    num_tokens, group = part.tokens.shape[1], call.layout.group
    return rows[..., : group * num_tokens].reshape(*rows.shape[:-1], group, num_tokens)


def _queries(call: _Call, part: _Part) -> _Array:
    """Scaled, in pieces of as many rows, of which the last ones may be zeros."""
    scoring, group = call.scoring, call.layout.group
    num_seqs, num_tokens = part.tokens.shape
    num_heads, dim = _num_heads(part), call.query.shape[2]
    piece = max(2, _even_step(group * num_tokens, _PIECE_ROWS))  # one row is no matrix, and has rules of its own
    num_pieces = -(-group * num_tokens // piece)
    rows = _buffers.take("rows", (num_seqs, num_heads, num_pieces * piece, dim))
    rows[:, :, group * num_tokens :] = 0
    queries = call.query[part.tokens, part.heads.start * group : part.heads.stop * group]
    by_head = queries.reshape(num_seqs, num_tokens, num_heads, group, dim).transpose(0, 2, 3, 1, 4)
    scale = np.float32(scoring.softmax_scale / (scoring.softcap or 1))
    places = rows[:, :, : group * num_tokens].reshape(by_head.shape)
    np.multiply(by_head, scale, out=places, dtype=np.float32)
    result = _buffers.take("queries", (num_seqs, num_heads, num_pieces, dim, piece))
    result[...] = rows.reshape(num_seqs, num_heads, num_pieces, piece, dim).swapaxes(3, 4)
    return result


def _load(pool: _Array, part: _Part, tile: _Tile) -> _Array:
    """float32 ``[sequences, positions, heads, head_dim]``, until the next call."""
    source = pool[:, :, part.heads]
    blocks = part.tables[:, tile.first_block : tile.last_block]
    result = _buffers.take("loaded", (len(blocks), blocks.shape[1] * pool.shape[1], *source.shape[2:]))
    target = result
    if pool.dtype == np.float16:
        source, target = source.view(np.int16), result.view(np.int32)
    target = target.reshape(-1, *source.shape[1:])
    if math.prod(source.shape[1:]) >= _LARGE_BLOCK:
        for block, place in zip(blocks.ravel().tolist(), target, strict=True):
            place[...] = source[block]
    else:
        target[...] = source[blocks.ravel()]
    result = result[:, tile.skipped : tile.skipped + tile.last - tile.first]
    if pool.dtype == np.float16:
        _widen(result)
    return result


def _widen(numbers: _Array) -> None:
    """Make float32, in place, of float16's bits as int32: of what is finite, one number after the other would take five
    times as long."""
    bits = numbers.view(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70002000)  # the sign, and 15 bits from the fourth behind it
    numbers *= np.float32(2.0**112)
    if numbers.max(initial=0) >= 2.0**16 or numbers.min(initial=0) <= -(2.0**16):  # inf and NaN have become these
        sizes = np.abs(numbers)
        numbers[sizes == 2.0**16] *= np.float32(np.inf)
        numbers[sizes > 2.0**16] = np.nan


def _multiply(a: _Array, b: _Array, out: _Array) -> None:
    """The matrix product, some rows of ``a`` at a time."""
    step = max(1, _PIECE_PRODUCTS // (b.shape[-2] * b.shape[-1]))
    for first in range(0, a.shape[-2], step):
        np.matmul(a[..., first : first + step, :], b, out=out[..., first : first + step, :])


def _hidden(call: _Call, part: _Part, tile: _Tile) -> _Array | None:
    """``[sequences, positions, tokens]``: which positions a token does not see; None if every token sees them
    all."""
    if part.all_see.start <= tile.first and tile.last <= part.all_see.stop:
        return None
    left, right = call.scoring.left, call.scoring.right
    lens, tokens = part.seq_lens[:, None, None], part.positions[:, None, :]
    positions = np.arange(tile.first, tile.last)[:, None]
    return (positions >= lens) | (positions < tokens - left) | (positions > tokens + right)


def _score(call: _Call, part: _Part, scores: _Array, tile: _Tile, hidden: _Array | None) -> None:
    """Make scores, in place, of the products of queries and keys."""
    if call.scoring.softcap:
        np.tanh(scores, out=scores)
        scores *= np.float32(call.scoring.softcap)
    by_token = _by_token(call, part, scores)
    if call.alibi_slopes is not None:
        distances = np.abs(part.positions[:, None] - np.arange(tile.first, tile.last)[:, None])
        slopes = call.alibi_slopes.reshape(-1, call.layout.group, 1)[part.heads]
        by_token -= slopes * distances.astype(np.float32)[:, :, None, None]
    if hidden is not None:
        np.copyto(by_token, -np.inf, where=hidden[:, :, None, None])


def _take_out_hidden(v: _Array, hidden: _Array) -> list[tuple[int, int, _Array, _Array]]:
    """Make zeros, in place, of what no token sees, and of what not every token sees where it is not finite, since zero
    times that is NaN. Returns the latter: sequence, position, V of its heads, and which tokens do not see it."""
    of_none = hidden.all(2)
    v[of_none] = 0
    of_some = hidden.any(2) & ~of_none
    if not of_some.any():
        return []
    apart = [
        (i, position, v[i, position].copy(), hidden[i, position])
        for i, position in np.argwhere(of_some & ~np.isfinite(v).all((2, 3))).tolist()
    ]
    for i, position, *_ in apart:
        v[i, position] = 0
    return apart


def _merged(a: _State, b: _State) -> _State:
    most = np.maximum(a.most, b.most)
    of_a, of_b = np.exp(a.most - most), np.exp(b.most - most)
    return _State(most, a.total * of_a + b.total * of_b, a.sums * of_a[:, None] + b.sums * of_b[:, None])


def _write(call: _Call, part: _Part, state: _State) -> None:
    num_tokens, group = part.tokens.shape[1], call.layout.group
    heads = slice(part.heads.start * group, part.heads.stop * group)
    if call.sinks is not None:  # a score of a value that is zero
        sinks = np.zeros_like(state.most)
        _by_token(call, part, sinks)[...] = call.sinks[heads].reshape(-1, group, 1)
        state = _merged(state, _State(sinks, np.ones_like(sinks), np.zeros_like(state.sums)))
    results = state.sums / np.where(state.total == 0, 1, state.total)[:, None]
    results = np.ascontiguousarray(_by_token(call, part, results).transpose(0, 4, 2, 3, 1))
    lse = None if call.lse is None else _by_token(call, part, state.most + np.log(state.total)).transpose(0, 3, 1, 2)
    for i, first in enumerate(part.tokens[:, 0].tolist()):
        tokens = slice(first, first + num_tokens)
        call.out[tokens, heads] = results[i].reshape(num_tokens, -1, results.shape[-1])
        if call.lse is not None and lse is not None:
            call.lse[tokens, heads] = lse[i].reshape(num_tokens, -1)
