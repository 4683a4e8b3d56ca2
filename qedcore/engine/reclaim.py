"""Clusters that nothing refers to any more, on their way to being used again.

    unlinked --no request knows it--> hole punched --flush--> unlinked, and a hole, for good: CLEAN
    leaked, or released  ------------> hole punched --flush--------------------------------> CLEAN
                             or used as they are, where no holes can be punched:             USED

I1. A cluster that was unlinked is punched only when no running request may have looked it up before.  A crash before
    the flush may bring its entry back, but what it then shows is zeros: what the guest asked for.
I2. Nothing is reused before the census has counted that each cluster has one user (census.py): of a shared cluster
    the other entry's data would go.  The census also tells which clusters have none: those leaked in a crash, or were
    left by another program.  They are free from then on.  In a damaged image a leak may be what a damaged entry
    meant, so there nothing is reused.
I3. Clusters are CLEAN only if they read as zeros even after a crash; USED ones hold what was written there before.
"""

from __future__ import annotations

import enum
import threading
from typing import Callable, NamedTuple

from ..check.cluster_use import ClusterUse
from ..errors import StorageError, UnreachableError
from ..format.geometry import Bounds, Geometry
from ..locks import Rank, ranked_lock
from ..storage import Storage
from ..units import MiB
from .free_map import CLEAN, USED, FreeMap
from .in_flight import InFlight

_WORTH = 32  # unlinked clusters wait at most until they are this part of the file, or _STEP
_STEP = 16 * MiB  # bytes: holes that are punched for one flush, when what is free is not CLEAN
_MAX_UNLINKED = 1 << 16  # extents remembered before a flush is made for them, if that helps


class Extent(NamedTuple):
    """Contiguous clusters in the file."""

    offset: int  # bytes
    n: int  # clusters
    fresh: bool  # reads as zeros


class Unlinked(NamedTuple):
    """Clusters that requests may still know (I1)."""

    epoch: int  # requests that started in this one, or later, do not know them
    extent: Extent


class Reuse(enum.Enum):
    """May clusters be used again?"""

    UNKNOWN = enum.auto()  # the census has not counted yet: who wants to unlink waits
    YES = enum.auto()  # each cluster had one user
    NEVER = enum.auto()  # not in this opening: damage, another writer, or too large an image to count


