"""What the ranks of test_mpi.py do: ``mpiexec -n 2 python mpi_ranks.py NAME …`` runs scenarios, on all ranks each.

A rank that fails ends all. Managers are small, and K and V of a token depend on all tokens before, as a model's do;
what is compared are whole pools.
"""

import contextlib
import faulthandler
import hashlib
import itertools
import os
import re
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SCENARIOS: dict[int, list[str]] = {1: [], 2: [], 4: [], 6: []}
"""By how many ranks they are for."""
DEADLY: list[str] = []
"""Those of two ranks of which one does not live to see the end: each needs a launch of its own."""

DTYPES = ["float16", "uint8", ml_dtypes.bfloat16, ">f4", np.dtype([("a", "u1"), ("b", "<f4")])]


def scenario(*ranks: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        for n in ranks:
            SCENARIOS[n].append(function.__name__)
        return function

    return register


def deadly(function: Callable[[], None]) -> Callable[[], None]:
    DEADLY.append(function.__name__)
    return function


if __name__ == "__main__":
    from mpi4py import MPI

    from cupy_pagedkv import KVCacheManager, LayeredPagedKVCache, OutOfBlocksError, mpi

    WORLD = MPI.COMM_WORLD
    RANK, SIZE = WORLD.rank, WORLD.size


def a_manager(
    *, layers: int = 2, num_blocks: int = 40, block_size: int = 4, heads: int = 2, dim: int = 3, dtype: Any = "float16",
    **options: Any,
) -> Any:  # fmt: skip
    """Over pools full of garbage."""
    cache = LayeredPagedKVCache(layers, num_blocks, block_size, heads, dim, dtype, device="cpu")
    for pools in (cache._k_caches, cache._v_caches):
        pools[:] = np.random.default_rng(RANK).integers(0, 256, (*pools.shape, pools.itemsize), np.uint8).view(
            pools.dtype
        )[..., 0]  # fmt: skip
    return KVCacheManager(cache, **options)


def kv_of(cache: Any, salt: Any, tokens: Sequence[int], heads: slice = slice(None), num_heads: int = 0) -> np.ndarray:
    """K and V ``[2, layers, tokens, heads, dim]`` of all tokens, of some of ``num_heads``."""
    shape = (2, len(cache), num_heads or cache[0].num_heads, cache[0].head_dim)
    num_bytes, digest, rows = int(np.prod(shape)) * cache[0].dtype.itemsize, repr(salt).encode(), []
    for token in tokens:
        digest = hashlib.blake2b(digest + b"%d" % token).digest()
        rows.append(hashlib.shake_128(digest).digest(num_bytes))
    kv = np.frombuffer(b"".join(rows), np.uint8).view(cache[0].dtype).reshape(len(rows), *shape)
    return kv.transpose(1, 2, 0, 3, 4)[..., heads, :]


def write(manager: Any, sequence: Any, salt: Any, tokens: Sequence[int], count: int, **which: Any) -> None:
    """Prefill, or decode: until the first ``count`` of ``tokens`` are in the cache."""
    start = sequence.num_tokens
    with manager.prepare({sequence: list(tokens[start:count])}) as batch:
        kv = kv_of(manager._cache, salt, tokens[:count], **which)[:, :, start:]
        manager._cache.update_all(*kv, batch.slot_mapping)


def a_sequence(manager: Any, tokens: Sequence[int], salt: Any = None, count: int | None = None) -> Any:
    sequence = manager.add(list(tokens), salt=salt)
    write(manager, sequence, salt, tokens, len(tokens) if count is None else count)
    return sequence


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def pools_of(manager: Any) -> np.ndarray:
    return np.stack([manager._cache._k_caches, manager._cache._v_caches])


def slots_of(manager: Any, sequence: Any) -> np.ndarray:
    at = np.arange(sequence.num_tokens)
    return sequence.block_table[at // manager._block_size] * manager._block_size + at % manager._block_size


def check(manager: Any, sequence: Any, salt: Any, tokens: Sequence[int], count: int, **which: Any) -> None:
    """That a sequence is what it should be, and can be used."""
    manager.check_integrity()
    assert sequence.num_tokens == count
    assert sequence.remaining.tolist() == list(tokens[count:])
    keys, values = manager._cache.gather_all(sequence.block_table[None], [count])
    expected = kv_of(manager._cache, salt, tokens[:count], **which)
    assert same(keys, expected[0])  # one by one: to stack them would swap the bytes of >f4
    assert same(values, expected[1])


@contextlib.contextmanager
def nothing_changes(manager: Any) -> Iterator[None]:
    """In the books; of the pools, only blocks that nobody has."""
    before, lengths = manager.stats(), {each: each.num_tokens for each in manager.sequences}
    pools, used = pools_of(manager), [block for each in manager.sequences for block in each.block_table]
    yield
    manager.check_integrity()
    assert manager.stats() == before, (manager.stats(), before)
    assert {each: each.num_tokens for each in manager.sequences} == lengths
    assert not manager.open_batches
    assert same(pools_of(manager)[:, :, used], pools[:, :, used])


@contextlib.contextmanager
def raises(kind: type[BaseException], pattern: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        if not re.search(pattern, str(error)):
            raise AssertionError(f"this does not match {pattern!r}") from error
    else:
        raise AssertionError(f"nothing was raised, expected {pattern!r}")


class Counted:
    """A communicator that counts messages and bytes that go out, by what they are; of collectives what a rank gives."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.messages, self.bytes = comm, Counter(), Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def Dup(self) -> "Counted":  # noqa: N802
        return self

    def Ibcast(self, buffer: Any) -> Any:  # noqa: N802
        self.messages["step"] += 1
        self.bytes["step"] += buffer[0].nbytes
        return self.comm.Ibcast(buffer, 0)

    def Iallgather(self, ours: Any, of_all: Any) -> Any:  # noqa: N802
        self.messages["gathered"] += 1
        self.bytes["gathered"] += len(ours[0]) if isinstance(ours, list) else ours.nbytes
        return self.comm.Iallgather(ours, of_all)

    def Isend(self, buffer: Any, dest: int, tag: int) -> Any:  # noqa: N802
        kind = "offer" if tag == mpi._OFFERS else ("to receiver", "to sender", "data")[(tag - mpi._OFFERS - 1) % 3]
        self.messages[kind] += 1
        self.bytes[kind] += len(buffer[0])
        return self.comm.Isend(buffer, dest, tag)


@contextlib.contextmanager
def changed(thing: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(thing, name) for name in values}
    for name, value in values.items():
        setattr(thing, name, value)
    yield
    for name, value in before.items():
        setattr(thing, name, value)


def small_pieces(num_bytes: int = 400) -> Any:
    return changed(mpi, PIECE_BYTES=num_bytes)


# One rank.


@scenario(1)
def the_example_of_the_module() -> None:
    import doctest

    result = doctest.testmod(mpi)
    assert result.attempted
    assert not result.failed


@scenario(1)
def what_cannot_be_sent() -> None:
    manager, without = a_manager(), a_manager(prefix_caching=False)
    sequence, unknown = a_sequence(manager, range(9)), a_sequence(without, range(9))
    for each, owner, text in [(unknown, without, "without prefix_caching keeps no tokens"),
                              (sequence, without, "another manager's")]:  # fmt: skip
        with nothing_changes(owner), raises(ValueError, text):
            mpi.isend(owner, each, WORLD, 0)
    batch = manager.prepare({sequence: [1]})
    with raises(ValueError, "in an open batch"):
        mpi.isend(manager, sequence, WORLD, 0)
    manager.rollback(batch)
    manager.free(sequence)
    with raises(ValueError, "has been freed"):
        mpi.isend(manager, sequence, WORLD, 0)
    other = a_sequence(manager, range(5), salt=type("Name", (str,), {})("x"))
    with nothing_changes(manager), raises(TypeError, "only str, bytes, int, bool and None can be saved or sent"):
        mpi.isend(manager, other, WORLD, 0)


@scenario(1)
def whether_mpi_takes_memory_of_a_gpu() -> None:
    class Comm:
        def Get_info(self) -> Any:  # noqa: N802
            info = MPI.Info.Create()
            if self.kinds is not None:
                info.Set("mpi_memory_alloc_kinds", self.kinds)
            return info

    comm = Comm()
    for kinds, aware in [("mpi,system", False), (None, False), ("system,cuda", True), ("cuda:device,mpi", True)]:
        comm.kinds = kinds
        assert mpi.gpu_aware(comm) is aware
    with changed(os, environ={"MPICH_GPU_SUPPORT_ENABLED": "1"}):
        comm.kinds = None
        assert mpi.gpu_aware(comm)
    assert mpi.gpu_aware(WORLD) is False


class Event:
    """Behind all that was queued until now, which is done when it has been asked for often enough."""

    def __init__(self, queue: list[Callable[[], None]]) -> None:
        self._queue, self._left = queue, 3

    @property
    def done(self) -> bool:
        self._left -= 1
        if self._left == 0:
            while self._queue:
                self._queue.pop(0)()
        return self._left <= 0


class LateDevice:
    """A GPU's backend, of a GPU that does what was queued long after the call."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []

    def current_stream(self) -> None: ...

    def event_behind(self, stream: None) -> Event:
        return Event(self.queue)

    def empty(self, shape: Any, dtype: Any, device: Any) -> Any:
        return np.zeros(shape, dtype)

    def empty_pinned(self, num_bytes: int) -> Any:
        return np.zeros(num_bytes, np.uint8)

    def copy_to_host(self, array: Any, host: Any, stream: None) -> None:
        self.queue.append(lambda: np.copyto(host[: len(array)], array))

    def copy_from_host(self, host: Any, array: Any, stream: None) -> None:
        self.queue.append(lambda: np.copyto(array, host[: len(array)]))

    def queued(self, call: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments, **options: self.queue.append(lambda: call(*arguments, **options))


@scenario(1)
def a_gpu_has_done_its_part_before_mpi_does_its_own() -> None:
    """With and without an MPI that is aware of it."""
    for aware in (False, True):
        device, tokens = LateDevice(), range(50)
        here, there = a_manager(), a_manager(block_size=8)
        sequence = a_sequence(here, tokens)
        late = {
            "gather_cache": device.queued(mpi.gather_cache),
            "reshape_and_cache": device.queued(mpi.reshape_and_cache),
            "backend_of": lambda names, pool, device=device: device,
            "_lane": mpi._GpuLane,
        }
        with small_pieces(), changed(mpi, **late):
            sending = mpi.isend(here, sequence, WORLD, 0, gpu_aware=aware)
            receiving = mpi.irecv(there, WORLD, 0, gpu_aware=aware)
            while not sending.test() & receiving.test():
                pass
        check(there, receiving.wait(), None, tokens, 50)


@scenario(1)
def what_a_transfer_leaves_behind_is_told_to_no_other_rank() -> None:
    """A group's transfer fails while MPI still has some of its memory, and is tidied up much later."""
    here, group = a_manager(heads=HEADS), a_group(ALONE, world=WORLD, timeout=0.2)
    held: list[Callable[[], None]] = []
    sending = mpi.isend(here, a_sequence(here, range(20)), WORLD, 0)
    with changed(mpi, _leave=lambda requests, then: held.append(then)), raises(mpi.TransferError, "next piece"):
        group.recv([0])
    with raises(mpi.TransferError, "gave up"):
        sending.wait()
    assert len(group.sequences) == len(group.open_batches) == 1
    group._calls = []
    with changed(group, _following=True):  # as on a rank that does not decide, too
        while held:
            held.pop(0)()
    assert group._calls == []
    assert not group.sequences
    group.check_integrity()


# Two ranks: a sequence moves.


@scenario(2)
def sequences_of_all_sizes_move() -> None:
    """Of all block sizes, with a prompt that is not done, into pools of which no other byte changes."""
    for piece, here, there in ((400, 4, 4), (10**6, 8, 3), (100, 4, 8), (1, 3, 16)):
        manager = a_manager(block_size=here if RANK == 0 else there)
        for count, length in ((0, 0), (0, 5), (1, 1), (4, 4), (7, 9), (24, 24), (61, 70)):
            tokens = range(100 * count, 100 * count + length)
            with small_pieces(piece):
                if RANK == 0:
                    sequence = a_sequence(manager, tokens, count=count)
                    before, stats = pools_of(manager), manager.stats()
                    mpi.send(manager, sequence, WORLD, 1)
                    assert same(pools_of(manager), before)
                    assert manager.stats() == stats
                else:
                    expected = pools_of(manager)
                    sequence = mpi.recv(manager, WORLD, 0)
                    flat = expected.reshape(2, 2, -1, *expected.shape[4:])
                    flat[:, :, slots_of(manager, sequence)] = kv_of(manager._cache, None, tokens[:count])
                    assert same(pools_of(manager), expected)
                    assert sequence.num_cached_tokens == 0
                check(manager, sequence, None, tokens, count)
                write(manager, sequence, None, [*tokens, 7, 8, 9], length + 3)
                check(manager, sequence, None, [*tokens[: length + 3], 7, 8, 9][: length + 3], length + 3)
                manager.free(sequence)


@scenario(2)
def every_dtype_and_salt_moves() -> None:
    salts = [None, "tenant", "\udcff", b"\0\xff", -5, 10**30, True]
    for dtype, salt in itertools.zip_longest(DTYPES, salts, fillvalue="float32"):
        manager, tokens = a_manager(dtype=dtype), range(13)
        if RANK == 0:
            mpi.send(manager, a_sequence(manager, tokens, salt), WORLD, 1)
        else:
            check(manager, mpi.recv(manager, WORLD, 0), salt, tokens, 13)
            assert manager.add(list(tokens), salt=salt).num_cached_tokens == 12
            assert manager.add(list(tokens), salt="another").num_cached_tokens == 0


@scenario(2)
def only_what_is_not_there_travels() -> None:
    """What is found by its tokens: all, all but one token, a few blocks, more than the sender has; none of a salt."""
    row = 2 * 2 * 2 * 3 * 2  # bytes of a token
    for count, length, there, found in (
        (24, 24, 24, 24),
        (23, 23, 24, 20),
        (24, 30, 9, 8),
        (9, 30, 30, 9),
        (8, 8, 7, 4),
    ):
        for salted in (False, True):
            manager, tokens = a_manager(), range(length)
            comm = Counted(WORLD)
            if RANK == 0:
                sequence = a_sequence(manager, tokens, count=count)
                mpi.send(manager, sequence, comm, 1)
                assert comm.bytes["data"] == (count if salted else count - found) * row
            else:
                cached = a_sequence(manager, range(there), "other" if salted else None)
                manager.free(cached)
                sequence = mpi.recv(manager, comm, 0)
                assert sequence.num_cached_tokens == (0 if salted else found)
            check(manager, sequence, None, tokens, count)
            write(manager, sequence, None, [*tokens, 99], length + 1)
            check(manager, sequence, None, [*tokens, 99], length + 1)


@scenario(2)
def sequences_that_were_forked_truncated_and_parked_move() -> None:
    manager, tokens = a_manager(host_blocks=40), [*range(22)]
    if RANK == 0:
        sequence = a_sequence(manager, tokens)
        fork = sequence.fork()
        sequence.truncate(10)  # within a block that is found
        write(manager, sequence, None, [*tokens[:10], 5, 6], 12)
        sequence.offload()
        fork.truncate(18)
        fork.offload()
        mpi.send(manager, sequence, WORLD, 1)
        mpi.send(manager, fork, WORLD, 1)
        assert sequence.num_host_blocks == 3  # it is where it was
        assert manager.num_available_blocks == 40
    else:
        a_sequence(manager, tokens[:9]).offload()  # and is found there
        sequence, fork = mpi.recv(manager, WORLD, 0), mpi.recv(manager, WORLD, 0)
        keys, values = manager._cache.gather_all(sequence.block_table[None], [12])
        assert same(np.stack([keys, values]), kv_of(manager._cache, None, [*tokens[:10], 5, 6]))
        assert sequence.num_cached_tokens == 8
        keys, values = manager._cache.gather_all(fork.block_table[None], [18])
        assert same(np.stack([keys, values]), kv_of(manager._cache, None, tokens[:18]))
        assert fork.remaining.tolist() == tokens[18:]
    manager.check_integrity()


@scenario(2)
def a_sequence_goes_on_while_it_is_sent() -> None:
    """It grows and is freed meanwhile; several travel at once, in both directions."""
    manager = a_manager(num_blocks=100)
    prompts = [[10 * i + RANK, *range(30 + i)] for i in range(4)]
    others = [[10 * i + 1 - RANK, *range(30 + i)] for i in range(4)]
    sequences = [a_sequence(manager, prompt) for prompt in prompts]
    with small_pieces():
        requests = [mpi.isend(manager, sequence, WORLD, 1 - RANK) for sequence in sequences]
        for sequence, prompt in zip(sequences[:2], prompts, strict=False):
            write(manager, sequence, None, [*prompt, 1, 2], len(prompt) + 2)
        for sequence in sequences[1:]:
            manager.free(sequence)
        arriving = [mpi.irecv(manager, WORLD, 1 - RANK) for _ in range(4)]
        left = [*requests, *arriving]
        while left:
            left = [request for request in left if not request.test()]
    for request in arriving:  # in whatever order
        sequence = request.wait()
        [at] = [other for other in others if other[0] == mpi._tokens_of(manager, sequence)[0]]
        check(manager, sequence, None, at, len(at))
        others.remove(at)
    check(manager, sequences[0], None, [*prompts[0], 1, 2], 33)
    assert len(manager.sequences) == 5


@scenario(2)
def prefill_on_one_rank_and_decode_on_the_other() -> None:
    """As if one rank had done both."""
    rng = np.random.default_rng(0)  # the same on both
    layers, prompt, steps = 2, [*range(40)], 6
    weights = rng.standard_normal((layers, 3, 64, 16)).astype(np.float32)

    def forward(manager: Any, sequence: Any, tokens: Sequence[int]) -> int:
        with manager.prepare({sequence: tokens}) as batch:
            x = np.sin(np.outer(np.asarray(tokens) + 1.0, np.arange(1, 65))).astype(np.float32)
            for layer, (q, k, v) in zip(manager._cache, weights, strict=True):
                query, key, value = ((x @ w).reshape(-1, heads, 8) for w, heads in ((q, 2), (k, 2), (v, 2)))
                layer.update(key, value, batch.slot_mapping)
                out = layer.attend(query, batch.block_tables, batch.seq_lens, batch.cu_seqlens)
                x = x + np.tile(out.reshape(len(x), 16), 4)
        return int(abs(x[-1].sum()) * 1000) % 50

    def decode(manager: Any, sequence: Any, tokens: list[int]) -> list[int]:
        for _ in range(steps):
            tokens.append(forward(manager, sequence, tokens[-1:]))
        return tokens

    def manager() -> Any:
        return a_manager(dim=8, dtype="float32")

    mine = manager()
    if RANK == 0:
        sequence = mine.add(prompt)
        first = forward(mine, sequence, sequence.remaining)
        mpi.send(mine, sequence, WORLD, 1)
        mine.free(sequence)
        WORLD.Send(np.array([first]), 1, tag=0)
    else:
        sequence, first = mpi.recv(mine, WORLD, 0), np.zeros(1, int)
        WORLD.Recv(first, 0, tag=0)
        tokens = decode(mine, sequence, first.tolist())
        alone = manager()
        sequence = alone.add(prompt)
        assert tokens == decode(alone, sequence, [forward(alone, sequence, sequence.remaining)])
        assert len(set(tokens)) > 2


# Two ranks: what goes wrong.


@scenario(2)
def what_does_not_fit_is_refused_on_both_sides() -> None:
    ours = "2 layers of 2 heads of 3 float16"
    for kind, text in (({"dtype": "float32"}, "2 layers of 2 heads of 3 float32"),
                       ({"dtype": ml_dtypes.bfloat16}, "2 layers of 2 heads of 3 bfloat16"),
                       ({"layers": 3}, "3 layers of 2 heads of 3 float16"),
                       ({"heads": 1}, "2 layers of 1 heads of 3 float16"),
                       ({"dim": 4}, "2 layers of 2 heads of 4 float16")):  # fmt: skip
        manager = a_manager(**(kind if RANK else {}))
        sequence = a_sequence(manager, range(10))
        with nothing_changes(manager), raises(mpi.TransferError, f"rank 0 offers {ours}, but this cache has {text}"):
            if RANK == 0:
                mpi.send(manager, sequence, WORLD, 1)
            else:
                mpi.recv(manager, WORLD, 0)
    transfer_works()


def transfer_works() -> None:
    """Nothing is left of what went wrong before."""
    manager, tokens = a_manager(), [3, *range(20)]
    if RANK == 0:
        mpi.send(manager, a_sequence(manager, tokens), WORLD, 1)
    else:
        check(manager, mpi.recv(manager, WORLD, 0), None, tokens, 21)
    WORLD.Barrier()


@scenario(2)
def the_receiver_has_no_room() -> None:
    """Until somebody lets go of blocks: then the sender's second try succeeds."""
    manager = a_manager(num_blocks=40 if RANK == 0 else 6)
    tokens = range(16)
    if RANK == 0:
        sequence = a_sequence(manager, tokens)
        with nothing_changes(manager), raises(mpi.TransferError, "rank 1 gave up: OutOfBlocksError: .*4"):
            mpi.send(manager, sequence, WORLD, 1)
        mpi.send(manager, sequence, WORLD, 1)
    else:
        other = a_sequence(manager, range(50, 62))
        with nothing_changes(manager), raises(OutOfBlocksError, "4"):
            mpi.recv(manager, WORLD, 0)
        manager.free(other)
        check(manager, mpi.recv(manager, WORLD, 0), None, tokens, 16)


@scenario(2)
def the_sender_has_no_room_for_what_is_parked() -> None:
    manager = a_manager(num_blocks=5, host_blocks=10)
    if RANK == 0:
        sequence = a_sequence(manager, range(16))
        sequence.offload()
        a_sequence(manager, range(50, 62))
        with nothing_changes(manager), raises(OutOfBlocksError, ""):
            mpi.isend(manager, sequence, WORLD, 1)
    transfer_works()


@scenario(2)
def another_version() -> None:
    manager = a_manager()
    sequence = a_sequence(manager, range(10))
    with nothing_changes(manager), changed(mpi, VERSION=RANK + 1):
        if RANK == 0:
            with raises(mpi.TransferError, "rank 1 speaks version 2 of the protocol, and this is 1"):
                mpi.send(manager, sequence, WORLD, 1)
        else:
            with raises(mpi.TransferError, "rank 0 speaks version 1 of the protocol, and this is 2"):
                mpi.recv(manager, WORLD, 0)
    transfer_works()


def word(kind: int, number: int, body: bytes = b"", magic: bytes = b"pagedkv\0") -> bytes:
    return struct.pack("<8sIIQ", magic, 2, kind, number) + body


def say(text: bytes, tag: int) -> None:
    WORLD.Send([text, MPI.BYTE], 1 - RANK, tag)


def offer(**values: Any) -> bytes:
    import json

    return json.dumps({"layers": 2, "heads": 2, "head_dim": 3, "dtype": "float16", "first": 0, "last": 2,
                       "num_tokens": 2, "num_remaining": 0, "piece": 5, "salt": ["None", ""], **values}
                      ).encode() + b"\n" + bytes(8)  # fmt: skip


@scenario(2)
def nonsense_for_a_receiver() -> None:
    tags = mpi._OFFERS + 1 + 3 * 10**6  # of a transfer of this number
    no_offer = [b"", b"hello", word(0, 10**6, magic=b"\0" * 8)]
    bad_offers = [word(0, 10**6, body) for body in (
        b"", b"\n", b"[]\n", b"\xff\n", b"{}\n", offer(piece=0), offer(num_tokens=-1), offer(num_tokens=3),
        offer(layers="2"), offer(num_tokens=True), offer(num_remaining=2**62), offer(salt=["str", 1]), offer(salt=[]),
        offer(salt=["bytes", "xy"]), offer(salt=None), offer(salt=["list", []]), offer(unknown=1), offer() + b"1",
        offer()[:-4],
    )]  # fmt: skip
    manager = a_manager()
    a_sequence(manager, range(10))
    for text in (*no_offer, *bad_offers, word(2, 10**6)):
        if RANK == 0:
            say(text, mpi._OFFERS)
            if text not in no_offer:
                say_nothing = bytearray(1000)
                WORLD.Recv(say_nothing, 1, tags + 1)
                assert say_nothing.startswith(word(3, 10**6, b"TransferError: "))
        else:
            expected = "expected a word of this protocol, but rank 0 says" if text in no_offer else "offer of rank 0"
            with nothing_changes(manager), raises(mpi.TransferError, expected):
                mpi.recv(manager, WORLD, 0)
    for heads, text in (((1, 2), "offers heads 1 to 2, expected 0 to 2"), ((0, 1), "heads 0 to 1")):
        if RANK == 0:
            say(word(0, 10**6, offer(first=heads[0], last=heads[1])), mpi._OFFERS)
            WORLD.Recv(bytearray(1000), 1, tags + 1)
        else:
            with nothing_changes(manager), raises(mpi.TransferError, text):
                mpi.recv(manager, WORLD, 0)
    for piece, text in ((bytes(95), "expected 96 bytes of rank 0, got 95"), (b"", "96 bytes of rank 0, got 0"),
                        (bytes(97), "expected 96 bytes of rank 0, got more")):  # fmt: skip
        if RANK == 0:
            say(word(0, 10**6, offer()), mpi._OFFERS)
            found = bytearray(32)
            WORLD.Recv(found, 1, tags + 1)
            assert found == word(1, 10**6, bytes(8))
            say(piece, tags + 2)
            WORLD.Recv(bytearray(1000), 1, tags + 1)
        else:
            with nothing_changes(manager), raises(mpi.TransferError, text):
                mpi.recv(manager, WORLD, 0)
    transfer_works()


@scenario(2)
def nonsense_for_a_sender() -> None:
    number = 10**6
    answers = [(b"hello", "expected a word of this protocol, but rank 1 says b'hello'"),
               (word(1, number, b"\xff" * 8), "rank 1 found 18446744073709551615 of 10 tokens"),
               (word(1, number, b"\x0b"), "rank 1 found 11 of 10 tokens"),
               (word(2, number), "expected the answer of rank 1, a word of kind 1, got one of 2"),
               (word(3, number, b"no \xff"), "rank 1 gave up: no \ufffd")]  # fmt: skip
    manager = a_manager()
    sequence = a_sequence(manager, range(10))
    tags = mpi._OFFERS + 1 + 3 * number
    for answer, text in answers:
        if RANK == 0:
            mpi._numbers = itertools.count(number)
            with nothing_changes(manager), raises(mpi.TransferError, text):
                mpi.send(manager, sequence, WORLD, 1)
        else:
            WORLD.Recv(bytearray(1000), 0, mpi._OFFERS)
            say(word(1, number - 1, bytes(8)), tags + 1)  # of another transfer that had the same tags: not heard
            say(answer, tags + 1)
            if not answer.startswith(word(3, number)):
                WORLD.Recv(bytearray(1000), 0, tags)
    if RANK == 0:
        mpi._numbers = itertools.count()
    transfer_works()


@scenario(2)
def nobody_is_there() -> None:
    """Each side waits for as long as it was told; what it gave up is not taken for the next transfer."""
    manager, tokens = a_manager(), range(10)
    sequence = a_sequence(manager, tokens)
    with nothing_changes(manager):
        start = time.monotonic()
        with raises(mpi.TransferError, f"waited 0.2 s for the {'offer' if RANK else 'answer'} of rank {1 - RANK}"):
            if RANK == 0:
                mpi.send(manager, sequence, WORLD, 1, timeout=0.2)
            else:
                mpi.recv(manager, ELSEWHERE, 0, timeout=0.2)
        assert 0.2 <= time.monotonic() - start < 5
    WORLD.Barrier()
    time.sleep(0.1)
    transfer_works()
    if RANK == 0:  # an answer, and then nothing
        with nothing_changes(manager), raises(mpi.TransferError, "waited 0.2 s for the acknowledgement of rank 1"):
            mpi.send(manager, sequence, WORLD, 1, timeout=0.2)
    else:
        heard = bytearray(1000)
        WORLD.Recv(heard, 0, mpi._OFFERS)
        number = struct.unpack_from("<8sIIQ", heard)[3]
        say(word(1, number, bytes(8)), mpi._OFFERS + 1 + 3 * number + 1)
        WORLD.Recv(bytearray(480), 0, mpi._OFFERS + 1 + 3 * number + 2)
        WORLD.Recv(bytearray(1000), 0, mpi._OFFERS + 1 + 3 * number)
    transfer_works()
    if RANK == 0:  # an offer, and then nothing
        say(word(0, 10**6, offer()), mpi._OFFERS)
    else:
        with nothing_changes(manager), raises(mpi.TransferError, "waited 0.2 s for the next piece of rank 0"):
            mpi.recv(manager, WORLD, 0, timeout=0.2)
    WORLD.Barrier()
    transfer_works()


@scenario(2)
def a_request_that_is_cancelled() -> None:
    """The other side hears of it. A request raises the same again, and one that is done is not cancelled."""
    stalled = []

    def stalls(usual: Any) -> Any:
        def call(lane: Any, i: int, *which: Any) -> Any:
            while i == 5:
                stalled.append(i)
                yield 0
            yield from usual(lane, i, *which)

        return call

    for who in (0, 1):
        manager, name = a_manager(), ("send", "received")[who]
        if RANK == 0:
            sequence = a_sequence(manager, range(100))
        WORLD.Barrier()
        stall = {name: stalls(getattr(mpi._Lane, name))} if who == RANK else {}
        with nothing_changes(manager), small_pieces(), changed(mpi._Lane, **stall):
            request = mpi.isend(manager, sequence, WORLD, 1) if RANK == 0 else mpi.irecv(manager, WORLD, 0)
            if who == RANK:
                while not stalled:
                    request.test()
                request.cancel()
                text = "the transfer was cancelled"
            else:
                text = f"rank {who} gave up: GeneratorExit"
            for _ in range(2):
                with raises(mpi.TransferError, text):
                    request.wait()
            request.cancel()
    transfer_works()


# Heads over the ranks of a group.

HEADS = 4


def a_group(comm: Any, *, num_heads: int = HEADS, **options: Any) -> Any:
    sizes = {name: options.pop(name) for name in ("layers", "num_blocks", "block_size") if name in options}
    cache = a_manager(heads=num_heads // comm.size, **sizes)._cache
    return mpi.GroupManager(cache, comm, num_heads, **options)


def heads_of(group: Any) -> dict[str, Any]:
    return {"heads": slice(group._share.first, group._share.last), "num_heads": group._num_heads}


def run_layers(group: Any, batch: Any) -> None:
    """K and V of the new tokens, of this rank's heads."""
    new = batch._new
    for i, sequence in enumerate(batch.sequences):
        mine = new.index == i
        known = tokens_of(group, sequence)
        tokens = [*known, *new.tokens[mine]]
        kv = kv_of(group._cache, None, tokens, **heads_of(group))[:, :, len(known) :]
        group._cache.update_all(*kv, batch.slot_mapping[: batch.num_tokens][mine])


def tokens_of(group: Any, sequence: Any) -> list[int]:
    """Of one in an open batch, too."""
    full, begun = divmod(sequence.num_tokens, group._block_size)
    blocks = [group._pool.tokens_at(sequence._run, column) for column in range(full)]
    return [int(token) for block in (*blocks, group._rows.tail(sequence._row)[:begun]) for token in block]


def check_group(group: Any) -> None:
    """That all managers of a group are equal, and that all K and V are right."""
    group.check_integrity()
    state = [repr(group.stats())]
    for sequence in sorted(group.sequences, key=lambda each: each._row):
        tokens = tokens_of(group, sequence)
        state.append(f"{sequence!r} {tokens} {sequence.remaining}")
        keys, values = group._cache.gather_all(sequence.block_table[None], [len(tokens)])
        expected = kv_of(group._cache, None, tokens, **heads_of(group))
        assert same(keys, expected[0]), sequence
        assert same(values, expected[1]), sequence
    digest = np.frombuffer(hashlib.blake2b("\n".join(state).encode()).digest(), np.uint8)
    of_all = np.zeros((group._comm.size, len(digest)), np.uint8)
    group._comm.Allgather(digest, of_all)
    assert (of_all == digest).all()


@scenario(1, 2, 4)
def all_managers_of_a_group_stay_equal() -> None:
    """Whatever rank 0 does: it runs out of blocks, evicts, shares, forks, truncates, rolls back, drafts and frees."""
    comm = Counted(WORLD)
    group = a_group(comm, num_blocks=24, host_blocks=8)
    steps = failed = 0
    if RANK == 0:
        rng = np.random.default_rng(0)
        while steps < 60:
            living = sorted(group.sequences, key=lambda each: each._row)
            deed = rng.integers(10)
            if deed < 3 and len(living) < 8:
                group.add([int(rng.integers(2)), *range(rng.integers(1, 40))])
            elif deed == 3 and living:
                group.free(living[rng.integers(len(living))])
            elif deed == 4 and living and len(living) < 8:
                living[rng.integers(len(living))].fork()
            elif deed == 5 and living:
                sequence = living[rng.integers(len(living))]
                sequence.truncate(int(rng.integers(sequence.num_tokens + 1)))
            elif deed == 6 and living:
                with contextlib.suppress(OutOfBlocksError):
                    living[rng.integers(len(living))].offload()
            elif living:
                chosen = [each for each in living if rng.random() < 0.7]
                new = {each: [*each.remaining[: rng.integers(20)]] or [7] * rng.integers(1, 3) for each in chosen}
                try:
                    batch = group.prepare(new)
                except OutOfBlocksError:
                    failed += 1  # which the others hear of, too
                    group.free(living[0])
                    continue
                steps += 1
                run_layers(group, batch)
                if rng.random() < 0.2:
                    group.rollback(batch)
                elif rng.random() < 0.3:
                    group.commit(batch, {each: len(new[each]) // 2 for each in chosen[:2]})
                else:
                    with batch:
                        pass
        stats = group.stats()
        assert all((stats.evictions, stats.copies, stats.restored, stats.hits)), stats
        for sequence in group.sequences:
            if sequence.num_host_blocks:
                group.free(sequence)
        group.close()
        assert failed
        assert comm.messages["step"] == steps + failed + 1
        assert comm.bytes["step"] == comm.messages["step"] * mpi.STEP_BYTES
    else:
        while (batch := group.follow()) is not None:
            run_layers(group, batch)
    check_group(group)


@scenario(2)
def a_long_prompt_takes_a_second_message() -> None:
    comm = Counted(WORLD)
    group = a_group(comm, num_blocks=1000)
    if RANK == 0:
        with group.add(range(3000)) as sequence, group.prepare({sequence: sequence.remaining}) as batch:
            run_layers(group, batch)
        buffers = group.buffers(2, 8, 800)
        sequence = group.add([*range(2999), 1], salt=b"x")
        assert sequence.num_cached_tokens == 0
        again = group.add([*range(2999), 1])
        assert again.num_cached_tokens == 2996
        batch = group.prepare({again: again.remaining}, buffers=buffers)
        run_layers(group, batch)
        group.commit(batch)
        group.close()
    else:
        run_layers(group, group.follow())
        buffers = group.buffers(2, 8, 800)
        batch = group.follow(buffers=buffers)
        assert batch.slot_mapping is buffers.slot_mapping
        run_layers(group, batch)
        assert group.follow() is None
    assert comm.messages["step"] == 3 + 2
    check_group(group)


@scenario(2)
def a_group_is_told_whether_mpi_takes_memory_of_a_gpu() -> None:
    group, seen = a_group(WORLD, world=WORLD), []

    def sending(*arguments: Any) -> Any:
        seen.append(("send", arguments[6]))
        return
        yield

    def receiving(*arguments: Any) -> Any:
        seen.append(("recv", arguments[5]))
        return object()
        yield

    with changed(mpi, _sending=sending, _receiving=receiving):
        if RANK == 0:
            sequence = group.add([1])
            for aware in (None, False, True):
                group.send(sequence, [0, 1], gpu_aware=aware)
                group.recv([0, 1], gpu_aware=aware)
            group.close()
        else:
            assert group.follow() is None
    assert seen == [(way, aware) for aware in (None, False, True) for way in ("send", "recv")]


@scenario(1)
def numbers_of_what_is_gone_are_used_again() -> None:
    """Or they would not fit into 32 bits some day."""
    group = a_group(ALONE)
    first, second = group.add([1]), group.add([2])
    for token in range(20):
        batch = group.prepare({first: [token]})
        assert [group._told[each] for each in (first, second, batch)] == [0, 1, 2]
        group.commit(batch)
    group.free(first)
    assert group._told == {second: 1, group.add([3]): 0}


@scenario(2)
def what_a_group_refuses() -> None:
    for heads, text in ((3, "3 heads cannot be divided among 2 ranks"), (1, "1 heads cannot"),
                        (8, "each of 2 ranks has 4 of 8 heads, but the cache has 2")):  # fmt: skip
        with raises(ValueError, text):
            mpi.GroupManager(a_manager()._cache, WORLD, heads)
    group = a_group(WORLD, timeout=0.3)
    if RANK == 0:
        with raises(ValueError, "rank 0 does not follow"):
            group.follow()
        sequence = group.add([1])
        for call in (lambda: group.send(sequence, [1]), lambda: group.recv([1])):
            with raises(ValueError, "other groups are not known"):
                call()
        group = a_group(ALONE, world=WORLD)
        sequence = group.add([1])
        for dests in ([], [0, 1, 2]):
            with raises(ValueError, f"4 heads cannot be divided among {len(dests)} ranks"):
                group.send(sequence, dests)
        for call in (lambda: group.send(sequence, [1.0]), lambda: group.recv([1.0])):
            with raises(TypeError, "cannot be interpreted as an integer"):
                call()
        with raises(ValueError, "in an open batch"):  # and nobody is told
            group.prepare({group.add([1, 2]): [1], **{key: [1] for key in group.prepare({sequence: [1]}).sequences}})
        with raises(TypeError, "only str, bytes, int, bool and None can be saved or sent"):
            group.add([1], salt=type("Name", (str,), {})("x"))
        assert len(group.sequences) == 2
        with raises(ValueError, "these buffers are another manager's"):
            group.prepare({group.add([1, 2]): [1, 2]}, buffers=a_manager().buffers(1, 2, 1))
        assert mpi._CALLS[group._calls[-2][0]] == "add"
    else:
        with raises(ValueError, "rank 0 decides, and the other ranks follow"):
            group.add([1])
        assert not group.sequences
    WORLD.Barrier()
    group = a_group(WORLD, timeout=0.3)
    if RANK == 1:
        with raises(mpi.TransferError, "waited 0.3 s for the step of rank 0, and it did not come"):
            group.follow()
    WORLD.Barrier()
    group = a_group(WORLD)
    if RANK == 1:  # a rank whose manager goes astray
        with changed(group, _is_silent=True):
            group.prepare({group.add([5]): [5]})
    with devices_debug(), raises(mpi.TransferError, "the managers of the group differ"):
        if RANK == 0:
            group.prepare({group.add([1, 2]): [1, 2]})
        else:
            group.follow()
    group = a_group(WORLD)
    with changed(mpi, VERSION=RANK + 1):
        if RANK == 0:
            group.close()
        else:
            with raises(mpi.TransferError, "rank 0 speaks version 1 of the protocol, and this is 2"):
                group.follow()


def devices_debug() -> Any:
    return changed(mpi.devices, DEBUG=True)


def moves(sizes: tuple[int, int], num_heads: int) -> None:
    """A sequence from the first ranks of all to the next ones, and some of it back."""
    first, second = sizes
    ranks = range(first), range(first, first + second)
    mine = [*[0] * first, *[1] * second, *[2] * SIZE][RANK]
    comm = WORLD.Split(mine, RANK)
    if mine == 2:
        WORLD.Barrier()
        return
    tokens, more = [*range(30)], [*range(30), 5, 6, 7]
    counted = Counted(ELSEWHERE)
    group = a_group(comm, num_heads=num_heads, world=counted, block_size=4 if mine else 8)
    with small_pieces():
        if comm.rank == 0:
            if mine == 0:
                sequence = group.add(tokens)
                with group.prepare({sequence: sequence.remaining[:25]}) as batch:
                    run_layers(group, batch)
                group.send(sequence, ranks[1])
                back = group.recv(ranks[1])
                assert back.num_cached_tokens == 24
                assert tokens_of(group, back) == more
            else:
                sequence = group.recv(ranks[0])
                assert sequence.remaining.tolist() == tokens[25:]
                assert tokens_of(group, sequence) == tokens[:25]
                with group.prepare({sequence: more[25:]}) as batch:
                    run_layers(group, batch)
                group.send(sequence, ranks[0])
            group.close()
        else:
            while (batch := group.follow()) is not None:
                run_layers(group, batch)
    check_group(group)
    # Each rank speaks with those whose share overlaps its own; all bytes of K and V go once.
    theirs = num_heads // sizes[1 - mine]
    overlapping = {head // theirs for head in range(group._share.first, group._share.last)}
    assert counted.messages["offer"] == len(overlapping)
    row = 2 * 2 * 3 * 2 * (group._share.last - group._share.first)
    assert counted.bytes["data"] == row * (25 if mine == 0 else 33 - 24)
    WORLD.Barrier()


@scenario(4)
def heads_are_cut_anew_among_four() -> None:
    for sizes in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (1, 1)):
        moves(sizes, 12)


@scenario(6)
def heads_are_cut_anew_among_six() -> None:
    for sizes in ((2, 4), (4, 1), (4, 2), (2, 3), (3, 2)):
        moves(sizes, 12)


@scenario(4)
def a_group_gets_a_sequence_on_all_ranks_or_on_none() -> None:
    """One rank of it fails in the middle, and then another try succeeds."""
    mine = int(RANK > 0)
    comm = WORLD.Split(mine, RANK)
    if RANK == 0:
        manager = a_manager(heads=6)
        sequence = a_sequence(manager, range(30))
        for attempt in range(2):
            parts = [mpi._Part(1 + i, 2 * i, 2 * i + 2) for i in range(3)]
            steps = mpi._sending(manager, sequence, ELSEWHERE, parts, 6, 60.0, None)
            if attempt == 0:
                with small_pieces(), nothing_changes(manager), raises(mpi.TransferError, r"rank \d gave up: "):
                    mpi.Request(steps).wait()
            else:
                mpi.Request(steps).wait()
    else:
        group = a_group(comm, num_heads=6, world=ELSEWHERE)
        usual, calls = mpi._Lane.received, itertools.count()

        def received(lane: Any, i: int, slots: Any) -> Any:
            yield from usual(lane, i, slots)
            if next(calls) == 2:
                raise mpi.TransferError("a cosmic ray")

        with nothing_changes(group), changed(mpi._Lane, received=received if RANK == 2 else usual):
            text = "a cosmic ray" if RANK == 2 else "another rank of this group failed|gave up: .*cosmic ray"
            with raises(mpi.TransferError, text):
                group.recv([0]) if comm.rank == 0 else group.follow()
        check_group(group)
        if comm.rank == 0:
            sequence = group.recv([0])
            assert tokens_of(group, sequence) == [*range(30)]
            group.close()
        else:
            assert group.follow() is None
        check_group(group)


@scenario(1, 2)
def a_group_knows_names() -> None:
    group = a_group(WORLD)
    if RANK == 0:
        sequence = group.add([1, 2, 3], name="chat")
        with group.prepare({sequence: [1, 2, 3]}) as batch:
            run_layers(group, batch)
        group.close()
    else:
        while (batch := group.follow()) is not None:
            run_layers(group, batch)
    assert [(name, each.num_tokens) for name, each in group.named.items()] == [("chat", 3)]


# One sequence over ranks.


@scenario(1, 2, 4)
def attention_over_all_ranks_is_that_of_one() -> None:
    """Each has a stretch of the positions; the last one has those of the queries."""
    rng = np.random.default_rng(0)  # the same on all ranks
    length, new, heads, kv_heads, dim = 301, 7, 4, 2, 16
    key, value = rng.standard_normal((2, length, kv_heads, dim)).astype(np.float32)
    query = rng.standard_normal((new, heads, dim)).astype(np.float32)
    bounds = [*np.linspace(0, length - new, SIZE + 1).astype(int)[:-1].tolist(), length]
    bounds[-2] = min(bounds[-2], length - new)
    sinks = rng.standard_normal(heads).astype(np.float32)

    def attend(first: int, last: int, query: Any = query, key: Any = key, value: Any = value, **options: Any) -> Any:
        manager = a_manager(layers=1, num_blocks=40, block_size=8, heads=kv_heads, dim=dim, dtype=key.dtype)
        sequence = manager.add(range(first, last), salt=first)  # others must not share what stands elsewhere
        with manager.prepare({sequence: sequence.remaining}) as batch:
            manager._cache[0].update(key[first:last], value[first:last], batch.slot_mapping)
        return manager._cache[0].attend(
            query, batch.block_tables, batch.seq_lens, [0, new], return_lse=True, **options
        )  # fmt: skip

    for with_sinks in (False, True):
        is_last = RANK == SIZE - 1
        first_sinks = sinks if with_sinks else None
        ours = attend(bounds[RANK], bounds[RANK + 1], causal=is_last, sinks=first_sinks if RANK == 0 else None)
        comm = Counted(WORLD)
        out, lse = mpi.merge_ranks(*ours, comm)
        assert comm.messages == {"gathered": 1}
        assert comm.bytes["gathered"] == 4 * new * heads * (dim + 1)
        expected_out, expected_lse = attend(0, length, sinks=first_sinks)
        # Sums of 301 terms of float32, of which each is rounded: far below 301 * 2**-24 of values up to 4.
        assert abs(out - expected_out).max() < 3e-6, abs(out - expected_out).max()
        assert abs(lse - expected_lse).max() < 3e-6
        on_all = np.zeros((SIZE, *out.shape), np.float32)
        WORLD.Allgather(out, on_all)
        assert (on_all == out).all()

    narrow = {"query": query.astype(np.float16), "key": key.astype(np.float16), "value": value.astype(np.float16)}
    ours = attend(bounds[RANK], bounds[RANK + 1], causal=is_last, **narrow)
    out, lse = mpi.merge_ranks(*ours, WORLD)
    assert (out.dtype, lse.dtype) == (np.float16, np.float32)
    outs, lses = np.empty((SIZE, *out.shape), np.float16), np.empty((SIZE, *lse.shape), np.float32)
    WORLD.Allgather([ours[0], MPI.BYTE], [outs, MPI.BYTE])
    WORLD.Allgather(ours[1], lses)
    weights = np.exp(lses.astype(np.float64))[..., None]
    exact = (outs * weights).sum(0) / weights.sum(0)
    assert (abs(out - exact) <= 0.505 * np.spacing(abs(exact).astype(np.float16))).all(), "it is rounded once"


@scenario(1, 2, 4)
def the_formulas_of_the_page() -> None:
    """Those of docs/scale.md, against what all ranks send."""
    page = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
    [lines] = [text for text in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "def transfer" in text]
    formulas: dict[str, Any] = {}
    with contextlib.redirect_stdout(None):
        exec(lines, formulas)
    assert (formulas["STEP"], formulas["PIECE"]) == (mpi.STEP_BYTES, mpi.PIECE_BYTES)

    def of_all(comm: Counted) -> tuple[int, int]:
        ours, total = np.array([sum(comm.messages.values()), sum(comm.bytes.values())]), np.zeros(2, int)
        WORLD.Allreduce(ours, total)
        return int(total[0]), int(total[1])

    for tokens, found, piece in ((0, 0, 400), (5, 0, 400), (70, 0, 400), (70, 40, 400), (3000, 0, 10**4), (64, 64, 1)):
        comm = Counted(WORLD)
        here, there = (a_manager(num_blocks=800, heads=12) for _ in range(2))
        sequence = a_sequence(here, range(tokens))
        there.free(a_sequence(there, range(found)))
        with small_pieces(piece):
            requests = [mpi.isend(here, sequence, comm, SIZE - 1)] if RANK == 0 else []
            requests += [mpi.irecv(there, comm, 0)] if RANK == SIZE - 1 else []
            while sum(request.test() for request in requests) < len(requests):
                pass
        assert of_all(comm) == formulas["transfer"](2, 12, 3, 2, tokens, found, piece=piece)

    for sources, dests in ((1, 1), (1, 3), (3, 1), (2, 2), (1, 2), (2, 1)):
        if sources + dests > SIZE:
            continue
        comm, mine = Counted(WORLD), [*[0] * sources, *[1] * dests, *[2] * SIZE][RANK]
        of_group = WORLD.Split(mine, RANK)
        if mine < 2:
            ranks = (range(sources, sources + dests), range(sources))[mine]
            group = a_group(of_group, num_heads=12, num_blocks=800, world=comm)
            with small_pieces(10**4):
                if of_group.rank:
                    while (batch := group.follow()) is not None:
                        run_layers(group, batch)
                elif mine:
                    group.recv(ranks)
                else:
                    sequence = group.add(range(2000))
                    with group.prepare({sequence: sequence.remaining}) as batch:
                        run_layers(group, batch)
                    group.send(sequence, ranks)
                if of_group.rank == 0:
                    group.close()
            check_group(group)
        expected = formulas["transfer"](2, 12, 3, 2, 2000, sources=sources, dests=dests, piece=10**4)
        assert of_all(comm) == expected, (of_all(comm), expected, sources, dests)

    comm = Counted(WORLD)
    group = a_group(comm, num_blocks=2000)
    for num_seqs, length in ((1, 3), (256, 1), (256, 9)):
        sequences = [group.add([]) for _ in range(num_seqs)] if RANK == 0 else []
        for new in ([], range(length)):  # those who are added are in the message of the first step
            comm.messages.clear()
            comm.bytes.clear()
            if RANK == 0:
                group.rollback(group.prepare(dict.fromkeys(sequences, new)))
            else:
                group.follow()
        messages, num_bytes = formulas["step"](SIZE, num_seqs, num_seqs * length)
        others = SIZE - 1
        assert comm.messages["step"] * others == messages
        assert 0 <= num_bytes - comm.bytes["step"] * others <= (100 * others if num_bytes > 8192 * others else 0)

    comm, out, lse = Counted(WORLD), np.zeros((5, 4, 8), np.float16), np.zeros((5, 4), np.float32)
    for _ in range(3):
        mpi.merge_ranks(out, lse, comm)
    messages, num_bytes = of_all(comm)
    assert (messages * (SIZE - 1), num_bytes * (SIZE - 1)) == formulas["context"](SIZE, 3, 5, 4, 8, 2)


@scenario(2)
def a_rank_that_does_not_take_part() -> None:
    if RANK == 0:
        ours = np.ones((1, 1, 4), np.float16), np.zeros((1, 1), np.float32)
        with raises(mpi.TransferError, "waited 0.2 s for the result of another rank"):
            mpi.merge_ranks(*ours, ASIDE, timeout=0.2)
    WORLD.Barrier()


# Two ranks, of which one dies.


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def outlives(text: str, act: Callable[[Any, Any], Any]) -> None:
    manager = a_manager()
    sequence = a_sequence(manager, range(RANK, RANK + 60))
    start = time.monotonic()
    with small_pieces(), nothing_changes(manager), raises(mpi.TransferError, text):
        act(manager, sequence)
    assert time.monotonic() - start < 10


@deadly
def the_sender_dies_in_the_middle() -> None:
    if RANK == 0:
        usual = mpi._Lane.send

        def send(lane: Any, i: int, *which: Any) -> Any:
            if i == 3:
                die()
            yield from usual(lane, i, *which)

        mpi._Lane.send = send
        with small_pieces():
            manager = a_manager()
            mpi.send(manager, a_sequence(manager, range(60)), WORLD, 1)
    else:
        outlives("waited 1 s for the next piece of rank 0", lambda manager, _: mpi.recv(manager, WORLD, 0, timeout=1))


@deadly
def the_receiver_dies_in_the_middle() -> None:
    if RANK == 1:
        usual = mpi._Lane.receive

        def receive(lane: Any, i: int, slots: Any) -> Any:
            if i == 3:
                die()
            yield from usual(lane, i, slots)

        mpi._Lane.receive = receive
        with small_pieces():
            mpi.recv(a_manager(), WORLD, 0)
    else:
        outlives("waited 1 s for the", lambda manager, sequence: mpi.send(manager, sequence, WORLD, 1, timeout=1))


@deadly
def the_receiver_exits_before_it_answers() -> None:
    if RANK == 1:
        os._exit(0)
    outlives("waited 1 s for the answer", lambda manager, sequence: mpi.send(manager, sequence, WORLD, 1, timeout=1))


def main(names: Sequence[str]) -> None:
    faulthandler.dump_traceback_later(100, exit=True)
    for name in names:
        try:
            globals()[name]()
            if name not in DEADLY:
                WORLD.Barrier()
        except BaseException:
            print(f"[FAILED {name}] on rank {RANK}:\n{traceback.format_exc()}", flush=True)
            os._exit(1)
        if RANK == 0 or name in DEADLY:
            print(f"[passed {name}]", flush=True)
    if names[0] in DEADLY:  # MPI waits for the dead when it ends
        os._exit(0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    ELSEWHERE, ASIDE, ALONE = WORLD.Dup(), WORLD.Dup(), MPI.COMM_SELF
    main(sys.argv[1:])
