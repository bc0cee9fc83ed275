"""Attention by NumPy."""

import math
from typing import Any, TypeAlias

import numpy as np

from .layout import AttentionLayout, Scoring

__all__ = ["merge_attention_states", "paged_attention"]

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


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
    group, block_size = layout.group, layout.block_size
    num_heads = query.shape[1]
    for i, seq_len in enumerate(seq_lens.tolist()):
        first, last = (i, i + 1) if cu_seqlens_q is None else (int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        if first == last:
            continue
        t = seq_len - (last - first) + np.arange(last - first)[:, None]
        start = max(0, int(t[0, 0]) - scoring.left)
        end = max(start, min(seq_len, seq_len + scoring.right))
        p = np.arange(start, end)
        blocks, offsets = block_tables[i, p // block_size], p % block_size
        q = query[first:last].astype(np.float32).swapaxes(0, 1)
        k = np.repeat(k_cache[blocks, offsets].astype(np.float32).transpose(1, 2, 0), group, 0)
        v = np.repeat(v_cache[blocks, offsets].astype(np.float32).swapaxes(0, 1), group, 0)
        scores = q @ k * np.float32(scoring.softmax_scale)
        if scoring.softcap:
            scores = np.tanh(scores / np.float32(scoring.softcap)) * np.float32(scoring.softcap)
        if alibi_slopes is not None:
            scores -= alibi_slopes[:, None, None] * np.abs(t - p).astype(np.float32)
        seen = (p < seq_len) & (t - scoring.left <= p) & (p <= t + scoring.right)
        scores = np.where(seen, scores, -np.inf)
        most = np.maximum(scores.max(2, initial=-np.inf), -np.inf if sinks is None else sinks[:, None])
        shift = np.where(most == -np.inf, 0, most)
        weights = np.exp(scores - shift[..., None])
        sums = weights.sum(2) + (0 if sinks is None else np.exp(sinks[:, None] - shift))
        for token in range(last - first):
            w, visible = weights[:, token, seen[token]], seen[token]
            row = np.einsum("hp,hpd->hd", w, v[:, visible])
            total = sums[:, token, None]
            out[first + token] = np.divide(row, total, out=np.zeros_like(row), where=total > 0)
        if lse is not None:
            with np.errstate(divide="ignore"):
                lse[first:last] = (shift + np.log(sums)).T
    assert num_heads % group == 0


def merge_attention_states(
    out_a: _Array, lse_a: _Array, out_b: _Array, lse_b: _Array, out: _Array, lse: _Array
) -> None:
    most = np.maximum(lse_a, lse_b)
    shift = np.where(most == -math.inf, np.float32(0), most)
    a, b = np.exp(lse_a - shift), np.exp(lse_b - shift)
    total = a + b
    with np.errstate(divide="ignore"):
        lse[...] = shift + np.log(total)
    total[total == 0] = 1
    out[...] = out_a.astype(np.float32) * (a / total)[..., None] + out_b.astype(np.float32) * (b / total)[..., None]
