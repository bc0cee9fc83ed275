"""What is measured, who competes, and the check of every contender, byte for byte, before it is timed.

PyTorch and Triton compete where they are installed. Everybody is handed the same: tokens, pools and slots to scatter;
pools, block tables and lengths to gather, with an `out` where the interface has one; pools, and blocks from and to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle

from cupy_pagedkv import PagedKVCache

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK_SIZE = 16
TOKENS = (1, 16, 64, 512, 4096, 32768)
SHAPES = ((8, 128, "float16"), (1, 576, "float16"), (32, 128, "float32"), (8, 64, "float16"), (8, 46, "float16"))
LONGEST_SEQUENCE = 4096
OPERATIONS = {
    "scatter blocks": "reshape_and_cache",  # slots run through whole blocks, which lie anywhere
    "scatter slots": "reshape_and_cache",  # slots lie anywhere
    "gather": "gather_cache",
    "copy blocks": "copy_blocks",  # as many as hold the tokens, from anywhere to anywhere
}
OURS, FLOOR = "cupy_pagedkv", "copy"

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    operation: str
    heads: int
    dim: int
    dtype: str
    tokens: int

    @property
    def shape(self) -> str:
        return f"{self.heads}x{self.dim} {self.dtype}"

    @property
    def label(self) -> str:
        return f"{self.operation} {self.shape} tokens={self.tokens}"

    @property
    def bytes(self) -> int:
        """Of K and V; an operation reads and writes as many."""
        return 2 * self.tokens * self.heads * self.dim * np.dtype(self.dtype).itemsize


class Problem:
    """The arrays of a case: `sets` of inputs that share nothing, over one pair of pools."""

    def __init__(self, case: Case, sets: int, xp: Any) -> None:
        rng = np.random.default_rng(0)
        n, shape = case.tokens, (case.heads, case.dim)
        lengths = np.array([min(LONGEST_SEQUENCE, n - i) for i in range(0, n, LONGEST_SEQUENCE)], np.int32)
        num_seqs, longest = len(lengths), -(-int(lengths.max()) // BLOCK_SIZE)
        used = sets * num_seqs * longest
        num_blocks = (2 * used if case.operation == "copy blocks" else used * 5 // 4) + 1
        blocks = rng.permutation(num_blocks)
        tables = blocks[:used].reshape(sets, num_seqs, longest)
        slots = (tables[..., None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(sets, -1)[:, :n]
        if case.operation == "scatter slots":
            slots = rng.permutation(num_blocks * BLOCK_SIZE)[: sets * n].reshape(sets, n)
        self.case, self.sets, self.xp = case, sets, xp
        self.host_pools = random_tokens(rng, (2, num_blocks, BLOCK_SIZE, *shape), case.dtype)
        self.host_tokens = random_tokens(rng, (2, sets, n, *shape), case.dtype)
        self.host_slots, self.host_tables, self.host_lengths = slots, tables, lengths
        self.host_pairs = blocks[: 2 * used].reshape(2, sets, -1) if case.operation == "copy blocks" else tables[:0]
        self.pools = xp.array(self.host_pools)
        self.flat = self.pools.reshape(2, -1, *shape)  # by slot
        self.tokens = xp.array(self.host_tokens)
        self.out = xp.zeros(self.tokens.shape, self.tokens.dtype)
        self.slots, self.tables = xp.asarray(slots), xp.asarray(tables.astype(np.int32))
        self.lengths, self.pairs = xp.asarray(lengths), xp.asarray(self.host_pairs)
        self.cache = PagedKVCache.from_pools(self.pools[0], self.pools[1])

    def expected(self) -> np.ndarray:
        """The bytes after the first set: both pools of a scatter or a copy, or K and V of a gather."""
        if self.case.operation == "copy blocks":
            pools = self.host_pools.copy()
            for source, target in self.host_pairs[:, 0].T:
                pools[:, target] = pools[:, source]
            return pools
        if self.case.operation != "gather":
            pools = self.host_pools.copy()
            for tokens, pool in zip(self.host_tokens[:, 0], pools, strict=True):
                oracle.scatter(tokens, pool, self.host_slots[0])
            return pools
        starts = [0] * len(self.host_lengths)
        return np.stack(
            [oracle.gather(pool, self.host_tables[0], self.host_lengths, starts) for pool in self.host_pools]
        )

    def verify(self, name: str, call: Call, expected: np.ndarray) -> None:
        """Run a contender's call for the first set, and compare all bytes that it may have touched."""
        if name == FLOOR:
            self.out[...] = 0
            call()
            got, expected = self.out[:, 0], self.host_tokens[:, 0]
        elif self.case.operation == "gather":
            self.out[...] = 0
            got = self.xp.stack([self.xp.asarray(array) for array in call()])
        else:
            self.pools[...] = self.xp.asarray(self.host_pools)
            call()
            got = self.pools
        wrong = wrong_bytes(got, expected, self.xp)
        if len(wrong):
            raise SystemExit(f"{self.case.label}: {name} is wrong in {len(wrong)} bytes, the first at {wrong[0]}")