class Reclaimer:
    """What may be used again.  Its lock protects everything here; it is held across the punching of some holes."""

    def __init__(
        self,
        storage: Storage,
        geometry: Geometry,
        bounds: Bounds,
        in_flight: InFlight,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._storage = storage
        self._geometry = geometry
        self._bounds = bounds
        self._in_flight = in_flight
        self._log = log
        self._why = ""  # nothing is used again; told once
        self._lock = ranked_lock(Rank.RECLAIMER)
        self._reuse = Reuse.UNKNOWN
        self._decided = threading.Event()  # it is not UNKNOWN
        self._free = FreeMap()
        self._can_punch = True  # as far as is known
        self._unlinked: list[Unlinked] = []
        self.pending = 0  # clusters that were unlinked and are not free yet

    # -- what may be reused --------------------------------------------------------------------------------------

    def adopt(self, use: ClusterUse) -> None:
        """Each cluster has one user, or none, and that is durable: those with none are free."""
        with self._lock:
            if self._reuse is Reuse.UNKNOWN:
                self._free.add_unused(use)
                self._free.cut(self._bounds.end >> self._geometry.l2_shift)  # a recovery may have cut the file
                self._reuse = Reuse.YES
        self._decided.set()

    def give_up(self, why: str = "") -> None:
        """Nothing is used again in this opening; `why` goes to the log if anything is freed after all."""
        with self._lock:
            self._reuse = Reuse.NEVER
            self._why = why
        self._decided.set()

    def wait(self) -> None:
        """Wait until it is known whether clusters may be used again: nobody may unlink any before (census.py, I5)."""
        if not self._decided.is_set():
            self._decided.wait()

    @property
    def decided(self) -> bool:
        return self._decided.is_set()

    # -- clusters come -------------------------------------------------------------------------------------------

    def release(self, extent: Extent) -> None:
        """Take back clusters that were never linked, neither in memory nor on disk."""
        with self._lock:
            self._give_back(extent.offset >> self._geometry.l2_shift, extent.n, USED)

    def _give_back(self, cluster: int, n: int, state: int) -> None:
        """These are free now.  Lock held.

        Not where a server may still carry out a write that it has never answered: it would overwrite whatever is
        there by then.  Such clusters count as used until the next opening.
        """
        shift = self._geometry.l2_shift
        if not self._storage.in_doubt(cluster << shift, n << shift):
            self._free.add(cluster, n, state)

    def free(self, extent: Extent) -> None:
        """Take back data clusters that were just unlinked, on disk and in memory.  Raises StorageError."""
        with self._lock:
            if self._reuse is not Reuse.YES:
                why, self._why = self._why, ""
                if why:
                    self._log(f"{self._storage.name}: freed clusters are not used again: {why}")
                return
            self._unlinked.append(Unlinked(self._in_flight.advance(), extent))
            self.pending += extent.n
            full = len(self._unlinked) >= _MAX_UNLINKED and self._oldest_is_ready()
        if full:
            self.flush()

    def flush(self) -> None:
        """Storage.flush(), which frees unlinked clusters that no request knows any more.  Raises StorageError."""
        if not self.pending or self._reuse is not Reuse.YES:
            self._storage.flush()
            return
        with self._lock:
            oldest = self._in_flight.oldest()
            ready = [unlinked for unlinked in self._unlinked if unlinked.epoch <= oldest]
            self._unlinked = [unlinked for unlinked in self._unlinked if unlinked.epoch > oldest]
        try:
            joined = _joined([unlinked.extent for unlinked in ready], self._geometry.cluster_size)
            punched = [(extent, self._punch(extent.offset, extent.n)) for extent in joined]
            self._storage.flush()  # if it fails, nothing is ever certain again: these are never used
        except (UnreachableError, MemoryError):  # but for these: nothing is lost, and the next flush may succeed
            with self._lock:
                self._unlinked[:0] = ready
            raise
        with self._lock:
            for extent, is_hole in punched:
                cluster = extent.offset >> self._geometry.l2_shift
                self._give_back(cluster, extent.n, CLEAN if is_hole else USED)
                self.pending -= extent.n

    def worth_a_flush(self) -> bool:
        """Whether a flush frees enough: what is not used again makes the file grow by as much."""
        with self._lock:
            enough = min(_STEP, self._bounds.end // _WORTH) >> self._geometry.l2_shift
            if self._free.n or self.pending < max(enough, 1) or not self._unlinked:
                return False
            return self._oldest_is_ready()

    def _oldest_is_ready(self) -> bool:
        return self._unlinked[0].epoch <= self._in_flight.oldest()

    def _punch(self, offset: int, n: int) -> bool:
        try:
            punched = self._storage.punch(offset, n << self._geometry.l2_shift)
        except StorageError:
            punched = False
        self._can_punch = self._can_punch and punched
        return punched

    # -- clusters go ---------------------------------------------------------------------------------------------

    @property
    def free_clusters(self) -> int:
        return self._free.n

    def take(self, n: int) -> Extent | None:
        """At most n contiguous free clusters; None without any.  Raises StorageError."""
        if not self._free.n:
            return None
        with self._lock:
            found = self._free.take(n)
            if found is None:
                return None
            if found[2] == USED and self._can_punch:
                self._free.add(*found)
                self._clean_some()
                found = self._free.take(n)
                if found is None:  # the server could not be reached
                    return None
            cluster, n, state = found
        return Extent(cluster << self._geometry.l2_shift, n, state == CLEAN)

    def _clean_some(self) -> None:
        """Make the lowest free clusters CLEAN: one flush for many spares each write that uses them one of its own."""
        shift = self._geometry.l2_shift
        rest = max(_STEP >> shift, 1)
        taken: list[tuple[int, int]] = []
        while rest:
            found = self._free.take(rest)
            if found is None:
                break
            cluster, n, state = found
            if state == CLEAN:
                self._free.add(*found)
                break
            taken.append((cluster, n))
            rest -= n
        state = USED
        try:
            if all(self._punch(cluster << shift, n) for cluster, n in taken):
                self._storage.flush()  # the holes, before a cluster counts as one that reads as zeros (I3)
                state = CLEAN
        finally:
            for cluster, n in taken:
                self._give_back(cluster, n, state)

    # -- the end of the file -------------------------------------------------------------------------------------

    def end_of_used(self) -> int:
        """The end of the file (bytes) without the free clusters before bounds.end."""
        shift = self._geometry.l2_shift
        with self._lock:
            return self._free.end_of_used(self._bounds.end >> shift) << shift

    def cut(self, end: int) -> None:
        """The file ends at `end` (bytes) now: forget what came after."""
        with self._lock:
            self._free.cut(end >> self._geometry.l2_shift)

    def clear(self) -> None:
        """The clusters in use were moved together, and the file was cut after them."""
        with self._lock:
            self.pending = 0
            self._free.clear()
            self._unlinked.clear()


def _joined(extents: list[Extent], cluster_size: int) -> list[Extent]:
    """The same clusters in order, neighbours in one."""
    joined: list[Extent] = []
    for extent in sorted(extents):
        if joined and joined[-1].offset + joined[-1].n * cluster_size == extent.offset:
            joined[-1] = joined[-1]._replace(n=joined[-1].n + extent.n)
        else:
            joined.append(extent)
    return joined
