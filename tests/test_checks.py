"""The checked mode: a kernel with each fault, and the same without it, which must pass."""

# ruff: noqa: E501 (kernels of one line)

import re
from typing import Any

import numpy as np
import pytest

from cupy_pagedkv.devices.sources import with_includes
from cupy_pagedkv.emulator import KernelError, RawKernel, emulate

WHO = r"thread \(\d+, 0, 0\) of block \(\d+, 0, 0\)"


def run(body: str, *, grid: int = 1, threads: int = 64, shared_mem: int = 0, order: str = "", before: str = "") -> Any:
    """``body``, of which line 2 is the first, on 256 ints x and as many y."""
    code = with_includes(
        f'#include "ptx.cuh"\n#line 1 "f.cu"\nextern "C" __global__ void f(int* x, int* y) {{\n{body}\n}}', "f.cu"
    )
    memory = np.arange(1024, dtype=np.int32)
    x, y = memory[:256].copy(), memory[256:512].copy()
    with emulate(check=True, order=order):
        RawKernel(before + code, "f")((grid,), (threads,), (x, y), shared_mem=shared_mem)
    return x, y


INDEX = "int i = threadIdx.x; int j = blockIdx.x * blockDim.x + i; (void)j;"
SHARED = f"{INDEX} __shared__ int s[64]; s[i] = 0; __syncthreads();"

RACES = {  # two places in lines 3 and 5, and what has to be between
    "shared memory, written after it was read": (
        f"{INDEX} __shared__ int s[64]; s[i] = x[i]; __syncthreads();\ny[i] = s[63 - i];\n{{}}\ns[i] = 0;", "__syncthreads();",
    ),
    "shared memory, read after it was written": (
        f"{INDEX} __shared__ int s[64]; s[i] = x[i]; __syncthreads();\ns[i] = 1;\n{{}}\ny[i] = s[i ^ 32];", "__syncthreads();",
    ),
    "global memory within a block": (f"{INDEX}\nx[i] = i;\n{{}}\ny[i] = x[63 - i];", "__syncthreads();"),
    "global memory, read first": (f"{INDEX}\ny[i] = x[63 - i];\n{{}}\nx[i] = i;", "__syncthreads();"),
    "one byte of a word": (
        f"{INDEX} char* bytes = (char*)x;\nbytes[i] = 1;\n{{}}\nif (i == 5) y[0] = *(int*)(bytes + 4);", "__syncthreads();",
    ),
    "lanes of a warp": (f"{SHARED}\ns[i] = i;\n{{}}\ny[i] = s[i ^ 1];", "__syncwarp();"),
    "a shuffle orders nothing": (
        f"{SHARED}\ns[i] = i; i = __shfl_sync(~0u, i, i);\n{{}}\ny[i] = s[i ^ 1];", "__syncwarp();"
    ),
    "half a warp waits for half a warp": (
        f"{SHARED}\ns[i] = i; __syncwarp(i % 32 < 16 ? 0xffffu : 0xffff0000u);\n{{}}\ny[i] = s[i ^ 16];", "__syncwarp();"
    ),
    "warps of a block": (f"{SHARED}\ns[i] = i; __syncwarp();\n{{}}\ny[i] = s[i ^ 32];", "__syncthreads();"),
}  # fmt: skip


@pytest.mark.parametrize("order", ["", "backward", "shuffled:1"])
@pytest.mark.parametrize("name", RACES)
def test_a_race_is_found_in_any_order_and_its_barrier_is_enough(name, order):
    body, remedy = RACES[name]
    run(body.replace("{}", remedy), order=order)
    with pytest.raises(KernelError) as error:
        run(body.replace("{}", ""), order=order)
    found = re.fullmatch(
        rf"f: (f.cu:\d): race: {WHO} (?:reads|writes) [14] bytes at address 0x\w+, which {WHO} (?:read|wrote) at (f.cu:\d), "
        "and nothing orders the two", str(error.value)
    )  # fmt: skip
    assert found, error.value
    assert set(found.groups()) == {"f.cu:3", "f.cu:5"}


