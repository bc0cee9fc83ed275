"""The main job: traces are read, requests replayed, and wrong bytes found."""

import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cupy_pagedkv.replay.replay as replay_module
from cupy_pagedkv import PagedKVCache
from cupy_pagedkv.caches.tier import BlockMover
from cupy_pagedkv.replay.command import main
from cupy_pagedkv.replay.replay import MismatchError, OversizedRequestError, replay, token_bytes
from cupy_pagedkv.replay.report import Step, as_text
from cupy_pagedkv.replay.traces import Request, TraceError, read_trace, synthetic_trace

TRACES = Path(__file__).parent.parent.parent / "shared" / "traces"
AZURE = TRACES / "azure_llm_2023_code_head.csv"
MOONCAKE = TRACES / "mooncake_synthetic_head.jsonl"
needs_traces = pytest.mark.skipif(not AZURE.exists(), reason=f"the request traces are not in {TRACES}")

SMALL: dict[str, Any] = {"num_blocks": 12, "block_size": 4, "num_layers": 2, "num_heads": 1, "head_dim": 3}
SMALL |= {"dtype": "float16", "device": "cpu"}


# Traces


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


AZURE_TEXT = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:04.0319600,3180,8\r\n2023-11-16 18:17:03.97,7,0\r\n"
)
MOONCAKE_TEXT = (
    '{"timestamp": 40, "input_length": 513, "output_length": 3, "hash_ids": [5, 6]}\n\n'
    '{"timestamp": 0.5, "input_length": 0, "output_length": 3, "hash_ids": [], "more": null}'
)


def test_azures_format(tmp_path):
    for text in (AZURE_TEXT, "\ufeff" + AZURE_TEXT, AZURE_TEXT.replace("\r", "").rstrip(), "\n \n" + AZURE_TEXT):
        second, first = read_trace(write(tmp_path / "any.name", text))[::-1]
        assert (first.input_length, first.output_length, second.input_length) == (7, 0, 3180)
        assert second.timestamp - first.timestamp == pytest.approx(0.06196, abs=1e-6)
    later = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10T00:00:01Z,1,1\n"
    )
    assert len(read_trace(write(tmp_path / "b", later))) == 2


