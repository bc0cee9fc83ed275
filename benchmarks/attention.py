"""Attention over the block tables: cases, who competes, and the check of each in float64 before it is timed.

On the host PyTorch gathers K and V, and attends over them in whatever way is its fastest for the case. On a GPU it is
handed them gathered, and its floor is a kernel that reads as many bytes and sums them.
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupy_pagedkv.bookkeeping.dtypes import as_dtype
from cupy_pagedkv.operations.attention import attention_buffers, paged_attention

from .cases import BLOCK_SIZE, FLOOR, OURS, Call, torch
from .timing import Row, time_on_cpu, time_on_gpu

LARGEST = 4e9  # bytes of K and V
DTYPES = ("float32", "bfloat16", "float16")
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}  # absolute: values are normal, and their means less
READ, TWO_EMPTY = "a kernel that reads", "two empty kernels"

_SUM = """
extern "C" __global__ void sum(const uint4* k, const uint4* v, long long n, unsigned* out) {
    unsigned total = 0;
    const long long threads = gridDim.x * (long long)blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += threads) {
        const uint4 a = k[i], b = v[i];
        total += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
    }
    if (total == 0x9e3779b9) *out = total;  // or the compiler reads nothing
}
"""


@dataclass(frozen=True)
class AttentionCase:
    batch: int
    new: int
    """Tokens of each sequence that attend."""
    length: int
    heads: int
    """KV heads."""
    group: int
    dim: int
    v_dim: int
    """Less than ``dim`` where V is a view of K."""
    dtype: str

    @property
    def name(self) -> str:
        return "MLA" if self.v_dim < self.dim else "decode" if self.new == 1 else "prefill"

    @property
    def shape(self) -> str:
        dims = f"{self.dim}" if self.v_dim == self.dim else f"{self.dim}/{self.v_dim}"
        return f"{self.heads}x{dims} group={self.group}"

    @property
    def label(self) -> str:
        return f"{self.name} batch={self.batch} {self.new} of {self.length} {self.shape} {self.dtype}"

    @property
    def bytes(self) -> int:
        """Of K and V, which are read once."""
        dims = self.dim if self.v_dim < self.dim else 2 * self.dim
        return self.batch * self.length * self.heads * dims * as_dtype(self.dtype).itemsize


def cases(quick: bool) -> Iterator[AttentionCase]:
    """Those that fit in memory."""
    batches, lengths, groups = ((1, 8), (128, 2048), (4,)) if quick else ((1, 8, 64), (128, 2048, 16384), (1, 4, 8))
    prefills = (512,) if quick else (512, 4096)
    shapes = [
        *((batch, 1, length, 8, group, 128, 128) for batch in batches for length in lengths for group in groups),
        *((1, 512, length, 8, group, 128, 128) for length in prefills for group in groups),
        *((batch, 1, 2048, 1, 16, 576, 512) for batch in batches),
    ]
    every = (AttentionCase(*shape, dtype) for shape in shapes for dtype in DTYPES)
    return (case for case in every if case.bytes <= LARGEST)


class AttentionProblem:
    """The arrays of a case: `sets` of sequences that share no block, over one pair of pools."""

    def __init__(self, case: AttentionCase, sets: int, xp: Any) -> None:
        rng = np.random.default_rng(0)
        dtype, columns = as_dtype(case.dtype), -(-case.length // BLOCK_SIZE)
        num_blocks = sets * case.batch * columns
        self.case, self.sets, self.xp = case, sets, xp
        self.tables = rng.permutation(num_blocks).reshape(sets, case.batch, columns).astype(np.int32)
        self.lengths = np.full(case.batch, case.length, np.int32)
        self.ends = np.arange(case.batch + 1, dtype=np.int32) * case.new
        some = rng.standard_normal(2**20 + 7, np.float32).astype(dtype)  # normal numbers take long to make

        def normal(*shape: int) -> np.ndarray:
            return np.resize(some, math.prod(shape)).reshape(shape)

        self.query = normal(case.batch * case.new, case.heads * case.group, case.dim)
        self.k = normal(num_blocks, BLOCK_SIZE, case.heads, case.dim)
        latent = case.v_dim < case.dim
        self.v = self.k[..., : case.v_dim] if latent else normal(num_blocks + 1, *self.k.shape[1:])[1:]
        self.on_device = tuple(self.to_device(a) for a in (self.query, self.k, self.tables, self.lengths, self.ends))
        self.v_on_device = self.on_device[1][..., : case.v_dim] if latent else self.to_device(self.v)

    def to_device(self, host: np.ndarray) -> Any:
        if self.xp is np:
            return host
        return self.xp.asarray(host.reshape(-1).view(np.uint8)).view(host.dtype).reshape(host.shape)

    def to_host(self, result: Any) -> np.ndarray:
        """float64; of a NumPy or CuPy array, or a tensor of PyTorch's."""
        if torch is not None and isinstance(result, torch.Tensor):
            result = result.float().cpu().numpy()
        elif self.xp is not np:
            result = self.xp.asnumpy(result.view(self.xp.uint8)).view(result.dtype)
        return result.astype(np.float64)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """(some tokens, their results in float64), of the first set."""
        case = self.case
        tokens = np.unique(np.linspace(0, len(self.query) - 1, 6).astype(int))
        results = []
        for i, sequence in zip(tokens, tokens // case.new, strict=True):
            sees = case.length - case.new + i % case.new + 1
            k, v = (
                pool[self.tables[0, sequence]].reshape(-1, *pool.shape[2:])[:sees].astype(np.float64)
                for pool in (self.k, self.v)
            )
            q = self.query[i].astype(np.float64).reshape(case.heads, case.group, case.dim)
            scores = np.einsum("hgd,phd->hgp", q, k) * case.dim**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            results.append(np.einsum("hgp,phd->hgd", weights, v).reshape(-1, case.v_dim))
        return tokens, np.stack(results)

    def verify(self, name: str, call: Call, expected: tuple[np.ndarray, np.ndarray]) -> None:
        tokens, values = expected
        error = np.abs(self.to_host(call())[tokens] - values).max()
        if not error < TOLERANCES[self.case.dtype]:
            raise SystemExit(f"{self.case.label}: {name} is wrong by {error}")


def our_calls(p: AttentionProblem, i: int) -> Call:
    query, k, tables, lengths, ends = p.on_device
    v, tables = p.v_on_device, tables[i]
    ends = None if p.case.new == 1 else ends
    if p.xp is np:
        return lambda: paged_attention(query, k, v, tables, lengths, ends)
    buffers = attention_buffers(query, k, v, tables, max_seqlen_q=p.case.new)
    return lambda: paged_attention(query, k, v, tables, lengths, ends, max_seqlen_q=p.case.new, out=buffers)


def copy_calls(p: AttentionProblem) -> Call:
    """A copy of as many bytes, of the pools in their order."""
    pools = (p.k,) if p.case.v_dim < p.case.dim else (p.k, p.v)
    pairs = [(pool.view(np.uint8), np.zeros_like(pool).view(np.uint8)) for pool in pools]

    def copy() -> None:
        for source, target in pairs:
            np.copyto(target, source)

    return copy


# PyTorch on the host: each choice that somebody could make, of which the best counts.


def torch_forms(p: AttentionProblem) -> dict[str, Call]:
    choices = (("as it is", "float32"), ("folded", "grouped"), ("one by one", "batched"))
    if p.case.dtype == "float32":
        choices = (("as it is",), *choices[1:])
    if p.case.batch == 1:
        choices = (*choices[:2], ("batched",))
    if p.case.group == 1:
        choices = (choices[0], ("folded",), choices[2])
    return {", ".join(form): torch_call(p, *form) for form in itertools.product(*choices)}


def as_torch(array: np.ndarray) -> Any:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_call(p: AttentionProblem, dtype: str, rows: str, sequences: str) -> Call:
    """Gather, and ``scaled_dot_product_attention``: its ``grouped`` by ``enable_gqa``, or a group ``folded`` into rows
    of one head."""
    case = p.case
    query, k_pool, v_pool = as_torch(p.query), as_torch(p.k), as_torch(p.v)
    latent = case.v_dim < case.dim
    tables = as_torch(p.tables[0]).long()
    tables = [tables] if sequences == "batched" else list(tables[:, None])
    mask = None
    causal = case.new == case.length and rows == "grouped"
    if case.new > 1 and not causal:
        mask = torch.ones(case.new, case.length, dtype=torch.bool).tril(case.length - case.new)
        mask = mask.repeat(case.group, 1) if rows == "folded" else mask

    def gathered(pool: Any, table: Any) -> Any:
        """[sequences, heads, positions, dim]"""
        blocks = pool.index_select(0, table.reshape(-1)).view(len(table), -1, *pool.shape[2:])[:, : case.length]
        return (blocks.float() if dtype == "float32" else blocks).transpose(1, 2)

    @torch.inference_mode()
    def call() -> Any:
        new = query.float() if dtype == "float32" else query
        new = new.view(case.batch, case.new, case.heads, case.group, case.dim)
        results, first = [], 0
        for table in tables:
            k = gathered(k_pool, table)
            v = k[..., : case.v_dim] if latent else gathered(v_pool, table)
            q = new[first : first + len(table)].permute(0, 2, 3, 1, 4)
            first += len(table)
            if rows == "folded":
                q = q.reshape(len(table), case.heads, -1, case.dim)
            else:
                q = q.reshape(len(table), -1, case.new, case.dim)
            result = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, enable_gqa=rows == "grouped"
            )
            result = result.view(len(table), case.heads, case.group, case.new, case.v_dim).permute(0, 3, 1, 2, 4)
            results.append(result.reshape(-1, case.heads * case.group, case.v_dim).to(query.dtype))
        return torch.cat(results) if len(results) > 1 else results[0]

    return call


