"""What Nsight Compute counts of some launches on a GPU, against what the emulated device says of the same."""

import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupy_pagedkv.emulator import LaunchProfile, emulate, profile

from .cases import SHAPES
from .kernels import ATTENTION, KERNELS, emulated_by
from .traffic import ATTENDED, FullSize, attend, launch

NCU = shutil.which("ncu")


def each_launch(xp: Any) -> Iterator[str]:
    """Makes the launches of one case after another; gives what each is called, when it has been made."""
    for kernel in sorted({*KERNELS} - {*ATTENTION}):
        for heads, dim, dtype in (*SHAPES[:3], SHAPES[4]):
            launch(kernel, (heads, dim, dtype), xp=xp)
            yield f"{kernel} {heads}x{dim} {dtype}"
    for label, case in ATTENDED.items():
        attend(*case, xp=xp)
        yield label


def emulated(arch: int, processors: int) -> Iterator[tuple[str, LaunchProfile]]:
    """Launches as on ``sm_<arch>`` with so many multiprocessors: how they are made depends on both."""
    device = FullSize()
    device.processors = processors
    with emulated_by(device), emulate(arch=arch), profile() as launches:
        for label in each_launch(np):
            yield from ((f"{label}, {each.kernel}", each) for each in launches)
            launches.clear()


def _wavefronts(launch: LaunchProfile, writes: bool) -> int:
    return sum(line.shared.wavefronts for line in launch.lines if line.writes == writes)


_OF_GLOBAL = "l1tex__t_{}_pipe_lsu_mem_global_op_{}.sum"  # asynchronous copies are loads here
_OF_SHARED = "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_{}.sum"
_OF_COPIES = "smsp__sass_l1tex_data_pipe_lsu_wavefronts_mem_shared_op_ldgsts.sum"
COUNTERS: dict[str, tuple[tuple[str, ...], Callable[[LaunchProfile], int]]] = {
    "sectors read": ((_OF_GLOBAL.format("sectors", "ld"),), lambda launch: launch.read.sectors),
    "requests to read": ((_OF_GLOBAL.format("requests", "ld"),), lambda launch: launch.read.requests),
    "sectors written": ((_OF_GLOBAL.format("sectors", "st"),), lambda launch: launch.written.sectors),
    "requests to write": ((_OF_GLOBAL.format("requests", "st"),), lambda launch: launch.written.requests),
    "shared memory read, wavefronts": ((_OF_SHARED.format("ld"),), lambda launch: _wavefronts(launch, False)),
    "shared memory written, wavefronts": (
        (_OF_SHARED.format("st"), _OF_COPIES), lambda launch: _wavefronts(launch, True),
    ),
    "ldmatrix": (("smsp__inst_executed_op_ldsm.sum",), lambda launch: launch.matrices.requests),
}  # fmt: skip


@dataclass
class Compared:
    """One counter of one launch."""

    label: str
    counter: str
    emulated: int
    counted: int

    @property
    def ratio(self) -> float:
        return self.emulated / self.counted if self.counted else float(self.emulated == 0)


def counted() -> list[dict[str, int]]:
    """Each launch's counters, on a GPU; raises ``RuntimeError`` where ncu cannot read them."""
    metrics = sorted({metric for names, _ in COUNTERS.values() for metric in names})
    with tempfile.NamedTemporaryFile("r", suffix=".csv") as log:
        run = subprocess.run(
            [str(NCU), "--csv", "--page=raw", f"--log-file={log.name}", f"--metrics={','.join(metrics)}",
             f"--kernel-name=regex:^({'|'.join(KERNELS)})$", sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = log.read().splitlines()
    rows = list(csv.DictReader(line for line in lines if line.startswith('"')))[1:]  # the first has the units
    if run.returncode or not rows:
        raise RuntimeError(f"ncu failed: {''.join(lines[-5:])} {run.stderr.strip()[-500:]}")
    return [{metric: int(float(row[metric].replace(",", ""))) for metric in metrics} for row in rows]


def compared(launches: list[dict[str, int]], arch: int, processors: int) -> Iterator[Compared]:
    for (label, of_launch), counters in zip(emulated(arch, processors), launches, strict=True):
        for counter, (metrics, count) in COUNTERS.items():
            yield Compared(label, counter, count(of_launch), sum(counters[metric] for metric in metrics))


def counter_lines(comparisons: Iterable[Compared]) -> Iterator[str]:
    """Each counter: in how many launches both are equal, and where they differ most."""
    by_counter: dict[str, list[Compared]] = {}
    for comparison in comparisons:
        if comparison.emulated or comparison.counted:
            by_counter.setdefault(comparison.counter, []).append(comparison)
    for counter, all_of in by_counter.items():
        equal = sum(each.emulated == each.counted for each in all_of)
        close = sum(abs(each.ratio - 1) <= 0.01 for each in all_of)
        yield f"{counter}: equal in {equal} of {len(all_of)} launches, within 1% in {close}"
        for each in sorted(all_of, key=lambda each: -abs(each.ratio - 1))[: len(all_of) - close]:
            yield f"  {each.label}: {each.emulated:,}, counted {each.counted:,}: {each.ratio:.3f}"


if __name__ == "__main__":
    import cupy

    for _ in each_launch(cupy):
        cupy.cuda.Device().synchronize()
