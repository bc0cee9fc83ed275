"""Attention over the block tables: K and V are read where they lie, on NumPy and CuPy arrays alike.

>>> import numpy as np
>>> k_cache, v_cache = np.zeros((2, 4, 8, 1, 2), np.float32)
>>> v_cache[2, :3, 0] = [[1, 10], [2, 20], [6, 60]]
>>> query = np.ones((1, 1, 2), np.float32)  # against keys that are all zeros: the mean of what it sees
>>> paged_attention(query, k_cache, v_cache, block_tables=[[2]], seq_lens=[3])
array([[[ 3., 30.]]], dtype=float32)

Names and rules are those of flash-attention and vLLM. A backend may rely on what is checked here.
"""

import math
import operator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..bookkeeping.arguments import at_least
from ..devices import backend as devices
from ..devices.backend import Backend, backend_of
from ..devices.dlpack import array_of, arrays_of, like
from ..devices.layout import UNBOUNDED, AttentionLayout, Scoring, attention_layout_of, check_arithmetic
from .arguments import (
    Array,
    IndexArray,
    asnumpy,
    check_aligned,
    check_blocks,
    check_writeable,
    indices,
    on_device,
)

__all__ = ["AttentionBuffers", "attention_buffers", "merge_attention_states", "paged_attention"]

_INPUTS = ("query", "k_cache", "v_cache")
_STATES = ("out_a", "lse_a", "out_b", "lse_b")
_FLOAT32 = np.dtype(np.float32)
_MOST_FACTOR = 2.0**60  # float32 holds quotients of two such numbers


class AttentionBuffers(NamedTuple):
    """What :func:`paged_attention` writes to: given as its ``out``, it allocates nothing, as in a CUDA graph."""

    out: Array
    """``[num_tokens, num_heads, v_head_dim]``, of the dtype of ``query``."""
    lse: Array
    """float32 ``[num_tokens, num_heads]``."""
    scratch: Array
    """float32 ``[n]``, for what is between two launches."""


