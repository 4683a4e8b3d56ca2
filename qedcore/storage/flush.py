"""GroupCommit: one sync completes every flush that was asked for before it started.

Its lock is a leaf and is not held while syncing.

    A asks            |== sync 1 ==|               returns
    B asks (during 1)       waits  |== sync 2 ==|  returns: sync 1 may have missed B's writes
    C asks (during 1)       waits  |    (2)     |  returns with B: one sync for both

Whoever ends a sync wakes one of those who wait for the next, which makes it, then those whom it has served: nobody
wakes for nothing.
"""

from __future__ import annotations

import threading
from typing import Any, Callable

from ..errors import StorageError, UnreachableError
from ..locks import Rank, ranked_lock


class _Batch:
    """The flushes that one sync completes."""

    __slots__ = ("failure", "gates", "over")

    def __init__(self) -> None:
        self.gates: list[Any] = []  # a held lock for each that waits, released when it need not wait any more
        self.over = False
        self.failure: StorageError | MemoryError | None = None  # when it is over


class GroupCommit:
    """Wraps `sync`, which makes everything written before it started durable, or raises StorageError.

    An error is kept for ever (I4 of the contract), but for UnreachableError and MemoryError: with them nothing is
    lost, and a later sync may succeed.
    """

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._lock = ranked_lock(Rank.FLUSH)  # protects everything below
        self._next = _Batch()  # for the sync that starts next
        self._leader: Any = None  # the gate of who makes a sync, or was told to
        self._failure: StorageError | None = None  # the first that is kept

    def flush(self) -> None:
        """Return once a sync that started after this call is over.  Raises StorageError."""
        batch = None
        gate = threading.Lock()
        gate.acquire()
        try:
            with self._lock:
                batch = self._next
                if self._leader is None:
                    self._leader = gate
                else:
                    batch.gates.append(gate)
            if self._leader is not gate:
                gate.acquire()
            if not batch.over:
                self._lead(batch, gate)
        except BaseException as error:
            if batch is not None:
                self._leave(batch, gate, _failure_of(error))
            raise
        failure = batch.failure
        if isinstance(failure, MemoryError):
            raise MemoryError(*failure.args)
        if failure is not None:
            raise type(failure)(str(failure), code=failure.errno)

    def _lead(self, batch: _Batch, gate: Any) -> None:
        """Sync for the batch, which is the next one."""
        with self._lock:
            self._next = _Batch()  # who comes from here on may have written after the sync began
            failure = self._failure
        if failure is None:
            try:
                self._sync()
            except StorageError as error:
                failure = error
        self._end(batch, gate, failure)

    # After an exception, which may come anywhere, each step of these may be done again.

    def _leave(self, batch: _Batch, gate: Any, failure: StorageError | MemoryError) -> None:
        """The calling thread neither waits nor leads any more: do what others wait for."""
        with self._lock:
            leads = self._leader is gate
            began = self._next is not batch
            if not batch.over and gate in batch.gates:
                batch.gates.remove(gate)
        if batch.over or (leads and began):
            self._end(batch, gate, failure)
        elif leads:
            self._pass_on(gate)

    def _end(self, batch: _Batch, gate: Any, failure: StorageError | MemoryError | None) -> None:
        """The batch's sync is over: wake who makes the next one, then those who waited for this one."""
        with self._lock:
            if not batch.over:
                batch.failure = failure
                if isinstance(failure, StorageError) and not isinstance(failure, UnreachableError):
                    self._failure = failure
                batch.over = True
        self._pass_on(gate)
        for waiting in batch.gates:
            _open(waiting)

    def _pass_on(self, gate: Any) -> None:
        """If the thread with this gate leads, have one of those who wait for the next sync do so."""
        with self._lock:
            waiting = self._next.gates
            if self._leader is gate:
                self._leader = waiting[-1] if waiting else None
            leader = self._leader
            if leader in waiting:
                waiting.remove(leader)
        if leader is not None:
            _open(leader)


def _open(gate: Any) -> None:
    if gate.locked():
        gate.release()


def _failure_of(error: BaseException) -> StorageError | MemoryError:
    """What a flush that ends with such an error is to those who waited for its sync."""
    # While an error of the system is dealt with, the sync has failed.
    if isinstance(error, MemoryError) and not isinstance(error.__context__, OSError):
        return error
    return StorageError(f"a flush did not end: {error!r}")  # a signal's: nobody knows what became of the sync
