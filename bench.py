"""Scatter, gather and copies of blocks, against a copy of the same bytes and what else there is: verified, then timed.

    python bench.py                             every size and shape, on a GPU where there is one
    python bench.py gather_cache --only 8x128   some of them
    python bench.py reshape_and_cache --watch   waits for a save of the kernel, then a verdict in seconds
    python bench.py manager                     the host's work for many sequences
    python bench.py attention                   attention over the block tables
    python bench.py hf                          generate of a Hugging Face model, where transformers is installed
    python bench.py tiers                       host memory as a second tier, real traffic over both, and files
    python bench.py mpi                         between two ranks, which it launches, where mpi4py is installed
    python bench.py counters                    what Nsight Compute counts, against what the emulated device says
    python bench.py --kernels                   what the compiler makes of the kernels and what they move, with no GPU

PyTorch, Triton and xxhash compete where they are installed. What is measured, and how, is in benchmarks/.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks import counters, tiers
from benchmarks import mpi as ranks
from benchmarks.attention import cases as attention_cases
from benchmarks.attention import measure_attention
from benchmarks.cases import BLOCK_SIZE, OPERATIONS, SHAPES, TOKENS, Case
from benchmarks.chores import Chore, chores
from benchmarks.emulation import speed_bars
from benchmarks.kernels import KERNELS, print_reports
from benchmarks.output import (
    attention_bars,
    attention_lines,
    bars,
    chore_bars,
    chore_lines,
    machine,
    plot,
    table,
)
from benchmarks.timing import Row, measure
from benchmarks.traffic import traffic_bars
from benchmarks.watch import check_when_told, watch
from cupy_pagedkv.devices import backend
from cupy_pagedkv.devices.cuda_backend import CudaBackend
from cupy_pagedkv.emulator import nvrtc
from cupy_pagedkv.replay.report import Report

MANAGER, ATTENTION, HF, TIERS, MPI, COUNTERS = "manager", "attention", "hf", "tiers", "mpi", "counters"
OTHERS = (MANAGER, ATTENTION, HF, TIERS, MPI, COUNTERS)

T = TypeVar("T")


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "kernel",
        nargs="?",
        choices=(*KERNELS, *OTHERS),
        help="only what runs this kernel, or the bookkeeping; the others run only when they are named",
    )
    add("--device", choices=["cpu", "cuda"], help="by default a GPU where there is one")
    add("--only", nargs="+", default=[], metavar="TEXT", help="rows with all of these words in their name, such as "
        "gather, blocks, 8x128, float32 or tokens=512")  # fmt: skip
    add("--quick", action="store_true", help="fewer sizes and shapes, and less time for each")
    add("--trace", metavar="FILE", help="requests for tiers, as python -m cupy_pagedkv takes them")
    add("--json", metavar="FILE", help="write what was measured")
    add("--plot", metavar="FILE.png", help="draw the share of the floor against size")
    add("--watch", action="store_true", help="a verdict on KERNEL at each save")
    add("--kernels", action="store_true", help="what the compiler makes of the kernels, and what they move")
    add("--arch", type=int, choices=nvrtc.ARCHITECTURES, help="for --watch (90) and --kernels (all)")
    add("--check-when-told", metavar="FILE", help=argparse.SUPPRESS)
    return parser


def kept(items: Iterable[T], into: list[T]) -> Iterator[T]:
    """The items, each of which is in the list, too, when it comes."""
    for item in items:
        into.append(item)
        yield item


def tell_facts(name: str, xp: Any) -> dict[str, str]:
    facts = machine(name, xp)
    print(", ".join(f"{name} {fact}" for name, fact in facts.items()))
    return facts


def write_json(options: argparse.Namespace, facts: dict[str, str], **measured: Iterable[Any]) -> None:
    """What was measured, dataclasses, where it was asked for."""
    if options.json:
        measurements = {name: [asdict(each) for each in all_of] for name, all_of in measured.items()}
        Path(options.json).write_text(json.dumps({"machine": facts, **measurements}, indent=1))


def run_attention(parser: argparse.ArgumentParser, options: argparse.Namespace, device: str, xp: Any) -> int:
    cases = [case for case in attention_cases(options.quick) if set(options.only) <= set(case.label.split())]
    if not cases:
        example = next(attention_cases(options.quick)).label
        parser.error(f"no row has all of {options.only} in its name, such as {example!r}")
    facts = tell_facts(device, xp)
    print("GB/s count K and V, which are read once.\n")
    rows: list[Row] = []
    measured = (measure_attention(case, xp, 0.05 if options.quick else 0.7) for case in cases)
    for line in attention_lines(kept(measured, rows)):
        print(line, flush=True)
    print()
    for line in attention_bars(rows, xp is not np):
        print(line)
    write_json(options, facts, attention=rows)
    return 0


def run_hf(parser: argparse.ArgumentParser, options: argparse.Namespace, place: Any) -> int:
    try:
        from benchmarks import hf
    except ImportError as error:
        parser.error(f"{error}: pip install -e '.[hf,bench]'")
    facts = tell_facts(place.name, np)
    print()
    runs: list[hf.Generation] = []
    for line in hf.generation_lines(kept(hf.generations(options.quick), runs)):
        print(line, flush=True)
    print()
    for line in hf.generation_bars(runs):
        print(line)
    write_json(options, facts, hf=runs)
    return 0


def run_tiers(options: argparse.Namespace, device: str, xp: Any) -> int:
    facts = tell_facts(device, xp)
    print()
    place = "cpu" if xp is np else "cuda"
    done: list[tiers.Move] = []
    reports: list[tuple[str, Report]] = []
    moves = chain(tiers.moves(options.quick, place, xp), tiers.files(options.quick, place, xp))
    for line in tiers.move_lines(kept(moves, done)):
        print(line, flush=True)
    print()
    for line in tiers.replay_lines(kept(tiers.replays(options.quick, place, options.trace), reports)):
        print(line, flush=True)
    print()
    for line in tiers.move_bars(done):
        print(line)
    write_json(options, facts, moves=done, replays=[report for _, report in reports])
    return 0


def run_mpi(parser: argparse.ArgumentParser, options: argparse.Namespace, place: Any) -> int:
    if importlib.util.find_spec("mpi4py") is None or ranks.MPIEXEC is None:
        parser.error("mpi4py or mpiexec is not installed: pip install -e '.[mpi]'")
    facts = tell_facts(place.name, np)
    print()
    measured = ranks.travels(options.quick)
    for line in (*ranks.travel_lines(measured), "", *ranks.travel_bars(measured)):
        print(line)
    write_json(options, facts, mpi=measured)
    return 0


def run_counters(parser: argparse.ArgumentParser, options: argparse.Namespace, place: Any, xp: Any) -> int:
    if place.name != "cuda" or counters.NCU is None:
        parser.error("counters are a GPU's, which ncu of Nsight Compute reads: there has to be both")
    facts = tell_facts(place.name, xp)
    print()
    gpu = xp.cuda.Device()
    arch, processors = int(gpu.compute_capability), gpu.attributes["MultiProcessorCount"]
    try:
        comparisons = list(counters.compared(counters.counted(), arch, processors))
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    for line in counters.counter_lines(comparisons):
        print(line)
    write_json(options, facts, counters=comparisons)
    return 0


def main() -> int:
    parser = parser_of_arguments()
    options = parser.parse_args()
    if (options.watch or options.kernels) and options.kernel in OTHERS:
        parser.error(f"{options.kernel} is no kernel")
    if options.watch and options.kernel is None:
        parser.error(f"--watch needs the kernel: {' or '.join(KERNELS)}")
    for path in filter(None, (options.json, options.plot)):
        if not Path(path).resolve().parent.is_dir():  # better known now than when all has been measured
            parser.error(f"there is no folder for {path}")
    try:
        place = backend.backend_on(options.device)[0]
    except RuntimeError as error:
        parser.error(str(error))
    xp = place.xp if isinstance(place, CudaBackend) else np

    if options.check_when_told is not None:
        return check_when_told(options.kernel, xp, options.arch or 90, Path(options.check_when_told))
    if options.watch:
        watch(options.kernel, [f"--{name}={getattr(options, name)}" for name in ("device", "arch")
                               if getattr(options, name) is not None])  # fmt: skip
    kernels = KERNELS if options.kernel is None else (options.kernel,)
    if options.kernels:
        failed = print_reports(kernels, nvrtc.ARCHITECTURES if options.arch is None else (options.arch,))
        if not failed:
            print("\nWhat the emulated device counts:")
            for line in (*traffic_bars(kernels), *speed_bars()):
                print(line, flush=True)
        return failed

    if options.only and options.kernel in (HF, TIERS, MPI, COUNTERS):
        parser.error(f"{options.kernel} has no rows to choose from by --only")
    if place.name != "numpy" and options.kernel in (HF, MPI):
        parser.error(f"{options.kernel} measures on the host, got {place.name}: --device cpu")
    if options.kernel == ATTENTION:
        return run_attention(parser, options, place.name, xp)
    if options.kernel == HF:
        return run_hf(parser, options, place)
    if options.kernel == TIERS:
        return run_tiers(options, place.name, xp)
    if options.kernel == MPI:
        return run_mpi(parser, options, place)
    if options.kernel == COUNTERS:
        return run_counters(parser, options, place, xp)

    cases = [
        Case(operation, *shape, tokens)
        for operation, kernel in OPERATIONS.items()
        if kernel in kernels
        for shape in (SHAPES[:2] if options.quick else SHAPES)
        for tokens in (TOKENS[::2] if options.quick else TOKENS)
        if tokens % BLOCK_SIZE == 0 or operation != "copy blocks"
    ]
    cases = [case for case in cases if set(options.only) <= set(case.label.split())]
    with_manager = options.kernel in (None, MANAGER) and not options.only
    if not cases and not with_manager:
        parser.error(f"no row has all of {options.only} in its name, such as {Case('gather', *SHAPES[0], 512).label!r}")
    facts = tell_facts(place.name, xp)
    print("GB/s count what is read and what is written. x: how many times as fast as that.\n")
    rows: list[Row] = []
    measured = (measure(case, xp, 0.05 if options.quick else 0.7) for case in cases)
    for line in table(kept(measured, rows)):
        print(line, flush=True)
    print()
    done: list[Chore] = []
    if with_manager:
        for line in chore_lines(kept(chores(options.quick), done)):
            print(line, flush=True)
        print()
    of_operations = bars(rows, xp is not np) if place.name != "emulated" else ()  # which is not meant to be fast
    for line in (*of_operations, *chore_bars(done)):
        print(line)
    write_json(options, facts, rows=rows, manager=done)
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
