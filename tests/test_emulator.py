"""The emulated device: what it does like a GPU, and what it says when something is wrong."""

# ruff: noqa: E501 (kernels of one line)

import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import cupy_pagedkv.emulator.compiler as compiler
from cupy_pagedkv.devices.sources import source_of, with_includes
from cupy_pagedkv.emulator import CompileError, KernelError, RawKernel, emulate, profile
from cupy_pagedkv.emulator.settings import Settings, settings


def kernel(body: str, parameters: str = "int* x") -> RawKernel:
    return RawKernel(f'extern "C" __global__ void f({parameters}) {{ {body} }}', "f")


def run(body: str, threads: int, size: int = 256) -> np.ndarray:
    x = np.arange(size, dtype=np.int32)
    kernel(body)((1,), (threads,), (x,))
    return x


def test_indices_of_threads_and_blocks():
    x = np.full((3, 2, 4, 2, 5), -1, np.int32)
    body = """
        int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        int block = blockIdx.y * gridDim.x + blockIdx.x;
        int i = block * blockDim.x * blockDim.y * blockDim.z + thread;
        if (x[i] == -1) x[i] = i;
    """
    kernel(body)((2, 3), (5, 2, 4), (x,))
    assert np.array_equal(x.reshape(-1), np.arange(x.size))


def test_arguments_arrive_by_their_size():
    """As CuPy passes them: int as int64, float as float64, NumPy scalars as they are."""
    out = np.zeros(6)
    k = kernel("y[0] = a; y[1] = b; y[2] = c; y[3] = d; y[4] = e; y[5] = g == nullptr;",
               "double* y, long long a, double b, float c, short d, unsigned char e, const char* g")  # fmt: skip
    k((1,), (1,), (out, -(2**40), 0.1, np.float32(0.5), np.int16(-3), np.uint8(255), 0))
    assert out.tolist() == [-(2**40), 0.1, 0.5, -3, 255, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.int32(1),), "the kernel takes 2 arguments and got 1"),
        ((np.int32(1), 2, 3), "the kernel takes 2 arguments and got 3"),
        ((1, 2), "f: argument 0 has 8 bytes, but its parameter takes 4"),
        ((np.int32(1), np.int32(2)), "f: argument 1 has 4 bytes, but its parameter takes 8"),
        ((np.int32(1), [2]), "a kernel takes arrays, numbers and NumPy scalars, got list"),
        ((np.int32(1), None), "got NoneType"),
    ],
)
def test_arguments_of_the_wrong_size_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        kernel("", "int a, long long b")((1,), (1,), arguments)


def test_an_empty_grid_is_one_block_as_with_cupy():
    x = np.zeros(1, np.int32)
    kernel("++*x;")((0,), (0,), (x,))
    assert x[0] == 1


@pytest.mark.parametrize(
    ("grid", "block"), [((2**31,), (1,)), ((1, 65536), (1,)), ((1,), (1025,)), ((1,), (1, 1, 65)), ((1,), (32, 33))]
)
def test_sizes_that_cuda_refuses_are_refused(grid, block):
    with pytest.raises(ValueError, match="has at most"):
        kernel("")(grid, block, (np.zeros(1),))


def test_barriers_and_shared_memory():
    body = "__shared__ int s[256]; int i = threadIdx.x; s[i] = x[i]; __syncthreads(); x[i] = s[255 - i];"
    assert run(body, 256).tolist() == list(range(256))[::-1]
    turn = "int y = x[(i + 1) % 70]; __syncthreads(); x[i] = y; __syncthreads();"
    body = f"int i = threadIdx.x; for (int n = 0; n < 5; ++n) {{ {turn} }}"
    assert run(body, 70)[:70].tolist() == [(i + 5) % 70 for i in range(70)]


def test_shuffles_and_votes():
    every = "0xffffffffu"
    lanes = np.arange(64)
    base = lanes // 32 * 32
    for body, expected in [
        (f"x[i] = __shfl_sync({every}, x[i], i * 7);", base + lanes * 7 % 32),
        (f"x[i] = __shfl_up_sync({every}, x[i], 3);", np.where(lanes % 32 < 3, lanes, lanes - 3)),
        (f"x[i] = __shfl_down_sync({every}, x[i], 3);", np.where(lanes % 32 > 28, lanes, lanes + 3)),
        (f"x[i] = __shfl_xor_sync({every}, x[i], 5);", base + (lanes % 32 ^ 5)),
        (f"long long y = 1ll << 40 | i; y = __shfl_sync({every}, y, 9); x[i] = y >> 40 ? y : 0;", base + 9),
        (f"x[i] = __popc(__ballot_sync({every}, i % 3 == 0)) + 100 * __ffs(__ballot_sync({every}, i == 40));",
         np.where(lanes < 32, 11, 11 + 900)),
        (f"x[i] = __any_sync({every}, i == 3) + 2 * __all_sync({every}, i < 32);", np.where(lanes < 32, 3, 0)),
        ("if (i < 40) { unsigned m = i < 32 ? 0xffffffffu : 0xffu; __syncwarp(m); x[i] = __shfl_sync(m, x[i], 1); }",
         np.where(lanes < 40, base + 1, lanes)),
    ]:  # fmt: skip
        assert run(f"int i = threadIdx.x; {body}", 64)[:64].tolist() == expected.tolist(), body


