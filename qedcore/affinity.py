"""Threads that compete for the interpreter are kept on one CPU.

Python runs one thread at a time.  When many serve small requests, they hand the interpreter over several times per
request, and each time a thread is woken.  Waking it on another CPU, which has gone idle meanwhile, costs more than
the whole request, most of all in a virtual machine; on the CPU where the other one just went to sleep it costs next
to nothing, and what runs in Python could not have used a second CPU anyway.

A thread moves when it first meets another one inside a small request, so that a client with one request at a time,
and large requests, whose time goes into copying, keep all CPUs.  nbdkit's threads end with their connection.
"""

from __future__ import annotations

import os
import threading

SMALL = 32 * 1024  # bytes: up to here handing over the interpreter costs more than copying the data


class _ThisThread(threading.local):
    moved = False


class Crowd:
    """Counts the requests inside.  No lock: append, pop and setdefault are single calls, atomic under the GIL."""

    def __init__(self) -> None:
        self.enabled = hasattr(os, "sched_setaffinity")
        self._inside: list[None] = []  # an item per request
        self._this_thread = _ThisThread()
        self._cpu: dict[str, int] = {}  # "cpu" -> number, once somebody has moved

    def enter(self, length: int) -> None:
        """A request of `length` bytes begins on this thread; leave() ends it.  Raises nothing."""
        inside = self._inside
        inside.append(None)
        if len(inside) > 1 and length <= SMALL and not self._this_thread.moved:
            self._move()

    def leave(self) -> None:
        self._inside.pop()

    def _move(self) -> None:
        self._this_thread.moved = True
        if not self.enabled:
            return
        try:
            cpu = self._cpu.get("cpu")
            if cpu is None:
                cpu = self._cpu.setdefault("cpu", current_cpu())
            os.sched_setaffinity(0, {cpu})  # 0: this thread
        except (OSError, ValueError, IndexError):
            self.enabled = False  # a sandbox forbids it, or there is no /proc: slower, and that is all


def current_cpu() -> int:
    """The CPU that runs this thread (proc(5), /proc/pid/stat, field 39).  Raises OSError, ValueError, IndexError."""
    with open("/proc/thread-self/stat", encoding="ascii", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[36])
