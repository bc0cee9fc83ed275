"""bench.py: what it verifies, counts and prints; and its watch over a kernel, through good, broken and wrong edits."""

import functools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import attention, cases, chores, counters, emulation, kernels, mpi, output, tiers, timing, traffic
from cupy_pagedkv.caches.sequence import CachedSequence
from cupy_pagedkv.devices.emulated_backend import EmulatedBackend
from cupy_pagedkv.emulator import CompileError, RawKernel
from cupy_pagedkv.emulator.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def test_a_run_on_the_cpu(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws the plot")
    files = [f"--json={tmp_path / 'out.json'}", f"--plot={tmp_path / 'out.png'}"]
    text = run("--device=cpu", "--quick", *files, "--only", "8x128", "tokens=64")
    rows = [line for line in text.splitlines() if "8x128 float16" in line and not line.startswith(("met", "MISSED"))]
    assert [line.split()[:-3][0] for line in rows] == ["scatter", "scatter", "gather", "copy"]
    bars = [line for line in text.splitlines() if line.startswith(("met", "MISSED"))]
    assert all("float16 tokens=64 against torch" in line for line in bars)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["machine"]["numpy"] == np.__version__
    assert [row["case"]["tokens"] for row in report["rows"]] == [64] * 4
    for row in report["rows"]:
        assert {"copy", "cupy_pagedkv", "indexing"} <= row["seconds"].keys()
        assert all(0 < seconds < 1 for seconds in row["seconds"].values())
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def half_of(problem: cases.Problem, call: Any, tensor: int) -> Any:
    """What `call` does, but not for K (0) or V (1)."""
    before = problem.pools[tensor].copy()
    result = np.array(call() or problem.out[:, 0])
    problem.pools[tensor] = before
    result[tensor] = 0
    return result


@pytest.mark.parametrize("operation", cases.OPERATIONS)
@pytest.mark.parametrize("tokens", [1, 40, 5000])
def test_every_contender_does_the_same_and_a_wrong_one_is_found(operation, tokens):
    """With several sets of inputs, of which a run on a CPU has one: the first must not depend on the others."""
    case = cases.Case(operation, 2, 6, "float16", tokens)
    for sets in (1, 3):
        problem = cases.Problem(case, sets, np)
        expected = problem.expected()
        calls = cases.contenders(problem)
        assert {"copy", "cupy_pagedkv", "indexing"} <= calls.keys()
        for name, of_sets in calls.items():
            assert len(of_sets) == sets
            problem.verify(name, of_sets[0], expected)
        with pytest.raises(SystemExit, match="copy is wrong in"):
            problem.verify("copy", lambda: None, expected)
        for tensor in (0, 1):
            with pytest.raises(SystemExit, match="half is wrong in"):
                problem.verify("half", functools.partial(half_of, problem, calls["cupy_pagedkv"][0], tensor), expected)
        untouched = problem.out[:, 0]
        with pytest.raises(SystemExit, match=f"{operation} 2x6 float16 tokens={tokens}: nothing is wrong in"):
            problem.verify("nothing", lambda untouched=untouched: untouched, expected)
        if sets > 1:
            with pytest.raises(SystemExit, match="another set is wrong in"):
                problem.verify("another set", calls["cupy_pagedkv"][1], expected)


def test_measuring_verifies_first(monkeypatch):
    case = cases.Case("scatter slots", 2, 6, "float16", 5)
    assert timing.measure(case, np, 0.01).seconds.keys() >= {"copy", "cupy_pagedkv", "indexing"}
    monkeypatch.setattr(cases, "indexing_calls", lambda problem, i: lambda: None)
    with pytest.raises(SystemExit, match="tokens=5: indexing is wrong in"):
        timing.measure(case, np, 0.01)


def test_the_table():
    """16 tokens of 8 x 128 float16 are 65,536 bytes of K and V, each read and written."""
    rows = [row("gather", 16, 10e-6, copy=4e-6, indexing=5e-6, torch=20e-6)]
    header, line = output.table(rows)
    assert header.split() == ["operation", "shape", "tokens", "µs", "GB/s", "of", "copy", "x", "indexing", "x", "torch"]
    assert line.split() == ["gather", "8x128", "float16", "16", "10.0", "13.1", "0.40", "0.50", "2.00"]


def row(operation: str, tokens: int, ours: float, **others: float) -> timing.Row:
    return timing.Row(cases.Case(operation, 8, 128, "float16", tokens), {"cupy_pagedkv": ours, **others})


def test_bars_on_a_cpu():
    rows = [
        row("scatter blocks", 1, 5.0, copy=1.0, indexing=3.0, torch=5.5),
        row("scatter slots", 4096, 100.0, copy=50.0, indexing=110.0, torch=99.0),
        row("scatter blocks", 4096, 100.0, copy=84.0, indexing=110.0, torch=120.0),
        row("gather", 4096, 100.0, copy=86.0, indexing=110.0, torch=120.0),
    ]
    lines = list(output.bars(rows, on_gpu=False))
    assert lines == [
        "MISSED >= 0.85 of np.copyto from 4 MB, gather and slots through whole blocks: in 1 of 2; the least is 0.84, "
        "scatter blocks 8x128 float16 tokens=4096",
        "met    scatter >= 1.0 of NumPy indexing from 512 tokens: in 2 of 2; the least is 1.10, "
        "scatter blocks 8x128 float16 tokens=4096 against indexing",
        "MISSED scatter >= 1.0 of PyTorch from 512 tokens: in 1 of 2; the least is 0.99, "
        "scatter slots 8x128 float16 tokens=4096 against torch",
        "met    scatter >= 1.0 of PyTorch below 512 tokens: in 1 of 1; the least is 1.10, "
        "scatter blocks 8x128 float16 tokens=1 against torch",
        "met    gather >= 1.0 of NumPy indexing from 512 tokens: in 1 of 1; the least is 1.10, "
        "gather 8x128 float16 tokens=4096 against indexing",
        "met    gather >= 1.0 of PyTorch from 512 tokens: in 1 of 1; the least is 1.20, "
        "gather 8x128 float16 tokens=4096 against torch",
        "met    update of one token >= 1.0 of two index_copy_: in 1 of 1; the least is 1.10, "
        "scatter blocks 8x128 float16 tokens=1 against torch",
    ]


def test_bars_on_a_gpu():
    def on_gpu(*arguments: Any, eager: tuple[float, float], **others: float) -> timing.Row:
        result = row(*arguments, **others)
        result.eager = {"cupy_pagedkv": eager[0], "bare launch": eager[1]}
        result.alone = {"cupy_pagedkv": 5.0, "empty kernel": 4.0} if arguments[0].startswith("scatter") else {}
        return result

    rows = [
        on_gpu("scatter slots", 64, 2.0, copy=1.0, indexing=3.0, triton=2.5, eager=(19.0, 10)),
        on_gpu("gather", 32768, 100.0, copy=96.0, indexing=99.0, eager=(21.0, 10)),
    ]
    verdicts = [(line[:6], line.split("; ")[1].split(",")[0]) for line in output.bars(rows, on_gpu=True)]
    assert verdicts == [
        ("met   ", "the least is 0.96"),
        ("MISSED", "the least is 0.99"),
        ("met   ", "the least is 0.80"),
        ("MISSED", "the least is 0.48"),
    ]


def test_attention_alone(tmp_path):
    text = run("attention", "--device=cpu", "--quick", f"--json={tmp_path / 'out.json'}", "--only", "batch=1", "128")
    rows = [line for line in text.splitlines() if line.startswith("decode batch=1 1 of 128 8x128 group=4")]
    assert [line.split()[7] for line in rows] == ["float32", "bfloat16", "float16"]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["machine"]["numpy"] == np.__version__
    for row in report["attention"]:
        assert {"copy", "cupy_pagedkv"} <= row["seconds"].keys()
        assert all(0 < seconds < 10 for seconds in row["seconds"].values())


def attention_row(batch: int, new: int, length: int, dtype: str, ours: float, **others: float) -> timing.Row:
    seconds = {name.replace("_", " "): time for name, time in others.items()}
    case = attention.AttentionCase(batch, new, length, 8, 4, 128, 128, dtype)
    return timing.Row(case, {"cupy_pagedkv": ours, **seconds})


def test_the_lines_and_bars_of_attention_on_a_cpu():
    rows = [
        attention_row(1, 1, 128, "float16", 10.0, copy=5.0, torch_folded=9.0, torch_grouped=12.0),
        attention_row(8, 1, 2048, "float16", 10.0, copy=5.0, torch_folded=15.0, torch_grouped=14.0),
        attention_row(1, 512, 512, "float32", 10.0, copy=5.0, torch_folded=11.0),
    ]
    header, *lines = output.attention_lines(rows)
    assert header.endswith("of copy, x the best of PyTorch")
    assert [line.split("   ")[-1] for line in lines] == [
        "0.50, 0.90 torch folded", "0.50, 1.40 torch grouped", "0.50, 1.10 torch folded"
    ]  # fmt: skip
    assert list(output.attention_bars(rows, on_gpu=False)) == [
        "met    decode, float16, >= 1.3 of PyTorch from 2,048 tokens in all: in 1 of 1; the least is 1.40, "
        "decode batch=8 1 of 2048 8x128 group=4 float16",
        "MISSED decode, float16, >= 1.0 of PyTorch below 2,048 tokens in all: in 0 of 1; the least is 0.90, "
        "decode batch=1 1 of 128 8x128 group=4 float16",
        "met    prefill, float32, >= 1.0 of PyTorch below 2,048 tokens in all: in 1 of 1; the least is 1.10, "
        "prefill batch=1 512 of 512 8x128 group=4 float32",
    ]


def test_the_bars_of_attention_on_a_gpu():
    floors = {attention.READ: 9.0, attention.TWO_EMPTY: 6.0}
    rows = [
        attention_row(1, 1, 128, "float16", 10.0, **floors),
        attention_row(64, 1, 2048, "float16", 10.0, **floors),
        attention_row(8, 1, 16384, "float16", 12.0, **floors),
        attention_row(1, 512, 4096, "float16", 10.0, torch=7.0, **floors),
    ]
    verdicts = [(line[:6], line.split("; ")[1].split(",")[0]) for line in output.attention_bars(rows, on_gpu=True)]
    assert verdicts == [
        ("MISSED", "the least is 0.75"),
        ("met   ", "the least is 0.70"),
        ("met   ", "the least is 0.60"),
    ]


@pytest.mark.parametrize("dtype", attention.DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 40, 2, 3, 16, 16), (2, 5, 40, 2, 3, 16, 16), (2, 1, 40, 1, 4, 32, 16)])
def test_every_contender_attends_and_a_wrong_one_is_found(shape, dtype):
    problem = attention.AttentionProblem(attention.AttentionCase(*shape, dtype), 2, np)
    expected = problem.expected()
    for name, (call, *_) in attention.contenders(problem).items():
        if name != "copy":
            problem.verify(name, call, expected)
    for wrong in (0, np.nan):
        with pytest.raises(SystemExit, match="nothing is wrong by"):
            problem.verify("nothing", lambda wrong=wrong: np.full((*problem.query.shape[:2], 16), wrong), expected)
    with pytest.raises(SystemExit, match="another set is wrong by"):
        problem.verify("another set", attention.our_calls(problem, 1), expected)


