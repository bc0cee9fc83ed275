"""What a launch moves, as a GPU would move it: requests, sectors, bank conflicts, and what is in flight."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .architectures import ARCHITECTURES, Occupancy, occupancy_of
from .compiler import place_of
from .nvrtc import Resources, compile_kernel

if TYPE_CHECKING:
    from typing import Protocol

    class _Kernel(Protocol):
        name: str
        code: str


__all__ = ["ArrayTraffic", "LaunchProfile", "LineTraffic", "SharedTraffic", "Traffic", "launches_of", "profile"]

_WRITES, _MATRIX = 1 | 2, 4  # emulated::Touch
_SHARED, _DEVICE = -1, -2


class _Row(ctypes.Structure):  # emulated::Row of profile.hpp
    _fields_ = (
        ("place", ctypes.c_uint64),
        ("array", ctypes.c_int64),
        *((name, ctypes.c_uint64) for name in ("touch", "requests", "bytes", "sectors", "wavefronts", "least")),
    )


class _Bytes(ctypes.Structure):
    _fields_ = (("array", ctypes.c_int64), *((name, ctypes.c_uint64) for name in ("touch", "once", "more", "most")))


class Report(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_uint64),
        ("num_bytes", ctypes.c_uint64),
        ("rows", ctypes.POINTER(_Row)),
        ("bytes", ctypes.POINTER(_Bytes)),
        *((name, ctypes.c_uint64) for name in ("collectives", "barriers", "in_flight")),
    )


class Traffic(NamedTuple):
    """Requests to global memory. A request is what the lanes of a warp touch at one place in one pass."""

    requests: int = 0
    bytes: int = 0
    """That any lane of a request asked for: what several lanes ask for counts once."""
    sectors: int = 0
    """Of 32 bytes, in which memory moves."""
    touched_once: int = 0
    """Bytes of memory that one request touched."""
    touched_again: int = 0
    """Bytes of memory that several requests touched."""
    most: int = 0
    """How many requests touched the same byte, at most (65,535 stands for more)."""

    @property
    def used(self) -> float:
        """The share of the sectors' bytes that was asked for; 1 where there is none."""
        return self.bytes / (32 * self.sectors) if self.sectors else 1.0

    def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]
        sums = Traffic(*(a + b for a, b in zip(self, other, strict=True)))
        return sums._replace(most=max(self.most, other.most))

    def __str__(self) -> str:
        again = f", {self.touched_again:,} of them more than once (up to {self.most})" if self.touched_again else ""
        return (
            f"{self.bytes:,} B in {self.requests:,} requests of {self.sectors:,} sectors, {self.used:.0%} used{again}"
        )


class SharedTraffic(NamedTuple):
    """Requests to shared memory."""

    requests: int = 0
    wavefronts: int = 0
    """Passes that the banks take."""
    least: int = 0
    """Passes that as many accesses take without conflicts."""

    @property
    def conflicts(self) -> int:
        return self.wavefronts - self.least

    @property
    def ways(self) -> float:
        """How many times as many passes it takes as it has to."""
        return self.wavefronts / self.least if self.least else 1.0

    def __add__(self, other: "SharedTraffic") -> "SharedTraffic":  # type: ignore[override]
        return SharedTraffic(*(a + b for a, b in zip(self, other, strict=True)))


class ArrayTraffic(NamedTuple):
    """What was read and written of one argument."""

    read: Traffic
    written: Traffic


class LineTraffic(NamedTuple):
    """What one line of the kernel reads from, or writes to, one argument or shared memory."""

    place: str
    """``file:line``."""
    argument: int | None
    """``None``: shared memory, or a variable of the device."""
    writes: bool
    traffic: Traffic
    shared: SharedTraffic