def test_mooncakes_format(tmp_path):
    requests = read_trace(write(tmp_path / "any.name", MOONCAKE_TEXT))
    assert requests == [Request(0.0005, 0, 3), Request(0.04, 513, 3, (5, 6))]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "there is no request in this file"),
        ("\n\n", 2, "there is no request in this file"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", 1, "there is no request"),
        ("time,in,out\n1,2,3\n", 1, "expected the header TIMESTAMP,ContextTokens,GeneratedTokens or a JSON"),
        (AZURE_TEXT + "2023-11-16 18:17:04,5\n", 4, "expected 3 fields, got 2"),
        (AZURE_TEXT + "\n2023-11-16 18:17:04,5,6,7\n", 5, "expected 3 fields, got 4"),
        (AZURE_TEXT + "yesterday,5,6\n", 4, "TIMESTAMP must be like 2023-11-16 18:17:03.979, got 'yesterday'"),
        (AZURE_TEXT + "2023-13-16 18:17:04,5,6\n", 4, "month must be in 1..12"),
        (AZURE_TEXT + "2023-11-16 18:17:04,-5,6\n", 4, "ContextTokens must be a whole number of at least 0, got '-5'"),
        (AZURE_TEXT + "2023-11-16 18:17:04,5,6.0\n", 4, "GeneratedTokens must be a whole number"),
        (AZURE_TEXT.encode() + b"\xff\xfe,5,6\n", 4, "'utf-8' codec can't decode byte 0xff"),
        (MOONCAKE_TEXT + "\n{", 4, "this is no JSON object"),
        (MOONCAKE_TEXT + "\n[1]", 4, "expected a JSON object"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 1}', 1, "hash_ids must be a list of whole"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [1.5]}', 1, "hash_ids must be a list"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [-1]}', 1, "from 0 to 2**31 - 1, got"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [2147483648]}', 1, "from 0 to 2**31 - 1"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [1, 2]}', 1,
         "hash_ids must have one id for each 512 of 3 tokens, got 2"),
        ('{"timestamp": 0, "input_length": "3", "output_length": 1, "hash_ids": [1]}', 1,
         "input_length must be a whole number of at least 0, got '3'"),
        ('{"timestamp": 0, "input_length": true, "output_length": 1, "hash_ids": [1]}', 1, "got True"),
        ('{"timestamp": 0, "input_length": 3, "output_length": -1, "hash_ids": [1]}', 1, "output_length must be"),
        (MOONCAKE_TEXT + "\n" + '{"a":' * 100_000, 4, "recursion"),
        (AZURE_TEXT.replace("\r\n", "\r"), 1, "new-line character seen in unquoted field"),
        ('{"timestamp": NaN, "input_length": 3, "output_length": 1, "hash_ids": [1]}', 1, "timestamp must be a number"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_an_error_with_file_line_and_reason(tmp_path, capsys, text, line, reason):
    path = write(tmp_path / "trace", text)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert reason in caught.value.reason
    assert main([str(path), "--device", "cpu"]) == 2
    assert f"error: {path}:{line}: " in capsys.readouterr().err


def test_the_synthetic_trace_is_seeded_and_looks_like_its_name():
    trace = synthetic_trace(4000)
    assert trace == synthetic_trace(4000)
    assert trace != synthetic_trace(4000, seed=1)
    assert trace[:100] == synthetic_trace(100)
    gaps = np.diff([request.timestamp for request in trace])
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() == pytest.approx(0.25, rel=0.1)
    for lengths, median in (([r.input_length for r in trace], 512), ([r.output_length for r in trace], 32)):
        assert min(lengths) >= 1
        assert np.median(lengths) == pytest.approx(median, rel=0.1)


# Replay


def test_what_is_written_depends_on_everything():
    rows = [
        token_bytes(np.array([number]), np.array([position]), layer, tensor, 64).tobytes()
        for number in (0, 1, 2, 70_000) for position in (0, 1, 2, 131_072) for layer in (0, 1, 2) for tensor in (0, 1)
    ]  # fmt: skip
    assert max(Counter(rows).values()) == 1
    words = np.frombuffer(b"".join(rows), np.uint16)
    assert Counter(words.tolist()).most_common(1)[0][1] < 6  # of heads and dims, too
    assert token_bytes(np.arange(3), np.arange(3), 0, 0, 7).shape == (3, 7)


def test_a_clock_worked_by_hand():
    """Each request takes the whole pool: the second, there from second 1 on, is admitted when the first is gone.

    The first is admitted in step 1, computes a token in each of steps 2 to 5 and is freed; the second does so in steps
    6 to 10. Each step takes a second.
    """
    steps: list[Step] = []
    requests = [Request(50, 8, 4), Request(51, 8, 4)]
    report = replay(requests, step_time=1, on_step=steps.append, **{**SMALL, "num_blocks": 3})
    assert (report.steps, report.simulated_seconds, report.requests) == (10, 10, 2)
    assert (report.first_token_mean, report.first_token_median) == (3, 3)  # 1 and 5
    assert report.first_token_max == 5
    assert report.first_token_p99 == pytest.approx(4.96)
    assert (report.queue_mean, report.queue_max) == (0.4, 1)
    assert [step.seconds for step in steps] == list(range(1, 11))
    assert [step.waiting for step in steps] == [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert [step.running for step in steps] == [1, 1, 1, 1, 0, 1, 1, 1, 1, 0]
    assert [step.live_blocks for step in steps] == [2, 3, 3, 3, 0, 2, 3, 3, 3, 0]
    assert [step.cached_blocks for step in steps] == [0, 0, 0, 0, 3, 1, 0, 0, 0, 3]


def test_the_clock_jumps_over_idle_time():
    requests = [Request(7, 1, 1), Request(107, 1, 1), Request(107.5, 1, 0)]
    steps: list[Step] = []
    report = replay(requests, step_time=1, on_step=steps.append, **SMALL)
    assert [step.seconds for step in steps] == [1, 2, 101, 102]
    assert (report.first_token_mean, report.first_token_max) == (1, 1)  # the third has none
    assert (report.queue_mean, report.queue_max) == (0, 0)


def test_a_step_takes_time_for_each_token():
    report = replay([Request(0, 3, 1), Request(0, 5, 1)], step_time=0.25, step_time_per_token=0.5, **SMALL)
    assert report.simulated_seconds == 0.25 + 8 * 0.5 + 0.25 + 2 * 0.5
    assert report.first_token_mean == 0.25 + 8 * 0.5


def test_a_preempted_request_waits_but_has_its_first_token():
    """The replay worked by hand below: the second is preempted in step 3 and admitted again in step 6."""
    steps: list[Step] = []
    sizes = {**SMALL, "num_blocks": 3}
    report = replay([Request(0, 4, 4), Request(0, 3, 3)], step_time=1, on_step=steps.append, **sizes)
    assert (report.preemptions, report.steps, report.simulated_seconds) == (1, 8, 8)
    assert [step.waiting for step in steps] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert (report.first_token_mean, report.first_token_max) == (1, 1)


def test_without_a_clock_arrivals_mean_nothing():
    steps: list[Step] = []
    report = replay([Request(0, 1, 1), Request(1000, 1, 1)], on_step=steps.append, **SMALL)
    assert report.steps == 2
    assert {step.seconds for step in steps} == {0}
    names = ("simulated_seconds", "first_token_mean", "first_token_median", "first_token_p99", "first_token_max")
    assert {getattr(report, name) for name in (*names, "queue_mean", "queue_max")} == {None}
    assert "queue" not in as_text("", report)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 80).map(lambda n: n / 4), st.integers(0, 12), st.integers(0, 6)),
        min_size=1,
        max_size=12,
    )
)
def test_no_request_starts_before_it_arrives(rows):
    requests = [Request(*row) for row in sorted(rows)]
    steps: list[Step] = []
    report = replay(requests, step_time=0.5, on_step=steps.append, **SMALL)
    first = requests[0].timestamp
    begun = 0
    for step in steps:
        began = step.seconds - 0.5
        arrived = sum(request.timestamp - first <= began for request in requests)
        begun = max(begun, step.running)
        assert step.running + step.waiting <= arrived
    assert report.requests == len(requests)
    assert report.simulated_seconds >= requests[-1].timestamp - first + 0.5
    assert report.first_token_mean == 0 or report.first_token_mean >= 0.5


