"""Which CPU the server's threads run on: where it costs least to hand over the interpreter, and the data.

Python runs one thread at a time.  When many serve small requests, they hand the interpreter over several times per
request, and each time a thread is woken.  Waking it on another CPU, which has gone idle meanwhile, costs more than
the whole request, most of all in a virtual machine; on the CPU where the other one just went to sleep it costs next
to nothing, and what runs in Python could not have used a second CPU anyway.  So they all go to one CPU.

The time of large requests goes into copying, which all CPUs can do at once.  But when several connections make them,
threads wander from CPU to CPU with each hand-over, and find the data they have just read in the other one's cache.
So each connection has a CPU for its threads; one that is alone keeps all of them.

A thread moves when it first meets another one inside a request, so that a client with one request at a time keeps
all CPUs.  nbdkit's threads end with their connection.

What takes long outside of Python, such as writing out what a flush asks for, is better done on another CPU meanwhile
(storage/sync_thread.py).  The process's first thread meets nobody and is never moved: it shows which CPUs there are.
"""

from __future__ import annotations

import os
import threading
from typing import Protocol

SMALL = 32 * 1024  # bytes: up to here handing over the interpreter costs more than copying the data


class Member(Protocol):
    """The calling thread."""

    moved: bool


class Seat:
    """A connection's place."""

    cpu: int | None = None  # of its threads; chosen at its first large request beside others


class Crowd:
    """Moves threads that meet.  `member` has an attribute for each thread (threading.local)."""

    def __init__(self, member: Member) -> None:
        self._member = member
        try:
            self._cpus = sorted(os.sched_getaffinity(0))
        except (AttributeError, OSError):
            self._cpus = []
        self.enabled = bool(self._cpus)
        self._lock = threading.Lock()  # protects what is below
        self._cpu: int | None = None  # for small requests, once somebody has moved
        self._seats: list[Seat] = []  # of connections with large requests

    def meet(self, length: int, seat: Seat) -> None:
        """The calling thread begins a request of `length` bytes while others are running.  Raises nothing."""
        if not self.enabled:
            self._member.moved = True
            return
        try:
            if length <= SMALL:
                self._move(self._cpu_of_all())
            elif seat.cpu is None:
                self._take(seat)
            elif len(self._seats) > 1:
                self._move(seat.cpu)
        except (OSError, ValueError, IndexError):
            self.enabled = False  # a sandbox forbids it, or there is no /proc: slower, and that is all

    def _move(self, cpu: int) -> None:
        self._member.moved = True
        os.sched_setaffinity(0, {cpu})  # 0: this thread

    def _cpu_of_all(self) -> int:
        with self._lock:
            if self._cpu is None:
                self._cpu = current_cpu()
            return self._cpu

    def _take(self, seat: Seat) -> None:
        """Give a connection one of the CPUs that have the fewest."""
        with self._lock:
            if seat.cpu is None:
                taken = [other.cpu for other in self._seats]
                seat.cpu = min(self._cpus, key=taken.count)
                self._seats.append(seat)

    def leave(self, seat: Seat) -> None:
        """The connection ends."""
        with self._lock:
            if seat in self._seats:
                self._seats.remove(seat)


def current_cpu() -> int:
    """The CPU that runs this thread (proc(5), /proc/pid/stat, field 39).  Raises OSError, ValueError, IndexError."""
    with open("/proc/thread-self/stat", encoding="ascii", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[36])
