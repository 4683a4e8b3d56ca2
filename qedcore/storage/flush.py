"""GroupCommit: one sync completes every flush that was asked for before it started.

Its lock is a leaf and is not held while syncing.

    A asks            |== sync 1 ==|               returns
    B asks (during 1)       waits  |== sync 2 ==|  returns: sync 1 may have missed B's writes
    C asks (during 1)       waits  |    (2)     |  returns with B: one sync for both
"""

from __future__ import annotations

from typing import Callable

from ..errors import StorageError, UnreachableError
from ..locks import Rank, ranked_condition


class GroupCommit:
    """Wraps `sync`, which makes everything written before it started durable, or raises StorageError.

    Any error but UnreachableError, which promises that nothing was lost, is kept for ever (I4 of the contract).
    """

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._cond = ranked_condition(Rank.FLUSH)  # protects everything below
        self._started = 0  # number of the newest sync
        self._completed = 0  # number of the newest sync that is over
        self._durable = 0  # number of the newest sync that succeeded
        self._running = False
        self._failure: StorageError | None = None  # the first failed sync, or the newest that may be tried again

    def flush(self) -> None:
        """Return once a sync that started after this call is over.  Raises StorageError."""
        cond = self._cond
        with cond:
            wanted = self._started + 1
            while self._completed < wanted and not self._failed_for_ever():
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
                    if failure is None:
                        self._durable = self._started
                    elif not self._failed_for_ever():
                        self._failure = failure
                    cond.notify_all()
            if self._failure is not None and (self._durable < wanted or self._failed_for_ever()):
                raise type(self._failure)(str(self._failure), code=self._failure.errno)

    def _failed_for_ever(self) -> bool:
        return self._failure is not None and not isinstance(self._failure, UnreachableError)
