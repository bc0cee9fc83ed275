"""A long random history of a manager beside the model, in which runs of blocks split, join and lose their tails."""

import os
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from served import NUM_LAYERS, ROW, Host, Served, runs_of

from cupy_pagedkv import OutOfBlocksError

STEPS = int(os.environ.get("CUPY_PAGEDKV_HISTORY", "34000"))
"""Calls of each history, 100,000 in all; a million were run once."""


class Seldom(Served):
    """Compares all K and V now and then; the manager's sums, and what would be evicted in which order, each time."""

    calls = 0

    def check(self) -> None:
        self.calls += 1
        if self.calls % 100 == 0:
            super().check()
        elif self.calls % 10 == 0:
            self.manager.check_integrity()
        self.check_lines()
        assert self.manager._pool.evictions == self.findable.evictions

    def state(self) -> Any:
        return self.manager.stats(), self.manager._pool._owners.tobytes()


@pytest.mark.parametrize(
    ("block_size", "num_blocks", "host_blocks", "reserve"),
    [(1, 40, 0, 0), (3, 60, 0, 0), (4, 200, 0, 0), (1, 30, 10, 2), (3, 40, 60, 5), (4, 80, 400, 0)],
)
def test_a_long_history(monkeypatch, rng, block_size, num_blocks, host_blocks, reserve):
    monkeypatch.setattr("cupy_pagedkv.caches.tier._RESERVE_BYTES", reserve * block_size * 2 * NUM_LAYERS * ROW)
    served = Seldom(Host(), num_blocks, block_size, host_blocks=host_blocks)
    happened: Counter[str] = Counter()
    runs = 0
    room = num_blocks * block_size
    for _ in range(STEPS):
        idle = [s for s in served.expected if not any(s in new for new in served.open.values())]
        some = idle[rng.integers(len(idle))] if idle else None
        match rng.integers(14 if host_blocks else 12):
            case 0 | 1 | 2 if len(served.expected) < 8:
                # Prompts that begin alike, and part at any token: of two or three numbers, mostly 0.
                tokens = (rng.random(rng.integers(1, room // 4)) < 0.03) * rng.integers(1, 3)
                sequence = served.add(tokens.tolist(), "a" if rng.random() < 0.1 else None)
                with suppress(OutOfBlocksError):
                    served.append(sequence, tokens[sequence.num_cached_tokens :].tolist())
                happened["hits"] += sequence.num_cached_tokens > 0
            case 3 | 4 if idle:
                chosen = {idle[i]: rng.integers(0, 2, rng.integers(0, 2 * block_size + 2)).tolist()
                          for i in rng.permutation(len(idle))[: rng.integers(1, 4)]}  # fmt: skip
                with suppress(OutOfBlocksError):
                    served.prepare(chosen)
            case 5 | 6 if served.open:
                batch = list(served.open)[rng.integers(len(served.open))]
                new = served.open[batch]
                served.commit(batch, {s: int(rng.integers(len(t) + 1)) for s, t in new.items() if rng.random() < 0.5})
            case 7 if served.open:
                served.rollback(list(served.open)[rng.integers(len(served.open))])
            case 8 if idle and len(served.expected) < 8:
                served.fork(some)
            case 9 if idle:
                served.truncate(some, int(rng.integers(some.num_tokens + 1)))
            case 10 | 11 if idle:
                served.free(some)
            case 12 | 13 if idle:
                happened["offloads"] += bool(some.num_tokens) and not some.num_host_blocks
                with suppress(OutOfBlocksError):
                    served.offload(some)
            case _ if rng.random() < 0.001 and not served.expected:
                served.reset_prefix_cache()
        happened["twins"] += bool(served.manager._pool._twins)
        before, runs = runs, len(runs_of(served.manager._pool))
        happened["more runs"] += runs > before
        happened["fewer runs"] += runs < before
        happened["long runs"] += any(len(run.blocks) > 8 for run in served.manager._pool._line)
    Served.check(served)
    stats = served.manager.stats()
    happened.update(evictions=stats.evictions, copies=stats.copies or (block_size == 1 and STEPS))
    if host_blocks:
        happened.update(offloaded=stats.offloaded, restored=stats.restored)
    assert min(happened.values()) > STEPS // 1000, happened
