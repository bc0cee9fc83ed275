"""Whatever is done to a manager, in any order, each sequence keeps its own K and V."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from served import Served

from cupy_pagedkv import OutOfBlocksError

STEMS = [[stem * 1000 + i for i in range(96)] for stem in (1, 2)]
"""Prompts begin with a part of one of these, so that prefixes are shared and left in all places."""

counts = st.sampled_from([0, 1, 1, 2, 15, 16, 17, 33])
lengths = st.sampled_from([0, 7, 16, 17, 32, 33, 48, 64, 80, 95, 96])


def machine(device: Any, block_size: int, prefix_caching: bool, host: int) -> type[RuleBasedStateMachine]:
    num_blocks, host_blocks = 18 * 16 // block_size, host * 16 // block_size

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.served = Served(device, num_blocks, block_size, prefix_caching=prefix_caching, host_blocks=host_blocks)
            self.buffers = self.served.manager.buffers(num_seqs=4, num_tokens=80, max_blocks=num_blocks)
            self.token = 10_000

        def some(self, data: Any) -> Any:
            """A sequence, in no open batch."""
            busy = {s for new in self.served.open.values() for s in new}
            return data.draw(st.sampled_from([s for s in self.served.expected if s not in busy]))

        def has_idle(self) -> bool:
            return len(self.served.expected) > sum(map(len, self.served.open.values()))

        def new_tokens(self, data: Any, sequence: Any, count: int) -> list[int]:
            """The stem's, so that other sequences come upon the same, or tokens of its own."""
            known = self.served.expected[sequence].tokens
            stem = next((stem for stem in STEMS if stem[: len(known)] == known), [])
            if data.draw(st.booleans()) and len(known) + count <= len(stem):
                return stem[len(known) : len(known) + count]
            self.token += count
            return list(range(self.token - count, self.token))

        @precondition(lambda self: len(self.served.expected) < 12)
        @rule(stem=st.sampled_from(STEMS), length=lengths, salt=st.sampled_from([None, None, None, "a", 1, True]))
        def add(self, stem: list[int], length: int, salt: Any) -> None:
            self.served.add(stem[:length], salt)

        @precondition(lambda self: len(self.served.expected) < 12)
        @rule(stem=st.sampled_from(STEMS), length=lengths, own=st.integers(0, 20), stays=st.booleans())
        def run(self, stem: list[int], length: int, own: int, stays: bool) -> None:
            """A prompt that is written at once, and whose sequence may be gone as soon."""
            self.token += own
            prompt = [*stem[:length], *range(self.token - own, self.token)]
            sequence = self.served.add(prompt)
            with suppress(OutOfBlocksError):
                self.served.append(sequence, prompt[sequence.num_cached_tokens :])
            if not stays:
                self.served.free(sequence)

        @precondition(has_idle)
        @rule(data=st.data(), together=st.integers(1, 4), in_buffers=st.booleans())
        def prepare(self, data: Any, together: int, in_buffers: bool) -> None:
            chosen = {self.some(data): data.draw(counts) for _ in range(together)}
            taken = any(batch._buffers is self.buffers for batch in self.served.open)
            buffers = self.buffers if in_buffers and not taken and sum(chosen.values()) <= 80 else None
            with suppress(OutOfBlocksError):  # `Served` has seen that nothing changed
                self.served.prepare({s: self.new_tokens(data, s, n) for s, n in chosen.items()}, buffers)

        @precondition(lambda self: self.served.open)
        @rule(data=st.data())
        def commit(self, data: Any) -> None:
            batch = data.draw(st.sampled_from(list(self.served.open)))
            new = self.served.open[batch]
            accepted = {s: data.draw(st.integers(0, len(new[s]))) for s in new if data.draw(st.booleans())}
            self.served.commit(batch, accepted or None)

        @precondition(lambda self: self.served.open)
        @rule(data=st.data())
        def rollback(self, data: Any) -> None:
            self.served.rollback(data.draw(st.sampled_from(list(self.served.open))))

        @precondition(lambda self: self.has_idle() and len(self.served.expected) < 12)
        @rule(data=st.data())
        def fork(self, data: Any) -> None:
            self.served.fork(self.some(data))

        @precondition(has_idle)
        @rule(data=st.data())
        def truncate(self, data: Any) -> None:
            sequence = self.some(data)
            self.served.truncate(sequence, data.draw(st.integers(0, sequence.num_tokens)))

        @precondition(has_idle)
        @rule(data=st.data())
        def free(self, data: Any) -> None:
            self.served.free(self.some(data))

        @precondition(lambda self: host_blocks and self.has_idle())
        @rule(data=st.data())
        def offload(self, data: Any) -> None:
            with suppress(OutOfBlocksError):
                self.served.offload(self.some(data))

        @precondition(lambda self: self.has_idle() and len(self.served.expected) % 5 == 4)
        @rule(data=st.data())
        def exhaust(self, data: Any) -> None:
            available = self.served.manager.num_available_blocks
            with pytest.raises(OutOfBlocksError):
                self.served.prepare({self.some(data): range(block_size * (available + 1))})

        @rule()
        def reset_prefix_cache(self) -> None:
            stats = self.served.manager.stats()
            live = stats.live_blocks + stats.live_host_blocks
            if live:
                with pytest.raises(RuntimeError, match=f"{live} blocks belong to live sequences"):
                    self.served.manager.reset_prefix_cache()
            else:
                self.served.reset_prefix_cache()
                assert self.served.manager.stats().free_blocks == num_blocks

        @invariant()
        def all_is_there(self) -> None:
            self.served.check()

        def teardown(self) -> None:
            for batch in list(self.served.open):
                self.served.rollback(batch)
            for sequence in list(self.served.expected):
                self.served.free(sequence)
            stats = self.served.manager.stats()
            assert (stats.live_blocks, stats.free_blocks + stats.cached_blocks) == (0, num_blocks)
            assert stats.live_host_blocks == 0

    return Machine


