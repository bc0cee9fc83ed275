"""What the operations must do, as plain loops over bytes or in float64, and the memory that they do it in."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Pools = Callable[[Any], tuple[Any, Any]]
"""From a buffer of bytes to the views of it that are k_cache and v_cache."""


def random_bytes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Bytes that do not repeat where a block, a page or a power of two does."""
    period = rng.integers(0, 256, 1_048_573, dtype=np.uint8)
    return np.resize(period, size)


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Any bytes, so NaNs of every payload."""
    dtype = np.dtype(dtype)
    return rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8).view(dtype)[..., 0]


def pools(
    layout: str, num_blocks: int, block_size: int, heads: int, dim: int, dtype: Any, v_dim: int = 0, first: int = 0
) -> tuple[int, Pools]:
    """The bytes that pools of a layout take, and how to find the pools in a buffer of so many.

    ``first`` elements come before the pools, and 64 bytes that belong to nobody come last.
    """
    dtype = np.dtype(dtype)
    v_dim = v_dim or dim
    k_size, v_size = (num_blocks * block_size * heads * d for d in (dim, v_dim))

    def views(buffer: Any) -> tuple[Any, Any]:
        elements = buffer[first * dtype.itemsize : (first + k_size + v_size) * dtype.itemsize].view(dtype)
        if layout == "interleaved":
            both = elements.reshape(num_blocks, 2, block_size, heads, dim)
            return both[:, 0], both[:, 1]
        if layout == "packed":
            both = elements.reshape(num_blocks, block_size, heads, dim + v_dim)
            return both[..., :dim], both[..., dim:]
        k, v = elements[:k_size], elements[k_size:]
        if layout == "HND":
            k, v = k.reshape(num_blocks, heads, block_size, dim), v.reshape(num_blocks, heads, block_size, v_dim)
            return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        assert layout == "NHD"
        return k.reshape(num_blocks, block_size, heads, dim), v.reshape(num_blocks, block_size, heads, v_dim)

    return (first + k_size + v_size) * dtype.itemsize + 64, views


def opaque(array: np.ndarray) -> np.ndarray:
    """The same memory as items without a meaning, which NumPy copies and compares as bytes."""
    return array.view(f"V{array.itemsize}")


def scatter(tokens: np.ndarray, pool: np.ndarray, slots: Sequence[int]) -> None:
    tokens, pool = opaque(tokens), opaque(pool)
    for token, slot in enumerate(slots):
        if slot >= 0:
            pool[slot // pool.shape[1], slot % pool.shape[1]] = tokens[token]


def gather(pool: np.ndarray, tables: Any, lens: Sequence[int], starts: Sequence[int]) -> np.ndarray:
    """The rows, as items without a meaning."""
    pool = opaque(pool)
    positions = [(i, position) for i in range(len(lens)) for position in range(starts[i], lens[i])]
    rows = np.empty((len(positions), *pool.shape[2:]), pool.dtype)
    for row, (i, position) in enumerate(positions):
        rows[row] = pool[tables[i][position // pool.shape[1]], position % pool.shape[1]]
    return rows


def attention(
    query: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    block_tables: Any,
    seq_lens: Sequence[int],
    cu_seqlens_q: Sequence[int] | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of paged attention, float64: a loop over tokens, heads and positions. NaN in rows of no sequence."""
    num_tokens, num_heads, dim = query.shape
    block_size, group = k_cache.shape[1], num_heads // k_cache.shape[2]
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    left, right = window_size
    ends = range(len(seq_lens) + 1) if cu_seqlens_q is None else cu_seqlens_q
    out = np.full((num_tokens, num_heads, v_cache.shape[3]), math.nan)
    lse = np.full((num_tokens, num_heads), math.nan)
    for i, seq_len in enumerate(seq_lens):
        for token in range(ends[i], ends[i + 1]):
            t = int(seq_len) - int(ends[i + 1]) + token
            seen = [
                p
                for p in range(int(seq_len))
                if (not causal or p <= t) and (left < 0 or t - left <= p) and (right < 0 or p <= t + right)
            ]
            for head in range(num_heads):
                scores = [] if sinks is None else [float(sinks[head])]
                values = [] if sinks is None else [np.zeros(v_cache.shape[3])]
                q = query[token, head].astype(np.float64)
                for p in seen:
                    place = int(block_tables[i][p // block_size]), p % block_size, head // group
                    score = scale * float(q @ k_cache[place].astype(np.float64))
                    if softcap:
                        score = softcap * math.tanh(score / softcap)
                    if alibi_slopes is not None:
                        score -= float(alibi_slopes[head]) * abs(t - p)
                    scores.append(score)
                    values.append(v_cache[place].astype(np.float64))
                if not scores:
                    out[token, head], lse[token, head] = 0, -math.inf
                    continue
                weights = np.exp(np.array(scores) - max(scores))
                out[token, head] = weights @ np.array(values) / weights.sum()
                lse[token, head] = max(scores) + math.log(weights.sum())
    return out, lse