def test_a_prefix_sum_over_a_warp():
    body = """
        int v = x[threadIdx.x];
        for (int d = 1; d < 32; d *= 2) {
            int w = __shfl_up_sync(0xffffffffu, v, d);
            if (threadIdx.x % 32 >= d) v += w;
        }
        x[threadIdx.x] = v;
    """
    assert run(body, 96)[:96].tolist() == np.arange(96).reshape(3, 32).cumsum(1).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "if (threadIdx.x) __syncthreads(); else __syncwarp(3);",
            r"thread 0 of block \(0, 0, 0\) waits at a barrier or collective that others never reach",
        ),
        ("if (threadIdx.x < 9) __syncwarp(); else __syncthreads();", "thread 0 of block .* waits"),
        ("if (threadIdx.x == 3) __syncwarp(1);", "lane 3 came to a collective with mask 00000001, which leaves it out"),
    ],
)
def test_a_kernel_that_is_stuck_is_an_error_and_the_next_launch_is_fine(body, message):
    with pytest.raises(RuntimeError, match=message):
        run(body, 64)
    assert run("__syncthreads(); x[threadIdx.x] += 1;", 64)[:64].tolist() == list(range(1, 65))


def outcome_of(body: str, *, check: bool, before: str = "", grid: int = 1, interrupt: bool = False) -> str:
    """What another process says of the launch: had it crashed or hung, this one would not tell."""
    code = f"""if True:
        import os, signal, threading
        import numpy as np
        from cupy_pagedkv.emulator import RawKernel, emulate
        x, kernel = np.zeros(256, np.int32), RawKernel({before + f'extern "C" __global__ void f(int* x) {{ {body} }}'!r}, "f")
        if {interrupt}:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # shells take it from what runs in the background
            def stop():
                while not x[0]:
                    pass
                os.kill(os.getpid(), signal.SIGINT)
            threading.Thread(target=stop).start()
        for _ in range(2):  # the second time the process is as sound as the first
            try:
                with emulate(check={check}):
                    kernel(({grid},), (32,), (x,))
            except (KeyboardInterrupt, RuntimeError) as error:
                print(type(error).__name__, error)
            if {interrupt}:
                break
        RawKernel('extern "C" __global__ void g(int* x) {{ __syncthreads(); x[threadIdx.x] = 5; }}', "g")((1,), (32,), (x,))
        print("sound" if x[31] == 5 else x)
        """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run
    return run.stdout


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(
    ("body", "before"),
    [
        ("volatile float big[60000]; for (int i = 0; i < 60000; ++i) big[i] = i; x[threadIdx.x] = big[x[threadIdx.x]];", ""),
        ("x[threadIdx.x] = deep(x, threadIdx.x + 100000);",
         "__device__ __attribute__((noinline)) int deep(volatile int* x, int n) { return n ? 1 + deep(x, n - 1) + x[0] : 0; }\n"),
    ],
    ids=["variables", "calls"],
)  # fmt: skip
def test_too_much_local_memory_is_an_error(body, before, check):
    said = r"KernelError f: (f.cu:\d: )?thread \(0, 0, 0\) of block \(0, 0, 0\) needs more than 131072 bytes for its variables and calls\n"
    assert re.fullmatch(f"{said}{said}sound\n", outcome_of(body, check=check, before=before))


def test_an_access_to_no_memory_is_an_error():
    said = r"KernelError f: f.cu:1: thread \(3, 0, 0\) of block \(0, 0, 0\) accesses address 0x10, where no memory is\n"
    assert re.fullmatch(f"{said}{said}sound\n", outcome_of("if (threadIdx.x == 3) *(int*)16 = 1;", check=False))


@pytest.mark.parametrize(
    ("body", "check", "grid"),
    [
        ("x[0] = 1; volatile int* y = x + 9; while (!*y) { }", False, 1),
        ("x[0] = 1; while (!atomicAdd(x + 9, 0)) { }", True, 1),
        ("x[0] = 1; while (true) __syncthreads();", False, 1),
        ("if (blockIdx.x > 9) { x[0] = 1; volatile int* y = x + 9; while (!*y) { } } else for (volatile int i = 0; i < 100000; i = i + 1) { }",
         False, 100),
    ],
    ids=["nothing", "checked", "barriers", "many blocks"],
)  # fmt: skip
def test_a_launch_can_be_interrupted(body, check, grid):
    assert re.fullmatch(r"KeyboardInterrupt \nsound\n", outcome_of(body, check=check, grid=grid, interrupt=True))


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_threads_that_returned_or_never_were_count_as_arrived(order):
    """As on a GPU since Volta (CUDA programming guide, "Synchronization Functions")."""
    with emulate(order=order):
        body = "int i = threadIdx.x; if (i % 3) return; __syncthreads(); x[i] = -1; __syncthreads();"
        assert run(body, 40)[:6].tolist() == [-1, 1, 2, -1, 4, 5]
        assert run("x[threadIdx.x] = __popc(__ballot_sync(0xffffffffu, 1));", 16)[:16].tolist() == [16] * 16
        twice = "__ballot_sync(0xffffffffu, 1); __ballot_sync(0xffffffffu, 1);"  # votes that must not be counted later
        body = f"int i = threadIdx.x; {twice} if (i < 5) return; __syncwarp(); x[i] = __popc(__ballot_sync(0xffffffffu, 1));"
        assert run(body, 32)[:32].tolist() == [0, 1, 2, 3, 4] + [27] * 27
        assert (
            run("int i = threadIdx.x; if (i > 8) return; x[i] = __syncthreads_and(i < 9);", 40)[:9].tolist() == [1] * 9
        )


def test_a_stuck_kernel_is_no_matter_of_its_name():
    code = 'extern "C" __global__ void argument() { if (threadIdx.x) __syncthreads(); else __syncwarp(3); }'
    with pytest.raises(RuntimeError, match="waits"):
        RawKernel(code, "argument")((1,), (64,), ())


