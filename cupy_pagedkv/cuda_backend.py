"""The CUDA backend: launches the kernels in ``kernels/`` on CuPy's current stream.

A kernel is specialised, by ``#define`` lines ahead of its source, on what shapes and strides fix: the runs of bytes a
row is made of, the widest access that every address allows, the block size and the index types. What varies from call
to call is an argument. Nothing here checks its arguments (``ops`` has), and nothing waits for the stream.
"""

import functools
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CudaBackend", "source_of"]

_ACCESS_TYPES = {1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "uint2", 16: "uint4"}
_INDEX_TYPES = {4: "int", 8: "long long"}
_UNROLL = 8  # accesses of one thread, all loaded before the first is stored
_MAX_BLOCK_BYTES = 2**30  # offsets inside a block are 32-bit in the kernels
_MAX_WARPS = 4  # of a thread block: the kernels' __launch_bounds__

_Defines = tuple[tuple[str, str | int], ...]


def source_of(name: str, defines: _Defines) -> str:
    """``kernels/name.cu`` behind its parameters; the ``#line`` makes a compile error name the line in that file."""
    here = Path(__file__).parent
    # In a wheel `kernels` lies inside the package, in a checkout beside it.
    folder = next(f for f in (here / "kernels", here.parent / "kernels") if f.is_dir())
    lines = [f"#define {key} {value}" for key, value in defines]
    return "\n".join([*lines, f'#line 1 "kernels/{name}.cu"', (folder / f"{name}.cu").read_text()])


def _runs(tokens: Any, pool: Any) -> tuple[int, int, int]:
    """A token's row as (heads, runs of a head, bytes of a run), each run contiguous in ``tokens`` and in ``pool``.

    >>> _runs(np.zeros((5, 8, 64), np.float16), np.zeros((9, 16, 8, 64), np.float16))
    (1, 1, 1024)
    """
    heads, dim = tokens.shape[1:]
    if dim > 1 and tokens.strides[2] != tokens.itemsize:
        return heads, dim, tokens.itemsize
    row = dim * tokens.itemsize
    if heads == 1 or tokens.strides[1] == pool.strides[2] == row:
        return 1, 1, heads * row
    return heads, 1, row


def _alignment(tokens: Any, pool: Any, runs: tuple[int, int, int], *addresses: int) -> int:
    """The widest power of two up to 16 that divides every address a kernel forms in ``tokens`` and ``pool``.

    Strides of axes of length 1 are not looked at: they can be anything.
    """
    heads, runs_of_head, run = runs
    lengths = (*tokens.shape[:1], heads, runs_of_head, *pool.shape[:2], heads)
    strides = (*tokens.strides, *pool.strides[:3])
    return math.gcd(16, run, *addresses, *(s for s, n in zip(strides, lengths, strict=True) if n > 1))


