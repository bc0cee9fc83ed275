"""Sequences that travel between processes and machines, on MPI: prefill on one rank, and decode on another.

>>> from mpi4py import MPI
>>> import numpy as np
>>> from cupy_pagedkv import KVCacheManager, LayeredPagedKVCache
>>> here, there = (
...     KVCacheManager(LayeredPagedKVCache(2, 8, block_size, num_kv_heads=1, head_dim=4, dtype="float16", device="cpu"))
...     for block_size in (4, 8)
... )
>>> sequence = here.add([1, 2, 3, 4, 5, 6])
>>> with here.prepare({sequence: sequence.remaining}) as batch:
...     here._cache.update_all(*np.ones((2, 2, 6, 1, 4), np.float16), batch.slot_mapping)
>>> comm = MPI.COMM_SELF  # of several ranks, one calls send(…, dest), and the other recv(…, source)
>>> sending, receiving = isend(here, sequence, comm, dest=0), irecv(there, comm, source=0)
>>> while not sending.test() & receiving.test():
...     pass
>>> receiving.wait().num_tokens
6

It needs mpi4py and an MPI, the extra ``mpi``; nothing else in the package imports them. Nothing is pickled.

A transfer, of which each message has a tag of its own::

    sender                                              receiver
      offer: what K and V are, salt, tokens  ────────►  what of that is here already?
      from which token on?                   ◄────────  found: so many first tokens, and there is room for the rest
      pack, send, pack, send                 ════════►  receive, unpack, receive, unpack
      done                                   ◄────────  done: committed

    either one ── failed: why ──► the other, at any time

Both poll: nobody waits for the other longer than ``timeout`` seconds without a sign of it. Whatever fails leaves
manager and pool as they were, once MPI has let go of the memory: where a rank died in the middle of a large message it
may not, and then the blocks of that sequence stay taken.
"""

import functools
import itertools
import json
import operator
import os
import struct
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from .bookkeeping.allocator import OutOfBlocksError
from .bookkeeping.arguments import at_least
from .bookkeeping.rows import NewTokens
from .bookkeeping.salts import Salt, as_text, from_text
from .caches.batch import Batch, BatchBuffers
from .caches.cache import LayeredPagedKVCache
from .caches.manager import KVCacheManager, Tokens
from .caches.sequence import CachedSequence
from .devices import backend as devices
from .devices.backend import backend_of
from .operations.arguments import Array
from .operations.attention import merge_attention_states
from .operations.copies import gather_cache, reshape_and_cache

__all__ = ["GroupManager", "Request", "TransferError", "gpu_aware", "irecv", "isend", "merge_ranks", "recv", "send"]

VERSION = 2
"""Of the messages. Both sides must have the same."""

PIECE_BYTES = 2**24
"""Of K and V in a message, at most, if that is a token."""

STEP_BYTES = 2**13
"""Of the message with a step of a group; what does not fit comes in a second one."""

IN_FLIGHT = 2
"""Such messages at once: while MPI has some, one is packed or unpacked."""

T = TypeVar("T")
Steps: TypeAlias = Generator[int, None, T]
"""What polls: each time it goes on it has done what could be done at once, and says how often it has polled in vain."""

_Tokens: TypeAlias = npt.NDArray[np.int32]

_WORD = struct.Struct("<8sIIQ")  # magic, version, kind, number of the transfer; and then what the kind needs
_WORD_SIZE = _WORD.size // 4  # as int32
_MAGIC = b"pagedkv\0"
_OFFER, _FOUND, _DONE, _FAILED = range(4)
_OFFERS = 1  # the tag of all offers; the tags of a transfer are the next ones, by its number
_TO_RECEIVER, _TO_SENDER, _DATA = range(3)

# In messages, these are numbers: methods of a group's manager, and values of gpu_aware.
_CALLS = (
    "add", "prepare", "commit", "rollback", "free", "reset_prefix_cache", "_fork", "_offload", "_truncate", "send",
    "recv", "close",
)  # fmt: skip
_AWARE = (None, False, True)

_numbers = itertools.count()
_left: list[tuple[list[MPI.Request], Callable[[], object]]] = []
"""What nobody waits for any more, but MPI may still read or write; and what is to be done when it does not. To take
back a send is more than MPI promises, and so is to take back a receive whose message is on its way."""


class TransferError(RuntimeError):
    """A transfer has failed: the other rank is gone, refuses, or says what was not expected. Nothing has changed."""


class Request(Generic[T]):
    """A transfer on its way. It gets on while it is tested or waited for; dropped or cancelled, it fails."""

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self._idle = 0
        self._error: BaseException | None = None
        self._result: list[T] = []
        self.test()

    def test(self) -> bool:
        """Do what can be done at once; returns whether all is done. Raises what the blocking call would."""
        if self._error is not None:
            raise self._error
        if not self._result:
            try:
                self._idle = next(self._steps)
            except StopIteration as end:
                self._result.append(end.value)
            except MPI.Exception as error:
                self._error = TransferError(f"MPI failed: {error}")
                raise self._error from error
            except BaseException as error:
                self._error = error
                raise
        return bool(self._result)

    def wait(self) -> T:
        """What the blocking call returns, once it is done."""
        while not self.test():
            if self._idle < 1000:
                os.sched_yield()  # more ranks than cores
            else:
                time.sleep(1e-4)
        return self._result[0]

    def cancel(self) -> None:
        """Give up, and tell the other rank, unless all is done."""
        if not self._result and self._error is None:
            self._error = TransferError("the transfer was cancelled")
            self._steps.close()


