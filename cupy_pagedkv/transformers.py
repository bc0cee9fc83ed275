"""Hugging Face models on a paged cache: :class:`PagedCache` is given to ``generate``, as transformers' own caches are.

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
...                      num_attention_heads=4, num_key_value_heads=2, attn_implementation="cupy_pagedkv")
>>> model = LlamaForCausalLM(config).eval()
>>> cache = PagedCache(model, num_blocks=32, block_size=8)
>>> out = model.generate(torch.tensor([[1, 5, 9, 4]]), cache=cache, max_new_tokens=8, eos_token_id=None)
>>> out.shape, cache.get_seq_length(), cache.manager.stats().live_blocks
(torch.Size([1, 12]), 11, 2)

To import this module registers the attention ``"cupy_pagedkv"``, which a model has to be made with, or be told later:
``model.set_attn_implementation("cupy_pagedkv")``. It needs PyTorch and transformers, the extra ``hf``; nothing else in
the package imports them.

How a forward goes, layer by layer::

    update(key, value, layer)   takes K and V of the new tokens, and returns them as they are
    attention of this layer     the first one prepares a batch, since only here the mask says which tokens are padding;
                                each writes K and V to their slots, and attends over the block tables,
                                to a long prefix that all rows share once for all of them;
                                the last one commits the batch
    an exception in between     leaves the batch open, and whatever comes next rolls it back
"""

import inspect
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import create_causal_mask

from .bookkeeping.dtypes import as_dtype
from .caches.batch import Batch
from .caches.cache import LayeredPagedKVCache, PagedKVCache
from .caches.manager import KVCacheManager
from .caches.sequence import CachedSequence
from .operations.attention import merge_attention_states

__all__ = ["ATTENTION", "PagedCache"]

ATTENTION = "cupy_pagedkv"
"""The ``attn_implementation`` that reads a :class:`PagedCache`."""

_Bools = npt.NDArray[np.bool_]

_WORTH = 1024
"""Tokens that need not be read, from which on attention to what rows have in common is a call of its own."""

