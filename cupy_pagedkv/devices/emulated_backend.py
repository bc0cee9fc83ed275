"""The emulated device: the kernels in ``kernels/`` compiled for the host and run on NumPy arrays.

:class:`EmulatedBackend` is the CUDA backend with NumPy and :class:`cupy_pagedkv.emulator.RawKernel` in CuPy's place, so
that the sources and the launch code that run here are those that run on a GPU.
"""

from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter

import numpy as np

from ..emulator import RawKernel
from ..emulator.architectures import ARCHITECTURES
from ..emulator.settings import settings
from .cuda_backend import CudaBackend
from .numpy_backend import HostArrays
from .sources import source_of

__all__ = ["EmulatedBackend"]


class EmulatedBackend(HostArrays, CudaBackend):
    """The CUDA backend on NumPy arrays."""

    name = "emulated"
    _address = staticmethod(attrgetter("ctypes.data"))
    _device = staticmethod(lambda array: "cpu")

    def __init__(self) -> None:
        super().__init__(np)
        self._architecture = self._read_architecture  # which can change

    def _build_kernel(self, name: str, defines: tuple[tuple[str, str | int], ...]) -> RawKernel:
        return RawKernel(source_of(name, defines), name)

    def _count_processors(self, device: str) -> int:
        return 4  # so that small launches use thread blocks of each size

    def _read_architecture(self, device: str) -> tuple[int, int]:
        arch = settings().arch
        return arch, ARCHITECTURES[arch].shared_memory_of_block

    def on(self, number: str) -> AbstractContextManager[None]:
        return nullcontext()
