"""Where a guest position lives: find_cluster over the L1 table and the cached L2 tables.

I1. Entries are published (stored in memory) only when they are on disk, so lookups take no lock.
I2. L1 entries are changed under the L1 lock and the lock of their L2 table, L2 entries under the latter.
I3. A table whose last write failed is read again before it is believed: what is on disk decides.
I4. An entry that points past the end of the file is marked before the file grows (census.py).  Who looks an entry up
    reads bounds.end before the entry: so no entry seems valid because the file has grown since it was read.
I5. What is remembered of slices is dropped after each change of a table; who has looked before that
    puts what it found into the dictionary that was dropped.
"""

from __future__ import annotations

import enum

from ..errors import CorruptImageError, StorageError
from ..format.geometry import ENTRY, UNALLOCATED, ZERO_CLUSTER, Bounds, Geometry, is_marked
from ..format.table import Table, TableIO, empty
from ..format.table_runs import Runs
from ..locks import KeyedLocks, Rank, ranked_lock
from .census import Census
from .l2_cache import L2Cache

SHORT = 32  # entries of a run that are compared one by one, before Runs pays


class Kind(enum.IntEnum):
    """What a run of clusters is; the numbers are those of QEMU's traces."""

    FOUND = 0  # data, physically contiguous
    ZERO = 1  # zero clusters
    L2 = 2  # no data clusters
    L1 = 3  # not even an L2 table


# In module scope: an enum member as a class attribute costs a look-up in hot code.
FOUND, ZERO, NO_CLUSTER, NO_TABLE = Kind.FOUND, Kind.ZERO, Kind.L2, Kind.L1


