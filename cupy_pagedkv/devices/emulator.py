"""The emulated device: the kernels in ``kernels/`` compiled for the host and run on NumPy arrays.

>>> import numpy as np
>>> from cupy_pagedkv.devices.emulator import RawKernel
>>> double = RawKernel('extern "C" __global__ void f(int* x) { x[threadIdx.x] *= 2; }', "f")
>>> x = np.arange(4, dtype=np.int32)
>>> double((1,), (4,), (x,))
>>> x
array([0, 2, 4, 6], dtype=int32)

:class:`RawKernel` stands in for ``cupy.RawKernel``, and :class:`EmulatedBackend` is the CUDA backend with NumPy and
that class in CuPy's place, so that the sources and the launch code that run here are those that run on a GPU. It needs
a C++17 compiler for the first run of each kernel; ``emulator.hpp`` is what the kernel sees of CUDA.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from .cuda_backend import CudaBackend
from .numpy_backend import HostArrays
from .sources import source_of

__all__ = ["CompileError", "EmulatedBackend", "RawKernel"]

_SHIM = Path(__file__).with_name("emulator.hpp")
_COLLECTIVES = ("__sync", "__shfl", "__ballot_sync", "__any_sync", "__all_sync")


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


def _compile(code: str, name: str, options: tuple[str, ...]) -> Path:
    """Compile ``code``, unless the cache folder holds the result of the same text, flags and compiler."""
    command, version = _compiler(os.environ.get("CXX"), os.environ.get("PATH"))
    own_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", *options, *own_flags]
    flags += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    if any(collective in code for collective in _COLLECTIVES):
        flags.append("-DEMULATED_FIBERS")
    source = f'{code}\n#line 1 "launcher of {name}"\nEMULATED_KERNEL({name})\n'
    key = "\0".join([*command, version, *flags, _SHIM.read_text(), source])
    library = _cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Compiled beside its place and moved there whole, so that two processes can do it at once.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built, compiled = Path(folder) / library.name, Path(folder) / "compiled.o"
            # Two steps, since -fsanitize would link a library whose work emulator.hpp does.
            for step in (
                [*flags, "-include", str(_SHIM), "-x", "c++", "-c", "-", "-o", str(compiled)],
                [*own_flags, "-shared", str(compiled), "-o", str(built)],
            ):
                run = subprocess.run([*command, *step], input=source, capture_output=True, text=True, check=False)
                if run.returncode:
                    raise CompileError(f"{command[0]} could not compile the kernel {name}:\n{run.stderr}")
            built.replace(library)
    return library


class RawKernel:
    """``cupy.RawKernel`` for NumPy arrays: the same arguments, run at once on the CPU.

    code
        The kernel's source. Only what ``emulator.hpp`` defines of CUDA is there.
    name
        Of the ``extern "C" __global__`` function.
    options
        Flags for the compiler; those that NVRTC and host compilers share, such as ``-DNAME=1``, work on both.

    ``CXX`` names the compiler, ``CXXFLAGS`` adds flags. Compiled kernels are kept in ``$XDG_CACHE_HOME/cupy_pagedkv``
    (``~/.cache/cupy_pagedkv``) under a hash of all that went into them. Raises :class:`CompileError`.
    """

    def __init__(self, code: str, name: str, options: tuple[str, ...] = ()) -> None:
        self.code = code
        self.name = name
        self.options = options

    @functools.cached_property
    def _launch(self) -> Callable[..., bytes | None]:
        # `cupy.RawKernel` compiles on the first call, too.
        function = ctypes.CDLL(str(_compile(self.code, self.name, self.options))).emulated_launch
        function.restype = ctypes.c_char_p
        return function

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Run the kernel over ``grid`` blocks of ``block`` threads.

        ``args`` are converted as CuPy converts them: an array is its address, strides and all else forgotten; an
        ``int`` is an int64, a ``float`` a float64, a NumPy scalar itself. Zero blocks are launched as one, which is
        what CuPy does. Raises ``TypeError`` for anything else and for an argument whose size is not its
        parameter's, ``ValueError`` for a grid or block that CUDA refuses, ``RuntimeError`` for a kernel that is stuck.
        """
        grid3 = [max(1, n) for n in (*grid, 1, 1)[:3]]
        block3 = [max(1, n) for n in (*block, 1, 1)[:3]]
        # CUDA programming guide, "Compute Capabilities": the same limits from 5.0 on.
        if any(n > limit for n, limit in zip(grid3, (2**31 - 1, 65535, 65535), strict=True)):
            raise ValueError(f"a grid has at most (2147483647, 65535, 65535) blocks, got {tuple(grid3)}")
        if any(n > limit for n, limit in zip(block3, (1024, 1024, 64), strict=True)) or np.prod(block3) > 1024:
            raise ValueError(f"a block has at most (1024, 1024, 64) and in all 1024 threads, got {tuple(block3)}")

        values = [_value(argument) for argument in args]
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        sizes = (ctypes.c_size_t * len(values))(*(value.nbytes for value in values))
        failure = self._launch(
            (ctypes.c_uint * 3)(*grid3), (ctypes.c_uint * 3)(*block3), addresses, sizes, ctypes.c_size_t(len(values))
        )
        if failure is not None:
            kind = TypeError if failure.startswith((b"argument", b"the kernel takes")) else RuntimeError
            raise kind(f"{self.name}: {failure.decode()}")


def _value(argument: Any) -> np.ndarray:
    """One kernel argument as an array of no axes that holds its bytes."""
    if isinstance(argument, np.ndarray):
        return np.array(argument.ctypes.data, np.uintp)
    if isinstance(argument, np.generic):
        return np.array(argument)
    if isinstance(argument, int):
        return np.array(argument, np.int64)
    if isinstance(argument, float):
        return np.array(argument, np.float64)
    raise TypeError(f"a kernel takes arrays, numbers and NumPy scalars, got {type(argument).__name__}")


class EmulatedBackend(HostArrays, CudaBackend):
    """The CUDA backend on NumPy arrays, with :class:`RawKernel` of this module for CuPy's."""

    name = "emulated"

    def __init__(self) -> None:
        super().__init__(np)

    def _build_kernel(self, name: str, defines: tuple[tuple[str, str | int], ...]) -> RawKernel:
        return RawKernel(source_of(name, defines), name)

    def _count_processors(self, device: str) -> int:
        return 4  # so that small launches use thread blocks of each size

    def _device(self, array: np.ndarray) -> str:
        return "cpu"

    def _address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def on(self, device: str) -> AbstractContextManager[None]:
        return nullcontext()
