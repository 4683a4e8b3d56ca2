"""The read, write, zero and trim state machine (the 2010 patch "qed: Read/write support", plus zero clusters).

A request is cut into runs of one kind (cluster.lookup).

    kind             read                 write
    FOUND            the file             in place: no lock, no metadata
    ZERO             zeros                allocate, filling with zeros
    L2, L1 (nothing) the backing file     allocate, filling from the backing file

An allocating write:   gate > claim (claims.py) > allocate > data (+ head and tail) > [flush] > L2 lock > link
An unlinking zero or trim:   gate > L2 lock > look up again > link nothing, or zero clusters > free (alloc.py, I2)
The L1 lock is taken inside link_table only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from threading import get_ident
from typing import Protocol

from .alloc import Allocator, Extent, NeedCheckGate
from .claims import Claim, Claims
from .cluster import FOUND, NO_TABLE, ZERO, ClusterMap, Kind
from .errors import ReadOnlyError, RequestError, ShutdownError
from .geometry import UNALLOCATED, ZERO_CLUSTER, MiB
from .in_flight import InFlight
from .storage import ReadBuffer, Storage, WriteBuffer
from .table import Table, contiguous

_ZEROS = bytes(MiB)  # what zeros are written from; also the most that is filled in one piece


class Source(Protocol):
    """A layer of a backing chain: where bytes are, and what lies below."""

    size: int  # bytes
    storage: Storage
    backing: Source | None

    def lookup(self, pos: int, length: int) -> tuple[Kind, int, int]:
        """The run at pos, as ClusterMap.lookup gives it."""
        ...

    def data_run(self, pos: int, length: int) -> tuple[bool, int]:
        """(it may have data, bytes) of the first part of a FOUND run: what is no data is zeros."""
        ...


def find_data(layer: Source | None, pos: int, length: int) -> tuple[Storage | None, int, int]:
    """Where the bytes at pos are, from `layer` down: (storage, offset in it, bytes), or (None, 0, bytes) for zeros.

    A loop, not a recursion: a chain may be longer than Python's stack.
    """
    while layer is not None and pos < layer.size:
        kind, offset, length = layer.lookup(pos, min(length, layer.size - pos))
        if kind is FOUND:
            return layer.storage, offset, length
        if kind is ZERO:
            break
        layer = layer.backing
    return None, 0, length


def find_zeros(layer: Source | None, pos: int, length: int) -> tuple[Kind, int]:
    """(FOUND or ZERO, bytes) of the run at pos, as find_data, but holes of plain files are zeros, too."""
    while layer is not None and pos < layer.size:
        kind, _, length = layer.lookup(pos, min(length, layer.size - pos))
        if kind is FOUND:
            has_data, length = layer.data_run(pos, length)
            return FOUND if has_data else ZERO, length
        if kind is ZERO:
            break
        layer = layer.backing
    return ZERO, length


def read_chain(layer: Source | None, view: memoryview, pos: int) -> None:
    """Fill `view` from `layer` and what is below it; past the end of each layer there are zeros."""
    while view:
        storage, offset, n = find_data(layer, pos, len(view))
        if storage is None:
            view[:n] = bytes(n)
        else:
            storage.pread_into(view[:n], offset)
        view = view[n:]
        pos += n


class Requests:
    """Requests on one image.  `backing` is set before the first request and never changed after."""

    def __init__(self, storage: Storage, clusters: ClusterMap, size: int, in_flight: InFlight) -> None:
        self.size = size  # bytes
        self.backing: Source | None = None
        self._in_flight = in_flight
        self._running = in_flight.running
        self._storage = storage
        self._clusters = clusters
        self._slices = clusters.cache.slices
        self._touch = clusters.cache.touch
        geometry = clusters.geometry
        self._geometry = geometry
        self._bounds = clusters.bounds
        self._cluster_size = geometry.cluster_size
        self._cluster_mask = geometry.cluster_mask
        self._l2_shift = geometry.l2_shift
        self._slice_shift = geometry.slice_shift
        self._slice_mask = geometry.slice_mask

    def follow(self, other: Requests) -> None:
        """Look up in another opening of the image from now on, whose requests count as in flight with these.

        A request may still come to this one after the other has freed what only this one's tables have.
        """
        self._bounds = other._bounds
        self._clusters = other._clusters
        self._slices = other._slices
        self._touch = other._touch

    # -- reads -------------------------------------------------------------------------------------------------

    def pread_into(self, buf: WriteBuffer, pos: int) -> None:
        """Fill `buf` from guest position `pos`.  Takes no lock.

        Raises RequestError, CorruptImageError and StorageError.
        """
        thread = get_ident()
        self._running[thread] = self._in_flight.epoch
        try:
            offset = self._find_in_cluster(pos, len(buf))
            if offset:
                self._storage.pread_into(buf, offset)
            else:
                self.read(buf, pos)
        finally:
            del self._running[thread]

    def _find_in_cluster(self, pos: int, length: int) -> int:
        """Fast path: the file offset when one allocated cluster of a cached table has it all, else 0."""
        into = pos & self._cluster_mask
        if into + length <= self._cluster_size and pos + length <= self.size:
            slice_index = pos >> self._slice_shift
            table = self._slices.get(slice_index)
            if table is not None:
                entry = table[(pos >> self._l2_shift) & self._slice_mask]
                bounds = self._bounds  # Bounds.valid_cluster, without the call
                if entry > ZERO_CLUSTER and bounds.start <= entry < bounds.end and not entry & self._cluster_mask:
                    self._touch(slice_index)
                    return entry + into
        return 0

    def read(self, buf: WriteBuffer, pos: int) -> None:
        """The general read: any number of runs."""
        view = memoryview(buf)
        self._check_range(pos, len(view))
        while view:
            kind, offset, n = self._clusters.lookup(pos, len(view))
            self.read_run(kind, offset, view[:n], pos)
            view = view[n:]
            pos += n

    def read_run(self, kind: Kind, offset: int, view: memoryview, pos: int) -> None:
        if kind is FOUND:
            self.read_data(offset, view)
        elif kind is ZERO or self.backing is None:
            view[:] = bytes(len(view))
        else:
            self.read_backing(view, pos)

    def read_data(self, offset: int, view: memoryview) -> None:
        self._storage.pread_into(view, offset)

    def read_backing(self, view: memoryview, pos: int) -> None:
        """Read what is below the image."""
        read_chain(self.backing, view, pos)

    def extents(self, pos: int, length: int, one: bool) -> list[tuple[int, Kind]]:
        """(bytes, FOUND or ZERO) of the runs of a range, through the whole chain; neighbours of a kind are joined."""
        self._check_range(pos, length)
        found: list[tuple[int, Kind]] = []
        end, backing = pos + length, self.backing
        last, size = None, 0  # the run that may go on
        while pos < end:
            for kind, n in self._clusters.kinds(pos, end - pos):
                whole = n
                if kind is not FOUND and kind is not ZERO:
                    kind, n = find_zeros(backing, pos, n) if backing is not None else (ZERO, n)
                if kind is not last:
                    if last is not None:
                        found.append((size, last))
                        if one:
                            return found
                    last, size = kind, 0
                size += n
                pos += n
                if n < whole:
                    break  # what follows may be of another kind
        if last is not None:
            found.append((size, last))
        return found

    def pwrite(self, buf: ReadBuffer, pos: int) -> None:
        raise ReadOnlyError(f"{self._storage.name} was opened read-only")

    def zero(self, pos: int, length: int, may_trim: bool = False) -> None:
        raise ReadOnlyError(f"{self._storage.name} was opened read-only")

    def trim(self, pos: int, length: int) -> None:
        raise ReadOnlyError(f"{self._storage.name} was opened read-only")

    def add_zero_clusters(self, pos: int, length: int) -> None:
        raise ReadOnlyError(f"{self._storage.name} was opened read-only")

    def _check_range(self, pos: int, length: int) -> None:
        if pos < 0 or pos + length > self.size:
            raise RequestError(f"{length} bytes at position {pos} are outside the device of {self.size} bytes")


class WritableRequests(Requests):
    """Requests on an image that was opened for writing."""

    def __init__(
        self,
        storage: Storage,
        clusters: ClusterMap,
        size: int,
        in_flight: InFlight,
        allocator: Allocator,
        gate: NeedCheckGate,
    ) -> None:
        super().__init__(storage, clusters, size, in_flight)
        self._allocator = allocator
        self._gate = gate
        self._claims = Claims()

    # -- writes ------------------------------------------------------------------------------------------------

    def pwrite(self, buf: ReadBuffer, pos: int) -> None:
        """Write `buf` to guest position `pos`.  In place it takes no lock.  Raises as pread_into, and ENOSPC."""
        thread = get_ident()
        self._running[thread] = self._in_flight.epoch
        try:
            offset = self._find_in_cluster(pos, len(buf))
            if offset:
                self._storage.pwrite(buf, offset)
            else:
                self.write(buf, pos)
        finally:
            del self._running[thread]

    def write(self, buf: ReadBuffer, pos: int) -> None:
        """The general write: any number of runs."""
        view = memoryview(buf)
        self._check_range(pos, len(view))
        while view:
            kind, offset, n = self._clusters.lookup(pos, len(view))
            n = self.write_run(kind, offset, view[:n], pos)
            view = view[n:]
            pos += n

    def write_run(self, kind: Kind, offset: int, view: memoryview, pos: int) -> int:
        """Write one run; returns the bytes written.  0: somebody else allocated it meanwhile; look it up again."""
        if kind is FOUND:
            self.write_data(offset, view)
            return len(view)
        with self._gate:
            claim = self._claim(pos, len(view))
            if claim is None:
                return 0
            try:
                return self._allocating_write(claim, view, pos)
            finally:
                self._claims.give_up(claim)

    def _claim(self, pos: int, length: int) -> Claim | None:
        """Claim the clusters of the run at pos, which has no data; None if it must be looked up again.  Gate held."""
        with self._clusters.table_locks.hold(pos >> self._geometry.l1_shift):
            kind, _, n = self._clusters.lookup(pos, length)
            if kind is FOUND:
                return None
            first, end = pos >> self._l2_shift, self._geometry.clusters(pos + n)
            other = self._claims.find(first, end)
            if other is None:
                return self._claims.add(first, end, kind)
        other.wait()
        return None

    def write_data(self, offset: int, view: memoryview) -> None:
        self._storage.pwrite(view, offset)

    def _allocating_write(self, claim: Claim, view: memoryview, pos: int) -> int:
        """Write what is claimed of `view`; returns the bytes.  The gate is held.

        However many pieces of the file it is made of, there is one flush and one write to the table.
        """
        geo, kind = self._geometry, claim.kind
        into = pos & geo.cluster_mask
        view = view[: (claim.end << geo.l2_shift) - pos]
        extents: list[Extent] = []
        try:
            missing = claim.end - claim.first
            while missing:
                extents.append(self._allocator.allocate(missing))
                missing -= extents[-1].n
            head = self.prefill(kind, pos - into, into, extents[0])
            length = (claim.end << geo.l2_shift) - pos - len(view)
            tail = self.postfill(kind, pos + len(view), length, extents[-1])
            self._write_pieces(into, head, view, tail, extents)
            # The data before the entry: a crash must not show zeros where the backing file's data was, nor what a
            # reused cluster held before.  It may also lose the growth of the file: the repair then drops the entry,
            # and what is below would show where zeros were.
            must_flush = self.backing is not None or not all(extent.fresh for extent in extents)
            if must_flush and kind is not NO_TABLE:  # a new table is flushed with its data
                self._storage.flush()
                must_flush = False
        except BaseException:
            self._release(extents)
            raise
        self._link_data(pos, extents, must_flush)
        return len(view)

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
            self._allocator.release(extent)

    def _link_data(self, pos: int, extents: list[Extent], must_flush: bool) -> None:
        """Link new data clusters for pos.  The gate and a claim are held."""
        entries = array("Q")
        for extent in extents:
            entries += contiguous(extent.offset, extent.n, self._cluster_size)
        table_lock = self._clusters.table_locks.hold(pos >> self._geometry.l1_shift)
        with table_lock:
            if not self._clusters.l2_offset(pos):
                self._link_new_table(pos, entries, extents)
                return
            if not must_flush:
                self._link(pos, entries)
                return
        try:
            self._storage.flush()  # another write has made the table meanwhile
        except BaseException:
            self._release(extents)
            raise
        with table_lock:
            self._link(pos, entries)

    def prefill(self, kind: Kind, pos: int, length: int, extent: Extent) -> ReadBuffer:
        """The bytes of the first cluster before the request, from pos on: those to be written with the data."""
        early = max(length - len(_ZEROS), 0)
        self._write_fill(kind, pos, early, extent, extent.offset)
        return self._fill(kind, pos + early, length - early, extent)

    def postfill(self, kind: Kind, pos: int, length: int, extent: Extent) -> ReadBuffer:
        """The bytes of the last cluster after the request, from pos on: those to be written with the data."""
        late = max(length - len(_ZEROS), 0)
        end = extent.offset + (extent.n << self._l2_shift)
        self._write_fill(kind, pos + length - late, late, extent, end - late)
        return self._fill(kind, pos, length - late, extent)

    def _write_fill(self, kind: Kind, pos: int, length: int, extent: Extent, offset: int) -> None:
        """Write a long fill in pieces: a cluster may be larger than what a request should hold in memory."""
        for done in range(0, length, len(_ZEROS)):
            data = self._fill(kind, pos + done, min(len(_ZEROS), length - done), extent)
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
            table = clusters.write_new_table(pos, entries, new.offset, new.fresh)
            # The table, and its data, before the L1 entry: a crash may lose all of it, not leave garbage linked.
            self._storage.flush()
        except BaseException:
            self._release(extents)
            if new is not None:
                self._allocator.release(new)
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
                kind, offset, n = self._clusters.lookup(pos, length)
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
            for done in range(0, n, len(_ZEROS)):
                self.write_data(offset + done, memoryview(_ZEROS)[: n - done])
            return n
        if not self._has_data(kind, pos):
            return n
        if head or not whole:
            n = min(n, head or n, len(_ZEROS))
            return self.write_run(kind, offset, memoryview(_ZEROS)[:n], pos)
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
        """Zero clusters for the run at pos where it has nothing yet; returns as _zero_run.  The gate is held."""
        with self._clusters.table_locks.hold(pos >> self._geometry.l1_shift):
            kind, _, n = self._clusters.lookup(pos, length)
            if kind is FOUND:
                return 0
            if kind is ZERO:
                return n
            first, end = pos >> self._l2_shift, self._geometry.clusters(pos + n)
            other = self._claims.find(first, end)
            if other is None:
                entries = array("Q", (ZERO_CLUSTER,)) * (end - first)
                if kind is NO_TABLE:
                    self._link_new_table(pos, entries, ())
                else:
                    self._link(pos, entries)
                return n
        other.wait()
        return 0

    def _unlink(self, pos: int, length: int) -> int:
        """Free the whole clusters of a FOUND run, or some; they read as zeros then.  Returns as _zero_run."""
        with self._gate, self._clusters.table_locks.hold(pos >> self._geometry.l1_shift):
            kind, offset, n = self._clusters.lookup(pos, length)
            if kind is not FOUND:
                return 0
            clusters = self._geometry.clusters(n)
            nothing = UNALLOCATED if self.backing is None else ZERO_CLUSTER
            self._link(pos, array("Q", (nothing,)) * clusters)
            self._allocator.free(Extent(offset, clusters, False))
            return n

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
                kind, _, n = self._clusters.lookup(pos, length)
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


class ClosedRequests(Requests):
    """What is left of an image after close()."""

    def _check_range(self, pos: int, length: int) -> None:
        raise ShutdownError(f"{self._storage.name} was closed")

    def _find_in_cluster(self, pos: int, length: int) -> int:
        self._check_range(pos, length)
        return 0

    def pwrite(self, buf: ReadBuffer, pos: int) -> None:
        self._check_range(pos, len(buf))

    def zero(self, pos: int, length: int, may_trim: bool = False) -> None:
        self._check_range(pos, length)

    def trim(self, pos: int, length: int) -> None:
        self._check_range(pos, length)

    def add_zero_clusters(self, pos: int, length: int) -> None:
        self._check_range(pos, length)
