"""Threads that copy for the NumPy backend: NumPy lets go of the interpreter while it copies."""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeAlias

__all__ = ["SHARED_BYTES", "Job", "job_bytes", "run"]

Job: TypeAlias = Callable[[], object]

SHARED_BYTES = 2**22  # from here on several threads: waking one and waiting for it is like copying 1 MB
_HEAD_START = 2**19  # bytes that the caller copies while a helper wakes up
_LARGEST_JOB = 2**23  # bytes; a thread that is held up holds up little more than this
_MAX_THREADS = 8


class _Helpers:
    """Threads that do what is put into ``orders``, started when they are first counted.

    Bare, since futures take 0.1 to 0.2 ms a call, in which a core copies 1 to 2 MB.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As if none had been started, which is so in the child of a fork."""
        self.orders: SimpleQueue[Job] = SimpleQueue()
        self._count = 0
        self._lock = threading.Lock()

    def count(self) -> int:
        """How many there are beside the caller."""
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = min(available, _MAX_THREADS) - 1
        with self._lock, suppress(RuntimeError):  # no more threads are to be had
            while self._count < wanted and not sys.is_finalizing():
                name = f"cupy_pagedkv_{self._count}"
                threading.Thread(target=_obey, args=(self.orders,), name=name, daemon=True).start()
                self._count += 1
        return min(self._count, wanted)


def _obey(orders: "SimpleQueue[Job]") -> None:
    while True:
        orders.get()()


_helpers = _Helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.reset)


def _num_threads(num_bytes: int) -> int:
    return min(_helpers.count() + 1, 2 * num_bytes // SHARED_BYTES)


def job_bytes(num_bytes: int) -> int:
    """How much a job should copy, of ``num_bytes`` in all."""
    if num_bytes < SHARED_BYTES:
        return _LARGEST_JOB
    return min(_LARGEST_JOB, num_bytes // _num_threads(num_bytes)) - _HEAD_START


def run(jobs: list[Job], num_bytes: int) -> None:
    """Run ``jobs``, which copy ``num_bytes``, in any order; all are done when this returns, and none runs any more when
    this raises."""
    if num_bytes < SHARED_BYTES:
        for job in jobs:
            job()
        return
    # The last is the caller's own: to wait for a helper is to wait until this thread is woken, too.
    shared, own = (jobs[:-1], jobs[-1:]) if len(jobs) > 2 else (jobs, [])
    waiting = iter(shared)  # one for all threads, so that each job is done once
    active: list[None] = []
    ends: SimpleQueue[None] = SimpleQueue()
    errors: list[BaseException] = []

    def work() -> None:
        for job in waiting:
            job()

    def drop() -> None:
        for _ in waiting:
            pass

    def help_out() -> None:
        active.append(None)
        try:
            work()
        except BaseException as error:
            drop()
            errors.append(error)
        finally:
            active.pop()
            ends.put(None)

    try:
        for _ in range(min(_num_threads(num_bytes), len(shared)) - 1):
            _helpers.orders.put(help_out)
        work()
        for job in own:
            job()
    except BaseException as error:
        errors.insert(0, error)
    while True:
        try:
            if errors:
                drop()
            while active:  # a helper that has not come by now finds nothing to do
                ends.get()
            break
        except BaseException as error:  # after a second Ctrl-C, too, nothing may be written any more
            errors.insert(0, error)
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # or the error keeps this frame, and this frame the error, and both the arrays
