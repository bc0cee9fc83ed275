"""A sequence that travels between two ranks, and a step's batch on both, against MPI's own calls for as many bytes.

``python bench.py mpi`` launches the ranks, which run this module. All take turns, and what arrived is compared first.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cases import BLOCK_SIZE, OURS
from .output import bar

MPI_OWN = "MPI's own"
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))


@dataclass(frozen=True)
class Travel:
    """What was measured; seconds are medians, from a barrier until both ranks are done."""

    label: str
    num_bytes: int
    seconds: dict[str, float]
    at_least: float | None

    def ratio(self) -> float:
        return self.seconds[MPI_OWN] / self.seconds[OURS]


def travels(quick: bool) -> list[Travel]:
    """Launches two ranks, and returns what they measured."""
    command = [str(MPIEXEC), "-n", "2", sys.executable, "-m", "benchmarks.mpi", *(["--quick"] if quick else [])]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the ranks failed:\n{done.stdout}{done.stderr}")
    return [Travel(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def travel_lines(measured: list[Travel]) -> Iterator[str]:
    yield f"{'two ranks':<44}{'MB':>9}{'ms':>9}{'GB/s':>7}   of {MPI_OWN}"
    for each in measured:
        seconds = each.seconds[OURS]
        cells = f"{each.num_bytes / 1e6:>9.3f}{seconds * 1e3:>9.3f}{each.num_bytes / seconds / 1e9:>7.2f}"
        yield f"{each.label:<44}{cells}   {each.ratio():.2f}"


def travel_bars(measured: list[Travel]) -> Iterator[str]:
    for each in measured:
        if each.at_least is not None:
            yield from bar(f"{each.label} >= {each.at_least} of {MPI_OWN}", each.at_least, [(each.ratio(), each.label)])


def in_turns(comm: Any, calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians of what the calls say they took on the slower rank. All take turns."""
    from mpi4py import MPI

    samples: dict[str, list[float]] = {name: [] for name in calls}
    longest = np.zeros(1)
    for _ in range(rounds):
        for name, call in calls.items():
            seconds = np.array([call()])
            comm.Allreduce(seconds, longest, op=MPI.MAX)
            samples[name].append(longest.item())
    return {name: statistics.median(times) for name, times in samples.items()}


def a_sequence_travels(comm: Any, quick: bool, num_layers: int, num_tokens: int) -> Travel:
    """Of layers with 8 heads of 128."""
    from cupy_pagedkv import KVCacheManager, LayeredPagedKVCache
    from cupy_pagedkv.mpi import recv, send

    num_tokens //= 16 if quick else 1
    shape = num_layers, num_tokens // BLOCK_SIZE + 1, BLOCK_SIZE, 8, 128
    cache = LayeredPagedKVCache(*shape, "float16", device="cpu")
    manager = KVCacheManager(cache)
    num_bytes = num_tokens * num_layers * 2 * 8 * 128 * 2
    memory = np.ones(num_bytes, np.uint8)
    tokens, sequence = np.arange(num_tokens), None
    expected = np.random.default_rng(0).integers(0, 1000, (2, num_layers, num_tokens, 8, 128), np.uint16)
    expected = expected.view(np.float16)
    if comm.rank == 0:
        sequence = manager.add(tokens)
        with manager.prepare({sequence: tokens}) as batch:
            cache.update_all(*expected, batch.slot_mapping)

    def ours() -> float:
        comm.Barrier()
        start = time.perf_counter()
        if sequence is not None:
            send(manager, sequence, comm, 1)
            return time.perf_counter() - start
        received = recv(manager, comm, 0)
        seconds = time.perf_counter() - start
        if ours.first:
            keys, values = cache.gather_all(received.block_table[None], [num_tokens])
            if keys.tobytes() != expected[0].tobytes() or values.tobytes() != expected[1].tobytes():
                raise SystemExit("what arrived is not what was sent")
            ours.first = False
        manager.free(received)
        manager.reset_prefix_cache()
        return seconds

    ours.first = True

    def plain() -> float:
        comm.Barrier()
        start = time.perf_counter()
        if comm.rank == 0:
            comm.Send(memory, 1)
        else:
            comm.Recv(memory, 0)
        return time.perf_counter() - start

    calls = {OURS: ours, MPI_OWN: plain}
    in_turns(comm, calls, 2)
    return Travel(
        f"a sequence of {num_tokens} tokens in {num_layers} layers",
        num_bytes,
        in_turns(comm, calls, 5 if quick else 15),
        0.7,
    )


