"""PTX instructions as functions: their twins on the host against NumPy, and on a GPU the instructions themselves."""

# ruff: noqa: E501 (kernels of one line)

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Device

from cupy_pagedkv.devices.sources import with_includes
from cupy_pagedkv.emulator import CompileError, KernelError, RawKernel
from cupy_pagedkv.emulator.nvrtc import ARCHITECTURES, compile_kernel

BF16 = np.dtype(ml_dtypes.bfloat16)


def run(device: Device, body: str, parameters: str, *arrays: np.ndarray, threads: int = 32) -> list[np.ndarray]:
    """The arrays behind a launch of one block."""
    code = with_includes(
        f'#include "ptx.cuh"\n#line 1 "f.cu"\nextern "C" __global__ void f({parameters}) {{ {body} }}', "f.cu"
    )
    on_device = [device.array(array) for array in arrays]
    kernel = device.xp.RawKernel(code, "f", ("-std=c++17",)) if device.name == "cupy" else RawKernel(code, "f")
    kernel((1,), (threads,), tuple(on_device))
    return [device.numpy(array) for array in on_device]


# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" (and "... m16n8k8 ..."): rows and columns of a_i, b_i
# and c_i for groupID = lane >> 2 and threadID_in_group = lane % 4.
LAYOUT = """
    int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
    unsigned ra[K / 4], rb[K / 8]; float rd[4];
    for (int i = 0; i < K / 2; ++i) {
        int row = (i & 2) ? group + 8 : group, column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        if (i % 2 == 0) ra[i / 2] = 0;
        ra[i / 2] |= (unsigned)a[row * K + column] << i % 2 * 16;
    }
    for (int i = 0; i < K / 4; ++i) {
        int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
        if (i % 2 == 0) rb[i / 2] = 0;
        rb[i / 2] |= (unsigned)b[row * 8 + group] << i % 2 * 16;
    }
    for (int i = 0; i < 4; ++i) rd[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    CALL
    for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = rd[i];
"""


@pytest.mark.parametrize(
    ("k", "dtype", "call"),
    [
        (16, np.float16, "mma_m16n8k16_f16(rd, ra, rb);"),
        (16, BF16, "mma_m16n8k16_bf16(rd, ra, rb);"),
        (8, np.float16, "mma_m16n8k8_f16(rd, ra, rb[0]);"),
    ],
)
def test_mma(kernel_device, rng, k, dtype, call):
    """Whole numbers of which the sums are exact; no two alike in a or in b."""
    a = (rng.permutation(16 * k) - 8 * k).astype(np.float32).reshape(16, k)
    b = (rng.permutation(8 * k) - 4 * k).astype(np.float32).reshape(k, 8)
    d = np.arange(128, dtype=np.float32).reshape(16, 8)
    assert (a.astype(dtype) == a).all()
    assert (b.astype(dtype) == b).all()
    bits = [array.astype(dtype).view(np.uint16) for array in (a, b)]
    body = LAYOUT.replace("CALL", call).replace("K", str(k))
    *_, got = run(kernel_device, body, "const unsigned short* a, const unsigned short* b, float* d", *bits, d)
    assert got.tolist() == (d + a @ b).tolist()


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(kernel_device, rng, count, trans):
    """PTX ISA, "ldmatrix": rows lie anywhere, at multiples of 16 bytes."""
    memory = rng.permutation(2**16)[: 64 * 8].astype(np.uint16)
    rows = rng.permutation(64)[:32]
    body = f"""__shared__ __align__(16) unsigned short s[512]; for (int i = threadIdx.x; i < 512; i += 32) s[i] = memory[i];
        __syncwarp(); unsigned r[{count}]; ldmatrix_{"trans_" if trans else ""}x{count}(r, s + 8 * rows[threadIdx.x]);
        for (int i = 0; i < {count}; ++i) out[{count} * threadIdx.x + i] = r[i];"""
    out = np.zeros((32, count), np.uint32)
    parameters = "const unsigned short* memory, const int* rows, unsigned* out"
    *_, got = run(kernel_device, body, parameters, memory, rows.astype(np.int32), out)
    for i in range(count):
        matrix = memory.reshape(64, 8)[rows[8 * i : 8 * i + 8]]
        matrix = np.ascontiguousarray(matrix.T if trans else matrix)
        assert np.array_equal(got[:, i], matrix.view(np.uint32).reshape(-1)), i