@pytest.mark.parametrize("name", ["step_time", "step_time_per_token"])
@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_times_that_are_none(name, seconds):
    with pytest.raises(ValueError, match=f"{name} must be a number of seconds of at least 0, got"):
        replay([Request(0, 1, 1)], **{name: seconds}, **SMALL)
    with pytest.raises(SystemExit):
        main([f"--{name.replace('_', '-')}={seconds}"])


def test_the_report_of_a_clock(capsys):
    assert main(["--limit", "20", "--device", "cpu", "--step-time", "0.5", "--step-time-per-token", "0.001"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^simulated +[\d.]+ s$", text, re.M)
    waits = r"after [\d.]+ s in the mean; median [\d.]+ s, 99% [\d.]+ s, at most [\d.]+ s"
    assert re.search(rf"^first token +{waits}$", text, re.M)
    assert re.search(r"^queue +[\d.]+ requests in the mean, at most \d+$", text, re.M)


def test_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws the plot")
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    for clock in ([], ["--step-time", "1"]):
        path = tmp_path / f"steps{len(clock)}.png"
        assert main(["--limit", "20", "--device", "cpu", "--plot", str(path), *clock]) == 0
        assert path.read_bytes().startswith(b"\x89PNG")
    for figure, label, lines in zip(drawn[:2], ("step", "simulated seconds"), (1, 2), strict=True):
        pool, requests, hits = figure.axes
        assert (pool.get_ylabel(), requests.get_ylabel()) == ("% of the pool's blocks", "requests")
        assert (hits.get_ylabel(), hits.get_xlabel()) == ("% of prompt tokens found", label)
        assert len(requests.lines) == lines
    assert not drawn[0].axes[0].lines
    assert main(["--limit", "20", "--device", "cpu", "--plot", str(path), "--host-blocks", "9"]) == 0
    assert [line.get_label() for line in drawn[-1].axes[0].lines] == ["host, % of its blocks"]
    steps = len(drawn[0].axes[1].lines[0].get_xdata())
    capsys.readouterr()
    assert main(["--limit", "20", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == steps


@pytest.mark.parametrize(
    ("path", "message"),
    [("no/such/folder/x.png", "there is no folder for"), ("x.doc", "must end as a picture's does"), ("x", "must end")],
)
def test_a_plot_that_cannot_be_written_is_known_before(monkeypatch, tmp_path, capsys, path, message):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws the plot")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(replay_module, "LayeredPagedKVCache", None)  # which is not even made
    assert main(["--device", "cpu", "--plot", path]) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main(["--device", "cpu", "--plot", "x.png"]) == 2
    assert "pip install 'cupy_pagedkv[bench]'" in capsys.readouterr().err


def test_a_replay_worked_by_hand(device):
    """Three blocks of four tokens. The second request has to make room for the first and is written again.

    Step 1: both are admitted with 4 and 3 tokens and room for one more: 2 + 1 blocks. Step 2: 5 and 4 tokens. Step 3:
    6, and the second would need a block for its token 5: preempted. Step 4: 7, and two blocks that the second needs
    are not there. Step 5: the first has 8, is done and freed. Step 6: the second is admitted with 4 tokens; then 5, 6.
    """
    requests = [Request(0, 4, 4), Request(0, 3, 3)]
    sizes = {**SMALL, "num_blocks": 3, "device": device.of_caches}
    finished: list[int] = []
    report = replay(requests, on_progress=finished.append, **sizes)
    assert finished == [0, 0, 0, 0, 0, 1, 0, 0, 1]  # skipped ones first
    assert (report.requests, report.tokens_in, report.tokens_out, report.steps) == (2, 7, 7, 8)
    assert (report.preemptions, report.recomputed_tokens) == (1, 4)
    assert (report.peak_blocks, report.peak_running) == (3, 2)
    held = [7, 9, 6, 7, 8, 4, 5, 6]
    taken = [2, 3, 2, 2, 2, 1, 2, 2]
    running = [2, 2, 1, 1, 1, 1, 1, 1]
    oldest = [4, 5, 6, 7, 8, 4, 5, 6]  # one buffer of 8 tokens fits the 12 places
    assert report.pool_share == sum(held) / (8 * 12)
    assert report.pool_share_contiguous == sum(oldest) / (8 * 12)
    assert report.taken_share == sum(held) / (4 * sum(taken))
    assert report.taken_share_contiguous == sum(held) / (8 * sum(running))
    token = 2 * 2 * 3 * 2  # K and V, layers, elements, bytes
    assert report.scattered_bytes == (7 + 7 + 4) * token
    assert report.gathered_bytes == report.verified_bytes == 14 * token
    assert report.pool_bytes == 12 * token
    assert report.backend == {"cupy": "cuda"}.get(device.name, device.name)


def test_a_preempted_request_waits_first_in_line():
    """As above, with a third request that would fit beside the first while the second waits, but comes behind it."""
    finished: list[int] = []
    replay([Request(0, 4, 4), Request(0, 3, 3), Request(0, 1, 1)], on_progress=finished.append,
           **{**SMALL, "num_blocks": 3})  # fmt: skip
    assert finished == [0, 0, 0, 0, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float32", "bool", "complex64"])
def test_a_crowded_pool(device, dtype):
    requests = [Request(i, 1 + 7 * i % 17, 1 + 5 * i % 11) for i in range(40)] + [Request(99, 0, 0), Request(99, 0, 5)]
    report = replay(requests, max_num_seqs=4, **{**SMALL, "dtype": dtype, "device": device.of_caches})
    assert report.requests == len(requests)
    assert report.tokens_out == sum(request.output_length for request in requests)
    assert report.preemptions > 0
    assert report.peak_running == 4


SHARING = [
    Request(0, 1200, 5, (1, 2, 3)),
    Request(1, 1030, 3, (1, 2, 9)),  # has 1,024 tokens in common with the first
    Request(2, 1100, 2, (1, 2, 3)),  # 1,096 of its 1,100, in whole blocks and with one left to compute
    Request(3, 600, 4, (8, 2)),  # nothing: what comes before differs
    Request(4, 1024, 1, (1, 2)),  # a full hit leaves the last block
    Request(5, 0, 6),
    Request(6, 700, 0),  # no hash_ids, nothing in common
    Request(7, 700, 0),
]


def test_prompts_with_equal_hash_ids_share_blocks(device):
    sizes = {**SMALL, "num_blocks": 2000, "device": device.of_caches}
    report = replay(SHARING, **sizes)
    assert (report.requests, report.hits, report.tokens_saved) == (8, 3, 1024 + 1096 + 1020)
    tokens = sum(request.input_length for request in SHARING)
    assert report.hit_rate == report.tokens_saved / tokens
    assert (report.evictions, report.copies, report.preemptions) == (0, 0, 0)
    token = 2 * 2 * 3 * 2
    assert report.scattered_bytes == (report.tokens_in + report.tokens_out - report.tokens_saved) * token
    assert report.verified_bytes == (report.tokens_in + report.tokens_out) * token
    # In the first step all prompts are there: 1,200 + 6 + 4 + 600 + 4 + 700 + 700 tokens of their own, in whole blocks.
    assert report.peak_blocks == 300 + 2 + 1 + 150 + 1 + 175 + 175

    without = replay(SHARING, prefix_caching=False, **sizes)
    assert (without.hits, without.tokens_saved, without.hit_rate, without.evictions) == (0, 0, 0, 0)
    assert without.scattered_bytes == without.verified_bytes == report.verified_bytes


def test_sharing_under_pressure(device):
    """A pool in which blocks are evicted and requests preempted: every byte is still right."""
    requests = [Request(i, 40 + 30 * (i % 7), 30 + i % 11, (i % 3,)) for i in range(60)]
    report = replay(requests, **{**SMALL, "num_blocks": 120, "device": device.of_caches})
    assert report.requests == 60
    assert min(report.hits, report.evictions, report.preemptions) > 0
    assert report.recomputed_tokens < report.preemptions * 40  # most of what was preempted is found again
    small = replay(requests, prefix_caching=False, **{**SMALL, "num_blocks": 120, "device": device.of_caches})
    assert small.scattered_bytes > report.scattered_bytes


def test_what_a_preempted_request_finds_again():
    """Six blocks of four tokens, and two requests with one prompt of 8 and 5 tokens each of their own.

    The second shares the first block of the prompt and is preempted at 12 tokens, for which there would be a seventh
    block. It waits for the first to be done, and finds 8 of its 12 tokens again.
    """
    finished: list[int] = []
    requests = [Request(0, 8, 5, (1,)), Request(0, 8, 5, (1,))]
    report = replay(requests, on_progress=finished.append, **{**SMALL, "num_blocks": 6})
    assert finished == [0, 0, 0, 0, 0, 0, 1, 0, 1]
    assert (report.steps, report.preemptions) == (8, 1)
    assert (report.hits, report.tokens_saved, report.hit_rate) == (1, 4, 4 / 16)
    assert (report.tokens_found_again, report.recomputed_tokens) == (8, 4)
    report = replay([Request(0, 4, 12), Request(0, 3, 12)], **{**SMALL, "num_blocks": 6})  # nothing but its own
    assert (report.preemptions, report.tokens_found_again, report.recomputed_tokens) == (1, 8, 3)
    assert (report.hits, report.tokens_saved, report.hit_rate) == (0, 0, 0)


def test_with_a_second_tier_preemption_computes_nothing_again(device):
    """The first replay worked by hand above: the second request is parked with its 4 tokens, in one block."""
    sizes = {**SMALL, "num_blocks": 3, "device": device.of_caches}
    finished: list[int] = []
    report = replay([Request(0, 4, 4), Request(0, 3, 3)], host_blocks=2, on_progress=finished.append, **sizes)
    assert finished == [0, 0, 0, 0, 0, 1, 0, 0, 1]  # as without
    assert (report.preemptions, report.offloads, report.recomputed_tokens, report.tokens_found_again) == (1, 1, 0, 0)
    # Nobody needs the block that it let go of before it is back; then it takes the place of the first's last block.
    assert (report.offloaded_blocks, report.restored_blocks) == (2, 0)
    token = 2 * 2 * 3 * 2
    assert report.scattered_bytes == report.verified_bytes == (7 + 7) * token
    assert (report.host_blocks, report.host_bytes) == (2, 2 * 4 * token)
    assert (report.offloaded_bytes, report.restored_bytes) == (2 * 4 * token, 0)


def test_a_tier_that_is_too_small_for_a_request_leaves_it_to_be_computed_again():
    """It has 11 tokens in three blocks when it is preempted, two of which are full."""
    requests, sizes = [Request(0, 4, 12), Request(0, 3, 12)], {**SMALL, "num_blocks": 6}
    for host_blocks, offloads, recomputed, found_again in ((0, 0, 3, 8), (1, 0, 3, 8), (2, 0, 3, 8), (3, 1, 0, 0)):
        report = replay(requests, host_blocks=host_blocks, **sizes)
        assert (report.requests, report.preemptions, report.offloads) == (2, 1, offloads)
        assert (report.recomputed_tokens, report.tokens_found_again) == (recomputed, found_again)
        assert report.verified_bytes == 31 * 2 * 2 * 3 * 2


def test_evicted_prompts_are_found_on_the_host(device):
    """The second prompt takes the whole pool; the third is the first again, and the host has room for all of it."""
    requests = [Request(0, 48, 0, (1,)), Request(1, 48, 0, (2,)), Request(2, 48, 0, (1,))]
    sizes = {**SMALL, "max_num_seqs": 1, "device": device.of_caches}
    assert replay(requests, **sizes).hits == 0
    steps: list[Step] = []
    report = replay(requests, host_blocks=24, on_step=steps.append, **sizes)
    assert (report.hits, report.tokens_saved, report.hit_rate) == (1, 44, 44 / 144)
    assert (report.offloaded_blocks, report.restored_blocks) == (12 + 12, 11)
    assert report.verified_bytes == 144 * 2 * 2 * 3 * 2
    assert [step.host_blocks for step in steps[:2]] == [0, 12]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 17), st.integers(0, 2)), min_size=1, max_size=14),
    st.integers(1, 5),
    st.sampled_from([0, 1, 3, 8, 200]),
    st.booleans(),
)
def test_nothing_waits_forever(rows, max_num_seqs, host_blocks, prefix_caching):
    """In a pool that is hardly larger than a request, whatever is parked; and all adds up after each step."""
    requests = [Request(i, n, m, (number,) if n else ()) for i, (n, m, number) in enumerate(rows)]
    most = sum(2 + 2 * (request.input_length + request.output_length) for request in requests)
    managers: list[Any] = []
    steps: list[Step] = []

    class Watched(replay_module.KVCacheManager):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            managers.append(self)

    def check(step: Step) -> None:
        steps.append(step)
        managers[0].check_integrity()
        assert len(steps) <= most

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay_module, "KVCacheManager", Watched)
        report = replay(requests, host_blocks=host_blocks, prefix_caching=prefix_caching, max_num_seqs=max_num_seqs,
                        on_step=check, **SMALL)  # fmt: skip
    assert report.requests == len(requests)
    assert report.verified_bytes == (report.tokens_in + report.tokens_out) * 2 * 2 * 3 * 2
    assert not managers[0].sequences
    if host_blocks == 200:  # room for all
        assert (report.offloads, report.recomputed_tokens) == (report.preemptions, 0)
    if not host_blocks:
        assert (report.offloads, report.offloaded_blocks, report.restored_blocks) == (0, 0, 0)