class CudaBackend:
    """Arrays and operations on the GPUs that CuPy sees.

    The emulated device is a subclass that replaces what needs CuPy. A ``device`` is what the ``device`` attribute of
    arrays holds: here a ``cupy.cuda.Device``.
    """

    name = "cuda"
    checks_indices = False  # a check would have to wait for the stream

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.ndarray: type = xp.ndarray
        self._kernel = functools.cache(self._build_kernel)
        self._processors_of: dict[int, int] = {}

    def _build_kernel(self, name: str, defines: _Defines) -> Any:
        return self.xp.RawKernel(source_of(name, defines), name, ("-std=c++17",))

    def _processors(self, array: Any) -> int:
        number: int = array.device.id
        if number not in self._processors_of:
            self._processors_of[number] = array.device.attributes["MultiProcessorCount"]
        return self._processors_of[number]

    def _address(self, array: Any) -> int:
        return int(array.data.ptr)

    def device_name(self, array: Any) -> str:
        return f"cuda:{array.device.id}"

    def asnumpy(self, array: Any) -> np.ndarray:
        """The array in host memory, once the current stream has got there."""
        return self.xp.asnumpy(array)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        """Wait for CuPy's current stream."""
        self.xp.cuda.get_current_stream().synchronize()

    def on(self, device: Any) -> AbstractContextManager[Any]:
        """Within it, CuPy's current device is ``device``."""
        return device  # type: ignore[no-any-return]

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Any) -> Any:
        return self._make(self.xp.zeros, shape, dtype, device)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Any) -> Any:
        return self._make(self.xp.empty, shape, dtype, device)

    def _make(self, creator: Any, shape: tuple[int, ...], dtype: np.dtype[Any], device: Any) -> Any:
        with self.on(device):
            # As bytes: CuPy makes no arrays of float8 and other dtypes that its views can have.
            return creator((*shape[:-1], shape[-1] * dtype.itemsize), np.uint8).view(dtype)

    def from_numpy(self, array: npt.NDArray[Any], device: Any) -> Any:
        """A copy on ``device``, made on the current stream; ``array`` may be changed as soon as this returns."""
        with self.on(device):
            # CuPy stages pageable memory, but reads pinned memory whenever the stream gets there: hence a copy of ours.
            return self.xp.asarray(array.copy())

    def reshape_and_cache(self, key: Any, value: Any, k_cache: Any, v_cache: Any, slot_mapping: Any) -> None:
        defines, row = self._specialise(key, value, k_cache, v_cache)
        defines += (("SLOT_T", _INDEX_TYPES[slot_mapping.itemsize]),)
        num_tokens, num_slots = len(key), k_cache.shape[0] * k_cache.shape[1]
        arguments = (slot_mapping, *slot_mapping.strides, num_tokens, num_slots)
        self._launch("reshape_and_cache", defines, num_tokens, row, (key, value, k_cache, v_cache), arguments)

    def gather_cache(
        self, key: Any, value: Any, k_cache: Any, v_cache: Any, block_tables: Any, seq_lens: Any, seq_starts: Any
    ) -> None:
        """Fill ``key`` and ``value`` with as many rows as the lengths say, and no more than they have."""
        num_blocks, block_size = k_cache.shape[:2]
        num_rows, num_seqs = len(key), len(seq_lens)
        defines, row = self._specialise(key, value, k_cache, v_cache)
        starts = (0, 0) if seq_starts is None else (seq_starts, *seq_starts.strides)
        defines += (
            ("TABLE_T", _INDEX_TYPES[block_tables.itemsize]),
            ("LENS_T", _INDEX_TYPES[seq_lens.itemsize]),
            ("STARTS_T", _INDEX_TYPES[seq_lens.itemsize if seq_starts is None else seq_starts.itemsize]),
        )
        # A sequence of n rows touches at most n // block_size + 2 blocks, and never more than n.
        segments = min(num_rows, num_rows // block_size + 2 * num_seqs)
        arguments = (block_tables, *block_tables.strides, block_tables.shape[1], seq_lens, *seq_lens.strides, *starts)
        arguments += (num_seqs, num_rows, num_blocks)
        self._launch("gather_cache", defines, segments, block_size * row, (key, value, k_cache, v_cache), arguments)

    def _specialise(self, key: Any, value: Any, k_cache: Any, v_cache: Any) -> tuple[_Defines, int]:
        """The defines that both kernels share, and the number of accesses in the longer row."""
        k_runs, v_runs = _runs(key, k_cache), _runs(value, v_cache)
        access = math.gcd(
            _alignment(key, k_cache, k_runs, self._address(key), self._address(k_cache)),
            _alignment(value, v_cache, v_runs, self._address(value), self._address(v_cache)),
        )
        block_size = k_cache.shape[1]
        row = max(math.prod(k_runs), math.prod(v_runs)) // access
        if block_size * row * access > _MAX_BLOCK_BYTES:
            raise ValueError(
                f"a block of K or V must have at most {_MAX_BLOCK_BYTES} bytes here, got block_size {block_size} "
                f"and rows of {row * access} bytes; use a smaller block_size"
            )
        defines: _Defines = (("ACCESS_T", _ACCESS_TYPES[access]), ("UNROLL", _UNROLL), ("BLOCK_SIZE", block_size))
        for letter, (heads, runs_of_head, run) in (("K", k_runs), ("V", v_runs)):
            defines += ((f"{letter}_HEADS", heads), (f"{letter}_RUNS", runs_of_head), (f"{letter}_RUN", run // access))
        return defines, row

    def _launch(
        self,
        name: str,
        defines: _Defines,
        units: int,
        accesses: int,
        arrays: tuple[Any, ...],
        arguments: tuple[Any, ...],
    ) -> None:
        """Launch one warp for each 32 * _UNROLL of the ``accesses`` of each unit, for K and for V.

        ``units`` is at least 1: CuPy would launch an empty grid as one block. Arrays are passed as their address,
        which forgets strides, and so the strides follow each as arguments of their own; every ``int`` is an int64.
        """
        key, value, k_cache, v_cache = arrays
        warps = units * -(-accesses // (32 * _UNROLL))
        # Few warps are spread over the device, many share blocks.
        warps_of_block = min(max(1, warps // self._processors(key)), _MAX_WARPS)
        pairs = (key, *key.strides, value, *value.strides, k_cache, *k_cache.strides[:3], v_cache, *v_cache.strides[:3])
        with self.on(key.device):
            self._kernel(name, defines)((-(-warps // warps_of_block), 2), (32 * warps_of_block,), (*pairs, *arguments))