@pytest.mark.parametrize("size", [4, 8, 16])
def test_an_asynchronous_copy_and_its_zeros(kernel_device, rng, size):
    """Thread i copies i bytes, as far as there are so many, and zeros."""
    source = rng.integers(1, 256, 32 * 16, dtype=np.uint8)
    body = f"""__shared__ __align__(16) unsigned char s[512]; for (int i = 0; i < 16; ++i) s[16 * threadIdx.x + i] = 77;
        cp_async<{size}>(s + 16 * threadIdx.x, from + 16 * threadIdx.x, min((int)threadIdx.x, {size}));
        cp_async_commit(); cp_async_wait<0>();
        for (int i = 0; i < 16; ++i) to[16 * threadIdx.x + i] = s[16 * threadIdx.x + i];"""
    _, got = run(kernel_device, body, "const unsigned char* from, unsigned char* to", source, np.zeros_like(source))
    expected = np.full((32, 16), 77, np.uint8)
    expected[:, :size] = 0
    for i in range(32):
        expected[i, : min(i, size)] = source[16 * i : 16 * i + min(i, size)]
    assert np.array_equal(got.reshape(32, 16), expected)


def emulated(body: str, parameters: str, *arrays: np.ndarray, grid: int = 1) -> None:
    code = with_includes(
        f'#include "ptx.cuh"\n#line 1 "f.cu"\nextern "C" __global__ void f({parameters}) {{ {body} }}', "f.cu"
    )
    RawKernel(code, "f")((grid,), (32,), arrays)


def test_bytes_arrive_with_their_group_and_not_before():
    body = """__shared__ __align__(16) int s[32 * 12]; int* mine = s + 12 * threadIdx.x;
        for (int n = 0; n < 3; ++n) { mine[4 * n] = -1; cp_async<16>(mine + 4 * n, x + 4 * n); cp_async_commit(); }
        int* out = y + 12 * threadIdx.x;
        for (int n = 0; n < 3; ++n) out[n] = mine[4 * n];
        cp_async_wait<2>(); for (int n = 0; n < 3; ++n) out[3 + n] = mine[4 * n];
        cp_async_wait<1>(); for (int n = 0; n < 3; ++n) out[6 + n] = mine[4 * n];
        cp_async_wait<1>(); cp_async<16>(mine, x + 4);  // of no group yet
        cp_async_wait<0>(); out[9] = mine[0]; out[10] = mine[8]; cp_async_wait_all(); out[11] = mine[0];"""
    x, y = np.arange(12, dtype=np.int32), np.zeros((32, 12), np.int32)
    emulated(body, "const int* x, int* y", x, y)
    assert y.tolist() == [[-1, -1, -1, 0, -1, -1, 0, 4, -1, 0, 8, 4]] * 32


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("cp_async<16>(s + 8, x);", "f.cu:1: .* copies 16 bytes asynchronously from .* must both be multiples of 16"),
        ("cp_async<8>(s, x + 1);", "copies 8 bytes asynchronously .* multiples of 8"),
        ("cp_async<4>(s, x, 5);", "copies 4 bytes .* asks for 5 from the source"),
        ("cp_async<4>((void*)(x + 4), x);", "copies 4 bytes .* and the latter shared memory"),
        ("unsigned r[2]; ldmatrix_x2(r, x);", "gives ldmatrix a row .* not a multiple of 16 in shared memory"),
        (
            "unsigned r[2]; ldmatrix_x2(r, s + 2);",
            "f.cu:1: .* gives ldmatrix a row of 16 bytes .* not a multiple of 16",
        ),
    ],
)
def test_what_the_instructions_refuse(body, message):
    with pytest.raises(KernelError, match=message):
        emulated(f"__shared__ __align__(16) unsigned char s[512]; {body}", "const int* x", np.zeros(16, np.int32))