@dataclass(frozen=True)
class LaunchProfile:
    """What one launch did. ``str()`` of it is a report."""

    kernel: str
    code: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_mem: int
    read: Traffic
    """From all arrays and device variables."""
    written: Traffic
    arrays: dict[int, ArrayTraffic]
    """By the number of the argument."""
    shared: SharedTraffic
    """Loads and stores of shared memory, and what asynchronous copies store there."""
    matrices: SharedTraffic
    """Of ``ldmatrix``."""
    lines: tuple[LineTraffic, ...]
    collectives: float
    """Of a thread, on average."""
    barriers: float
    bytes_in_flight: int
    """Bytes that a thread asks global memory for before it comes to a store, a collective or a barrier, and those of
    its asynchronous copies; at most, summed over the threads of a block."""

    def resources(self, arch: int = 90) -> Resources:
        """What NVIDIA's compiler gives a thread; raises ``RuntimeError`` without the extra ``bench``."""
        return compile_kernel(self.code, arch)[1]

    def occupancy(self, arch: int = 90) -> Occupancy:
        """How many blocks a multiprocessor holds; raises as :meth:`resources` does."""
        taken = self.resources(arch)
        threads = self.block[0] * self.block[1] * self.block[2]
        return occupancy_of(arch, threads, taken.registers, taken.shared_memory + self.shared_mem)

    def in_flight(self, arch: int = 90) -> tuple[float, float]:
        """Bytes in flight on a full multiprocessor, and those that Little's law asks for; raises as :meth:`resources`
        does."""
        return float(self.occupancy(arch).blocks * self.bytes_in_flight), ARCHITECTURES[arch].bytes_in_flight

    def __str__(self) -> str:
        out = [f"{self.kernel}, grid {self.grid}, block {self.block}, {self.shared_mem} B of dynamic shared memory"]
        out += [f"  reads   {self.read}", f"  writes  {self.written}"]
        for argument, (read, written) in self.arrays.items():
            out += [f"    argument {argument}: reads {read}"] if read.requests else []
            out += [f"    argument {argument}: writes {written}"] if written.requests else []
        for name, traffic in (("shared memory", self.shared), ("ldmatrix", self.matrices)):
            if traffic.requests:
                out.append(f"  {name}: {traffic.requests:,} requests, {traffic.conflicts:,} bank conflicts")
        for line in self.lines:
            if line.shared.conflicts:
                out.append(
                    f"    {line.place}: {line.shared.ways:.1f}-way conflicts in {line.shared.requests:,} requests"
                )
            elif line.traffic.used < 0.97:
                kind = "writes" if line.writes else "reads"
                used = f"{line.traffic.used:.0%} of {line.traffic.sectors:,} sectors used"
                out.append(f"    {line.place}: {used} by its {kind}")
        out.append(f"  {self.collectives:.4g} collectives and {self.barriers:.4g} barriers a thread")
        out.append(f"  {self.bytes_in_flight:,} B in flight in a block")
        return "\n".join(out)

    def device_report(self, arch: int = 90) -> str:
        """Registers, occupancy and bytes in flight on ``sm_<arch>``; raises as :meth:`resources` does."""
        taken, occupancy, gpu = self.resources(arch), self.occupancy(arch), ARCHITECTURES[arch]
        has, asked = self.in_flight(arch)
        return (
            f"sm_{arch}: {taken.registers} registers, {taken.shared_memory + self.shared_mem} B shared, "
            f"{occupancy.blocks} blocks a multiprocessor (limited by {occupancy.limited_by}), {occupancy.share:.0%} of "
            f"its threads; {has / 1024:.1f} KB in flight, {asked / 1024:.1f} KB asked by {gpu.gpu}: {has / asked:.1f} x"
        )


_launches: ContextVar[list[LaunchProfile] | None] = ContextVar("launches", default=None)


@contextmanager
def profile() -> Iterator[list[LaunchProfile]]:
    """Measure the launches of this thread; the list it gives grows by one at each.

    The counts are those of what the host compiler made of the kernel, GCC at -O1, Clang at -O0: NVIDIA's may merge two
    narrow accesses, or drop one whose value it has. Launches take 50 to 200 times as long.
    """
    launches: list[LaunchProfile] = []
    token = _launches.set(launches)
    try:
        yield launches
    finally:
        _launches.reset(token)


def launches_of() -> list[LaunchProfile] | None:
    """The list that launches are to be added to, if any."""
    return _launches.get()


def profile_of(
    kernel: "_Kernel",
    grid: Sequence[int],
    block: Sequence[int],
    shared_mem: int,
    library: Path,
    report: Report,
    arguments: Sequence[int],
) -> LaunchProfile:
    """``report`` with places as lines and arrays by the number of their argument."""
    rows = report.rows[: report.num_rows]
    touched = report.bytes[: report.num_bytes]
    lines: dict[tuple[str, int | None, bool, bool], LineTraffic] = {}
    traffic: dict[tuple[int, bool], Traffic] = {}
    shared = {False: SharedTraffic(), True: SharedTraffic()}
    for row in rows:
        place, writes, matrix = place_of(library, row.place), bool(row.touch & _WRITES), bool(row.touch & _MATRIX)
        of_shared, of_global = SharedTraffic(), Traffic()
        if row.array == _SHARED:
            of_shared = SharedTraffic(row.requests, row.wavefronts, row.least)
            shared[matrix] += of_shared
        else:
            of_global = Traffic(row.requests, row.bytes, row.sectors)
            traffic[row.array, writes] = traffic.get((row.array, writes), Traffic()) + of_global
        argument = arguments[row.array] if row.array >= 0 else None
        key = (place, argument, writes, row.array == _SHARED)
        before = lines.get(key, LineTraffic(place, argument, writes, Traffic(), SharedTraffic()))
        lines[key] = before._replace(traffic=before.traffic + of_global, shared=before.shared + of_shared)
    for item in touched:
        key2 = (item.array, bool(item.touch))
        traffic[key2] = traffic[key2]._replace(touched_once=item.once, touched_again=item.more, most=item.most)
    threads = grid[0] * grid[1] * grid[2] * block[0] * block[1] * block[2]
    return LaunchProfile(
        kernel=kernel.name,
        code=kernel.code,
        grid=tuple(grid),
        block=tuple(block),
        shared_mem=shared_mem,
        read=sum((t for (_, writes), t in traffic.items() if not writes), Traffic()),
        written=sum((t for (_, writes), t in traffic.items() if writes), Traffic()),
        arrays={
            argument: ArrayTraffic(traffic.get((i, False), Traffic()), traffic.get((i, True), Traffic()))
            for i, argument in enumerate(arguments)
        },
        shared=shared[False],
        matrices=shared[True],
        lines=tuple(lines.values()),
        collectives=report.collectives / threads,
        barriers=report.barriers / threads,
        bytes_in_flight=report.in_flight,
    )
