"""Element types: whatever NumPy knows of fixed size, and ``ml_dtypes`` by name where that package is there."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["as_dtype", "name_of"]


def as_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """``numpy.dtype(dtype)`` that also takes the names ``"bfloat16"``, ``"float8_e4m3fn"``, … of ``ml_dtypes``.

    >>> as_dtype("float16")
    dtype('float16')

    Raises ``TypeError`` for what is no dtype and for dtypes whose items are references, empty or arrays themselves:
    their bytes cannot be copied one by one.
    """
    try:
        result = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError):  # SyntaxError: of a string like "i4,,"
        result = _ml_dtype(dtype)
    if result.hasobject or result.itemsize == 0 or result.subdtype is not None:
        raise TypeError(f"expected a dtype with items of one fixed size, such as float16 or bfloat16, got {result!r}")
    return result


def name_of(dtype: np.dtype[Any]) -> str:
    """By which two dtypes are the same; with the byte order, and with the fields and where they are."""
    if dtype.subdtype is not None:
        return f"{dtype.subdtype[1]}{name_of(dtype.subdtype[0])}"
    if dtype.fields is not None:
        fields = (f"{name!r}: {name_of(field[0])} at {field[1]}" for name, field in dtype.fields.items())
        return f"{{{', '.join(fields)}; {dtype.itemsize} bytes}}"
    if 0 <= dtype.num < 256:  # NumPy's own; bfloat16 and its kin have others
        return dtype.str
    return dtype.name if dtype.isnative else f"{dtype.name} swapped"


def _ml_dtype(name: Any) -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError:
        hint = "; bfloat16 and float8 types need the package ml_dtypes (pip install 'cupy_pagedkv[bf16]')"
    else:
        hint = ""
        scalar = getattr(ml_dtypes, name, None) if isinstance(name, str) else None
        if isinstance(scalar, type) and issubclass(scalar, np.generic):
            return np.dtype(scalar)
    raise TypeError(f"expected a dtype, got {name!r}{hint}")
