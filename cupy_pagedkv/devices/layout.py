"""What the shapes, strides and dtypes of a call fix: checked once, and remembered.

A decode loop makes the same call over and over. Its checks, and what a backend derives from the shapes, are looked up:
the :class:`Layout` by shapes, strides and dtypes, and what depends on it by the layout's identity.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..bookkeeping.dtypes import as_dtype

__all__ = [
    "UNBOUNDED", "AttentionLayout", "Form", "Items", "Layout", "Pools", "Scoring", "attention_layout_of",
    "check_arithmetic", "layout_of", "pools_of",
]  # fmt: skip

_Ints = tuple[int, ...]
_REMEMBERED = 4096

UNBOUNDED = 2**40
"""Of a window's two sides: further than any position."""


class Form(NamedTuple):
    """An array without its memory; ``strides`` are in bytes."""

    shape: _Ints
    strides: _Ints
    dtype: np.dtype[Any]


class Items(NamedTuple):
    """Void dtypes of the size of a token and of a block: what can be copied as one, whatever it consists of."""

    token: np.dtype[Any]
    block: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class Pools:
    """Pools of K and V that belong together, each with an axis of layers, be it of length 1."""

    k_cache: Form
    v_cache: Form
    num_layers: int
    num_blocks: int
    block_size: int


@dataclass(frozen=True, eq=False)
class Layout(Pools):
    """Tokens, and pools that they go to or come from; these have an axis of layers, too."""

    key: Form
    value: Form
    num_tokens: int
    token_bytes: int
    """Of K and V together, in one layer."""
    have_fields: bool
    """Whether items of K or V are structures."""
    k_items: Items | None
    """K in one layer as opaque items; None where tokens or slots do not lie one after the other."""
    v_items: Items | None


@dataclass(frozen=True, eq=False)
class AttentionLayout(Pools):
    """Queries over the pools of one layer, all of one dtype."""

    query: Form
    result: Form
    """Contiguous."""
    num_tokens: int
    group: int
    """Query heads that share a KV head."""


class Scoring(NamedTuple):
    """What becomes of the product of a query and a key, and which keys a query sees: as in ``paged_attention``."""

    softmax_scale: float
    softcap: float
    left: int
    right: int
    """0 where it is causal. Both are ``UNBOUNDED`` at most."""


def layout_of(names: tuple[str, str], key: Any, value: Any, k_cache: Any, v_cache: Any) -> Layout:
    """The layout of a call on arrays; ``names`` are those of the tokens of K and V.

    Raises ``ValueError`` for shapes that do not agree and ``TypeError`` for dtypes that do not.
    """
    # Twelve flat arguments are hashed in half the time of four tuples.
    return _layout_of(
        names, key.shape, key.strides, key.dtype, value.shape, value.strides, value.dtype,
        k_cache.shape, k_cache.strides, k_cache.dtype, v_cache.shape, v_cache.strides, v_cache.dtype,
    )  # fmt: skip


def pools_of(k_cache: Any, v_cache: Any) -> Pools:
    """The pools of a call on arrays. Raises ``ValueError`` or ``TypeError`` unless they belong together."""
    return _pools_of(k_cache.shape, k_cache.strides, k_cache.dtype, v_cache.shape, v_cache.strides, v_cache.dtype)


def attention_layout_of(query: Any, k_cache: Any, v_cache: Any) -> AttentionLayout:
    """The layout of attention on arrays. Raises ``ValueError`` for shapes that do not agree and ``TypeError`` for
    dtypes that do not, or that cannot be computed with."""
    return _attention_layout_of(
        query.shape, query.strides, query.dtype,
        k_cache.shape, k_cache.strides, k_cache.dtype, v_cache.shape, v_cache.strides, v_cache.dtype,
    )  # fmt: skip


def check_arithmetic(name: str, dtype: np.dtype[Any]) -> None:
    """Raises ``TypeError`` unless ``dtype`` can be computed with."""
    if dtype.name not in ("float16", "bfloat16", "float32") or not dtype.isnative:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {dtype}")


@functools.lru_cache(_REMEMBERED)
def _attention_layout_of(
    query_shape: _Ints,
    query_strides: _Ints,
    query_dtype: np.dtype[Any],
    k_shape: _Ints,
    k_strides: _Ints,
    k_dtype: np.dtype[Any],
    v_shape: _Ints,
    v_strides: _Ints,
    v_dtype: np.dtype[Any],
) -> AttentionLayout:
    pools = _pools_of(k_shape, k_strides, k_dtype, v_shape, v_strides, v_dtype)
    if len(k_shape) != 4:
        raise ValueError(f"k_cache must be the pool of one layer, with 4 axes, got {k_shape}; take one layer of it")
    heads, dim = k_shape[2:]
    if len(query_shape) != 3 or query_shape[2] != dim or query_shape[1] == 0 or query_shape[1] % heads:
        raise ValueError(
            f"query must be [num_tokens, num_heads, {dim}], num_heads a multiple of {heads}, as k_cache is {k_shape}, "
            f"got {query_shape}"
        )
    check_arithmetic("query", query_dtype)
    for name, dtype in (("k_cache", k_dtype), ("v_cache", v_dtype)):
        if dtype != query_dtype:
            raise TypeError(f"{name} must have the dtype of query, {query_dtype}, got {dtype}")
    shape = (*query_shape[:2], v_shape[3])
    strides = (shape[1] * shape[2] * v_dtype.itemsize, shape[2] * v_dtype.itemsize, v_dtype.itemsize)
    return AttentionLayout(
        **vars(pools),
        query=Form(query_shape, query_strides, query_dtype),
        result=Form(shape, strides, v_dtype),
        num_tokens=query_shape[0],
        group=query_shape[1] // heads,
    )


