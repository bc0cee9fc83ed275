"""The emulated device: what it does like a GPU, and what it says when something is wrong."""

import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest

import cupy_pagedkv.emulator.compiler as compiler
from cupy_pagedkv.devices.sources import source_of
from cupy_pagedkv.emulator import CompileError, RawKernel


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


def test_threads_that_returned_or_never_were_count_as_arrived():
    """As on a GPU since Volta (CUDA programming guide, "Synchronization Functions")."""
    body = "int i = threadIdx.x; if (i % 3) return; __syncthreads(); x[i] = -1; __syncthreads();"
    assert run(body, 40)[:6].tolist() == [-1, 1, 2, -1, 4, 5]
    assert run("x[threadIdx.x] = __popc(__ballot_sync(0xffffffffu, 1));", 16)[:16].tolist() == [16] * 16
    twice = "__ballot_sync(0xffffffffu, 1); __ballot_sync(0xffffffffu, 1);"  # votes that must not be counted later
    body = (
        f"int i = threadIdx.x; {twice} if (i < 5) return; __syncwarp(); x[i] = __popc(__ballot_sync(0xffffffffu, 1));"
    )
    assert run(body, 32)[:32].tolist() == [0, 1, 2, 3, 4] + [27] * 27


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
