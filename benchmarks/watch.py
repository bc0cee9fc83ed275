"""A verdict on a kernel in seconds, at each save of its source."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cupy_pagedkv.devices import backend
from cupy_pagedkv.devices.emulated_backend import EmulatedBackend
from cupy_pagedkv.emulator import nvrtc

from .cases import OPERATIONS, OURS, SHAPES, Case, Problem, contenders
from .kernels import SOURCES, check_kernel, compiler_reports, emulated_by
from .timing import time_on_gpu

WATCHED = (SHAPES[0], SHAPES[-1])  # whose compiler's report is quickly made


def verdict(kernel: str, xp: Any, arch: int, last: dict[str, str | float]) -> tuple[int, dict[str, str | float]]:
    """Compile, verify and time `kernel`, or print the compiler's report; returns 1 and `last` if anything is wrong."""
    start = time.perf_counter()
    instance = EmulatedBackend()
    backend.DEBUG = False  # the check hands the kernel what that would refuse
    try:
        with nullcontext() if xp is not np else emulated_by(instance):
            wrong = check_kernel(kernel, xp)
        if wrong is None:
            results: dict[str, str | float] = {}
            if xp is np:
                try:
                    reports = compiler_reports(kernel, [arch], WATCHED)
                except RuntimeError as error:  # NVRTC or nvdisasm is not installed
                    results["no report by the compiler"] = str(error)
                else:
                    results.update({label: str(report) for label, report in reports.items()})
            else:
                for operation in [op for op, name in OPERATIONS.items() if name == kernel]:
                    for tokens in (64, 4096):
                        case = Case(operation, *SHAPES[0], tokens)
                        results[case.label] = time_on_gpu(
                            {OURS: contenders(Problem(case, 8, xp))[OURS]}, 0.05, xp
                        )[OURS]  # fmt: skip
    except Exception as error:  # whatever a broken edit may cause
        print(f"{error}\n{kernel} FAILED ({time.perf_counter() - start:.1f} s)")
        return 1, last
    seconds = time.perf_counter() - start
    if wrong is not None:
        print(f"{kernel} is WRONG: {wrong} ({seconds:.1f} s)")
        return 1, last
    where = "the emulated device" if xp is np else "the GPU"
    print(f"{kernel} is right on {where} ({seconds:.1f} s)")
    for label, result in results.items():
        before = last.get(label)
        if isinstance(result, str):
            print(f"  {label}: {result}" + (f"\n    before: {before}" if before not in (None, result) else ""))
        else:
            change = f", {result / before - 1:+.1%}" if isinstance(before, float) else ""
            print(f"  {label}: {result * 1e6:.2f} µs{change}")
    return 0, results


def check_when_told(kernel: str, xp: Any, arch: int, memory: Path) -> int:
    """What `watch` starts: load all that a verdict needs, wait for a line, and give the verdict."""
    if xp is np:
        with suppress(RuntimeError):  # `verdict` says so where it is not installed
            nvrtc.report_on('extern "C" __global__ void loads_the_compiler() {}', arch)
    else:
        xp.zeros(1)
    if not sys.stdin.readline():  # whoever would tell is gone
        return 0
    last = json.loads(memory.read_text()) if memory.exists() else {}
    status, results = verdict(kernel, xp, arch, last)
    memory.write_text(json.dumps(results))
    return status


def watch(kernel: str, arguments: Sequence[str]) -> NoReturn:
    """At each save of the kernel, a verdict of a process of its own, which a broken kernel may take down.

    That process is started ahead, so that all it imports is there when the save comes.
    """
    path = SOURCES / f"{kernel}.cu"

    def stamp() -> dict[Path, tuple[int, int]] | None:
        """Of the kernel and of all that it may include."""
        files = {}
        try:
            for file in (path, *SOURCES.glob("*.cuh")):
                status = file.stat()
                files[file] = status.st_mtime_ns, status.st_size
        except FileNotFoundError:  # an editor is replacing it
            return None
        return files if all(size for _, size in files.values()) else None

    with tempfile.TemporaryDirectory() as folder:
        door = str(SOURCES.parent / "bench.py")
        command = [sys.executable, door, kernel, "--check-when-told", f"{folder}/last.json", *arguments]
        child = subprocess.Popen(command, stdin=subprocess.PIPE)
        seen = stamp()
        print(f"waiting for a save of {path}; Ctrl-C ends", flush=True)
        try:
            while True:
                time.sleep(0.02)
                now = stamp()
                if now is None or now == seen:
                    continue
                time.sleep(0.02)
                if stamp() != now:  # it is still being written
                    continue
                seen = now
                try:
                    child.communicate(b"go\n", timeout=60)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
                    print(f"{kernel} is WRONG: no verdict after 60 s; does a loop never end?")
                else:
                    if child.returncode < 0:
                        crash = f"signal {-child.returncode}"
                        print(f"{kernel} is WRONG: it crashed ({crash}); an address outside all arrays?")
                print("waiting for the next save", flush=True)
                child = subprocess.Popen(command, stdin=subprocess.PIPE)
        finally:
            child.kill()