@functools.lru_cache(_REMEMBERED)
def _layout_of(
    names: tuple[str, str],
    key_shape: _Ints,
    key_strides: _Ints,
    key_dtype: np.dtype[Any],
    value_shape: _Ints,
    value_strides: _Ints,
    value_dtype: np.dtype[Any],
    k_shape: _Ints,
    k_strides: _Ints,
    k_dtype: np.dtype[Any],
    v_shape: _Ints,
    v_strides: _Ints,
    v_dtype: np.dtype[Any],
) -> Layout:
    pools = _pools_of(k_shape, k_strides, k_dtype, v_shape, v_strides, v_dtype)
    _check_tokens(names[0], key_shape, key_dtype, "k_cache", k_shape, k_dtype)
    _check_tokens(names[1], value_shape, value_dtype, "v_cache", v_shape, v_dtype)
    key = _with_layers(3, key_shape, key_strides, key_dtype)
    value = _with_layers(3, value_shape, value_strides, value_dtype)
    if key.shape[1] != value.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have as many tokens as each other, got {key.shape[1]} and {value.shape[1]}"
        )
    token_bytes = sum(pool.shape[3] * pool.shape[4] * pool.dtype.itemsize for pool in (pools.k_cache, pools.v_cache))
    return Layout(
        **vars(pools),
        key=key,
        value=value,
        num_tokens=key.shape[1],
        token_bytes=token_bytes,
        have_fields=k_dtype.fields is not None or v_dtype.fields is not None,
        k_items=_items(key, pools.k_cache),
        v_items=_items(value, pools.v_cache),
    )


@functools.lru_cache(_REMEMBERED)
def _pools_of(
    k_shape: _Ints,
    k_strides: _Ints,
    k_dtype: np.dtype[Any],
    v_shape: _Ints,
    v_strides: _Ints,
    v_dtype: np.dtype[Any],
) -> Pools:
    for name, shape, strides, dtype in (
        ("k_cache", k_shape, k_strides, k_dtype),
        ("v_cache", v_shape, v_strides, v_dtype),
    ):
        if len(shape) not in (4, 5) or 0 in shape:
            raise ValueError(
                f"{name} must be [num_blocks, block_size, num_kv_heads, head_dim], none of them 0, or have one more "
                f"axis before these, of layers; got {shape}"
            )
        as_dtype(dtype)
        if shape[-1] > 1 and strides[-1] != dtype.itemsize:
            raise ValueError(
                f"the last axis of {name} must be contiguous, got strides {strides} for {dtype}; "
                "pass a view whose last axis is head_dim, such as pool.transpose(0, 2, 1, 3) of an HND pool"
            )
    if k_shape[:-1] != v_shape[:-1]:
        raise ValueError(f"k_cache and v_cache must agree in all axes but head_dim, got {k_shape} and {v_shape}")
    k_cache = _with_layers(4, k_shape, k_strides, k_dtype)
    v_cache = _with_layers(4, v_shape, v_strides, v_dtype)
    return Pools(k_cache, v_cache, *k_cache.shape[:3])


def _check_tokens(
    name: str, shape: _Ints, dtype: np.dtype[Any], pool_name: str, pool_shape: _Ints, pool_dtype: np.dtype[Any]
) -> None:
    expected = (*pool_shape[:-4], "num_tokens", *pool_shape[-2:])
    if len(shape) != len(expected) or shape[:-3] != pool_shape[:-4] or shape[-2:] != pool_shape[-2:]:
        raise ValueError(
            f"{name} must be [{', '.join(map(str, expected))}], as {pool_name} is {pool_shape}, got {shape}"
        )
    if dtype != pool_dtype:
        raise TypeError(f"{name} must have the dtype of {pool_name}, {pool_dtype}, got {dtype}")


def _items(tokens: Form, pool: Form) -> Items | None:
    for form in (tokens, pool):
        step = form.dtype.itemsize
        for size, stride in zip(form.shape[:0:-1], form.strides[:0:-1], strict=True):  # without the axis of layers
            if size != 1 and stride != step:
                return None
            step *= size
    num_bytes = pool.shape[-2] * pool.shape[-1] * pool.dtype.itemsize
    if pool.shape[-3] * num_bytes >= 2**31:  # more than NumPy's items have
        return None
    return Items(np.dtype((np.void, num_bytes)), np.dtype((np.void, pool.shape[-3] * num_bytes)))


def _with_layers(ndim: int, shape: _Ints, strides: _Ints, dtype: np.dtype[Any]) -> Form:
    if len(shape) == ndim:
        return Form((1, *shape), (0, *strides), dtype)
    return Form(shape, strides, dtype)