def test_threads_of_the_host_do_not_disturb_each_other():
    k = kernel("__shared__ int s[64]; int i = threadIdx.x; s[i] = x[i]; __syncthreads(); x[i] = s[63 - i];")
    arrays = [np.arange(64, dtype=np.int32) + 1000 * i for i in range(8)]

    def work(x):
        for _ in range(51):
            k((1,), (64,), (x,))

    threads = [threading.Thread(target=work, args=(x,)) for x in arrays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(arrays):
        assert x.tolist() == [1000 * i + 63 - j for j in range(64)]


def test_a_compile_error_names_the_line_in_the_cu_file():
    defines = (("SLOT_T", "int"), ("ACCESS_T", "uint4"))  # the others are missing
    code = source_of("reshape_and_cache", defines)
    text = (Path(__file__).parent.parent / "kernels" / "reshape_and_cache.cu").read_text().splitlines()
    line = next(i for i, text_line in enumerate(text, 1) if "BLOCK_SIZE * block_stride" in text_line)
    with pytest.raises(CompileError, match=rf"(?s)could not compile the kernel reshape_and_cache:.*"
                                           rf"kernels/reshape_and_cache\.cu:{line}:"):  # fmt: skip
        RawKernel(code, "reshape_and_cache")((1,), (1,), ())


def test_no_compiler_is_an_error_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompileError, match=r"needs a C\+\+ compiler, and none of \['c\+\+', 'g\+\+', 'clang\+\+'\]"):
        kernel("")((1,), (1,), (np.zeros(1),))
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(CompileError, match="none of .'no-such-compiler -O3'."):
        kernel("")((1,), (1,), (np.zeros(1),))