def test_sizes_that_the_instructions_do_not_have():
    with pytest.raises(CompileError, match="the sizes of cp.async"):
        emulated("__shared__ uint4 s[1]; cp_async<12>(s, x);", "const int* x", np.zeros(4, np.int32))


@pytest.mark.parametrize("wait", ["cp_async_wait<0>();", "cp_async_wait_all();"])
def test_bytes_that_nobody_waited_for_do_not_arrive_in_the_next_block(wait):
    body = f"""__shared__ int s[32]; int i = threadIdx.x; s[i] = -1;
        if (blockIdx.x == 0) {{ cp_async<4>(s + i, x); cp_async_commit(); }} else {wait}
        y[i] = s[i];"""
    y = np.zeros(32, np.int32)
    emulated(body, "const int* x, int* y", np.ones(1, np.int32), y, grid=2)
    assert y.tolist() == [-1] * 32


def test_the_twin_of_mma_rounds_once():
    """How the device rounds is not told."""
    a, b, d = np.zeros((16, 16), np.float16), np.zeros((16, 8), np.float16), np.zeros((16, 8), np.float32)
    a[3, [1, 4, 9]], b[[1, 4, 9], 5] = (2**13, 1, -(2**13)), (2**12, 1, 2**12)
    body = LAYOUT.replace("CALL", "mma_m16n8k16_f16(rd, ra, rb);").replace("K", "16")
    parameters = "const unsigned short* a, const unsigned short* b, float* d"
    emulated(body, parameters, a.view(np.uint16), b.view(np.uint16), d)
    assert d[3, 5] == np.abs(d).sum() == 1


def all_of(device: Device, function: str, inputs: np.ndarray, output: Any) -> np.ndarray:
    kinds = {2: "unsigned short", 4: "float"}
    parameters = f"const {kinds[inputs.itemsize]}* x, {kinds[np.dtype(output).itemsize]}* y, const int* n"
    body = f"for (int i = threadIdx.x; i < *n; i += blockDim.x) y[i] = {function}(x[i]);"
    out = np.zeros(len(inputs), output)
    return run(device, body, parameters, inputs, out, np.array([len(inputs)], np.int32), threads=256)[1]


EVERY = np.arange(2**16, dtype=np.uint32).astype(np.uint16)


@pytest.mark.parametrize(("name", "dtype"), [("f16", np.dtype(np.float16)), ("bf16", BF16)])
def test_conversions(kernel_device, name, dtype):
    """All 16-bit values both ways, and all that lies half way between two of them, and beside that."""
    values = EVERY.view(dtype).astype(np.float32)
    got = all_of(kernel_device, f"{name}_to_f32", EVERY, np.float32)
    nan = np.isnan(values)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got[~nan].view(np.uint32), values[~nan].view(np.uint32))

    finite = np.unique(values[np.isfinite(values)])
    halfway = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)
    largest = finite[-1]
    with np.errstate(over="ignore"):
        beyond = np.float32([largest, np.nextafter(largest, np.inf), 65519.99, 65520, 3.4e38, np.inf, np.nan, 1e-45, 0])
    inputs = np.concatenate([values, halfway, np.nextafter(halfway, np.float32(np.inf)),
                             np.nextafter(halfway, np.float32(-np.inf)), beyond, -beyond])  # fmt: skip
    # NaNs whose payload is lost or would carry over into the exponent, if they were rounded as numbers are.
    nans = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    inputs = np.concatenate([inputs, nans])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = inputs.astype(dtype).view(np.uint16)
    got = all_of(kernel_device, f"f32_to_{name}", inputs, np.uint16)
    nan = np.isnan(inputs)
    assert np.isnan(got[nan].view(dtype).astype(np.float32)).all()
    assert np.array_equal(got[~nan], expected[~nan])


@pytest.mark.parametrize(("name", "dtype"), [("f16", np.dtype(np.float16)), ("bf16", BF16)])
def test_pairs(kernel_device, rng, name, dtype):
    x = rng.normal(size=64).astype(np.float32)
    body = f"y[threadIdx.x] = f32x2_to_{name}x2(x[2 * threadIdx.x], x[2 * threadIdx.x + 1]);"
    _, got = run(kernel_device, body, "const float* x, unsigned* y", x, np.zeros(32, np.uint32))
    assert np.array_equal(got.view(np.uint16), x.astype(dtype).view(np.uint16))