def paged_attention(
    query: Array,
    k_cache: Array,
    v_cache: Array,
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
    out: "Array | AttentionBuffers | None" = None,
) -> Any:
    """Attention of new tokens over the K and V of their sequences, read from the pools by the block tables.

    query
        ``[num_tokens, num_heads, head_dim]``, of any strides; float16, bfloat16 or float32. Query head ``h`` reads KV
        head ``h // (num_heads // num_kv_heads)``. Its K and V have to be in the pools already.
    k_cache, v_cache
        The pools of one layer, ``[num_blocks, block_size, num_kv_heads, head_dim]``, of the dtype of ``query``, any
        strides with a contiguous last axis. V may have a head_dim of its own, and be a view of K:
        ``k_cache[..., :512]``, which is then read once.
    block_tables, seq_lens
        int32 or int64 ``[num_seqs, max_blocks]`` and ``[num_seqs]``; lengths count the new tokens. Only the entries
        of blocks that some query token sees are looked at.
    cu_seqlens_q
        int32 or int64 ``[num_seqs + 1]``: the tokens ``cu_seqlens_q[i]`` … ``cu_seqlens_q[i + 1] − 1`` of ``query`` are
        the last of sequence ``i``. By default each sequence has one. Rows of ``query`` behind the last are padding:
        theirs in ``out`` stay as they are, or are zeros (and −inf in ``lse``) where these are new.
    max_seqlen_q
        No sequence has more new tokens. Helps to choose how a GPU is used; results do not depend on it.
    softmax_scale
        By default ``head_dim ** -0.5``.
    causal, window_size
        New token ``j`` of ``n`` stands at position ``t = seq_len − n + j``. It sees position ``p`` where
        ``p < seq_len``, ``p <= t`` if causal, ``t − left <= p`` unless left is negative, and ``p <= t + right`` unless
        right is. A window of W tokens is ``(W − 1, 0)``.
    softcap
        A score becomes ``softcap * tanh(score / softcap)``, unless softcap is 0.
    alibi_slopes
        float32 ``[num_heads]``: ``slope * abs(t − p)`` is taken from each score.
    sinks
        float32 ``[num_heads]``: one more score in the sum of each row, that brings no value. The LSE counts it.
    return_lse
        Also return the natural logarithm of each row's sum of exponentials: ``(out, lse)``, lse float32
        ``[num_tokens, num_heads]``.
    out
        Where to write the result, of any strides, which must not overlap the other arrays; or
        :func:`attention_buffers`, made beforehand.

    Returns ``[num_tokens, num_heads, v_head_dim]`` in the dtype of ``query``, accumulated in float32 and rounded
    once. A row that sees nothing is zeros, its LSE −inf (the sink's, if there is one). What is masked, or was never
    written, does not reach a result, be it NaN.

    On a GPU the work is queued on CuPy's current stream; where all arrays are there and ``out`` is
    :func:`attention_buffers`, nothing is allocated or transferred, and a CUDA graph can capture the call. A token's
    result has the same bits, however it is batched, chunked or spread over the GPU; on NumPy the last bits may differ.
    A block that is not in the pool reads as zeros there; on NumPy, and everywhere under ``CUPY_PAGEDKV_DEBUG=1``, it is
    an ``IndexError``, raised before anything is written.

    Raises ``TypeError`` for arguments that are no arrays, for NumPy mixed with CuPy and for dtypes that do not agree or
    that cannot be computed with; ``ValueError`` for shapes that do not agree, for elements that lie between multiples
    of their size, for host lengths that are negative,
    do not ascend, or are more than the tables or the query hold, and for scalars out of their range.
    """
    given, given_out = query, out
    query, k_cache, v_cache = arrays_of(_INPUTS, query, k_cache, v_cache)
    backend = backend_of(_INPUTS, query, k_cache, v_cache)
    layout = attention_layout_of(query, k_cache, v_cache)
    check_aligned("query", query, backend)
    check_aligned("k_cache", k_cache, backend)
    check_aligned("v_cache", v_cache, backend)
    scoring = _scoring(layout, softmax_scale, causal, window_size, softcap)
    tables = indices("block_tables", block_tables, 2, backend, k_cache)
    lens = indices("seq_lens", seq_lens, 1, backend, k_cache)
    ends = None if cu_seqlens_q is None else indices("cu_seqlens_q", cu_seqlens_q, 1, backend, k_cache)
    _check_counts(layout, tables, lens, ends)
    if max_seqlen_q is not None:
        max_seqlen_q = at_least(0, "max_seqlen_q", max_seqlen_q)
    _check_values(backend, layout, scoring, tables, lens, ends, max_seqlen_q)
    alibi_slopes = _of_heads("alibi_slopes", alibi_slopes, layout, backend, k_cache)
    sinks = _of_heads("sinks", sinks, layout, backend, k_cache)
    scratch = None
    if isinstance(out, AttentionBuffers):
        result, lse, scratch = arrays_of(("out", "lse", "scratch"), *out)
        _check_float32("lse", lse, layout.result.shape[:2], backend, query)
        _check_float32("scratch", scratch, None, backend, query)
    else:
        result = array_of("out", out)
        lse = _new_lse(backend, layout, query, padded=ends is not None) if return_lse else None
    if result is None:
        make = backend.empty if ends is None else backend.zeros
        result = make(layout.result.shape, query.dtype, query.device)
    else:
        _check_out("out", result, layout.result.shape, query)
    if layout.num_tokens and len(lens):
        tables, lens = on_device(tables, backend, k_cache), on_device(lens, backend, k_cache)
        ends = None if ends is None else on_device(ends, backend, k_cache)
        backend.paged_attention(
            query, k_cache, v_cache, tables, lens, ends, max_seqlen_q, alibi_slopes, sinks, result, lse, scratch,
            scoring, layout,
        )  # fmt: skip
    if isinstance(given_out, AttentionBuffers):
        return given_out[:2] if return_lse else given_out.out
    result = like(result, given) if given_out is None else given_out
    return (result, like(lse, given)) if return_lse else result


def attention_buffers(
    query: Array, k_cache: Array, v_cache: Array, block_tables: IndexArray, *, max_seqlen_q: int | None = None
) -> AttentionBuffers:
    """New arrays that :func:`paged_attention` of such arguments can be given as ``out``, where the pools are.

    >>> import numpy as np
    >>> k_cache, v_cache = np.zeros((2, 4, 8, 1, 2), np.float16)
    >>> query, tables = np.ones((3, 2, 2), np.float16), np.zeros((3, 4), np.int32)
    >>> buffers = attention_buffers(query, k_cache, v_cache, tables)
    >>> paged_attention(query, k_cache, v_cache, tables, [1, 2, 3], out=buffers) is buffers.out
    True

    Values are not looked at, only shapes, so that they serve for every batch of these. ``out`` is zeros and ``lse``
    −inf in rows that are never written. Raises as :func:`paged_attention` does.
    """
    given = query
    query, k_cache, v_cache = arrays_of(_INPUTS, query, k_cache, v_cache)
    backend = backend_of(_INPUTS, query, k_cache, v_cache)
    layout = attention_layout_of(query, k_cache, v_cache)
    tables = indices("block_tables", block_tables, 2, backend, k_cache)
    floats = backend.attention_scratch(layout, len(tables), tables.shape[1], max_seqlen_q, k_cache)
    return AttentionBuffers(
        like(backend.zeros(layout.result.shape, query.dtype, query.device), given),
        like(_new_lse(backend, layout, query, padded=True), given),
        like(backend.empty((floats,), _FLOAT32, query.device), given),
    )


