"""What a manager finds by its tokens, and its sequences that have names, in a file, and back from one.

>>> import os, tempfile
>>> import numpy as np
>>> from cupy_pagedkv import KVCacheManager, LayeredPagedKVCache
>>> cache = LayeredPagedKVCache(2, 64, 4, num_kv_heads=1, head_dim=8, dtype="float16", device="cpu")
>>> manager = KVCacheManager(cache)
>>> chat = manager.add([11, 12, 13, 14, 15, 16], name="chat")
>>> with manager.prepare({chat: chat.remaining}) as batch:
...     cache.update_all(np.ones((2, 6, 1, 8), np.float16), np.ones((2, 6, 1, 8), np.float16), batch.slot_mapping)
>>> larger = LayeredPagedKVCache(2, 256, 4, num_kv_heads=1, head_dim=8, dtype="float16", device="cpu")
>>> with tempfile.TemporaryDirectory() as folder:
...     manager.save(os.path.join(folder, "cache.safetensors"), fingerprint="llama, revision 3")
...     loaded = KVCacheManager.load(larger, os.path.join(folder, "cache.safetensors"), fingerprint="llama, revision 3")
>>> loaded.named["chat"].num_tokens, loaded.add([11, 12, 13, 14, 19]).num_cached_tokens
(6, 4)

A file is in the format of safetensors: the length of a header, the header in JSON, and the tensors that it lists, which
are these. A *run* is some blocks one behind the other, as in :mod:`~cupy_pagedkv.bookkeeping.pool`; m of them have n
blocks, and s sequences have a last block that is not full.

========== ===================== =======================================================================================
runs       I32 ``[m, 2]``        the run before, or −1 − the salt's place; how many blocks
order      I32 ``[m]``           the runs, the one to be evicted first first
tokens     I32 ``[n + s, size]`` of each block, those of a run one behind the other; then of those that are not full
prompts    I32 ``[…]``           of the sequences, one behind the other
digests    U8 ``[n + s, 16]``    of each block, the digest before it, or its salt, and its tokens, K and V
blocks     U8 ``[n + s, …]``     of each block ``[2 (K and V), num_layers, size, num_kv_heads, head_dim]``
========== ===================== =======================================================================================

A run comes behind the one before it, so that no circle can be written down. The header's ``__metadata__`` has the rest,
in JSON, under ``index``, and its ``checksum``. All hashes are XXH3 of 128 bits: they find damage, and are no signature.
"""

import contextlib
import errno
import functools
import importlib
import json
import math
import os
import secrets
import shutil
import threading
from collections.abc import Mapping
from io import FileIO
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ..bookkeeping.allocator import OutOfBlocksError
from ..bookkeeping.dtypes import name_of
from ..bookkeeping.pool import BlockPool, Run
from ..bookkeeping.ranges import runs_of
from ..bookkeeping.rows import SequenceRows
from ..bookkeeping.salts import Salt, as_text, from_text
from ..devices.backend import backend_of
from .batch import Batch
from .cache import LayeredPagedKVCache
from .sequence import CachedSequence
from .tier import BlockMover, BlockPacker

__all__ = ["DamagedFileError", "load", "save"]

CHUNK = 1 << 24
"""Bytes of K and V, about, that are in host memory at once; never less than a block."""

_VERSION = 1
_MAX_HEADER = 100_000_000  # what safetensors reads
_NO_DIGEST = "0" * 32

_Bytes: TypeAlias = npt.NDArray[np.uint8]
_Ints: TypeAlias = npt.NDArray[np.int64]
_Tokens: TypeAlias = npt.NDArray[np.int32]


class DamagedFileError(ValueError):
    """A file is not, or not as a whole, what :meth:`KVCacheManager.save` wrote."""

    __module__ = "cupy_pagedkv"  # where users import it from, and so what a traceback says


class Manager(Protocol):
    """What is asked of a :class:`~cupy_pagedkv.KVCacheManager`."""

    _cache: LayeredPagedKVCache
    _pool: BlockPool
    _rows: SequenceRows
    _place: Any
    _prefix_caching: bool
    _mover: BlockMover | None

    @property
    def named(self) -> dict[str, CachedSequence]: ...
    def add(self, tokens: _Tokens, *, salt: Salt = None, name: str | None = None) -> CachedSequence: ...
    def prepare(self, new_tokens: Mapping[CachedSequence, _Tokens]) -> Batch: ...
    def commit(self, batch: Batch) -> None: ...
    def free(self, sequence: CachedSequence) -> None: ...


