"""Arrays of other libraries, without a copy: whatever speaks DLPack, as NumPy or CuPy arrays over the same memory.

What comes in by DLPack goes out by it: a new result has the kind of the array that :func:`like` is told of.
"""

import sys
from typing import Any

import numpy as np

from ..bookkeeping.dtypes import as_dtype

__all__ = ["array_of", "arrays_of", "cupy_array", "like"]

# DLDeviceType, from dlpack.h.
_HOST = (1, 3, 11, 13)  # the CPU's; pinned by CUDA or by ROCm; CUDA's managed memory, which the CPU can read, too
_CUDA = (2,)


def arrays_of(names: tuple[str, ...], *arrays: Any) -> tuple[Any, ...]:
    """NumPy and CuPy arrays as they are, and views of what else speaks DLPack; ``names`` are what errors call them."""
    kind = type(arrays[0])
    if kind is np.ndarray or kind is cupy_array():
        for array in arrays:
            if type(array) is not kind:
                break
        else:
            return arrays
    return tuple(array_of(name, array) for name, array in zip(names, arrays, strict=True))


def cupy_array() -> Any:
    """CuPy's type of arrays; for ``isinstance``, no type where nobody imported CuPy, so that no such array exists."""
    cupy = sys.modules.get("cupy")
    return () if cupy is None else cupy.ndarray


def array_of(name: str, array: Any) -> Any:
    """A NumPy view of host memory, or a CuPy view of a GPU's, in the order of CuPy's current stream.

    The view keeps the memory alive. NumPy's and CuPy's arrays, and what does not speak DLPack, come back as they are.
    Raises ``TypeError`` for what cannot be shared so, and says what can.
    """
    if _is_ours(array) or not hasattr(array, "__dlpack__"):
        return array
    if getattr(array, "requires_grad", False):
        raise TypeError(f"gradients of {name} are wanted, and end here; give {name}.detach()")
    if hasattr(array, "is_neg") and array.is_neg():  # PyTorch shares the memory without a word of the sign
        raise TypeError(f"{name} is the negative of what its memory holds; give {name}.resolve_neg()")
    try:
        device_type, _ = array.__dlpack_device__()
        if device_type in _HOST:
            from_dlpack = np.from_dlpack
        elif device_type in _CUDA:
            import cupy

            from_dlpack = cupy.from_dlpack
        else:
            raise BufferError(f"it is in the memory of device type {int(device_type)} of DLPack")
        dtype = str(getattr(array, "dtype", "")).rpartition(".")[2]
        if dtype.startswith(("bfloat16", "float8", "float4")):  # which NumPy's from_dlpack does not know
            kind = as_dtype(dtype)
            of_bits = getattr(_library_of(array), f"uint{8 * kind.itemsize}")
            return from_dlpack(array.view(of_bits)).view(kind)
        return from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise TypeError(
            f"{name}, of type {type(array).__name__}, cannot be shared by DLPack: {error}; give a dense array in the "
            "memory of the CPU or of a CUDA GPU"
        ) from error


def like(result: Any, given: Any) -> Any:
    """``result``, a new array, as an array of the library that ``given`` is of, over the same memory."""
    if _is_ours(given):
        return result
    library = _library_of(given)
    if result.dtype.isbuiltin == 1:  # bfloat16 and float8 are not
        return library.from_dlpack(result)
    bits = library.from_dlpack(result.view(f"u{result.dtype.itemsize}"))
    return bits.view(getattr(library, result.dtype.name))


def _is_ours(array: Any) -> bool:
    return isinstance(array, (np.ndarray, cupy_array()))


def _library_of(array: Any) -> Any:
    """What has ``from_dlpack`` and dtypes by name: the namespace of the array API standard, or PyTorch's module."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    for kind in type(array).__mro__:  # a tensor may be of somebody's subclass
        library = sys.modules.get(kind.__module__.partition(".")[0])
        if hasattr(library, "from_dlpack"):
            return library
    raise TypeError(f"{type(array).__name__} is of no library that has from_dlpack")