def send(
    manager: KVCacheManager,
    sequence: CachedSequence,
    comm: MPI.Comm,
    dest: int,
    *,
    timeout: float = 60.0,
    gpu_aware: bool | None = None,
) -> None:
    """Bring a sequence to the manager of rank ``dest``, which calls :func:`recv`. It stays here, too: moving it is
    ``send``, and then ``manager.free``.

    Only K and V that the receiver does not find there by their tokens travel, some MB a message, packed while the one
    before is on its way. The receiver's block size may differ; layers, heads, head_dim and dtype have to be the same.
    What is parked in host memory comes back to the pool for that.

    comm
        A communicator of its own, such as ``MPI.COMM_WORLD.Dup()``, unless nobody else receives with any tag or with
        those of a transfer.
    timeout
        Seconds without a sign of the other rank, after which it counts as lost.
    gpu_aware
        Whether MPI takes memory of a GPU; by default what :func:`gpu_aware` says. Otherwise K and V of a GPU go through
        pinned memory.

    Raises :class:`TransferError` if the other rank is lost, refuses or answers nonsense, ``ValueError`` for a sequence
    that is freed, of another manager or in an open batch, and of a manager without ``prefix_caching``, which keeps no
    tokens, and ``TypeError`` for a salt that is of a subclass.
    """
    isend(manager, sequence, comm, dest, timeout=timeout, gpu_aware=gpu_aware).wait()


def isend(
    manager: KVCacheManager,
    sequence: CachedSequence,
    comm: MPI.Comm,
    dest: int,
    *,
    timeout: float = 60.0,
    gpu_aware: bool | None = None,
) -> Request[None]:
    """:func:`send` as a request. The sequence may grow, or be freed, meanwhile: what it is now is sent."""
    whole = _Part(dest, 0, manager._cache[0].num_heads)
    return Request(_sending(manager, sequence, comm, [whole], whole.last, timeout, gpu_aware))


def recv(
    manager: KVCacheManager, comm: MPI.Comm, source: int, *, timeout: float = 60.0, gpu_aware: bool | None = None
) -> CachedSequence:
    """A sequence that rank ``source`` sends: an ordinary one of this manager, with as many ``num_tokens`` and the same
    ``remaining``. Its ``num_cached_tokens`` did not have to travel.

    Raises :class:`TransferError` as :func:`send` does, and for K and V of another kind, and
    :class:`~cupy_pagedkv.OutOfBlocksError` where there is no room; the sender is told, and can try again.
    """
    return irecv(manager, comm, source, timeout=timeout, gpu_aware=gpu_aware).wait()


def irecv(
    manager: KVCacheManager, comm: MPI.Comm, source: int, *, timeout: float = 60.0, gpu_aware: bool | None = None
) -> Request[CachedSequence]:
    """:func:`recv` as a request, whose ``wait`` returns the sequence. Any of several may take the next offer."""
    whole = _Part(source, 0, manager._cache[0].num_heads)
    return Request(_receiving(manager, comm, [whole], whole.last, timeout, gpu_aware, _alone))


def gpu_aware(comm: MPI.Comm) -> bool:
    """Whether MPI says that it takes memory of CUDA devices: by the info key ``mpi_memory_alloc_kinds`` of MPI 4.1,
    which is asked for by ``mpiexec -memory-alloc-kinds cuda`` or as the library's manual says; Cray's by its own
    ``MPICH_GPU_SUPPORT_ENABLED=1``."""
    info = comm.Get_info()
    kinds = info.get("mpi_memory_alloc_kinds") or ""
    info.Free()
    of_cuda = any(kind.partition(":")[0] == "cuda" for kind in kinds.split(","))
    return of_cuda or os.environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1"


