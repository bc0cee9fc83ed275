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
    "lanes of a warp that met before": (
        f"{SHARED} s[i] = 1; __syncwarp();\ns[i] = i;\n{{}}\ny[i] = s[i ^ 1];", "__syncwarp();"
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


@pytest.mark.parametrize(
    ("readers", "writer", "options"),
    [
        # A reader of another warp, then two of the writer's.
        ("if (i == 32 || i < 2) y[j] = x[9]; __syncwarp();", "if (i == 0) x[9] = 1;", {"order": "backward"}),
        # Two warps, and again one of them behind a barrier.
        ("y[j] = x[9]; __syncthreads(); if (i == 5) y[j] += x[9];", "if (i == 40) x[9] = 1;", {}),
        # One of another block, then all of this, which a barrier orders.
        ("if (b || i == 0) y[j] = x[9]; __syncthreads();", "if (b && i == 7) x[9] = 1;", {"grid": 2, "threads": 32}),
        # Two warps of another block, ordered by an atomic; then one of this that is not.
        ("if (!b) { if (i % 32 == 0) y[j] = x[9]; __syncthreads(); if (i == 0) { __threadfence(); atomicAdd(x, 1); } }"
         "else if (i == 0) y[j] = x[9];", "if (b && i == 40) { atomicAdd(x, 1); x[9] = 1; }", {"grid": 2}),
    ],
    ids=["of a warp", "behind a barrier", "of another block", "ordered"],
)  # fmt: skip
def test_a_reader_is_not_forgotten_whoever_read_besides(readers, writer, options):
    body = f"int i = threadIdx.x, b = blockIdx.x, j = b * blockDim.x + i;\n{readers}\n"
    with pytest.raises(KernelError, match=r"f.cu:4: race: .* writes 4 bytes .* read at f.cu:3"):
        run(body + writer, **options)
    run(body + writer.replace("x[9]", "x[8]"), **options)


def test_blocks_of_a_launch_are_ordered_by_nothing():
    with pytest.raises(
        KernelError, match=r"race: thread \(0, 0, 0\) of block \(1, 0, 0\) reads .* block \(0, 0, 0\) wrote"
    ):
        run("__syncthreads();\nif (threadIdx.x == 0) { if (blockIdx.x == 0) x[5] = 1; else y[0] = x[5]; }", grid=2)
    with pytest.raises(KernelError, match="race: .* writes .* read at"):
        run("__syncthreads();\nif (threadIdx.x == 0) { if (blockIdx.x == 1) x[5] = 1; else y[0] = x[5]; }", grid=2)
    run("if (threadIdx.x == 0) x[blockIdx.x] = x[blockIdx.x] + 1;", grid=2)


def test_blocks_are_checked_one_after_another():
    """Long enough for others to be called to help, if it were allowed."""
    body = "for (int n = 0; n < 20; ++n) __syncthreads();\nif (threadIdx.x == 0 && (blockIdx.x == 0 || blockIdx.x >= 200)) x[AT] = 1;"
    with pytest.raises(KernelError, match="race: .* wrote at f.cu:3"):
        run(body.replace("AT", "0"), grid=256)
    run(body.replace("AT", "blockIdx.x"), grid=256)


def test_atomics_do_not_race_with_each_other_but_with_plain_accesses():
    x, _ = run("atomicAdd(x + threadIdx.x % 3, 1);", grid=3)
    assert x[:3].tolist() == [66, 64, 65]
    with pytest.raises(KernelError, match=r"race: .* atomically changes 4 bytes .* wrote at f.cu:2"):
        run("if (threadIdx.x == 1) x[0] = 1;\nelse atomicAdd(x, 1);", order="backward", threads=2)
    with pytest.raises(KernelError, match=r"race: .* writes 4 bytes .* changed atomically at f.cu:3"):
        run("if (threadIdx.x == 1) x[0] = 1;\nelse atomicAdd(x, 1);", threads=2)
    with pytest.raises(KernelError, match=r"race: .* reads 4 bytes .* changed atomically at f.cu:3"):
        run("if (threadIdx.x == 1) y[0] = x[0];\nelse atomicAdd(x, 1);", threads=2)
    with pytest.raises(KernelError, match=r"race: .* atomically changes 4 bytes .* read at f.cu:2"):
        run("if (threadIdx.x == 1) y[0] = x[0];\nelse atomicAdd(x, 1);", order="backward", threads=2)
    run("if (threadIdx.x == 1) y[0] = x[0];\n__syncthreads(); atomicAdd(x, 1);", threads=2)


def test_a_race_names_both_threads_and_blocks():
    code = """extern "C" __global__ void f(int* x) {
        int t = threadIdx.x + 2 * (threadIdx.y + 3 * threadIdx.z), b = blockIdx.x + 2 * (blockIdx.y + 3 * blockIdx.z);
        if ((t == 7 && b == 9) || (t == 10 && b == 11)) x[b / OTHER] = 1;
    }"""
    with emulate(check=True):
        RawKernel(code.replace("OTHER", "11"), "f")((2, 3, 2), (2, 3, 3), (np.zeros(2, np.int32),))
        with pytest.raises(KernelError, match=r"race: thread \(0, 2, 1\) of block \(1, 2, 1\) writes 4 bytes at address "
                           r"0x\w+, which thread \(1, 0, 1\) of block \(1, 1, 1\) wrote at f.cu"):  # fmt: skip
            RawKernel(code.replace("OTHER", "12"), "f")((2, 3, 2), (2, 3, 3), (np.zeros(2, np.int32),))


def test_what_lanes_of_the_block_before_knew_is_forgotten():
    body = f"{SHARED} s[i] = i; if (blockIdx.x == 0 {{}}) __syncwarp(); y[j] = s[i ^ 1];"
    with pytest.raises(KernelError, match=r"race: .* of block \(1, 0, 0\) writes .* of block \(1, 0, 0\) read"):
        run(body.replace("{}", ""), grid=2)
    run(body.replace("{}", "|| true"), grid=2)


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


PUBLISHED = {  # x[5], which one block writes and a later one reads; a fault and its remedy
    "before the fence and the atomic": (
        "if (i == 0) { if (b == 0) { BEFORE __threadfence(); atomicAdd(x, 1); AFTER } else { atomicAdd(x, 1); y[b] = x[5]; } }",
        {"BEFORE": "", "AFTER": "x[5] = 1;"}, {"BEFORE": "x[5] = 1;", "AFTER": ""},
    ),
    "by the block that wrote it": (
        "if (i == 0) { if (b == 0) x[5] = 1; if (b == 1 OR) __threadfence(); atomicAdd(x, 1); if (b == 2) y[0] = x[5]; }",
        {"OR": ""}, {"OR": "|| b == 0"},
    ),
    "by a fence of this block": (
        "if (i == 0) { if (b == 1) x[5] = 1; if (b == 0 OR) __threadfence(); atomicAdd(x, 1); if (b == 2) y[0] = x[5]; }",
        {"OR": ""}, {"OR": "|| b == 1"},
    ),
    "by a fence of the system": (
        "if (i == 0) { if (b == 0) { x[5] = 1; FENCE } atomicAdd(x, 1); if (b == 2) y[0] = x[5]; }",
        {"FENCE": "__threadfence_block();"}, {"FENCE": "__threadfence_system();"},
    ),
    "to a block that comes to an atomic": (
        "if (i == 0) { if (b == 0) x[5] = 1; __threadfence(); if (b < 2 OR) atomicAdd(x, 1); if (b == 2) y[0] = x[5]; }",
        {"OR": ""}, {"OR": "|| b == 2"},
    ),
    "of other threads, with a barrier before": (
        "if (i == 0 && b == 0) x[5] = 1; BARRIER if (i == 9) { __threadfence(); atomicAdd(x, 1); if (b == 1) y[0] = x[5]; }",
        {"BARRIER": ""}, {"BARRIER": "__syncthreads();"},
    ),
    "to other threads, with a barrier behind": (
        "if (i == 0) { if (b == 0) x[5] = 1; __threadfence(); atomicAdd(x, 1); } BARRIER if (i == 9 && b == 1) y[0] = x[5];",
        {"BARRIER": ""}, {"BARRIER": "__syncthreads();"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_block_makes_known_to_another(name):
    body, wrong, right = PUBLISHED[name]
    for missing, texts in ((True, wrong), (False, right)):
        filled = "int i = threadIdx.x, b = blockIdx.x;\n" + body
        for key, text in texts.items():
            filled = filled.replace(key, text)
        if missing:
            with pytest.raises(KernelError, match=r"f.cu:3: race: .* reads 4 bytes .* wrote at f.cu:3"):
                run(filled, grid=3)
        else:
            run(filled, grid=3)


STRUCT = "struct S { int a, b, c; }; S* from = (S*)x; S* to = (S*)y; "


@pytest.mark.parametrize(
    ("body", "wrong", "right", "message"),
    [
        ("y[threadIdx.x] = x[threadIdx.x + {}];", "193", "192",
         r"f.cu:2: thread \(63, 0, 0\) of .* reads 4 bytes at address 0x\w+, 4 bytes past the end of an array of the "
         r"launch \(1024 bytes\)"),
        ("y[(int)threadIdx.x - {}] = 1;", "1", "0",
         r"f.cu:2: thread \(0, 0, 0\) of .* writes 4 bytes at address 0x\w+, 4 bytes before the beginning of an array"),
        ("if (threadIdx.x == 0) memcpy(y, x + 250, {});", "28", "24", "reads 28 bytes .* 4 bytes past the end"),
        ("if (threadIdx.x == 0) memcpy(y + 250, x, {});", "28", "24", "writes 28 bytes .* 4 bytes past the end"),
        ("if (threadIdx.x == 0) memset(y + 250, 1, {});", "28", "24", "writes 28 bytes .* 4 bytes past the end"),
        (STRUCT + "to[threadIdx.x] = from[threadIdx.x + {}];", "22", "21", "reads 12 bytes .* 8 bytes past the end"),
        (STRUCT + "to[threadIdx.x + {}] = from[threadIdx.x];", "22", "21", "writes 12 bytes .* 8 bytes past the end"),
        ("__shared__ uint4 s[64]; cp_async<16>(s + threadIdx.x, x + 4 * threadIdx.x + {}); cp_async_wait_all();", "4", "0",
         "reads 16 bytes .* 16 bytes past the end"),
        ("extern __shared__ int s[]; s[threadIdx.x + {}] = 1;", "1", "0",
         r"thread \(63, 0, 0\) of .* writes 4 bytes .* past the 256 bytes of dynamic shared memory of the launch"),
        ("if (threadIdx.x == 0) *{} = 1;", "(int*)8", "x", "writes 4 bytes at address 0x8, outside every array"),
        ("int mine[4] = {1, 2, 3, 4}; int* p = mine; if (threadIdx.x == 9) p += {}; y[threadIdx.x] = p[x[2]];",
         "1 << 20", "0", r"thread \(9, 0, 0\) .* outside every array"),
    ],
    ids=["past", "before", "memcpy from", "memcpy to", "memset", "struct from", "struct to", "asynchronous",
         "dynamic shared", "anywhere", "stack"],
)  # fmt: skip
def test_a_stray_access_is_found(body, wrong, right, message):
    run(body.replace("{}", right), shared_mem=256)
    with pytest.raises(KernelError, match=message):
        run(body.replace("{}", wrong), shared_mem=256)


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
    verb = "accesses" if type == "uint4" else "reads"  # a struct: by members, says the compiler
    with pytest.raises(KernelError, match=rf"f: f.cu:2: thread \(0, 0, 0\) of .* {verb} .* not a multiple of {size}"):
        run(body.replace("OFFSET", str(size // 2)))


def test_shared_memory_that_nobody_wrote_is_not_read():
    body = "__shared__ int s[64]; if (threadIdx.x WHICH 40) s[threadIdx.x] = 1; __syncthreads();\ny[threadIdx.x] = s[threadIdx.x];"
    with pytest.raises(
        KernelError, match=r"f.cu:3: thread \(40, 0, 0\) of .* reads 4 bytes of shared memory .* no thread"
    ):
        run(body.replace("WHICH", "!="))
    run(body.replace("WHICH", "< 64 || 0 =="))
    with pytest.raises(KernelError, match=r"f.cu:2: .* atomically changes 4 bytes of shared memory .* no thread"):
        run("__shared__ int s[64]; if (threadIdx.x != 40) s[threadIdx.x] = 1; atomicAdd(s + threadIdx.x, 1);")
    run("__shared__ int s[64]; s[threadIdx.x] = 1; atomicAdd(s + threadIdx.x, 1);")


def test_nobody_writes_padding():
    before = "struct Best { double value; int index; }; struct Small { char c; int i; };\n"
    body = """int i = threadIdx.x; __shared__ Best s[64]; __shared__ Small t[64];
        s[i].value = t[i].c = 1; WHAT = t[i].i = i; __syncthreads();
        Best best = s[63 - i]; Small small = t[63 - i]; if (x[i] == -1) best = s[0], small = t[0];
        *(Small*)(y + 2 * i) = small; y[i * 2] = best.index + (int)best.value;"""
    _, y = run(body.replace("WHAT", "s[i].index"), before=before)
    assert y[:128:2].tolist() == list(range(64, 0, -1))
    body = "__shared__ Small t[64]; if (blockIdx.x == LAST) memset(t + i, 0, 8); else t[i].c = t[i].i = 1;"
    body += " __syncthreads(); if (blockIdx.x != LAST) ((Small*)y)[i] = t[63 - i];"
    for order in ("forward", "backward"):
        last = "1" if order == "forward" else "0"
        run("int i = threadIdx.x; " + body.replace("LAST", last), before=before, grid=2, order=order)
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


@pytest.mark.parametrize(
    ("source", "write", "found"),
    [
        ("x + 4", "x[4] = 1;", True),
        ("x + 4", "x[7] = 1;", True),
        ("x + 4", "x[3] = x[8] = 1;", False),
        ("x + 4, 4", "atomicAdd(x + 4, 1);", True),
        ("x + 4, 4", "atomicAdd(x + 5, 1);", False),
        ("x + 5, 0", "*(int2*)(x + 4) = {};", False),
        ("(int*)8, 0", "", False),
    ],
)
def test_the_source_of_an_asynchronous_copy_is_what_it_reads(source, write, found):
    body = f"""__shared__ __align__(16) int s[4];
    if (threadIdx.x == 0) {{ cp_async<16>(s, {source}); {write} cp_async_wait_all(); y[0] = s[3]; }}"""
    if found:
        with pytest.raises(KernelError, match=r"f.cu:3: .* writes 4 bytes .* copy reads that began at f.cu:3"):
            run(body)
    else:
        run(body)  # with the zeros behind what it reads


def test_a_group_that_was_waited_for_leaves_the_others_in_flight():
    body = """__shared__ __align__(16) int s[8];
    if (threadIdx.x == 0) { cp_async<16>(s, x); cp_async_commit(); cp_async<16>(s + 4, x + 4); cp_async_commit();
    cp_async_wait<1>(); x[AT] = s[0]; }"""
    run(body.replace("AT", "3"))
    with pytest.raises(KernelError, match=r"f.cu:4: .* writes 4 bytes .* copy reads that began at f.cu:3"):
        run(body.replace("AT", "4"))


def test_a_copy_of_a_block_that_has_ended_is_a_read_like_others():
    body = "__shared__ __align__(16) int s[256]; if (blockIdx.x == 0)\ncp_async<16>(s + threadIdx.x * 4, x + threadIdx.x * 4); else\nX[threadIdx.x] = 1;"
    with pytest.raises(
        KernelError, match=r"f.cu:4: race: .* of block \(1, 0, 0\) writes .* of block \(0, 0, 0\) read at f.cu:3"
    ):
        run(body.replace("X", "x"), grid=2)
    run(body.replace("X", "y"), grid=2)


def test_nobody_writes_where_an_asynchronous_copy_is_to_arrive():
    with pytest.raises(KernelError, match="f.cu:4: .* writes 4 bytes .* is to arrive that began at f.cu:3"):
        run(COPY + "s[threadIdx.x * 4] = 1;\ncp_async_wait<0>();")
    with pytest.raises(KernelError, match="f.cu:4: .* writes 16 bytes .* is to arrive that began at f.cu:3"):
        run(COPY + "cp_async<16>(s + threadIdx.x * 4, x + threadIdx.x * 4); cp_async_wait_all();")
    run(COPY + "cp_async_wait<0>();\ncp_async<16>(s + threadIdx.x * 4, x + threadIdx.x * 4); cp_async_wait_all();")
    run(COPY + "cp_async_wait<0>();\ns[threadIdx.x * 4] = 1;")


MATRIX = "__shared__ __align__(16) int s[64]; s[i] = 1; __syncthreads(); unsigned r[1]; (void)r; "


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ("if (i < 9) __syncwarp(3);", "if (i < 2) __syncwarp(3);", "lane 2 came to a collective with mask 00000003, which leaves"),
        ("if (i < 9) __syncwarp(0x3ff); else if (i == 9) __syncthreads();", "if (i < 10) __syncwarp(0x3ff);", "waits at a barrier or collective that others"),
        ("__shfl_sync(i % 2 ? ~0u : 0x55555557u, i, 0);", "__shfl_sync(~0u, i, 0);",
         "came to a collective with mask ffffffff, while lanes 00000001 are at that of f.cu:2 with mask 55555557"),
        ("if (i % 2) __syncwarp(); else __shfl_sync(~0u, i, 0);", "if (i % 2) __syncwarp();\nelse __syncwarp();",
         "all lanes of a mask must come to the same one"),
        ("if (i < 32) __syncthreads();\nelse __syncwarp(3);", "__syncthreads(); if (i < 2) __syncwarp(3);", "which leaves it out"),
        ("if (i < 32) __syncthreads();\nelse __syncthreads();", "__syncthreads();",
         "f.cu:3: .* is at this barrier while others are at that of f.cu:2; all threads"),
        ("if (i % 2) __syncthreads_or(1); else __syncthreads();", "__syncthreads_or(i % 2);", "is at this barrier while"),
        ("float d[4] = {}; unsigned a[2] = {}; if (i % 2) mma_m16n8k8_f16(d, a, 0u);\nelse mma_m16n8k8_f16(d, a, 0u);",
         "float d[4] = {}; unsigned a[2] = {}; mma_m16n8k8_f16(d, a, 0u);", "all lanes of a mask must come to the same one"),
        (MATRIX + "if (i % 2) ldmatrix_x1(r, s + i % 8 * 4);\nelse ldmatrix_x1(r, s + i % 8 * 4);",
         MATRIX + "ldmatrix_x1(r, s + i % 8 * 4);", "all lanes of a mask must come to the same one"),
        (MATRIX + "ldmatrix_x1(r, s + i % 8 * 2);", MATRIX + "ldmatrix_x1(r, s + i % 8 * 4);",
         "gives ldmatrix a row of 16 bytes .* not a multiple of 16"),
        (MATRIX + "unsigned q[2]; ldmatrix_x2(q, i % 32 < 8 ? s + 4 * i : nullptr);",
         MATRIX + "ldmatrix_x1(r, i % 32 < 8 ? s + i % 32 * 4 : nullptr);", "gives ldmatrix a row .* not a multiple of 16 in shared"),
        (MATRIX.replace("s[i]", "if (i % 5 == 0) s[i]") + "ldmatrix_x1(r, s + i % 8 * 4);", MATRIX + "ldmatrix_x1(r, s + i % 8 * 4);",
         "reads 16 bytes of shared memory .* no thread"),
    ],
    ids=["left out", "missing", "masks", "kinds", "barrier and collective", "divergent", "votes", "divergent mma",
         "divergent ldmatrix", "ldmatrix, misaligned", "ldmatrix, not shared", "ldmatrix, unwritten"],
)  # fmt: skip
def test_collectives_and_barriers_that_do_not_meet(wrong, right, message):
    run("int i = threadIdx.x; " + right)
    with pytest.raises(KernelError, match=message) as error:
        run("int i = threadIdx.x; " + wrong)
    assert re.match(r"f: f\.cu:[23]: ", str(error.value))
    assert re.search(r"thread (\d+|\(\d+, 0, 0\)) of block \(0, 0, 0\)", str(error.value))


def test_virtual_functions_are_no_strangers():
    structs = "struct A { virtual int f() { return 1; } }; struct B : A { int f() override { return 2; } };"
    _, y = run(structs + " A a; B b; A* p = threadIdx.x % 2 ? &a : &b; y[threadIdx.x] = p->f();")
    assert y[:2].tolist() == [2, 1]


def test_an_error_leaves_the_next_launch_as_it_was():
    with pytest.raises(KernelError):
        run("x[threadIdx.x / 2] = 1;")
    x, _ = run("__syncthreads(); x[threadIdx.x] = 1;")
    assert x[:64].tolist() == [1] * 64
