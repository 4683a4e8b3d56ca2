"""GroupCommit: one sync completes every flush that was asked for before it started.

Its lock is a leaf and is not held while syncing.

    A asks            |== sync 1 ==|               returns
    B asks (during 1)       waits  |== sync 2 ==|  returns: sync 1 may have missed B's writes
    C asks (during 1)       waits  |    (2)     |  returns with B: one sync for both
"""

from __future__ import annotations

from typing import Callable

from ..errors import StorageError
from ..locks import Rank, ranked_condition


class GroupCommit:
    """Wraps `sync`, which makes everything written before it started durable, or raises StorageError."""

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._cond = ranked_condition(Rank.FLUSH)  # protects everything below
        self._started = 0  # number of the newest sync
        self._completed = 0  # number of the newest sync that is over
        self._running = False
        self._failure: StorageError | None = None  # the first failed sync; kept for ever (I4)

    def flush(self) -> None:
        """Return once a sync that started after this call is over.  Raises StorageError."""
        cond = self._cond
        with cond:
            wanted = self._started + 1
            while self._completed < wanted and self._failure is None:
                if self._running:
                    cond.wait()
                    continue
                self._running = True
                self._started += 1
                cond.release()
                failure = None
                try:
                    self._sync()
                except StorageError as error:
                    failure = error
                except BaseException as error:
                    failure = StorageError(f"a flush did not end: {error!r}")
                    raise
                finally:
                    cond.acquire()
                    self._running = False
                    self._completed = self._started
                    self._failure = self._failure or failure
                    cond.notify_all()
            if self._failure is not None:
                raise StorageError(str(self._failure), code=self._failure.errno)
