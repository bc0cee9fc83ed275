"""Arguments of attention, poisoned wherever nothing may be read, and what must come of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import Device

from cupy_pagedkv import AttentionBuffers, attention_buffers, paged_attention

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
SPLIT = 256  # positions whose sums a kernel computes on their own


class Scene:
    """A batch of sequences whose K and V lie in blocks anywhere in the pools.

    All else in the pools is NaN: tails, other blocks, positions that no token sees. So are the rows of ``query`` behind
    the last token. Entries of the block tables that are not to be read are no blocks.
    """

    def __init__(
        self,
        device: Device,
        rng: np.random.Generator,
        lens: Sequence[tuple[int, int]],
        *,
        heads: tuple[int, int] = (8, 2),
        dim: int = 64,
        v_dim: int = 0,
        dtype: Any = np.float16,
        block_size: int = 16,
        layout: str = "NHD",
        first: int = 0,
        index: Any = np.int32,
        padding: int = 0,
        packed: bool = True,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        """``lens``: (new tokens, all tokens) of each sequence. ``layout`` "latent": V is the beginning of K.

        ``first``: elements before the pools. ``padding``: rows of the query behind the last. ``packed``: with
        ``cu_seqlens_q``, else one token each. ``scale``: standard deviation of query and keys.
        """
        self.device, self.options = device, options
        self.counts, self.lens = [n for n, _ in lens], [n for _, n in lens]
        self.ends = np.cumsum([0, *self.counts])
        num_tokens = int(self.ends[-1])
        left, right = options.get("window_size", (-1, -1))
        self.left, self.right = left if left >= 0 else 2**40, right if right >= 0 else 2**40
        if options.get("causal", True):
            self.right = 0
        self.block_size = block_size

        self.seen = [self._seen_by_any(i) for i in range(len(lens))]
        columns = [range(start // block_size, -(-end // block_size)) for start, end in self.seen]
        num_blocks = sum(map(len, columns)) + 2
        max_blocks = max((-(-n // block_size) for n in self.lens), default=0) + 3
        self.tables = rng.choice([-1, -(2**31), num_blocks, 2**31 - 1], (len(lens), max_blocks)).astype(index)
        blocks = rng.permutation(num_blocks).tolist()
        for row, needed in zip(self.tables, columns, strict=True):
            for column in needed:
                row[column] = blocks.pop()

        if layout == "latent":
            size, views = oracle.pools("NHD", num_blocks, block_size, heads[1], dim, dtype, first=first)

            def views_of(buffer: Any) -> tuple[Any, Any]:
                k_cache = views(buffer)[0]
                return k_cache, k_cache[..., :v_dim]
        else:
            size, views_of = oracle.pools(layout, num_blocks, block_size, heads[1], dim, dtype, v_dim, first)
        self.views = views_of
        self.buffer = np.full(size, 255, np.uint8)  # NaN in each of the dtypes
        self.pools = views_of(self.buffer)
        for i in range(len(lens)):
            place = self.places(i)
            shape = (len(place[0]), *self.pools[0].shape[2:])
            self.pools[1][place] = rng.standard_normal((*shape[:2], self.pools[1].shape[3])).astype(dtype)
            self.pools[0][place] = (scale * rng.standard_normal(shape)).astype(dtype)

        self.query = np.full((num_tokens + padding, heads[0], dim), math.nan, dtype)
        self.query[:num_tokens] = scale * rng.standard_normal((num_tokens, heads[0], dim))
        self.on_device = self.device.array(self.buffer)
        self.arguments: dict[str, Any] = {
            "query": device.array(self.query),
            "block_tables": device.array(self.tables),
            "seq_lens": device.array(np.array(self.lens, index)),
            "cu_seqlens_q": device.array(self.ends.astype(index)) if packed else None,
            **options,
        }
        self.arguments["k_cache"], self.arguments["v_cache"] = views_of(self.on_device)
        for name in ("alibi_slopes", "sinks"):
            if options.get(name) is not None:
                options[name] = np.asarray(options[name], np.float32)
                self.arguments[name] = device.array(options[name])

    def _seen_by_any(self, i: int) -> tuple[int, int]:
        """The positions that some token of sequence ``i`` sees, half-open."""
        count, seq_len = self.counts[i], self.lens[i]
        start, end = max(0, seq_len - count - self.left), min(seq_len, seq_len + self.right)
        return (start, end) if count and start < end else (0, 0)

    def places(self, i: int, positions: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """(blocks, offsets) of positions of a sequence, by default of all that are seen."""
        positions = np.arange(*self.seen[i]) if positions is None else np.asarray(positions)
        return self.tables[i, positions // self.block_size], positions % self.block_size

    def load(self) -> "Scene":
        """Bring the query and the pools, as a test has changed them on the host, to the device."""
        self.arguments["query"] = self.device.array(self.query)
        self.on_device[...] = self.device.array(self.buffer)
        return self

    def visible(self, i: int) -> np.ndarray:
        """Which of the seen positions ``[p]`` each token of a sequence sees: bool ``[tokens, p]``."""
        t = self.lens[i] - self.counts[i] + np.arange(self.counts[i])[:, None]
        p = np.arange(*self.seen[i])
        return (p < self.lens[i]) & (t - self.left <= p) & (p <= t + self.right)

    def attend(self, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) of paged_attention, on the host."""
        out, lse = paged_attention(**{**self.arguments, **arguments}, return_lse=True)
        return self.device.numpy(out), self.device.numpy(lse)

    def buffers(self, **arguments: Any) -> AttentionBuffers:
        """Results and scratch that are NaN."""
        names = ("query", "k_cache", "v_cache", "block_tables")
        buffers = attention_buffers(*(self.arguments[name] for name in names), **arguments)
        for array in buffers:
            array.reshape(-1).view(np.uint8)[...] = 255
        return buffers

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) in float64. Rows of no sequence are zeros and −inf."""
        return self._by_matrices(np.float64, lambda x: x)

    def naive(self) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) as arrays of the query's dtype compute it, every result rounded to that."""
        dtype = self.query.dtype
        return self._by_matrices(np.float32, lambda x: x.astype(dtype).astype(np.float32))

    def _by_matrices(self, work: Any, rounded: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        num_tokens, num_heads, dim = self.query.shape
        kv_heads, v_dim = self.pools[0].shape[2], self.pools[1].shape[3]
        options = self.options
        scale = work(dim**-0.5 if options.get("softmax_scale") is None else options["softmax_scale"])
        softcap, slopes, sinks = (options.get(name) for name in ("softcap", "alibi_slopes", "sinks"))
        sinks = np.full((num_heads, 1), -math.inf, work) if sinks is None else sinks.astype(work)[:, None]
        out = np.zeros((num_tokens, num_heads, v_dim), work)
        lse = np.full((num_tokens, num_heads), -math.inf, work)
        for i, count in enumerate(self.counts):
            rows = slice(self.ends[i], self.ends[i + 1])
            rows_of_head = num_heads // kv_heads * count
            k, v = (pool[self.places(i)].astype(work) for pool in self.pools)
            q = self.query[rows].astype(work).reshape(count, kv_heads, num_heads // kv_heads, dim).transpose(1, 2, 0, 3)
            scores = rounded(scale * rounded(q @ k.transpose(1, 2, 0)[:, None]))  # [KV heads, group, tokens, positions]
            if softcap:
                scores = rounded(work(softcap) * np.tanh(rounded(scores / work(softcap))))
            if slopes is not None:
                t = self.lens[i] - count + np.arange(count)[:, None]
                distance = np.abs(t - np.arange(*self.seen[i])).astype(work)
                scores = rounded(scores - slopes.astype(work).reshape(kv_heads, -1, 1, 1) * distance)
            scores = np.where(self.visible(i), scores, work(-math.inf)).reshape(num_heads, count, len(v))
            most = np.maximum(scores.max(2, initial=-math.inf), sinks)
            shift = np.where(np.isneginf(most), work(0), most)
            weights = np.exp(scores - shift[..., None])
            total = weights.sum(2) + np.exp(sinks - shift)
            p = rounded(weights / np.where(total == 0, work(1), total)[..., None]).reshape(
                kv_heads, rows_of_head, len(v)
            )
            values = rounded(p @ v.transpose(1, 0, 2)).reshape(num_heads, count, v_dim)
            out[rows] = values.transpose(1, 0, 2)
            with np.errstate(divide="ignore"):
                lse[rows] = (shift + np.log(total)).T
        return out, lse

    def check(self, got: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """That ``out`` is at most twice as far from the exact result as the naive one, three times with a softcap."""
        out, lse = self.attend() if got is None else got
        exact, exact_lse = self.exact()
        assert (out.dtype, out.shape, lse.dtype, lse.shape) == (
            self.query.dtype, exact.shape, np.dtype(np.float32), exact_lse.shape,
        )  # fmt: skip
        out = out.astype(np.float64)
        assert np.isfinite(out).all(), f"rows (token, head) that are not finite: {not_finite(out)}"
        allowed = (3 if self.options.get("softcap") else 2) * np.abs(self.naive()[0] - exact).max(initial=0) + 1e-5
        errors = np.abs(out - exact).max(2, initial=0)
        assert errors.max(initial=0) <= allowed, f"{errors.max()} > {allowed} in rows {wrong_rows(errors > allowed)}"
        nothing = np.isneginf(exact_lse)
        assert (np.isneginf(lse) == nothing).all(), f"LSE −inf in other rows: {wrong_rows(np.isneginf(lse) != nothing)}"
        assert not out[nothing].any(), "a row that sees nothing must be zeros"
        errors = np.abs(lse[~nothing] - exact_lse[~nothing])
        assert (errors <= 2e-5 * (1 + np.abs(exact_lse[~nothing]))).all(), f"LSE: {errors.max()}"


def not_finite(out: np.ndarray) -> list[tuple[int, ...]]:
    return wrong_rows(~np.isfinite(out).all(axis=2))


def wrong_rows(wrong: np.ndarray) -> list[tuple[int, ...]]:
    """(token, head) of the first few."""
    return [tuple(row) for row in np.argwhere(wrong)[:8].tolist()]


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")


def same_bits(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> bool:
    """Of (out, lse)."""
    return all(np.array_equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def slopes(num_heads: int) -> list[float]:
    """ALiBi's."""
    return [2 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)]


def pairwise(factors: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few choices of a value of each factor, so that each pair of values of two factors is in one of them."""
    names = list(factors)
    missing = {
        (a, i, b, j): None  # a set that keeps its order
        for n, a in enumerate(names)
        for b in names[n + 1 :]
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }

    def covers(choice: dict[str, int]) -> list[tuple[str, int, str, int]]:
        pairs = ((a, choice[a], b, choice[b]) for n, a in enumerate(names) for b in names[n + 1 :])
        return [pair for pair in pairs if pair in missing]

    rng = np.random.default_rng(0)
    choices = []
    while missing:
        a, i, b, j = list(missing)[rng.integers(len(missing))]
        candidates = [
            {**{name: int(rng.integers(len(values))) for name, values in factors.items()}, a: i, b: j}
            for _ in range(40)
        ]
        best = max(candidates, key=lambda choice: len(covers(choice)))
        for pair in covers(best):
            del missing[pair]
        choices.append({name: factors[name][i] for name, i in best.items()})
    return choices