def test_compiled_kernels_are_kept_by_content(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    run_compiler = compiler.subprocess.run
    monkeypatch.setattr(compiler.subprocess, "run", lambda *a, **k: calls.append(a) or run_compiler(*a, **k))
    x = np.zeros(1, np.int32)

    def libraries():
        return sorted(path.name for path in (tmp_path / "cupy_pagedkv").glob("f-*"))

    kernel("*x = 1;")((1,), (1,), (x,))
    first = libraries()
    assert len(first) == 1
    compiled = len(calls)
    kernel("*x = 1;")((1,), (1,), (x,))  # the same text again, as in another process
    assert (len(calls), libraries()) == (compiled, first)
    kernel("*x = 2;")((1,), (1,), (x,))
    assert (len(calls), len(libraries())) == (compiled + 2, 2)  # compiled and linked
    monkeypatch.setenv("CXXFLAGS", "-DMORE=1")
    kernel("*x = 2;")((1,), (1,), (x,))
    assert len(libraries()) == 3


def test_a_cache_folder_that_cannot_be_made_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        kernel("*x = 3;")((1,), (1,), (np.zeros(1, np.int32),))
    assert os.listdir(tmp_path) == ["file"]


def test_the_order_of_compilers(monkeypatch, tmp_path):
    for name in ("g++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\necho version of $0\n")
        (tmp_path / name).chmod(0o755)
    assert compiler._compiler(None, str(tmp_path))[0] == (f"{tmp_path}/g++",)
    assert compiler._compiler("clang++ -v", str(tmp_path))[0] == (f"{tmp_path}/clang++", "-v")
    (tmp_path / "c++").symlink_to(tmp_path / "g++")
    assert compiler._compiler(None, f"{tmp_path}")[0] == (f"{tmp_path}/g++",)  # remembered for this PATH
    assert compiler._compiler(None, f"{tmp_path}/")[0] == (f"{tmp_path}/c++",)


@pytest.mark.parametrize("fibers", ["", "__syncthreads();"], ids=["threads", "fibers"])
@pytest.mark.parametrize(("type", "alignment"), [("uint4", 16), ("uint2", 8), ("int", 4), ("unsigned short", 2)])
def test_a_misaligned_access_stops(fibers, type, alignment):
    kernel = RawKernel(
        f"""#line 1 "kernels/f.cu"
        extern "C" __global__ void f(const char* from, char* to) {{
            {fibers}
            {type} x = *(const {type}*)(from + threadIdx.x * 16);
            *({type}*)(to + threadIdx.x * 16) = x;
        }}""",
        "f",
    )
    memory = np.empty(256, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :][:192]
    memory[:] = np.arange(192)
    source, target = memory[:96], memory[96:]
    before = memory.copy()
    for from_offset, to_offset, line in ((alignment // 2, 0, 3), (0, alignment // 2, 4)):
        arrays = source[from_offset:], target[to_offset:]
        with pytest.raises(RuntimeError) as error:
            kernel((2,), (3,), arrays)
        thread, address = re.fullmatch(
            rf"f: kernels/f.cu:{line}: thread \((\d), 0, 0\) of block \(0, 0, 0\) (?:reads|writes|accesses) "
            rf"'.*{type.split()[-1]}.*' at address (0x\w+), which is not a multiple of {alignment}",
            str(error.value),
        ).groups()
        assert int(address, 16) == arrays[line - 3].ctypes.data + 16 * int(thread)
        assert memory.tobytes() == before.tobytes()
    kernel((1,), (3,), (source, target))  # and the next launch is as if nothing had happened
    assert all(target[i * 16] == source[i * 16] for i in range(3))


def test_shared_memory_begins_as_signalling_garbage():
    x = np.zeros(64, np.uint32)
    code = "__shared__ unsigned s[64]; y[threadIdx.x] = s[threadIdx.x]; s[threadIdx.x] = 1;"
    kernel(code, "unsigned* y")((3,), (64,), (x,))
    assert np.isnan(x.view(np.float32)).all()
    assert not (x & 0x400000).any()  # signalling, in float32 and bfloat16
    assert np.isnan(x.view(np.float16)).all()


def test_all_shared_memory_begins_as_garbage_and_is_the_blocks():
    """Static, of a template, and dynamic, wherever the linker puts them."""
    code = """extern __shared__ unsigned d[]; template <class T> __device__ T* more() { __shared__ T s[32]; return s; }
    extern "C" __global__ void f(unsigned* y) {
        __shared__ unsigned s[32]; unsigned* all[] = {s, more<unsigned>(), more<int2>() ? (unsigned*)more<int2>() : 0, d};
        for (int n = 0; n < 4; ++n) { READ all[n][threadIdx.x] = 1; y[4 * threadIdx.x + n] += all[n][threadIdx.x] - 1; }
    }"""
    y = np.zeros((32, 4), np.uint32)
    read = code.replace("READ", "y[4 * threadIdx.x + n] = all[n][threadIdx.x];")
    RawKernel(read, "f")((3,), (32,), (y,), shared_mem=128)
    assert (y == 0x7FA17FA1).all()
    y[:] = 0
    with emulate(check=True):
        RawKernel(code.replace("READ", ""), "f")((1,), (32,), (y,), shared_mem=128)


def order_of(order: str) -> np.ndarray:
    x = np.zeros(65, np.int32)
    with emulate(order=order):
        kernel("x[blockIdx.x * 8 + threadIdx.x] = atomicAdd(x + 64, 1);")((8,), (8,), (x,))
    assert sorted(x[:64]) == list(range(64))
    return x[:64]


def test_threads_and_blocks_run_in_the_order_that_was_asked_for():
    assert order_of("forward").tolist() == list(range(64))
    assert order_of("backward").tolist() == list(range(64))[::-1]
    shuffled, other = order_of("shuffled:1"), order_of("shuffled:2")
    assert np.array_equal(shuffled, order_of("shuffled:1"))
    assert not np.array_equal(shuffled, other)
    of_blocks, of_threads = shuffled.reshape(8, 8) // 8, shuffled.reshape(8, 8) % 8
    assert (of_blocks == of_blocks[:, :1]).all()  # a block after another
    assert of_blocks[:, 0].tolist() not in (list(range(8)), other.reshape(8, 8)[:, 0].tolist())
    assert (of_threads != np.arange(8)).any(axis=1).all()
    assert len({tuple(row) for row in of_threads}) > 4


@pytest.mark.parametrize("order", ["backward", *(f"shuffled:{seed}" for seed in range(9))])
def test_every_block_runs_once_in_any_order(order):
    x = np.zeros(12, np.int32)
    with emulate(order=order):
        for blocks in range(1, 12):
            kernel("++x[blockIdx.x];")((blocks,), (1,), (x,))
    assert x.tolist() == list(range(11, -1, -1))


def test_blocks_behind_an_error_do_not_run():
    x = np.zeros(5, np.int32)
    with emulate(order="forward"), pytest.raises(KernelError):
        kernel("x[blockIdx.x] = 1; if (blockIdx.x == 2) __trap();")((5,), (1,), (x,))
    assert x.tolist() == [1, 1, 1, 0, 0]


def test_stacks_of_a_launch_that_failed_are_kept_for_the_next():
    def regions():
        return len(Path("/proc/self/maps").read_text().splitlines())

    def fail():
        with pytest.raises(KernelError):
            run("if (threadIdx.x == 63) __trap(); __syncthreads();", 64)

    fail()
    before = regions()
    for _ in range(4):
        fail()
    assert regions() < before + 64


def test_the_order_of_threads_between_barriers():
    body = "for (int i = 0; i < 3; ++i) { x[atomicAdd(x + 48, 1)] = threadIdx.x; __syncthreads(); }"
    for order, expected in (("forward", list(range(16)) * 3), ("backward", list(range(16))[::-1] * 3)):
        x = np.zeros(49, np.int32)
        with emulate(order=order):
            kernel(body)((1,), (16,), (x,))
        # Who comes to a barrier last goes on at once, and then the others in their order.
        assert x[:16].tolist() == expected[:16]
        assert sorted(x[16:32]) == list(range(16))


@pytest.mark.parametrize("order", ["random", "shuffled", "shuffled:", "shuffled:x", "Forward", "shuffled:" + 19 * "1"])
def test_an_unknown_order_is_refused(order):
    with pytest.raises(ValueError, match="must be forward, backward or shuffled:SEED"), emulate(order=order):
        pass


def test_settings_that_are_not_given_stay_as_they_were():
    before = settings()
    with emulate(check=True, order="backward", arch=80):
        with emulate(order=""):
            assert settings() == Settings(check=True, order="", arch=80)
        with emulate(check=False):
            assert settings() == Settings(check=False, order="backward", arch=80)
        assert settings() == Settings(check=True, order="backward", arch=80)
    assert settings() == before


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CUPY_PAGEDKV_EMULATE": "check"}, "True '' 90"),
        ({"CUPY_PAGEDKV_EMULATE": "1", "CUPY_PAGEDKV_EMULATE_ORDER": "shuffled:9"}, "False 'shuffled:9' 90"),
        ({"CUPY_PAGEDKV_EMULATE_ORDER": "sideways"}, "ValueError: the order of threads must be"),
        (
            {"CUPY_PAGEDKV_EMULATE": "2"},
            "ValueError: the environment variable CUPY_PAGEDKV_EMULATE must be 1, check or 0",
        ),
    ],
)
def test_the_environment(variables, expected):
    code = (
        "from cupy_pagedkv import PagedKVCache; from cupy_pagedkv.emulator.settings import settings; s = settings(); "
        "print(s.check, repr(s.order), s.arch)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert expected in run.stdout + run.stderr


def test_dynamic_shared_memory():
    code = """extern __shared__ __align__(128) unsigned char bytes[];
    __device__ int twice(int i) { extern __shared__ int numbers[]; return numbers[i] * 2; }
    extern "C" __global__ void f(int* x) {
        extern __shared__ int numbers[];
        numbers[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        x[threadIdx.x] = twice(31 - threadIdx.x) + ((long long)bytes != (long long)numbers);
    }"""
    x = np.arange(32, dtype=np.int32)
    for check in (False, True):
        x[:] = np.arange(32)
        with emulate(check=check):
            RawKernel(code, "f")((2 if not check else 1,), (32,), (x,), shared_mem=128)
        assert x.tolist() == ([4 * i for i in range(32)] if not check else [2 * (31 - i) for i in range(32)])


@pytest.mark.parametrize("check", [False, True])
def test_dynamic_shared_memory_of_a_template(check):
    before = "template <class T> __device__ T* memory() { extern __shared__ __align__(16) unsigned char bytes[]; return (T*)bytes; }\n"
    body = "int* s = memory<int>(); s[threadIdx.x] = 5; __syncthreads(); x[threadIdx.x] = s[31 - threadIdx.x];"
    code = f'{before}extern "C" __global__ void f(int* x) {{ {body} }}'
    script = f"""if True:
        import numpy as np
        from cupy_pagedkv.emulator import RawKernel, emulate
        x = np.zeros(32, np.int32)
        with emulate(check={check}):
            RawKernel({code!r}, "f")((1,), (32,), (x,), shared_mem=128)
        print(x.sum())"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout == "160\n", run


@pytest.mark.parametrize("code", ["__device__ int g(int);", "#define SHARED(name) extern __shared__ int name[]"])
def test_what_is_nowhere_defined_is_a_compile_error(code):
    use = "x[0] = g(1);" if "g(" in code else "SHARED(s); s[0] = 1;"
    with pytest.raises(
        CompileError, match=r"(?s)symbol: (s|_Z1gi)\n.*`extern __shared__` arrays are found by their text"
    ):
        RawKernel(f'{code}\nextern "C" __global__ void f(int* x) {{ {use} }}', "f")(
            (1,), (1,), (np.zeros(1, np.int32),)
        )


def test_limits_of_dynamic_shared_memory():
    large = RawKernel(
        'extern "C" __global__ void f(char* x) { extern __shared__ char s[]; s[0] = s[*(int*)x - 1] = 1; }', "f"
    )
    x = np.array([48 * 1024], np.int32)
    large((1,), (1,), (x,), shared_mem=48 * 1024)
    with pytest.raises(
        ValueError, match="f may have 49152 bytes of dynamic shared memory, and was to be .* 49153; set max_"
    ):
        large((1,), (1,), (x,), shared_mem=48 * 1024 + 1)
    for arch, kilobytes in ((75, 64), (80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)):
        with emulate(arch=arch):
            large.max_dynamic_shared_size_bytes = kilobytes * 1024
            with pytest.raises(ValueError, match=f"sm_{arch} gives a thread block at most {kilobytes * 1024} bytes"):
                large.max_dynamic_shared_size_bytes = kilobytes * 1024 + 1
            assert large.max_dynamic_shared_size_bytes == kilobytes * 1024
            x[0] = kilobytes * 1024
            with emulate(check=True):
                large((1,), (1,), (x,), shared_mem=kilobytes * 1024)
    with pytest.raises(ValueError, match="arch must be one of 75, 80"), emulate(arch=70):
        pass


def test_the_architecture_is_what_the_kernel_is_told():
    for arch in (75, 90):
        x = np.zeros(1, np.int32)
        with emulate(arch=arch):
            kernel("*x = __CUDA_ARCH__;")((1,), (1,), (x,))
        assert x[0] == 10 * arch


def test_more_collectives():
    every = "0xffffffffu"
    lanes = np.arange(64)
    signed = (lanes % 32 - 7).reshape(2, 32)
    for body, expected in [
        (f"x[i] = __reduce_add_sync({every}, i % 32 - 7);", signed.sum(1).repeat(32)),
        (f"x[i] = __reduce_min_sync({every}, i % 32 - 7);", signed.min(1).repeat(32)),
        (f"x[i] = __reduce_max_sync({every}, i % 32 - 7);", signed.max(1).repeat(32)),
        (f"x[i] = __reduce_or_sync({every}, 1u << i % 32 % 5) + __reduce_and_sync({every}, 96u | i);", np.full(64, 31 + 96)),
        (f"x[i] = __reduce_xor_sync({every}, 1u << i % 32 % 3);", np.full(64, 1 + 2)),  # 11, 11 and 10 lanes
        (f"x[i] = __popc(__match_any_sync({every}, i % 32 % 3));", np.array([11, 11, 10])[lanes % 32 % 3]),
        (f"x[i] = __shfl_sync({every}, i, 3, 8);", lanes // 8 * 8 + 3),
        (f"x[i] = __shfl_down_sync({every}, i, 3, 8);", np.where(lanes % 8 > 4, lanes, lanes + 3)),
        (f"x[i] = __shfl_up_sync({every}, i, 3, 8);", np.where(lanes % 8 < 3, lanes, lanes - 3)),
        (f"x[i] = __shfl_xor_sync({every}, i, 9, 8);", np.where(lanes % 16 < 8, lanes, lanes ^ 9)),  # not of later groups
        ("x[i] = __syncthreads_count(i % 4 == 0) + 100 * __syncthreads_or(i == 9) + 200 * __syncthreads_and(i < 63);",
         np.full(64, 116)),
        ("x[i] = __syncthreads_count(i < 5 ? 7 : 0) + 100 * __syncthreads_count(i < 7) + 1000 * __syncthreads_or(i < 9);",
         np.full(64, 1705)),
        ("if (i < 32) __syncthreads();\nelse __syncthreads();\nx[i] = i;", lanes),  # checks refuse it
        ("int all = __popc(__activemask()); x[i] = 0; if (i % 32 < 5) x[i] = 100 * all + __popc(__activemask());",
         np.where(lanes % 32 < 5, 3205, 0)),
        ("x[i] = __popc(__activemask());", np.full(64, 32)),
        ("if (i % 32 < 5) x[i] = __popc(__activemask()); else if (i % 2) x[i] = 0; else x[i] = __activemask() >> 31;",
         np.where(lanes % 32 < 5, 5, 0)),
        ("if (i % 32 < 16) __syncwarp(0xffff); else __syncwarp(0xffff0000); x[i] = i;", lanes),
    ]:  # fmt: skip
        assert run(f"int i = threadIdx.x; {body}", 64)[:64].tolist() == expected.tolist(), body


def test_half_warps_may_meet_again_and_again():
    """While the other half still reads what it met for."""
    body = """int i = threadIdx.x, n = i % 32 < 16 ? 9 : 2; unsigned mask = i % 32 < 16 ? 0xffffu : 0xffff0000u;
        int sum = 0; for (int k = 0; k < n; ++k) sum += __shfl_xor_sync(mask, i + 100 * k, 1); x[i] = sum;"""
    expected = [sum((i ^ 1) + 100 * k for k in range(9 if i % 32 < 16 else 2)) for i in range(64)]
    for order in ("forward", "backward", "shuffled:3"):
        with emulate(order=order):
            assert run(body, 64)[:64].tolist() == expected


def test_atomics():
    for body, expected in [
        ("atomicAdd(x, i);", 2016 * 9), ("atomicSub(x, 1);", -576), ("atomicMax(x, i * (blockIdx.x + 1));", 63 * 9),
        ("atomicMin(x, -i);", -63), ("atomicOr(x, i);", 63), ("atomicAnd(x, i); if (blockIdx.x == 8) atomicOr(x, 64);", 64),
        ("atomicXor(x, i & 1);", 0), ("atomicInc((unsigned*)x, 9);", 576 % 10), ("atomicDec((unsigned*)x, 9);", (-576) % 10),
        ("int old = *x, seen; do { seen = old; old = atomicCAS(x, seen, seen + 2); } while (old != seen);", 1152),
        ("atomicExch(x, 7);", 7), ("atomicAdd((float*)x, 0.5f);", int(np.float32(288).view(np.int32))),
    ]:  # fmt: skip
        x = np.zeros(2, np.int32)
        kernel("int i = threadIdx.x; " + body)((9,), (64,), (x,))
        assert x.tolist() == [expected, 0], body
    x = np.zeros(1)
    kernel("atomicAdd(x, 0.25);", "double* x")((9,), (64,), (x,))
    assert x[0] == 144


def test_blocks_side_by_side_lose_nothing():
    """Long enough for helpers to be called, where there are cores."""
    x, total = np.zeros(4000, np.int32), np.zeros(1, np.int64)
    body = """__shared__ int s[64]; s[threadIdx.x] = blockIdx.x;
        for (int n = 0; n < 50; ++n) { __syncthreads(); s[threadIdx.x] = s[threadIdx.x ^ 1] + 0 * n; __syncthreads(); }
        atomicAdd(total, 1ull); if (threadIdx.x == 0) x[blockIdx.x] += s[5] + 1;"""
    parameters = "int* x, unsigned long long* total"
    kernel(body, parameters)((4000,), (64,), (x, total))
    assert x.tolist() == [i + 1 for i in range(4000)]
    assert total[0] == 4000 * 64
    x[:], total[0] = 0, 0
    with emulate(order="forward"):  # and then one after another
        kernel(body.replace("+= s[5] + 1", "= (total[0] - 1) / 64"), parameters)((4000,), (64,), (x, total))
    assert x.tolist() == list(range(4000))


def test_an_error_among_blocks_side_by_side():
    body = """for (int n = 0; n < 200; ++n) __syncthreads();
        if (blockIdx.x == 3000 && threadIdx.x == 5) __trap();"""
    with pytest.raises(
        KernelError, match=r"f.cu:2: thread \(5, 0, 0\) of block \(3000, 0, 0\) stops the launch: __trap"
    ):
        kernel(body)((4000,), (64,), (np.zeros(1, np.int32),))
    with pytest.raises(KernelError, match="assertion failed: threadIdx.x < 9"):
        kernel("assert(threadIdx.x < 9);")((1,), (64,), (np.zeros(1, np.int32),))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("tex1Dfetch(x, 1);", r"does not know tex1Dfetch. If that is CUDA's, its place is .*cuda\.hpp"),
        ("__half h;", r"does not know __half"),
        ("f<<<1, 1>>>(x);", "No kernel is launched by a kernel here: no dynamic parallelism"),
        ('asm("bar.sync 0;");', r"Inline PTX does not run on a host. kernels/ptx.cuh .*ptx\.hpp"),
    ],
)
def test_cuda_that_is_not_there_is_named(code, message):
    with pytest.raises(CompileError, match=message):
        kernel(code)((1,), (1,), (np.zeros(1, np.int32),))


def test_a_kernel_that_is_not_there_is_named():
    with pytest.raises(CompileError, match=r"There is no kernel `g` in this source: .*extern"):
        RawKernel('extern "C" __global__ void f(int* x) {}', "g")((1,), (1,), ())
    with pytest.raises(CompileError, match="does not know h. If"):
        RawKernel('extern "C" __global__ void g(int* x) { h(x); }', "g")((1,), (1,), (np.zeros(1, np.int32),))


def test_options_may_have_braces():
    x = np.zeros(1, np.int32)
    RawKernel('extern "C" __global__ void f(int* x) { int y[] = VALUES; *x = y[1]; }', "f", ("-DVALUES={3,4}",))(
        (1,), (1,), (x,)
    )
    assert x[0] == 4


def test_functions_of_floats_are_those_of_floats():
    """The C library has `int abs(int)`, CUDA has one of each type."""
    x = np.full(8, -0.5, np.float32)
    body = """x[0] = abs(x[0]); x[1] = isnan(x[1]) + isinf(x[1]) + isfinite(x[1]) + signbit(x[1]); x[2] = abs(-3ll);
        x[3] = sizeof(sqrt(x[3])) + sizeof(pow(x[3], 2.f)) + sizeof(exp(x[3])); x[4] = abs(-0.25); x[5] = sizeof(exp(2.));"""
    kernel(body, "float* x")((1,), (1,), (x,))
    assert x.tolist() == [0.5, 2, 3, 12, 0.25, 8, -0.5, -0.5]


def test_constants_may_be_static():
    x = np.zeros(1, np.int32)
    code = """static __constant__ int a[2] = {1, 2}; __constant__ int b = 3; extern "C" { __device__ __constant__ int c = 4; }
    extern "C" __global__ void f(int* x) { *x = a[1] + b + c; }"""
    RawKernel(code, "f")((1,), (1,), (x,))
    assert x[0] == 9


def test_a_kernel_may_have_functions_named_like_those_of_ptx_cuh():
    code = """__device__ float bf16_to_f32(unsigned short x) { return __uint_as_float((unsigned)x << 16) + 1; }
    extern "C" __global__ void f(float* x) { *x = bf16_to_f32(0x3f80); }"""
    x = np.zeros(1, np.float32)
    RawKernel(code, "f")((1,), (1,), (x,))
    assert x[0] == 2


def test_an_assertion_is_an_error_whatever_is_included():
    code = '#include <cassert>\nextern "C" __global__ void f(int* x) { assert(*x == 0); }'
    RawKernel(code, "f")((1,), (1,), (np.zeros(1, np.int32),))
    with pytest.raises(KernelError, match=r"f.cu:2: thread .* stops the launch: assertion failed: \*x == 0"):
        RawKernel(code, "f")((1,), (1,), (np.ones(1, np.int32),))


@pytest.mark.parametrize("present", [16, 31])
def test_instructions_of_a_whole_warp_need_a_whole_warp(present):
    code = with_includes(
        '#include "ptx.cuh"\n#line 1 "f.cu"\nextern "C" __global__ void f(float* x, int n) {\nif (threadIdx.x >= n) return; '
        "unsigned a[4] = {}, b[2] = {}; mma_m16n8k16_f16((float(&)[4])*x, a, b); }", "f.cu"
    )  # fmt: skip
    x = np.zeros(4, np.float32)
    f = RawKernel(code, "f")
    f((1,), (32,), (x, np.int32(32)))
    for threads in (present, 32):
        with pytest.raises(
            KernelError, match=r"f.cu:2: thread .* needs all 32 lanes of its warp, and lanes \w+ are there"
        ):
            f((1,), (threads,), (x, np.int32(present)))


@pytest.mark.parametrize("type", ["int", "unsigned long long"])
def test_a_misaligned_atomic_stops(type):
    x = np.zeros(4, np.int64)
    body = f"atomicAdd(({type}*)((char*)x + offset), ({type})1);"
    for offset in (8, 4 if type == "int" else 8):
        kernel(body, "long long* x, int offset")((1,), (1,), (x, np.int32(offset)))
    with pytest.raises(
        KernelError, match=r"f.cu:1: thread .* atomically changes \d bytes at address .* not a multiple"
    ):
        kernel(body, "long long* x, int offset")((1,), (1,), (x, np.int32(2)))


def test_no_atomic_of_one_byte():
    with pytest.raises(CompileError, match="2, 4 or 8 bytes"):
        kernel("atomicAdd(x, (unsigned char)1);", "unsigned char* x")((1,), (1,), (np.zeros(1, np.uint8),))


def test_a_header_that_is_not_there_is_named():
    with pytest.raises(CompileError, match=r"(?s)No header of CUDA's is here, cuda_fp16.h neither.*cuda\.hpp"):
        RawKernel('#include <cuda_fp16.h>\nextern "C" __global__ void f() {}', "f")((1,), (1,), ())


def test_two_kernels_with_shared_memory_of_one_name_have_their_own():
    code = """template <int N> __device__ int* mine() {{ __shared__ int s[N == 1 ? {n} : 1]; return s; }}
    extern "C" __global__ void f(int* x) {{ mine<1>()[threadIdx.x] = 1; __syncthreads(); x[threadIdx.x] = mine<1>()[0]; }}"""
    for n in (8, 64):
        x = np.zeros(n, np.int32)
        with emulate(check=True):
            RawKernel(code.format(n=n), "f")((1,), (n,), (x,))
        assert x.all()


@pytest.fixture(params=["g++", "clang++"])
def cxx(request, monkeypatch):
    """As the compiler of the emulated device."""
    if not shutil.which(request.param):
        pytest.skip(f"there is no {request.param}")
    monkeypatch.setenv("CXX", request.param)


def test_each_compiler_sees_copies_of_structs(cxx):
    """Clang calls memcpy for them, behind the back of what it instruments."""
    code = """struct Row { float x[8]; };
    extern "C" __global__ void f(float4* a, float4* b, Row* c, Row* d) { int i = threadIdx.x;
        {} }"""
    body = """b[i] = a[i]; float4 v = a[i + 32]; ((float*)b)[i + 128] = v.x + v.y + v.z + v.w;
        d[i] = c[i]; if (i == 0) { memcpy(d, c, 64); memmove(d, c, 64); memset(d, 0, 64); }"""
    arrays = [np.ones(256, np.float32) for _ in range(4)]
    with profile() as launches:
        RawKernel(code.replace("{}", body), "f")((1,), (32,), arrays)
    traffic = [launches[0].arrays[i] for i in range(4)]  # requests of 16 bytes a thread, bytes, sectors
    assert [of.read[:3] for of in traffic if of.read.bytes] == [(2, 1024, 32), (10, 1024 + 128, 64 + 8)]
    assert [of.written[:3] for of in traffic if of.written.bytes] == [(2, 640, 16 + 4), (14, 1024 + 192, 64 + 12)]
    for wrong, message in [
        ("b[i / 2] = a[i];", "race: .* writes 16 bytes"),
        ("b[i] = a[i + 64];", "reads 16 bytes .* past the end"),
        ("d[i / 2] = c[i];", "race: .* writes 32 bytes"),
        ("memcpy(c, d + 1, 32);", "race: .* writes 32 bytes"),
        ("memmove(c, d + 32, 8);", "reads 8 bytes .* past the end"),
        ("memset(d, 0, 64);", "race: .* writes 64 bytes"),
    ]:
        with pytest.raises(KernelError, match=f"f.cu:3: .*{message}"), emulate(check=True):
            RawKernel(code.replace("{}", wrong), "f")((1,), (64,), arrays)


def test_each_compiler_sees_packed_structs_and_virtual_functions(cxx):
    code = """struct __attribute__((packed)) P { char c; int i; };
    struct Base { int n; __device__ virtual int of(int i) { return i + n; } };
    struct Twice : Base { __device__ int of(int i) override { return 2 * i + n; } };
    __device__ __noinline__ int of(Base& base, int i) { return base.of(i); }
    extern "C" __global__ void f(P* p, int* x) { Base a; Twice b; a.n = b.n = 7;
        p[threadIdx.x AT].i = of(p->c ? a : b, x[threadIdx.x]); }"""
    packed, x = np.zeros(32, np.dtype([("c", np.int8), ("i", np.int32)])), np.arange(32, dtype=np.int32)
    with emulate(check=True):
        RawKernel(code.replace("AT", ""), "f")((1,), (32,), (packed, x))
        assert packed["i"].tolist() == [2 * i + 7 for i in range(32)]
        with pytest.raises(KernelError, match=r"f.cu:6: .* writes 4 bytes .* 5 bytes past the end"):
            RawKernel(code.replace("AT", "+ 1"), "f")((1,), (32,), (packed, x))


def test_parameters_that_are_structs(cxx):
    """They are the thread's own, however they come there."""
    code = """struct Large { int4 a; double b[10]; };
    extern "C" __global__ void f(int4 a, Large b, const Large c, double* x) {
        *x = a.z + b.a.w + b.b[8] + c.b[8];
    }"""
    large = np.zeros(1, np.dtype([("a", np.int32, 4), ("b", np.float64, 10)]))
    large["a"], large["b"] = 3, 5
    a, x = np.array([1, 2, 3, 4], np.int32).view("V16")[0], np.zeros(1)
    with emulate(check=True), profile() as launches:
        RawKernel(code, "f")((1,), (1,), (a, large[0], large[0], x))
    assert x[0] == 3 + 3 + 5 + 5
    assert launches[0].read.requests == 0


def test_the_inverse_of_erfc():
    y = np.array([1e-300, 1e-10, 0.3, 1, 1.7, 2 - 1e-10, 0, 2, -1, 3])
    x = np.zeros_like(y)
    kernel("x[threadIdx.x] = erfcinv(y[threadIdx.x]);", "double* x, const double* y")((1,), (10,), (x, y))
    assert [math.erfc(value) for value in x[:6]] == pytest.approx(y[:6], rel=1e-12)
    assert x[6:8].tolist() == [math.inf, -math.inf]
    assert np.isnan(x[8:]).all()


@pytest.mark.parametrize(
    "cstdint", ["typedef long long int64_t; typedef unsigned long long uint64_t;", "#include <cstdint>\n", ""]
)
def test_a_kernel_may_define_what_nvrtc_does_not(cstdint, cxx):
    x = np.zeros(2, np.uint64)
    code = 'extern "C" __global__ void f(uint64_t* x) { x[0] = sizeof(int64_t); atomicAdd(x + 1, 5); }'
    RawKernel(cstdint + code, "f")((1,), (1,), (x,))
    assert x.tolist() == [8, 5]
