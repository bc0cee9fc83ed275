"""Every kernel, in each specialisation that the other tests used, compiled by NVRTC, with no driver and no spills.

This file runs last. On its own it compiles the shapes of common models.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import conftest
import ml_dtypes
import numpy as np
import pytest

import cupy_pagedkv.devices.backend as backend
from benchmarks import kernels
from cupy_pagedkv import PagedKVCache, merge_attention_states, paged_attention
from cupy_pagedkv.devices.cuda_attention import shape_of
from cupy_pagedkv.devices.sources import source_of
from cupy_pagedkv.emulator import architectures as emulator_architectures
from cupy_pagedkv.emulator.nvrtc import ARCHITECTURES, _disassemble, compile_kernel, report_on

core = pytest.importorskip("cuda.core", reason="cuda.core is not installed, which NVRTC is called through")

KERNELS = {path.stem for path in (Path(__file__).parent.parent / "kernels").glob("*.cu")}
COMMON = [(8, 128, 128), (1, 576, 512), (32, 128, 128), (8, 64, 64), (8, 46, 46)]
ATTENDED = [(np.float16, 128, 128), (ml_dtypes.bfloat16, 128, 128), (np.float32, 128, 128), (np.float16, 64, 64),
            (np.float16, 256, 256), (np.float16, 192, 128), (np.float16, 576, 512), (np.float16, 67, 67),
            (np.float16, 144, 144), (np.float16, 176, 96)]  # fmt: skip
INT = (("TABLE_T", "int"), ("LENS_T", "int"), ("CU_T", "int"))


@pytest.fixture(scope="module")
def specialisations() -> set[tuple[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "EMULATE", True)
        for heads, dim, v_dim in COMMON:
            cache = PagedKVCache(4, 16, heads, dim, ml_dtypes.bfloat16, "cpu", v_head_dim=v_dim)
            key, value = (np.zeros((3, heads, d), ml_dtypes.bfloat16) for d in (dim, v_dim))
            cache.update(key, value, [0, 1, 2])
            cache.gather([[0]], [3])
            cache.copy_blocks([0], [1])
        for dtype, dim, v_dim in ATTENDED:
            for new in (1, 40):
                query, k_cache = np.zeros((new, 4, dim), dtype), np.zeros((80, 8, 1, dim), dtype)
                v_cache = k_cache[..., :v_dim] if dim == 576 else np.zeros((80, 8, 1, v_dim), dtype)
                out, lse = paged_attention(
                    query, k_cache, v_cache, np.zeros((1, 80), int), [0], [0, new], return_lse=True
                )
                merge_attention_states(out, lse, out, lse)
    assert {name for name, _ in conftest.specialisations} == KERNELS
    return conftest.specialisations


def attention_sources(arch: int) -> set[str]:
    """The kernel of attention as each architecture would get it: it depends on that what a thread block is made for.
    Of specialisations that differ in the group, the block size or the types of indices, which change little, one."""
    found = {}
    room = emulator_architectures.ARCHITECTURES[arch].shared_memory_of_block
    for arguments in sorted(conftest.attention_shapes, key=str):
        try:
            defines = shape_of(*arguments, arch, room).defines
        except ValueError:  # more shared memory than it has
            continue
        found[tuple(define for define in defines if define[0] not in ("GROUP", "BLOCK_SIZE"))] = defines
    return {source_of("paged_attention", defines + INT) for defines in found.values()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_specialisation_compiles_without_spills(specialisations, arch):
    sources = attention_sources(arch) | {
        source_of(name, defines) for name, defines in specialisations if name != "paged_attention"
    }
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda code: compile_kernel(code, arch)[1], sources))
    for code, resources in zip(sources, results, strict=True):
        if resources.stack or resources.spills:
            pytest.fail(f"on sm_{arch}: {resources}\n{code[: code.index('#line')]}", pytrace=False)


@pytest.mark.parametrize("arch", [75, 80, 100])
def test_no_rounding_of_attention_is_left_to_the_compiler(specialisations, arch):
    """Where it may contract a * b + c, nothing changes: else a token's bits could differ between kernels."""
    kinds = {}
    for source in sorted(attention_sources(arch)):
        kinds["TENSOR 1" in source, "SOFTCAP 1" in source] = source
    for name, defines in specialisations:
        if name in ("merge_splits", "merge_attention_states"):
            kinds[name] = source_of(name, defines)
    for source in kinds.values():
        contracted, plain = (
            core.Program(source, "c++", core.ProgramOptions(arch=f"sm_{arch}", std="c++17", ftz=True, fma=fma))
            .compile("cubin")
            .code
            for fma in (True, False)
        )
        assert _disassemble(bytes(contracted)) == _disassemble(bytes(plain)), source[: source.index("#line")]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_scatter_asks_for_a_row_before_it_knows_where_to(arch):
    """NVIDIA's compiler puts off what only one side of a branch needs."""
    of_shape = kernels.specialisations("reshape_and_cache", [(8, 128, "float16")])
    [defines] = of_shape.values()
    code = _disassemble(compile_kernel(source_of("reshape_and_cache", defines), arch)[0])
    steps = ["row" if "128" in step else step[:3] for step in re.findall(r"LDG\.E\S*|STG|EXIT", code)]
    for half in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):  # of K and of V
        slot = half.index("LDG")
        assert half[slot : half.index("EXI", slot)] == ["LDG", "row", "row", "row", "row"]


def test_a_spill_would_show():
    """64 values that have to be kept at once, in the 32 registers that two blocks of 1024 threads leave."""
    loops = "for (int i = 0; i < 64; ++i) a[i] = x[i]; for (int i = 0; i < 64; ++i) x[i] = a[63 - i];"
    code = f'extern "C" __global__ void __launch_bounds__(1024, 2) f(volatile int* x) {{ int a[64]; {loops} }}'
    _, resources = compile_kernel(code, 80)
    assert resources.stack
    assert resources.spills > 64  # stores and loads


def test_signed_bytes_are_bytes():
    report = report_on('extern "C" __global__ void f(int* a, signed char* b) { a[threadIdx.x] = b[threadIdx.x]; }', 90)
    assert (report.loads, report.stores) == ({8: 1}, {32: 1})


def test_nvrtc_names_the_line_in_the_cu_file():
    code = source_of("gather_cache", (("BLOCK_SIZE", 16),))
    with pytest.raises(Exception, match=r'kernels/gather_cache\.cu\(\d+\): error: identifier "STARTS_T" is undefined'):
        compile_kernel(code, 80)


@pytest.mark.parametrize(
    ("type_", "bits"), [("unsigned char", 8), ("short", 16), ("int", 32), ("uint2", 64), ("uint4", 128)]
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_width_of_accesses_is_read_from_the_machine_code(arch, type_, bits):
    code = f'extern "C" __global__ void f({type_}* a) {{ a[threadIdx.x] = a[threadIdx.x + 1]; }}'
    report = report_on(code, arch)
    assert (report.loads, report.stores) == ({bits: 1}, {bits: 1})
    assert f"loads 1 x {bits} bits; stores 1 x {bits} bits" in str(report)
