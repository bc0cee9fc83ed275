"""What a compiler gets of a kernel: its parameters, and what it includes."""

import re
from pathlib import Path

import numpy as np
import pytest

import cupy_pagedkv.devices.sources as sources
from cupy_pagedkv.devices.sources import source_of
from cupy_pagedkv.emulator import CompileError, RawKernel


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_folder", lambda: tmp_path)

    def write(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text)

    return write


def test_an_include_is_put_in_once_where_it_stands_first(kernels):
    kernels(
        f__cu='#include "b.cuh"\n  # include  "a.cuh" \nint f;\n// #include "no.cuh"\n',
        a__cuh='int a;\n#include "b.cuh"',
        b__cuh='#include "a.cuh"\nint b;\n',
    )
    assert source_of("f", (("N", 3), ("T", "int"))).splitlines() == [
        "#define N 3",
        "#define T int",
        '#line 1 "kernels/f.cu"',
        '#line 1 "kernels/b.cuh"',
        '#line 1 "kernels/a.cuh"',
        "int a;",
        '#line 3 "kernels/a.cuh"',
        '#line 2 "kernels/b.cuh"',
        "int b;",
        '#line 2 "kernels/f.cu"',
        '#line 3 "kernels/f.cu"',
        "int f;",
        '// #include "no.cuh"',
    ]


def test_an_include_that_is_not_there(kernels):
    kernels(f__cu='\n#include "a.cuh"\n', a__cuh='\n\n#include "no.cuh"\n')
    with pytest.raises(FileNotFoundError, match=re.escape("kernels/a.cuh:3: there is no kernels/no.cuh to #include")):
        source_of("f", ())


@pytest.mark.parametrize(
    ("file", "line", "files"),
    [
        ("f.cu", 3, {"f__cu": '#include "a.cuh"\n\nwrong;\nextern "C" __global__ void f(int* x) {}'}),
        ("a.cuh", 2, {"f__cu": '#include "a.cuh"\nextern "C" __global__ void f(int* x) {}', "a__cuh": "\nwrong;"}),
    ],
)
def test_a_compiler_names_file_and_line(kernels, file, line, files):
    kernels(**{"a__cuh": "int a;", **files})
    with pytest.raises(CompileError, match=rf"kernels/{file}:{line}:"):
        RawKernel(source_of("f", ()), "f")((1,), (1,), (np.zeros(1, np.int32),))


def test_an_edit_of_an_included_file_is_compiled(kernels):
    for value in (1, 2):
        kernels(
            f__cu='#include "a.cuh"\nextern "C" __global__ void f(int* x) { *x = VALUE; }',
            a__cuh=f"constexpr int VALUE = {value};",
        )
        x = np.zeros(1, np.int32)
        RawKernel(source_of("f", ()), "f")((1,), (1,), (x,))
        assert x[0] == value


def test_kernels_share_what_moves_rows_and_what_unites_sums():
    folder = Path(__file__).parent.parent / "kernels"
    for path in folder.glob("*.cu"):
        source = source_of(path.stem, ())
        moves = path.stem in ("reshape_and_cache", "gather_cache", "copy_blocks")
        shared = "rows.cuh" if moves else "attention.cuh"
        assert source.count(f'#line 1 "kernels/{shared}"') == 1
        assert '#include "' not in source