def test_the_manager_alone(tmp_path):
    pytest.importorskip("xxhash", reason="xxhash is not installed, which the manager is compared with")
    text = run("manager", "--quick", f"--json={tmp_path / 'out.json'}", "--device=cpu")
    [at] = [i for i, line in enumerate(text.splitlines()) if line.startswith("many sequences")]
    lines = text.splitlines()[at + 1 : at + 13]
    firsts = ["prepare", "add,", "add,", "16,384", "16,384", "any", "any", "any", "a", "fork", "8", "a"]
    assert [line.split()[0] for line in lines] == firsts
    assert [line.split()[-2] for line in lines[:3]] == ["loop", "xxhash", "xxhash"]
    assert [line.split()[-2] for line in (lines[8], lines[11])] == ["blocks", "hit"]
    bytes_a_block = [int(line.split()[-5]) for line in lines[5:8]]
    assert 64 < bytes_a_block[0] < bytes_a_block[1] < bytes_a_block[2]
    assert sum(line.startswith(("met", "MISSED")) for line in text.splitlines()) == 6
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["rows"] == []
    for chore in report["manager"]:
        alone = chore["label"].startswith(("fork", "8 tokens", "16,384", "any call"))
        assert len(chore["seconds"]) == (1 if alone else 3 if chore["label"].startswith("add") else 2)
        assert all(0 < seconds < 1 for seconds in chore["seconds"].values())


