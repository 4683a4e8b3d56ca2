"""Requests that change the image: the write half of the state machine (the 2010 patch, plus zero clusters and trim).

An allocating write:   gate > claim (cluster_locks) > look up > allocate > data, head, tail > [flush] > L2 lock > link
                       from the start again if a new zero cluster has come between the look-up and the lock
  of one new cluster:  the same without head, tail and flush, if none of them is needed (_write_fresh_cluster)
New zero clusters:     gate > L2 lock > look up > link
Unlinking zero, trim:  gate > L2 lock > look up > link nothing, or zero clusters > free (reclaim.py)
The L1 lock is taken inside link_table only.  read.py has the kinds of runs.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from threading import get_ident

from ..errors import CorruptImageError
from ..format.geometry import UNALLOCATED, ZERO_CLUSTER
from ..format.table import Table, contiguous
from ..storage import ZEROS, ReadBuffer, Storage
from .allocator import Allocator
from .cluster_locks import Claims
from .cluster_map import FOUND, NO_CLUSTER, NO_TABLE, ZERO, ClusterMap, Kind
from .in_flight import InFlight
from .need_check import NeedCheckGate
from .read import Requests
from .reclaim import Extent, Reclaimer


class WritableRequests(Requests):
    """Requests on an image that was opened for writing."""

    def __init__(
        self,
        storage: Storage,
        clusters: ClusterMap,
        size: int,
        in_flight: InFlight,
        allocator: Allocator,
        reclaimer: Reclaimer,
        gate: NeedCheckGate,
    ) -> None:
        super().__init__(storage, clusters, size, in_flight)
        self._allocator = allocator
        self._reclaimer = reclaimer
        self._gate = gate
        self._claims = Claims()
        self._l1_shift = self._geometry.l1_shift

    # -- writes ------------------------------------------------------------------------------------------------

    def pwrite(self, buf: ReadBuffer, pos: int) -> None:
        """Write `buf` to guest position `pos`.  In place it takes no lock.  Raises as pread_into, and ENOSPC."""
        in_flight = self._in_flight
        epoch = in_flight.now
        epoch.append(None)
        if epoch is not in_flight.now:
            epoch = in_flight.enter_again(epoch)
        try:
            # As in pread_into().
            into, length, index = pos & self._cluster_mask, len(buf), pos >> self._slice_shift
            table = self._slices.get(index)
            if table is not None and pos + length <= self.size:
                if index != self._touched:
                    self._touched = index
                    self._touch(index)
                end = self._bounds.end
                entry = table[(pos >> self._l2_shift) & self._slice_mask]
                one = into + length <= self._cluster_size
                if self._lowest <= entry < end and not entry & self._cluster_mask:
                    if one:
                        self._storage.pwrite(buf, entry + into)
                        return
                elif entry <= ZERO_CLUSTER and length:
                    if one and self.backing is None and self._write_fresh_cluster(buf, pos, into, index):
                        return
                    view = memoryview(buf)
                    n = self.write_run(NO_CLUSTER, 0, view, pos)
                    if n < length:
                        self.write(view[n:], pos + n)
                    return
            self.write(buf, pos)
        finally:
            epoch.pop()

    def _write_fresh_cluster(self, buf: ReadBuffer, pos: int, into: int, index: int) -> bool:
        """The short way of an allocating write: to one fresh cluster, which it need not fill.

        There is nothing below the image, so whatever a crash loses of it, its growth included, shows zeros as before,
        and nothing is flushed.  False, and nothing was done, if it is not so simple: the gate is shut, the cluster
        has data or is claimed, its table is not in the cache, or there are freed clusters to use first.
        """
        gate, claims = self._gate, self._claims
        cluster, me = pos >> self._l2_shift, get_ident()
        gate.inside.append(None)
        try:
            if not gate.open or claims.claimed.setdefault(cluster, me) != me:
                return False
            table = self._slices.get(index)
            if table is None or table[cluster & self._slice_mask] > ZERO_CLUSTER:
                return False
            offset = self._allocator.append_cluster()
            if not offset:
                return False
            try:
                self._storage.pwrite(buf, offset + into)
            except BaseException:
                self._reclaimer.release(Extent(offset, 1, True))
                raise
            with self._clusters.table_locks.hold(pos >> self._l1_shift):
                self._link(pos, array("Q", (offset,)))
            return True
        finally:
            if claims.claimed.get(cluster) == me:  # as Claims.give_up, without its calls
                del claims.claimed[cluster]
                if claims.waiting:
                    claims.wake()
            gate.leave()

    def write(self, buf: ReadBuffer, pos: int) -> None:
        """The general write: any number of runs."""
        view = memoryview(buf)
        self._check_range(pos, len(view))
        while view:
            try:
                kind, offset, n = self._clusters.lookup(pos, len(view))
            except CorruptImageError:
                n = self._write_marked(view, pos)
            else:
                n = self.write_run(kind, offset, view[:n], pos)
            view = view[n:]
            pos += n

    def write_run(self, kind: Kind, offset: int, view: memoryview, pos: int) -> int:
        """Write one run; returns the bytes written.  0: somebody else changed it meanwhile; look it up again."""
        if kind is FOUND:
            self.write_data(offset, view)
            return len(view)
        first, end = pos >> self._l2_shift, (pos + len(view) + self._cluster_mask) >> self._l2_shift
        with self._gate:
            try:
                self._claims.take(first, end)
                kind, _, n = self._clusters.lookup(pos, len(view))
                if kind is FOUND:
                    return 0
                return n if self._allocating_write(kind, view if n == len(view) else view[:n], pos) else 0
            finally:
                self._claims.give_up(first, end)

    def _write_marked(self, view: memoryview, pos: int) -> int:
        """Write a whole cluster whose entry was made invalid for good: what it was for is overwritten.

        Returns as write_run, and raises as lookup where it is not so.
        """
        first = pos >> self._l2_shift
        head, whole = self._split(pos, min(len(view), self._cluster_size))
        if head or not whole:
            self._clusters.lookup(pos, 1)
            return 0  # it is sound by now
        with self._gate:  # which has the entry marked, if it points past the end
            try:
                self._claims.take(first, first + 1)
                if not self._clusters.has_mark(pos):
                    self._clusters.lookup(pos, 1)
                    return 0
                return whole if self._allocating_write(NO_CLUSTER, view[:whole], pos) else 0
            finally:
                self._claims.give_up(first, first + 1)

    def write_data(self, offset: int, view: memoryview) -> None:
        self._storage.pwrite(view, offset)

    def _allocating_write(self, kind: Kind, view: memoryview, pos: int) -> bool:
        """Write a run of `kind` that has no data yet; False: look it up again.  The gate and a claim are held.

        However many pieces of the file it is made of, there is one flush and one write to the table.
        """
        into = pos & self._cluster_mask
        rest = -(into + len(view)) & self._cluster_mask  # of the last cluster
        missing = (into + len(view) + rest) >> self._l2_shift
        extents: list[Extent] = []
        # The data before the entry: a crash must not show zeros where the backing file's data was, nor what a reused
        # cluster held before.  It may also lose the growth of the file: the repair then drops the entry, and what is
        # below would show where zeros were.
        must_flush = self.backing is not None
        try:
            while missing:
                extent = self._allocator.allocate(missing)
                extents.append(extent)
                missing -= extent.n
                must_flush = must_flush or not extent.fresh
            head, tail = self.surround(kind, view, pos, into, rest, extents)
            if len(extents) == 1:
                self.write_main(extents[0].offset + into, head, view, tail)
            else:
                self._write_pieces(into, head, view, tail, extents)
            if must_flush and kind is not NO_TABLE:  # a new table is flushed with its data
                self._storage.flush()
                must_flush = False
        except BaseException:
            self._release(extents)
            raise
        return self._link_data(kind, pos, extents, must_flush)

    def _write_pieces(
        self, into: int, head: ReadBuffer, view: memoryview, tail: ReadBuffer, extents: list[Extent]
    ) -> None:
        """Write `view` from byte `into` of the first extent on, `head` just before it, and `tail` right after it."""
        last = len(extents) - 1
        for i, extent in enumerate(extents):
            size = (extent.n << self._l2_shift) - into
            self.write_main(extent.offset + into, b"" if i else head, view[:size], tail if i == last else b"")
            view, into = view[size:], 0

    def _release(self, extents: Iterable[Extent]) -> None:
        for extent in extents:
            self._reclaimer.release(extent)

    def _link_data(self, kind: Kind, pos: int, extents: list[Extent], must_flush: bool) -> bool:
        """Link new data clusters for pos, where `kind` was found; True if that was done.  Gate and claim are held.

        False: what is below was hidden meanwhile; they may be filled with it, and are not used.
        """
        entries = contiguous(extents[0].offset, extents[0].n, self._cluster_size)
        for extent in extents[1:]:
            entries += contiguous(extent.offset, extent.n, self._cluster_size)
        table_lock = self._clusters.table_locks.hold(pos >> self._l1_shift)
        if kind is NO_TABLE:
            with table_lock:
                if self._clusters.lacks_table(pos):
                    self._link_new_table(pos, entries, extents)
                    return True
            if must_flush:  # another write has made the table meanwhile
                try:
                    self._storage.flush()
                except BaseException:
                    self._release(extents)
                    raise
        with table_lock:
            try:
                hidden = kind is not ZERO and self.backing is not None and self._hidden(pos, len(entries))
            except BaseException:
                self._release(extents)
                raise
            if not hidden:
                self._link(pos, entries)
                return True
        self._release(extents)
        return False

    def _hidden(self, pos: int, n: int) -> bool:
        """There are zero clusters among the n from pos on, all in one slice.  L2 lock held."""
        table, start = self._clusters.table_at(pos), (pos >> self._l2_shift) & self._slice_mask
        return table is not None and ZERO_CLUSTER in table[start : start + n]

    def surround(
        self, kind: Kind, view: memoryview, pos: int, into: int, rest: int, extents: list[Extent]
    ) -> tuple[ReadBuffer, ReadBuffer]:
        """(head, tail): the `into` bytes before a run's data and the `rest` after it, to be written with the data.

        Empty where the clusters have them already.  Long ones are written, in part, here.
        """
        first, last = extents[0], extents[-1]
        if first.fresh and last.fresh and (kind is ZERO or self.backing is None):
            return b"", b""
        return self._prefill(kind, pos - into, into, first), self._postfill(kind, pos + len(view), rest, last)

    def _prefill(self, kind: Kind, pos: int, length: int, extent: Extent) -> ReadBuffer:
        """The head, which belongs at guest position pos."""
        early = max(length - len(ZEROS), 0)
        self._write_fill(kind, pos, early, extent, extent.offset)
        return self._fill(kind, pos + early, length - early, extent)

    def _postfill(self, kind: Kind, pos: int, length: int, extent: Extent) -> ReadBuffer:
        """The tail, which belongs at guest position pos."""
        late = max(length - len(ZEROS), 0)
        end = extent.offset + (extent.n << self._l2_shift)
        self._write_fill(kind, pos + length - late, late, extent, end - late)
        return self._fill(kind, pos, length - late, extent)

    def _write_fill(self, kind: Kind, pos: int, length: int, extent: Extent, offset: int) -> None:
        """Write a long fill in pieces: a cluster may be larger than what a request should hold in memory."""
        for done in range(0, length, len(ZEROS)):
            data = self._fill(kind, pos + done, min(len(ZEROS), length - done), extent)
            if data:
                self._storage.pwrite(data, offset + done)

    def _fill(self, kind: Kind, pos: int, length: int, extent: Extent) -> ReadBuffer:
        """What belongs at guest positions [pos, pos + length); nothing when that is in the file already."""
        if kind is not ZERO and self.backing is not None and pos < self.backing.size and length:
            data = bytearray(length)
            self.read_backing(memoryview(data), pos)
            return data
        return b"" if extent.fresh else bytes(length)

    def write_main(self, offset: int, head: ReadBuffer, view: memoryview, tail: ReadBuffer) -> None:
        """One write: the data at `offset`, with what goes before and after it."""
        if head or tail:
            self._storage.pwritev((head, view, tail), offset - len(head))
        else:
            self._storage.pwrite(view, offset)

    def _link(self, pos: int, entries: Table) -> None:
        """Make the L2 table, which exists, say `entries` from pos on.  L2 lock held."""
        try:
            self._clusters.link(pos, entries)
        except BaseException:
            self._gate.fail()  # either entry may be on disk: their clusters are neither free nor certain
            raise

    def _link_new_table(self, pos: int, entries: Table, extents: Iterable[Extent]) -> None:
        """Make an L2 table with `entries` from pos on; `extents` hold their data.  L2 lock held."""
        clusters = self._clusters
        new = None
        try:
            new = self._allocator.allocate_table()
            table = clusters.write_new_table(pos, entries, new.offset)
            # The table, and its data, before the L1 entry: a crash may lose all of it, not leave garbage linked.
            self._storage.flush()
        except BaseException:
            self._release(extents)
            if new is not None:
                self._reclaimer.release(new)
            raise
        try:
            clusters.link_table(pos, table, new.offset)
        except BaseException:
            self._gate.fail()
            raise

    # -- zero and trim -----------------------------------------------------------------------------------------

    def zero(self, pos: int, length: int, may_trim: bool = False) -> None:
        """Make guest positions [pos, pos + length) read as zeros.  Clusters that do already are left alone.

        With `may_trim` whole clusters are freed; without, those that have data keep their place in the file.
        """
        self._check_range(pos, length)
        while length:
            with self._in_flight.request():  # for each run: it may not hold up what it has freed itself
                try:
                    kind, offset, n = self._clusters.lookup(pos, length)
                except CorruptImageError:
                    n = self._unlink_marked(pos, length)
                else:
                    n = self._zero_run(kind, offset, pos, n, may_trim)
            pos += n
            length -= n

    def _zero_run(self, kind: Kind, offset: int, pos: int, n: int, may_trim: bool) -> int:
        """Zero one run, or its first part; returns the bytes.  0: somebody else changed it; look it up again."""
        head, whole = self._split(pos, n)
        if kind is FOUND:
            if may_trim and whole and not head:
                return self._unlink(pos, whole)
            n = head or n if may_trim else n
            for done in range(0, n, len(ZEROS)):
                self.write_data(offset + done, ZEROS[: n - done])
            return n
        if not self._has_data(kind, pos):
            return n
        if head or not whole:
            n = min(n, head or n, len(ZEROS))
            return self.write_run(kind, offset, ZEROS[:n], pos)
        with self._gate:
            return self._link_zero_clusters(pos, whole)

    def _has_data(self, kind: Kind, pos: int) -> bool:
        """Whether a run of this kind at pos may read as anything but zeros."""
        return kind is FOUND or (kind is not ZERO and self.backing is not None and pos < self.backing.size)

    def _split(self, pos: int, n: int) -> tuple[int, int]:
        """Of n bytes from pos on: (those before the first whole cluster, those in whole clusters)."""
        head = min(-pos & self._cluster_mask, n)
        # What lies past the end of the device does not matter.
        end = pos + n
        return head, n - head if end == self.size else max(self._geometry.start_of_cluster(end) - pos - head, 0)

    def _link_zero_clusters(self, pos: int, length: int) -> int:
        """Zero clusters for the run at pos where it has nothing yet; returns as _zero_run.  The gate is held.

        They need no claim: who is about to link data there notices (_link_data).
        """
        with self._clusters.table_locks.hold(pos >> self._l1_shift):
            kind, _, n = self._clusters.lookup(pos, length)
            if kind is FOUND:
                return 0
            if kind is not ZERO:
                entries = array("Q", (ZERO_CLUSTER,)) * self._geometry.clusters(n)
                if kind is NO_TABLE:
                    self._link_new_table(pos, entries, ())
                else:
                    self._link(pos, entries)
            return n

    def _unlink(self, pos: int, length: int) -> int:
        """Free the whole clusters of a FOUND run, or some; they read as zeros then.  Returns as _zero_run."""
        with self._gate:
            self._reclaimer.wait()
            with self._clusters.table_locks.hold(pos >> self._l1_shift):
                kind, offset, n = self._clusters.lookup(pos, length)
                if kind is not FOUND:
                    return 0
                clusters = self._geometry.clusters(n)
                nothing = UNALLOCATED if self.backing is None else ZERO_CLUSTER
                self._link(pos, array("Q", (nothing,)) * clusters)
                self._reclaimer.free(Extent(offset, clusters, False))
                return n

    def _unlink_marked(self, pos: int, length: int) -> int:
        """Zero a whole cluster whose entry was made invalid for good.  Returns as _zero_run, raises as lookup."""
        head, whole = self._split(pos, min(length, self._cluster_size))
        if head or not whole:
            self._clusters.lookup(pos, 1)
            return 0
        with self._gate, self._clusters.table_locks.hold(pos >> self._l1_shift):
            if not self._clusters.has_mark(pos):
                self._clusters.lookup(pos, 1)
                return 0
            self._link(pos, array("Q", (UNALLOCATED if self.backing is None else ZERO_CLUSTER,)))
            return whole

    def zero_is_fast(self, pos: int, length: int, may_trim: bool) -> bool:
        """Whether zero() would write no data now."""
        self._check_range(pos, length)
        while length:
            kind, _, n = self._clusters.lookup(pos, length)
            if self._has_data(kind, pos) and (self._split(pos, n) != (0, n) or (kind is FOUND and not may_trim)):
                return False
            pos += n
            length -= n
        return True

    def trim(self, pos: int, length: int) -> None:
        """Free the whole clusters in guest positions [pos, pos + length), which then read as zeros."""
        self._check_range(pos, length)
        while length:
            with self._in_flight.request():  # for each run, as in zero()
                try:
                    kind, _, n = self._clusters.lookup(pos, length)
                except CorruptImageError:
                    kind, n = ZERO, self._unlink_marked(pos, length)
                if kind is FOUND:
                    head, whole = self._split(pos, n)
                    if head or not whole:
                        n = head or n
                    else:
                        n = self._unlink(pos, whole)
            pos += n
            length -= n

    def add_zero_clusters(self, pos: int, length: int) -> None:
        """Make the clusters of a range that this image does not have zero clusters, whatever is below it.

        For a rebase: `pos` (bytes) starts a cluster, the range ends with one or with the device.
        """
        self._check_range(pos, length)
        while length:
            kind, _, n = self._clusters.lookup(pos, length)
            if kind is not FOUND:
                with self._gate:
                    n = self._link_zero_clusters(pos, n)
            pos += n
            length -= n
