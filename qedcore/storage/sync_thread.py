"""SyncThread: syncs of a thread that is confined to one CPU are made on another."""

from __future__ import annotations

import os
import threading
from typing import Callable


def confined() -> bool:
    """Whether the calling thread was moved: it may use fewer CPUs than the first one.  Raises nothing."""
    try:
        return os.sched_getaffinity(0) < os.sched_getaffinity(os.getpid())
    except (AttributeError, OSError, MemoryError):
        return False


def use_all_cpus() -> None:
    """For a thread that a confined one has started, and which would stay where that is.  Raises nothing."""
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
    except (OSError, MemoryError):
        pass


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
        self._without = False  # make all syncs on the calling thread

    def sync(self) -> None:
        """One at a time, and never again after an exception that is none of `sync`."""
        if self._ends or self._without or not confined() or not self._started():
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
            except MemoryError:  # perhaps after it has started: then it waits for ever, and is not used
                self._without = True
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
            if self._wanted.locked():
                self._wanted.release()
            self._thread.join()
