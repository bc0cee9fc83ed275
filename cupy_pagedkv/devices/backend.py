"""The one place where a device is chosen: by name for new arrays, by the arrays for an operation.

Environment, read when the package is imported:

``CUPY_PAGEDKV_EMULATE=1``
    NumPy arrays are worked on by the CUDA kernels, compiled for the host, instead of by NumPy. ``check`` is the same
    with every access checked (:mod:`cupy_pagedkv.emulator`).
``CUPY_PAGEDKV_DEBUG=1``
    Indices are checked on every device, and duplicate slots refused, at the price of waiting for a GPU's stream.
"""

import functools
import os
from typing import Any, TypeAlias

import numpy as np

from .cuda_backend import CudaBackend
from .dlpack import cupy_array
from .numpy_backend import NumpyBackend

__all__ = ["Backend", "backend_of", "backend_on"]

Backend: TypeAlias = NumpyBackend | CudaBackend


def _switch(name: str, *on: str) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", *on):
        raise ValueError(f"the environment variable {name} must be {', '.join(on)} or 0, got {value!r}")
    return value in on


EMULATE = _switch("CUPY_PAGEDKV_EMULATE", "1", "check")
DEBUG = _switch("CUPY_PAGEDKV_DEBUG", "1")

_numpy = NumpyBackend()


@functools.cache
def _cuda() -> CudaBackend:
    import cupy

    return CudaBackend(cupy)


@functools.cache
def _emulated() -> CudaBackend:
    from .emulated_backend import EmulatedBackend

    return EmulatedBackend()


def _host() -> Backend:
    return _emulated() if EMULATE else _numpy


def backend_of(names: tuple[str, ...], *arrays: Any) -> Backend:
    """The backend that works where all of ``arrays`` are; ``names`` are what an error calls them.

    Raises ``TypeError`` for something that is no NumPy or CuPy array, for a masked array and for a mixture of both,
    ``ValueError`` for arrays on two GPUs.
    """
    for array in arrays:
        if type(array) is not np.ndarray:
            break
    else:
        return _host()
    of_cupy = cupy_array()
    for array in arrays:
        if not isinstance(array, of_cupy):
            _check_subclasses(names, arrays)
            return _host()
    device = arrays[0].data.device_id
    for array in arrays:
        if array.data.device_id != device:
            places = (f"{name} on {a.device}" for name, a in zip(names, arrays, strict=True))
            raise ValueError(f"all arrays of a call must be on one GPU, got {', '.join(places)}")
    return _cuda()


def _check_subclasses(names: tuple[str, ...], arrays: tuple[Any, ...]) -> None:
    """That all are of NumPy, as memory maps are, and none is masked."""
    named = tuple(zip(names, arrays, strict=True))
    for name, array in named:
        if not isinstance(array, (np.ndarray, cupy_array())):
            raise TypeError(f"{name} must be a NumPy or CuPy array, or speak DLPack, got {type(array).__name__}")
    if not all(isinstance(array, np.ndarray) for array in arrays):
        kinds = ", ".join(f"{name} is {type(array).__module__}.ndarray" for name, array in named)
        raise TypeError(f"NumPy and CuPy arrays cannot be mixed in one call: {kinds}; move them to one device")
    for name, array in named:
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{name} must not be a masked array, of which a pool cannot keep the mask; "
                f"give {name}.data or {name}.filled(0)"
            )


def backend_on(device: str | None) -> tuple[Backend, Any]:
    """The backend for a device by name, and the device as that backend's arrays name it.

    ``None`` is a GPU where one is usable and host memory otherwise (under ``CUPY_PAGEDKV_EMULATE=1`` always host
    memory, which is what was asked to be emulated); ``"cpu"`` is host memory, ``"cuda"`` CuPy's current GPU and
    ``"cuda:1"`` the second one. Raises ``ValueError`` for any other name and for a GPU that does not exist,
    ``RuntimeError`` where no GPU is usable.
    """
    if (device is None and EMULATE) or device == "cpu":
        return _host(), "cpu"
    kind, _, index = ("cuda" if device is None else str(device)).partition(":")
    if kind != "cuda" or (index and not index.isdecimal()) or str(device).endswith(":"):
        raise ValueError(f"device must be None, 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    count, reason = _usable_gpus()
    if count == 0:
        if device is None:
            return _host(), "cpu"
        raise RuntimeError(f"device {device!r} was asked for, but {reason}; device='cpu' works everywhere")
    backend = _cuda()
    number = int(index) if index else backend.xp.cuda.runtime.getDevice()
    if number >= count:
        raise ValueError(f"device {device!r} was asked for, but CuPy sees {count} GPUs, cuda:0 to cuda:{count - 1}")
    return backend, backend.xp.cuda.Device(number)


def _usable_gpus() -> tuple[int, str]:
    """How many GPUs CuPy can use, and why none, without creating a CUDA context."""
    try:
        import cupy
    except ImportError as error:
        return 0, f"CuPy cannot be imported ({error}); pip install 'cupy_pagedkv[cuda13x]'"
    try:
        return cupy.cuda.runtime.getDeviceCount(), "CuPy sees no GPU"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return 0, f"CuPy cannot use a GPU ({error})"
