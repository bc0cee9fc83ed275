"""Real traffic over two tiers finds what a bounded LRU over both would have, which is counted from the trace alone."""

import json
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from cupy_pagedkv.replay.replay import replay
from cupy_pagedkv.replay.traces import Request

MOONCAKE = Path(__file__).parent.parent.parent / "shared" / "traces" / "mooncake_synthetic_head.jsonl"
needs_trace = pytest.mark.skipif(not MOONCAKE.exists(), reason=f"the request trace is not at {MOONCAKE}")

Row: TypeAlias = tuple[int, int, list[int]]
"""Tokens of prompt and output, and hash ids."""
Counts: TypeAlias = tuple[int, int]
"""Prompts that hit, and tokens saved."""

BLOCK = 32
LONGEST = 500  # blocks of a request that takes part
OUTPUT = 12  # tokens, since each costs a step; enough to fill a block of many requests


@cache
def traffic(lag: int) -> list[Row]:
    """Of the trace, or of 120 of its requests, each of which comes again behind the ``lag`` that follow it."""
    records = [json.loads(line) for line in MOONCAKE.read_text().splitlines()]
    rows = [(r["input_length"], min(OUTPUT, r["output_length"]), r["hash_ids"]) for r in records]
    rows = [row for row in rows if row[0] + row[1] <= LONGEST * BLOCK]
    if not lag:
        return rows
    return [row for pair in zip(rows[lag : lag + 120], rows, strict=False) for row in pair]


def contents_of(number: int, row: Row) -> list[Any]:
    """What each full block of a request holds: equal only where all tokens up to its end are."""
    prompt, output, ids = row
    contents: list[Any] = []
    for end in range(BLOCK, prompt + output + 1, BLOCK):
        own = () if end <= prompt else (-1 - number,)
        contents.append((*ids[: -(-min(end, prompt) // 512)], *own, end))
    return contents


def found_of(row: Row, contents: list[Any], unowned: Any) -> int:
    """Blocks from the start on that are there, but not the last token."""
    found = 0
    while found < max(0, row[0] - 1) // BLOCK and contents[found] in unowned:
        found += 1
    return found


@cache
def by_one_lru(lag: int, num_blocks: int, host_blocks: int) -> Counts:
    """Requests run one by one; contents that nobody owns are as many as their blocks and the host leave room for."""
    unowned: OrderedDict[Any, None] = OrderedDict()
    hits = saved = 0
    for number, row in enumerate(traffic(lag)):
        contents = contents_of(number, row)
        found = found_of(row, contents, unowned)
        hits, saved = hits + (found > 0), saved + found * BLOCK
        for content in contents[:found]:
            del unowned[content]
        for length in range(row[0], row[0] + row[1] + 1):
            while len(unowned) > num_blocks - -(-length // BLOCK) + host_blocks:
                unowned.popitem(last=False)
            for content in contents[: length // BLOCK]:
                unowned.pop(content, None)
        unowned.update(dict.fromkeys(reversed(contents)))  # the last block goes first
    return hits, saved


def by_replay(lag: int, num_blocks: int, host_blocks: int) -> Counts:
    rows = traffic(lag)
    requests = [Request(0, prompt, output, tuple(ids)) for prompt, output, ids in rows]
    report = replay(requests, num_blocks=num_blocks, block_size=BLOCK, num_layers=1, num_heads=1, head_dim=1,
                    dtype="uint8", device="cpu", host_blocks=host_blocks, max_num_seqs=1)  # fmt: skip
    assert report.hit_rate == report.tokens_saved / sum(prompt for prompt, _, _ in rows)
    assert report.verified_bytes == 2 * sum(prompt + output for prompt, output, _ in rows)
    assert (report.restored_blocks > 0) is (host_blocks > 0)
    return report.hits, report.tokens_saved


@pytest.fixture(autouse=True)
def by_numpy(monkeypatch):
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)


@needs_trace
@pytest.mark.parametrize(
    ("num_blocks", "host_blocks"), [(500, 0), (500, 300), (500, 2000), (1000, 7000), (500, 40_000)]
)
def test_the_trace_hits_as_a_bounded_lru_over_both_tiers(num_blocks, host_blocks):
    expected = by_one_lru(0, num_blocks, host_blocks)
    assert by_replay(0, num_blocks, host_blocks) == expected
    # And it would be seen if the host were missing, or of another size.
    for other in {0, 300, 2000, 20_000} - {host_blocks}:
        assert by_one_lru(0, num_blocks, other) != expected


@needs_trace
@pytest.mark.parametrize("at_once", [1, 64, 10_000])
@pytest.mark.parametrize(("lag", "num_blocks", "host_blocks"), [
    (3, 500, 0), (3, 500, 300), (3, 600, 1000), (10, 500, 2000), (10, 700, 2800), (20, 500, 3000),
])  # fmt: skip
def test_requests_that_come_again(monkeypatch, lag, num_blocks, host_blocks, at_once):
    """Most prompts are somewhere on the host, and come back, so many blocks at once."""
    monkeypatch.setattr("cupy_pagedkv.caches.tier._RESERVE_BYTES", at_once * 2 * BLOCK)
    expected = by_one_lru(lag, num_blocks, host_blocks)
    assert by_replay(lag, num_blocks, host_blocks) == expected
    for other in {0, host_blocks // 2, host_blocks * 2} - {host_blocks}:
        assert by_one_lru(lag, num_blocks, other) != expected


@needs_trace
def test_where_there_is_room_for_all_it_is_one_lru():
    assert by_replay(10, 500, 30_000) == by_one_lru(10, 500, 30_000) == by_one_lru(10, 30_500, 0)
