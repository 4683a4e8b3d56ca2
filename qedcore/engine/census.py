"""One look at all tables of an image that was opened for writing, before its file grows for the first time.

It answers what must be known by then, and what must be known before a cluster is used again:

    screen()    entries that point past the end of the file are made invalid for good
    count()     which clusters have one user each, and which have none

I1. An entry that points past the end of the file ("dangling": QEMU leaves some after a power loss) never becomes
    valid because the file grows, neither in this session nor in a later one: it is marked, durably, before the first
    growth.  Its clusters stay unreadable, as before, and the mark keeps what the entry was for whoever repairs it.
I2. Nothing is written to what is not proven to be a table: an L1 entry leads to it, no other table overlaps it, no
    data entry refers to a part of it, and all its entries are possible.  Where that fails, the file must not grow.
I3. Each byte of a table is read once per question, however many L1 entries lead to it; holes are not read.
I4. Memory has a limit, whatever the image: 8 bytes per table and part of one, and the map (MAP_LIMIT).
I5. Nobody changes an entry while screen() runs, and nobody unlinks a cluster while count() runs.  What is linked
    meanwhile is past the end that the file had, which is no part of the answer.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from copy import copy
from itertools import filterfalse
from typing import Callable

from ..check.cluster_use import DATA, MAX_RUN, METADATA, ClusterUse
from ..errors import CorruptImageError, UnsupportedError
from ..format.geometry import ENTRY, ZERO_CLUSTER, Bounds, Geometry, is_marked, mark_dangling
from ..format.table import Table, TableIO, empty, parts_between
from ..format.table_runs import K_DATA, FollowingRuns, cluster_numbers, kinds
from ..units import MiB

_MAX_TABLES = 1 << 20  # no image of a sane size has as many: 2 PiB at the default geometry
_MAX_SUSPECTS = 1 << 20  # clusters of tables with dangling entries
_MAX_LINES = 20  # in the log
QUICK = 16 * MiB  # bytes of L2 tables that screen() and count() look at together: about 0.2 s at most


_ADVICE = ": nothing can be allocated: repair the image first (qed check -r all)"


class Census:
    """The look at the tables of one image.  Raises StorageError where a table cannot be read.

    `log` takes one-line notices.
    """

    def __init__(
        self,
        tables: TableIO,
        geometry: Geometry,
        bounds: Bounds,
        l1_offset: int,
        *,
        map_limit: int,
        log: Callable[[str], None],
    ) -> None:
        self._tables = tables
        self._storage = tables.storage
        self._geometry = geometry
        self._bounds = copy(bounds)  # as the file is now
        self._l1 = (l1_offset, l1_offset + geometry.table_bytes)  # bytes
        self._map_limit = map_limit  # clusters
        self._log = log
        self._runs = FollowingRuns(geometry.cluster_size)
        self._offsets = empty(0)  # bytes: of the L2 tables, in the order of the file
        self._dangling = empty(0)  # bytes: of the parts of tables that have dangling entries
        self.damaged = False  # there are entries that nothing explains, or tables overlap
        self._use: ClusterUse | None = None  # of count()
        self.leaks = 0  # clusters that count() has found no user of
        self._claims = 0  # clusters that were claimed in it, each claim counted
        self.stopped = False  # set by another thread: count() gives up

    def screen(self, again: bool = False) -> bool:
        """Mark the dangling entries, durably; True if there were any.

        `again`: an earlier attempt has ended with an error, and may have marked some that were not made durable.
        Raises CorruptImageError if the file must not grow, and UnsupportedError for too many tables.
        """
        self._find_tables()
        if len(self._offsets) * self._geometry.table_bytes <= QUICK and self._countable:
            self._claim_metadata()  # and the rest on the way
        for at, part in self._parts():
            self._look(at, part)
        if not self._dangling and not again:
            return False
        if self._dangling:
            self._refuse_unproven()
        name = self._storage.name
        for number, at in enumerate(self._dangling):
            marked = self._mark(at)
            if number < _MAX_LINES:
                self._log(f"{name}: entries that pointed past the end in the table at {at:#x}: {marked}")
        # Before the file grows, and so before anything can be linked to where they pointed (I1).
        self._storage.flush()
        return True

    @property
    def counted(self) -> bool:
        """count() has its answer without reading anything, or there is none."""
        return self._use is not None or not self._countable

    def count(self) -> ClusterUse | None:
        """Who uses which cluster, after screen(); None if one has two users, there is damage, or nobody knows."""
        if not self._countable:
            return None
        if self._use is None:
            self._claim_metadata()
            for at, part in self._parts():
                if self.stopped or self.damaged:
                    return None
                self._look(at, part)
        use = self._use
        assert use is not None
        # Two claims of one cluster count twice, but make one byte of the map.
        self.damaged = self.damaged or use.count() != self._claims
        self.leaks = use.clusters - self._claims
        return None if self.damaged else use

    # -- the tables ----------------------------------------------------------------------------------------------

    @property
    def _countable(self) -> bool:
        return not self.damaged and self._bounds.end >> self._geometry.l2_shift <= self._map_limit

    def _find_tables(self) -> None:
        found = empty(0)
        for at, part in parts_between(self._storage, self._geometry, [self._l1]):
            entries = [entry for entry in part if entry]
            found.extend(filter(self._bounds.valid_table, entries))
            if len(found) > _MAX_TABLES:
                raise UnsupportedError(f"more than {_MAX_TABLES} L2 tables: too many to be looked through")
            self._note_invalid(at, filterfalse(self._bounds.valid_table, entries), self._l1_end)
        self._offsets = array("Q", sorted(found))
        before = 0
        for start, end in self._all_tables():
            self.damaged = self.damaged or start < before
            before = end

    @property
    def _l1_end(self) -> int:
        """From here on (bytes) no table starts that is whole."""
        return self._bounds.end - self._geometry.table_bytes + self._geometry.cluster_size

    def _all_tables(self) -> list[tuple[int, int]]:
        """Where the L1 table and the L2 tables are (bytes), in the order of the file."""
        size = self._geometry.table_bytes
        return sorted([self._l1, *((offset, offset + size) for offset in self._offsets)])

    def _parts(self) -> Iterator[tuple[int, Table]]:
        """(file offset, part) of all L2 tables that are not empty; what several share comes once."""
        return parts_between(self._storage, self._geometry, self._spans())

    def _spans(self) -> Iterator[tuple[int, int]]:
        end = 0
        for offset in self._offsets:
            start, end = max(offset, end), offset + self._geometry.table_bytes
            yield start, end

    # -- entries -------------------------------------------------------------------------------------------------

    def _claim_metadata(self) -> None:
        geo = self._geometry
        self._use = use = ClusterUse(self._bounds.end >> geo.l2_shift)
        use.expect(len(self._offsets) * geo.table_entries)
        header = max(self._bounds.start, geo.cluster_size)  # bytes; cluster 0 has the header even if it says 0
        for start, end in [(0, header), *self._all_tables()]:
            self._claim(start, (end - start) >> geo.l2_shift, METADATA)

    def _claim(self, offset: int, n: int, use: int) -> None:
        assert self._use is not None
        self._claims += n
        first = offset >> self._geometry.l2_shift
        for start in range(first, first + n, MAX_RUN):
            if not self._use.claim_run(start, min(MAX_RUN, first + n - start), use):
                self.damaged = True

    def _look(self, at: int, part: Table) -> None:
        """Look at a part of an L2 table, at file offset `at`: many entries with each step."""
        bounds, n = self._bounds, len(part)
        first, last = part[0], part[-1]
        ends_fit = bounds.valid_cluster(first) and last == first + (n - 1) * self._geometry.cluster_size < bounds.end
        if ends_fit and self._runs.is_run(part, 0, n, first):
            if self._use is not None:
                self._claim(first, n, DATA)
            return
        names = kinds(part, bounds)
        if names is None:
            self._look_closely(at, part)
        elif self._use is not None:
            data = names.count(K_DATA)
            if data:
                self._claims += data
                marks, zero = self._use.map, self._use.map[0]
                for number in cluster_numbers(part, self._geometry):
                    marks[number] = DATA
                marks[0] = zero  # what entries without a cluster seem to lead to

    def _look_closely(self, at: int, part: Table) -> None:
        """One entry after the other."""
        bounds, shift = self._bounds, self._geometry.l2_shift
        entries = [entry for entry in part if entry > ZERO_CLUSTER]
        if self._use is not None:
            for entry in filter(bounds.valid_cluster, entries):
                self._use.map[entry >> shift] = DATA
                self._claims += 1
        self._note_invalid(at, filterfalse(bounds.valid_cluster, entries), bounds.end)

    def _note_invalid(self, at: int, entries: Iterator[int], end: int) -> None:
        """Note what is wrong with a part at file offset `at`: these entries, dangling if they point past `end`."""
        dangling = False
        for entry in entries:
            if self._is_dangling(entry, end):
                dangling = True
            elif not is_marked(entry):
                self.damaged = True
        if dangling and (not self._dangling or self._dangling[-1] != at):
            self._dangling.append(at)

    def _is_dangling(self, entry: int, end: int) -> bool:
        return entry >= end and not entry & self._geometry.cluster_mask

    # -- marks ---------------------------------------------------------------------------------------------------

    def _limits(self, at: int) -> tuple[int, int, int]:
        """(start, end) of the table with the part at file offset `at`, and from where on its entries are dangling."""
        if self._l1[0] <= at < self._l1[1]:
            return (*self._l1, self._l1_end)
        start = self._offsets[bisect_right(self._offsets, at) - 1]
        return start, start + self._geometry.table_bytes, self._bounds.end

    def _refuse_unproven(self) -> None:
        """Raise CorruptImageError if a part with dangling entries may be no table (I2)."""
        suspects = {self._limits(at) for at in self._dangling}
        if len(suspects) * self._geometry.table_size > _MAX_SUSPECTS:
            raise CorruptImageError(f"{len(suspects)} tables have entries that point past the end{_ADVICE}")
        tables = self._all_tables()
        overlapping = [pair for pair in zip(tables, tables[1:]) if pair[0][1] > pair[1][0]]
        unproven = {start for pair in overlapping for start, _ in pair}
        clusters = {
            offset: start for start, end, _ in suspects for offset in range(start, end, self._geometry.cluster_size)
        }
        for _, part in self._parts():
            if not clusters.keys().isdisjoint(part):
                unproven.update(clusters[entry] for entry in part if entry in clusters)
        for start, end, limit in suspects:
            if start in unproven or not self._is_possible(start, end, limit):
                raise CorruptImageError(
                    f"what is at {start:#x} has entries that point past the end of the file, but is perhaps no table"
                    f"{_ADVICE}"
                )

    def _is_possible(self, start: int, end: int, limit: int) -> bool:
        """All entries of the table at `start` lead somewhere, are marked, or are dangling."""
        is_l1 = start == self._l1[0]
        valid = self._bounds.valid_table if is_l1 else self._bounds.valid_cluster
        lowest = ZERO_CLUSTER if is_l1 else ZERO_CLUSTER + 1
        return all(
            entry < lowest or valid(entry) or is_marked(entry) or self._is_dangling(entry, limit)
            for _, part in parts_between(self._storage, self._geometry, [(start, end)])
            for entry in part
        )

    def _mark(self, at: int) -> int:
        """Mark the dangling entries of the part at file offset `at`; how many there were.  Does not flush."""
        _, end, limit = self._limits(at)
        part = self._tables.read(at, min(end - at, self._geometry.part_bytes) // ENTRY)
        wrong = [index for index, entry in enumerate(part) if self._is_dangling(entry, limit)]
        if not wrong:  # they were marked with those of a part before
            return 0
        marked = part[:]
        for index in wrong:
            marked[index] = mark_dangling(part[index])
        self._tables.write(at, part, wrong[0], marked[wrong[0] : wrong[-1] + 1])
        return len(wrong)

    def mark_slice(self, entries: Table) -> None:
        """Mark the dangling entries of a part of an L2 table in memory, which are marked on disk."""
        self._mark_in_memory(entries, self._bounds.end)

    def mark_l1(self, entries: Table) -> None:
        """The same for the L1 table."""
        self._mark_in_memory(entries, self._l1_end)

    def _mark_in_memory(self, entries: Table, limit: int) -> None:
        for index, entry in enumerate(entries):
            if self._is_dangling(entry, limit):
                entries[index] = mark_dangling(entry)
