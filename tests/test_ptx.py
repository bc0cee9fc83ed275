"""kernels/ptx.cuh on a GPU and its twins, emulator/ptx.hpp, on the emulated device: one set of kernels for both.

The kernels place and take fragments by the formulas of the PTX ISA, written down here a second time.
"""

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_pagedkv.devices.sources import with_includes
from cupy_pagedkv.emulator import KernelError, RawKernel, emulate
from cupy_pagedkv.emulator.nvrtc import ARCHITECTURES, _disassemble, compile_kernel

HEADER = (Path(__file__).parent.parent / "kernels" / "ptx.cuh").read_text()
BF16 = ml_dtypes.bfloat16


def source(code: str) -> str:
    return with_includes(f'#include "ptx.cuh"\n{code}', "test.cu")


def run(code: str, *arguments: Any, device: Any = None, threads: int = 32, blocks: int = 1) -> list[np.ndarray]:
    """The arrays among ``arguments`` after kernel ``f`` has run on copies of them; without ``device``, emulated."""
    cupy = device is not None and device.name == "cupy"
    kernel = device.xp.RawKernel(source(code), "f", ("-std=c++17",)) if cupy else RawKernel(source(code), "f")
    copies = [x if np.isscalar(x) else device.array(x) if device else x.copy() for x in arguments]
    kernel((blocks,), (threads,), tuple(copies))
    return [device.numpy(x) if device else x for x in copies if not np.isscalar(x)]


def run_in_every_mode(code: str, *arguments: Any, device: Any, threads: int) -> list[np.ndarray]:
    """As ``run``; the emulated device gives the same in another order, and finds no fault."""
    results = run(code, *arguments, device=device, threads=threads)
    for mode in ({"order": "backward"}, {"order": "shuffled:3"}, {"check": True}) if device.name == "emulated" else ():
        with emulate(**mode):
            for result, same in zip(results, run(code, *arguments, device=device, threads=threads), strict=True):
                assert result.tobytes() == same.tobytes(), mode
    return results


# mma

# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", .f16 and .bf16: a0 to a7, b0 to b3, c0 to c3.
# PTX ISA, "Matrix Fragments for mma.m16n8k8", .f16: a0 to a3, b0 and b1, c0 to c3.
# Both with groupID = %laneid >> 2 and threadID_in_group = %laneid % 4.
MMA = """
template <int K> __device__ int row_of_a(int i, int group)
{
    if (K == 16) return (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
    return i < 2 ? group : group + 8;
}
template <int K> __device__ int column_of_a(int i, int t)
{
    if (K == 16) return i < 4 ? t * 2 + (i & 1) : t * 2 + (i & 1) + 8;
    return t * 2 + (i & 1);
}
template <int K> __device__ int row_of_b(int i, int t)
{
    if (K == 16) return i < 2 ? t * 2 + (i & 1) : t * 2 + (i & 1) + 8;
    return t * 2 + i;
}
template <int K, class Mma> __device__ void products(const unsigned short* a, const unsigned short* b, float* d, Mma mma)
{
    const int warp = threadIdx.x >> 5, group = (threadIdx.x & 31) >> 2, t = threadIdx.x % 4;
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = d[warp * 128 + (i < 2 ? group : group + 8) * 8 + t * 2 + (i & 1)];
    for (int step = 0; step < STEPS; ++step) {
        const unsigned short* a_now = a + (warp * STEPS + step) * 16 * K;
        const unsigned short* b_now = b + (warp * STEPS + step) * 8 * K;
        unsigned a_bits[K / 4] = {}, b_bits[K / 8] = {};
        for (int i = 0; i < K / 2; ++i)
            a_bits[i / 2] |= (unsigned)a_now[row_of_a<K>(i, group) * K + column_of_a<K>(i, t)] << i % 2 * 16;
        for (int i = 0; i < K / 4; ++i) b_bits[i / 2] |= (unsigned)b_now[group * K + row_of_b<K>(i, t)] << i % 2 * 16;
        mma(c, a_bits, b_bits);
    }
    for (int i = 0; i < 4; ++i) d[warp * 128 + (i < 2 ? group : group + 8) * 8 + t * 2 + (i & 1)] = c[i];
}
extern "C" __global__ void f(const unsigned short* a, const unsigned short* b, float* d, int which)
{
    using A16 = unsigned[4];
    using A8 = unsigned[2];
    using B16 = unsigned[2];
    using B8 = unsigned[1];
    using D = float[4];
    if (which == 0) products<8>(a, b, d, [](D& d, A8& a, B8& b) { mma_m16n8k8_f16(d, a, b[0]); });
#if __CUDA_ARCH__ >= 800
    if (which == 1) products<16>(a, b, d, [](D& d, A16& a, B16& b) { mma_m16n8k16_f16(d, a, b); });
    if (which == 2) products<16>(a, b, d, [](D& d, A16& a, B16& b) { mma_m16n8k16_bf16(d, a, b); });
#endif
}
"""
WARPS, STEPS = 2, 3
MMA = f"#define STEPS {STEPS}\n{MMA}"