def test_bars_of_the_manager():
    good = chores.Chore("add", {"cupy_pagedkv": 1.0, "xxhash": 4.0}, {"xxhash": 4.0, "not installed": 9.0})
    bad = chores.Chore("add", {"cupy_pagedkv": 1.0, "xxhash": 3.9}, {"xxhash": 4.0})
    met, missed = output.chore_bars([good, bad])
    assert met == "met    add >= 4 of xxhash: in 1 of 1; the least is 4.00, add"
    assert missed == "MISSED add >= 4 of xxhash: in 0 of 1; the least is 3.90, add"


def test_a_decode_step_that_differs_is_found(monkeypatch):
    monkeypatch.setattr(chores, "BLOCK_SIZE", 8)  # of the plain loop, and of the pool that is made for it
    chores.decode_chore(3)
    plain_step = chores.plain_step

    def wrong(*arguments: Any) -> Any:
        arrays = plain_step(*arguments)
        arrays[2][7] += 1
        return arrays

    monkeypatch.setattr(chores, "plain_step", wrong)
    with pytest.raises(SystemExit, match="decode: the manager and the plain loop disagree"):
        chores.decode_chore(3)


def test_a_fork_that_copies_nothing_is_found(monkeypatch):
    assert chores.fork_chore(3).seconds.keys() == {"cupy_pagedkv"}
    monkeypatch.setattr(CachedSequence, "fork", lambda parent: parent._owner().add(list(range(1000))))
    with pytest.raises(SystemExit, match="fork: 0 blocks were copied"):
        chores.fork_chore(3)


