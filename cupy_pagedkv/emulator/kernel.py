"""``cupy.RawKernel`` for NumPy arrays."""

import ctypes
import functools
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .architectures import ARCHITECTURES
from .compiler import CompileError, compile_kernel, compile_runtime, place_of
from .profiling import Report, launches_of, profile_of
from .settings import Settings, settings

__all__ = ["KernelError", "RawKernel"]

_ORDERS = {"": 0, "forward": 1, "backward": 2, "shuffled": 3}


class KernelError(RuntimeError):
    """A launch did what a GPU would refuse, or what has no defined result. The message says which, and names the
    kernel, file and line, thread and block, address and size."""


class _Kernel(ctypes.Structure):  # emulated::Kernel of runtime.hpp
    _fields_ = (
        ("call", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("sizes", ctypes.POINTER(ctypes.c_size_t)),
        ("shared", ctypes.c_void_p),
        ("dynamic", ctypes.c_void_p),
    )


class _Region(ctypes.Structure):  # emulated::Region of worker.hpp
    _fields_ = tuple((name, ctypes.c_size_t) for name in ("begin", "end", "view_begin", "view_end"))


class _Launch(ctypes.Structure):  # emulated::Launch of worker.hpp
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_size_t),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("order", "host_threads", "checks", "profiles")),
        ("regions", ctypes.c_void_p),
        ("num_regions", ctypes.c_size_t),
        ("error", ctypes.c_char * 1024),
        ("places", ctypes.c_size_t * 2),
    )


@dataclass(frozen=True)
class _Library:
    path: Any
    kernel: _Kernel
    launch: Any


class RawKernel:
    """``cupy.RawKernel`` for NumPy arrays: the same arguments, run at once on the CPU.

    code
        The kernel's source. What there is of CUDA is in ``cuda.hpp`` beside this file.
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
        self._max_dynamic = 48 * 1024
        self._library = functools.cache(self._load)

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """How much dynamic shared memory a launch may ask for, in bytes: 48 KB unless set, and what the device has at
        most. Raises ``ValueError`` beyond that."""
        return self._max_dynamic

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        arch = settings().arch
        limit = ARCHITECTURES[arch].shared_memory_of_block
        if not 0 <= size <= limit:
            raise ValueError(f"sm_{arch} gives a thread block at most {limit} bytes of shared memory, got {size}")
        self._max_dynamic = size

    def _load(self, arch: int, instrumented: bool) -> _Library:
        # `cupy.RawKernel` compiles on the first call, too.
        path = compile_kernel(self.code, self.name, self.options, arch, instrumented)
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise CompileError(
                f"{error}\n{self.name} needs what its source declares and nothing defines; `extern __shared__` arrays "
                "are found by their text, and not behind a macro"
            ) from None
        launch = ctypes.CDLL(str(compile_runtime())).emulated_launch
        launch.restype = None
        return _Library(path, _Kernel.in_dll(library, "emulated_kernel"), launch)

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        """Run the kernel over ``grid`` blocks of ``block`` threads, each block with ``shared_mem`` bytes of
        ``extern __shared__`` memory.

        ``args`` are converted as CuPy converts them: an array is its address, strides and all else forgotten; an
        ``int`` is an int64, a ``float`` a float64, a NumPy scalar itself. Zero blocks are launched as one, which is
        what CuPy does. Raises ``TypeError`` for anything else and for an argument whose size is not its
        parameter's, ``ValueError`` for a grid, a block or shared memory that CUDA refuses, :class:`KernelError` for
        what a launch did wrong: arrays then hold whatever was written so far.
        """
        now = settings()
        launches = launches_of()
        grid3 = [max(1, n) for n in (*grid, 1, 1)[:3]]
        block3 = [max(1, n) for n in (*block, 1, 1)[:3]]
        # CUDA programming guide, "Compute Capabilities": the same limits from 5.0 on.
        if any(n > limit for n, limit in zip(grid3, (2**31 - 1, 65535, 65535), strict=True)):
            raise ValueError(f"a grid has at most (2147483647, 65535, 65535) blocks, got {tuple(grid3)}")
        if any(n > limit for n, limit in zip(block3, (1024, 1024, 64), strict=True)) or np.prod(block3) > 1024:
            raise ValueError(f"a block has at most (1024, 1024, 64) and in all 1024 threads, got {tuple(block3)}")
        if not 0 <= shared_mem <= self._max_dynamic:
            raise ValueError(
                f"{self.name} may have {self._max_dynamic} bytes of dynamic shared memory, and was to be launched with "
                f"{shared_mem}; set max_dynamic_shared_size_bytes for more than 48 KB"
            )
        values = [_value(argument) for argument in args]
        library = self._library(now.arch, now.check or launches is not None)
        self._check_sizes(library.kernel, values)

        arrays = [(i, argument) for i, argument in enumerate(args) if isinstance(argument, np.ndarray)]
        watched = now.check or launches is not None
        regions = (_Region * len(arrays))(*(_region(array) for _, array in arrays)) if watched else None
        launch = _launch(library.kernel, grid3, block3, shared_mem, now)
        launch.checks, launch.profiles = now.check, launches is not None
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        launch.arguments = ctypes.cast(addresses, ctypes.c_void_p)
        if regions is not None:
            launch.regions, launch.num_regions = ctypes.cast(regions, ctypes.c_void_p), len(regions)
        report = Report()
        library.launch(ctypes.byref(launch), ctypes.byref(report))
        if launch.error:
            places = (place_of(library.path, place) if place else "an unknown place" for place in launch.places)
            text = launch.error.decode()
            for i, place in enumerate(places):
                text = text.replace(f"{{{i}}}", place)
            raise KernelError(f"{self.name}: {text}")
        if launches is not None:
            arguments = [i for i, _ in arrays]
            launches.append(profile_of(self, grid3, block3, shared_mem, library.path, report, arguments))

    def _check_sizes(self, kernel: _Kernel, values: list[npt.NDArray[Any]]) -> None:
        if len(values) != kernel.count:
            raise TypeError(f"{self.name}: the kernel takes {kernel.count} arguments and got {len(values)}")
        for i, value in enumerate(values):
            if value.nbytes != kernel.sizes[i]:
                raise TypeError(
                    f"{self.name}: argument {i} has {value.nbytes} bytes, but its parameter takes {kernel.sizes[i]}"
                )


def _launch(kernel: _Kernel, grid: list[int], block: list[int], shared_mem: int, now: Settings) -> _Launch:
    order, _, seed = now.order.partition(":")
    launch = _Launch(
        kernel=ctypes.cast(ctypes.pointer(kernel), ctypes.c_void_p),
        shared_bytes=shared_mem,
        seed=int(seed or 0),
        order=_ORDERS[order],
        host_threads=len(os.sched_getaffinity(0)),
    )
    launch.grid[:] = grid
    launch.block[:] = block
    return launch


def _value(argument: Any) -> npt.NDArray[Any]:
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


def _region(array: npt.NDArray[Any]) -> _Region:
    """The memory of the array, and of the array whose memory it shares."""
    whole, base = array, array.base
    while base is not None:  # as_strided puts something else between
        whole = base if isinstance(base, np.ndarray) else whole
        base = getattr(base, "base", None)
    return _Region(*np.lib.array_utils.byte_bounds(whole), *np.lib.array_utils.byte_bounds(array))