def steps_of_a_group(comm: Any, quick: bool) -> list[Travel]:
    """256 sequences of 1,000 tokens, a token more each. The message alone, against a broadcast of as many bytes, and of
    as many as the arrays of the batch have, which a group need not send; and what the whole step takes longer on the
    slower of two ranks of a group than on two that prepare it for themselves."""
    from cupy_pagedkv import KVCacheManager, LayeredPagedKVCache
    from cupy_pagedkv.mpi import STEP_BYTES, GroupManager

    def a_cache() -> Any:
        return LayeredPagedKVCache(1, 256 * 70, BLOCK_SIZE, 1, 1, "uint8", device="cpu")

    group, alone = GroupManager(a_cache(), comm, 2), KVCacheManager(a_cache())
    sequences: dict[Any, list[Any]] = {group: [], alone: []}
    for manager in (group, alone):
        if manager is alone or comm.rank == 0:
            sequences[manager] = [manager.add(range(1000 * i, 1000 * i + 1000)) for i in range(256)]
            manager.commit(manager.prepare({each: each.remaining for each in sequences[manager]}))
        else:
            manager.follow()
    num_bytes = 256 * (63 * 4 + 16 + 4) + 257 * 4
    new = [np.arange(256, dtype=np.int32)] * 3

    def step(manager: Any) -> float:
        comm.Barrier()
        start = time.perf_counter()
        if sequences[manager]:
            manager.rollback(manager.prepare({sequence: [7] for sequence in sequences[manager]}))
        else:
            manager.follow()
        return time.perf_counter() - start

    def message() -> float:
        held, group._calls = group._calls, []  # which the next step brings
        comm.Barrier()
        start = time.perf_counter()
        if comm.rank == 0:
            group._tell("prepare", *new)
            group._send_calls()
        else:
            group._next_call()
        seconds = time.perf_counter() - start
        group._calls = held
        return seconds

    def plain(num_bytes: int) -> Callable[[], float]:
        memory = np.ones(num_bytes, np.uint8)

        def call() -> float:
            comm.Barrier()
            start = time.perf_counter()
            comm.Bcast(memory)
            return time.perf_counter() - start

        return call

    rounds = 10 if quick else 400
    calls = {OURS: message, "of its bytes": plain(STEP_BYTES), MPI_OWN: plain(num_bytes)}
    of_message = in_turns(comm, calls, rounds)
    of_its_bytes = {OURS: of_message[OURS], MPI_OWN: of_message.pop("of its bytes")}
    calls = {OURS: lambda: step(group), "alone": lambda: step(alone), MPI_OWN: plain(num_bytes)}
    in_turns(comm, calls, 2)
    of_step = in_turns(comm, calls, rounds)
    of_step[OURS] = max(1e-7, of_step[OURS] - of_step.pop("alone"))
    return [
        Travel("a step of 256 sequences, of its message", STEP_BYTES, of_its_bytes, 0.5),
        Travel("a step of 256 sequences, of its arrays", num_bytes, of_message, 0.5),
        Travel("the step, beyond the ranks' own work", num_bytes, of_step, None),
    ]


def main() -> None:
    from mpi4py import MPI

    comm, quick = MPI.COMM_WORLD.Dup(), "--quick" in sys.argv
    sequences = [a_sequence_travels(comm, quick, *sizes) for sizes in ((4, 16384), (32, 2048))]
    measured = [*sequences, *steps_of_a_group(comm, quick)]
    if comm.rank == 0:
        print(json.dumps([asdict(each) for each in measured]))


if __name__ == "__main__":
    main()