def test_two_threads_that_write_one_place_race_even_with_one_value():
    with pytest.raises(KernelError, match=rf"f.cu:2: race: {WHO} writes 4 bytes .* wrote at f.cu:2"):
        run("x[threadIdx.x / 2] = 7;")
    run("x[threadIdx.x] = 7;")


def test_a_read_of_one_warp_is_not_forgotten_when_many_read():
    """Only two readers of a byte are remembered; the writer must race with one of them."""
    for writer in (0, 31, 32, 95, 127):
        with pytest.raises(KernelError, match="race"):
            run(f"y[threadIdx.x] = x[0]; __syncwarp(); if (threadIdx.x == {writer}) x[0] = 1;", threads=128)
    run("y[threadIdx.x] = x[0]; __syncthreads(); if (threadIdx.x == 5) x[0] = 1;", threads=128)
    run("y[threadIdx.x] = x[0]; __syncwarp(); if (threadIdx.x == 5) x[0] = 1;", threads=32)


def test_blocks_of_a_launch_are_ordered_by_nothing():
    with pytest.raises(
        KernelError, match=r"race: thread \(0, 0, 0\) of block \(1, 0, 0\) reads .* block \(0, 0, 0\) wrote"
    ):
        run("__syncthreads();\nif (threadIdx.x == 0) { if (blockIdx.x == 0) x[5] = 1; else y[0] = x[5]; }", grid=2)
    with pytest.raises(KernelError, match="race: .* writes .* read at"):
        run("__syncthreads();\nif (threadIdx.x == 0) { if (blockIdx.x == 1) x[5] = 1; else y[0] = x[5]; }", grid=2)
    run("if (threadIdx.x == 0) x[blockIdx.x] = x[blockIdx.x] + 1;", grid=2)


def test_atomics_do_not_race_with_each_other_but_with_plain_accesses():
    x, _ = run("atomicAdd(x + threadIdx.x % 3, 1);", grid=3)
    assert x[:3].tolist() == [66, 64, 65]
    with pytest.raises(KernelError, match=r"race: .* atomically changes 4 bytes .* wrote at f.cu:2"):
        run("if (threadIdx.x == 1) x[0] = 1;\nelse atomicAdd(x, 1);", order="backward", threads=2)
    with pytest.raises(KernelError, match=r"race: .* writes 4 bytes .* changed atomically at f.cu:3"):
        run("if (threadIdx.x == 1) x[0] = 1;\nelse atomicAdd(x, 1);", threads=2)


LAST_BLOCK = """
    __shared__ int last;
    x[1 + blockIdx.x * 64 + threadIdx.x] = threadIdx.x;
    FENCE
    __syncthreads();
    if (threadIdx.x == 0) { FENCE last = atomicAdd(x, 1) == 2; }
    __syncthreads();
    if (last) for (int i = 0; i < 192; ++i) if (i % 64 == threadIdx.x) y[i] = x[1 + (i ^ 1)];
"""


def test_the_last_block_may_read_what_all_made_known_by_a_fence_and_an_atomic():
    """As in CUDA's own example of __threadfence."""
    with pytest.raises(KernelError, match="race"):
        run(LAST_BLOCK.replace("FENCE", ""), grid=3)
    _, y = run(LAST_BLOCK.replace("FENCE", "__threadfence();"), grid=3)
    assert y[:192].tolist() == [(i ^ 1) % 64 for i in range(192)]


@pytest.mark.parametrize("grid", [1, 3])
def test_who_holds_a_lock_may_write_what_it_guards(grid):
    body = """if (threadIdx.x % 32 == 0) { while (atomicCAS(x, 0, 1)) { } ACQUIRED
        y[0] += 1; RELEASED atomicExch(x, 0); }"""
    fence = "__threadfence();" if grid > 1 else "__threadfence_block();"
    _, y = run(body.replace("ACQUIRED", fence).replace("RELEASED", fence), threads=128, grid=grid)
    assert y[0] == 256 + 4 * grid
    for first in ("", fence):  # the second orders what was written before it, the first does not
        with pytest.raises(KernelError, match="race"):
            run(body.replace("ACQUIRED", first).replace("RELEASED", ""), threads=128, grid=grid)
    if grid > 1:  # a fence of a block says nothing to others
        fence = "__threadfence_block();"
        with pytest.raises(KernelError, match=r"race: .* of block \(1, 0, 0\)"):
            run(body.replace("ACQUIRED", fence).replace("RELEASED", fence), threads=128, grid=grid)