def fastest(calls: dict[str, Call], most: int = 2) -> dict[str, Call]:
    """As many as could be the fastest; each runs twice."""

    def seconds(call: Call) -> float:
        call()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    times = {name: seconds(call) for name, call in calls.items()}
    return {name: calls[name] for name in sorted(times, key=times.__getitem__)[:most]}


# On a GPU.


def sum_calls(p: AttentionProblem, i: int) -> Call:
    xp, size = p.xp, p.case.bytes // (1 if p.case.v_dim < p.case.dim else 2)
    kernel, out = xp.RawKernel(_SUM, "sum"), xp.zeros(1, xp.uint32)
    k, v = p.on_device[1], p.v_on_device
    halves = (k, k) if p.case.v_dim < p.case.dim else (k, v)
    flat = [array.reshape(-1).view(xp.uint8)[i * size : (i + 1) * size] for array in halves]
    if p.case.v_dim < p.case.dim:
        flat = [flat[0][: size // 2], flat[0][size // 2 :]]
    n, grid = flat[0].nbytes // 16, (8 * xp.cuda.Device().attributes["MultiProcessorCount"],)
    return lambda: kernel(grid, (256,), (*flat, np.int64(n), out))


def torch_gpu_calls(p: AttentionProblem, i: int) -> Call:
    """PyTorch's attention alone, over K and V that are gathered."""
    case = p.case

    def on_gpu(array: np.ndarray) -> Any:
        return as_torch(np.ascontiguousarray(array)).cuda()

    def gathered(pool: np.ndarray) -> Any:
        rows = pool[p.tables[i]].reshape(case.batch, -1, *pool.shape[2:])[:, : case.length]
        return on_gpu(rows.transpose(0, 2, 1, 3))

    q = on_gpu(p.query.reshape(case.batch, case.new, -1, case.dim).transpose(0, 2, 1, 3))
    k, v = gathered(p.k), gathered(p.v)
    mask = None
    if case.new > 1:
        from torch.nn.attention.bias import causal_lower_right  # which importing torch alone does not bring

        mask = causal_lower_right(case.new, case.length)

    def call() -> Any:
        result = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=case.group > 1)
        return result.transpose(1, 2).reshape(-1, case.heads * case.group, case.v_dim)

    return call


def contenders(p: AttentionProblem) -> dict[str, list[Call]]:
    """One call for each set. PyTorch's on the host are the fastest of many; `torch: …` says in which way."""
    calls = {OURS: [our_calls(p, i) for i in range(p.sets)]}
    if p.xp is np:
        calls[FLOOR] = [copy_calls(p)]
        if torch is not None:
            calls |= {f"torch: {form}": [call] for form, call in fastest(torch_forms(p)).items()}
        return calls
    calls[READ] = [sum_calls(p, i) for i in range(p.sets)]
    empty = p.xp.RawKernel('extern "C" __global__ void empty() {}', "empty")

    def two() -> None:
        empty((1,), (32,), ())
        empty((1,), (32,), ())

    calls[TWO_EMPTY] = [two] * p.sets
    if torch is not None and torch.cuda.is_available():
        calls["torch"] = [torch_gpu_calls(p, i) for i in range(p.sets)]
    return calls


def measure_attention(case: AttentionCase, xp: Any, seconds: float) -> Row:
    sets = 1
    if xp is not np:
        l2 = xp.cuda.Device().attributes["L2CacheSize"]
        sets = min(64, max(2, -(-4 * l2 // case.bytes)))
    problem = AttentionProblem(case, sets, xp)
    calls, expected = contenders(problem), problem.expected()
    for name, of_sets in calls.items():
        if name not in (FLOOR, READ, TWO_EMPTY):
            problem.verify(name, of_sets[0], expected)
    return Row(case, time_on_cpu(calls, seconds) if xp is np else time_on_gpu(calls, seconds, xp))


def best_torch(row: Row) -> str | None:
    """The fastest of PyTorch's ways."""
    return min((name for name in row.seconds if name.startswith("torch")), key=row.seconds.__getitem__, default=None)