@pytest.mark.parametrize(
    ("which", "k", "dtype"), [(0, 8, np.float16), (1, 16, np.float16), (2, 16, BF16)], ids=["k8-f16", "k16-f16", "k16-bf16"]
)
def test_mma_multiplies_and_adds(kernel_device, rng, which, k, dtype):
    """Whole numbers, distinct in each matrix and small enough that every sum is exact; each warp has its own."""
    if kernel_device.name == "cupy" and which and int(kernel_device.xp.cuda.Device().compute_capability) < 80:
        pytest.skip("Turing has no mma.m16n8k16")

    def distinct(rows: int, columns: int) -> np.ndarray:
        numbers = np.arange(rows * columns) - rows * columns // 2
        return np.array([rng.permutation(numbers) for _ in range(WARPS * STEPS)]).reshape(WARPS, STEPS, rows, columns)

    a, b = distinct(16, k), distinct(k, 8)
    d = rng.permutation(np.arange(1, WARPS * 128 + 1)).reshape(WARPS, 16, 8) * 1001
    expected = d + (a @ b).sum(1)
    assert np.abs(a).max() <= 128  # bfloat16 has all whole numbers to 256
    assert max(np.abs(expected).max(), (np.abs(a) @ np.abs(b)).sum(1).max() + d.max()) < 2**24
    columns_of_b = np.ascontiguousarray(b.swapaxes(2, 3))
    a_bits, b_bits = (x.astype(dtype).view(np.uint16) for x in (a, columns_of_b))
    arguments = a_bits, b_bits, d.astype(np.float32), np.int32(which)
    *inputs, result = run_in_every_mode(MMA, *arguments, device=kernel_device, threads=32 * WARPS)
    assert np.array_equal(result, expected)
    assert np.array_equal(inputs[0], a_bits)
    assert np.array_equal(inputs[1], b_bits)


# ldmatrix

# PTX ISA, "Warp-level matrix load instruction: ldmatrix".
LDMATRIX = """
#define LOAD(which_, name, count)                                        \\
    if (which == which_) {                                               \\
        unsigned r[count];                                               \\
        name(r, row);                                                    \\
        for (int i = 0; i < count; ++i) y[threadIdx.x * count + i] = r[i]; \\
    }
extern "C" __global__ void f(const unsigned short* x, const int* begins, unsigned* y, int which)
{
    __shared__ __align__(16) unsigned short s[1024];
    for (int i = threadIdx.x; i < 1024; i += blockDim.x) s[i] = x[i];
    __syncthreads();
    const void* row = (const char*)s + begins[threadIdx.x];
    LOAD(0, ldmatrix_x1, 1)
    LOAD(1, ldmatrix_x2, 2)
    LOAD(2, ldmatrix_x4, 4)
    LOAD(3, ldmatrix_trans_x1, 1)
    LOAD(4, ldmatrix_trans_x2, 2)
    LOAD(5, ldmatrix_trans_x4, 4)
}
"""


