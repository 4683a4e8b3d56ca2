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
from typing import Protocol

SMALL = 32 * 1024  # bytes: up to here handing over the interpreter costs more than copying the data


class Member(Protocol):
    """The calling thread."""

    moved: bool


class Crowd:
    """Moves threads that meet.  `member` has an attribute for each thread (threading.local)."""

    def __init__(self, member: Member) -> None:
        self.enabled = hasattr(os, "sched_setaffinity")
        self._member = member
        self._cpu: dict[str, int] = {}  # "cpu" -> number, once somebody has moved

    def meet(self, length: int) -> None:
        """The calling thread begins a request of `length` bytes while others are running.  Raises nothing."""
        if length <= SMALL:
            self._move()

    def _move(self) -> None:
        self._member.moved = True
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
