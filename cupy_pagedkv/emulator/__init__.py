"""CUDA kernels on the CPU, on NumPy arrays: run, checked for what goes wrong on a GPU only now and then, and measured.

>>> import numpy as np
>>> from cupy_pagedkv.emulator import KernelError, RawKernel, emulate, profile
>>> code = '''extern "C" __global__ void turn(const float* x, float* y) {
...     __shared__ float tile[64];
...     tile[threadIdx.x] = x[threadIdx.x];
...     y[threadIdx.x] = tile[63 - threadIdx.x];
... }'''
>>> x, y = np.arange(64, dtype=np.float32), np.empty(64, np.float32)
>>> with emulate(check=True):
...     RawKernel(code, "turn")((1,), (64,), (x, y))
Traceback (most recent call last):
...
cupy_pagedkv.emulator.KernelError: turn: turn.cu:4: thread (0, 0, 0) of block (0, 0, 0) reads 4 bytes of shared ...
>>> with profile() as launches:
...     RawKernel(code, "turn")((1,), (64,), (x, y))
>>> launches[0].read.sectors
8

:class:`RawKernel` stands in for ``cupy.RawKernel``; :func:`emulate` sets what the emulated device is, :func:`profile`
measures launches. It needs a C++17 compiler, and Linux. What a kernel sees of CUDA is in ``cuda.hpp``, what stands for
PTX instructions in ``ptx.hpp``.

``CUPY_PAGEDKV_EMULATE=check``
    Every launch is checked, as under ``emulate(check=True)``.
``CUPY_PAGEDKV_EMULATE_ORDER=forward``, ``backward`` or ``shuffled:7``
    Threads and blocks run in that order, ``7`` being a seed, as under ``emulate(order=...)``.
"""

from .compiler import CompileError
from .kernel import KernelError, RawKernel
from .profiling import LaunchProfile, profile
from .settings import emulate

__all__ = ["CompileError", "KernelError", "LaunchProfile", "RawKernel", "emulate", "profile"]

KernelError.__module__ = __name__  # where users import it from