def merge_attention_states(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """``(out, lse)`` of attention over the union of two sets of keys that share none, from those of each.

    >>> import numpy as np
    >>> one, two = np.full((1, 1, 2), 1, np.float32), np.full((1, 1, 2), 4, np.float32)
    >>> merge_attention_states(one, np.log([[2]], dtype=np.float32), two, np.log([[1]], dtype=np.float32))[0]
    array([[[2., 2.]]], dtype=float32)

    out_a, out_b
        ``[num_tokens, num_heads, v_head_dim]``, float16, bfloat16 or float32, of any strides.
    lse_a, lse_b
        float32 ``[num_tokens, num_heads]``, natural logarithms, as ``return_lse`` gives them; −inf where there are no
        keys.

    Returns new arrays of the same shapes and dtypes, on a GPU queued on CuPy's current stream. A sink must have been
    given to one of the two alone. Raises ``TypeError`` and ``ValueError`` for arrays that do not agree.
    """
    given = out_a
    out_a, lse_a, out_b, lse_b = arrays_of(_STATES, out_a, lse_a, out_b, lse_b)
    backend = backend_of(_STATES, out_a, lse_a, out_b, lse_b)
    check_arithmetic("out_a", out_a.dtype)
    if out_a.ndim != 3:
        raise ValueError(f"out_a must be [num_tokens, num_heads, v_head_dim], got shape {out_a.shape}")
    check_aligned("out_a", out_a, backend)
    _check_out("out_b", out_b, out_a.shape, out_a, "out_a")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _check_float32(name, lse, out_a.shape[:2], backend, out_a)
    out = backend.empty(out_a.shape, out_a.dtype, out_a.device)
    lse = backend.empty(lse_a.shape, lse_a.dtype, lse_a.device)
    if out.size:
        backend.merge_attention_states(out_a, lse_a, out_b, lse_b, out, lse)
    return like(out, given), like(lse, given)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r:.40}") from None


def _scoring(
    layout: AttentionLayout, softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float
) -> Scoring:
    scale = layout.query.shape[2] ** -0.5 if softmax_scale is None else _number("softmax_scale", softmax_scale)
    softcap = _number("softcap", softcap)
    if not abs(scale) <= _MOST_FACTOR:
        raise ValueError(f"softmax_scale must be a number from -2**60 to 2**60, got {scale}")
    if softcap and not 1 / _MOST_FACTOR <= softcap <= _MOST_FACTOR:
        raise ValueError(f"softcap must be 0, which is none, or a number from 2**-60 to 2**60, got {softcap}")
    try:
        left, right = map(operator.index, window_size)
    except (TypeError, ValueError):
        raise TypeError(
            f"window_size must be two whole numbers (left, right), −1 for no limit, got {window_size!r}"
        ) from None
    return Scoring(scale, softcap, _side(left), 0 if causal else _side(right))


def _side(of_window: int) -> int:
    return of_window if 0 <= of_window < UNBOUNDED else UNBOUNDED


def _check_counts(layout: AttentionLayout, tables: Array, lens: Array, ends: Array | None) -> None:
    """That there is an entry for each sequence."""
    num_seqs, num_tokens = len(lens), layout.num_tokens
    if len(tables) != num_seqs:
        raise ValueError(f"block_tables must have one entry for each of {num_seqs} seq_lens, got {len(tables)}")
    if ends is None and num_tokens != num_seqs:
        raise ValueError(
            f"query must have one token for each of {num_seqs} seq_lens, got {num_tokens}; "
            "say by cu_seqlens_q whose tokens they are"
        )
    if ends is not None and len(ends) != num_seqs + 1:
        raise ValueError(f"cu_seqlens_q must have one entry more than seq_lens, {num_seqs + 1}, got {len(ends)}")