def test_a_truncation_that_leaves_tokens_is_found(monkeypatch):
    assert chores.truncate_chore(20).seconds.keys() == {"cupy_pagedkv"}
    monkeypatch.setattr(CachedSequence, "truncate", lambda sequence, num_tokens: None)
    with pytest.raises(SystemExit, match="truncate: 1008 tokens in 63 blocks"):
        chores.truncate_chore(3)


def test_a_step_that_does_not_evict_behind_the_hit_is_found(monkeypatch):
    assert chores.eviction_chore(3).seconds.keys() == {"cupy_pagedkv", "no hit"}
    usual = chores.a_manager
    monkeypatch.setattr(chores, "a_manager", lambda num_blocks: usual(num_blocks + 10))
    with pytest.raises(SystemExit, match=r"eviction: a hit of \d+ tokens, 0 evictions"):
        chores.eviction_chore(3)


def test_an_admission_that_does_not_evict_is_found(monkeypatch):
    assert chores.admission_chore(16_384, 3).seconds.keys() == {"cupy_pagedkv"}
    usual = chores.a_manager
    monkeypatch.setattr(chores, "a_manager", lambda num_blocks: usual(num_blocks + 10))
    with pytest.raises(SystemExit, match=r"admission: 1014 blocks were evicted"):
        chores.admission_chore(16_384, 3)


