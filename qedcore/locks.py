"""Locks with ranks: a thread takes them in rising order only, so no two threads can wait for each other.

The factories return plain locks of the threading module.  With QEDCORE_CHECK_LOCKS=1 in the environment
(every test sets it) they return locks that raise LockOrderError at the first violation.
"""

from __future__ import annotations

import enum
import os
import threading
from typing import Any

CHECK = os.environ.get("QEDCORE_CHECK_LOCKS") == "1"


class Rank(enum.IntEnum):
    """The order of qedcore/README.md: a lock may be taken only while all locks held have lower ranks."""

    SHARED = 0  # which image a server's connections use
    LIFECYCLE = 1  # open and close of one image
    GATE = 2  # the dirty period (NEED_CHECK)
    L2_TABLE = 3  # one L2 table; a request never holds two
    L1 = 4
    ALLOCATOR = 5
    RECLAIMER = 6
    HEADER = 7
    CACHE = 8  # dictionaries; never held across I/O
    STORAGE = 9  # inside one storage
    FLUSH = 10  # who syncs next; not held across the sync


class LockOrderError(AssertionError):
    """A thread took locks out of order: a deadlock waiting to happen."""


_held = threading.local()


class RankedLock:
    """A lock that checks the order in which its thread takes it."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._lock = threading.Lock()
        self._owner = 0  # thread identifier, 0 when free

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        stack: list[Rank] = _held.__dict__.setdefault("stack", [])
        if stack and stack[-1] >= self.rank:
            raise LockOrderError(f"{self.rank.name} taken while holding {[rank.name for rank in stack]}")
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            self._owner = threading.get_ident()
            stack.append(self.rank)
        return taken

    def release(self) -> None:
        _held.stack.remove(self.rank)
        self._owner = 0
        self._lock.release()

    def locked(self) -> bool:  # threading.Condition wants it from CPython 3.14 on
        return self._lock.locked()

    def _is_owned(self) -> bool:  # for threading.Condition
        return self._owner == threading.get_ident()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def ranked_lock(rank: Rank) -> Any:
    return RankedLock(rank) if CHECK else threading.Lock()


def ranked_condition(rank: Rank, lock: Any = None) -> threading.Condition:
    """A condition with a lock of its own, or with `lock`, which has this rank."""
    return threading.Condition(lock or ranked_lock(rank))


class KeyedLocks:
    """A lock per key, made when it is first wanted and kept: about 100 bytes for each L2 table that was changed."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._locks: dict[int, Any] = {}

    def hold(self, key: int) -> Any:
        """`with locks.hold(key):` holds the lock of the key.  setdefault is atomic: there is one lock for all."""
        return self._locks.get(key) or self._locks.setdefault(key, ranked_lock(self._rank))
