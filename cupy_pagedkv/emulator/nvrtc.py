"""What NVIDIA's compiler makes of a kernel, for any architecture, with no GPU and no driver.

>>> from cupy_pagedkv.emulator.nvrtc import report_on
>>> print(report_on('extern "C" __global__ void f(uint4* a) { a[threadIdx.x] = a[threadIdx.x + 1]; }', arch=90))
 10 registers, 0 B stack, 0 B spilled; loads 1 x 128 bits; stores 1 x 128 bits

Needs the extra ``bench``: NVRTC, ``cuda.core`` to call it, and ``nvdisasm`` to read what comes out.
"""

import io
import re
import subprocess
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["ARCHITECTURES", "CompilerReport", "Resources", "compile_kernel", "report_on"]

ARCHITECTURES = (75, 80, 90, 100, 120)
"""One of each generation from Turing on: compute capability 7.5 is the oldest that CUDA 13 compiles for."""


_importing = threading.Lock()  # a second thread would find `cuda.core` half imported


class Resources(NamedTuple):
    """What a thread of a kernel takes."""

    registers: int
    stack: int
    """Bytes of stack frame."""
    spills: int
    """Bytes of spill stores and of spill loads."""
    shared_memory: int
    """Bytes of a block, without dynamic ones."""


@dataclass(frozen=True)
class CompilerReport:
    """Of one kernel for one architecture."""

    resources: Resources
    loads: dict[int, int]
    """How many instructions load from global memory, by their width in bits."""
    stores: dict[int, int]

    def __str__(self) -> str:
        def widths(counts: dict[int, int]) -> str:
            return ", ".join(f"{count} x {width}" for width, count in sorted(counts.items(), reverse=True)) or "0 x 0"

        registers, stack, spills, _ = self.resources
        return (
            f"{registers:>3} registers, {stack} B stack, {spills} B spilled; "
            f"loads {widths(self.loads)} bits; stores {widths(self.stores)} bits"
        )


def compile_kernel(code: str, arch: int) -> tuple[bytes, Resources]:
    """The machine code (a cubin) of ``code``, which holds one kernel, for ``sm_<arch>``, and what it takes, by the
    option that CuPy adds to all others: floats too small to be normal count as 0.

    Raises NVRTC's error, whose text names the lines, where ``code`` is wrong, ``RuntimeError`` without NVRTC.
    """
    try:
        with _importing:
            from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise RuntimeError(f"NVRTC is called through cuda.core ({error}); pip install 'cupy_pagedkv[bench]'") from None
    log = io.StringIO()
    options = ProgramOptions(arch=f"sm_{arch}", std="c++17", ftz=True, ptxas_options=["-v"])
    cubin = Program(code, "c++", options).compile("cubin", logs=log).code
    [registers] = re.findall(r"Used (\d+) registers", log.getvalue())
    [(stack, stores, loads)] = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue()
    )
    shared_memory = re.search(r"(\d+) bytes smem", log.getvalue())
    return bytes(cubin), Resources(
        int(registers), int(stack), int(stores) + int(loads), int(shared_memory[1]) if shared_memory else 0
    )


def report_on(code: str, arch: int) -> CompilerReport:
    """Compile ``code`` for ``sm_<arch>`` and read the machine code. Raises as :func:`compile_kernel` does, and
    ``RuntimeError`` without ``nvdisasm``."""
    cubin, resources = compile_kernel(code, arch)
    widths: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    for instruction, modifiers in re.findall(r"\b(LDG|STG)(?=[.\s])(\S*)", _disassemble(cubin)):
        width = re.search(r"\.[US]?(8|16|64|128|256)(?!\d)", modifiers)
        widths[instruction][int(width[1]) if width else 32] += 1
    return CompilerReport(resources, dict(widths["LDG"]), dict(widths["STG"]))


def _disassemble(cubin: bytes) -> str:
    try:
        from cuda.pathfinder import find_nvidia_binary_utility

        program = find_nvidia_binary_utility("nvdisasm")
    except ImportError:
        program = None
    if program is None:
        raise RuntimeError("nvdisasm, which reads machine code, is not here; pip install 'cupy_pagedkv[bench]'")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([program, "-c", file.name], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"nvdisasm failed: {run.stderr.strip()}")
    return run.stdout
