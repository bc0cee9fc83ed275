"""Kernels compiled for the host, kept by content; and which line of a kernel an address in it belongs to."""

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["CompileError", "compile_kernel", "compile_runtime", "place_of"]

_FOLDER = Path(__file__).parent
_RUNTIME = ("runtime.cpp", "signals.cpp", "checks.cpp", "profile.cpp")
_RUNTIME_HEADERS = ("runtime.hpp", "worker.hpp", "checks.hpp", "profile.hpp")
_KERNEL_HEADERS = ("cuda.hpp", "ptx.hpp", "runtime.hpp")
_CHECKED = ("-fsanitize=thread", "-DEMULATED_CHECKED")  # at compile time only: what it calls stands in checks.cpp
# Or a 16-byte access would be taken apart into those of its members. Clang does that at every level but 0; and atomics,
# which report themselves, it would instrument even where it was told not to.
_WHOLE_ACCESSES = {"gcc": ("-fno-tree-sra",), "clang": ("-O0", "-mllvm", "-tsan-instrument-atomics=0")}
_OURS = "<emulator>"  # what the debugger is told for this folder, since another checkout may have compiled what is kept
_DYNAMIC_SHARED = re.compile(r"\bextern\b(?=[^;{}]*\b__shared__\b)[^;{}]*?\b(\w+)\s*\[\s*\]\s*;")
_OF_C = re.compile(r'\bextern\s+"C"(?!\s*\{)')


class CompileError(RuntimeError):
    """The host compiler refused a kernel, or there is no compiler. The message holds the compiler's own lines."""


@functools.cache
def _compiler(cxx: str | None, path: str | None) -> tuple[tuple[str, ...], str]:
    """The command of the C++ compiler and what it says of its version."""
    candidates = [cxx] if cxx and cxx.strip() else ["c++", "g++", "clang++"]
    for candidate in candidates:
        program, *flags = shlex.split(candidate)
        if found := shutil.which(program, path=path):
            version = subprocess.run([found, *flags, "--version"], capture_output=True, text=True, check=False)
            return (found, *flags), version.stdout
    raise CompileError(
        f"the emulated device needs a C++ compiler, and none of {candidates} is on the PATH; "
        "install one (Debian: apt install g++) or name it in the environment variable CXX"
    )


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cupy_pagedkv"


def _own_flags() -> list[str]:
    return shlex.split(os.environ.get("CXXFLAGS", ""))


@functools.cache
def _text(names: tuple[str, ...]) -> str:
    return "\0".join((_FOLDER / name).read_text() for name in names)


def _build(name: str, ingredients: list[str], steps: list[list[str]], source: str | None) -> Path:
    """The library that ``steps`` of the compiler make, where ``{out}`` is its path and ``{folder}`` one to work in,
    unless the cache folder has that of the same ``ingredients`` and compiler."""
    command, version = _compiler(os.environ.get("CXX"), os.environ.get("PATH"))
    key = "\0".join([*command, version, *ingredients])
    library = _cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    # Compiled beside its place and moved there whole, so that two processes can do it at once.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        for step in steps:
            arguments = [argument.replace("{out}", str(built)).replace("{folder}", folder) for argument in step]
            run = subprocess.run(
                [*command, *arguments], input=source, capture_output=True, text=True, check=False, cwd=folder
            )
            if run.returncode:
                advice = _advice(name, run.stderr, source)
                raise CompileError(f"{command[0]} could not compile the kernel {name}:\n{run.stderr}{advice}")
        built.replace(library)
    return library


def compile_runtime() -> Path:
    """The library that runs kernels, compiled with ``CXXFLAGS``."""
    sources = [str(_FOLDER / name) for name in _RUNTIME]
    flags = ["-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-pthread", *_own_flags()]
    return _build(
        "runtime", [*flags, _text(_RUNTIME), _text(_RUNTIME_HEADERS)], [[*flags, *sources, "-o", "{out}"]], None
    )


