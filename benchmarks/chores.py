"""The host's work for many sequences: the manager, against what one would write without it."""

import gc
import time
import tracemalloc
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupy_pagedkv import KVCacheManager, LayeredPagedKVCache

from .cases import BLOCK_SIZE, OURS
from .timing import in_turns

try:
    import xxhash
except ImportError:
    xxhash = None


@dataclass
class Chore:
    """What was measured of the manager; times in seconds, medians, the manager's first."""

    label: str
    seconds: dict[str, float]
    at_least: dict[str, float]
    """How many times as fast as others the manager sets itself to be."""
    note: str = ""
    """What else was measured."""

    def ratio_to(self, name: str) -> float:
        return self.seconds[name] / self.seconds[OURS]


def a_manager(num_blocks: int) -> KVCacheManager:
    return KVCacheManager(LayeredPagedKVCache(1, num_blocks, BLOCK_SIZE, 1, 1, "uint8", "cpu"))


class PlainSequence:
    """As one would write it who has no manager: lists, and a loop over the sequences."""

    def __init__(self, blocks: list[int], tokens: list[int]) -> None:
        self.blocks, self.tokens = blocks, tokens


def plain_step(sequences: Sequence[PlainSequence], new: Sequence[int], free: deque[int]) -> list[np.ndarray]:
    slots, positions, lengths, firsts, tables = [], [], [], [0], []
    for sequence in sequences:
        position = len(sequence.tokens)
        if position % BLOCK_SIZE == 0:
            sequence.blocks.append(free.popleft())
        slots.append(sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        positions.append(position)
        lengths.append(position + 1)
        firsts.append(firsts[-1] + 1)
    longest = max(len(sequence.blocks) for sequence in sequences)
    for sequence in sequences:
        tables.append(sequence.blocks + [0] * (longest - len(sequence.blocks)))
    arrays = [np.array(slots, np.int64), np.array(positions, np.int64), np.array(lengths, np.int32)]
    arrays += [np.array(firsts, np.int32), np.array(tables, np.int32)]
    for sequence, token in zip(sequences, new, strict=True):
        sequence.tokens.append(token)
    return arrays


def decode_chore(rounds: int) -> Chore:
    """A token for each of 256 sequences, which grow from 200 to 2,000 tokens by one in each round."""
    rng = np.random.default_rng(0)
    manager = a_manager(60_000)
    sequences, plain = [], []
    for length in rng.integers(200, 2001, 256).tolist():
        tokens = rng.integers(0, 100_000, length).tolist()
        sequences.append(manager.add(tokens))
        manager.commit(manager.prepare({sequences[-1]: tokens}))
        plain.append(PlainSequence(sequences[-1].block_table.tolist(), tokens))
    used = sum(len(sequence.blocks) for sequence in plain)
    free = deque(range(used, 60_000))
    new = rng.integers(0, 100_000, 256).tolist()
    by_sequence = {sequence: [token] for sequence, token in zip(sequences, new, strict=True)}
    arrays: dict[str, list[np.ndarray]] = {}

    def ours() -> float:
        start = time.perf_counter()
        batch = manager.prepare(by_sequence)
        manager.commit(batch)
        seconds = time.perf_counter() - start
        arrays[OURS] = [batch.slot_mapping, batch.positions, batch.seq_lens, batch.cu_seqlens, batch.block_tables]
        return seconds

    def a_loop() -> float:
        start = time.perf_counter()
        arrays["plain loop"] = plain_step(plain, new, free)
        return time.perf_counter() - start

    seconds = in_turns({OURS: ours, "plain loop": a_loop}, rounds)
    for a, b in zip(*arrays.values(), strict=True):
        if a.dtype != b.dtype or not np.array_equal(a, b):
            raise SystemExit("decode: the manager and the plain loop disagree")
    return Chore("prepare + commit, a token of 256 sequences", seconds, {"plain loop": 3.0})


def add_chore(as_list: bool, rounds: int) -> Chore:
    """A prompt of 16,384 tokens that is in the pool."""
    prompt = np.random.default_rng(0).integers(0, 100_000, 16_384)
    manager = a_manager(2000)
    with manager.add(prompt) as sequence:
        manager.commit(manager.prepare({sequence: prompt}))
    tokens: Any = prompt.tolist() if as_list else prompt

    def ours() -> float:
        start = time.perf_counter()
        sequence = manager.add(tokens)
        seconds = time.perf_counter() - start
        if sequence.num_cached_tokens != len(prompt) - BLOCK_SIZE:
            raise SystemExit(f"add: {sequence.num_cached_tokens} tokens were found")
        manager.free(sequence)
        return seconds

    def hashed() -> float:
        """Each block's hash covers the one before, as nano-vllm has it."""
        start = time.perf_counter()
        hashes: list[int] = []
        for i in range(0, len(tokens), BLOCK_SIZE):
            h = xxhash.xxh64()
            if hashes:
                h.update(hashes[-1].to_bytes(8, "little"))
            h.update(np.array(tokens[i : i + BLOCK_SIZE]).tobytes())
            hashes.append(h.intdigest())
        return time.perf_counter() - start

    same = prompt.copy()

    def floor() -> float:
        """To read the tokens, and to compare them."""
        start = time.perf_counter()
        if as_list:
            array("i", tokens)
        else:
            np.array(tokens, np.int32)
            np.array_equal(tokens, same)
        return time.perf_counter() - start

    name = "array('i', tokens)" if as_list else "comparing arrays"
    calls = {OURS: ours, name: floor} if xxhash is None else {OURS: ours, name: floor, "xxhash": hashed}
    label = f"add, 16,384 tokens that hit, {'a list' if as_list else 'an array'}"
    at_least = {name: 1 / 1.5 if as_list else 1 / 6, "xxhash": 2.0 if as_list else 4.0}
    return Chore(label, in_turns(calls, rounds), at_least)


def admission_chore(length: int, rounds: int) -> Chore:
    """A prompt of 16,384 tokens, none of which is found, takes the place of old prompts of ``length``."""
    rng = np.random.default_rng(0)
    blocks = length // BLOCK_SIZE
    manager = a_manager(40 * 1024 // blocks * blocks)
    fill(manager, length, rng)

    def ours() -> float:
        tokens = rng.integers(0, 100_000, 16_384)
        before = manager.stats().evictions
        *seconds, _ = come_and_go(manager, tokens)
        if manager.stats().evictions != before + 1024:
            raise SystemExit(f"admission: {manager.stats().evictions - before} blocks were evicted")
        return sum(seconds)

    seconds = in_turns({OURS: ours}, min(rounds, 30))  # while there are old prompts
    return Chore(f"16,384 new tokens, evicts prompts of {length:,} tokens", seconds, {})


def come_and_go(manager: KVCacheManager, tokens: np.ndarray) -> tuple[float, float, float, float]:
    """The seconds of each call that a prompt takes."""
    start = time.perf_counter()
    sequence = manager.add(tokens)
    added = time.perf_counter()
    batch = manager.prepare({sequence: sequence.remaining})
    prepared = time.perf_counter()
    manager.commit(batch)
    committed = time.perf_counter()
    manager.free(sequence)
    return added - start, prepared - added, committed - prepared, time.perf_counter() - committed


def fill(manager: KVCacheManager, length: int, rng: np.random.Generator) -> None:
    """Prompts come and go until all blocks are cached, or nearly."""
    for _ in range(manager.num_available_blocks // (length // BLOCK_SIZE)):
        come_and_go(manager, rng.integers(0, 100_000, length))


def pauses_chore(length: int, num_blocks: int, rounds: int) -> Chore:
    """The longest call in a pool full of cached prompts, with the garbage collector off; and the host's memory."""
    rng = np.random.default_rng(0)
    cache = LayeredPagedKVCache(1, num_blocks, BLOCK_SIZE, 1, 1, "uint8", "cpu")
    gc.disable()
    tracemalloc.start()
    try:
        manager = KVCacheManager(cache)
        fill(manager, length, rng)
        bytes_a_block = tracemalloc.get_traced_memory()[0] / manager.stats().cached_blocks
        tracemalloc.stop()
        new = (rng.integers(0, 100_000, 16_384) for _ in range(rounds))
        calls = [seconds for tokens in new for seconds in come_and_go(manager, tokens)]
    finally:
        tracemalloc.stop()
        gc.enable()
    middle, most = np.percentile(calls, (50, 99.9)).tolist()
    note = f"99.9% {most * 1e6:.0f}, longest {max(calls) * 1e6:.0f} µs; {bytes_a_block:.0f} bytes a cached block"
    return Chore(f"any call, {num_blocks:,} blocks cached, {length:,} tokens each", {OURS: middle}, {}, note)


def size_chore(rounds: int, sizes: tuple[int, int] = (1000, 1_000_000)) -> Chore:
    """A prompt comes and goes in a pool in which each block is cached, so that as many have to be evicted."""

    def in_pool(num_blocks: int) -> Callable[[], float]:
        rng = np.random.default_rng(0)
        manager = a_manager(num_blocks)
        fill(manager, 1000 * BLOCK_SIZE, rng)

        def a_prompt() -> float:
            tokens = rng.integers(0, 100_000, 400)
            start = time.perf_counter()
            with manager.add(tokens) as sequence:
                manager.commit(manager.prepare({sequence: tokens}))
                for _ in range(10):
                    manager.commit(manager.prepare({sequence: [1]}))
            return time.perf_counter() - start

        return a_prompt

    small, large = sizes
    seconds = in_turns({OURS: in_pool(large), f"{small:,} blocks": in_pool(small)}, rounds)
    return Chore(f"a prompt of 400 tokens, 10 more, free, {large:,} blocks", seconds, {f"{small:,} blocks": 1 / 1.5})


def fork_chore(rounds: int) -> Chore:
    """A sequence of 1,000 tokens forks, and the fork writes to the block that both begin in, so that it is copied."""
    manager = a_manager(200)
    tokens = np.random.default_rng(0).integers(0, 100_000, 1000)
    parent = manager.add(tokens)
    manager.commit(manager.prepare({parent: tokens}))

    def ours() -> float:
        copies = manager.stats().copies
        start = time.perf_counter()
        fork = parent.fork()
        manager.commit(manager.prepare({fork: [1]}))
        seconds = time.perf_counter() - start
        own = np.flatnonzero(fork.block_table != parent.block_table).tolist()
        if manager.stats().copies != copies + 1 or own != [len(tokens) // BLOCK_SIZE]:
            raise SystemExit(f"fork: {manager.stats().copies - copies} blocks were copied, and {own} are its own")
        manager.free(fork)
        return seconds

    return Chore("fork of 1,000 tokens, and its first write", in_turns({OURS: ours}, rounds), {})


def truncate_chore(rounds: int) -> Chore:
    """A speculative step of one sequence: 8 tokens are written, of which 3 turn out to be right."""
    manager = a_manager(60_000)
    sequence = manager.add([0] * 1000)
    manager.commit(manager.prepare({sequence: sequence.remaining}))

    def ours() -> float:
        length = sequence.num_tokens
        start = time.perf_counter()
        manager.commit(manager.prepare({sequence: [1, 2, 3, 4, 5, 6, 7, 8]}))
        sequence.truncate(length + 3)
        seconds = time.perf_counter() - start
        if sequence.num_tokens != length + 3 or len(sequence.block_table) != -(-(length + 3) // BLOCK_SIZE):
            raise SystemExit(f"truncate: {sequence.num_tokens} tokens in {len(sequence.block_table)} blocks")
        return seconds

    return Chore("8 tokens of a sequence, truncated to 3", in_turns({OURS: ours}, rounds), {})


def eviction_chore(rounds: int) -> Chore:
    """A token that needs a block, where every block is cached: behind a hit, or as the first of a prompt.

    What hits is what would have been evicted first; the block behind it goes.
    """
    rng = np.random.default_rng(0)
    lengths = (16_384, BLOCK_SIZE) * rounds
    prompts = [rng.integers(0, 100_000, length) for length in lengths]

    def behind(hits: bool) -> Callable[[], float]:
        manager = a_manager(sum(lengths) // BLOCK_SIZE)
        for prompt in prompts:
            come_and_go(manager, prompt)
        remaining = iter(prompts[::2])

        def ours() -> float:
            prompt = next(remaining) if hits else np.zeros(0, np.int64)
            new = rng.integers(0, 100_000, BLOCK_SIZE)
            before = manager.stats().evictions
            with manager.add([*prompt.tolist(), int(new[0])]) as sequence:
                start = time.perf_counter()
                manager.commit(manager.prepare({sequence: new[:1]}))
                seconds = time.perf_counter() - start
                evicted = manager.stats().evictions - before
                if (sequence.num_cached_tokens, evicted) != (len(prompt), 1):
                    raise SystemExit(f"eviction: a hit of {sequence.num_cached_tokens} tokens, {evicted} evictions")
                manager.commit(manager.prepare({sequence: new[1:]}))  # a full block is cached, and none is free
            return seconds

        return ours

    seconds = in_turns({OURS: behind(True), "no hit": behind(False)}, rounds)
    return Chore("a step that evicts, behind 16,384 tokens that hit", seconds, {})


def chores(quick: bool) -> Iterator[Chore]:
    rounds = 50 if quick else 300
    yield decode_chore(rounds)
    yield add_chore(False, rounds)
    yield add_chore(True, rounds)
    yield admission_chore(16_384, rounds)
    yield admission_chore(400, rounds)
    large = 20_000 if quick else 1_000_000
    for length in (16_384, 400, 17):
        yield pauses_chore(length, large if length > 17 else min(large, 100_000), rounds)  # or filling takes minutes
    yield size_chore(rounds, (1000, large))
    yield fork_chore(rounds)
    yield truncate_chore(rounds)
    yield eviction_chore(rounds // 5)
