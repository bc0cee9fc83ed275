"""Times of one call: the median of many on the host, and on a GPU with a cold cache inside a CUDA graph."""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupy_pagedkv.devices import backend
from cupy_pagedkv.devices.cuda_backend import CudaBackend

from .cases import FLOOR, OURS, Call, Case, Problem, contenders, torch

BARE, EMPTY = "bare launch", "empty kernel"


@dataclass
class Row:
    """What was measured of a case; times in seconds, medians, of one call."""

    case: Case
    seconds: dict[str, float]
    eager: dict[str, float] = field(default_factory=dict)
    """Host time of one call on a GPU: of ours, and of launching the same kernel with the same arguments."""
    alone: dict[str, float] = field(default_factory=dict)
    """Of a CUDA graph that is one call: of ours, and of an empty kernel."""

    def share_of_copy(self, name: str = OURS) -> float:
        return self.seconds[FLOOR] / self.seconds[name]

    def ratio_to(self, name: str) -> float:
        """How many times as fast as `name` this package is."""
        return self.seconds[name] / self.seconds[OURS]


def time_on_cpu(calls: dict[str, list[Call]], seconds: float) -> dict[str, float]:
    """Medians of single calls. All take turns, in an order of their own each round."""
    rng = np.random.default_rng(0)
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for name in rng.permutation(names):
            [call] = calls[name]
            call()
            for _ in range(3):
                start = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(samples[name]) for name in names}


def in_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians of what the calls say they took. All take turns, in an order of their own each round."""
    rng = np.random.default_rng(0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in rng.permutation(list(calls)):
            samples[name].append(calls[name]())
    return {name: statistics.median(times) for name, times in samples.items()}


def time_on_gpu(calls: dict[str, list[Call]], seconds: float, cupy: Any) -> dict[str, float]:
    """Medians of the device's time for one call: all sets in one CUDA graph, replayed with a cold cache."""
    flushed = cupy.zeros(2 * cupy.cuda.Device().attributes["L2CacheSize"], cupy.uint8)
    stream = cupy.cuda.Stream(non_blocking=True)
    torch_stream: Any = nullcontext()
    if "torch" in calls:
        torch_stream = torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr))
    graphs = {}
    cupy.cuda.Device().synchronize()  # what made the arrays ran on another stream
    with stream, torch_stream:
        for name, of_sets in calls.items():
            for call in of_sets:
                call()  # compiles, and leaves in the allocators what a capture cannot ask for
            stream.synchronize()
            stream.begin_capture()
            try:
                for call in of_sets:
                    call()
            except Exception as error:
                if name in (OURS, FLOOR, EMPTY):
                    raise
                print(f"{name} cannot be captured and is left out: {error}", file=sys.stderr)
                with suppress(Exception):
                    stream.end_capture()
            else:
                graphs[name] = stream.end_capture()
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        begin, finish = cupy.cuda.Event(), cupy.cuda.Event()
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < 20 or time.perf_counter() < end:
            for name, graph in graphs.items():
                flushed.fill(rounds % 256)
                begin.record(stream)
                graph.launch(stream)
                finish.record(stream)
                finish.synchronize()
                samples[name].append(cupy.cuda.get_elapsed_time(begin, finish) / 1e3 / len(calls[name]))
            rounds += 1
    return {name: statistics.median(times) for name, times in samples.items()}


def host_times(calls: dict[str, Call], cupy: Any) -> dict[str, float]:
    """Median host times of calls that only queue work."""

    def timed(call: Call) -> Callable[[], float]:
        def several() -> float:
            cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            for _ in range(20):  # fewer than a stream's queue holds
                call()
            return (time.perf_counter() - start) / 20

        return several

    return in_turns({name: timed(call) for name, call in calls.items()}, 30)


class Launched:
    """A kernel that remembers how it was launched last."""

    last: "Launched"

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __call__(self, *arguments: Any) -> None:
        self.arguments = arguments
        Launched.last = self
        self.kernel(*arguments)


class RememberingBackend(CudaBackend):
    def _build_kernel(self, name: str, defines: Any) -> Any:
        return Launched(super()._build_kernel(name, defines))


def bare_launch(call: Call, cupy: Any) -> Call:
    """The launch that `call` makes, and nothing else of it."""
    remembering = RememberingBackend(cupy)
    usual, backend._cuda = backend._cuda, lambda: remembering  # type: ignore[assignment]
    try:
        call()
    finally:
        backend._cuda = usual
    kernel, arguments = Launched.last.kernel, Launched.last.arguments
    return lambda: kernel(*arguments)


def measure(case: Case, xp: Any, seconds: float) -> Row:
    sets = 1
    if xp is not np:
        # Several times the L2 cache, where the graph stays of a reasonable length.
        l2 = xp.cuda.Device().attributes["L2CacheSize"]
        sets = min(64, max(2, -(-4 * l2 // case.bytes)))
    problem = Problem(case, sets, xp)
    calls = contenders(problem)
    expected = problem.expected()
    for name, of_sets in calls.items():
        problem.verify(name, of_sets[0], expected)
    if xp is np:
        return Row(case, time_on_cpu(calls, seconds))
    ours = calls[OURS][0]
    row = Row(case, {}, host_times({OURS: ours, BARE: bare_launch(ours, xp)}, xp))
    if case.operation.startswith("scatter"):
        kernel = xp.RawKernel('extern "C" __global__ void empty() {}', "empty")
        row.alone = time_on_gpu({OURS: [ours], EMPTY: [lambda: kernel((1,), (32,), ())]}, seconds, xp)
    row.seconds = time_on_gpu(calls, seconds, xp)
    return row