def test_tiers_alone(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed, which files are written with")
    trace = tmp_path / "trace"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + 3 * "2023-11-16 18:17:04,40,2\n")
    files = [f"--json={tmp_path / 'out.json'}", f"--trace={trace}"]
    lines = run("tiers", "--device=cpu", "--quick", *files).splitlines()
    [at] = [i for i, line in enumerate(lines) if line.startswith("to the host and back")]
    names = [line.split(",")[0] for line in lines[at + 1 : at + 11]]
    assert names == [*2 * ["offload", "restore", "evict", "find again"], "save", "load"]
    [at] = [i for i, line in enumerate(lines) if line.startswith("replay")]
    assert [line.split()[:3] for line in lines[at + 1 : at + 3]] == [
        ["trace", "9,000", "0"], ["trace", "9,000", "72,000"]
    ]  # fmt: skip
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["machine"]["numpy"] == np.__version__
    assert [move["num_bytes"] // 2**20 for move in report["moves"]] == [1] * 4 + [4] * 6
    assert all(0 < move["seconds"] < 10 and 0 < move["floor_seconds"] < 10 for move in report["moves"])
    assert [replay["host_blocks"] for replay in report["replays"]] == [0, 72_000]


def test_bars_of_the_tiers():
    def move(name: str, seconds: float, in_bar: bool = True) -> tiers.Move:
        return tiers.Move(name, 2**24, seconds, "np.copyto", 8.0, in_bar)

    done = [move("offload", 10.0), move("offload", 12.0), move("restore", 10.0), move("load", 99.0, False)]
    assert list(tiers.move_bars(done)) == [
        "MISSED offload >= 0.8 of np.copyto from 16 MiB: in 1 of 2; the least is 0.67, offload, 16 MiB",
        "met    restore >= 0.8 of np.copyto from 16 MiB: in 1 of 1; the least is 0.80, restore, 16 MiB",
    ]


def test_blocks_that_do_not_travel_are_found(monkeypatch):
    timer = tiers.Timer(np)
    parked, evicted = tiers.Parked(2, "cpu", timer), tiers.Evicted(2, "cpu", timer)
    for call in (parked.restore, parked.offload, evicted.come_back, evicted.evict):
        assert 0 < call() < 1
    monkeypatch.setattr(CachedSequence, "offload", lambda sequence: None)
    with pytest.raises(SystemExit, match="blocks offloaded: 0, expected 2"):
        tiers.Parked(2, "cpu", timer).offload()
    without_host = functools.partial(tiers.KVCacheManager, prefix_caching=False)
    monkeypatch.setattr(tiers, "KVCacheManager", lambda cache, **_: without_host(cache))
    with pytest.raises(SystemExit, match="blocks evicted to the host: 0, expected 2"):
        tiers.Evicted(2, "cpu", timer).evict()


def test_ranks_that_are_launched(tmp_path):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install -e '.[mpi]'")
    if mpi.MPIEXEC is None:
        pytest.skip("there is no mpiexec to launch ranks with: pip install -e '.[mpi]'")
    text = run("mpi", "--quick", f"--json={tmp_path / 'out.json'}", "--device=cpu")
    bars = [line.partition(":")[0][7:] for line in text.splitlines() if line.startswith(("met", "MISSED"))]
    assert bars == [
        "a sequence of 1024 tokens in 4 layers >= 0.7 of MPI's own",
        "a sequence of 128 tokens in 32 layers >= 0.7 of MPI's own",
        "a step of 256 sequences, of its message >= 0.5 of MPI's own",
        "a step of 256 sequences, of its arrays >= 0.5 of MPI's own",
    ]
    assert "the step, beyond the ranks' own work" in text
    report = json.loads((tmp_path / "out.json").read_text())
    for each in report["mpi"]:
        assert each["seconds"].keys() == {"cupy_pagedkv", "MPI's own"}
        assert all(0 < seconds < 1 for seconds in each["seconds"].values())


def test_bars_of_ranks():
    travels = [mpi.Travel("a", 10**6, {"cupy_pagedkv": 1.0, "MPI's own": own}, 0.7) for own in (0.7, 0.69)]
    met, missed = mpi.travel_bars(travels)
    assert met == "met    a >= 0.7 of MPI's own: in 1 of 1; the least is 0.70, a"
    assert missed == "MISSED a >= 0.7 of MPI's own: in 0 of 1; the least is 0.69, a"


class Ncu:
    """In the place of Nsight Compute, which needs a GPU: counts what it is told, and makes no launch."""

    def __init__(self, folder: Path) -> None:
        self.counts = folder / "counts.json"
        self.program = folder / "ncu"
        self.program.write_text(f"""#!{sys.executable}
import csv, json, sys
counts = json.load(open({str(self.counts)!r}))
options = dict(option[2:].split("=", 1) for option in sys.argv[1:] if option.startswith("--") and "=" in option)
with open(options["log-file"], "w") as log:
    print("==PROF== Connected", file=log)
    metrics = options["metrics"].split(",")
    rows = csv.writer(log, quoting=csv.QUOTE_ALL)
    rows.writerows([["Kernel Name", *metrics], ["", *metrics]])
    for launch in counts:
        rows.writerow([launch["kernel"], *(f"{{launch[metric]:,}}" for metric in metrics)])
sys.exit(0 if counts else "no counters for you")
""")
        self.program.chmod(0o755)


def test_counters_of_a_gpu_against_the_emulated_device(monkeypatch, tmp_path):
    def one_launch(xp: Any) -> Iterator[str]:
        traffic.launch("gather_cache", (8, 46, "float16"), xp=xp)
        yield "gather 8x46"

    ncu = Ncu(tmp_path)
    monkeypatch.setattr(counters, "NCU", str(ncu.program))
    monkeypatch.setattr(counters, "each_launch", one_launch)
    [(label, profile)] = counters.emulated(90, 132)
    assert label == "gather 8x46, gather_cache"
    of_shared = dict.fromkeys((False, True), 0)
    for line in profile.lines:
        of_shared[line.writes] += line.shared.wavefronts
    counts = {
        "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum": profile.read.sectors,
        "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum": profile.read.requests,
        "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum": 2 * profile.written.sectors,
        "l1tex__t_requests_pipe_lsu_mem_global_op_st.sum": profile.written.requests,
        "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum": of_shared[False] + 1,
        "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum": of_shared[True] - 7,
        "smsp__sass_l1tex_data_pipe_lsu_wavefronts_mem_shared_op_ldgsts.sum": 7,
        "smsp__inst_executed_op_ldsm.sum": 0,
    }
    ncu.counts.write_text(json.dumps([{"kernel": "gather_cache", **counts}]))
    assert list(counters.counter_lines(counters.compared(counters.counted(), 90, 132))) == [
        "sectors read: equal in 1 of 1 launches, within 1% in 1",
        "requests to read: equal in 1 of 1 launches, within 1% in 1",
        "sectors written: equal in 0 of 1 launches, within 1% in 0",
        f"  gather 8x46, gather_cache: {profile.written.sectors:,}, counted {2 * profile.written.sectors:,}: 0.500",
        "requests to write: equal in 1 of 1 launches, within 1% in 1",
        "shared memory read, wavefronts: equal in 0 of 1 launches, within 1% in 1",
        "shared memory written, wavefronts: equal in 1 of 1 launches, within 1% in 1",
    ]
    ncu.counts.write_text("[]")
    with pytest.raises(RuntimeError, match="ncu failed: .* no counters for you"):
        counters.counted()


def test_rows_that_do_not_exist_are_refused():
    command = [sys.executable, str(ROOT / "bench.py"), "--device=cpu", "--only", "gather", "9x9"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "no row has all of ['gather', '9x9'] in its name" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json=no/such/folder.json"], "there is no folder for no/such/folder.json"),
        (["--plot=no/such/folder.png"], "there is no folder for no/such/folder.png"),
        (["manager", "--watch"], "manager is no kernel"),
        (["manager", "--kernels"], "manager is no kernel"),
        (["attention", "--watch"], "attention is no kernel"),
        (["attention", "--only", "9x9"], "no row has all of ['9x9'] in its name"),
        (["manager", "--only", "gather"], "no row has all of ['gather'] in its name"),
        (["hf", "--watch"], "hf is no kernel"),
        (["tiers", "--kernels"], "tiers is no kernel"),
        (["tiers", "--only", "8x128"], "tiers has no rows to choose from by --only"),
        (["hf", "--only", "8x128"], "hf has no rows to choose from by --only"),
        (["mpi", "--watch"], "mpi is no kernel"),
        (["mpi", "--only", "8x128"], "mpi has no rows to choose from by --only"),
        (["counters", "--watch"], "counters is no kernel"),
        (["counters"], "counters are a GPU's, which ncu of Nsight Compute reads: there has to be both"),
    ],
)
def test_what_cannot_be_run_is_known_at_once(arguments, message):
    command = [sys.executable, str(ROOT / "bench.py"), "--device=cpu", *arguments]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert refused.returncode == 2
    assert message in refused.stderr