def compile_kernel(code: str, name: str, options: tuple[str, ...], arch: int, instrumented: bool) -> Path:
    """The library of the kernel ``name`` of ``code``. ``instrumented``: each of its accesses is seen."""
    runtime = compile_runtime()
    flags = ["-std=c++17", "-O1", "-g1", "-gdwarf-4", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden"]
    flags += [f"-D__CUDA_ARCH__={arch}0", *options, *_own_flags()]
    flags += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    clang = "clang" in _compiler(os.environ.get("CXX"), os.environ.get("PATH"))[1]
    if not clang:
        flags.append("-fno-extern-tls-init")  # GCC would call a function that begins `extern __shared__`: there is none
    if instrumented:
        flags += [*_CHECKED, *_WHOLE_ACCESSES["clang" if clang else "gcc"]]
    dynamic = sorted(set(_DYNAMIC_SHARED.findall(code)))
    launcher = [f"EMULATED_KERNEL({name}, {'emulated_dynamic' if dynamic else 'emulated_no_dynamic'})"]
    if dynamic:
        launcher = ["EMULATED_DYNAMIC_SHARED", *(f"EMULATED_DYNAMIC_NAME({array})" for array in dynamic), *launcher]
    # Clang refuses `extern __shared__` arrays of one name in functions of C and of C++.
    code = _OF_C.sub(lambda of_c: " " * len(of_c[0]), code)
    source = "\n".join([f'#line 1 "{name}.cu"', code, f'#line 1 "launcher of {name}"', *launcher])
    compile_step = [
        *flags,
        f"-fdebug-prefix-map={_FOLDER}={_OURS}",
        "-fdebug-prefix-map={folder}=.",
        "-include",
        str(_FOLDER / "cuda.hpp"),
    ]
    return _build(
        name,
        [*flags, _OURS, str(runtime), _text(_KERNEL_HEADERS), source],
        [
            # Two steps, since -fsanitize would link libraries whose work is done here.
            [*compile_step, "-x", "c++", "-c", "-", "-o", "{folder}/compiled.o"],
            [*_own_flags(), "-shared", "{folder}/compiled.o", str(runtime), "-o", "{out}"],
        ],
        source,
    )


_UNKNOWN = (
    r"[‘'`](\w+)['’] was not declared in this scope",
    r"use of undeclared identifier '(\w+)'",
    r"[‘'](\w+)['’] does not name a type",
    r"unknown type name '(\w+)'",
    r"[‘'](\w+)['’] has not been declared",
    r"[‘'](\w+)['’] is not a namespace-name",
)


def _advice(name: str, errors: str, source: str | None) -> str:
    """What to do about CUDA that the emulated device does not have, or a kernel that is not there."""
    first = re.search(r"^(.*): error: ", errors, re.MULTILINE)
    if first and first[1].startswith("launcher of"):
        return f'\nThere is no kernel `{name}` in this source: one function extern "C" __global__ void {name}(...).'
    if header := re.search(r"fatal error: ['\"]?([\w/.]+)['\"]?(: No such file| file not found)", errors):
        return (
            f"\nNo header of CUDA's is here, {header[1]} neither. If few of its names are used, give them a place in "
            f"{_FOLDER / 'cuda.hpp'}."
        )
    if any(sign in errors for sign in ("Assembler messages", "<inline asm>", "in 'asm'", "in ‘asm’", "in asm")):
        return (
            "\nInline PTX does not run on a host. kernels/ptx.cuh has functions for instructions, whose twins stand in "
            f"{_FOLDER / 'ptx.hpp'}."
        )
    unknown = sorted({name for pattern in _UNKNOWN for name in re.findall(pattern, errors)})
    if not unknown:
        return "\nNo kernel is launched by a kernel here: no dynamic parallelism." if "<<<" in (source or "") else ""
    return (
        f"\nThe emulated device does not know {', '.join(unknown)}. If that is CUDA's, its place is "
        f"{_FOLDER / 'cuda.hpp'}."
    )


@functools.cache
def place_of(library: Path, offset: int) -> str:
    """``file:line`` of the kernel's source for what was compiled to ``offset``, an address that a call returns to."""
    program = shutil.which("addr2line")
    if program is not None:
        run = subprocess.run(
            [program, "-i", "-e", str(library), hex(offset - 1)], capture_output=True, text=True, check=False
        )
        for line in run.stdout.splitlines():  # the innermost of inlined functions first
            place = line.partition(" (discriminator")[0].removeprefix("./")
            if not place.startswith((_OURS, "??", "<stdin>")):
                return re.sub(r"^.*?/?(kernels/|[^/]*$)", r"\1", place)
    return f"{library.name}+{offset:#x}"