def test_a_wrong_byte_in_host_memory_is_found(monkeypatch):
    fetch = BlockMover.fetch

    def spoiled(self, places, blocks):
        fetch(self, places, blocks)
        self._packer._v_pools[1, blocks[0], 0, 0, 5] ^= 1

    monkeypatch.setattr(BlockMover, "fetch", spoiled)
    with pytest.raises(MismatchError, match="request 2, layer 1, V: 1 tokens differ"):
        replay([Request(0, 4, 12), Request(0, 3, 12)], host_blocks=3, **{**SMALL, "num_blocks": 6})


def test_shared_blocks_are_counted_once():
    report = replay([Request(0, 8, 0, (1,)), Request(1, 8, 0, (1,))], **SMALL)
    assert (report.hits, report.recomputed_tokens) == (1, 0)
    assert (report.taken_share, report.pool_share) == (1.0, 3 * 4 / 48)


def test_what_is_written_differs_where_a_prompt_does(monkeypatch):
    """So that a block that was shared wrongly would be seen: after another beginning, and behind the prompt."""
    seen, token_bytes = set(), replay_module.token_bytes

    def recording(contents: Any, positions: Any, *arguments: Any) -> Any:
        seen.update(zip(contents.tolist(), positions.tolist(), strict=True))
        return token_bytes(contents, positions, *arguments)

    monkeypatch.setattr(replay_module, "token_bytes", recording)
    replay([Request(0, 513, 1, (1, 2)), Request(1, 513, 1, (8, 2)), Request(2, 3, 0)], **{**SMALL, "num_blocks": 400})
    assert len(seen) == 514 + 514 + 3


