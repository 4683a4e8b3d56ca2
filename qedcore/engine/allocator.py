"""Where new clusters come from, and the dirty period around them (NEED_CHECK).

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
I3. The dirty period: NEED_CHECK is durable before the first metadata change, and is cleared only when everything
    is durable and nothing is in flight; new allocations wait until the cleared header is durable too.
I4. Once a metadata write or a flush has failed, NEED_CHECK stays: the next writable open repairs.
I5. Where nothing locks the image, somebody else may write to it.  Who does so changes the header, which is read again
    when a dirty period begins and ends, and when the file grows; from then on nothing is allocated or freed.
"""

from __future__ import annotations

import errno
import threading
from typing import Callable, NamedTuple

from ..errors import ForeignWriterError, QEDError, StorageError, UnreachableError
from ..format.geometry import Bounds, Geometry
from ..format.header import FEATURE_NEED_CHECK, HeaderUpdater
from ..locks import Rank, ranked_condition, ranked_lock
from ..storage import Storage
from ..units import MiB
from .free_map import CLEAN, USED, FreeMap
from .in_flight import InFlight

GROWTH_STEP = 16 * MiB  # one truncation, hence one journalled size, serves this much allocation
_WORTH = 32  # freed clusters wait at most until they are this part of the file, or GROWTH_STEP
_MAX_UNLINKED = 1 << 16  # extents remembered before a flush is made for them, if that helps
IDLE_SECONDS = 5.0  # QEMU's delay between the last allocation and the clean header


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


class NeedCheckGate:
    """The dirty period (I3, I4).  Every allocating request runs inside `with gate:`.

    The condition protects `_dirty`, `_changing` and `_closed`; it is not held across I/O: `_changing` keeps the
    others waiting.  The gate is opened under it only, but may be shut without, when another writer is noticed.
    `inside` and `open` are for requests that must be fast: they do these steps of __enter__() themselves.
    I6. A request that finds the gate open takes no lock: it notes itself in `inside`, then looks at `open`.  Who
        shuts the gate clears `open`, then looks at `inside`.  So one of them sees the other; each step is one call
        or store, atomic under the interpreter's lock.
    `clock` counts seconds.
    """

    def __init__(
        self, storage: Storage, header: HeaderUpdater, allocator: Allocator, clock: Callable[[], float]
    ) -> None:
        self._storage = storage
        self._header = header
        self._allocator = allocator
        self._clock = clock
        self._cond = ranked_condition(Rank.GATE)
        self._dirty = header.header.need_check  # NEED_CHECK is set and durable
        self._changing = False  # a thread is setting or clearing it
        self.open = self._dirty  # dirty, and nobody is changing that
        self.inside: list[None] = []  # an item per allocating request
        self._failed = False  # I4
        self._others: ForeignWriterError | None = None  # somebody else writes to the image (I5)
        self._last_use = clock()  # seconds
        self._closed = False
        self._timer: threading.Thread | None = None
        allocator.before_growth = self.refuse_others

    def __enter__(self) -> None:
        self.inside.append(None)
        if not self.open:
            self.inside.pop()
            self._begin()

    def leave(self, *_: object) -> None:
        """The request that is noted in `inside` is over."""
        self._last_use = self._clock()
        self.inside.pop()

    __exit__ = leave

    def _begin(self) -> None:
        """Enter when the gate is open, or open it: begin the dirty period."""
        with self._cond:
            while self._changing:
                self._cond.wait()
            if self._others is not None:
                raise ForeignWriterError(str(self._others))
            if self._dirty:
                self.inside.append(None)
                return
            self._changing = True
        try:
            self.refuse_others()
            self._header.set_features(set=FEATURE_NEED_CHECK)
            # Durable before any metadata change: else a crash could leave changed tables in an image that looks
            # clean, and the next allocation would reuse what they point at.
            self._storage.flush()
        except BaseException:
            self._settle(dirty=False)
            raise
        self.inside.append(None)
        self._settle(dirty=True)

    def _settle(self, dirty: bool) -> None:
        with self._cond:
            self._dirty = dirty
            self.open = dirty and self._others is None
            self._changing = False
            self._last_use = self._clock()
            self._cond.notify_all()

    def _shut(self, idle: float) -> bool:
        """Let nobody in any more, if nobody is inside and has been for `idle` seconds; _settle() ends it."""
        with self._cond:
            if not self.open or self._clock() - self._last_use < idle:
                return False
            self.open = False
            # In this order: who is inside says without a lock that it has failed, and then leaves (I4).  Not with
            # "or", which would look at the list twice.
            self._changing = not self.inside and not self._failed
            if not self._changing:
                self.open = True
                if self._others is not None:  # somebody inside has noticed meanwhile (I5)
                    self.open = False
            return self._changing

    def fail(self) -> None:
        """A metadata write failed, or an image is damaged: keep NEED_CHECK until it was repaired (I4).

        Takes no lock, because its caller holds a table's: the flag only ever goes up.
        """
        self._failed = True

    def refuse_others(self) -> None:
        """Raises StorageError if somebody else has written to the image, for good (I5)."""
        try:
            self._header.refuse_others(mark=self._dirty)
        except ForeignWriterError as error:
            self._others = error
            self.open = False
            self._allocator.reuse, self._allocator.sole_users = False, None
            self.fail()
            raise

    def settled(self) -> None:
        """The flag on disk was cleared, durably, by the repair at open."""
        self._settle(dirty=False)

    def clear(self, idle: float = 0.0) -> bool:
        """Clear NEED_CHECK if nothing was allocated for `idle` seconds; True if it was cleared.

        Raises StorageError; NEED_CHECK then stays on disk, or is set again by the next allocation.
        """
        if not self._shut(idle):
            return False
        try:
            self.refuse_others()
            if self._allocator.pending:
                self._allocator.flush()
            self._allocator.trim_tail()  # and flush everything that the flag stands for, before the flag
        except BaseException:
            self.fail()
            self._settle(dirty=True)
            raise
        try:
            self._header.set_features(clear=FEATURE_NEED_CHECK)
            # Durable before the next allocation may set it again: else the set could be lost and the clear kept.
            self._storage.flush()
        finally:
            self._settle(dirty=False)  # after an error the state on disk is unknown: the next period sets it
        return True

    def start_timer(self, report: Callable[[QEDError], None]) -> None:
        """Start the thread that ends idle dirty periods; `report` is told of its errors.  After any fork."""
        assert self._timer is None
        self._timer = threading.Thread(target=self._run_timer, args=(report,), name="need-check", daemon=True)
        self._timer.start()

    def _run_timer(self, report: Callable[[QEDError], None]) -> None:
        while True:
            with self._cond:
                if self._closed:
                    return
                if not self._dirty or self._failed:
                    self._cond.wait()
                    continue
                # Not woken by each allocation: it looks again when the oldest possible deadline is over.
                remaining = self._last_use + IDLE_SECONDS - self._clock()
                if self.inside or self._changing or remaining > 0:
                    self._cond.wait(max(remaining, 0.1))
                    continue
            try:
                self.clear(IDLE_SECONDS)
            except QEDError as error:
                report(error)
            except MemoryError:
                report(StorageError("NEED_CHECK stays set: out of memory", code=errno.ENOMEM))

    def close(self) -> None:
        """End the dirty period for good.  Nothing may be in flight.  Raises StorageError (NEED_CHECK then stays)."""
        with self._cond:
            self._closed = True
            self._cond.notify_all()
        if self._timer is not None:
            self._timer.join()
            self._timer = None
        self.clear()
