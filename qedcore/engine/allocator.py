"""Where new clusters come from, and what becomes of freed ones.

    file:  | header, tables, data ...            | grown, fresh |
                                                 ^ bounds.end   ^ _grown

I1. Clusters come from the end of the file, which grows in steps by truncation: what was never handed out reads
    as zeros ("fresh").  The file always covers every cluster that was handed out.
I2. Data clusters that the guest freed are handed out again once that is safe (DESIGN 6), before the file grows:

        unlinked --no request knows it--> hole punched --flush--> unlinked, and a hole, for good: fresh

    A crash before the flush may bring the entry back, but what it then shows is zeros: what the guest asked for.
    Where no holes can be punched they are used as they are, and not fresh; so are those of failed requests.
    In an image with shared clusters none are: the other entry's data would go.  NEED_CHECK does not tell of those,
    so the tables are looked through once, before the first hole (`sole_users`).
    Tables are always appended.
I3. Nothing is allocated or freed any more once another writer of the image was noticed (need_check.py, I3).
"""

from __future__ import annotations

from typing import Callable, NamedTuple

from ..errors import StorageError, UnreachableError
from ..format.geometry import Bounds, Geometry
from ..locks import Rank, ranked_lock
from ..storage import Storage
from ..units import MiB
from .free_map import CLEAN, USED, FreeMap
from .in_flight import InFlight

GROWTH_STEP = 16 * MiB  # one truncation, hence one journalled size, serves this much allocation
_WORTH = 32  # freed clusters wait at most until they are this part of the file, or GROWTH_STEP
_MAX_UNLINKED = 1 << 16  # extents remembered before a flush is made for them, if that helps


class Extent(NamedTuple):
    """Contiguous clusters in the file."""

    offset: int  # bytes
    n: int  # clusters
    fresh: bool  # reads as zeros


class Freed(NamedTuple):
    """Clusters on their way to being free (I2)."""

    epoch: int  # requests that started in this one, or later, do not know them
    extent: Extent


