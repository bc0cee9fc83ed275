"""What a launch moves, against what was worked out by hand."""

# ruff: noqa: E501 (kernels of one line)

import numpy as np
import pytest

from cupy_pagedkv.devices.sources import with_includes
from cupy_pagedkv.emulator import LaunchProfile, RawKernel, emulate, profile
from cupy_pagedkv.emulator.architectures import ARCHITECTURES, Occupancy, occupancy_of
from cupy_pagedkv.emulator.profiling import SharedTraffic, Traffic


def measured(body: str, threads: int = 32, grid: int = 1, shared_mem: int = 0) -> LaunchProfile:
    """Of ``body``, whose first line is 2, with two arrays of 4,096 floats."""
    code = with_includes(
        '#include "ptx.cuh"\n#line 1 "f.cu"\nextern "C" __global__ void f(const float* x, float* y) {\n'
        f"int i = threadIdx.x; (void)i;\n{body}\n}}", "f.cu"
    )  # fmt: skip
    arrays = np.zeros(4096, np.float32), np.zeros(4096, np.float32)
    with profile() as launches:
        RawKernel(code, "f")((grid,), (threads,), arrays, shared_mem=shared_mem)
    [launch] = launches
    return launch


def test_a_copy_of_32_floats_is_one_request_of_4_sectors():
    launch = measured("y[i] = x[i];")
    assert launch.arrays[0] == (Traffic(1, 128, 4, 128, 0, 1), Traffic())
    assert launch.arrays[1] == (Traffic(), Traffic(1, 128, 4, 128, 0, 1))
    assert (launch.read, launch.written) == (launch.arrays[0].read, launch.arrays[1].written)
    assert launch.read.used == 1


@pytest.mark.parametrize(
    ("index", "bytes", "sectors"),
    [("2 * i", 128, 8), ("8 * i", 128, 32), ("i + 1", 128, 5), ("0", 4, 1), ("i / 2", 64, 2), ("31 - i", 128, 4)],
)
def test_sectors_of_a_request(index, bytes, sectors):
    launch = measured(f"y[i] = x[{index}];")
    assert launch.read == Traffic(1, bytes, sectors, bytes, 0, 1)
    assert launch.read.used == bytes / sectors / 32


def test_wide_accesses_and_many_passes():
    launch = measured("for (int n = 0; n < 3; ++n) ((float4*)y)[i + 32 * n] = ((const float4*)x)[i + 32 * n];")
    assert launch.read == launch.written == Traffic(3, 3 * 512, 3 * 16, 3 * 512, 0, 1)


@pytest.mark.parametrize(
    ("struct", "requests", "sectors"),
    [
        ("struct P { float x, y, z; };", 3, 12),  # 4 bytes each, 12 apart
        ("struct alignas(16) P { float x[8]; };", 2, 32),  # 16 bytes each, 32 apart
        ("struct alignas(16) P { float x[4]; };", 1, 16),
        ("struct alignas(8) P { float x[6]; };", 3, 24),
        ("struct P { float x[20]; };", 5, 32),
    ],
)
def test_a_struct_of_many_words_takes_many_requests(struct, requests, sectors):
    """No GPU moves more than 16 bytes of a thread at once, and fewer where its size is no multiple of that."""
    launch = measured(f"{struct} ((P*)y)[i] = ((const P*)x)[i];")
    size = launch.read.bytes
    assert launch.read == launch.written == Traffic(requests, size, requests * sectors, size, 0, 1)
    words = size // 32 // 4
    shared = measured(
        f'{struct} __shared__ P s[32]; s[i] = ((const P*)x)[i]; asm volatile("" ::"r"(s) : "memory");'
    ).shared
    assert shared.requests == requests
    assert shared.conflicts == {3: 0, 8: 8, 4: 0, 6: 0, 20: 0}[words]