@pytest.mark.parametrize(
    ("body", "remedy", "message"),
    [
        ("y[threadIdx.x] = x[threadIdx.x + 193];", "threadIdx.x + 192",
         r"f.cu:2: thread \(63, 0, 0\) of .* reads 4 bytes at address 0x\w+, 4 bytes past the end of an array of the "
         r"launch \(1024 bytes\)"),
        ("y[(int)threadIdx.x - 1] = 1;", "(int)threadIdx.x",
         r"f.cu:2: thread \(0, 0, 0\) of .* writes 4 bytes at address 0x\w+, 4 bytes before the beginning of an array"),
        ("extern __shared__ int s[]; s[threadIdx.x + 1] = 1;", "threadIdx.x",
         r"thread \(63, 0, 0\) of .* writes 4 bytes .* past the 256 bytes of dynamic shared memory of the launch"),
        ("*(int*)8 = 1;", "*x = threadIdx.x == 0; // (int*)8", "writes 4 bytes at address 0x8, outside every array"),
        ("int mine[4] = {1, 2, 3, 4}; int* p = mine; if (threadIdx.x == 9) p += 1 << 20; y[threadIdx.x] = p[x[2]];",
         "p += 0", r"thread \(9, 0, 0\) .* outside every array"),
    ],
    ids=["past", "before", "dynamic shared", "anywhere", "stack"],
)  # fmt: skip
def test_a_stray_access_is_found(body, remedy, message):
    with pytest.raises(KernelError, match=message):
        run(body, shared_mem=256)
    wrong = {"threadIdx.x + 192": "threadIdx.x + 193", "(int)threadIdx.x": "(int)threadIdx.x - 1",
             "threadIdx.x": "threadIdx.x + 1", "p += 0": "p += 1 << 20"}.get(remedy)  # fmt: skip
    run(body.replace(wrong, remedy) if wrong else "if (threadIdx.x == 0) *x = 1;", shared_mem=256)


@pytest.mark.parametrize("what", ["memcpy", "std::memcpy", "__builtin_memcpy", "memmove", "memset"])
def test_a_stray_copy_is_found(what):
    body = f"{what}(y + 16 * threadIdx.x, {0 if what == 'memset' else 'x'}, 64);"
    _, y = run(body, threads=16)
    assert y.tolist() == ([0] * 256 if what == "memset" else [*range(16)] * 16)
    with pytest.raises(KernelError, match=r"f.cu:2: thread \(16, 0, 0\) .* writes 64 bytes .* 64 bytes past the end"):
        run(body, threads=17)


def test_past_shared_memory_that_is_not_dynamic():
    with pytest.raises(KernelError, match=r"writes 4 bytes at .*, past the end of the shared memory of the block"):
        run("__shared__ int s[64]; s[threadIdx.x + 64] = x[0]; if (x[1]) y[0] = s[x[2]];")


def test_a_pointer_to_another_threads_variable_is_stray():
    """Local memory is each thread's own."""
    share = "__shared__ int* p; int mine = 1; if (threadIdx.x == 0) p = &mine; __syncthreads(); "
    with pytest.raises(KernelError, match=r"reads 4 bytes .* in a variable of another thread \(0\)"):
        run(share + "if (threadIdx.x == 7) y[0] = *p;\n__syncthreads();")
    run(share + "if (threadIdx.x == 0) y[0] = *p;\n__syncthreads();")


def test_slices_may_reach_all_of_the_memory_they_are_part_of():
    whole = np.arange(64, dtype=np.int32)
    kernel = RawKernel('extern "C" __global__ void f(int* x) { x[(int)threadIdx.x - 8] = 0; }', "f")
    with emulate(check=True):
        kernel((1,), (8,), (whole[8:16],))
        assert not whole[:8].any()
        with pytest.raises(KernelError, match="4 bytes before the beginning"):
            kernel((1,), (8,), (whole[7:16],))