class Allocator:
    """Hands out clusters and takes them back.  Moves bounds.end; its lock protects everything here."""

    def __init__(self, storage: Storage, geometry: Geometry, bounds: Bounds, in_flight: InFlight) -> None:
        self._storage = storage
        self._geometry = geometry
        self._bounds = bounds
        self._in_flight = in_flight
        self._lock = ranked_lock(Rank.ALLOCATOR)
        self._grown = 0  # bytes: length of the file since it was first grown; 0 before
        self._leftovers = False  # were found after the last cluster, and are perhaps not cut off durably
        self._free = FreeMap()
        self._unlinked: list[Freed] = []
        self.pending = 0  # clusters that were unlinked and are not free yet
        self.reuse = True  # False in a damaged image: an entry may not be the only one that points to a cluster
        # Asked once whether no entry leads to these, and clusters have one user each, while requests run, but nothing
        # is reused; None: it is so.
        self.sole_users: Callable[[list[Extent]], bool] | None = None
        self._looking = False  # sole_users is running
        self._look: Callable[[list[Extent]], bool] = lambda unlinked: False  # what it was
        self._missed: list[Freed] = []  # unlinked while it was running
        self.before_growth: Callable[[], None] = lambda: None  # raises StorageError if the file must not grow

    def allocate(self, n: int) -> Extent:
        """1 to n contiguous clusters for data, which nothing points at.  Raises StorageError (ENOSPC, EFBIG)."""
        if self.pending and self._worth_reclaiming():
            self.flush()
        try:
            return self._take(n)
        except StorageError:
            if not self.pending:
                raise
        self.flush()  # the file cannot grow, but what was freed may do
        return self._take(n)

    def _take(self, n: int) -> Extent:
        with self._lock:
            found = self._free.take(n) if self._free.n else None
            if found is None:
                return Extent(self._append(n), n, True)
            cluster, n, state = found
            return Extent(cluster << self._geometry.l2_shift, n, state == CLEAN)

    def allocate_table(self) -> Extent:
        """A place for an L2 table, fresh.  Raises StorageError."""
        n = self._geometry.table_size
        with self._lock:
            return Extent(self._append(n), n, True)

    def append_cluster(self) -> int:
        """allocate(1) in fewer steps: the offset of a fresh cluster; 0 if it is not so simple, or fails."""
        with self._lock:
            if self._free.n or self.pending:
                return 0
            try:
                return self._append(1)
            except StorageError:
                return 0

    def _append(self, n: int) -> int:
        """File offset of n fresh clusters."""
        offset = self._bounds.end
        end = offset + n * self._geometry.cluster_size
        if end > self._grown:
            self._grow(offset, end)
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

    def release(self, extent: Extent) -> None:
        """Take back clusters that were never linked, neither in memory nor on disk."""
        with self._lock:
            self._free.add(extent.offset >> self._geometry.l2_shift, extent.n, USED)

    def free(self, extent: Extent) -> None:
        """Take back data clusters that were just unlinked, on disk and in memory.  Raises StorageError."""
        with self._lock:
            if not self.reuse:
                return
            self._unlinked.append(Freed(self._in_flight.advance(), extent))
            self.pending += extent.n
            full = len(self._unlinked) >= _MAX_UNLINKED and self._oldest_is_ready()
        if full:
            self.flush()

    def flush(self) -> None:
        """Storage.flush(), which makes freed clusters free that no request knows any more.  Raises StorageError."""
        if not self.pending or not self._may_reuse():
            self._storage.flush()
            return
        with self._lock:
            oldest = self._in_flight.oldest()
            ready = [freed for freed in self._unlinked if freed.epoch <= oldest]
            self._unlinked = [freed for freed in self._unlinked if freed.epoch > oldest]
        joined = _joined([freed.extent for freed in ready], self._geometry.cluster_size)
        punched = [(extent, self._punch(extent)) for extent in joined]
        try:
            self._storage.flush()  # if it fails, nothing is ever certain again: these are never used
        except UnreachableError:  # but for this: nothing is lost, and the next flush may succeed
            with self._lock:
                self._unlinked[:0] = ready
            raise
        with self._lock:
            for extent, is_hole in punched:
                cluster = extent.offset >> self._geometry.l2_shift
                self._free.add(cluster, extent.n, CLEAN if is_hole else USED)
                self.pending -= extent.n

    def _may_reuse(self) -> bool:
        """Whether an entry that was unlinked was its cluster's only one; False also while another thread looks."""
        with self._lock:
            look, self.sole_users = self.sole_users, None
            if look is None:
                return self.reuse and not self._looking
            self._looking, self._look = True, look
            unlinked = [freed.extent for freed in self._unlinked]
        sole = False
        try:
            sole = look(unlinked)
        finally:
            with self._lock:
                self._looking = False
                self.reuse = self.reuse and sole  # another writer may have been noticed meanwhile
                # What was unlinked meanwhile was perhaps seen, perhaps not: nobody knows what it was (recall).
                lost = self._unlinked[len(unlinked) if sole else 0 :]
                del self._unlinked[len(unlinked) if sole else 0 :]
                self._missed = lost if sole else []
                self.pending -= clusters_of(lost)
        return self.reuse

    def recall(self) -> None:
        """Nobody unlinks anything now: let the next flush look again, for what was missed."""
        with self._lock:
            if self._missed and self.reuse:
                self.pending += clusters_of(self._missed)
                self._unlinked[:0], self._missed = self._missed, []  # oldest first
                self.sole_users = self._look

    def _punch(self, extent: Extent) -> bool:
        try:
            return self._storage.punch(extent.offset, extent.n << self._geometry.l2_shift)
        except StorageError:
            return False

    @property
    def free_clusters(self) -> int:
        return self._free.n

    def _worth_reclaiming(self) -> bool:
        """Whether a flush frees enough: what is not used again makes the file grow by as much."""
        with self._lock:
            enough = min(GROWTH_STEP, self._bounds.end // _WORTH) >> self._geometry.l2_shift
            if self._free.n or self.pending < max(enough, 1) or not self._unlinked:
                return False
            return self._oldest_is_ready()

    def _oldest_is_ready(self) -> bool:
        return self._unlinked[0].epoch <= self._in_flight.oldest()

    def restart(self) -> None:
        """The clusters in use were moved and the file was cut after them, at bounds.end: forget its old tail."""
        with self._lock:
            self._grown = self.pending = 0
            self._free.clear()
            self._unlinked.clear()
            self._missed.clear()

    def trim_tail(self) -> None:
        """Give the free tail back, and flush.  Nobody may allocate meanwhile.  Raises StorageError."""
        with self._lock:
            end = self._free.end_of_used(self._bounds.end >> self._geometry.l2_shift) << self._geometry.l2_shift
            cut = self._grown or end != self._bounds.end
            if cut:
                # Before: after an error, too, the file may be as short as that; what it may not cover is a leak then.
                if self._grown:
                    self._grown = end
                else:
                    self._leftovers = True
                self._free.cut(end >> self._geometry.l2_shift)
                self._storage.truncate(end)
        self._storage.flush()
        if cut:
            with self._lock:  # only now: what was not cut off for good is not fresh
                self._bounds.end = self._grown = end
                self._leftovers = False


def clusters_of(freed: list[Freed]) -> int:
    return sum(one.extent.n for one in freed)


def _joined(extents: list[Extent], cluster_size: int) -> list[Extent]:
    """The same clusters in order, neighbours in one."""
    joined: list[Extent] = []
    for extent in sorted(extents):
        if joined and joined[-1].offset + joined[-1].n * cluster_size == extent.offset:
            joined[-1] = joined[-1]._replace(n=joined[-1].n + extent.n)
        else:
            joined.append(extent)
    return joined