def test_oversized_requests():
    requests = [Request(0, 40, 8), Request(0, 41, 8), Request(0, 48, 0)]
    message = r"a request of 41 \+ 8 tokens needs 13 blocks of 4, but the pool has 12; make the pool larger or skip"
    with pytest.raises(OversizedRequestError, match=message):
        replay(requests, **SMALL)
    report = replay(requests, skip_oversized=True, **SMALL)
    assert (report.requests, report.skipped) == (2, 1)
    report = replay(requests[1:2], skip_oversized=True, **SMALL)
    assert (report.requests, report.skipped, report.steps, report.pool_share) == (0, 1, 0, 0)


@pytest.mark.parametrize("tensor", ["k_cache", "v_cache"])
def test_a_wrong_byte_is_found(monkeypatch, capsys, tensor):
    update = PagedKVCache.update

    def spoiled(self, key, value, slots):
        update(self, key, value, slots)
        pool = getattr(self, tensor).view(np.uint8)
        pool[1, 2, 0, 5] ^= 1

    monkeypatch.setattr(PagedKVCache, "update", spoiled)
    with pytest.raises(MismatchError, match=rf"request 1, layer 0, {tensor[0].upper()}: 1 tokens differ, the first at "
                                            "position 6"):  # fmt: skip
        replay([Request(0, 9, 0)], **SMALL)
    assert main(["--limit", "1", "--device", "cpu", "--block-size", "4"]) == 1
    assert "wrong bytes: request 1, layer 0" in capsys.readouterr().err