_KEYWORD = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""By which models take a cache: the first from transformers 5.24 on."""


class _Handed(NamedTuple):
    """What ``update`` was given last, until the attention of that layer takes it."""

    layer: int
    key: torch.Tensor
    value: torch.Tensor


class _Step(NamedTuple):
    """What the layers of a forward share."""

    batch: Batch
    new: _Bools
    """``[rows, new columns]``: which are no padding."""
    places: torch.Tensor | None
    """Where those are in all rows, one after the other; None if there is no padding."""
    prefix: npt.NDArray[np.int32]
    """``[1, n]``: the blocks that all rows begin with, to be read once for all; n is 0 if that is not worth it."""
    rest: tuple[Any, Any, Any]
    """``block_tables`` and ``seq_lens`` of the batch behind these, and its ``cu_seqlens``."""


class _Current(threading.local):
    """The cache whose ``update`` was called last. The model's code hands it to ``update`` alone, not to the attention
    that follows; what update returns does not always get there, either: DeepSeek makes K and V of it first."""

    cache: "weakref.ref[PagedCache] | None" = None


_current = _Current()


class PagedCache(Cache):
    """K and V of a model's layers in blocks of one pool, a sequence for each row of the batch.

    A cache of transformers: whatever takes a ``DynamicCache`` takes it, in ``generate`` or in the model's ``forward``.
    Padding takes no place, ``reorder_cache`` (beam search) shares blocks and copies none but those begun, and ``crop``
    (assisted decoding) lets blocks go. One cache is to be used for all that a model does: :meth:`reset` lets go of the
    batch, and the pool is there for the next.

    model
        What is given the cache: its config says how many layers and heads there are, and the pool is of its dtype and
        where its weights are. Layers are of full or of sliding attention, all with as many KV heads of one head_dim, or
        of DeepSeek's latent attention, which is stored compressed.
    num_blocks, block_size
        The pool's size. It is allocated here, zero-filled: ``2 * num_layers * num_kv_heads * head_dim`` elements for
        each token. Layers with a sliding window keep all blocks, as the others do, and read only the window's. What
        that costs: of a sequence of n tokens and a window of W, n tokens in each such layer, where transformers' own
        cache holds W − 1.
    prefix_caching
        Share blocks between rows, and with earlier batches, by their token ids. The model tells them to the cache
        by a hook on its ``forward``, which is put there once. :meth:`begin` finds what a batch shares. Tokens beside
        images, and at other positions than their own, are not found. When weights or adapters change, what is there
        is wrong: ``cache.reset()``, then ``cache.manager.reset_prefix_cache()``.

    A mask may hide any new tokens: on the left, where ``generate`` wants its padding, or elsewhere; a window counts
    those that are not hidden. Masks of four axes, and bidirectional ones, are refused.

    There is no gradient, and no dropout. ``torch.compile`` breaks its graph around each layer's attention, and
    ``fullgraph=True`` is an error; ``generate`` does not compile by itself with this cache. An ``assistant_model``
    has a cache of its own, which ``generate`` makes, and so another attention. Not thread-safe.

    Raises ``ValueError`` for a model whose layers do not fit, and as :class:`~cupy_pagedkv.LayeredPagedKVCache` does.
    A forward raises ``ValueError`` for a model of another attention, another model than the cache was made for, a
    batch of another size, and masks and tensors that do not fit, ``RuntimeError`` where a gradient is wanted, and
    :class:`~cupy_pagedkv.OutOfBlocksError` where the pool is exhausted; then the cache is as it was before.
    """

    def __init__(self, model: Any, num_blocks: int, block_size: int = 16, *, prefix_caching: bool = False) -> None:
        super().__init__(layers=[])
        config = model.config.get_text_config(decoder=True)
        _check_layers(config)
        if prefix_caching and (kinds := _rope_types(config) & {"dynamic", "longrope"}):
            raise ValueError(
                f"rope_type {kinds.pop()!r} makes other K of a prefix in a longer prompt, so that none can be shared: "
                "prefix_caching=False"
            )
        self._model = model
        self._config = config
        self._dtype, self._device = model.dtype, model.device
        self._prefix_caching = prefix_caching
        num_layers = config.num_hidden_layers
        dtype = as_dtype(str(self._dtype).removeprefix("torch."))
        latent = getattr(config, "kv_lora_rank", None)
        with _stream(self._device):
            if latent is None:
                dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
                heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
                pools = LayeredPagedKVCache(num_layers, num_blocks, block_size, heads, dim, dtype, str(self._device))
                self._written = self._attended = list(pools)
            else:  # one row a token and layer, of which V is the beginning: a layer in the pool of K, one in that of V
                dim = latent + config.qk_rope_head_dim
                pools = LayeredPagedKVCache(
                    -(-num_layers // 2), num_blocks, block_size, 1, dim, dtype, str(self._device)
                )
                rows = [pool for layer in pools for pool in (layer.k_cache, layer.v_cache)][:num_layers]
                self._written = [PagedKVCache.from_pools(pool[..., :latent], pool[..., latent:]) for pool in rows]
                self._attended = [PagedKVCache.from_pools(pool, pool[..., :latent]) for pool in rows]
        self._manager = KVCacheManager(pools, prefix_caching=prefix_caching)
        self._rows: list[CachedSequence] = []
        self._real: _Bools = np.zeros((0, 0), np.bool_)  # [rows, columns of the batch]: which are no padding
        self._step: _Step | None = None  # of a forward that has not come to its last layer
        self._layers_done = 0  # of that
        self._handed: _Handed | None = None
        self._ids: torch.Tensor | None = None  # what the running forward computes, where the model said so
        self._positions: torch.Tensor | None = None
        self._num_unknown = 0
        if prefix_caching and model not in _telling_ids:
            model.register_forward_pre_hook(_tell_ids, with_kwargs=True)
            model.register_forward_hook(_forget_ids, with_kwargs=True, always_call=True)
            _telling_ids.add(model)

    @property
    def manager(self) -> KVCacheManager:
        """The books: ``manager.stats()`` counts blocks, and what was shared. Its sequences are the cache's own."""
        return self._manager

    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> int:
        """Start with these prompts: what the pool has of them is found, and what they have in common is computed once.

        input_ids, attention_mask
            ``[rows, columns]``, as ``generate`` is to be given them, padded on the left.

        Returns how many columns need no computing, which is ``get_seq_length()`` from now on: ``generate`` computes
        what is behind them. That is one number, as transformers computes as many columns of each row: that of the row
        that has least. The rows of before are let go of.

        With beams, or ``num_return_sequences``, ``batch_repeat_interleave(n)`` has to follow, since ``generate``
        repeats the prompts. Prompts are text: there is no place for images.

        Raises ``ValueError`` without ``prefix_caching`` and for a mask with padding elsewhere, and what a forward does.
        """
        if not self._prefix_caching:
            raise ValueError("without token ids nothing can be found: make this a PagedCache(…, prefix_caching=True)")
        num_rows, num_columns = input_ids.shape
        real = self._as_mask(attention_mask, num_rows, num_columns)
        if (np.diff(real.astype(np.int8), axis=1) < 0).any():
            raise ValueError("attention_mask must hide the first columns alone: prompts are padded on the left")
        ids = input_ids.cpu().numpy()
        prompts = [ids[i, real[i]] for i in range(num_rows)]
        self.reset()
        if num_rows > 1:
            self._compute_once(prompts)
        pads = num_columns - real.sum(1)
        self._rows = [self._manager.add(prompt) for prompt in prompts]
        found = [sequence.num_cached_tokens for sequence in self._rows]
        columns = int((pads + found).min())
        for sequence, pad in zip(self._rows, pads.tolist(), strict=True):
            sequence.truncate(max(0, columns - pad))
        self._real = real[:, :columns]
        return columns

    def _compute_once(self, prompts: list[npt.NDArray[np.int64]]) -> None:
        """Put the full blocks that all prompts begin with into the pool, if they are not there."""
        shortest = min(map(len, prompts))
        together = np.stack([prompt[:shortest] for prompt in prompts])
        alike = np.append((together == together[0]).all(0), False)
        common = min(int(alike.argmin()), shortest - 1) // self._block_size * self._block_size
        if common <= 0:
            return
        self._rows = [self._manager.add(prompts[0][: common + 1])]  # one more, so that all of the prefix can be found
        start = self._rows[0].num_cached_tokens
        self._real = np.ones((1, start), np.bool_)
        try:
            if start < common:
                ids = self._ids = torch.as_tensor(prompts[0][None, start:common], device=self._device)
                with torch.no_grad():
                    self._model.base_model(input_ids=ids, use_cache=True, **{_KEYWORD: self})
        finally:
            self._ids = None
            self.reset()

    # What transformers asks of a cache.

    @torch.compiler.disable(reason="K and V are written by NumPy or CuPy")
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take K and V of a layer's new tokens, ``[rows, num_kv_heads, columns, head_dim]``, and return them as they
        are: the attention that has to follow writes them, and reads what was there before from the pool.

        Raises ``ValueError`` if another attention is going to follow, or did in the layer before.
        """
        chosen = self._config._attn_implementation
        if chosen != ATTENTION:
            raise ValueError(
                f"a PagedCache is read by attn_implementation={ATTENTION!r}, but the model has {chosen!r}: "
                f"call model.set_attn_implementation({ATTENTION!r})"
            )
        if layer_idx == 0:
            self._roll_back()  # what is there is of a forward that an exception ended
        elif layer_idx != self._layers_done:
            raise ValueError(
                f"K and V of layer {layer_idx} came, but layer {self._layers_done} has not attended over this cache: "
                f"is it for another model, or of one without attn_implementation={ATTENTION!r}?"
            )
        self._handed = _Handed(layer_idx, key_states, value_states)
        _current.cache = weakref.ref(self)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch that are in the cache, those among them that are padding for some of the rows."""
        return int(self._real.shape[1])

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """−1: rows are as long as the pool has blocks for."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """``(columns that are seen, 0)``."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Let go of all rows. With ``prefix_caching`` their blocks are found again until they are needed."""
        self._roll_back()
        for sequence in self._rows:
            self._manager.free(sequence)
        self._rows = []
        self._real = np.zeros((0, 0), np.bool_)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns. Raises ``ValueError`` for a positive number, as transformers'
        own caches do."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes how many tokens to remove as a negative number, got {tokens_to_remove}; "
                "to keep n, crop(n - cache.get_seq_length())"
            )
        self._roll_back()
        columns = max(0, self.get_seq_length() + int(tokens_to_remove))
        for sequence, removed in zip(self._rows, self._real[:, columns:].sum(1).tolist(), strict=True):
            sequence.truncate(sequence.num_tokens - removed)
        self._real = self._real[:, :columns]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was. What is wanted twice is forked: blocks are shared, and only
        one that is begun is copied, when it is written to."""
        self._take_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, by index or by a mask of bools, in this order."""
        chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._take_rows(chosen.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one after the other: forks, that share all blocks."""
        self._take_rows([i for i in range(len(self._rows)) for _ in range(repeats)])

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the pool has been there from the beginning."""

    @property
    def batch_size(self) -> int:
        """Rows of the batch, −1 before the first forward."""
        return len(self._rows) or -1

    @property
    def is_compileable(self) -> bool:
        """False: shapes are not static, and the work is not PyTorch's."""
        return False

    @property
    def is_initialized(self) -> bool:
        """True."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """False for each layer: what a window does not see is kept."""
        return [False] * len(self)

    is_linear = is_dummy = is_sliding

    def __len__(self) -> int:
        return len(self._written)

    def __repr__(self) -> str:
        layer = self._written[0]
        return (
            f"PagedCache({len(self)} layers, {len(self._rows)} rows of {self.get_seq_length()} columns, "
            f"{layer.num_blocks} blocks of {layer.block_size} tokens, {layer.dtype} on {layer.device})"
        )

    def __deepcopy__(self, memo: Any) -> "PagedCache":
        raise TypeError(
            "a PagedCache is not copied, but shared: cache.batch_repeat_interleave(n) forks its rows, and "
            "begin(prompts) finds what earlier prompts computed, with prefix_caching=True"
        )

    # What the rows are made of.

    @property
    def _block_size(self) -> int:
        return self._written[0].block_size

    def _take_rows(self, indices: Sequence[int]) -> None:
        self._roll_back()
        rows: list[CachedSequence] = []
        for sequence in [self._rows[i] for i in indices]:
            rows.append(sequence.fork() if sequence in rows else sequence)
        for sequence in set(self._rows).difference(rows):
            self._manager.free(sequence)
        self._rows = rows
        self._real = self._real[list(indices)]

    def _roll_back(self) -> None:
        """Drop the batch that a forward left open."""
        if self._step is not None:
            self._manager.rollback(self._step.batch)
        self._step = self._handed = None
        self._layers_done = 0

    def _as_mask(self, mask: torch.Tensor | None, num_rows: int, num_columns: int) -> _Bools:
        if mask is None:
            return np.ones((num_rows, num_columns), np.bool_)
        if mask.shape != (num_rows, num_columns):
            raise ValueError(
                f"attention_mask must be [rows, columns], ({num_rows}, {num_columns}), those in the cache among them, "
                f"got {tuple(mask.shape)}; what the cache holds stays for longer prompts, or cache.reset() begins anew"
            )
        real: _Bools = mask.cpu().numpy().astype(np.bool_)
        return real

    def _prepare(self, num_rows: int, num_columns: int, mask: torch.Tensor | None) -> _Step:
        """Open the batch of a forward. On a GPU a mask is waited for, since the books are kept on the host."""
        past = self.get_seq_length()
        if past and num_rows != len(self._rows):
            raise ValueError(
                f"the cache holds a batch of {len(self._rows)} rows, but got {num_rows}: cache.reset() begins anew"
            )
        real = self._as_mask(mask, num_rows, past + num_columns)
        if past and (real[:, :past] != self._real).any():
            raise ValueError(
                "attention_mask takes for padding what the cache has for tokens, or the other way round: give the mask "
                "of all columns, as it was, with the new ones at the end; or begin anew, by cache.reset()"
            )
        if not past:
            self.reset()
            self._rows = [self._manager.add([]) for _ in range(num_rows)]
            self._real = np.zeros((num_rows, 0), np.bool_)
        new = real[:, past:]
        places = None if new.all() else torch.as_tensor(np.flatnonzero(new), device=self._device)
        batch = self._manager.prepare(dict(zip(self._rows, self._tokens(new), strict=True)))
        prefix = self._common_blocks()
        num_blocks = prefix.shape[1]
        rest = batch.block_tables[:, num_blocks:], batch.seq_lens - num_blocks * self._block_size, batch.cu_seqlens
        return _Step(batch, new, places, prefix, rest)

    def _common_blocks(self) -> npt.NDArray[np.int32]:
        """The blocks that all rows begin with, before all new tokens, if to read them once saves enough."""
        most = min(sequence.num_tokens for sequence in self._rows) // self._block_size
        if (len(self._rows) - 1) * most * self._block_size < _WORTH:
            return np.zeros((1, 0), np.int32)
        tables = np.stack([sequence.block_table[:most] for sequence in self._rows])
        alike = np.append((tables == tables[0]).all(0), False)
        common = int(alike.argmin())
        worth = (len(self._rows) - 1) * common * self._block_size >= _WORTH
        return tables[:1, : common if worth else 0]

    def _tokens(self, new: _Bools) -> list[npt.NDArray[np.int64]]:
        """The token ids of each row. What is not known, or does not stand where it would in a prompt of its own, is a
        number of its own, lest it be found."""
        counts = new.sum(1)
        ids, positions, self._ids, self._positions = self._ids, self._positions, None, None
        if not self._prefix_caching:
            return [np.zeros(count, np.int64) for count in counts]
        first, self._num_unknown = self._num_unknown, self._num_unknown + int(counts.sum())
        tokens = np.split(-1 - np.arange(first, self._num_unknown), np.cumsum(counts)[:-1])
        if ids is None or ids.shape != new.shape or (positions is not None and positions.ndim != 2):
            return tokens
        on_host = ids.cpu().numpy()
        # Without positions, transformers counts columns, padding among them.
        stand = self.get_seq_length() + np.arange(new.shape[1])[None] if positions is None else positions.cpu().numpy()
        for i, (sequence, stands) in enumerate(zip(self._rows, np.broadcast_to(stand, new.shape), strict=True)):
            if np.array_equal(stands[new[i]], sequence.num_tokens + np.arange(counts[i])):
                tokens[i] = on_host[i, new[i]]
        return tokens

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, **options: Any
    ) -> torch.Tensor:
        """Write what update was given, and attend: ``[rows, columns, num_heads, v_head_dim]``."""
        handed, self._handed = self._handed, None
        if handed is None or module.layer_idx != handed.layer or (key is not handed.key and not self._is_latent):
            raise _no_cache()
        self._check_fits(handed, query)
        num_rows, _, num_columns, _ = query.shape
        if self._step is None:
            self._step = self._prepare(num_rows, num_columns, mask)
        batch, new, places, prefix, rest = self._step

        def packed(states: torch.Tensor) -> Any:  # [rows, heads, columns, dim] as [num_tokens, heads, dim]
            tokens = states.transpose(1, 2).flatten(0, 1)
            return (tokens if places is None else tokens[places]).detach()

        self._written[handed.layer].update(packed(handed.key), packed(handed.value), batch.slot_mapping)
        layer, queries, options["max_seqlen_q"] = self._attended[handed.layer], packed(query), batch.max_seqlen_q
        if prefix.size and options["window_size"] == (-1, -1):
            behind = layer.attend(queries, *rest, return_lse=True, **options)
            length, count = prefix.shape[1] * layer.block_size, batch.num_tokens
            options.update(sinks=None, max_seqlen_q=count, causal=False, return_lse=True)
            shared = layer.attend(queries, prefix, [length], [0, count], **options)
            out, _ = merge_attention_states(*shared, *behind)
        else:
            out = layer.attend(queries, batch.block_tables, batch.seq_lens, batch.cu_seqlens, **options)
        self._layers_done += 1
        if self._layers_done == len(self):
            real = np.concatenate([self._real, new], axis=1)
            self._manager.commit(batch)
            self._real, self._step, self._layers_done = real, None, 0
        if places is not None:
            tokens, out = out, query.new_zeros((num_rows * num_columns, *out.shape[1:]))
            out[places] = tokens
        return out.view(num_rows, num_columns, *out.shape[1:])

    @property
    def _is_latent(self) -> bool:
        return self._written is not self._attended

    def _check_fits(self, handed: _Handed, query: torch.Tensor) -> None:
        layer = self._written[handed.layer]
        if query.device != self._device:
            raise ValueError(
                f"the cache is on {self._device}, where the model was when it was made, but the model's tensors are on "
                f"{query.device}: make a PagedCache after model.to(…)"
            )
        for name, tensor, dim in (("K", handed.key, layer.head_dim), ("V", handed.value, layer.v_head_dim)):
            if tensor.dtype != self._dtype or tensor.shape[1] != layer.num_heads or tensor.shape[3] != dim:
                raise ValueError(
                    f"the cache has {self._dtype} {name} of {layer.num_heads} heads of {dim}, as the model and its "
                    f"config said, but layer {handed.layer} has {tensor.dtype} of {tensor.shape[1]} heads of "
                    f"{tensor.shape[3]}: layers that differ do not fit in one PagedCache"
                )


# The attention, as transformers calls it.


@torch.compiler.disable(reason="attention is computed by NumPy or CuPy")
def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of ``query``, ``[rows, num_heads, columns, head_dim]``, over the cache whose ``update`` was just
    called: ``[rows, columns, num_heads, v_head_dim]``, zeros where there is padding, and no weights."""
    handed, _current.cache = _current.cache, None
    cache = None if handed is None else handed()
    if cache is None:
        raise _no_cache()
    if module.config is not cache._config:
        raise ValueError(
            f"this PagedCache was made for another model, of {len(cache)} layers with "
            f"{cache._written[0].num_heads} KV heads of {cache._written[0].head_dim}: "
            "make a PagedCache(model, num_blocks) for each"
        )
    if torch.is_grad_enabled() and query.requires_grad:
        raise RuntimeError("attention over a PagedCache has no gradient: call the model under torch.no_grad()")
    if dropout:
        raise ValueError(f"attention over a PagedCache has no dropout, got {dropout}: call model.eval()")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not causal or position_bias is not None:
        raise ValueError(f"{ATTENTION!r} is causal, and has no position_bias; {type(module).__name__} wants another")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [rows, columns], which says what is padding, got {tuple(attention_mask.shape)}"
        )
    with _stream(query.device):
        options = {
            "softmax_scale": scaling,
            "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, 0),
            "softcap": softcap or 0.0,
            "sinks": None if s_aux is None else s_aux.detach().float(),
        }
        if not cache._is_latent:
            return cache._attend(module, query, key, attention_mask, **options), None
        # DeepSeek's: the model's code has made K and V of the new latents, but here all heads read the latents
        # themselves, and what would make K and V of them acts on the query and on the result instead.
        if type(module.kv_b_proj) is not torch.nn.Linear:
            raise ValueError(
                "of latents, the weight of kv_b_proj is used itself, so that it must be a torch.nn.Linear, got "
                f"{type(module.kv_b_proj).__name__}: merge an adapter, or dequantize this layer"
            )
        rank, nope = module.kv_lora_rank, module.qk_nope_head_dim
        to_k, to_v = module.kv_b_proj.weight.view(query.shape[1], -1, rank).split([nope, module.v_head_dim], dim=1)
        latent = torch.cat([query[..., :nope] @ to_k, query[..., nope:]], dim=-1)
        out = cache._attend(module, latent, key, attention_mask, **options)
        return torch.einsum("bshl,hvl->bshv", out, to_v), None