def test_a_request_has_the_lanes_that_are_there():
    assert measured("if (i % 4 == 1) y[i] = x[i];").read == Traffic(1, 32, 4, 32, 0, 1)
    assert measured("y[i] = x[i];", threads=40).read == Traffic(2, 160, 5, 160, 0, 1)
    assert measured("y[i] = x[i];", grid=2, threads=64).read == Traffic(4, 512, 16, 0, 256, 2)


def test_bytes_that_are_touched_again():
    launch = measured("for (int n = 0; n < 5; ++n) y[i] += x[n];")
    assert launch.arrays[0].read == Traffic(5, 20, 5, 20, 0, 1)
    assert launch.arrays[1].written == Traffic(5, 640, 20, 0, 128, 5)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("__shared__ float s[32][32]; s[i][0] = x[i];", SharedTraffic(1, 32, 1)),
        ("__shared__ float s[32][33]; s[i][0] = x[i];", SharedTraffic(1, 1, 1)),
        ("__shared__ float s[64]; s[2 * i] = x[i];", SharedTraffic(1, 2, 1)),
        ("__shared__ float s[64]; s[i / 8] = 1;", SharedTraffic(1, 1, 1)),  # lanes at one word
        ("__shared__ char s[32]; s[i] = 1;", SharedTraffic(1, 1, 1)),
        ("__shared__ double s[32]; s[i] = 1;", SharedTraffic(1, 2, 2)),  # half a warp at a time
        ("__shared__ double s[64]; s[2 * i] = 1;", SharedTraffic(1, 4, 2)),
        ("__shared__ float4 s[32]; s[i] = *(const float4*)x;", SharedTraffic(1, 4, 4)),  # a quarter at a time
        ("__shared__ float4 s[64]; s[2 * i] = *(const float4*)x;", SharedTraffic(1, 8, 4)),
        ("__shared__ float4 s[32]; cp_async<16>(s + (i ^ i / 8), x + 4 * i); cp_async_wait_all();", SharedTraffic(1, 4, 4)),
        ("__shared__ float4 s[256]; cp_async<16>(s + 8 * i, x + 4 * i); cp_async_wait_all();", SharedTraffic(1, 32, 4)),
    ],
)  # fmt: skip
def test_bank_conflicts(body, expected):
    launch = measured(body + ' asm volatile("" ::"r"(s) : "memory");')  # or the store would be dropped
    assert launch.shared == expected
    assert launch.shared.conflicts == expected.wavefronts - expected.least
    assert launch.matrices == SharedTraffic()


@pytest.mark.parametrize(
    ("row", "ways"), [("i * 64", 8), ("i * 72", 1), ("i * 8", 1), ("i % 8 * 64 + (i / 8 ^ i % 8) * 8", 1)]
)
def test_bank_conflicts_of_ldmatrix(row, ways):
    """Rows of 64 halves, 128 bytes, begin at one bank; padded, dense or swizzled they do not."""
    launch = measured(
        "extern __shared__ __align__(16) unsigned short s[]; for (int j = i; j < 2304; j += 32) s[j] = j; __syncwarp();\n"
        f"unsigned r[4]; ldmatrix_x4(r, s + {row}); y[i] = r[0];",
        shared_mem=4608,
    )
    assert launch.matrices == SharedTraffic(1, 4 * ways, 4)


def test_lanes_that_touch_two_arrays_at_one_place_make_a_request_of_each():
    """And one of shared memory."""
    launch = measured("float* p = i % 2 ? y : (float*)x; p[i] = 1;")
    assert launch.arrays[0].written == launch.arrays[1].written == Traffic(1, 64, 4, 64, 0, 1)
    launch = measured("__shared__ float s[32]; s[i] = 0; __syncwarp(); const float* p = i < 16 ? x : s; y[i] = p[i];")
    assert launch.arrays[0].read == Traffic(1, 64, 2, 64, 0, 1)
    assert launch.shared == SharedTraffic(2, 2, 2)