# The command


def run(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "cupy_pagedkv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def test_the_command_prints_a_report_and_nothing_else_in_a_pipe():
    result = run("--limit", "20", "--device", "cpu")
    assert (result.returncode, result.stderr) == (0, "")
    labels = [line[:19].strip() for line in result.stdout.splitlines()]
    expected = "trace device requests tokens steps preemptions prefix_cache pool peak_blocks pool_holds_tokens "
    expected += "taken_holds_tokens scattered gathered verified"
    assert [label.replace(" ", "_") for label in labels] == expected.split()
    assert "20 completed, 0 skipped" in result.stdout


def test_json_has_the_numbers_of_the_report(capsys):
    assert main(["--limit", "5", "--device", "cpu", "--json", "--dtype", "bfloat16", "--layers", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    trace = synthetic_trace(5)
    assert report["tokens_in"] == sum(request.input_length for request in trace)
    assert report["verified_bytes"] == sum(r.input_length + r.output_length for r in trace) * 3 * 2 * 2 * 16 * 2


def test_host_blocks(capsys, tmp_path):
    trace = write(tmp_path / "t", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + 2 * "2023-11-16 18:17:04,4,12\n")
    command = [str(trace), "--num-blocks", "6", "--block-size", "4", "--device", "cpu"]
    assert main([*command, "--host-blocks", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = ("host_blocks", "host_bytes", "preemptions", "offloads", "offloaded_blocks", "restored_blocks")
    assert [report[name] for name in names] == [4, 4 * 1024, 1, 1, 5, 1]  # of the parked three, two stay in the pool
    assert (report["offloaded_bytes"], report["restored_bytes"], report["recomputed_tokens"]) == (5120, 1024, 0)
    assert main([*command, "--host-blocks", "4"]) == 0
    lines = {line[:19].rstrip(): line[20:] for line in capsys.readouterr().out.splitlines()}
    assert lines["host memory"] == "4 blocks, 4.10 kB; 1 of the preempted requests parked there"
    assert lines["copied"] == "5 blocks to the host, 5.12 kB; 1 back, 1.02 kB"
    assert main(command) == 0
    assert not {"host memory", "copied"} & {line[:19].rstrip() for line in capsys.readouterr().out.splitlines()}
    assert main([*command, "--host-blocks", str(2**31)]) == 2
    assert "host_blocks and the pool's 6 must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "blocks"),
    [
        ("1MiB", 256),
        ("1MB", 244),
        ("0.5 MiB", 128),
        ("4096", 1),
        ("5k", 1),
        ("64KiB", 16),
        ("1gib", 262144),
        ("8191B", 1),
    ],
)
def test_a_memory_budget_is_blocks_of_all_layers(capsys, tmp_path, memory, blocks):
    trace = write(tmp_path / "t", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04,5,6\n")
    assert main([str(trace), "--memory", memory, "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_blocks"] == blocks  # of 4096 bytes: 2 layers, K and V, 16 tokens, 2 heads of 16 halves
    assert report["pool_bytes"] == blocks * 4096


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-blocks", "3"], "needs .* blocks of 16, but the pool has 3; make the pool larger"),
        (["--memory", "100"], "a block takes 4096 bytes in all layers, but --memory is 100"),
        (["no such file"], "No such file or directory: 'no such file'"),
        (["."], "Is a directory"),
        (["--device", "tpu"], "device must be None, 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
    ],
)
def test_what_cannot_be_used_is_an_error_on_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    "arguments",
    [["--memory", "much"], ["--memory", "1MB", "--num-blocks", "1"], ["--layers", "0"], ["--dtype", "float17"],
     ["--dtype", "(2,"], ["--limit", "-1"], ["--host-blocks", "-1"], ["--max-num-seqs", "x"], ["--heads", "1.5"]],
)  # fmt: skip
def test_wrong_options(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert f"argument {arguments[-2]}: " in capsys.readouterr().err


def test_an_oversized_request_of_a_file_is_named_by_its_line(capsys, tmp_path):
    path = write(tmp_path / "trace", AZURE_TEXT)
    assert main([str(path), "--num-blocks", "3", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.endswith(
        f"error: {path}:2: a request of 3180 + 8 tokens needs 200 blocks of 16, but the pool has 3; "
        "make the pool larger or skip such requests (--skip-oversized)\n"
    )


def test_skip_oversized(capsys):
    assert main(["--num-blocks", "40", "--skip-oversized", "--device", "cpu", "--json", "--limit", "50"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = sum(-(-(r.input_length + r.output_length) // 16) > 40 for r in synthetic_trace(50))
    assert 0 < expected == report["skipped"]
    assert report["requests"] == 50 - expected


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PagedKVCache, "update", interrupted)
    assert main(["--limit", "5", "--device", "cpu"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_a_progress_bar_on_a_terminal_alone(monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is not installed, which draws the bar")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, expected in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        assert main(["--limit", "5", "--device", "cpu"]) == 0
        assert ("request" in stream.getvalue()) is expected
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["--limit", "5", "--device", "cpu"]) == 0
    assert stream.getvalue() == ""


# Real traffic


def implied_hits(requests: list[Request], block_size: int) -> list[int]:
    """Of each prompt, the tokens in whole blocks that an earlier prompt began with, one left to compute."""
    hits = []
    for i, request in enumerate(requests):
        most = 0
        for earlier in requests[:i]:
            common = 0
            for mine, other in zip(request.hash_ids, earlier.hash_ids, strict=False):
                if mine != other:
                    break
                common += 512
            most = max(most, min(common, request.input_length, earlier.input_length))
        hits.append(min(most, max(0, request.input_length - 1)) // block_size * block_size)
    return hits


@needs_traces
def test_hits_are_what_the_hash_ids_imply(monkeypatch):
    """With a pool large enough never to evict."""
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    requests = read_trace(MOONCAKE)
    report = replay(requests, num_blocks=480_000, block_size=16, num_layers=1, num_heads=1, head_dim=1, dtype="uint8",
                    device="cpu")  # fmt: skip
    implied = implied_hits(requests, 16)
    assert (report.evictions, report.preemptions) == (0, 0)
    assert report.hits == sum(tokens > 0 for tokens in implied) > 0
    assert report.tokens_saved == sum(implied)
    assert report.hit_rate == sum(implied) / sum(request.input_length for request in requests)


@needs_traces
@pytest.mark.parametrize(
    ("path", "requests", "tokens_in", "tokens_out", "prefix_caching"),
    [
        (AZURE, 2000, 3_973_157, 59_024, True),
        (AZURE, 2000, 3_973_157, 59_024, False),
        (MOONCAKE, 600, 7_414_999, 118_142, True),
    ],
    ids=["azure", "azure without sharing", "mooncake"],
)
def test_real_traces_replay(capsys, monkeypatch, path, requests, tokens_in, tokens_out, prefix_caching):
    monkeypatch.setattr("cupy_pagedkv.devices.backend.EMULATE", False)
    arguments = [] if prefix_caching else ["--no-prefix-caching"]
    assert main([str(path), "--device", "cpu", "--json", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backend"] == "numpy"
    assert (report["requests"], report["tokens_in"], report["tokens_out"]) == (requests, tokens_in, tokens_out)
    assert report["verified_bytes"] == (tokens_in + tokens_out) * 256
    assert (report["hits"] > 0) is (path == MOONCAKE and prefix_caching)
    assert (report["evictions"] > 0) is prefix_caching


@needs_traces
@pytest.mark.parametrize(("path", "limit"), [(AZURE, 60), (MOONCAKE, 8)], ids=["azure", "mooncake"])
def test_a_part_of_the_real_traces_replays_through_the_kernels(capsys, kernel_device, path, limit):
    arguments = [str(path), "--device", kernel_device.of_caches, "--json", "--limit", str(limit), "--head-dim", "8"]
    assert main([*arguments, "--num-blocks", "9000", "--block-size", "16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backend"] == {"cupy": "cuda"}.get(kernel_device.name, kernel_device.name)
    assert report["requests"] == limit
    assert report["verified_bytes"] == (report["tokens_in"] + report["tokens_out"]) * 128