@pytest.mark.parametrize("trans", [False, True], ids=["", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_spreads_matrices_over_a_warp(kernel_device, rng, count, trans):
    """Rows from all over shared memory. Lane 4g + t gets columns 2t, 2t + 1 of row g, the lower one in the low half."""
    x = rng.choice(1 << 16, 1024, replace=False).astype(np.uint16)
    rows = rng.permutation(128)[:64].reshape(2, 32)  # of 2 warps
    y = np.zeros((2, 32, count), np.uint32)
    which = np.int32(count // 2 + 3 * trans)
    begins = (rows * 16).astype(np.int32)
    *_, y = run_in_every_mode(LDMATRIX, x, begins, y, which, device=kernel_device, threads=64)
    for warp in range(2):
        matrices = x.reshape(128, 8)[rows[warp, : 8 * count]].reshape(count, 8, 8).astype(np.uint32)
        if trans:
            matrices = matrices.swapaxes(1, 2)
        expected = matrices[:, :, 0::2] | matrices[:, :, 1::2] << 16  # matrix, g, t
        assert np.array_equal(y[warp], expected.reshape(count, 32).T)


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("off", [2, 4, 8])
def test_ldmatrix_refuses_a_row_that_begins_between_multiples_of_16(which, off):
    begins = np.arange(0, 512, 16, dtype=np.int32)
    lane = (7, 15, 31)[which % 3]  # the last one that counts
    begins[lane] += off
    arguments = np.zeros(1024, np.uint16), begins, np.zeros(128, np.uint32), np.int32(which)
    with pytest.raises(KernelError, match=rf"test\.cu:\d+: thread \({lane}, 0, 0\) .* gives ldmatrix .* multiple of 16"):
        run(LDMATRIX, *arguments)


# cp_async


def turing() -> str:
    """What ptx.cuh has for Turing, in a namespace, so that it runs everywhere."""
    bf16, f16x2, bf16x2, copies = re.findall(r"^#else\n(.*?)^#endif", HEADER, re.DOTALL | re.MULTILINE)
    return f"""
        namespace turing {{
        __device__ unsigned short f32_to_bf16(float x) {{ {bf16} }}
        __device__ unsigned f32x2_to_f16x2(float low, float high) {{ {f16x2} }}
        __device__ unsigned f32x2_to_bf16x2(float low, float high) {{ {bf16x2} }}
        {copies}
        }}
    """


# PTX ISA, "Data Movement and Conversion Instructions: Non-bulk copy", cp.async: src-size.
COPY = f"""{turing()}
#define COPY(which_, name, size)                                                                          \\
    if (which == which_) {{                                                                               \\
        if (n <= size) name<size>(s + threadIdx.x * size, x + threadIdx.x * size, n);                     \\
        else name<size>(s + threadIdx.x * size, x + threadIdx.x * size);                                  \\
    }}
extern "C" __global__ void f(const unsigned char* x, unsigned char* y, int which)
{{
    __shared__ __align__(16) unsigned char s[32 * 16];
    const int n = threadIdx.x;
    for (int i = n; i < 32 * 16; i += 32) s[i] = 0xff;
    __syncthreads();
    COPY(4, cp_async, 4)
    COPY(8, cp_async, 8)
    COPY(16, cp_async, 16)
    cp_async_commit();
    cp_async_wait<0>();
    COPY(-4, turing::cp_async, 4)
    COPY(-8, turing::cp_async, 8)
    COPY(-16, turing::cp_async, 16)
    __syncthreads();
    for (int i = n; i < 32 * 16; i += 32) y[i] = s[i];
}}
"""


@pytest.mark.parametrize("of_turing", [False, True], ids=["", "turing"])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_reads_what_it_is_told_and_fills_up_with_zeros(kernel_device, rng, size, of_turing):
    """Lane n asks for n bytes, from 0 to SIZE; the lanes behind name no number and get all."""
    x = rng.integers(1, 255, (32, size), np.uint8)
    which = np.int32(-size if of_turing else size)
    _, y = run_in_every_mode(COPY, x, np.zeros(512, np.uint8), which, device=kernel_device, threads=32)
    lanes, i = np.indices((32, size))
    assert np.array_equal(y[: 32 * size].reshape(32, size), np.where((i < lanes) | (lanes > size), x, 0))
    assert np.all(y[32 * size :] == 0xFF)


# PTX ISA, "cp.async.commit_group" and "cp.async.wait_group / cp.async.wait_all".
GROUPS = """
extern "C" __global__ void f(const int* x, int* y)
{
    __shared__ __align__(16) int s[32];
    int* mine = s + 16 * threadIdx.x;
    const int* from = x + 16 * threadIdx.x;
    volatile int* now = s;
    int looked = 0;
    const auto look = [&] { for (int i = 0; i < 32; ++i) y[looked * 32 + i] = now[i]; ++looked; };
    for (int i = 0; i < 16; ++i) now[16 * threadIdx.x + i] = -1;
    cp_async<16>(mine, from);
    cp_async_commit();
    cp_async<8>(mine + 4, from + 4);
    cp_async<4>(mine + 7, from + 7);
    cp_async_commit();
    cp_async<4>(mine + 6, from + 6);
    cp_async<16>(mine + 8, from + 8);
    cp_async_commit();
    cp_async<16>(mine + 12, from + 12);
    __syncthreads();
    if (threadIdx.x == 0) {
        look();
        cp_async_wait<3>(); look();
        cp_async_wait<2>(); look();
        cp_async_wait<1>(); look();
        cp_async_wait<1>(); look();
        cp_async_wait<0>(); look();
    }
    __syncthreads();
    if (threadIdx.x == 1) cp_async_wait_all();
    __syncthreads();
    if (threadIdx.x == 0) {
        look();
        cp_async_wait_all(); look();
        // An empty group is one; of two copies to one place the later group's stays.
        cp_async<4>(mine, from + 1); cp_async_commit(); cp_async_commit();
        cp_async_wait<1>(); look();
        cp_async<4>(mine, from + 2); cp_async_commit();
        cp_async<4>(mine, from + 3); cp_async_commit();
        look();
        cp_async_wait<1>(); look();
        cp_async_wait<0>(); look();
    }
}
"""


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_copies_arrive_when_their_group_is_waited_for_and_not_before(order):
    """Of the emulated device alone: on a GPU they may arrive any time before."""
    x = np.arange(100, 132, dtype=np.int32)
    with emulate(check=False, order=order):
        _, y = run(GROUPS, x, np.full((12, 2, 16), -2, np.int32), threads=2)
    looks = [[(i == j).all() and i[0] >= 100 for i, j in zip(mine[:, None], x[:16, None], strict=True)] for mine in y[:, 0]]
    one, two, three, four = [1] * 4 + [0] * 12, [1] * 6 + [0, 1] + [0] * 8, [1] * 12 + [0] * 4, [1] * 16
    assert looks[:8] == [[0] * 16, [0] * 16, one, two, two, three, three, four]
    assert np.all((y[:, 0] == -1) | (y[:, 0] >= 100))
    assert np.all(y[:6, 1] == -1)  # nobody's wait is another's
    assert np.all(y[6:, 1] == x[16:])
    assert y[8:, 0, 0].tolist() == [101, 101, 102, 103]
    assert np.all(y[8:, 0, 1:] == x[1:16])


MISPLACED = """
extern "C" __global__ void f(const char* x, char* y, int size, int to, int from, int from_source)
{
    __shared__ __align__(16) char s[64];
    if (size == 4) cp_async<4>(s + to, x + from, from_source);
    if (size == 8) cp_async<8>(s + to, x + from, from_source);
    if (size == 16) cp_async<16>(s + to, x + from, from_source);
    cp_async_wait_all();
    for (int i = 0; i < size; ++i) y[i] = s[to + i];
}
"""


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_refuses_other_places_than_multiples_of_its_size(size):
    x, y = np.arange(1, 65, dtype=np.int8), np.zeros(16, np.int8)

    def copy(to: int, start: int, from_source: int) -> np.ndarray:
        return run(MISPLACED, x, y, *map(np.int32, (size, to, start, from_source)), threads=1)[1]

    for to, start in [(0, 0), (size, 2 * size), (3 * size, size)]:
        assert np.array_equal(copy(to, start, size)[:size], x[start : start + size])
    message = rf"test\.cu:\d+: thread \(0, 0, 0\) .* copies {size} bytes asynchronously .* multiples of {size}, and asks for"
    for off in range(1, size):
        for wrong in ((off, 0, size), (0, off, size), (off, off, 1), (size + off, size, 0)):
            with pytest.raises(KernelError, match=message):
                copy(*wrong)
    for from_source in (size + 1, -1):
        with pytest.raises(KernelError, match=message):
            copy(0, 0, from_source)


# Conversions and approximations, of 32 bits x and those before or behind them, `other`.

FUNCTIONS = {
    "f16_to_f32": "__float_as_uint(f16_to_f32((unsigned short)x))",
    "bf16_to_f32": "__float_as_uint(bf16_to_f32((unsigned short)x))",
    "f32_to_f16": "f32_to_f16(__uint_as_float(x))",
    "f32_to_bf16": "f32_to_bf16(__uint_as_float(x))",
    "f32x2_to_f16x2": "f32x2_to_f16x2(__uint_as_float(x), __uint_as_float(other))",
    "f32x2_to_bf16x2": "f32x2_to_bf16x2(__uint_as_float(x), __uint_as_float(other))",
    "ex2_approx": "__float_as_uint(ex2_approx(__uint_as_float(x)))",
    "tanh_approx": "__float_as_uint(tanh_approx(__uint_as_float(x)))",
}
OF_TURING = ("f32_to_bf16", "f32x2_to_f16x2", "f32x2_to_bf16x2")
FUNCTIONS |= {f"turing::{name}": f"turing::{FUNCTIONS[name]}" for name in OF_TURING}
CASES = "\n".join(f"case {i}: y[i] = {expression}; break;" for i, expression in enumerate(FUNCTIONS.values()))
ELEMENTWISE = f"""{turing()}
extern "C" __global__ void f(const unsigned* xs, unsigned* y, int n, int which)
{{
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {{
        const unsigned x = xs[i], other = xs[i ^ 1];
        switch (which) {{ {CASES} }}
    }}
}}
"""


def of_each(name: str, x: np.ndarray, device: Any) -> np.ndarray:
    """The function of 32-bit patterns ``x``, as 32-bit patterns."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    assert bits.size % 2 == 0
    which = np.int32(list(FUNCTIONS).index(name))
    _, y = run(ELEMENTWISE, bits, np.zeros_like(bits), np.int32(bits.size), which, device=device, blocks=32)
    return y


def assert_same(result: np.ndarray, expected: np.ndarray) -> None:
    """Bit by bit, but that any NaN is as good as another."""
    nan = np.isnan(expected.astype(np.float32))
    assert np.array_equal(np.isnan(result.astype(np.float32)), nan)
    bits = f"u{expected.itemsize}"
    different = np.flatnonzero((result.view(bits) != expected.view(bits)) & ~nan)
    assert not different.size, (different[:5], result[different[:5]], expected[different[:5]])


def floats_between(dtype: Any, rng: np.random.Generator) -> np.ndarray:
    """Float32s: all of ``dtype``, half way between neighbours and to what would follow the largest, one float32 to
    either side, and arbitrary ones."""
    all_ = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    upwards = np.sort(all_[np.isfinite(all_) & ~np.signbit(all_)]).astype(np.float64)
    beyond = 2 * upwards[-1] - upwards[-2]
    half = ((upwards + np.append(upwards[1:], beyond)) / 2).astype(np.float32)
    assert np.array_equal(half.astype(np.float64) * 2, upwards + np.append(upwards[1:], beyond))  # exactly half way
    around = np.concatenate([half, np.nextafter(half, np.float32(0)), np.nextafter(half, np.float32(np.inf))])
    arbitrary = rng.integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    small = rng.integers(0, 1 << 24, 10_000, np.uint32).view(np.float32)  # half of them denormal
    largest = np.finfo(np.float32).max
    special = np.array([0, 1e-45, 65519.996, 65520, 65536, 1e30, largest, np.inf, np.nan, 1e-30], np.float32)
    signalling = np.array([0x7F800001, 0x7F80FFFF, 0x7FFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    either = np.concatenate([around, small, special, signalling])
    return np.concatenate([all_, arbitrary, either, -either])


@pytest.mark.parametrize(("name", "dtype"), [("f16_to_f32", np.float16), ("bf16_to_f32", BF16)])
def test_all_16_bit_numbers_become_float32(kernel_device, name, dtype):
    bits = np.arange(1 << 16, dtype=np.uint32)
    with np.errstate(invalid="ignore"):
        expected = bits.astype(np.uint16).view(dtype).astype(np.float32)
    assert_same(of_each(name, bits, kernel_device).view(np.float32), expected)


@pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "dtype"), [("f32_to_f16", np.float16), ("f32_to_bf16", BF16), ("turing::f32_to_bf16", BF16)]
)
def test_float32_is_rounded_to_the_nearest_and_to_even(kernel_device, rng, name, dtype):
    x = floats_between(dtype, rng)
    y = of_each(name, x, kernel_device)
    assert np.all(y < 1 << 16)
    result = y.astype(np.uint16).view(dtype)
    assert_same(result, x.astype(dtype))
    same = x[: 1 << 16]  # those that came from 16 bits
    numbers = ~np.isnan(same)
    assert np.array_equal(y[: 1 << 16][numbers], np.arange(1 << 16)[numbers])


@pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("prefix", ["", "turing::"])
@pytest.mark.parametrize(("name", "dtype"), [("f32x2_to_f16x2", np.float16), ("f32x2_to_bf16x2", BF16)])
def test_pairs_are_packed_with_the_first_in_the_low_half(kernel_device, rng, prefix, name, dtype):
    x = rng.permutation(floats_between(dtype, rng))[:100_000]
    packed = of_each(prefix + name, x, kernel_device).view(np.uint16).view(dtype).reshape(-1, 2)
    expected = x.astype(dtype)
    assert_same(packed[:, 0].copy(), expected)
    assert_same(packed[:, 1].copy(), expected.reshape(-1, 2)[:, ::-1].reshape(-1))


def test_ex2_approx(kernel_device):
    """PTX ISA, "Floating Point Instructions: ex2": of -inf +0, of +inf +inf; .ftz makes denormals 0."""
    x = np.linspace(-125.99, 127.99, 20_000).astype(np.float32)
    y = of_each("ex2_approx", x, kernel_device).view(np.float32).astype(np.float64)
    np.testing.assert_allclose(y, np.exp2(x.astype(np.float64)), rtol=2e-6)
    below = np.array([-126.01, -126.5, -127, -140, -149, -150, -151, -1000, -1e30, -np.inf], np.float32)
    assert of_each("ex2_approx", below, kernel_device).tolist() == [0] * below.size
    special = np.array([0, -0.0, 1e-45, -1e-45, 128, 1e30, np.inf, np.nan], np.float32)
    y = of_each("ex2_approx", special, kernel_device).view(np.float32)
    np.testing.assert_array_equal(y, np.array([1, 1, 1, 1, np.inf, np.inf, np.inf, np.nan], np.float32))


def test_tanh_approx(kernel_device):
    """PTX ISA, "Floating Point Instructions: tanh": relative error 2^-11; denormals are supported."""
    positive = np.concatenate([np.geomspace(1e-30, 100, 10_000), np.linspace(0.01, 12, 10_000)])
    x = np.concatenate([positive, -positive]).astype(np.float32)
    y = of_each("tanh_approx", x, kernel_device).view(np.float32).astype(np.float64)
    np.testing.assert_allclose(y, np.tanh(x.astype(np.float64)), rtol=2**-10.9, atol=5e-4)
    assert np.array_equal(np.sign(y), np.sign(x))
    special = np.array([0, -0.0, np.inf, -np.inf, 1e30, -1e30], np.float32)
    assert of_each("tanh_approx", special, kernel_device).view(np.float32).tolist() == [0, 0, 1, -1, 1, -1]
    assert np.all(np.isnan(of_each("tanh_approx", np.full(2, np.nan, np.float32), kernel_device).view(np.float32)))


# Reductions

REDUCTIONS = """
extern "C" __global__ void f(const float* x, float* sums, float* maxima)
{
    sums[threadIdx.x] = warp_sum(x[threadIdx.x]);
    maxima[threadIdx.x] = warp_max(x[threadIdx.x]);
}
"""


def test_sum_and_maximum_of_a_warp(kernel_device, rng):
    """Each lane gets them, and the sum is that of one order of pairs, to the last bit."""
    x = rng.standard_normal((6, 32)).astype(np.float32)
    x[1] = -np.abs(x[1]) * 1e20
    x[2] = rng.permutation(np.arange(32)) - 100
    x[3, ::2] = -np.inf
    x[4] = -np.inf
    x[5, 17] = np.inf
    _, sums, maxima = run(REDUCTIONS, x, x * 0 + 7 if False else np.zeros_like(x), np.zeros_like(x), device=kernel_device, threads=192)
    expected = x
    for lanes in (16, 8, 4, 2, 1):
        expected = expected + expected[:, np.arange(32) ^ lanes]
    assert sums.tobytes() == expected.tobytes()
    assert np.all(sums[2] == 31 * 16 - 3200)
    assert np.array_equal(maxima, np.broadcast_to(x.max(1, keepdims=True), x.shape))


# NVIDIA's compiler

EVERY = """
extern "C" __global__ void f(const float* x, float* y, unsigned* z, int n)
{
    __shared__ __align__(16) float s[1024];
    const int i = threadIdx.x;
    const unsigned short h = (unsigned short)z[i];
    y[i] = f16_to_f32(h) + bf16_to_f32(h) + ex2_approx(x[i]) * tanh_approx(x[i + 1]) + warp_sum(x[i]) * warp_max(x[i]);
    z[i] = f32_to_f16(x[i]) ^ f32_to_bf16(x[i + 2]) ^ f32x2_to_f16x2(x[i], y[i]) ^ f32x2_to_bf16x2(x[i], y[i]);
    cp_async<4>(s + i, x + i, n); cp_async<8>(s + 64 + 2 * i, x + 2 * i); cp_async_commit();
    cp_async<16>(s + 256 + 4 * i, x + 4 * i, n); cp_async<16>(s + 512 + 4 * i, x + 4 * i); cp_async_commit();
    cp_async_wait<1>();
    cp_async_wait_all();
    __syncthreads();
    unsigned a[4], b[2], c[1], all = 0;
    float d[4] = {x[0], x[1], x[2], x[3]};
    ldmatrix_x1(c, s + 4 * i); all ^= c[0];
    ldmatrix_trans_x1(c, s + 4 * i); all ^= c[0];
    ldmatrix_x2(b, s + 4 * i); all ^= b[0] ^ b[1];
    ldmatrix_trans_x4(a, s + 4 * i); all ^= a[0] ^ a[1] ^ a[2] ^ a[3];
    ldmatrix_x4(a, s + 4 * i);
    ldmatrix_trans_x2(b, s + 4 * i);
    mma_m16n8k8_f16(d, b, c[0]);
#if __CUDA_ARCH__ >= 800
    mma_m16n8k16_f16(d, a, b);
    mma_m16n8k16_bf16(d, a, b);
#endif
    for (int j = 0; j < 4; ++j) y[(i + 1) * 32 + j] = d[j] + all + a[j];
}
"""


def functions() -> set[str]:
    """All that ptx.cuh has."""
    names = set(re.findall(r"__forceinline__ \w+(?: \w+)* (\w+)\(", HEADER)) - {"name"}
    matrices = re.findall(r"^LDMATRICES\((\w+), ", HEADER, re.MULTILINE)
    return names | {f"{name}x{count}" for name in matrices for count in (1, 2, 4)}


def test_the_kernel_has_every_function():
    assert len(functions()) == 23
    assert {name for name in functions() if not re.search(rf"\b{name}\b", EVERY)} == set()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_function_is_its_instruction(arch):
    """NVRTC compiles them, and the machine code has what they stand for."""
    cubin, resources = compile_kernel(source(EVERY), arch)
    assert (resources.stack, resources.spills) == (0, 0)
    found = set(re.findall(r"\b(?:HMMA|LDSM|LDGSTS|MUFU)\.\S+|\bLDGDEPBAR\b", _disassemble(cubin)))
    print(sorted(found))