class GroupManager(KVCacheManager):
    """A manager on each rank of ``comm`` whose caches hold a share of the heads each, all of which stay equal: rank 0
    decides, and the others follow.

    Rank 0 uses it as any manager. Its :meth:`prepare` broadcasts all calls since the last one, in one message; the
    others make them, too, in :meth:`follow`, and so have the same batch, of the same arrays::

        if comm.rank == 0:                                    else:
            sequence = manager.add(prompt)                        while (batch := manager.follow()) is not None:
            batch = manager.prepare({sequence: prompt})               …  # the layers, with this rank's heads
            …  # the layers, with this rank's heads
            manager.commit(batch)
            manager.close()

    A message has the tokens of a step, but no block tables, which each rank has: it does not grow with what is in the
    cache. Under ``CUPY_PAGEDKV_DEBUG=1`` the arrays of each batch are compared by a digest.

    cache, prefix_caching, host_blocks
        As for :class:`~cupy_pagedkv.KVCacheManager`, of the same sizes on all ranks. Rank ``r`` of ``n`` has the
        ``r``-th of ``n`` shares of the heads.
    num_kv_heads
        Of all ranks together.
    world
        For :meth:`send` and :meth:`recv`: what the ranks of several groups are in.
    timeout
        Seconds that a rank waits for another.

    All ranks make it at once, since ``comm`` is duplicated. Raises ``ValueError`` for heads that cannot be divided, or
    of which the cache has another share. A group that has lost a rank is of no use any more.
    """

    def __init__(
        self,
        cache: LayeredPagedKVCache,
        comm: MPI.Intracomm,
        num_kv_heads: int,
        *,
        prefix_caching: bool = True,
        host_blocks: int = 0,
        world: MPI.Comm | None = None,
        timeout: float = 60.0,
    ) -> None:
        super().__init__(cache, prefix_caching=prefix_caching, host_blocks=host_blocks)
        self._share = _shares(num_kv_heads, range(comm.size))[comm.rank]
        if cache[0].num_heads != self._share.last - self._share.first:
            raise ValueError(
                f"each of {comm.size} ranks has {num_kv_heads // comm.size} of {num_kv_heads} heads, but the cache has "
                f"{cache[0].num_heads}"
            )
        self._num_heads, self._timeout = num_kv_heads, timeout
        self._comm, self._world = comm.Dup(), world
        self._message: Any = np.zeros(STEP_BYTES // 4, np.int32)
        # Calls since the last message: each as numbers, of which a list says how many there are, and as texts.
        self._calls: list[Any] = []
        self._texts: list[Any] = []
        self._heard = np.zeros(0, np.int32)  # what is still to be done here
        self._told: dict[CachedSequence | Batch, int] = {}  # what other ranks are told instead of these
        self._by_number: dict[int, Any] = {}  # and the other way round
        self._unused: list[int] = []  # numbers of what is gone
        self._following = comm.rank > 0
        self._is_silent = False

    def add(self, tokens: Tokens, *, salt: Salt = None, name: str | None = None) -> CachedSequence:
        tells, text = self._tells(), as_text(salt)
        sequence = super().add(tokens, salt=salt, name=name)
        if tells:
            self._tell("add", sequence._prompt, texts=[text, name])
        self._name(sequence)
        return sequence

    def _begin(
        self, sequences: tuple[CachedSequence, ...], new: NewTokens, max_blocks: int, buffers: BatchBuffers | None
    ) -> Batch:
        if self._tells():
            names = np.fromiter(map(self._told.__getitem__, sequences), np.int32, len(sequences))
            self._tell("prepare", names, new.counts, new.tokens)
            self._send_calls()  # first, so that all ranks prepare at once; and if it fails, it fails on all
        batch = super()._begin(sequences, new, max_blocks, buffers)
        self._name(batch)
        if devices.DEBUG and not self._is_silent:
            self._compare(batch)
        return batch

    def commit(self, batch: Batch, accepted: Mapping[CachedSequence, int] | None = None) -> None:
        tells = self._tells()
        super().commit(batch, accepted)
        if tells:
            some = {} if accepted is None else accepted
            kept = [[self._told[sequence] for sequence in some], list(some.values())]
            self._tell("commit", [self._told[batch]], *np.array(kept, np.int32))
        self._forget(batch)

    def rollback(self, batch: Batch) -> None:
        tells = self._tells()
        super().rollback(batch)
        if tells:
            self._tell("rollback", [self._told[batch]])
        self._forget(batch)

    def free(self, sequence: CachedSequence) -> None:
        tells = self._tells()
        super().free(sequence)
        if tells:
            self._tell("free", [self._told[sequence]])
        self._forget(sequence)

    def reset_prefix_cache(self) -> None:
        tells = self._tells()
        super().reset_prefix_cache()
        if tells:
            self._tell("reset_prefix_cache")

    def _fork(self, sequence: CachedSequence) -> CachedSequence:
        tells = self._tells()
        fork = super()._fork(sequence)
        if tells:
            self._tell("_fork", [self._told[sequence]])
        self._name(fork)
        return fork

    def _offload(self, sequence: CachedSequence) -> None:
        tells = self._tells()
        super()._offload(sequence)
        if tells:
            self._tell("_offload", [self._told[sequence]])

    def _truncate(self, sequence: CachedSequence, num_tokens: int) -> None:
        tells = self._tells()
        super()._truncate(sequence, num_tokens)
        if tells:
            self._tell("_truncate", [self._told[sequence], num_tokens])

    def send(self, sequence: CachedSequence, dests: Sequence[int], *, gpu_aware: bool | None = None) -> None:
        """Bring a sequence to another group, or to one rank with all heads, which calls :meth:`recv`, or :func:`recv`.

        dests
            The ranks of the other group in ``world``, in the order of their shares. Each gets its own heads from each
            rank that has some of them. Raises ``ValueError`` for as many as the heads cannot be divided among, and
            otherwise as :func:`send` does.
        """
        world, parts, tells = self._others(), self._overlaps(dests), self._tells()
        if tells:
            self._row_of(sequence)
            self._tell("send", [self._told[sequence], _AWARE.index(gpu_aware)], [*map(operator.index, dests)])
            self._send_calls()
        self._transfer(_sending(self, sequence, world, parts, self._num_heads, self._timeout, gpu_aware))

    def recv(self, sources: Sequence[int], *, gpu_aware: bool | None = None) -> CachedSequence:
        """A sequence that another group sends, or one rank, on all ranks of this one or, if any of them fails, on none:
        see :meth:`send`, and :func:`recv`."""
        world, parts, tells = self._others(), self._overlaps(sources), self._tells()
        if tells:
            self._tell("recv", [_AWARE.index(gpu_aware)], [*map(operator.index, sources)])
            self._send_calls()
        args = world, parts, self._num_heads, self._timeout, gpu_aware, self._agree
        sequence: CachedSequence = self._transfer(_receiving(self, *args))
        self._name(sequence)
        return sequence

    def follow(self, *, buffers: BatchBuffers | None = None) -> Batch | None:
        """The next batch of rank 0, once it has prepared it, on the other ranks; None when it has closed the group.

        In between, what rank 0 did is done here, too. Raises what its :meth:`send` and :meth:`recv` raised, after which
        this can be called again, and :class:`TransferError` if nothing comes for too long.
        """
        if self._comm.rank == 0:
            raise ValueError("rank 0 does not follow: it decides")
        self._following = False
        try:
            while True:
                name, numbers = self._next_call()
                try:
                    result = self._replay(name, numbers, buffers)
                except OutOfBlocksError:
                    if name != "prepare":
                        raise
                    continue  # as on rank 0, which knows what to do now
                if name in ("prepare", "close"):
                    return result
        finally:
            self._following = True

    def close(self) -> None:
        """Tell the others that there is nothing to follow any more."""
        self._tell("close")
        self._send_calls()

    def _replay(self, name: str, numbers: list[npt.NDArray[np.int32]], buffers: BatchBuffers | None) -> Batch | None:
        if name == "prepare":
            names, counts, tokens = numbers
            sequences = tuple(map(self._by_number.__getitem__, names.tolist()))
            return self._prepare(sequences, counts.astype(np.int64), tokens, buffers)
        if name == "add":
            self.add(numbers[0], salt=from_text(self._texts.pop(0)), name=self._texts.pop(0))
        elif name == "reset_prefix_cache":
            self.reset_prefix_cache()
        elif name != "close":
            first, *more = (each.tolist() for each in numbers)
            if name == "recv":
                self.recv(more[0], gpu_aware=_AWARE[first[0]])
            elif name == "send":
                self.send(self._by_number[first[0]], more[0], gpu_aware=_AWARE[first[1]])
            elif name == "commit":
                accepted = {self._by_number[at]: count for at, count in zip(*more, strict=True)}
                self.commit(self._by_number[first[0]], accepted)
            else:
                getattr(self, name)(self._by_number[first[0]], *first[1:])
        return None

    def _tells(self) -> bool:
        """Whether this call is to be made on the other ranks."""
        if self._following and not self._is_silent:
            raise ValueError("rank 0 decides, and the other ranks follow()")
        return self._comm.rank == 0 and not self._is_silent

    def _tell(self, name: str, *numbers: Any, texts: Sequence[Any] = ()) -> None:
        self._calls += ([_CALLS.index(name), len(numbers), *map(len, numbers)], *numbers)
        self._texts += texts

    def _name(self, thing: CachedSequence | Batch) -> None:
        if not self._is_silent:
            number = self._unused.pop() if self._unused else len(self._told)
            self._told[thing], self._by_number[number] = number, thing

    def _forget(self, thing: CachedSequence | Batch) -> None:
        if thing in self._told:
            number = self._told.pop(thing)
            del self._by_number[number]
            self._unused.append(number)

    def _send_calls(self) -> None:
        of_text = 0
        if self._texts:
            text = json.dumps(self._texts)
            text += " " * (-len(text) % 4)
            self._calls.append(np.frombuffer(text.encode(), np.int32))
            of_text = len(self._calls[-1])
        numbers = np.concatenate(self._calls, dtype=np.int32)
        self._calls, self._texts = [], []
        room = len(self._message) - _WORD_SIZE
        first, rest = numbers[:room], numbers[room:]
        self._message[_WORD_SIZE : _WORD_SIZE + len(first)] = first
        _WORD.pack_into(self._message, 0, _MAGIC, VERSION, of_text, len(numbers))
        self._broadcast(self._message)
        if len(rest):
            self._broadcast(rest)

    def _hear_calls(self) -> None:
        self._broadcast(self._message)
        _, version, of_text, size = _WORD.unpack_from(self._message)
        if version != VERSION:
            raise TransferError(f"rank 0 speaks version {version} of the protocol, and this is {VERSION}")
        numbers = self._message[_WORD_SIZE : _WORD_SIZE + size].copy()
        if len(numbers) < size:
            numbers = np.append(numbers, self._broadcast(np.empty(size - len(numbers), np.int32)))
        if of_text:
            self._texts = json.loads(numbers[size - of_text :].tobytes())
        self._heard = numbers[: size - of_text]

    def _next_call(self) -> tuple[str, list[npt.NDArray[np.int32]]]:
        """Its name, and its numbers; texts are in line."""
        if not len(self._heard):
            self._hear_calls()
        which, count = self._heard[:2].tolist()
        at, numbers = 2 + count, []
        for length in self._heard[2:at].tolist():
            numbers.append(self._heard[at : at + length])
            at += length
        self._heard = self._heard[at:]
        return _CALLS[which], numbers

    def _broadcast(self, message: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        request = self._comm.Ibcast([message, MPI.BYTE])
        for _ in range(50):  # some 10 us, in which it comes in a loop of steps
            if request.Test():
                return message
        _collective(request, "step of rank 0", self._timeout)
        return message

    def _agree(self, succeeded: bool) -> Steps[bool]:
        ours, of_all = np.array([succeeded], np.uint8), np.zeros(1, np.uint8)
        request = self._comm.Iallreduce(ours, of_all, MPI.MIN)
        yield from _done(request, "agreement of the group", self._timeout)
        return bool(of_all[0])

    def _compare(self, batch: Batch) -> None:
        backend = backend_of(("the batch",), batch.slot_mapping)
        arrays = [batch.slot_mapping[: batch.num_tokens], batch.block_tables, batch.seq_lens]
        digest = zlib.crc32(b"".join(np.ascontiguousarray(backend.asnumpy(array)).tobytes() for array in arrays))
        ours, of_all = np.array([digest, self._pool.num_available]), np.zeros((self._comm.size, 2), np.int64)
        _collective(self._comm.Iallgather(ours, of_all), "digest of the group", self._timeout)
        if (of_all != of_all[0]).any():
            raise TransferError(f"the managers of the group differ: digests and free blocks are {of_all.tolist()}")

    def _transfer(self, steps: Steps[T]) -> T:
        self._is_silent = True
        try:
            return Request(steps).wait()
        finally:
            self._is_silent = False

    def _others(self) -> MPI.Comm:
        if self._world is None:
            raise ValueError("other groups are not known: make it GroupManager(…, world=comm)")
        return self._world

    def _overlaps(self, ranks: Sequence[int]) -> list["_Part"]:
        """What this rank's share has in common with each of theirs."""
        ours = self._share
        parts = (_Part(part.rank, max(part.first, ours.first), min(part.last, ours.last))
                 for part in _shares(self._num_heads, ranks))  # fmt: skip
        return [part for part in parts if part.first < part.last]


def merge_ranks(out: Array, lse: Array, comm: MPI.Intracomm, *, timeout: float = 60.0) -> tuple[Array, Array]:
    """Attention over the keys of all ranks, from that over each rank's own: ``(out, lse)``, the same on each.

    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> out, lse = merge_ranks(np.ones((1, 2, 4), np.float32), np.zeros((1, 2), np.float32), MPI.COMM_SELF)
    >>> out.shape, lse.shape
    ((1, 2, 4), (1, 2))

    out, lse
        What ``paged_attention(…, return_lse=True)`` gave of the same queries on each rank, over the positions that this
        one holds: with ``causal=False`` where all of them come before the queries. A sink is given to one rank alone.

    All ranks call it at once; one message each, and then each merges all in the order of the ranks, by
    :func:`~cupy_pagedkv.merge_attention_states`, in host memory and in float32, so that ``out`` is rounded once however
    many ranks there are. On a GPU this waits for the current stream.
    """
    backend = backend_of(("out", "lse"), out, lse)
    parts = [np.ascontiguousarray(backend.asnumpy(array)) for array in (out, lse)]
    ours = np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
    of_all = np.empty((comm.size, len(ours)), np.uint8)
    _collective(comm.Iallgather([ours, MPI.BYTE], [of_all, MPI.BYTE]), "result of another rank", timeout)
    size = parts[0].nbytes
    states = [
        tuple(row[place].view(like.dtype).reshape(like.shape).astype(np.float32)
              for place, like in zip((slice(size), slice(size, None)), parts, strict=True))
        for row in of_all
    ]  # fmt: skip
    merged_out, merged_lse = functools.reduce(lambda a, b: merge_attention_states(*a, *b), states)
    return (
        backend.from_numpy(merged_out.astype(parts[0].dtype), out.device),
        backend.from_numpy(merged_lse, out.device),
    )


def _done(request: MPI.Request, what: str, timeout: float) -> Steps[None]:
    """Until what all ranks take part in is done."""
    end = time.monotonic() + timeout
    for idle in itertools.count():
        if request.Test():
            return
        if time.monotonic() > end:
            raise TransferError(f"waited {timeout:g} s for the {what}, and it did not come")
        yield idle


def _collective(request: MPI.Request, what: str, timeout: float) -> None:
    Request(_done(request, what, timeout)).wait()


# What the two sides do.


class _Part(NamedTuple):
    """What goes to or comes from one rank: heads, of all that the ranks of a group have together."""

    rank: int
    first: int
    last: int

    def of_pools(self, manager: KVCacheManager, first: int) -> tuple[Any, Any]:
        """Views of the pools, with these heads, on a rank whose heads begin with ``first``."""
        heads = slice(self.first - first, self.last - first)
        return manager._cache._k_caches[..., heads, :], manager._cache._v_caches[..., heads, :]


def _shares(num_heads: int, ranks: Sequence[int]) -> list[_Part]:
    """The heads of each rank of a group."""
    share, rest = divmod(at_least(1, "num_kv_heads", num_heads), max(1, len(ranks)))
    if rest or not ranks:
        raise ValueError(f"{num_heads} heads cannot be divided among {len(ranks)} ranks")
    return [_Part(rank, i * share, (i + 1) * share) for i, rank in enumerate(ranks)]


@dataclass
class _Kind:
    """What K and V are."""

    layers: int
    heads: int
    head_dim: int
    dtype: str

    @classmethod
    def of(cls, manager: KVCacheManager, num_heads: int) -> "_Kind":
        cache = manager._cache
        return cls(len(cache), num_heads, cache[0].head_dim, str(cache[0].dtype))

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.heads} heads of {self.head_dim} {self.dtype}"


@dataclass
class _Offer:
    """The first message. Tokens follow as int32: those in the cache, and what remains of the prompt."""

    layers: int
    heads: int
    head_dim: int
    dtype: str
    first: int
    last: int
    """The heads that are sent."""
    num_tokens: int
    num_remaining: int
    piece: int
    """Tokens in a message."""
    salt: list[str]

    def kind(self) -> _Kind:
        return _Kind(self.layers, self.heads, self.head_dim, self.dtype)


def _sending(
    manager: KVCacheManager,
    sequence: CachedSequence,
    comm: MPI.Comm,
    parts: Sequence[_Part],
    num_heads: int,
    timeout: float,
    aware: bool | None,
) -> Steps[None]:
    tokens, salt = _tokens_of(manager, sequence), _salt_of(manager, sequence)
    kind, remaining = _Kind.of(manager, num_heads), sequence.remaining
    fork = sequence.fork()  # so that the sequence can go on
    batch = None
    try:
        batch = manager.prepare({fork: []})  # what is on the host comes back

        def give(part: _Part) -> Steps[None]:
            pools = part.of_pools(manager, parts[0].first)
            piece = _tokens_of_a_piece(pools)
            offer = _Offer(**asdict(kind), first=part.first, last=part.last, num_tokens=len(tokens),
                           num_remaining=len(remaining), piece=piece, salt=salt)  # fmt: skip
            body = json.dumps(asdict(offer)).encode().ljust(255) + b"\n" + tokens.tobytes() + remaining.tobytes()
            with _link(comm, part.rank, timeout, next(_numbers), _TO_RECEIVER) as link:
                link.say(_OFFER, body)
                found = yield from link.hear(_FOUND, "answer")
                start = int.from_bytes(found, "little")
                if start > len(tokens):
                    raise TransferError(f"rank {part.rank} found {start} of {len(tokens)} tokens")
                lane = _lane(pools, min(piece, len(tokens) - start), link, aware)
                for i, first in enumerate(range(start, len(tokens), piece)):
                    yield from lane.send(i, batch.block_tables, first, min(first + piece, len(tokens)))
                yield from link.hear(_DONE, "acknowledgement")

        yield from _together([give(part) for part in parts])
    finally:
        _drop(manager, fork, batch)


def _receiving(
    manager: KVCacheManager,
    comm: MPI.Comm,
    parts: Sequence[_Part],
    num_heads: int,
    timeout: float,
    aware: bool | None,
    agree: Callable[[bool], Steps[bool]],
) -> Steps[CachedSequence]:
    kind = _Kind.of(manager, num_heads)
    links: list[_Link] = []
    sequence = batch = None
    try:
        offers = yield from _agreed(agree, _together([_offer(comm, part, timeout, kind, links) for part in parts]))
        offer, tokens = offers[0]
        if any(other.tobytes() != tokens.tobytes() for _, other in offers):
            raise TransferError("the ranks offer sequences of different tokens")
        known = tokens[: offer.num_tokens]
        # One token more than there are, since add() never finds the last one.
        sequence = manager.add(np.append(tokens, np.int32(0)), salt=from_text(offer.salt))
        sequence._prompt = tokens
        if sequence.num_tokens > len(known):
            sequence.truncate(len(known))
        sequence._num_cached = start = sequence.num_tokens
        batch = manager.prepare({sequence: known[start:]})
        slots = batch.slot_mapping

        def take(link: _Link, part: _Part, piece: int) -> Steps[None]:
            pools = part.of_pools(manager, parts[0].first)
            lane = _lane(pools, min(piece, len(slots)), link, aware)
            pieces = [slots[first : first + piece] for first in range(0, len(slots), piece)]
            for i, of_piece in enumerate(pieces[:IN_FLIGHT]):
                yield from lane.receive(i, of_piece)
            link.say(_FOUND, start.to_bytes(8, "little"))
            for i, of_piece in enumerate(pieces):
                yield from lane.received(i, of_piece)
                if i + IN_FLIGHT < len(pieces):
                    yield from lane.receive(i + IN_FLIGHT, pieces[i + IN_FLIGHT])
            yield from lane.finish()

        pieces = [offer.piece for offer, _ in offers]
        takes = [take(link, part, piece) for link, part, piece in zip(links, parts, pieces, strict=True)]
        yield from _agreed(agree, _together(takes))
        manager.commit(batch)
        batch = None
        for link in links:
            link.say(_DONE)
            link.close()
        return sequence
    except BaseException as error:
        for link in links:
            link.close(error)

        awaited = [each for link in links for each in link.awaited]
        _leave(awaited, lambda: _drop(manager, sequence, batch))
        raise


def _drop(manager: KVCacheManager, sequence: CachedSequence | None, batch: Batch | None) -> None:
    """End what a transfer began, whenever that is; of which other ranks of a group are not told."""
    if batch is not None:
        KVCacheManager.rollback(manager, batch)
    if sequence is not None:
        KVCacheManager.free(manager, sequence)


def _offer(
    comm: MPI.Comm, part: _Part, timeout: float, kind: _Kind, links: list["_Link"]
) -> Steps[tuple[_Offer, _Tokens]]:
    """The next offer of a rank that it has not taken back, and its tokens; the link to it is put among ``links``."""
    while True:
        link = _Link(comm, part.rank, timeout, None, _TO_SENDER)
        links.append(link)
        body = yield from link.hear(_OFFER, "offer")
        try:
            yield from link.listen()
            break
        except _GaveUpError:  # before this rank came
            links.remove(link)
    text, _, rest = body.partition(b"\n")
    try:
        offer = _Offer(**json.loads(text))
        counts = [getattr(offer, field.name) for field in fields(offer) if field.type is int]
        tokens = np.frombuffer(rest, np.int32)
        if not all(type(count) is int and count >= 0 for count in counts) or offer.piece < 1:
            raise ValueError(f"its numbers are {counts}")
        if len(tokens) != offer.num_tokens + offer.num_remaining:
            raise ValueError(f"it has {len(tokens)} tokens and not {offer.num_tokens} + {offer.num_remaining}")
        from_text(offer.salt)
    except (ValueError, TypeError) as error:
        raise TransferError(f"the offer of rank {part.rank} is nonsense: {error}") from None
    if offer.kind() != kind:
        raise TransferError(f"rank {part.rank} offers {offer.kind()}, but this cache has {kind}")
    if (offer.first, offer.last) != part[1:]:
        raise TransferError(
            f"rank {part.rank} offers heads {offer.first} to {offer.last}, expected {part.first} to {part.last}"
        )
    return offer, tokens


def _alone(succeeded: bool) -> Steps[bool]:
    return succeeded
    yield


def _agreed(agree: Callable[[bool], Steps[bool]], steps: Steps[T]) -> Steps[T]:
    """What ``steps`` return, if they succeed on all ranks of the group."""
    try:
        result = yield from steps
    except Exception:
        yield from agree(False)
        raise
    if not (yield from agree(True)):
        raise TransferError("another rank of this group failed; what it raised says why")
    return result


def _together(all_steps: Sequence[Steps[T]]) -> Steps[list[T]]:
    """Several at once; the first that raises ends all."""
    results: dict[int, T] = {}
    try:
        while True:
            idle = None
            for i, steps in enumerate(all_steps):
                if i not in results:
                    try:
                        now = next(steps)
                        idle = now if idle is None else min(idle, now)
                    except StopIteration as end:
                        results[i] = end.value
            if idle is None:
                return [results[i] for i in range(len(all_steps))]
            yield idle
    finally:
        for steps in all_steps:
            steps.close()


# Messages.


def _leave(requests: list[MPI.Request], then: Callable[[], object]) -> None:
    """Call ``then`` when all requests are done: now, or in a later transfer."""
    _left.append((requests, then))
    for each in list(_left):
        if all(request.Test() for request in each[0]):
            _left.remove(each)
            each[1]()


class _Link:
    """To one other rank: the words of a transfer, with its tags, and waits that end."""

    def __init__(self, comm: MPI.Comm, peer: int, timeout: float, number: int | None, says: int) -> None:
        self.comm, self.peer, self.timeout = comm, peer, timeout
        self._number = number
        """Of the transfer; a receiver learns it from the offer."""
        self._says, self._hears = says, 1 - says
        self._heard: list[tuple[int, bytes]] = []
        self._posted: list[tuple[MPI.Request, Any]] = []
        self.awaited: list[MPI.Request] = []
        """Receives of data."""

    def _tag(self, of: int) -> int:
        """Of words in one direction, or of data; as long as there is no number, of offers."""
        if self._number is None:
            return _OFFERS
        most: Any = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)  # others need not have it, and have not in Open MPI
        return _OFFERS + 1 + 3 * (self._number % ((int(most) - _OFFERS) // 3)) + of

    def say(self, kind: int, body: bytes = b"") -> None:
        """Queue a word."""
        word = _WORD.pack(_MAGIC, VERSION, kind, self._number or 0) + body
        self._post(word, _OFFERS if kind == _OFFER else self._tag(self._says))

    def send(self, memory: Any) -> MPI.Request:
        """Queue data."""
        return self._post(memory, self._tag(_DATA))

    def receive(self, *where: Any) -> MPI.Request:
        """Where the next data go, as MPI is told."""
        request = self.comm.Irecv(list(where), self.peer, self._tag(_DATA))
        self.awaited = [each for each in self.awaited if each != MPI.REQUEST_NULL]
        self.awaited.append(request)
        self._keep(request, where)
        return request

    def _post(self, memory: Any, tag: int) -> MPI.Request:
        request = self.comm.Isend([memory, MPI.BYTE], self.peer, tag)
        self._keep(request, memory)
        return request

    def _keep(self, request: MPI.Request, memory: Any) -> None:
        self._posted = [each for each in self._posted if each[0] != MPI.REQUEST_NULL]
        self._posted.append((request, memory))

    def hear(self, kind: int, what: str) -> Steps[bytes]:
        """What the other rank says next, which has to be of a kind."""
        yield from self.until(what, lambda: bool(self._heard))
        got, body = self._heard.pop(0)
        if got != kind:
            raise TransferError(f"expected the {what} of rank {self.peer}, a word of kind {kind}, got one of {got}")
        return body

    def until(self, what: str, poll: Callable[[], bool]) -> Steps[None]:
        """Wait until ``poll()`` is true, unless the other rank gives up, or nothing comes of it for too long."""
        end = time.monotonic() + self.timeout
        for idle in itertools.count():
            if poll():
                return
            yield from self.listen()
            if time.monotonic() > end and not poll():
                raise TransferError(f"waited {self.timeout:g} s for the {what} of rank {self.peer}, and none came")
            yield idle

    def listen(self) -> Steps[None]:
        """Take what the other rank has said, if anything."""
        status = MPI.Status()
        message = self.comm.Improbe(self.peer, self._tag(self._hears), status)
        if message is None:
            return
        memory = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        request = message.Irecv([memory, MPI.BYTE])
        self._keep(request, memory)
        end = time.monotonic() + self.timeout
        while not request.Test():
            if time.monotonic() > end:
                raise TransferError(f"waited {self.timeout:g} s for the rest of what rank {self.peer} says")
            yield 0
        word = memory.tobytes()
        if len(word) < _WORD.size or not word.startswith(_MAGIC):
            raise TransferError(f"expected a word of this protocol, but rank {self.peer} says {word[:16]!r}")
        _, version, kind, number = _WORD.unpack_from(word)
        if self._number is None:
            self._number = number
        if version != VERSION:
            raise TransferError(f"rank {self.peer} speaks version {version} of the protocol, and this is {VERSION}")
        if number != self._number:
            return  # of a transfer long ago, whose tags are used again
        body = word[_WORD.size :]
        if kind == _FAILED:
            self._number = None  # it need not be told
            raise _GaveUpError(f"rank {self.peer} gave up: {body.decode(errors='replace')}")
        self._heard.append((kind, body))

    def close(self, error: BaseException | None = None) -> None:
        """Tell the other rank why this one gives up, and leave to MPI what it still has."""
        if error is not None and self._number is not None:
            self.say(_FAILED, f"{type(error).__name__}: {error}".encode(errors="replace"))
        for request in self.awaited:
            if request != MPI.REQUEST_NULL:
                request.Cancel()
        posted = self._posted  # in the closure, with the memory
        _leave([request for request, _ in posted], posted.clear)


class _GaveUpError(TransferError):
    """The other rank has, and said why."""


@contextmanager
def _link(comm: MPI.Comm, peer: int, timeout: float, number: int, says: int) -> Iterator[_Link]:
    link = _Link(comm, peer, timeout, number, says)
    try:
        yield link
    except BaseException as error:
        link.close(error)
        raise
    link.close()


# K and V on their way.


def _tokens_of_a_piece(pools: tuple[Any, Any]) -> int:
    layers, _, _, heads, head_dim = pools[0].shape
    tokens = PIECE_BYTES // (2 * layers * heads * head_dim * pools[0].itemsize)
    return int(max(1, tokens // 64 * 64 or tokens))  # whole blocks of most sizes


def _lane(pools: tuple[Any, Any], num_tokens: int, link: _Link, aware: bool | None) -> "_Lane":
    if isinstance(pools[0], np.ndarray):
        return _Lane(pools, num_tokens, link)
    return _GpuLane(pools, num_tokens, link, gpu_aware(link.comm) if aware is None else aware)


class _Lane:
    """The way of K and V between pools in host memory, a piece ``[2, num_layers, num_tokens, num_kv_heads, head_dim]``
    at a time. They are packed into buffers that take turns, and received right where they belong."""

    def __init__(self, pools: tuple[Any, Any], num_tokens: int, link: _Link) -> None:
        self._pools = pools
        self._link = link
        self._row = 2 * pools[0][:, 0, 0].size * pools[0].itemsize  # bytes of a token
        self._num_bytes = num_tokens * self._row
        self._requests = [MPI.REQUEST_NULL] * IN_FLIGHT
        self._buffers: list[Any] = []

    def send(self, i: int, block_tables: Any, first: int, last: int) -> Steps[None]:
        """Send piece ``i``, once there is a buffer for it: of the one sequence in ``block_tables`` the tokens from
        ``first`` to ``last``."""
        # MPICH 5.0.2 takes twenty times as long to pack many pieces by itself. To unpack them it does not.
        self._buffers = self._buffers or self._make_buffers()
        yield from self._mpi_is_done(i)
        memory = self._buffers[i % IN_FLIGHT][: (last - first) * self._row]
        gather_cache(*self._pools, block_tables, [last], seq_starts=[first], out=self._views(memory))
        memory = yield from self._packed(i, memory)
        self._requests[i % IN_FLIGHT] = self._link.send(memory)

    def receive(self, i: int, slots: Any) -> Steps[None]:
        """Let piece ``i`` come, which is for ``slots``."""
        pool, (keys, values) = self._pools[0], (_address(pool) for pool in self._pools)
        layers, block_size = pool.shape[0], pool.shape[2]
        row = pool.shape[3] * pool.shape[4] * pool.itemsize
        places = slots // block_size * pool.strides[1] + slots % block_size * pool.strides[2]
        ends = np.flatnonzero(np.diff(places, append=-1) != row) + 1  # of runs without a gap
        counts = np.diff(ends, prepend=0)
        starts = places[ends - counts]
        offsets = np.add.outer(np.add.outer([0, values - keys], np.arange(layers) * pool.strides[0]), starts).ravel()
        where = MPI.BYTE.Create_hindexed(np.tile(counts * row, 2 * layers).tolist(), offsets.tolist()).Commit()
        memory = MPI.memory.fromaddress(keys, 0)
        self._requests[i % IN_FLIGHT] = self._link.receive(memory, 1, where)
        where.Free()
        return
        yield

    def received(self, i: int, slots: Any) -> Steps[None]:
        """Wait until piece ``i`` is there, or what unpacks it is queued."""
        yield from self._mpi_is_done(i, len(slots) * self._row)

    def finish(self) -> Steps[None]:
        """Wait until all that was received is unpacked, and its memory is not read any more."""
        return
        yield

    def _make_buffers(self) -> list[Any]:
        backend: Any = backend_of(("the cache",), self._pools[0])
        place = self._pools[0].device
        return [backend.empty((self._num_bytes,), np.dtype(np.uint8), place) for _ in range(IN_FLIGHT)]

    def _views(self, memory: Any) -> tuple[Any, Any]:
        """K and V of a piece."""
        layers, _, _, heads, head_dim = self._pools[0].shape
        key, value = memory.view(self._pools[0].dtype).reshape(2, layers, -1, heads, head_dim)
        return key, value

    def _packed(self, i: int, memory: Any) -> Steps[Any]:
        """What MPI is to send."""
        return memory
        yield

    def _mpi_is_done(self, i: int, wanted: int | None = None) -> Steps[None]:
        request, status = self._requests[i % IN_FLIGHT], MPI.Status()
        try:
            yield from self._link.until("next piece", lambda: request.Test(status))
        except MPI.Exception as error:
            if error.Get_error_class() != MPI.ERR_TRUNCATE:
                raise
            raise TransferError(f"expected {wanted} bytes of rank {self._link.peer}, got more") from None
        if wanted is not None and status.Get_count(MPI.BYTE) != wanted:
            came = status.Get_count(MPI.BYTE)
            raise TransferError(f"expected {wanted} bytes of rank {self._link.peer}, got {came}")


class _GpuLane(_Lane):
    """The same on a GPU: what packs and unpacks is queued on the current stream, and between that and MPI events are
    waited for. Where MPI is not aware of GPUs, pinned memory is between them, too."""

    def __init__(self, pools: tuple[Any, Any], num_tokens: int, link: _Link, aware: bool) -> None:
        super().__init__(pools, num_tokens, link)
        backend: Any = backend_of(("the cache",), pools[0])
        self._backend = backend
        self._buffers = self._make_buffers()
        self._events: list[Any] = [None] * IN_FLIGHT
        self._pinned = None if aware else [self._backend.empty_pinned(self._num_bytes) for _ in range(IN_FLIGHT)]

    def receive(self, i: int, slots: Any) -> Steps[None]:
        yield from self._device_is_done(i)
        buffers = self._buffers if self._pinned is None else self._pinned
        memory = buffers[i % IN_FLIGHT][: len(slots) * self._row]
        self._requests[i % IN_FLIGHT] = self._link.receive(memory, MPI.BYTE)

    def received(self, i: int, slots: Any) -> Steps[None]:
        yield from super().received(i, slots)
        stream, memory = self._backend.current_stream(), self._buffers[i % IN_FLIGHT][: len(slots) * self._row]
        if self._pinned is not None:
            self._backend.copy_from_host(self._pinned[i % IN_FLIGHT], memory, stream)
        reshape_and_cache(*self._views(memory), *self._pools, slots)
        self._events[i % IN_FLIGHT] = self._backend.event_behind(stream)

    def finish(self) -> Steps[None]:
        for i in range(IN_FLIGHT):
            yield from self._device_is_done(i)

    def _packed(self, i: int, memory: Any) -> Steps[Any]:
        stream = self._backend.current_stream()
        if self._pinned is not None:
            pinned = self._pinned[i % IN_FLIGHT][: len(memory)]
            self._backend.copy_to_host(memory, pinned, stream)
            memory = pinned
        self._events[i % IN_FLIGHT] = self._backend.event_behind(stream)
        yield from self._device_is_done(i)
        return memory

    def _device_is_done(self, i: int) -> Steps[None]:
        event = self._events[i % IN_FLIGHT]
        while event is not None and not event.done:
            yield 0


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


# What a sequence is, in bytes.


def _tokens_of(manager: KVCacheManager, sequence: CachedSequence) -> _Tokens:
    """All tokens that are in the cache."""
    row = manager._row_of(sequence)
    if not manager._prefix_caching:
        raise ValueError("a manager without prefix_caching keeps no tokens, by which the receiver knows what it gets")
    full, begun = divmod(sequence.num_tokens, manager._block_size)
    parts = [manager._rows.tail(row)[:begun]]
    run, size = sequence._run.at(full), 4 * manager._block_size
    while full:
        parts.append(np.frombuffer(bytes(run.tokens[: (full - run.first) * size]), np.int32))
        full = run.first
        run = run.at(full)
    return np.concatenate(parts[::-1])


def _salt_of(manager: KVCacheManager, sequence: CachedSequence) -> list[str]:
    """As JSON has it."""
    root = sequence._run.at(0)
    [salt] = [salt for (_, salt), of_salt in manager._pool._roots.items() if of_salt is root]
    return as_text(salt)