COPIES = [kernel for kernel in kernels.KERNELS if kernel not in kernels.ATTENTION]


@pytest.mark.parametrize("kernel", COPIES)
def test_common_shapes_have_wide_accesses_and_no_spills(kernel):
    pytest.importorskip("cuda.core", reason="cuda.core is not installed, which NVRTC is called through")
    reports = kernels.compiler_reports(kernel, [90], cases.SHAPES)
    assert len(reports) == len(cases.SHAPES)
    for label, report in reports.items():
        assert report.resources.stack == report.resources.spills == 0, label
        if kernel not in kernels.ATTENTION:  # that of tensor cores loads by cp.async, and stores what is little
            assert set(report.stores) == {128}, label
            assert report.loads[128] == report.stores[128], label


class Watched:
    """`bench.py KERNEL --watch` over a copy of the sources, whose kernel can be edited."""

    def __init__(self, folder: Path, kernel: str) -> None:
        shutil.copytree(ROOT / "cupy_pagedkv", folder / "cupy_pagedkv")
        shutil.copytree(ROOT / "kernels", folder / "kernels")
        shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
        (folder / "tests").mkdir()
        shutil.copy(ROOT / "tests" / "oracle.py", folder / "tests")
        shutil.copy(ROOT / "bench.py", folder)
        self.path = folder / "kernels" / f"{kernel}.cu"
        self.good = self.path.read_text()
        self.lines: queue.Queue[str] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "bench.py"), kernel, "--watch", "--device=cpu"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        self.said("waiting for a save")

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.put(line)

    def said(self, last: str) -> str:
        """All lines up to one that starts with `last`."""
        text = ""
        while True:
            line = self.lines.get(timeout=90)
            text += line
            if line.startswith(last):
                return text

    def saved(self, source: str) -> str:
        self.path.write_text(source)
        return self.said("waiting for the next save")


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    pytest.importorskip("cuda.core", reason="cuda.core is not installed, which NVRTC is called through")
    watched = Watched(tmp_path, "reshape_and_cache")
    yield watched
    os.killpg(watched.process.pid, 15)
    watched.process.wait()
    watched.reader.join()


