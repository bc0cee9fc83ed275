"""How attention is launched: which kernel, how many rows together, and how sequences are spread over thread blocks.

None of this decides what is added to what: a result has the same bits whatever is chosen here.
"""

import math
from typing import NamedTuple

from .layout import AttentionLayout, Scoring
from .sources import Defines

__all__ = ["ELEMENTS", "THREADS", "Shape", "Spread", "shape_of", "spread_of"]

THREADS = 128  # of a block
ELEMENTS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # of attention.cuh
_SPLIT = 256  # positions: sequences.cuh's
_MOST_STAGES = 2
_MOST_COLUMNS = 512  # of V, that a block has: two accumulators of 64 registers a thread, with 16 rows
_MOST_FLOATS = 8192  # rows times columns of V: with more, the accumulators would not fit the registers
_MOST_SCRATCH = 2**26  # floats
_BLOCKS_OF_FEW_ROWS = 32  # thread blocks for each multiprocessor


class Shape(NamedTuple):
    """What a thread block is made for."""

    rows: int
    parts: int
    """Blocks that share the columns of V."""
    shared_bytes: int
    defines: Defines


def shape_of(
    layout: AttentionLayout,
    many_rows: bool,
    v_is_k: bool,
    access: int,
    query_access: int,
    softcap: bool,
    arch: int,
    room: int,
) -> Shape:
    """For ``sm_<arch>`` with ``room`` bytes of shared memory for a block; ``many_rows`` of a sequence are more than 16.
    Raises ``ValueError`` where that is too little."""
    dim, v_dim = layout.k_cache.shape[4], layout.v_cache.shape[4]
    dtype = layout.query.dtype
    tensor = dtype.itemsize == 2 and dim % 16 == v_dim % 16 == 0 and (arch >= 80 or dtype.name == "float16")
    of_v = 0 if v_is_k else v_dim
    tile = 64 if tensor and dim + of_v <= 256 else 32
    most = _MOST_FLOATS if 80 <= arch < 100 else _MOST_FLOATS // 2  # others' code needs more registers beside
    rows = max(16, min(64, 2 ** int(math.log2(most // min(v_dim, _MOST_COLUMNS))))) if many_rows else 16

    def shared_bytes(rows: int, stages: int) -> int:  # struct Shared of the kernel
        common = 32 * tile + (24 + 16) * rows + 8 * 64  # of warps times their rows there are 64, whatever rows is
        if tensor:
            return 2 * rows * (dim + tile) + stages * 2 * tile * (dim + of_v) + 16 * v_is_k + common
        return 4 * rows * (dim + 4 + tile + 4) + common

    tensor = tensor and v_dim <= _MOST_COLUMNS and shared_bytes(16, 1) <= room
    while rows > 16 and shared_bytes(rows, 1) > room:
        rows //= 2
    if shared_bytes(rows, 1) > room:
        raise ValueError(
            f"attention with head_dim {dim} needs {shared_bytes(rows, 1)} bytes of shared memory, but a thread block "
            f"has at most {room} here"
        )
    stages = max(n for n in range(1, _MOST_STAGES + 1) if n == 1 or (tensor and shared_bytes(rows, n) <= room))
    columns = v_dim if tensor else min(v_dim, _MOST_COLUMNS)
    defines: Defines = (
        ("ELEMENT", ELEMENTS[dtype.name]), ("TENSOR", int(tensor)), ("HEAD_DIM", dim), ("V_DIM", v_dim),
        ("V_PART", columns), ("V_IS_K", int(v_is_k)), ("GROUP", layout.group), ("BLOCK_SIZE", layout.block_size),
        ("ROWS", rows), ("TILE", tile), ("STAGES", stages), ("ACCESS", access), ("QUERY_ACCESS", query_access),
        ("SOFTCAP", int(softcap)),
    )  # fmt: skip
    return Shape(rows, -(-v_dim // columns), shared_bytes(rows, stages), defines)


class Spread(NamedTuple):
    """How a batch is spread over thread blocks."""

    grid: tuple[int, int, int]
    splits: int
    """Of which a row's sums are kept between two launches; 0 where there is but one."""
    scratch: int
    """Floats that they take."""


def spread_of(
    layout: AttentionLayout,
    shape: Shape,
    scoring: Scoring | None,
    num_seqs: int,
    max_blocks: int,
    packed: bool,
    processors: int,
) -> Spread:
    """``packed``: sequences have tokens by ``cu_seqlens_q``. Without ``scoring``: as much scratch as any would need."""
    num_tokens, group = layout.num_tokens, layout.group
    # Enough numbers for the row tiles of all sequences: paged_attention.cu says why.
    tiles = num_tokens * group // shape.rows + num_seqs if packed else num_seqs * -(-group // shape.rows)
    heads = layout.k_cache.shape[3] * shape.parts
    splits = max(1, -(-max_blocks * layout.block_size // _SPLIT))
    if scoring is not None:  # a tile's rows see no more than its tokens' windows
        splits = min(splits, (scoring.left + scoring.right + shape.rows // group + 1) // _SPLIT + 2)
    scratch = splits * num_tokens * layout.query.shape[1] * (layout.result.shape[2] + 2)
    if scoring is None:  # where all splits are too many, a window's may be few enough
        scratch = min(scratch, _MOST_SCRATCH)
    # Few rows wait for memory, and many blocks hide that; many rows compute, and what is kept would cost more.
    wanted = processors * (_BLOCKS_OF_FEW_ROWS if shape.rows == 16 else 1)
    z = min(splits, -(-wanted // max(1, tiles * heads)), 65535)
    if z == 1 or scratch > _MOST_SCRATCH:
        return Spread((tiles, heads, 1), 0, 0)
    return Spread((tiles, heads, z), splits, scratch)