def test_approximations(kernel_device):
    x = np.concatenate([np.linspace(-125, 125, 2000), [-np.inf, -200, -127, 0]]).astype(np.float32)
    got = all_of(kernel_device, "ex2_approx", x, np.float32)
    assert got[-4:].tolist() == [0, 0, 0, 1]
    assert np.allclose(got[:2000], np.exp2(x[:2000].astype(np.float64)), rtol=2e-6, atol=0)
    x = np.linspace(-12, 12, 2000).astype(np.float32)
    assert np.allclose(all_of(kernel_device, "tanh_approx", x, np.float32), np.tanh(x), rtol=2**-10, atol=0)


def test_over_a_warp(kernel_device, rng):
    x = rng.integers(-99, 99, 64).astype(np.float32)
    body = "y[threadIdx.x] = warp_sum(x[threadIdx.x]); y[64 + threadIdx.x] = warp_max(x[threadIdx.x]);"
    _, got = run(kernel_device, body, "const float* x, float* y", x, np.zeros(128, np.float32), threads=64)
    warps = x.reshape(2, 32)
    assert got.tolist() == [*warps.sum(1).repeat(32), *warps.max(1).repeat(32)]


@pytest.mark.parametrize("type_", ["unsigned char", "unsigned short", "unsigned", "uint2", "uint4"])
def test_loads_that_are_not_put_off(kernel_device, rng, type_):
    """All bytes come, from where they lie, and no others."""
    x = rng.integers(0, 256, 34 * 16, np.uint8)
    body = f"load_now((({type_}*)y)[threadIdx.x], (const {type_}*)x + 1 + threadIdx.x);"
    _, got = run(kernel_device, body, "const unsigned char* x, unsigned char* y", x, np.zeros(32 * 16, np.uint8))
    size = {"unsigned char": 1, "unsigned short": 2, "unsigned": 4, "uint2": 8, "uint4": 16}[type_]
    assert np.array_equal(got[: 32 * size], x[size : 33 * size])
    assert not got[32 * size :].any()


EVERYTHING = """
extern "C" __global__ void f(float* y, const unsigned* x) {
    extern __shared__ __align__(16) unsigned char s[];
    cp_async<16>(s, x, 3); cp_async<8>(s + 16, x, 8); cp_async<4>(s + 32, x); cp_async_commit();
    cp_async_wait<1>(); cp_async_wait_all(); __syncthreads();
    unsigned a[4], b[2], c[1]; float d[4] = {};
    ldmatrix_x4(a, s); ldmatrix_x2(b, s); ldmatrix_x1(c, s);
    mma_m16n8k8_f16(d, b, c[0]);
    ldmatrix_trans_x4(a, s); ldmatrix_trans_x2(b, s); ldmatrix_trans_x1(c, s);
#if __CUDA_ARCH__ >= 800
    mma_m16n8k16_f16(d, a, b); mma_m16n8k16_bf16(d, a, b);
#endif
    d[0] += f16_to_f32(c[0]) + bf16_to_f32(f32_to_bf16(d[1])) + f32_to_f16(d[2]) + f32x2_to_f16x2(d[0], d[1])
        + f32x2_to_bf16x2(d[2], d[3]) + ex2_approx(d[3]) + tanh_approx(d[0]);
    y[threadIdx.x] = warp_sum(d[0]) + warp_max(d[1]);
    uint4 e; uint2 g; unsigned short h; unsigned char i;
    load_now(e, (const uint4*)x); load_now(g, (const uint2*)x); load_now(c[0], x); load_now(h, (const unsigned short*)x);
    load_now(i, (const unsigned char*)x);
    y[0] += e.x + e.w + g.y + c[0] + h + i;
}
"""


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_instruction_compiles_for_each_architecture_that_has_it(arch):
    assert compile_kernel(with_includes('#include "ptx.cuh"\n' + EVERYTHING, "f.cu"), arch)[1].spills == 0
