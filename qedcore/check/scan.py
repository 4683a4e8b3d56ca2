"""A scan of all tables: every damaged entry, and for every cluster of the file who uses it.

Tables are claimed before data, so that a table never loses against a stray data entry.  Tables that overlap are
read all the same: what they refer to is no leak.

    map:  | METADATA | 0 | DATA | DATA ... |     memory: one byte per cluster of the file, in pages touched
          header, tables ^ leak               only, however large the tables are; they are read in parts

The map ends at a limit, whatever the size of the file.  Clusters after it are valid, but nobody knows who else uses
them, and tables there are not read: ScanResult.unmapped counts both.

Slices that are one run of clusters are dealt with at once, the others in blocks: so are empty blocks, runs and blocks
of sound entries.  What is left is looked at entry by entry, and all findings come from there.

numpy, if installed and wanted, looks at large images whose clusters are in no order first, in two threads
(QuickLook): a sound image needs no more.  If anything is wrong, a second scan goes through the parts in order, and
numpy only spares it those with nothing to report.  So the findings are the same without numpy.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, islice
from operator import sub
from typing import TYPE_CHECKING, Callable, NamedTuple

from ..errors import StorageError, UnsupportedError
from ..format.geometry import ENTRY, ZERO_CLUSTER, Bounds, Geometry, is_marked
from ..format.table import Table, empty, length_of, parts_between, table_parts
from ..format.table_runs import FollowingRuns
from ..storage import Storage
from .cluster_use import DATA, MAX_CLUSTERS, MAX_RUN, METADATA, READ, ClusterUse

if TYPE_CHECKING:
    from .scan_numpy import Vectors

_NOW_READ = bytes(mark | READ for mark in range(256))
_BLOCK = 512  # entries: parts are multiples of it
_VECTOR_ENTRIES = 1 << 18  # L2 entries in no order from which on loading numpy pays
_SAMPLES = 16  # L2 tables that are looked at to estimate how many there are


class Damage(NamedTuple):
    """A table entry that cannot be right."""

    table: str  # "L1" or "L2"
    table_offset: int  # bytes: where that table starts in the file
    index: int  # type: ignore[assignment]  # of the entry; it hides a method of tuples
    value: int  # of the entry
    pos: int  # bytes: the first guest position that it maps
    shared: bool  # points to clusters that are referenced already
    past_end: bool  # points past the end of the file: what a crash leaves behind
    marked: bool = False  # pointed past the end of the file once, and was made invalid for good (mark_dangling)

    def __str__(self) -> str:
        where = f"{self.table} entry {self.index} at {self.table_offset + self.index * ENTRY:#x}"
        what = (
            "clusters that are referenced already"
            if self.shared
            else "past the end of the file"
            if self.past_end
            else "marked: it pointed past the end of the file"
            if self.marked
            else "not a valid offset"
        )
        return f"{where} (guest position {self.pos:#x}) points to {self.value:#x}: {what}"


class ScanResult:
    """What a scan has found."""

    def __init__(self) -> None:
        self.corruptions = 0  # damaged L2 entries, and clusters on which an L1 entry is wrong: as qemu-img counts
        self.check_errors = 0  # tables that cannot be read
        self.error: StorageError | None = None  # the last of those
        self.leaks = 0  # whole clusters that nothing refers to; 0 if a table could not be read
        self.allocated = 0  # data clusters
        self.fragmented = 0  # data clusters that do not follow the one before
        self.tables = 0  # L2 tables
        self.unmapped = 0  # references to clusters after the map's limit
        self.file_clusters = 0  # whole clusters of the file
        self.end = 0  # bytes: the first byte after the last cluster in use
        self.mapped_end = 0  # bytes: guest position after the last cluster that is mapped

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScanResult) and vars(self) == vars(other)

    @property
    def clean(self) -> bool:
        return not (self.corruptions or self.check_errors or self.leaks)


class Blocks:
    """Claims runs, and blocks of _BLOCK sound entries, at once, or leaves them alone.  Plain Python, but few steps.

    The alignment of a block is looked at as one large integer, of which each entry is a lane of 64 bits.
    """

    def __init__(self, geometry: Geometry, bounds: Bounds, use: ClusterUse) -> None:
        self._geometry = geometry
        self._bounds = bounds
        self._use = use
        self._blank = empty(_BLOCK)
        self._runs = FollowingRuns(geometry.cluster_size)
        self._ones = _as_integer(array("Q", (1,)) * _BLOCK)
        self._masks = self._ones * geometry.cluster_mask

    def claim(self, block: Table, expected: int) -> tuple[int, int, int] | None:
        """(data clusters, how many are fragmented, next offset expected), or None: look at the entries one by one."""
        if block == self._blank:
            return 0, 0, expected
        if self.may_be_run(block):
            return self.claim_run(block, expected)
        return self._claim_all(block, expected)

    def may_be_run(self, table: Table) -> bool:
        """By its first and its last entry."""
        return table[-1] == table[0] + (len(table) - 1) * self._geometry.cluster_size

    def claim_run(self, table: Table, expected: int) -> tuple[int, int, int] | None:
        """claim() for a table of any length; None if it is no run, too."""
        first, last, n, bounds = table[0], table[-1], len(table), self._bounds
        if not (self.may_be_run(table) and bounds.valid_cluster(first) and bounds.valid_cluster(last)):
            return None
        if not self._runs.is_run(table, 0, n, first):
            return None
        if not self._use.claim_run(first >> self._geometry.l2_shift, n, DATA):
            return None
        return n, int(expected not in (0, first)), last + self._geometry.cluster_size

    def _claim_all(self, block: Table, expected: int) -> tuple[int, int, int] | None:
        """Claim clusters in any order."""
        geo, bounds, marks = self._geometry, self._bounds, self._use.map
        low = _as_integer(block) & self._masks
        if low and (low & ~self._ones or bin(low).count("1") != block.count(ZERO_CLUSTER)):
            return None  # an entry that is not aligned
        numbers = [entry >> geo.l2_shift for entry in block if entry > ZERO_CLUSTER]
        if not numbers:
            return 0, 0, expected
        if min(numbers) < bounds.start >> geo.l2_shift or max(numbers) >= self._use.mapped:
            return None
        rest = iter(numbers)
        for number in rest:
            if marks[number]:
                for claimed in numbers[: -1 - len(list(rest))]:
                    marks[claimed] = 0
                return None
            marks[number] = DATA
        first = numbers[0] << geo.l2_shift
        jumps = len(numbers) - 1 - list(map(sub, numbers[1:], numbers)).count(1)
        return len(numbers), jumps + (expected not in (0, first)), (numbers[-1] + 1) << geo.l2_shift


def _unread(marks: bytes, offset: int, cluster_size: int) -> list[tuple[int, int]]:
    """The parts (bytes of the file) of the table at `offset` without READ in the marks of its clusters."""
    spans: list[tuple[int, int]] = []
    for at, mark in zip(count(offset, cluster_size), marks):
        if not mark & READ:
            start = spans.pop()[0] if spans and spans[-1][1] == at else at
            spans.append((start, at + cluster_size))
    return spans


def _as_integer(block: Table) -> int:
    return int.from_bytes(block.tobytes(), sys.byteorder)


class Scan:
    """A scan of the tables of one image.  Nobody changes them meanwhile.

    run() raises StorageError if the L1 table cannot be read (for L2 tables see ScanResult.error), UnsupportedError.
    """

    def __init__(
        self,
        storage: Storage,
        geometry: Geometry,
        bounds: Bounds,
        l1_offset: int,
        *,
        report: Callable[[Damage], None] = lambda damage: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        vectors: bool | None = None,  # numpy; None: if it is there and the image is large
        map_limit: int | None = None,  # clusters; None: MAX_CLUSTERS, and UnsupportedError for images that need more
        go_on: bool = True,  # after an L2 table that cannot be read
    ) -> None:
        self.storage = storage
        self.geometry = geometry
        self.bounds = bounds
        self._l1_offset = l1_offset  # bytes
        self._report = report
        self._progress = progress
        self._want_vectors = vectors
        self._map_limit = map_limit
        self._go_on = go_on
        self._vectors: Vectors | None = None
        self._buffer = empty(geometry.part_entries)  # for L2 tables
        self._expected = 0  # bytes: where the next data cluster would not be fragmented; 0 at a table's start
        self._start()

    def _start(self) -> None:
        limit = MAX_CLUSTERS if self._map_limit is None else self._map_limit
        self.use = ClusterUse(self.bounds.end >> self.geometry.l2_shift, limit)
        self._blocks = Blocks(self.geometry, self.bounds, self.use)
        self._metadata = 0  # clusters of the header and of tables, each use counted
        self.result = ScanResult()

    def run(self, limit: int = 1 << 63) -> ScanResult:
        """Scan; give up when `limit` corruptions were found."""
        self._read_l1()
        wanted = self._want_vectors
        if wanted is None:
            total = self.result.tables * self.geometry.table_entries
            wanted = total >= _VECTOR_ENTRIES and total * self._scattered() >= _VECTOR_ENTRIES
        sound = wanted and not self.result.corruptions and not self.use.unmapped and self._is_sound()
        if not sound:
            self._vectors = self._load_vectors(strict=True) if wanted else None
            self._read_l2_tables(limit)
            self._vectors = None  # it holds on to the map
        self.result.unmapped = self.use.unmapped
        if self.use.unmapped and self._map_limit is None:
            raise UnsupportedError(f"the image uses clusters after the first {MAX_CLUSTERS}: too many to be checked")
        self.result.file_clusters = self.use.clusters
        self.result.end = self.use.last() << self.geometry.l2_shift
        if not self.result.check_errors:
            used = self._metadata + self.result.allocated if sound else self.use.count()
            self.result.leaks = self.use.clusters - used
        return self.result

    def _scattered(self) -> float:
        """Which part of the entries are in blocks that are no runs, by the first parts of some tables."""
        if self.result.corruptions:
            return 0.0
        blocks = scattered = 0
        for _, offset in islice(self.l1_entries(), 0, None, -(-self.result.tables // _SAMPLES)):
            blocks += self.geometry.part_entries // _BLOCK
            with suppress(StorageError):  # the scan will meet it, too
                for _, table in islice(table_parts(self.storage, self.geometry, offset, self._buffer), 1):
                    for at in range(0, len(table), _BLOCK):
                        block = table[at : at + _BLOCK]
                        scattered += block[0] > ZERO_CLUSTER and not self._blocks.may_be_run(block)
        return scattered / blocks

    def _is_sound(self) -> bool:
        """Look at all L2 tables with numpy.  False: there is damage, or no numpy, and all is as before."""
        first, second = self._load_vectors(strict=False), self._load_vectors(strict=False)
        if first is None or second is None:
            return False
        from .scan_numpy import look_at_all

        total, result = self.result.tables, self.result
        sums = look_at_all(
            self.storage, self.geometry, (first, second), self.l1_entries, lambda done: self._progress(done, total)
        )
        # Two claims of a cluster count twice, but make one byte of the map.
        if sums is not None and self.use.count() == self._metadata + sums.allocated:
            result.allocated, result.fragmented, result.mapped_end = sums
            return True
        report, self._report = self._report, lambda damage: None
        self._start()
        self._read_l1()
        self._report = report
        return False

    def _load_vectors(self, strict: bool) -> Vectors | None:
        from .scan_numpy import Vectors

        try:
            return Vectors(self.geometry, self.bounds, self.use, strict)
        except ImportError:
            return None

    # -- the L1 table: which L2 tables there are -----------------------------------------------------------------

    def _read_l1(self) -> None:
        geo, bounds = self.geometry, self.bounds
        self.use.expect(geo.table_entries * sum(1 for _ in self.l1_entries()))
        # The header is in cluster 0 even if header_size is 0.
        header = min(max(bounds.start >> geo.l2_shift, 1), self.use.mapped)
        self._metadata = header
        for cluster in range(0, header, MAX_RUN):
            self.use.claim_run(cluster, min(MAX_RUN, header - cluster), METADATA)
        self._claim_table(self._l1_offset)
        for index, offset in self.l1_entries():
            if not bounds.valid_table(offset):
                self._damaged("L1", self._l1_offset, index, offset, index << geo.l1_shift)
                continue
            overlap = self._claim_table(offset)
            if overlap:
                self.result.corruptions += overlap - 1
                self._damaged("L1", self._l1_offset, index, offset, index << geo.l1_shift, shared=True)
            self.result.tables += 1

    def l1_entries(self) -> Iterator[tuple[int, int]]:
        """(index, entry) of the L1 entries that are not 0."""
        for base, table in table_parts(self.storage, self.geometry, self._l1_offset):
            for i, offset in enumerate(table, base):
                if offset:
                    yield i, offset

    def _claim_table(self, offset: int) -> int:
        """Claim the clusters of a table; how many of them were in use already."""
        self._metadata += self.geometry.table_size
        first = offset >> self.geometry.l2_shift
        if self.use.claim_run(first, self.geometry.table_size, METADATA):
            return 0
        return sum(
            not self.use.claim(cluster, METADATA) for cluster in range(first, first + self.geometry.table_size)
        )

    # -- the L2 tables -------------------------------------------------------------------------------------------

    def _read_l2_tables(self, limit: int) -> None:
        """Read the tables that the L1 table refers to; give up at `limit` corruptions."""
        geo, result = self.geometry, self.result
        done = 0
        for index, offset in self.l1_entries():
            if result.corruptions >= limit:
                return
            if not self.bounds.valid_table(offset) or self._on_l1_table(offset):
                continue
            # The same order as in _read_l1, so the same tables come second.
            first = offset >> geo.l2_shift
            if first + geo.table_size > self.use.mapped:
                continue  # its claim was counted
            marks = self.use.marks(first, geo.table_size)
            self.use.map[first : first + geo.table_size] = marks.translate(_NOW_READ)
            try:
                self._read_l2(index, offset, _unread(marks, offset, geo.cluster_size), limit)
            except StorageError as error:
                result.check_errors += 1
                result.error = error
                if not self._go_on:
                    return
            done += 1
            self._progress(done, result.tables)

    def _on_l1_table(self, offset: int) -> bool:
        """Surely no L2 table is there."""
        return abs(offset - self._l1_offset) < self.geometry.table_bytes

    def _read_l2(self, index: int, offset: int, spans: list[tuple[int, int]], limit: int) -> None:
        """Claim what a table refers to; `spans` (bytes of the file) are what was not read for other tables.

        Where that is not all, the table overlaps another one, which is reported already, and nothing is here.
        """
        geo, result = self.geometry, self.result
        quiet = spans != [(offset, offset + geo.table_bytes)]
        pos = index << geo.l1_shift
        self._expected = 0
        for start, table in parts_between(self.storage, geo, spans, self._buffer):
            base = (start - offset) // ENTRY
            at = pos + (base << geo.l2_shift)
            claimed = None if quiet else self._blocks.claim_run(table, self._expected)
            if claimed is None and self._vectors is not None and not quiet:
                claimed = self._vectors.claim(table, self._expected)
            if claimed is not None:
                n, fragmented, self._expected = claimed
                result.allocated += n
                result.fragmented += fragmented
                mapped = at + (length_of(table) << geo.l2_shift)
                result.mapped_end = max(result.mapped_end, mapped)
            else:
                self._read_part(offset, base, table, at, quiet)
                if result.corruptions >= limit:
                    return

    def _read_part(self, offset: int, base: int, table: Table, pos: int, quiet: bool) -> None:
        """One block after the other; `pos` is the first guest position of the part."""
        result, shift = self.result, self.geometry.l2_shift
        for at in range(0, len(table), _BLOCK):
            block = table[at : at + _BLOCK]
            start = pos + (at << shift)
            claimed = None if quiet else self._blocks.claim(block, self._expected)
            if claimed is None:
                self._read_block(offset, base + at, block, start, quiet)
            else:
                n, fragmented, self._expected = claimed
                result.allocated += n
                result.fragmented += fragmented
            length = length_of(block)
            if length:
                result.mapped_end = max(result.mapped_end, start + (length << shift))

    def _read_block(self, offset: int, base: int, block: Table, pos: int, quiet: bool) -> None:
        """One entry after the other; `pos` is the first guest position of the block."""
        geo, result, bounds, use = self.geometry, self.result, self.bounds, self.use
        for i, entry in enumerate(block):
            if entry <= ZERO_CLUSTER:
                continue
            valid = bounds.valid_cluster(entry)
            cluster = entry >> geo.l2_shift
            if quiet:
                if valid and cluster < use.mapped:  # also on a table: it must be known that data is there
                    use.map[cluster] |= DATA
                continue
            result.allocated += 1
            if entry != self._expected:
                result.fragmented += self._expected != 0
            self._expected = entry + geo.cluster_size
            if not valid:
                self._damaged("L2", offset, base + i, entry, pos + (i << geo.l2_shift))
            elif not use.claim(cluster, DATA):
                self._damaged("L2", offset, base + i, entry, pos + (i << geo.l2_shift), shared=True)

    def _damaged(self, table: str, at: int, index: int, value: int, pos: int, shared: bool = False) -> None:
        self.result.corruptions += 1
        past_end = value >= self.bounds.end - (self.geometry.table_bytes if table == "L1" else 0)
        aligned = not value & self.geometry.cluster_mask
        past_end = past_end and aligned and not shared
        self._report(Damage(table, at, index, value, pos, shared, past_end, is_marked(value)))