def random_tokens(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return oracle.random_bytes(rng, size).view(dtype).reshape(shape)


def wrong_bytes(got: Any, expected: np.ndarray, xp: Any) -> np.ndarray:
    """Where the bytes of an array on the device differ from those of one on the host."""
    got = got if xp is np else xp.asnumpy(got)
    return np.flatnonzero(got.reshape(-1).view(np.uint8) != expected.reshape(-1).view(np.uint8))


# Who competes. Each gets one callable for each set of inputs.


def contenders(p: Problem) -> dict[str, list[Call]]:
    makers = {FLOOR: copy_calls, OURS: our_calls, "indexing": indexing_calls}
    if torch is not None and (p.xp is np or torch.cuda.is_available()):
        makers["torch"] = torch_calls
        if triton is not None and p.xp is not np and p.case.operation.startswith("scatter"):
            makers["triton"] = triton_calls
    return {name: [make(p, i) for i in range(p.sets)] for name, make in makers.items()}


def copy_calls(p: Problem, i: int) -> Call:
    (k, v), (k_out, v_out) = p.tokens[:, i], p.out[:, i]

    def on_cpu() -> None:
        np.copyto(k_out, k)
        np.copyto(v_out, v)

    def on_gpu() -> None:
        k_out.data.copy_from_device_async(k.data, k.nbytes)
        v_out.data.copy_from_device_async(v.data, v.nbytes)

    return on_cpu if p.xp is np else on_gpu


def our_calls(p: Problem, i: int) -> Call:
    (key, value), slots, tables, lengths, cache = p.tokens[:, i], p.slots[i], p.tables[i], p.lengths, p.cache
    out = (p.out[0, i], p.out[1, i])
    if p.case.operation == "copy blocks":
        src, dst = p.pairs[:, i]
        return lambda: cache.copy_blocks(src, dst)
    if p.case.operation == "gather":
        return lambda: cache.gather(tables, lengths, out=out)
    return lambda: cache.update(key, value, slots)


def indexing_calls(p: Problem, i: int) -> Call:
    if p.case.operation == "copy blocks":
        src, dst = p.pairs[:, i]

        def copy() -> None:
            for pool in p.pools:
                pool[dst] = pool[src]

        return copy
    (key, value), (k_pool, v_pool), slots, tables = p.tokens[:, i], p.flat, p.slots[i], p.tables[i]
    k_out, v_out = p.out[:, i]
    total, each = p.case.tokens, p.xp.arange(BLOCK_SIZE)

    def scatter() -> None:
        k_pool[slots] = key
        v_pool[slots] = value

    def gather() -> Any:
        rows = (tables[..., None] * BLOCK_SIZE + each).reshape(-1)[:total]
        if p.xp is np:
            return k_pool[rows], v_pool[rows]
        return k_pool.take(rows, 0, k_out), v_pool.take(rows, 0, v_out)

    return gather if p.case.operation == "gather" else scatter


def torch_calls(p: Problem, i: int) -> Call:
    as_torch = torch.from_numpy if p.xp is np else torch.from_dlpack
    if p.case.operation == "copy blocks":
        (src, dst), pools = map(as_torch, p.pairs[:, i]), [as_torch(pool) for pool in p.pools]

        def copy() -> None:
            for pool in pools:
                pool.index_copy_(0, dst, pool.index_select(0, src))

        return copy
    (key, value), (k_pool, v_pool) = map(as_torch, p.tokens[:, i]), map(as_torch, p.flat)
    (k_out, v_out), slots, tables = map(as_torch, p.out[:, i]), as_torch(p.slots[i]), as_torch(p.tables[i])
    total, each = p.case.tokens, torch.arange(BLOCK_SIZE, dtype=torch.int32, device=slots.device)

    def scatter() -> None:
        k_pool.index_copy_(0, slots, key)
        v_pool.index_copy_(0, slots, value)

    def gather() -> Any:
        rows = (tables[..., None] * BLOCK_SIZE + each).view(-1)[:total]
        torch.index_select(k_pool, 0, rows, out=k_out)
        torch.index_select(v_pool, 0, rows, out=v_out)
        return p.out[:, i]

    return gather if p.case.operation == "gather" else scatter


if triton is not None:

    @triton.jit
    def store(key, value, k_pool, v_pool, slots, ROW: tl.constexpr, PLACES: tl.constexpr):  # type: ignore  # noqa
        """A program a token, as the serving engines' Triton kernels have it."""
        token = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + token)
        if slot >= 0:
            places = tl.arange(0, PLACES)
            tl.store(k_pool + slot * ROW + places, tl.load(key + token * ROW + places, places < ROW), places < ROW)
            tl.store(v_pool + slot * ROW + places, tl.load(value + token * ROW + places, places < ROW), places < ROW)


def triton_calls(p: Problem, i: int) -> Call:
    arrays = [torch.from_dlpack(array) for array in (*p.tokens[:, i], *p.flat, p.slots[i])]
    row = p.case.heads * p.case.dim
    grid, places = (p.case.tokens,), triton.next_power_of_2(row)
    return lambda: store[grid](*arrays, ROW=row, PLACES=places)