class _Named(NamedTuple):
    """A sequence in a file."""

    name: str
    run: int
    """In which its known blocks end, or −1 − the place of its salt."""
    num_known: int
    """How many of its blocks are those of runs: the full ones, and one more where it was truncated within that."""
    num_tokens: int
    num_cached: int
    prompt: int
    """How many tokens."""
    checksum: str
    """Of the prompt."""
    parked: bool
    """Whether all of it was on the host."""


class _Index(NamedTuple):
    """What a file has, and how much of it."""

    block_size: int
    num_runs: int
    num_blocks: int
    """Without the last ones of sequences that are not full."""
    salts: list[Salt]
    named: list[_Named]
    checksum: str
    """Of all tensors but ``blocks``, each of which has its own."""

    @property
    def num_begun(self) -> int:
        """How many of the sequences have a last block that is not full."""
        return sum(sequence.num_tokens > sequence.num_known * self.block_size for sequence in self.named)

    def tensors(self, block_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each, in the order of the file: the small ones first, or a file that is cut short would
        lack what its blocks are."""
        total = self.num_blocks + self.num_begun
        return {
            "runs": ("I32", (self.num_runs, 2)),
            "order": ("I32", (self.num_runs,)),
            "tokens": ("I32", (total, self.block_size)),
            "prompts": ("I32", (sum(sequence.prompt for sequence in self.named),)),
            "digests": ("U8", (total, 16)),
            "blocks": ("U8", (total, block_bytes)),
        }


class _Part(NamedTuple):
    """A run in a file."""

    parent: int
    start: int
    """The place of its first block."""
    first: int
    """Blocks before it."""
    end: int
    """Blocks before it and in it."""


class _Paths:
    """Where the blocks of a prefix are in a file. A run that is damaged, or behind one that is, is None."""

    def __init__(self) -> None:
        self.parts: list[_Part | None] = []
        self.num_blocks = 0

    def append(self, parent: int, count: int) -> None:
        """One more run; ``parent`` is one of those there, or −1 − the place of a salt."""
        before = self.parts[parent] if parent >= 0 else _Part(0, 0, 0, 0)
        self.parts.append(before and _Part(parent, self.num_blocks, before.end, before.end + count))
        self.num_blocks += count

    def lose(self, count: int) -> None:
        """One more run, which is damaged."""
        self.parts.append(None)
        self.num_blocks += count

    def has(self, run: int, count: int) -> bool:
        """Whether there is a prefix of ``count`` blocks that ends in a run, or before it."""
        part = self.parts[run] if run >= 0 else _Part(0, 0, 0, 0)
        return part is not None and count <= part.end

    def find(self, run: int, count: int) -> tuple[_Ints, int]:
        """The places of the first ``count`` blocks up to the end of a run, and that of the salt before them."""
        places = []
        while run >= 0:
            part = self.parts[run]
            if part is None:
                break
            places.append(part.start + np.arange(min(count, part.end) - part.first))  # of none, if it is behind them
            run = part.parent
        return np.concatenate([np.empty(0, np.int64), *places[::-1]]), -1 - run

    def before(self, index: _Index) -> list[int]:
        """The place of the block before each, or −1 − that of a salt."""
        before = list(range(-1, self.num_blocks - 1))
        for part in self.parts:
            if part is not None:
                parent = self.parts[part.parent] if part.parent >= 0 else None
                before[part.start] = part.parent if parent is None else parent.start + parent.end - parent.first - 1
        before += [-1] * (index.num_blocks - len(before))  # of lost ones, which nobody asks for
        for sequence in index.named:
            if sequence.num_tokens > sequence.num_known * index.block_size:
                there = self.has(sequence.run, sequence.num_known)
                places, salt = self.find(sequence.run, sequence.num_known if there else 0)
                before.append(int(places[-1]) if len(places) else -1 - salt)
        return before


class _Hashes:
    """XXH3 of 128 bits."""

    def __init__(self) -> None:
        self._new = _module("xxhash").xxh3_128

    def checksum(self, *parts: Any) -> str:
        """Of all parts, one behind the other, in hexadecimal digits."""
        hashed = self._new()
        for part in parts:
            hashed.update(part)
        return str(hashed.hexdigest())

    def of_salt(self, salt: Salt) -> bytes:
        """What stands before the first block."""
        return bytes(self._new(json.dumps(as_text(salt)).encode()).digest())

    def of_block(self, before: bytes, tokens: _Tokens, block: _Bytes) -> bytes:
        """Its digest, with that of the block before."""
        hashed = self._new(before)
        hashed.update(tokens)
        hashed.update(block)
        return bytes(hashed.digest())


def save(manager: Manager, path: str | os.PathLike[str], *, fingerprint: str | None) -> None:
    """:meth:`KVCacheManager.save`."""
    hashes, tqdm = _Hashes(), _with_own_lock(_module("tqdm").tqdm)
    _check_fingerprint(fingerprint)
    if not manager._prefix_caching:
        raise ValueError("a manager with prefix_caching=False keeps no tokens, so there is nothing to save")
    path = os.path.realpath(os.fsdecode(path))  # where a link leads, and not the link, is what is replaced
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no regular file, and would be replaced by one; save to another path")
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "there is no folder for", path)
    temporary = os.path.join(folder, f".kvcache-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            _write(manager, file, fingerprint, hashes, tqdm)
            file.flush()
            if os.path.exists(path):  # whose readers may be few
                shutil.copymode(path, temporary)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _in_order(pool: BlockPool) -> list[Run]:
    """All runs, the one to be lost first first: the cached ones, on the host and in the pool, then those that sequences
    own, each behind its children."""
    runs = [*pool._roots.values()]
    num_roots = len(runs)
    for run in runs:  # which grows
        runs += run.children.values()
    cached = sorted([*pool._host_line, *pool._line], key=lambda run: run.used)
    return [*cached, *(run for run in runs[num_roots:][::-1] if run.newer is None)]


def _read(manager: Manager, blocks: npt.NDArray[np.int32]) -> _Bytes:
    """K and V of blocks, wherever they are, as bytes: ``[n, 2 * num_layers * block_size * num_kv_heads * …]``."""
    cache, packer = manager._cache, BlockPacker(manager._cache)
    backend = backend_of(("the cache",), cache[0].k_cache)
    in_pool = blocks < cache.num_blocks
    packed = backend.empty((int(np.count_nonzero(in_pool)), packer.num_bytes), np.dtype(np.uint8), manager._place)
    packer.pack(blocks[in_pool], packed)
    of_pool: _Bytes = backend.asnumpy(packed)
    if manager._mover is None or in_pool.all():
        return of_pool
    out = np.empty((len(blocks), packer.num_bytes), np.uint8)
    out[in_pool], out[~in_pool] = of_pool, manager._mover.read(blocks[~in_pool])
    return out


def _write_rows(manager: Manager, rows: _Bytes, batch: Batch) -> None:
    """K and V of a batch's tokens: ``[2, num_layers, num_tokens, bytes of a row]``."""
    cache, dtype = manager._cache, manager._cache[0].dtype
    backend = backend_of(("the cache",), cache[0].k_cache)
    shape = (*rows.shape[1:3], cache[0].num_heads, cache[0].head_dim)
    keys, values = (
        backend.from_numpy(np.ascontiguousarray(tensor).reshape(-1), manager._place).view(dtype).reshape(shape)
        for tensor in rows
    )
    cache.update_all(keys, values, batch.slot_mapping)


def _write(manager: Manager, file: BinaryIO, fingerprint: str | None, hashes: _Hashes, tqdm: Any) -> None:
    # Not by safetensors' own writer, which wants all tensors in memory: what is saved can be larger than that.
    index, paths, small, blocks, begun = _contents(manager, hashes)
    cache, block_bytes = manager._cache, _block_bytes(manager._cache, index.block_size)

    def head() -> bytes:
        return _header(index, _geometry(cache, fingerprint), index.tensors(block_bytes), hashes)

    # Digests and checksums are known when all blocks have been read once, and take the places that were kept for them.
    length = file.write(head())
    if length > _MAX_HEADER:
        raise ValueError(
            f"names and salts take {length} bytes, and a file has room for {_MAX_HEADER}; use shorter ones"
        )
    for tensor in small.values():
        file.write(tensor)
    before, salts = paths.before(index), [hashes.of_salt(salt) for salt in index.salts]
    tokens, digests = small["tokens"], small["digests"]
    step = max(1, CHUNK // block_bytes)
    with tqdm(total=blocks.size * block_bytes, desc="saving", unit="B", unit_scale=True, disable=None) as bar:
        for start in range(0, len(blocks), step):
            chunk = _read(manager, blocks[start : start + step])
            for i, block in enumerate(chunk, start):
                if i >= index.num_blocks:  # what others have left behind the last token is nobody's business
                    rows = block.reshape(2, len(cache), index.block_size, -1)
                    rows[:, :, begun[i - index.num_blocks] :] = 0
                previous = digests[before[i]] if before[i] >= 0 else salts[-1 - before[i]]
                digests[i] = np.frombuffer(hashes.of_block(bytes(previous), tokens[i], block), np.uint8)
            file.write(chunk.data)
            bar.update(chunk.nbytes)
    index = index._replace(checksum=hashes.checksum(*small.values()))
    file.seek(0)
    file.write(head())
    for tensor in small.values():
        file.write(tensor)


def _contents(
    manager: Manager, hashes: _Hashes
) -> tuple[_Index, _Paths, dict[str, Any], npt.NDArray[np.int32], list[int]]:
    """What goes into a file: the index, where the blocks are in it, the small tensors but for the digests, which of the
    pool's blocks it has, and how many tokens the last ones have that are not full."""
    pool, rows, size = manager._pool, manager._rows, manager._cache.block_size
    salt_of = {root: salt for (_, salt), root in pool._roots.items()}
    salts: dict[Run, int] = {}
    runs: dict[Run, int] = {}
    paths = _Paths()

    def place(run: Run) -> int:
        return runs[run] if run.parent is not None else -1 - salts.setdefault(run, len(salts))

    order = _in_order(pool)
    for end in order:
        path = [end]
        while path[-1] not in runs and path[-1].parent is not None:
            path.append(path[-1].parent)
        for run in path[-2::-1]:
            assert run.parent is not None
            paths.append(place(run.parent), len(run.blocks))
            runs[run] = len(runs)
    named, prompts, last, tails, begun = [], [], [], [np.empty((0, size), np.int32)], []
    for name, sequence in manager.named.items():
        row = sequence._row
        length, known = int(rows.lengths[row]), int(rows.known[row])
        rest = length - known * size
        prompts.append(sequence._prompt.astype("<i4"))
        checksum = hashes.checksum(prompts[-1])
        where = place(sequence._run.at(known))
        parked = 0 < sequence.num_host_blocks == len(sequence.block_table)
        named.append(_Named(name, where, known, length, sequence.num_cached_tokens, len(prompts[-1]), checksum, parked))
        if rest > 0:
            last.append(rows.blocks(row)[known : known + 1])
            tail = np.zeros((1, size), np.int32)
            tail[0, :rest] = rows.tail(row)[:rest]
            tails.append(tail)
            begun.append(rest)
    parents = [(part.parent, part.end - part.first) for part in paths.parts if part is not None]
    tokens = [np.frombuffer(run.tokens, np.int32).reshape(-1, size) for run in runs]
    small = {
        "runs": np.array(parents, "<i4").reshape(-1, 2),
        "order": np.array([runs[run] for run in order], "<i4"),
        "tokens": np.concatenate([*tokens, *tails]).astype("<i4", copy=False),
        "prompts": np.concatenate([np.empty(0, "<i4"), *prompts]),
        "digests": np.zeros((paths.num_blocks + len(begun), 16), np.uint8),
    }
    blocks = np.concatenate([np.empty(0, np.int32), *(np.array(run.blocks, np.int32) for run in runs), *last])
    kept = [salt_of[root] for root in salts]
    return _Index(size, len(runs), paths.num_blocks, kept, named, _NO_DIGEST), paths, small, blocks, begun


class _Reader:
    """The blocks of an open file, each compared with its digest when it is read."""

    def __init__(
        self,
        raw: FileIO,
        offset: int,
        index: _Index,
        paths: _Paths,
        small: dict[str, Any],
        hashes: _Hashes,
        block_bytes: int,
        salvage: bool,
        bar: Any,
    ) -> None:
        self.index = index
        self.paths = paths
        self.tokens: _Tokens = small["tokens"]
        self.prompts: _Tokens = small["prompts"]
        self.hashes = hashes
        self.salvage = salvage
        self._raw = raw
        self._offset = offset
        self._block_bytes = block_bytes
        self._bar = bar
        self._digests: _Bytes = small["digests"]
        self._before = paths.before(index)
        self._salts = [hashes.of_salt(salt) for salt in index.salts]
        self._available = max(0, os.fstat(raw.fileno()).st_size - offset) // block_bytes
        self._is_whole = np.zeros(len(self.tokens), np.bool_)
        self._damaged: set[int] = set()

    @property
    def unread(self) -> _Ints:
        """Places of the blocks that nobody has asked for."""
        return np.flatnonzero(~self._is_whole)

    def read(self, places: _Ints) -> _Bytes:
        """The blocks at ``places``, up to the first that is damaged. Unless that is to be salvaged, it raises."""
        wanted = places.tolist()
        count = next((i for i, p in enumerate(wanted) if p >= self._available or p in self._damaged), len(wanted))
        blocks = np.empty((count, self._block_bytes), np.uint8)
        for run in runs_of(places[:count]):
            _read_into(blocks[run], self._raw, self._offset + wanted[run.start] * self._block_bytes)
        for i, place in enumerate(wanted[:count]):
            before = self._before[place]
            previous = bytes(self._digests[before]) if before >= 0 else self._salts[-1 - before]
            if self.hashes.of_block(previous, self.tokens[place], blocks[i]) != bytes(self._digests[place]):
                self._damaged.add(place)
                count = i
                break
            if not self._is_whole[place]:
                self._is_whole[place] = True
                self._bar.update(self._block_bytes)
        if count < len(wanted) and not self.salvage:
            raise DamagedFileError(f"block {wanted[count]} of {len(self.tokens)} in the file is damaged")
        return blocks[:count]


def load(manager: Manager, path: str | os.PathLike[str], *, fingerprint: str | None, salvage: bool) -> None:
    """:meth:`KVCacheManager.load`, into a manager that has nothing yet."""
    hashes, tqdm = _Hashes(), _with_own_lock(_module("tqdm").tqdm)
    safetensors = None if salvage else _module("safetensors")
    _check_fingerprint(fingerprint)
    cache, path = manager._cache, os.fsdecode(path)
    with open(path, "rb", buffering=0) as raw:
        size = os.fstat(raw.fileno()).st_size
        if size < 8:
            raise DamagedFileError(f"the file has {size} bytes, and not even the length of a header")
        if safetensors is not None:
            try:
                with safetensors.safe_open(path, framework="numpy"):
                    pass
            except safetensors.SafetensorError as error:
                raise DamagedFileError(f"the file is not in the format of safetensors: {error}") from None
        entries, metadata, start = _read_header(raw, size)
        index = _read_index(metadata, _geometry(cache, fingerprint), hashes)
        block_bytes = _block_bytes(cache, index.block_size)
        tensors = index.tensors(block_bytes)
        offsets = _offsets(entries, tensors, start)
        small = {name: _read_tensor(raw, offsets[name], size, name, *tensors[name]) for name in [*tensors][:-1]}
        if not salvage and hashes.checksum(*small.values()) != index.checksum:
            raise DamagedFileError("the runs, tokens, prompts or digests in the file are damaged")
        paths = _read_runs(small["runs"], index, salvage)
        order = small["order"].tolist()
        if sorted(order) != list(range(index.num_runs)):
            if not salvage:
                raise DamagedFileError(f"the order in the file is not one of its {index.num_runs} runs")
            order = list(range(index.num_runs))
        if not salvage:
            _check_siblings(paths, small["tokens"])
            alike = manager._prefix_caching and index.block_size == cache.block_size
            if alike and index.num_blocks + index.num_begun > cache.num_blocks + manager._pool.num_places:
                raise _no_room(index, manager)  # before all of it is read
        num_bytes = _num_bytes(*tensors["blocks"])
        with tqdm(total=num_bytes, desc="loading", unit="B", unit_scale=True, disable=None) as bar:
            reader = _Reader(raw, offsets["blocks"], index, paths, small, hashes, block_bytes, salvage, bar)
            if manager._prefix_caching:
                _load_runs(manager, reader, order)
            _load_named(manager, reader)
            if not salvage:
                unread, step = reader.unread, max(1, CHUNK // block_bytes)  # what fills no block of another size
                for i in range(0, len(unread), step):
                    reader.read(unread[i : i + step])


def _load_runs(manager: Manager, reader: _Reader, order: list[int]) -> None:
    """Let all be found that is whole, as if prompts had come and gone in this order."""
    size = manager._cache.block_size
    for run in order:
        part = reader.paths.parts[run]
        if part is not None:
            places, salt = reader.paths.find(run, part.end)
            tokens = reader.tokens[places].reshape(-1)
            prompt = np.append(tokens, np.int32(0))  # whose last token is never found
            sequence = manager.add(prompt, salt=reader.index.salts[salt])
            _restore(manager, reader, sequence, tokens, places, len(tokens) // size * size)
            manager.free(sequence)


def _load_named(manager: Manager, reader: _Reader) -> None:
    """Add the sequences that have names, all of which is whole."""
    index, paths = reader.index, reader.paths
    next_begun, next_prompt = index.num_blocks, 0
    for name, run, num_known, num_tokens, num_cached, num_prompt, checksum, parked in index.named:
        begun, prompt = next_begun, reader.prompts[next_prompt : next_prompt + num_prompt]
        next_begun += num_tokens > num_known * index.block_size
        next_prompt += num_prompt
        if not paths.has(run, num_known) or reader.hashes.checksum(prompt) != checksum:
            if reader.salvage:
                continue
            raise DamagedFileError(f"sequence {name!r} in the file has blocks that are not there, or another prompt")
        places, salt = paths.find(run, num_known)
        places = np.append(places, np.arange(begun, next_begun))
        tokens = reader.tokens[places].reshape(-1)[: max(num_tokens, num_known * index.block_size)]
        sequence = manager.add(np.append(tokens, np.int32(0)), salt=index.salts[salt], name=name)
        _restore(manager, reader, sequence, tokens, places, len(tokens))
        if sequence.num_tokens < len(tokens):
            manager.free(sequence)
            continue
        if num_tokens < len(tokens):
            sequence.truncate(num_tokens)
        if parked and manager._mover is not None:
            try:
                sequence.offload()
            except OutOfBlocksError:
                raise _no_room(index, manager) from None
        sequence._prompt, sequence._num_cached = prompt.astype(np.int32), num_cached
        sequence._prompt.flags.writeable = False


def _restore(
    manager: Manager, reader: _Reader, sequence: CachedSequence, tokens: _Tokens, places: _Ints, end: int
) -> None:
    """Let a sequence grow to ``end`` of its tokens, whose K and V are at ``places``, or to what is damaged before."""
    index = reader.index
    cache = manager._cache
    row_bytes, at = _row_bytes(cache), sequence.num_tokens
    step = max(1, CHUNK // (2 * len(cache) * row_bytes * cache.block_size)) * cache.block_size
    while at < end:
        stop = min(end, at + step)
        first = at // index.block_size
        wanted = places[first : -(-stop // index.block_size)]
        blocks = reader.read(wanted)
        if len(blocks) < len(wanted):
            end = stop = (first + len(blocks)) * index.block_size
            if stop <= at:
                break
        try:
            batch = manager.prepare({sequence: tokens[at:stop]})
        except OutOfBlocksError:
            raise _no_room(index, manager) from None
        # On the host, places of what comes back while a later run is loaded are missing, and it need not be too small.
        if manager._pool.lost and not (manager._pool.num_places and index.block_size == cache.block_size):
            raise _no_room(index, manager)
        rows = blocks.reshape(len(blocks), 2, len(cache), index.block_size, row_bytes).transpose(1, 2, 0, 3, 4)
        rows = rows.reshape(2, len(cache), -1, row_bytes)
        _write_rows(manager, rows[:, :, at - first * index.block_size : stop - first * index.block_size], batch)
        manager.commit(batch)
        at = stop


def _header(index: _Index, geometry: dict[str, Any], tensors: dict[str, Any], hashes: _Hashes) -> bytes:
    """The length of a header, and the header."""
    text = json.dumps({
        "format": "cupy_pagedkv",
        "version": _VERSION,
        **geometry,
        "block_size": index.block_size,
        "num_runs": index.num_runs,
        "num_blocks": index.num_blocks,
        "salts": [as_text(salt) for salt in index.salts],
        "sequences": [sequence._asdict() for sequence in index.named],
        "checksum": index.checksum,
    })  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"index": text, "checksum": hashes.checksum(text.encode())}}
    end = 0
    for name, (kind, shape) in tensors.items():
        begin, end = end, end + _num_bytes(kind, shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _read_header(raw: FileIO, size: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The tensors that it lists, the metadata, and where the data begins."""
    length = np.empty(1, "<u8")
    _read_into(length, raw, 0)
    num_bytes = int(length[0])
    if num_bytes > min(_MAX_HEADER, size - 8):
        raise DamagedFileError(f"the file claims a header of {num_bytes} bytes, and has {size - 8}")
    encoded = np.empty(num_bytes, np.uint8)
    _read_into(encoded, raw, 8)
    entries = _parsed("the header", bytes(encoded))
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict):
        raise DamagedFileError("the header has no __metadata__; this is no file that a manager saved")
    return entries, metadata, 8 + num_bytes


def _read_index(metadata: dict[str, Any], geometry: dict[str, Any], hashes: _Hashes) -> _Index:
    """What the file says that it has, if it can be loaded into a cache of this geometry."""
    text = _field(metadata, "the header", "index", str)
    if not text.isascii() or hashes.checksum(text.encode()) != _field(metadata, "the header", "checksum", str):
        raise DamagedFileError("the index in the header is damaged")
    what = "the index"
    fields = _parsed(what, text.encode())
    if fields.get("format") != "cupy_pagedkv":
        raise DamagedFileError(f"the index is of the format {fields.get('format')!r}, expected 'cupy_pagedkv'")
    version = _number(fields, what, "version")
    if version != _VERSION:
        raise ValueError(f"the file has version {version} of the format, and version {_VERSION} is read; save it again")
    for name, here in geometry.items():
        saved = fields.get(name)
        if type(saved) is not type(here) and not (name == "fingerprint" and (saved is None or type(saved) is str)):
            raise DamagedFileError(f"the index has the {name} {saved!r}")
        if saved != here:
            side = "load was given" if name == "fingerprint" else "the cache has"
            raise ValueError(f"the file has {name} {saved!r}, {side} {here!r}; they must be the same")
    size = _number(fields, what, "block_size", 1, 2**31 - 1)
    num_runs, num_blocks = _number(fields, what, "num_runs"), _number(fields, what, "num_blocks")
    salts = []
    for text in _field(fields, what, "salts", list):
        try:
            salts.append(from_text(text))
        except ValueError as error:
            raise DamagedFileError(f"the index has the salt {text!r:.99}") from error
    if len({(type(salt), salt) for salt in salts}) < len(salts):
        raise DamagedFileError("the index has a salt twice")
    named = []
    for i, sequence in enumerate(_field(fields, what, "sequences", list)):
        who = f"sequence {i} in the index"
        prompt, num_tokens = _number(sequence, who, "prompt"), _number(sequence, who, "num_tokens")
        full = num_tokens // size
        named.append(
            _Named(
                _field(sequence, who, "name", str),
                _number(sequence, who, "run", -len(salts), num_runs - 1),
                _number(sequence, who, "num_known", full, -(-num_tokens // size)),
                num_tokens,
                _number(sequence, who, "num_cached", 0, max(0, prompt - 1)),
                prompt,
                _field(sequence, who, "checksum", str),
                _field(sequence, who, "parked", bool),
            )
        )
    if len({sequence.name for sequence in named}) < len(named):
        raise DamagedFileError("the index has a sequence's name twice")
    return _Index(size, num_runs, num_blocks, salts, named, _field(fields, what, "checksum", str))


def _offsets(entries: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]], start: int) -> dict[str, int]:
    """Where in the file each tensor begins, if the header lists those that the index says."""
    if entries.keys() != tensors.keys():
        raise DamagedFileError(f"the file has the tensors {sorted(entries)}, expected {sorted(tensors)}")
    offsets = {}
    for name, (kind, shape) in tensors.items():
        entry, what = entries[name], f"the tensor {name}"
        if _field(entry, what, "dtype", str) != kind or _field(entry, what, "shape", list) != list(shape):
            raise DamagedFileError(f"{what} is {entry['dtype']} {entry['shape']}, expected {kind} {list(shape)}")
        place = _field(entry, what, "data_offsets", list)
        if len(place) != 2 or [type(x) for x in place] != [int, int] or place[0] < 0:
            raise DamagedFileError(f"{what} is at {place}")
        if place[1] - place[0] != _num_bytes(kind, shape):
            raise DamagedFileError(f"{what} has {place[1] - place[0]} bytes, expected {_num_bytes(kind, shape)}")
        offsets[name] = start + place[0]
    return offsets


def _read_tensor(raw: FileIO, offset: int, size: int, name: str, kind: str, shape: tuple[int, ...]) -> Any:
    if offset + _num_bytes(kind, shape) > size:  # before memory is taken for it
        raise DamagedFileError(f"the file ends within the tensor {name}, before the first block")
    tensor = np.empty(shape, _DTYPES[kind])
    _read_into(tensor, raw, offset)
    return tensor


def _read_runs(runs: _Tokens, index: _Index, salvage: bool) -> _Paths:
    paths = _Paths()
    for i, (parent, count) in enumerate(runs.tolist()):
        left = index.num_blocks - paths.num_blocks
        if not 1 <= count <= left:
            if not salvage:
                raise DamagedFileError(f"run {i} in the file has {count} blocks, of {left} that are left")
            break
        if not -len(index.salts) <= parent < i:
            if not salvage:
                raise DamagedFileError(f"run {i} in the file comes behind run {parent}, expected one before it")
            paths.lose(count)
            continue
        paths.append(parent, count)
    if paths.num_blocks < index.num_blocks and not salvage:
        raise DamagedFileError(f"the runs in the file have {paths.num_blocks} blocks, expected {index.num_blocks}")
    paths.parts += [None] * (index.num_runs - len(paths.parts))
    return paths


def _check_siblings(paths: _Paths, tokens: _Tokens) -> None:
    seen: set[tuple[int, bytes]] = set()
    for i, part in enumerate(paths.parts):
        assert part is not None
        key = (part.parent, tokens[part.start].tobytes())
        if key in seen:
            raise DamagedFileError(f"run {i} in the file begins as another one does behind the same blocks")
        seen.add(key)


def _parsed(what: str, encoded: bytes) -> dict[str, Any]:
    """A JSON object in which no name comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name comes twice")
        return found

    try:
        fields = json.loads(encoded.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{what} is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DamagedFileError(f"{what} is no JSON object")
    return fields


def _field(fields: Any, what: str, name: str, kind: type) -> Any:
    if not isinstance(fields, dict) or type(fields.get(name)) is not kind:
        raise DamagedFileError(f"{what} has no {name} of type {kind.__name__}")
    return fields[name]


def _number(fields: Any, what: str, name: str, least: int = 0, most: int = 2**63 - 1) -> int:
    number: int = _field(fields, what, name, int)
    if not least <= number <= most:
        raise DamagedFileError(f"{what} has the {name} {number}, expected {least} to {most}")
    return number


def _geometry(cache: LayeredPagedKVCache, fingerprint: str | None) -> dict[str, Any]:
    """What has to be the same where a file is loaded."""
    return {
        "dtype": name_of(cache[0].dtype),
        "num_layers": len(cache),
        "num_kv_heads": cache[0].num_heads,
        "head_dim": cache[0].head_dim,
        "fingerprint": fingerprint,
    }


def _row_bytes(cache: LayeredPagedKVCache) -> int:
    """Of K, or of V, of a token in one layer."""
    return cache[0].num_heads * cache[0].head_dim * cache[0].dtype.itemsize


def _block_bytes(cache: LayeredPagedKVCache, block_size: int) -> int:
    return 2 * len(cache) * block_size * _row_bytes(cache)


_DTYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "U8": np.dtype(np.uint8)}


def _num_bytes(kind: str, shape: tuple[int, ...]) -> int:
    return _DTYPES[kind].itemsize * math.prod(shape)


def _read_into(out: npt.NDArray[Any], raw: FileIO, offset: int) -> None:
    """As much of ``out``, which is contiguous, as the file has from ``offset`` on."""
    raw.seek(offset)
    left = out.reshape(-1).view(np.uint8).data
    while len(left):
        count = raw.readinto(left)
        if not count:  # somebody has cut the file meanwhile: no checksum will be right
            break
        left = left[count:]


def _no_room(index: _Index, manager: Manager) -> ValueError:
    cache, places = manager._cache, manager._pool.num_places
    return ValueError(
        f"the file has {index.num_blocks + index.num_begun} blocks of {index.block_size} tokens, and the cache with "
        f"{cache.num_blocks} of {cache.block_size}{f' and {places} on the host' if places else ''} has no room for "
        "them; make it larger"
    )


def _check_fingerprint(fingerprint: Any) -> None:
    if not isinstance(fingerprint, str | None):
        raise TypeError(f"fingerprint must be a str or None, got {type(fingerprint).__name__}")


@functools.cache
def _with_own_lock(tqdm: Any) -> Any:
    """tqdm's bar, whose own lock is shared by all processes that were forked: one that is killed while it has it stops
    the others for ever."""

    bar: Any = type("Bar", (tqdm,), {"monitor_interval": 0})  # and no thread of its own
    bar.set_lock(threading.RLock())
    return bar


def _module(name: str) -> Any:
    """A package of the extra ``files``, imported when it is needed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RuntimeError(f"files need the package {name}; pip install 'cupy_pagedkv[files]'") from None