class ClusterMap:
    """The L1 table, resident as far as the device reaches, and the way to the L2 tables."""

    def __init__(
        self, tables: TableIO, cache: L2Cache, geometry: Geometry, bounds: Bounds, l1_offset: int, image_size: int
    ) -> None:
        self.geometry = geometry
        self.bounds = bounds
        self.tables = tables
        self.cache = cache
        self.l1_offset = l1_offset  # bytes
        self.l1: Table = tables.read(l1_offset, geometry.l1_entries(image_size))  # as far as the device reaches
        self.runs = Runs(geometry.cluster_size)
        self.l1_lock = ranked_lock(Rank.L1)
        self.table_locks = KeyedLocks(Rank.L2_TABLE)  # keyed by L1 index: a missing table has no offset yet
        self.doubtful_l1: set[int] = set()  # indexes whose last write failed (I3)
        self._touched = -1  # index of the slice that was used last, by any thread
        self.known_runs: dict[int, tuple[tuple[Kind, int], ...]] = {}  # by slice index, for Extents (I5)

    def reload(self, l1_offset: int, image_size: int) -> None:
        """Read the tables again: they were changed on disk or moved, or the device resized.  No request in flight."""
        self.l1_offset = l1_offset
        self.l1 = self.tables.read(l1_offset, self.geometry.l1_entries(image_size))
        self.cache.clear()
        self.known_runs = {}

    def mark(self, census: Census) -> None:
        """Dangling entries were marked on disk: mark those that are in memory, before the file grows (I4)."""
        with self.l1_lock:
            census.mark_l1(self.l1)
        self.cache.change_all(census.mark_slice)

    def lookup(self, pos: int, length: int) -> tuple[Kind, int, int]:
        """The run at pos: (kind, file offset of pos's byte or 0, bytes up to `length`).  length > 0.

        A run ends where the kind or the physical order changes, and at the end of the slice.  The caller has
        checked that the range is inside the device.  Raises CorruptImageError and StorageError.
        """
        geo = self.geometry
        room = (((pos >> geo.slice_shift) + 1) << geo.slice_shift) - pos
        if length > room:
            length = room
        table = self.slice_at(pos)
        if table is None:
            return NO_TABLE, 0, length
        index = (pos >> geo.l2_shift) & geo.slice_mask
        into = pos & geo.cluster_mask
        last = index + ((into + length + geo.cluster_mask) >> geo.l2_shift)
        end = self.bounds.end  # before the entries (I4)
        first = table[index]
        if first >= end:  # perhaps it was linked just now, and the file has grown for it
            end = self.bounds.end
            first = table[index]
        if first > ZERO_CLUSTER:
            self._check_entry(first, end, pos)
            if last - index == 1:
                return FOUND, first + into, length
            expected = first
            for i in range(index + 1, min(last, index + SHORT)):
                expected += geo.cluster_size
                if table[i] != expected:
                    last = i
                    break
            else:
                if last - index > SHORT:
                    expected += geo.cluster_size
                    last = self.runs.end_of_run(table, index + SHORT, last, expected)
                    expected = first + ((last - index) << geo.l2_shift)
            if expected >= end:
                # Only as far as the file goes; the next lookup reports the entry that is outside.
                last = min(last, index + (end - first) // geo.cluster_size)
            return FOUND, first + into, min(length, ((last - index) << geo.l2_shift) - into)
        kind = NO_CLUSTER if first == UNALLOCATED else ZERO
        if last - index == 1:
            return kind, 0, length
        for i in range(index + 1, min(last, index + SHORT)):
            if table[i] != first:
                last = i
                break
        else:
            if last - index > SHORT:
                last = self.runs.end_of_same(table, index + SHORT, last, first)
        return kind, 0, min(length, ((last - index) << geo.l2_shift) - into)

    def table_at(self, pos: int) -> Table | None:
        """The slice that maps pos; None where there is no L2 table.  Raises like lookup."""
        slice_index = pos >> self.geometry.slice_shift
        table: Table | None = self.cache.slices.get(slice_index)
        if table is not None:
            if slice_index != self._touched:
                self._touched = slice_index
                self.cache.touch(slice_index)
            return table
        offset = self.l2_offset(pos)
        if not offset:
            return None
        return self.cache.load(slice_index, offset + self.geometry.slice_offset(pos))

    slice_at = table_at  # in the look-ups of requests, which are traced

    def l2_offset(self, pos: int) -> int:
        """File offset of the L2 table that maps pos, 0 without one.  Raises CorruptImageError, StorageError."""
        index = pos >> self.geometry.l1_shift
        if self.doubtful_l1 and index in self.doubtful_l1:
            self._read_l1_again(index)
        offset = self.l1[index]
        if offset and not (self.bounds.valid_table(offset) and offset == self.l1[index]):  # marked meanwhile (I4)
            raise CorruptImageError(
                f"L1 entry {index} at {self.l1_offset + index * ENTRY:#x} points to {offset:#x}: "
                f"not a table on clusters from {self.bounds.start:#x} to {self.bounds.end:#x}"
            )
        return offset

    def lacks_table(self, pos: int) -> bool:
        """There is no L2 table for pos.  Table lock held.  Raises like lookup."""
        return not self.l1[pos >> self.geometry.l1_shift] and not self.l2_offset(pos)

    def has_mark(self, pos: int) -> bool:
        """The L2 entry for pos was made invalid for good.  Raises as l2_offset."""
        table = self.table_at(pos)
        return table is not None and is_marked(table[(pos >> self.geometry.l2_shift) & self.geometry.slice_mask])

    def _check_entry(self, offset: int, end: int, pos: int) -> None:
        if self.bounds.start <= offset < end and not offset & self.geometry.cluster_mask:
            return
        geo = self.geometry
        index = (pos >> geo.l2_shift) & (geo.table_entries - 1)
        at = self.l1[pos >> geo.l1_shift] + index * ENTRY
        raise CorruptImageError(
            f"L2 entry {index} at {at:#x} points to {offset:#x}: "
            f"not a cluster from {self.bounds.start:#x} to {end:#x}"
        )

    def link(self, pos: int, entries: Table) -> None:
        """Write `entries` for the clusters from pos on, then publish them.  Existing table; its lock is held.

        After a failed write the slice is read again before its next use (I3).
        """
        geo = self.geometry
        slice_index = pos >> geo.slice_shift
        # Almost always it is there, and its use was noted when the request looked it up.
        table = self.cache.slices.get(slice_index) or self.table_at(pos)
        assert table is not None
        index = (pos >> geo.l2_shift) & geo.slice_mask
        try:
            # Its L1 entry is sound, and known: the slice was loaded through it.
            self.write_l2(self.l1[pos >> geo.l1_shift] + geo.slice_offset(pos), table, index, entries)
        except StorageError:
            self.cache.discard(slice_index)
            self.known_runs = {}
            raise
        table[index : index + len(entries)] = entries
        self.known_runs = {}  # after the change (I5)

    def write_new_table(self, pos: int, entries: Table, offset: int) -> Table:
        """Write a new L2 table at file offset `offset`, with `entries` for the clusters from pos on.

        It reads as zeros so far, and nothing points at it.  Returns its slice for link_table.  Table lock held.
        """
        geo = self.geometry
        table = empty(geo.slice_entries)
        index = (pos >> geo.l2_shift) & geo.slice_mask
        self.tables.write(offset + geo.slice_offset(pos), table, index, entries)
        table[index : index + len(entries)] = entries
        return table

    def link_table(self, pos: int, table: Table, offset: int) -> None:
        """Point the L1 table at the L2 table at `offset`, which is durable; publish.  Table lock held."""
        geo = self.geometry
        index = pos >> geo.l1_shift
        with self.l1_lock:
            entry = empty(1)
            entry[0] = offset
            try:
                self.write_l1(index, entry)
            except StorageError:
                self.doubtful_l1.add(index)
                raise
            # The slice first: a reader that sees the L1 entry finds the table in the cache.
            self.cache.add(pos >> geo.slice_shift, table)
            self.l1[index] = offset
            self.known_runs = {}  # after the change (I5)

    def write_l2(self, offset: int, table: Table, index: int, entries: Table) -> None:
        self.tables.write(offset, table, index, entries)

    def write_l1(self, index: int, entries: Table) -> None:
        self.tables.write(self.l1_offset, self.l1, index, entries)

    def _read_l1_again(self, index: int) -> None:
        with self.l1_lock:
            if index in self.doubtful_l1:
                self.l1[index] = self.tables.read(self.l1_offset + index * ENTRY, 1)[0]
                self.known_runs = {}
                self.doubtful_l1.discard(index)
