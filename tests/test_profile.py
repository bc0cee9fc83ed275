"""What a launch moves, against what was worked out by hand."""

# ruff: noqa: E501 (kernels of one line)

import numpy as np
import pytest

from cupy_pagedkv.devices.sources import with_includes
from cupy_pagedkv.emulator import LaunchProfile, RawKernel, emulate, profile
from cupy_pagedkv.emulator.architectures import ARCHITECTURES, Occupancy, occupancy_of
from cupy_pagedkv.emulator.profiling import SharedTraffic, Traffic


def measured(body: str, threads: int = 32, grid: int = 1, shared_mem: int = 0, before: str = "") -> LaunchProfile:
    """Of ``body``, whose first line is 2, with two arrays of 4,096 floats."""
    code = with_includes(
        '#include "ptx.cuh"\n#line 1 "f.cu"\nextern "C" __global__ void f(const float* x, float* y) {\n'
        f"int i = threadIdx.x; (void)i;\n{body}\n}}", "f.cu"
    )  # fmt: skip
    arrays = np.zeros(4096, np.float32), np.zeros(4096, np.float32)
    with profile() as launches:
        RawKernel(before + code, "f")((grid,), (threads,), arrays, shared_mem=shared_mem)
    [launch] = launches
    return launch


def test_a_copy_of_32_floats_is_one_request_of_4_sectors():
    launch = measured("y[i] = x[i];")
    assert launch.arrays[0] == (Traffic(1, 128, 4, 128, 0, 1), Traffic())
    assert launch.arrays[1] == (Traffic(), Traffic(1, 128, 4, 128, 0, 1))
    assert (launch.read, launch.written) == (launch.arrays[0].read, launch.arrays[1].written)
    assert launch.read.used == 1 == Traffic().used


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


def test_a_request_is_of_one_pass_of_the_block():
    """In block 0 one lane comes twice."""
    launch = measured("for (int n = !blockIdx.x && !i ? 2 : 1; n; --n) y[blockIdx.x * 32 + i] = x[i];", grid=2)
    assert launch.read == Traffic(3, 260, 9, 0, 128, 3)


def test_bytes_that_are_touched_again():
    launch = measured("for (int n = 0; n < 5; ++n) y[i] += x[n];")
    assert launch.arrays[0].read == Traffic(5, 20, 5, 20, 0, 1)
    assert launch.arrays[1].written == Traffic(5, 640, 20, 0, 128, 5)
    launch = measured("for (int n = 1; n < 5; ++n) if (i < n) y[i] = n;")
    assert launch.written == Traffic(4, 40, 4, 4, 12, 4)
    launch = measured("for (int n = 0; n < 65540; ++n) y[0] += n;", threads=1)
    assert (launch.written.requests, launch.written.most) == (65540, 65535)  # that, or more


def test_atomics_are_written_variables_of_a_thread_are_not_counted():
    assert measured("atomicAdd(y + i, 1.f);").written == Traffic(1, 128, 4, 128, 0, 1)
    launch = measured("float mine[4]; for (int k = 0; k < 4; ++k) mine[k] = k; mine[i % 4] += 1; y[i] = mine[i / 8];")
    assert (launch.read, launch.written.requests) == (Traffic(), 1)


def test_variables_of_the_device():
    launch = measured("y[i] = table[i];", before="__device__ float table[64];\n")
    assert (launch.read.requests, launch.read.bytes) == (1, 128)
    assert (launch.arrays[0].read, launch.shared) == (Traffic(), SharedTraffic())
    assert [(line.argument, line.traffic.bytes) for line in launch.lines if not line.writes] == [(None, 128)]