def test_watch(watched):
    good = watched.good
    text = watched.saved(good + "// an edit that changes nothing\n")
    assert "reshape_and_cache is right on the emulated device" in text
    assert "8x128 float16, sm_90:" in text
    assert "0 B spilled; loads 8 x 128, 2 x 64 bits; stores 8 x 128 bits" in text
    assert "before:" not in text

    line = next(i for i, text in enumerate(good.splitlines(), 1) if "if (slot < 0" in text)
    text = watched.saved(good.replace("if (slot < 0", "if (slott < 0"))
    assert f"kernels/reshape_and_cache.cu:{line}:" in text
    assert "reshape_and_cache FAILED" in text
    assert "is right" not in text

    text = watched.saved(good.replace("+ slot % BLOCK_SIZE * slot_stride", "+ (slot + 1) % BLOCK_SIZE * slot_stride"))
    assert "reshape_and_cache is WRONG: 8x128 float16 NHD: " in text
    assert "bytes differ, the first at " in text
    assert "is right" not in text

    text = watched.saved(good.replace("Slot{pool + slot", "Slot{(char*)0 + slot"))
    assert re.search(r"kernels/rows\.cuh:\d+: thread .* accesses address 0x\w+, where no memory is", text)
    assert "reshape_and_cache FAILED" in text

    text = watched.saved(good.replace("(int)(warp_of_grid() % SLICES)", "(int)(warp_of_grid() % SLICES) / 2"))
    assert "is right" not in text  # the launch code counts on slices of 32 * UNROLL

    watched.path.write_text(good)
    watched.said("waiting for the next save")
    shared = watched.path.with_name("rows.cuh")
    shared.write_text(shared.read_text().replace("#pragma unroll", "#pragma unroll 1"))
    text = watched.said("waiting for the next save")
    assert "is right" in text
    assert "before: " in text  # of the last kernel that was right


def test_watch_takes_notice_of_what_a_kernel_may_include(watched):
    (watched.path.parent / "new.cuh").write_text("// nobody includes this yet\n")
    assert "reshape_and_cache is right" in watched.said("waiting for the next save")


