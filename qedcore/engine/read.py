"""Requests that only read: the read half of the state machine (the 2010 patch "qed: Read/write support"), extents.

A request is cut into runs of one kind (ClusterMap.lookup).

    kind             read                 write (write.py)
    FOUND            the file             in place: no lock, no metadata
    ZERO             zeros                allocate, filling with zeros
    L2, L1 (nothing) the backing file     allocate, filling from the backing file
"""

from __future__ import annotations

from ..errors import ReadOnlyError, RequestError, ShutdownError
from ..format.geometry import ZERO_CLUSTER
from ..storage import ReadBuffer, Storage, WriteBuffer
from .cluster_map import FOUND, ZERO, ClusterMap, Kind
from .extents import Extents
from .in_flight import InFlight
from .source import Source, fill_zeros, read_chain


class Requests:
    """Requests on one image.  `backing` is set before the first request and never changed after."""

    def __init__(self, storage: Storage, clusters: ClusterMap, size: int, in_flight: InFlight) -> None:
        self.size = size  # bytes
        self.backing: Source | None = None
        self._in_flight = in_flight
        self._storage = storage
        geometry = clusters.geometry
        self._geometry = geometry
        self._cluster_size = geometry.cluster_size
        self._cluster_mask = geometry.cluster_mask
        self._l2_shift = geometry.l2_shift
        self._slice_shift = geometry.slice_shift
        self._slice_mask = geometry.slice_mask
        self._look_up_in(clusters)

    def _look_up_in(self, clusters: ClusterMap) -> None:
        self._clusters = clusters
        self._extents = Extents(clusters)
        self._bounds = clusters.bounds
        self._lowest = max(clusters.bounds.start, ZERO_CLUSTER + 1)  # bytes: no cluster starts before
        self._slices = clusters.cache.slices
        self._touch = clusters.cache.touch
        self._touched = -1  # index of the slice that was used last, by any thread

    def follow(self, other: Requests) -> None:
        """Look up in another opening of the image from now on, whose requests count as in flight with these.

        A request may still come to this one after the other has freed what only this one's tables have.
        """
        self._look_up_in(other._clusters)

    # -- reads -------------------------------------------------------------------------------------------------

    def pread_into(self, buf: WriteBuffer, pos: int) -> None:
        """Fill `buf` from guest position `pos`.  Takes no lock.

        Raises RequestError, CorruptImageError and StorageError.
        """
        in_flight = self._in_flight
        epoch = in_flight.now
        epoch.append(None)
        if epoch is not in_flight.now:
            epoch = in_flight.enter_again(epoch)
        try:
            # The short way: one allocated cluster of a cached table has it all.  pwrite() has the same steps: a call
            # would cost as much as all of them.
            into, length, index = pos & self._cluster_mask, len(buf), pos >> self._slice_shift
            table = self._slices.get(index)
            if table is not None and into + length <= self._cluster_size and pos + length <= self.size:
                end = self._bounds.end  # before the entry (ClusterMap, I4)
                entry = table[(pos >> self._l2_shift) & self._slice_mask]
                # Bounds.valid_cluster, and no special entry
                if self._lowest <= entry < end and not entry & self._cluster_mask:
                    if index != self._touched:
                        self._touched = index
                        self._touch(index)
                    self._storage.pread_into(buf, entry + into)
                    return
            self.read(buf, pos)
        finally:
            epoch.pop()

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
            fill_zeros(view)
        else:
            self.read_backing(view, pos)

    def read_data(self, offset: int, view: memoryview) -> None:
        self._storage.pread_into(view, offset)

    def read_backing(self, view: memoryview, pos: int) -> None:
        """Read what is below the image."""
        read_chain(self.backing, view, pos)

    def extents(self, pos: int, length: int, one: bool) -> tuple[Kind, list[int]]:
        """(kind, bytes of each run) of a range, through the chain: alternately FOUND and ZERO, from `kind` on."""
        self._check_range(pos, length)
        return self._extents.find(pos, length, one, self.backing)

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


class ClosedRequests(Requests):
    """What is left of an image after close()."""

    def _check_range(self, pos: int, length: int) -> None:
        raise ShutdownError(f"{self._storage.name} was closed")

    def pread_into(self, buf: WriteBuffer, pos: int) -> None:
        self._check_range(pos, len(buf))

    def pwrite(self, buf: ReadBuffer, pos: int) -> None:
        self._check_range(pos, len(buf))

    def zero(self, pos: int, length: int, may_trim: bool = False) -> None:
        self._check_range(pos, length)

    def trim(self, pos: int, length: int) -> None:
        self._check_range(pos, length)

    def add_zero_clusters(self, pos: int, length: int) -> None:
        self._check_range(pos, length)
