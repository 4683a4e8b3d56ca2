"""nbdkit plugin: what Python in nbdkit can do at all.

A raw file through the functions of the os module, with what the QED plugin does about threads, and nothing else.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import nbdkit

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))

from qedcore.server.affinity import Crowd, Seat
from qedcore.server.thread_state import ThreadStates

API_VERSION = 2

threads = ThreadStates()
this_thread = threads.this_thread
crowd = Crowd(this_thread)
running: list[None] = []
fd = -1


def config(key: str, value: str) -> None:
    global fd
    fd = os.open(value, os.O_RDWR)


def thread_model() -> Any:
    return nbdkit.THREAD_MODEL_PARALLEL


def after_fork() -> None:
    threads.enable()


def cleanup() -> None:
    threads.drain()


def open(readonly: bool) -> Seat:
    return Seat()


def close(h: Seat) -> None:
    crowd.leave(h)


def get_size(h: Seat) -> int:
    return os.fstat(fd).st_size


def can_multi_conn(h: Seat) -> bool:
    return True


def can_write(h: Seat) -> bool:
    return True


def can_flush(h: Seat) -> bool:
    return True


def pread(h: Seat, buf: memoryview, pos: int, flags: int) -> None:
    if not this_thread.moved and running:
        crowd.meet(len(buf), h)
    running.append(None)
    os.preadv(fd, (buf,), pos)
    running.pop()


def pwrite(h: Seat, buf: memoryview, pos: int, flags: int) -> None:
    if not this_thread.moved and running:
        crowd.meet(len(buf), h)
    running.append(None)
    os.pwrite(fd, buf, pos)
    running.pop()


def flush(h: Seat, flags: int) -> None:
    os.fdatasync(fd)