def test_collectives_barriers_and_lines():
    launch = measured("y[i] = __shfl_xor_sync(~0u, x[2 * i], 1);\nif (i < 32) __syncwarp(); __syncthreads();", 64)
    assert (launch.collectives, launch.barriers) == (1.5, 1)
    [read] = [line for line in launch.lines if not line.writes]
    assert (read.place, read.argument, read.traffic.requests) == ("f.cu:3", 0, 2)
    assert "argument 0: reads 256 B in 2 requests of 16 sectors, 50% used" in str(launch)
    assert "f.cu:3: 50% of 16 sectors used by its reads" in str(launch)


def test_bytes_in_flight():
    loads = "float a = x[i], b = x[i + 32];"
    assert measured(f"{loads} y[i] = a + b;").bytes_in_flight == 32 * 8
    assert measured("float a = x[i]; __syncwarp(); float b = x[i + 32]; y[i] = a + b;").bytes_in_flight == 32 * 4
    assert measured("y[i] = x[i]; y[i + 32] = x[i + 32];").bytes_in_flight == 32 * 4
    copy = "__shared__ __align__(16) float s[512]; for (int n = 0; n < 3; ++n) { cp_async<16>(s + 4 * (32 * n + i), x + 4 * i);\n"
    assert measured(copy + "cp_async_commit(); if (n) cp_async_wait<1>(); }").bytes_in_flight == 32 * 32
    assert measured(copy + "cp_async_commit(); cp_async_wait<0>(); }").bytes_in_flight == 32 * 16


def test_the_memory_of_one_array_that_came_in_two_slices():
    both = np.zeros((2, 64), np.float32)
    kernel = RawKernel(
        'extern "C" __global__ void f(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }', "f"
    )
    with profile() as launches:
        kernel((1,), (64,), (both[0], both[1]))
        kernel((2,), (32,), (both[0], both[1]))
    assert [launch.arrays[0].read.bytes for launch in launches] == [256, 256]
    assert [launch.arrays[1].written.bytes for launch in launches] == [256, 256]
    assert (launches[1].read.most, launches[1].grid) == (2, (2, 1, 1))


def test_a_profile_can_be_checked_too_and_others_are_not_measured():
    kernel = RawKernel('extern "C" __global__ void f(int* x) { x[threadIdx.x] = 1; }', "f")
    x = np.zeros(8, np.int32)
    with profile() as launches, emulate(check=True):
        kernel((1,), (8,), (x,))
    kernel((1,), (8,), (x,))
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared_memory", "expected"),
    [
        (90, 128, 32, 0, Occupancy(16, "threads", 1.0)),
        (90, 1024, 64, 0, Occupancy(1, "registers", 0.5)),
        (90, 32, 32, 0, Occupancy(32, "blocks", 0.5)),
        (80, 128, 168, 0, Occupancy(3, "registers", 0.1875)),
        (80, 128, 32, 48 * 1024, Occupancy(3, "shared memory", 0.1875)),  # 49 KB each, with the system's
        (90, 128, 32, 227 * 1024, Occupancy(1, "shared memory", 0.0625)),
        (120, 256, 40, 0, Occupancy(6, "threads", 1.0)),
        (75, 256, 40, 0, Occupancy(4, "threads", 1.0)),
    ],
)
def test_occupancy_as_nvidias_calculator_has_it(arch, threads, registers, shared_memory, expected):
    assert occupancy_of(arch, threads, registers, shared_memory) == expected


def test_littles_law():
    h200 = ARCHITECTURES[90]
    assert h200.bytes_in_flight == pytest.approx(4.8e12 * 375e-9 / 132)  # 13.6 KB
    launch = measured("((float4*)y)[i] = ((const float4*)x)[i];", threads=128)
    has, asked = launch.in_flight(90)
    assert (has, asked) == (16 * 128 * 16, h200.bytes_in_flight)
    assert "16 blocks a multiprocessor (limited by threads), 100% of its threads; 32.0 KB in flight, 13.3 KB" in (
        launch.device_report(90)
    )