def _mask(
    *,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of padding as it came: attention itself is causal, and knows the window."""
    if use_vmap or not allow_is_causal_skip:
        raise ValueError(
            f"{ATTENTION!r} knows causal masks, windows and padding; this model adds another, as for images or blocks"
        )
    return attention_mask


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)


def _no_cache() -> ValueError:
    return ValueError(
        f"attn_implementation={ATTENTION!r} attends over a PagedCache: give the model one, "
        f"{_KEYWORD}=PagedCache(model, num_blocks), or call model.set_attn_implementation('sdpa'). Some models and "
        "options put another cache in its place (guidance_scale, assistant_early_exit, Phi-3's longrope past its "
        "original length), or change K behind it; a model of images wants set_attn_implementation({'text_config': …})"
    )


def _rope_types(config: Any) -> set[Any]:
    of_all = getattr(config, "rope_parameters", None) or {}
    return {each.get("rope_type") for each in (of_all, *of_all.values()) if isinstance(each, dict)}


def _check_layers(config: Any) -> None:
    """That all layers are of a kind that a pool of blocks can hold."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "sliding_attention"}
    if getattr(config, "attention_chunk_size", None) is not None and getattr(config, "layer_types", None) is None:
        kinds.add("chunked_attention")
    if getattr(config, "num_kv_shared_layers", None) or getattr(config, "kv_sharing_modes", None):
        kinds.add("layers that share K and V")
    if config.is_encoder_decoder:
        kinds.add("cross-attention")
    if kinds:
        raise ValueError(
            f"a PagedCache holds layers of full or sliding attention; this model has {', '.join(sorted(kinds))}"
        )


_NOT_TEXT = ("pixel_", "image", "video", "audio", "input_features")
"""Inputs of a forward that make of one token id different K and V."""

_telling_ids: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""The models that have the two hooks."""


def _cache_of(kwargs: dict[str, Any]) -> PagedCache | None:
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the old name is still taken
    return cache if isinstance(cache, PagedCache) else None


def _tell_ids(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (cache := _cache_of(kwargs)) is None:
        return
    cache._ids = cache._positions = None
    if not any(value is not None and name.startswith(_NOT_TEXT) for name, value in kwargs.items()):
        cache._ids = kwargs.get("input_ids", args[0] if args else None)
        cache._positions = kwargs.get("position_ids")


def _forget_ids(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if (cache := _cache_of(kwargs)) is not None:
        cache._ids = cache._positions = None


def _stream(device: torch.device) -> AbstractContextManager[Any]:
    """Where CuPy's work goes to PyTorch's current stream."""
    if device.type == "cpu":
        return nullcontext()
    if device.type != "cuda":
        raise ValueError(f"a PagedCache is on a CPU or on a CUDA GPU, but the model is on {device}")
    stream: AbstractContextManager[Any] = import_module("cupy").cuda.ExternalStream(
        torch.cuda.current_stream(device).cuda_stream, device.index
    )
    return stream
