"""What NVIDIA's compiler makes of a kernel, for any architecture, with no GPU and no driver.

Needs the extra ``bench``: NVRTC, ``cuda.core`` to call it, and ``nvdisasm`` to read what comes out.
"""

import io
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "CompilerReport", "compile_kernel", "report_on"]

ARCHITECTURES = (75, 80, 90, 100, 120)
"""Turing, Ampere, Hopper and the two Blackwells: an oldest, and one of each generation since."""


@dataclass(frozen=True)
class CompilerReport:
    """Of one kernel for one architecture."""

    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread's stack frame."""
    spills: int
    """Bytes of spill stores and spill loads."""
    loads: dict[int, int]
    """How many instructions load from global memory, by their width in bits."""
    stores: dict[int, int]

    def __str__(self) -> str:
        def widths(counts: dict[int, int]) -> str:
            return " ".join(f"{count}x{width}" for width, count in sorted(counts.items(), reverse=True)) or "none"

        return (
            f"{self.registers:>3} registers, {self.stack} B stack, {self.spills} B spilled, "
            f"loads {widths(self.loads)}, stores {widths(self.stores)}"
        )


def compile_kernel(code: str, arch: int) -> tuple[bytes, str]:
    """The machine code (a cubin) of ``code`` for ``sm_<arch>``, and what ``ptxas -v`` said of it.

    Raises NVRTC's error, whose text names the lines, where ``code`` is wrong, ``RuntimeError`` without NVRTC.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise RuntimeError(f"NVRTC is called through cuda.core ({error}); pip install 'cupy_pagedkv[bench]'") from None
    log = io.StringIO()
    options = ProgramOptions(arch=f"sm_{arch}", std="c++17", ptxas_options=["-v"])
    program = Program(code, "c++", options)
    cubin = program.compile("cubin", logs=log).code
    return bytes(cubin), log.getvalue()


def report_on(code: str, arch: int) -> CompilerReport:
    """Compile ``code``, which holds one kernel, for ``sm_<arch>`` and read the result; raises as
    :func:`compile_kernel` does, and ``RuntimeError`` without ``nvdisasm``."""
    cubin, log = compile_kernel(code, arch)
    [registers] = re.findall(r"Used (\d+) registers", log)
    [numbers] = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    stack, *spills = map(int, numbers)
    widths: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    for instruction, modifiers in re.findall(r"\b(LDG|STG)(\S*)", _disassemble(cubin)):
        width = re.search(r"\.[US]?(8|16|64|128)(?!\d)", modifiers)
        widths[instruction][int(width[1]) if width else 32] += 1
    return CompilerReport(int(registers), stack, sum(spills), dict(widths["LDG"]), dict(widths["STG"]))


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