def test_so_may_arrays_with_strides_of_their_own():
    whole = np.arange(64, dtype=np.int32)
    views = (
        np.lib.stride_tricks.as_strided(whole[8:], (4,), (4,)),
        np.lib.stride_tricks.sliding_window_view(whole, 3)[5],
    )
    kernel = RawKernel('extern "C" __global__ void f(int* x) { ++x[threadIdx.x]; }', "f")
    for view in views:
        with emulate(check=True):
            kernel((1,), (32,), (view,))
            with pytest.raises(KernelError, match=r"past the end of an array of the launch \(256 bytes\)"):
                kernel((1,), (64,), (view,))


def test_variables_of_the_device_are_no_strangers():
    before = "__device__ int counter; __constant__ int table[2] = {5, 6};\n"
    _, y = run("y[threadIdx.x] = table[threadIdx.x % 2] + atomicAdd(&counter, 0);", before=before)
    assert y[:2].tolist() == [5, 6]
    with pytest.raises(KernelError, match="race"):
        run("counter = threadIdx.x;", before=before)


@pytest.mark.parametrize(("type", "size"), [("uint4", 16), ("double", 8), ("int", 4), ("short", 2)])
def test_a_misaligned_access_is_found(type, size):
    body = f"auto p = ({type}*)((char*)x + OFFSET); if (threadIdx.x == 0) *({type}*)y = *p;"
    run(body.replace("OFFSET", str(size)))
    with pytest.raises(KernelError, match=rf"f: f.cu:2: thread \(0, 0, 0\) of .* not a multiple of {size}"):
        run(body.replace("OFFSET", str(size // 2)))


def test_shared_memory_that_nobody_wrote_is_not_read():
    body = "__shared__ int s[64]; if (threadIdx.x WHICH 40) s[threadIdx.x] = 1; __syncthreads();\ny[threadIdx.x] = s[threadIdx.x];"
    with pytest.raises(
        KernelError, match=r"f.cu:3: thread \(40, 0, 0\) of .* reads 4 bytes of shared memory .* no thread"
    ):
        run(body.replace("WHICH", "!="))
    run(body.replace("WHICH", "< 64 || 0 =="))


def test_nobody_writes_padding():
    before = "struct Best { double value; int index; }; struct Small { char c; int i; };\n"
    body = """int i = threadIdx.x; __shared__ Best s[64]; __shared__ Small t[64];
        s[i].value = t[i].c = 1; WHAT = t[i].i = i; __syncthreads();
        Best best = s[63 - i]; Small small = t[63 - i]; if (x[i] == -1) best = s[0], small = t[0];
        *(Small*)(y + 2 * i) = small; y[i * 2] = best.index + (int)best.value;"""
    _, y = run(body.replace("WHAT", "s[i].index"), before=before)
    assert y[:128:2].tolist() == list(range(64, 0, -1))
    with pytest.raises(KernelError, match="reads 4 bytes of shared memory"):
        run("__shared__ int s[64][2]; s[threadIdx.x][1] = 1; __syncthreads(); y[threadIdx.x] = s[threadIdx.x][0];")
    with pytest.raises(KernelError, match="reads 8 bytes of shared memory"):
        run("__shared__ int2 s[64]; s[threadIdx.x].y = 1; __syncthreads(); ((int2*)y)[threadIdx.x] = s[threadIdx.x];")


def test_what_another_block_left_in_shared_memory_was_not_written():
    body = "__shared__ int s[64]; if (WHICH) s[threadIdx.x] = 1; __syncthreads();\ny[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x];"
    run(body.replace("WHICH", "true"), grid=2)
    with pytest.raises(KernelError, match=r"of block \(1, 0, 0\) reads 4 bytes of shared memory"):
        run(body.replace("WHICH", "blockIdx.x == 0"), grid=2)


COPY = (
    "__shared__ __align__(16) int s[256];\ncp_async<16>(s + threadIdx.x * 4, x + threadIdx.x * 4); cp_async_commit();\n"
)


def test_an_asynchronous_copy_is_waited_for_before_it_is_read():
    with pytest.raises(
        KernelError, match=r"f.cu:4: .* reads 4 bytes .* asynchronous copy is to arrive that began at f.cu:3"
    ):
        run(COPY + "y[threadIdx.x] = s[threadIdx.x * 4];")
    with pytest.raises(KernelError, match=r"f.cu:5: race: .* reads .* wrote at f.cu:3"):  # of another thread
        run(COPY + "cp_async_wait<0>();\nif (threadIdx.x) y[threadIdx.x] = s[threadIdx.x * 4 - 4];")
    _, y = run(COPY + "cp_async_wait<0>(); __syncthreads();\ny[threadIdx.x] = s[threadIdx.x * 4 ^ 4];")
    assert y[:64].tolist() == [4 * i ^ 4 for i in range(64)]
    with pytest.raises(KernelError, match="to arrive"):  # one group was waited for, not this
        run(COPY + "cp_async_wait<1>(); __syncthreads();\ny[threadIdx.x] = s[threadIdx.x * 4];")


def test_the_source_of_an_asynchronous_copy_stays_as_it_is():
    with pytest.raises(
        KernelError, match=r"f.cu:4: .* writes 4 bytes .* an asynchronous copy reads that began at f.cu:3"
    ):
        run(COPY + "x[threadIdx.x * 4] = 1;\ncp_async_wait<0>();")
    run(COPY + "cp_async_wait<0>();\nx[threadIdx.x * 4] = 1;")


def test_nobody_writes_where_an_asynchronous_copy_is_to_arrive():
    with pytest.raises(KernelError, match="f.cu:4: .* writes 4 bytes .* is to arrive that began at f.cu:3"):
        run(COPY + "s[threadIdx.x * 4] = 1;\ncp_async_wait<0>();")
    run(COPY + "cp_async_wait<0>();\ns[threadIdx.x * 4] = 1;")


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ("if (i < 9) __syncwarp(3);", "if (i < 2) __syncwarp(3);", "lane 2 came to a collective with mask 00000003, which leaves"),
        ("if (i < 9) __syncwarp(0x3ff); else if (i == 9) __syncthreads();", "if (i < 10) __syncwarp(0x3ff);", "waits at a barrier or collective that others"),
        ("__shfl_sync(i % 2 ? ~0u : 0x55555557u, i, 0);", "__shfl_sync(~0u, i, 0);",
         "came to a collective with mask ffffffff, while lanes 00000001 are at that of f.cu:2 with mask 55555557"),
        ("if (i % 2) __syncwarp(); else __shfl_sync(~0u, i, 0);", "__syncwarp(); __shfl_sync(~0u, i, 0);",
         "all lanes of a mask must come to the same one"),
        ("if (i < 32) __syncthreads();\nelse __syncwarp(3);", "__syncthreads(); if (i < 2) __syncwarp(3);", "which leaves it out"),
        ("if (i < 32) __syncthreads();\nelse __syncthreads();", "__syncthreads();",
         "f.cu:3: .* is at this barrier while others are at that of f.cu:2; all threads"),
        ("if (i % 2) __syncthreads_or(1); else __syncthreads();", "__syncthreads_or(i % 2);", "is at this barrier while"),
        ("__shared__ __align__(16) int s[64]; s[i] = 1; __syncthreads(); unsigned r[1]; ldmatrix_x1(r, s + i % 8 * 3);",
         "__shared__ __align__(16) int s[64]; s[i] = 1; __syncthreads(); unsigned r[1]; ldmatrix_x1(r, s + i % 8 * 4);",
         "gives ldmatrix a row of 16 bytes .* not a multiple of 16"),
    ],
    ids=["left out", "missing", "masks", "kinds", "barrier and collective", "divergent", "votes", "ldmatrix"],
)  # fmt: skip
def test_collectives_and_barriers_that_do_not_meet(wrong, right, message):
    run("int i = threadIdx.x; " + right)
    with pytest.raises(KernelError, match=message) as error:
        run("int i = threadIdx.x; " + wrong)
    assert re.match(r"f: f\.cu:[23]: ", str(error.value))
    assert re.search(r"thread (\d+|\(\d+, 0, 0\)) of block \(0, 0, 0\)", str(error.value))


def test_an_error_leaves_the_next_launch_as_it_was():
    with pytest.raises(KernelError):
        run("x[threadIdx.x / 2] = 1;")
    x, _ = run("__syncthreads(); x[threadIdx.x] = 1;")
    assert x[:64].tolist() == [1] * 64