def test_watch_needs_a_kernel():
    command = [sys.executable, str(ROOT / "bench.py"), "--watch"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"--watch needs the kernel: {' or '.join(kernels.KERNELS)}" in refused.stderr


@pytest.mark.parametrize(
    ("kernel", "good", "bad"),
    [
        ("gather_cache", "segment.offset * slot_stride", "0 * slot_stride"),
        ("gather_cache", "value + layer * value_layer", "value"),
        ("gather_cache", "(int)(slice % SLICES)", "0"),
        ("gather_cache", "block >= 0 && block < num_blocks", "block > 0 && block < num_blocks"),
        ("reshape_and_cache", "v_cache + layer * v_layer", "v_cache"),
        ("copy_blocks", "v_cache + layer * v_layer", "v_cache"),
        ("copy_blocks", "pool + to * block_stride", "pool + from * block_stride"),
        ("reshape_and_cache", "slot % BLOCK_SIZE * slot_stride", "0 * slot_stride"),
    ],
)
def test_the_check_of_each_kernel(monkeypatch, kernel, good, bad):
    """What --watch asks for a verdict."""

    class Edited(EmulatedBackend):
        def _build_kernel(self, name, defines):
            source = kernels.source_of(name, defines)
            assert good in source
            return RawKernel(source.replace(good, bad), name)

    with kernels.emulated_by(EmulatedBackend()):
        assert kernels.check_kernel(kernel, np) is None
    with kernels.emulated_by(Edited()):
        wrong = kernels.check_kernel(kernel, np)
    assert re.match(r"\d+x\d+ \w+ \w+: \d+ of \d+ bytes differ, the first at \d+", wrong)


@pytest.mark.parametrize("kernel", COPIES)
def test_what_a_kernel_moves(kernel):
    """Exactly the bytes that it has to, once; 34 tokens are two blocks and a bit."""
    launch = traffic.launch_of(kernel, (1, 576, "float16"), num_seqs=3, seq_len=34)
    tokens = 64 * 16 if kernel == "copy_blocks" else 3 * 34
    assert launch.written.bytes == launch.written.touched_once == tokens * 2 * 576 * 2
    assert traffic.once(launch) == 1
    assert 0 < traffic.index_bytes(launch) < 0.02
    assert launch.written.used >= 0.97


def test_lengths_are_read_once_by_each_block_that_runs_at_once():
    """And again by the few warps that begin at a sequence."""
    launch = traffic.launch_of("gather_cache", (1, 64, "float16"), num_seqs=1000, seq_len=17)
    at_once = 4 * ARCHITECTURES[90].multiprocessors
    assert launch.grid == (at_once // 2, 2, 1)
    assert at_once <= launch.arrays[24].read.most <= at_once + 32


@pytest.mark.parametrize(
    "case",
    [
        (2, 64, 64, "float16", 4, 2, 1, 1024),
        (2, 64, 64, "float16", 4, 2, 20, 300),
        (1, 64, 64, "float32", 3, 2, 1, 300),
        (1, 576, 512, "float16", 16, 1, 1, 1024),
    ],
)
def test_attention_reads_what_a_row_tile_sees_and_once(case):
    launch, wanted = traffic.attention_of(*case)
    of_kv = [launch.arrays[i].read.bytes for i in (4, 8) if i in launch.arrays]  # one, where V is in K
    assert sum(of_kv) == wanted


def test_reading_a_byte_twice_is_seen(monkeypatch):
    slot = "pool + block * block_stride + segment.offset * slot_stride, slot_stride, pool_head_stride, 0"
    twice = f"carried.load(Slot{{{slot}}});"

    class Edited(traffic.FullSize):
        def _build_kernel(self, name, defines):
            source = kernels.source_of(name, defines)
            assert twice in source
            return RawKernel(source.replace(twice, f"{{ {twice} __syncwarp(__activemask()); {twice} }}"), name)

    monkeypatch.setattr(traffic, "FullSize", Edited)
    assert traffic.once(traffic.launch_of("gather_cache", (1, 576, "float16"), 3, 34)) == pytest.approx(0.5)


def test_the_bars_of_what_kernels_move():
    lines = list(traffic.traffic_bars(["copy_blocks"]))
    assert [line.split()[0] for line in lines] == ["met"] * 4 + ["8x128", "1x576", "32x128"]


def test_the_bars_of_attention(monkeypatch):
    """What a row tile sees is read, and nothing else: met; and missed where the window is not looked at."""
    pytest.importorskip("cuda.core", reason="cuda.core is not installed, which NVRTC is called through")
    some = "prefill 20 8x128 float16, window 300"
    monkeypatch.setattr(traffic, "ATTENDED", {some: (1, 64, 64, "float16", 4, 1, 20, 300)})
    lines = list(traffic.attention_bars())
    assert [line.split()[0] for line in lines] == ["met"] * 5 + ["prefill"]

    class Edited(traffic.FullSize):
        def _build_kernel(self, name, defines):
            source = kernels.source_of(name, defines)
            return RawKernel(source.replace("any{of_first.first,", "any{0,"), name)

    monkeypatch.setattr(traffic, "FullSize", Edited)
    assert next(iter(traffic.attention_bars())).startswith("MISSED paged_attention reads what a row tile sees")


def test_the_speed_of_the_emulated_device():
    lines = list(emulation.speed_bars(1))
    assert [re.sub(r"^(met   |MISSED) | in \d.*", "", line) for line in lines] == [
        "collectives >= 5 x those of swapcontext:", "1,500 sequences are gathered in a second:"
    ]  # fmt: skip
    with pytest.raises(CompileError):
        emulation.collectives("-no-such-flag")