def test_memcpy_reads_and_writes_at_one_place_and_each_lane_as_much_as_it_likes():
    launch = measured("memcpy(y + i, y + 64 + i, 4);")
    assert (launch.arrays[1].read, launch.arrays[1].written) == (Traffic(1, 128, 4, 128, 0, 1),) * 2
    launch = measured("float mine[16]; memcpy(mine, x + i, i ? 4 : 64); y[i] = mine[0];")
    assert launch.read == Traffic(4, 128 + 48, 4 + 3, 128 - 48, 48, 2)  # 16 bytes at once


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("__shared__ float s[32][32]; s[i][0] = x[i];", SharedTraffic(1, 32, 1)),
        ("__shared__ float s[32][33]; s[i][0] = x[i];", SharedTraffic(1, 1, 1)),
        ("__shared__ float s[64]; s[2 * i] = x[i];", SharedTraffic(1, 2, 1)),
        ("__shared__ float s[64]; s[i / 8] = 1;", SharedTraffic(1, 1, 1)),  # lanes at one word
        ("__shared__ char s[32]; s[i] = 1;", SharedTraffic(1, 1, 1)),
        ("__shared__ double s[32]; s[i] = 1;", SharedTraffic(1, 2, 2)),
        ("__shared__ double s[32]; s[0] = 1;", SharedTraffic(1, 1, 1)),
        ("__shared__ double s[32]; s[i / 2] = 1;", SharedTraffic(1, 1, 1)),  # as an H100 counts: not half a warp at a time
        ("__shared__ double s[64]; s[2 * i] = 1;", SharedTraffic(1, 4, 2)),
        ("__shared__ float4 s[32]; s[i] = *(const float4*)x;", SharedTraffic(1, 4, 4)),
        ("__shared__ float4 s[32]; if (i < 8) s[i] = *(const float4*)x;", SharedTraffic(1, 1, 1)),
        ("__shared__ float4 s[64]; s[2 * i] = *(const float4*)x;", SharedTraffic(1, 8, 4)),
        ("__shared__ float4 s[32]; cp_async<16>(s + (i ^ i / 8), x + 4 * i); cp_async_wait_all();", SharedTraffic(1, 4, 4)),
        ("__shared__ float4 s[256]; cp_async<16>(s + 8 * i, x + 4 * i); cp_async_wait_all();", SharedTraffic(1, 32, 4)),
    ],
)  # fmt: skip
def test_bank_conflicts(body, expected):
    launch = measured(body + ' asm volatile("" ::"r"(s) : "memory");')  # or the store would be dropped
    assert launch.shared == expected
    assert launch.shared.conflicts == expected.wavefronts - expected.least
    assert (launch.shared.ways, SharedTraffic().ways) == (expected.wavefronts / expected.least, 1)
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
    assert len(launch.lines) == 2
    assert (read.place, read.argument, read.traffic.requests) == ("f.cu:3", 0, 2)
    assert "argument 0: reads 256 B in 2 requests of 16 sectors, 50% used" in str(launch)
    assert "f.cu:3: 50% of 16 sectors used by its reads" in str(launch)
    lines = measured("float a = x[i];\nfloat b = x[2 * i];\ny[i] = a + b;").lines
    assert [(line.place, line.traffic.sectors) for line in lines] == [("f.cu:3", 4), ("f.cu:4", 8), ("f.cu:5", 4)]


def test_the_report_of_a_launch():
    code = """__device__ __align__(32) float table[64];
extern "C" __global__ void f(int n, const float* x, int m, float* y) {
    __shared__ float s[1024]; extern __shared__ float d[];
    int i = threadIdx.x + 8 * (threadIdx.y + 2 * threadIdx.z);
    float a = x[i] + x[n * i];
    s[32 * i] = d[i] = a; a = s[i];
    a += s[n * i] + table[n * i];
    s[n * i] = a; s[m * i] = a; __syncthreads();
    y[i] = a + s[i];
    if (i == 0) y[5] = x[0];
}"""
    arrays = np.zeros(64, np.float32), np.zeros(64, np.float32)
    with profile() as launches:
        RawKernel(code, "f")((1, 1, 2), (8, 2, 2), (np.int32(2), arrays[0], np.int32(4), arrays[1]), shared_mem=512)
    assert str(launches[0]).splitlines() == [
        "f, grid (1, 1, 2), block (8, 2, 2), 512 B of dynamic shared memory",
        "  reads   776 B in 8 requests of 42 sectors, 58% used, 320 of them more than once (up to 6)",
        "  writes  264 B in 4 requests of 10 sectors, 82% used, 128 of them more than once (up to 4)",
        "    argument 1: reads 520 B in 6 requests of 26 sectors, 62% used, 192 of them more than once (up to 6)",
        "    argument 3: writes 264 B in 4 requests of 10 sectors, 82% used, 128 of them more than once (up to 4)",
        "  shared memory: 14 requests, 72 bank conflicts",
        "    f.cu:5: 67% of 24 sectors used by its reads",
        "    f.cu:6: 16.5-way conflicts in 4 requests",
        "    f.cu:7: 2.0-way conflicts in 2 requests",
        "    f.cu:7: 50% of 16 sectors used by its reads",
        "    f.cu:8: 3.0-way conflicts in 4 requests",
        "    f.cu:10: 12% of 2 sectors used by its reads",
        "    f.cu:10: 12% of 2 sectors used by its writes",
        "  0 collectives and 1 barriers a thread",
        "  256 B in flight in a block",
    ]
    assert [line.argument for line in launches[0].lines if line.traffic.requests] == [1, None, 3, 1, 3]
    assert "more than once" not in str(measured("y[i] = x[i];"))


