"""Where new clusters come from.

    file:  | header, tables, data ...            | grown, fresh |
                                                 ^ bounds.end   ^ _grown

I1. Clusters come from the end of the file, which grows in steps by truncation: what was never handed out reads
    as zeros ("fresh").  The file always covers every cluster that was handed out.
I2. Data clusters that nothing refers to any more are handed out again, before the file grows (reclaim.py).
    Tables are always appended.
I3. Nothing is allocated any more once another writer of the image was noticed (need_check.py, I3).
"""

from __future__ import annotations

from typing import Callable

from ..errors import StorageError
from ..format.geometry import Bounds, Geometry
from ..locks import Rank, ranked_lock
from ..storage import Storage
from ..units import MiB
from .reclaim import Extent, Reclaimer

GROWTH_STEP = 16 * MiB  # one truncation, hence one journalled size, serves this much allocation


class Allocator:
    """Hands out clusters.  Moves bounds.end; its lock protects everything here."""

    def __init__(self, storage: Storage, geometry: Geometry, bounds: Bounds, reclaimer: Reclaimer) -> None:
        self._storage = storage
        self._geometry = geometry
        self._bounds = bounds
        self._reclaimer = reclaimer
        self._lock = ranked_lock(Rank.ALLOCATOR)
        self._grown = 0  # bytes: length of the file since it was first grown; 0 before
        self._leftovers = False  # were found after the last cluster, and are perhaps not cut off durably
        self.before_growth: Callable[[], None] = lambda: None  # raises StorageError if the file must not grow

    def allocate(self, n: int) -> Extent:
        """1 to n contiguous clusters for data, which nothing points at.  Raises StorageError (ENOSPC, EFBIG)."""
        reclaimer = self._reclaimer
        if reclaimer.pending and reclaimer.worth_a_flush():
            reclaimer.flush()
        try:
            return reclaimer.take(n) or self._append(n)
        except StorageError:
            if not reclaimer.pending:
                raise
        reclaimer.flush()  # the file cannot grow, but what was unlinked may do
        return reclaimer.take(n) or self._append(n)

    def allocate_table(self) -> Extent:
        """A place for an L2 table, fresh.  Raises StorageError."""
        return self._append(self._geometry.table_size)

    def append_cluster(self) -> int:
        """allocate(1) in fewer steps: the offset of a fresh cluster; 0 if it is not so simple, or fails."""
        if self._reclaimer.free_clusters or self._reclaimer.pending:
            return 0
        with self._lock:
            try:
                return self._append_locked(1)
            except StorageError:
                return 0

    def _append(self, n: int) -> Extent:
        with self._lock:
            return Extent(self._append_locked(n), n, True)

    def _append_locked(self, n: int) -> int:
        """File offset of n fresh clusters."""
        offset = self._bounds.end
        end = offset + n * self._geometry.cluster_size
        while end > self._grown:
            self._grow(offset, end)
            # A server may still make zeros of what it was once asked to, without an answer: nothing is put there.
            while self._storage.in_doubt(offset, self._grown - offset):
                offset += self._geometry.cluster_size
            end = offset + n * self._geometry.cluster_size
        self._bounds.end = end
        return offset

    def _grow(self, end: int, wanted: int) -> None:
        self.before_growth()
        if not self._grown and (self._leftovers or self._storage.size() > end):
            # A partial last cluster holds leftovers of an interrupted append: let it read as zeros (I1).
            # Durable before anything is linked there: else the leftovers might come back, as a guest's data.
            self._leftovers = True
            self._storage.truncate(end)
            self._storage.flush()
            self._leftovers = False
        try:
            self._storage.truncate(wanted + GROWTH_STEP)
            self._grown = wanted + GROWTH_STEP
        except StorageError:  # over a limit, perhaps only by the step
            self._storage.truncate(wanted)
            self._grown = wanted

    def restart(self) -> None:
        """The clusters in use were moved and the file was cut after them, at bounds.end: forget its old tail."""
        with self._lock:
            self._grown = 0
        self._reclaimer.clear()

    def trim_tail(self) -> None:
        """Give the free tail back, and flush.  Nobody may allocate meanwhile.  Raises StorageError."""
        with self._lock:
            end = self._reclaimer.end_of_used()
            cut = self._grown or end != self._bounds.end
            if cut:
                # Before: after an error, too, the file may be as short as that; what it may not cover is a leak then.
                if self._grown:
                    self._grown = end
                else:
                    self._leftovers = True
                self._reclaimer.cut(end)
                self._storage.truncate(end)
        self._storage.flush()
        if cut:
            with self._lock:  # only now: what was not cut off for good is not fresh
                self._bounds.end = self._grown = end
                self._leftovers = False