@pytest.mark.parametrize(
    ("block_size", "prefix_caching", "host"),
    [(16, True, 0), (16, False, 0), (3, True, 0), (1, True, 0), (16, True, 9), (16, False, 40), (3, True, 40)],
)
def test_any_order_of_anything(device, block_size, prefix_caching, host):
    if device.name == "emulated" and block_size == 1:
        pytest.skip("too slow: the emulated device takes a second to gather from blocks of one token")
    examples, steps = {"emulated": (4, 25)}.get(device.name, (100, 50))  # a gather takes a tenth of a second there
    run_state_machine_as_test(
        machine(device, block_size, prefix_caching, host),
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


FORKS = (15, 16, 17, 33, 60, 75, 76, 77, 80)


@pytest.mark.parametrize("position", FORKS)
def test_a_fork_writes_nothing_of_its_parents(device, position):
    served = Served(device, 32)
    parent = served.run(range(position))
    fork = served.fork(parent)
    assert served.owners() == dict.fromkeys(parent.block_table.tolist(), 2)
    batch = served.prepare({fork: [900, 901], parent: [800]})
    assert served.manager.stats().copies == (position % 16 != 0)
    served.commit(batch)
    served.append(parent, range(700, 720))
    assert served.manager.stats().copies == (position % 16 != 0)
    served.free(parent)
    served.append(fork, range(600, 620))


@pytest.mark.parametrize("order", ["first", "last", "inside out", "random"])
def test_trees_of_forks_freed_in_odd_orders(device, rng, order):
    """Five wide and nine deep: each generation forks off the one before, at each of the positions."""
    # Once is enough on the emulated device, where a gather of all of them takes a second.
    forks = FORKS if device.name != "emulated" or order == "inside out" else FORKS[-3:]
    served = Served(device, 200)
    generation = served.run(range(forks[0]))
    everyone = [generation]
    for depth, position in enumerate((*forks[1:], 93), 1):
        children = [served.fork(generation) for _ in range(4)]
        grown = {s: [depth * 100 + i] * (position - s.num_tokens) for i, s in enumerate([generation, *children])}
        served.commit(served.prepare(grown))
        everyone += children
        generation = children[depth % 4]
    count = len(everyone)
    assert count == 1 + 4 * len(forks)
    indices = {
        "first": range(count),
        "last": range(count - 1, -1, -1),
        "inside out": sorted(range(count), key=lambda i: abs(i - count // 2)),
        "random": rng.permutation(count).tolist(),
    }[order]
    for i in indices:
        served.free(everyone[i])
    assert served.manager.stats().live_blocks == 0


@pytest.mark.parametrize(("length", "gone"), [(35, 17), (88, 57), (17, 16), (4, 0), (4, 4), (48, 16), (48, 1)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_truncations(device, length, gone, shared, prefix_caching):
    served = Served(device, 32, prefix_caching=prefix_caching)
    sequence = served.run(range(length))
    other = served.fork(sequence) if shared else None
    served.truncate(sequence, length - gone)
    assert len(sequence.block_table) == -(-(length - gone) // 16)
    served.append(sequence, range(500, 540))
    if other is not None:
        served.append(other, range(600, 640))
    # What was truncated is found where it is right, and only there.
    for tokens in ([*range(length), 1], [*range(length - gone), *range(500, 541)]):
        served.run(tokens)


def test_200_cycles_of_churn_leave_nothing(device, rng):
    served = Served(device, 40)
    for _ in range(200):
        sequences = [served.add(STEMS[rng.integers(2)][: rng.integers(1, 97)]) for _ in range(rng.integers(1, 4))]
        sequences += [served.fork(s) for s in sequences if rng.random() < 0.4]
        for _ in range(rng.integers(1, 4)):
            try:
                new = {s: rng.integers(0, 9, rng.integers(0, 30)).tolist() for s in sequences}
                batch = served.prepare(new)
            except OutOfBlocksError:
                break
            if rng.random() < 0.7:
                served.commit(
                    batch, {s: int(rng.integers(0, len(new[s]) + 1)) for s in sequences if rng.random() < 0.5}
                )
            else:
                served.rollback(batch)
        for i in rng.permutation(len(sequences)):
            if rng.random() < 0.3:
                served.truncate(sequences[i], int(rng.integers(0, sequences[i].num_tokens + 1)))
            served.free(sequences[i])
    stats = served.manager.stats()
    assert (stats.live_blocks, stats.num_sequences, stats.free_blocks + stats.cached_blocks) == (0, 0, 40)
    assert stats.evictions > 0
    assert not served.manager._pool._owners.any()
    served.reset_prefix_cache()
    assert served.manager.stats().free_blocks == 40
    assert not list(served.manager._pool._line)
    assert not served.manager._pool._twins
    assert not len(served.manager._pool._roots)