def test_static_and_dynamic_shared_memory_limit_the_occupancy_of_a_launch():
    code = """extern "C" __global__ void f(float* y) {
        __shared__ float s[4096]; extern __shared__ float d[]; int i = threadIdx.x;
        s[i] = d[i] = y[i]; __syncthreads(); y[i] = s[i ^ 1] + d[i ^ 2];
    }"""
    with profile() as launches:
        RawKernel(code, "f")((1,), (8, 4, 4), (np.zeros(8, np.float32),), shared_mem=20 * 1024)
    assert launches[0].occupancy(90) == Occupancy(6, "shared memory", 6 * 128 / 2048)  # 37 KB each of 228
    assert ", 36864 B shared, 6 blocks a multiprocessor (limited by shared memory), 38%" in launches[0].device_report(
        90
    )


def test_blocks_are_measured_one_after_another():
    """Long enough for others to be called to help, if it were allowed."""
    launch = measured("for (int n = 0; n < 20; ++n) __syncthreads(); if (i < 32) __syncwarp(); y[i] = 1;", 64, grid=300)
    assert (launch.collectives, launch.barriers, launch.written.requests) == (0.5, 20, 600)


def test_bytes_in_flight():
    loads = "float a = x[i], b = x[i + 32];"
    assert measured(f"{loads} y[i] = a + b;").bytes_in_flight == 32 * 8
    assert measured("float a = x[i]; __syncwarp(); float b = x[i + 32]; y[i] = a + b;").bytes_in_flight == 32 * 4
    assert measured("y[i] = x[i]; y[i + 32] = x[i + 32];").bytes_in_flight == 32 * 4
    assert measured(f"{loads} y[i] = a + b; y[i] += x[i + 1];").bytes_in_flight == 32 * 8
    assert measured("__shared__ float s[32]; s[i] = 1; y[i] = s[i] + x[i];").bytes_in_flight == 32 * 4
    for point in ("__syncthreads();", "atomicAdd(y, 1.f);"):
        assert measured(f"float a = x[i]; {point} float b = x[i + 32]; y[i] = a + b;").bytes_in_flight == 32 * 4, point
    copy = "__shared__ __align__(16) float s[512]; for (int n = 0; n < 3; ++n) { cp_async<16>(s + 4 * (32 * n + i), x + 4 * i);\n"
    assert measured(copy + "cp_async_commit(); if (n) cp_async_wait<1>(); }").bytes_in_flight == 32 * 32
    assert measured(copy + "cp_async_commit(); cp_async_wait<0>(); }").bytes_in_flight == 32 * 16
    copy = "__shared__ float4 s[32]; {} cp_async<16>(s + i, x + 4 * i); {} float b = x[i]; y[i] = a + b;"
    assert measured(copy.format("float a = x[i + 32];", "")).bytes_in_flight == 32 * (4 + 16 + 4)
    assert measured(copy.format("float a = 1;", "__syncwarp();")).bytes_in_flight == 32 * (16 + 4)


def test_bytes_in_flight_are_those_of_the_busiest_block():
    body = "if (i / 16 == blockIdx.x) { float sum = 0; for (int n = 2 - blockIdx.x; n; --n) sum += x[32 * n + i]; y[i] = sum; }"
    assert measured(body, grid=2).bytes_in_flight == 16 * 8


def test_an_asynchronous_copy_of_zeros_reads_nothing():
    copy = "__shared__ __align__(16) float s[256]; for (int n = 0; n < 2; ++n) {\n"
    copy += "cp_async<16>(s + 4 * (32 * n + i), x + 4 * (32 * n + i), i % 2 ? 8 : 0); cp_async_wait_all(); } y[i] = x[i + 512];"
    launch = measured(copy)
    assert launch.read == Traffic(3, 256 + 128, 32 + 4, 256 + 128, 0, 1)
    assert launch.shared == SharedTraffic(2, 8, 8)
    assert launch.bytes_in_flight == 16 * 8 + 16 * 4


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


def test_what_lies_beside_a_slice_is_the_slices():
    whole = np.zeros(64, np.float32)
    kernel = RawKernel('extern "C" __global__ void f(float* x) { x[(int)threadIdx.x - 8] = 0; }', "f")
    with profile() as launches:
        kernel((1,), (8,), (whole[8:16],))
    assert launches[0].arrays[0].written.bytes == 32


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
        (75, 32, 32, 4 * 1024, Occupancy(16, "blocks", 0.5)),  # nothing is the system's
        (75, 32, 32, 0, Occupancy(16, "blocks", 0.5)),
        (86, 32, 32, 0, Occupancy(16, "blocks", 1 / 3)),
        (120, 32, 32, 0, Occupancy(24, "blocks", 0.5)),
        (90, 128, 33, 0, Occupancy(12, "registers", 0.75)),  # 40 of each thread
        (90, 32, 104, 0, Occupancy(16, "registers", 0.25)),  # in each quarter four, where 19 would fit into all
        (90, 100, 32, 0, Occupancy(16, "threads", 1.0)),
        (80, 32, 32, 5970, Occupancy(23, "shared memory", 0.359375)),  # 6,016 bytes each, and the system's
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
