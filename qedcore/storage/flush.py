"""GroupCommit: one sync completes every flush that was asked for before it started.  SyncThread: on which CPU.

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
from ..server.affinity import confined, use_all_cpus


class _Batch:
    """The flushes that one sync completes."""

    __slots__ = ("failure", "gates", "over")

    def __init__(self) -> None:
        self.gates: list[Any] = []  # a held lock for each that waits, released when it need not wait any more
        self.over = False
        self.failure: StorageError | None = None  # when it is over


class GroupCommit:
    """Wraps `sync`, which makes everything written before it started durable, or raises StorageError.

    Any error but UnreachableError, which promises that nothing was lost, is kept for ever (I4 of the contract).
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
        except BaseException as error:  # a signal's, or out of memory
            if batch is not None:
                self._leave(batch, gate, StorageError(f"a flush did not end: {error!r}"))
            raise
        failure = batch.failure
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

    def _leave(self, batch: _Batch, gate: Any, failure: StorageError) -> None:
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

    def _end(self, batch: _Batch, gate: Any, failure: StorageError | None) -> None:
        """The batch's sync is over: wake who makes the next one, then those who waited for this one."""
        with self._lock:
            if not batch.over:
                batch.failure = failure
                if failure is not None and not isinstance(failure, UnreachableError):
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


class SyncThread:
    """Wraps `sync`, for GroupCommit: for a confined thread (server/affinity.py) it runs on a thread that is not.

    To write out half a megabyte of new clusters takes a CPU 0.1 ms, in which it could serve several requests.
    """

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._thread: threading.Thread | None = None
        # Locks, made here: no step of the thread can fail, and nothing is imported when files or memory are short.
        self._wanted = threading.Lock()  # held; released for a sync, or to end
        self._done = threading.Lock()  # held; released when the sync is over
        self._wanted.acquire()
        self._done.acquire()
        self._error: BaseException | None = None
        self._ends = False

    def sync(self) -> None:
        """One at a time, and never again after an exception that is none of `sync`."""
        if self._ends or not confined() or not self._started():
            self._sync()
            return
        self._wanted.release()
        self._done.acquire()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _started(self) -> bool:
        if self._thread is None:
            try:
                thread = threading.Thread(target=self._run, name="sync", daemon=True)
                thread.start()
            except RuntimeError:  # no more threads
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        use_all_cpus()
        while True:
            self._wanted.acquire()
            if self._ends:
                return
            try:
                self._sync()
            except BaseException as error:  # noqa: BLE001 - raised again by sync()
                self._error = error
            self._done.release()

    def close(self) -> None:
        """No sync is running, or waited for."""
        if self._thread is not None:
            self._ends = True
            _open(self._wanted)
            self._thread.join()