def _check_values(
    backend: Backend,
    layout: AttentionLayout,
    scoring: Scoring,
    tables: Array,
    lens: Array,
    ends: Array | None,
    max_seqlen_q: int | None,
) -> None:
    """What the host knows of the lengths, or, where indices are to be checked, everything."""
    check = backend.checks_indices or devices.DEBUG
    host_lens = asnumpy(lens, backend).astype(np.int64) if check or isinstance(lens, np.ndarray) else None
    host_ends = None
    if ends is not None and (check or isinstance(ends, np.ndarray)):
        host_ends = asnumpy(ends, backend).astype(np.int64)
        _check_ends(host_ends, layout.num_tokens, max_seqlen_q)
    if host_lens is None:
        return
    capacity = tables.shape[1] * layout.block_size
    wrong = (host_lens < 0) | (host_lens > capacity)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"0 <= seq_lens <= {capacity} must hold, the tokens that a row of block_tables has blocks for; "
            f"sequence {i} has {host_lens[i]}"
        )
    if check and len(host_lens):
        counts: npt.NDArray[np.int64] = np.ones_like(host_lens) if host_ends is None else np.diff(host_ends)
        seen = np.minimum(host_lens, host_lens + scoring.right)
        starts = np.maximum(0, host_lens - counts - scoring.left)
        seen[counts == 0] = 0
        check_blocks(asnumpy(tables, backend), seen, np.minimum(starts, seen), layout.num_blocks, layout.block_size)


def _check_ends(ends: npt.NDArray[np.int64], num_tokens: int, max_seqlen_q: int | None) -> None:
    counts = np.diff(ends)
    if ends[0] != 0 or (counts < 0).any() or ends[-1] > num_tokens:
        raise ValueError(
            f"cu_seqlens_q must begin with 0, ascend, and end at {num_tokens} at most, the tokens of query, "
            f"got {np.array2string(ends, threshold=12)}"
        )
    if max_seqlen_q is not None and len(counts) and counts.max() > max_seqlen_q:
        raise ValueError(
            f"no sequence may have more new tokens than max_seqlen_q, {max_seqlen_q}, "
            f"but sequence {counts.argmax()} has {counts.max()}"
        )


def _of_heads(name: str, values: Any, layout: AttentionLayout, backend: Backend, pool: Array) -> Array:
    """A float32 array of as many entries as there are heads, where the pools are; None if there are no values."""
    if values is None:
        return None
    values = array_of(name, values)
    if not isinstance(values, (np.ndarray, backend.ndarray)):
        try:
            values = np.asarray(values, np.float32)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must be one number for each head, got {values!r:.40} ({error})") from None
    num_heads = layout.query.shape[1]
    if values.dtype != _FLOAT32:
        raise TypeError(f"{name} must be float32, got {values.dtype}")
    if values.shape != (num_heads,):
        raise ValueError(f"{name} must have one entry for each of {num_heads} heads, got shape {values.shape}")
    values = on_device(values, backend, pool)
    if not backend.same_device(values, pool):
        raise ValueError(f"{name} must be where the pools are, on {pool.device}, got one on {values.device}")
    check_aligned(name, values, backend)
    return values


def _check_float32(name: str, array: Any, shape: tuple[int, ...] | None, backend: Backend, beside: Array) -> None:
    if not isinstance(array, backend.ndarray) or not backend.same_device(array, beside):
        raise TypeError(f"{name} must be an array where the others are, got {type(array).__name__}")
    if array.dtype != _FLOAT32:
        raise TypeError(f"{name} must be float32, got {array.dtype}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if shape is None and not (array.ndim == 1 and array.flags.c_contiguous):
        raise ValueError(f"{name} must be contiguous and have one axis, got shape {array.shape}")
    check_aligned(name, array, backend)
    if name in ("lse", "scratch"):
        check_writeable(name, array)


def _check_out(name: str, out: Array, shape: tuple[int, ...], like: Array, like_name: str = "query") -> None:
    backend = backend_of((name, like_name), out, like)
    if out.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {out.shape}")
    check_aligned(name, out, backend)
    if name == "out":
        check_writeable(name, out)


def _new_lse(backend: Backend, layout: AttentionLayout, query: Array, padded: bool) -> Array:
    lse = backend.empty(layout.result.shape[:2], _FLOAT32, query.device)
    if padded:
        lse.fill(-math.inf)
    return lse
