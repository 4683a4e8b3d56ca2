"""A scan of all tables: every damaged entry, and for every cluster of the file who uses it.

Tables are claimed before data, so that a table never loses against a stray data entry.  Tables that overlap are
read all the same: what they refer to is no leak.

    map:  | METADATA | 0 | DATA | DATA ... |     memory: one byte per cluster of the file, in pages touched
          header, tables ^ leak               only, however large the tables are; they are read in slices

The map ends at a limit, whatever the size of the file.  Clusters after it are valid, but nobody knows who else uses
them, and tables there are not read: ScanResult.unmapped counts both.

Slices that are one run of clusters are dealt with at once, the others in blocks: so are empty blocks, runs and blocks
of sound entries.  What is left is looked at entry by entry, and all findings come from there.

numpy, if installed and wanted, looks at large images whose clusters are in no order first, in two threads
(QuickLook): a sound image needs no more.  If anything is wrong, a second scan goes through the slices in order, and
numpy only spares it those with nothing to report.  So the findings are the same without numpy.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from operator import sub
from typing import Any, Callable

from .errors import StorageError, UnsupportedError
from .geometry import ENTRY, MAX_SLICE_SIZE, ZERO_CLUSTER, Bounds, Geometry
from .runs import Runs
from .storage import Storage
from .table import Table, empty

# What a byte of the map says of its cluster
METADATA = 1  # the header area, the L1 table or an L2 table
DATA = 2  # a data cluster
READ = 4  # an L2 table that the scan has come to
SHARED = 8  # used more than once

_USE = METADATA | DATA
_NOW_READ = bytes(mark | READ for mark in range(256))

MAX_CLUSTERS = 1 << 30  # in the map, which takes a byte for each
_BLOCK = 512  # entries: slices are multiples of it
_VECTOR_ENTRIES = 1 << 18  # L2 entries in no order from which on loading numpy pays
_SAMPLES = 16  # L2 tables that are looked at to estimate how many there are
_BATCH_ENTRIES = 1 << 15  # of small L2 tables that numpy gets at once
_BLANK = bytes(MAX_SLICE_SIZE)
_MAP_STEP = 1 << 20  # clusters of the map looked at at once
_FAR = 1 << 63  # past the end of every file


@dataclass(frozen=True)
class Damage:
    """A table entry that cannot be right."""

    table: str  # "L1" or "L2"
    table_offset: int  # bytes: where that table starts in the file
    index: int  # of the entry
    value: int  # of the entry
    pos: int  # bytes: the first guest position that it maps
    shared: bool  # points to clusters that are referenced already
    past_end: bool  # points past the end of the file: what a crash leaves behind

    def __str__(self) -> str:
        where = f"{self.table} entry {self.index} at {self.table_offset + self.index * ENTRY:#x}"
        what = (
            "clusters that are referenced already"
            if self.shared
            else "past the end of the file"
            if self.past_end
            else "not a valid offset"
        )
        return f"{where} (guest position {self.pos:#x}) points to {self.value:#x}: {what}"


@dataclass
class ScanResult:
    """What a scan has found."""

    corruptions: int = 0  # damaged L2 entries, and clusters on which an L1 entry is wrong: as qemu-img counts
    check_errors: int = 0  # tables that cannot be read
    error: StorageError | None = None  # the last of those
    leaks: int = 0  # whole clusters that nothing refers to; 0 if a table could not be read
    allocated: int = 0  # data clusters
    fragmented: int = 0  # data clusters that do not follow the one before
    tables: int = 0  # L2 tables
    unmapped: int = 0  # references to clusters after the map's limit
    file_clusters: int = 0  # whole clusters of the file
    end: int = 0  # bytes: the first byte after the last cluster in use
    mapped_end: int = 0  # bytes: guest position after the last cluster that is mapped

    @property
    def clean(self) -> bool:
        return not (self.corruptions or self.check_errors or self.leaks)


class ClusterUse:
    """One byte for each whole cluster of the file, up to `limit`: METADATA, DATA, READ and SHARED, or 0.

    Clusters from `limit` on have no byte: they are counted when they are claimed, and seem to be unused.
    """

    def __init__(self, clusters: int, limit: int = MAX_CLUSTERS) -> None:
        self.clusters = clusters
        self.mapped = min(clusters, limit)
        self.unmapped = 0  # claims of clusters without a byte
        try:
            # Anonymous memory: pages that are not written cost nothing.
            self.map = mmap.mmap(-1, max(self.mapped, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise UnsupportedError(f"no memory for a map of {self.mapped} clusters: {error.strerror}") from None

    def marks(self, cluster: int, n: int = 1) -> bytes:
        """The bytes of n clusters, as far as they have one."""
        return self.map[cluster : min(cluster + n, self.mapped)]

    def claim(self, cluster: int, use: int) -> bool:
        """Note a use; False, and SHARED, if there is one already."""
        if cluster >= self.mapped:
            self.unmapped += 1
            return True
        before = self.map[cluster]
        if before & _USE:
            self.map[cluster] = before | use | SHARED
            return False
        self.map[cluster] = before | use
        return True

    def claim_free(self, cluster: int, use: int) -> bool:
        """Note a use if there is none yet; False if there is, or nobody knows."""
        return cluster < self.mapped and not self.map[cluster] & _USE and self.claim(cluster, use)

    def claim_run(self, cluster: int, n: int, use: int) -> bool:
        """Claim n clusters if all of them have nothing but 0."""
        if cluster + n > self.mapped or self.map[cluster : cluster + n].count(0) != n:
            return False
        self.map[cluster : cluster + n] = bytes((use,)) * n
        return True

    def next_free(self, cluster: int) -> int:
        """The first unused cluster from `cluster` on; `clusters` if there is none."""
        found = self.map.find(b"\0", cluster, self.mapped)
        return found if found >= 0 else min(max(cluster, self.mapped), self.clusters)

    def next_used(self, cluster: int) -> int:
        """The first cluster in use from `cluster` on; `clusters` if there is none."""
        for start in range(cluster, self.mapped, _MAP_STEP):
            part = self.marks(start, _MAP_STEP)
            rest = part.lstrip(b"\0")
            if rest:
                return start + len(part) - len(rest)
        return self.clusters

    def count(self) -> int:
        """Clusters in use."""
        return self.mapped - sum(self.marks(at, _MAP_STEP).count(0) for at in range(0, self.mapped, _MAP_STEP))

    def last(self) -> int:
        """The number after the last cluster in use."""
        end = self.mapped
        while end:
            start = max(0, end - _MAP_STEP)
            used = len(self.map[start:end].rstrip(b"\0"))
            if used:
                return start + used
            end = start
        return 0


def next_data(storage: Storage, offset: int) -> int:
    """A file offset (bytes) from `offset` on before which there are only zeros: where the next data may be."""
    fd = getattr(storage, "fd", -1)
    if not isinstance(fd, int) or fd < 0:
        return offset
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        return _FAR if error.errno == errno.ENXIO else offset  # ENXIO: only a hole up to the end


def table_slices(
    storage: Storage, geometry: Geometry, offset: int, buffer: Table | None = None
) -> Iterator[tuple[int, Table]]:
    """(index of the first entry, slice) for the slices of the table at `offset` that are not empty.

    Each is valid until the next is asked for: they share `buffer`, a slice that the caller may lend.
    """
    if buffer is None:
        buffer = empty(geometry.slice_entries)
    end = offset + geometry.table_bytes
    blank = _BLANK[: geometry.slice_bytes]
    data = next_data(storage, offset)
    for at in range(offset, end, geometry.slice_bytes):
        if data >= at + geometry.slice_bytes:
            continue
        storage.pread_into(memoryview(buffer).cast("B"), at)
        if sys.byteorder == "big":
            buffer.byteswap()
        if buffer[0] or buffer.tobytes() != blank:
            yield (at - offset) // ENTRY, buffer
        if geometry.slice_bytes < geometry.table_bytes:
            data = next_data(storage, at + geometry.slice_bytes)


def _length(table: Table) -> int:
    """Entries up to the last one that is not 0."""
    return len(table) if table[-1] else -(-len(table.tobytes().rstrip(b"\0")) // ENTRY)


class Blocks:
    """Claims runs, and blocks of _BLOCK sound entries, at once, or leaves them alone.  Plain Python, but few steps.

    The alignment of a block is looked at as one large integer, of which each entry is a lane of 64 bits.
    """

    def __init__(self, geometry: Geometry, bounds: Bounds, use: ClusterUse) -> None:
        self._geometry = geometry
        self._bounds = bounds
        self._use = use
        self._blank = empty(_BLOCK)
        self._runs = Runs(geometry.cluster_size)
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


def _as_integer(block: Table) -> int:
    return int.from_bytes(block.tobytes(), sys.byteorder)


class Vectors:
    """The numpy side of a scan: it claims a slice of sound entries at once, or leaves it alone.

    Two uses of one cluster are not noticed while claiming: the sum of all claims tells in the end (claimed).
    `strict` then looks for them in every slice.
    """

    def __init__(self, geometry: Geometry, bounds: Bounds, use: ClusterUse, strict: bool) -> None:
        import numpy

        self._np: Any = numpy
        self._geometry = geometry
        self._bounds = bounds
        self._end = min(bounds.end, use.mapped << geometry.l2_shift)  # bytes
        self._map = numpy.frombuffer(use.map, dtype=numpy.uint8)
        self._scratch = numpy.empty(max(geometry.slice_entries, _BATCH_ENTRIES), numpy.uint64)
        self._strict = strict

    def claim(self, table: Table | memoryview, expected: int = 0, tables: int = 1) -> tuple[int, int, int] | None:
        """(data clusters, how many are fragmented, next offset expected), or None: look at the entries one by one.

        `table` may be several whole `tables`, one after the other.
        """
        np, geo, bounds = self._np, self._geometry, self._bounds
        entries = np.frombuffer(table, dtype=np.uint64)
        lowest = int(entries.min())
        if lowest <= ZERO_CLUSTER:
            if tables > 1:
                return self._claim_each(memoryview(table), tables)
            entries = entries[entries > ZERO_CLUSTER]
            lowest = int(entries.min()) if len(entries) else 0
        n = len(entries)
        if n == 0:
            return 0, 0, expected
        first, last = int(entries[0]), int(entries[-1])
        steps = np.subtract(entries[1:], entries[:-1], out=self._scratch[: n - 1])
        if tables > 1:
            steps[n // tables - 1 :: n // tables] = geo.cluster_size  # the first cluster of a table follows none
        jumps = int(np.count_nonzero(steps != geo.cluster_size))
        if int(np.bitwise_or.reduce(entries)) & geo.cluster_mask:
            return None
        if lowest < bounds.start or int(entries.max()) >= self._end:
            return None
        numbers = np.right_shift(entries, np.uint64(geo.l2_shift), out=self._scratch[:n]).view(np.int64)
        if self._strict and (self._map[numbers].any() or len(np.unique(numbers)) != n):
            return None
        # Wrong where a table is, but then the sum is wrong, too, and the strict scan follows.
        self._map[numbers] = DATA
        fragmented = jumps + (expected not in (0, first))
        return n, fragmented, last + geo.cluster_size

    def _claim_each(self, entries: memoryview, tables: int) -> tuple[int, int, int] | None:
        size, allocated, fragmented = len(entries) // tables, 0, 0
        for start in range(0, len(entries), size):
            claimed = self.claim(entries[start : start + size])
            if claimed is None:
                return None
            allocated += claimed[0]
            fragmented += claimed[1]
        return allocated, fragmented, 0

    def count(self) -> int:
        """Clusters in use."""
        return int(self._np.count_nonzero(self._map))


class QuickLook:
    """Half of the L2 tables of an image whose L1 table is sound, in a thread of its own: numpy lets others run."""

    def __init__(self, scan: Scan, vectors: Vectors, part: int) -> None:
        self._scan = scan
        self._vectors = vectors
        self._part = part  # 0 or 1
        self.wanted = True  # False: nobody waits for the result any more
        self.sound = False
        self.allocated = self.fragmented = 0  # data clusters
        self.mapped_end = 0  # bytes: guest position after the last cluster that is mapped

    def run(self, progress: Callable[[int, int], None]) -> None:
        scan = self._scan
        entries = scan.geometry.table_entries
        batch = max(1, _BATCH_ENTRIES // entries)  # tables
        buffer = empty(batch * min(entries, scan.geometry.slice_entries))
        total, done = scan.result.tables, 0
        tables = scan.l1_entries()
        look = self._look_at_tables if batch > 1 else self._look_at_slices
        try:
            for part in cycle((0, 1)):
                some = list(islice(tables, batch))
                if not some:
                    break
                if part == self._part and not (self.wanted and look(some, buffer)):
                    return
                done += len(some)
                progress(done, total)
        except StorageError:
            return  # the other scan will meet it, too, and says what it is
        self.sound = True

    def _look_at_slices(self, tables: list[tuple[int, int]], buffer: Table) -> bool:
        """Claim what one table refers to; False if an entry is wrong."""
        ((index, offset),) = tables
        geo, pos, expected = self._scan.geometry, index << self._scan.geometry.l1_shift, 0
        for base, table in table_slices(self._scan.storage, geo, offset, buffer):
            claimed = self._vectors.claim(table, expected)
            if claimed is None:
                return False
            expected = claimed[2]
            self._count(claimed, pos + ((base + _length(table)) << geo.l2_shift))
        return True

    def _look_at_tables(self, tables: list[tuple[int, int]], buffer: Table) -> bool:
        """The same for several tables of one slice each, `buffer` full at most."""
        storage, geo = self._scan.storage, self._scan.geometry
        end = 0  # bytes
        indexes = []
        with memoryview(buffer) as entries, entries.cast("B") as content:
            for index, offset in tables:
                if next_data(storage, offset) < offset + geo.table_bytes:
                    storage.pread_into(content[end : end + geo.table_bytes], offset)
                    indexes.append(index)
                    end += geo.table_bytes
            if not end:
                return True
            if sys.byteorder == "big":
                buffer.byteswap()
            claimed = self._vectors.claim(entries[: end // ENTRY], tables=len(indexes))
        if claimed is None:
            return False
        mapped_end = 0
        for number in reversed(range(len(indexes))):
            length = _length(buffer[number * geo.table_entries : (number + 1) * geo.table_entries])
            if length:
                mapped_end = (indexes[number] << geo.l1_shift) + (length << geo.l2_shift)
                break
        self._count(claimed, mapped_end)
        return True

    def _count(self, claimed: tuple[int, int, int], mapped_end: int) -> None:
        self.allocated += claimed[0]
        self.fragmented += claimed[1]
        self.mapped_end = max(self.mapped_end, mapped_end)


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
        self._buffer = empty(geometry.slice_entries)  # for L2 tables
        self._expected = 0  # bytes: where the next data cluster would not be fragmented; 0 at a table's start
        self._start()

    def _start(self) -> None:
        limit = MAX_CLUSTERS if self._map_limit is None else self._map_limit
        self.use = ClusterUse(self.bounds.end >> self.geometry.l2_shift, limit)
        self._blocks = Blocks(self.geometry, self.bounds, self.use)
        self.result = ScanResult()

    def run(self, limit: int = 1 << 63) -> ScanResult:
        """Scan; give up when `limit` corruptions were found."""
        self._read_l1()
        wanted = self._want_vectors
        if wanted is None:
            total = self.result.tables * self.geometry.table_entries
            wanted = total >= _VECTOR_ENTRIES and total * self._scattered() >= _VECTOR_ENTRIES
        if not (wanted and not self.result.corruptions and not self.use.unmapped and self._is_sound()):
            self._vectors = self._load_vectors(strict=True) if wanted else None
            self._read_l2_tables(limit)
        self.result.unmapped = self.use.unmapped
        if self.use.unmapped and self._map_limit is None:
            raise UnsupportedError(f"the image uses clusters after the first {MAX_CLUSTERS}: too many to be checked")
        self._count_leaks()
        self._vectors = None  # it holds on to the map
        return self.result

    def _scattered(self) -> float:
        """Which part of the entries are in blocks that are no runs, by the first slices of some tables."""
        if self.result.corruptions:
            return 0.0
        blocks = scattered = 0
        for _, offset in islice(self.l1_entries(), 0, None, -(-self.result.tables // _SAMPLES)):
            blocks += self.geometry.slice_entries // _BLOCK
            with suppress(StorageError):  # the scan will meet it, too
                for _, table in islice(table_slices(self.storage, self.geometry, offset, self._buffer), 1):
                    for at in range(0, len(table), _BLOCK):
                        block = table[at : at + _BLOCK]
                        scattered += block[0] > ZERO_CLUSTER and not self._blocks.may_be_run(block)
        return scattered / blocks

    def _is_sound(self) -> bool:
        """A quick look at all L2 tables, by two threads.  False: there is damage, or no numpy; all is as before."""
        first, second = self._load_vectors(strict=False), self._load_vectors(strict=False)
        if first is None or second is None:
            return False
        metadata = first.count()
        looks = [QuickLook(self, vectors, part) for part, vectors in enumerate((first, second))]
        other = threading.Thread(target=looks[1].run, args=(lambda done, total: None,), daemon=True)
        other.start()
        try:
            looks[0].run(self._progress)
        finally:
            looks[1].wanted = looks[1].wanted and looks[0].sound
            other.join()
        # Two claims of a cluster count twice, but make one byte of the map.
        claimed = sum(look.allocated for look in looks)
        if all(look.sound for look in looks) and first.count() == metadata + claimed:
            self.result.allocated = claimed
            self.result.fragmented = sum(look.fragmented for look in looks)
            self.result.mapped_end = max(look.mapped_end for look in looks)
            self._vectors = first
            return True
        del first, second, looks  # they hold on to the map
        report, self._report = self._report, lambda damage: None
        self._start()
        self._read_l1()
        self._report = report
        return False

    def _load_vectors(self, strict: bool) -> Vectors | None:
        try:
            return Vectors(self.geometry, self.bounds, self.use, strict)
        except ImportError:
            return None

    # -- the L1 table: which L2 tables there are -----------------------------------------------------------------

    def _read_l1(self) -> None:
        geo, bounds = self.geometry, self.bounds
        # The header is in cluster 0 even if header_size is 0.
        header = min(max(bounds.start >> geo.l2_shift, 1), self.use.mapped)
        for cluster in range(0, header, _MAP_STEP):
            self.use.claim_run(cluster, min(_MAP_STEP, header - cluster), METADATA)
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
        for base, table in table_slices(self.storage, self.geometry, self._l1_offset):
            for i, offset in enumerate(table, base):
                if offset:
                    yield i, offset

    def _claim_table(self, offset: int) -> int:
        """Claim the clusters of a table; how many of them were in use already."""
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
            known = [bool(mark & READ) for mark in marks]
            self.use.map[first : first + geo.table_size] = marks.translate(_NOW_READ)
            try:
                if not all(known):
                    self._read_l2(index, offset, any(known), limit)
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

    def _read_l2(self, index: int, offset: int, quiet: bool, limit: int) -> None:
        """Claim what a table refers to; `quiet` if part of it belongs to another table, which is reported already."""
        geo, result = self.geometry, self.result
        pos = index << geo.l1_shift
        self._expected = 0
        for base, table in table_slices(self.storage, geo, offset, self._buffer):
            at = pos + (base << geo.l2_shift)
            claimed = None if quiet else self._blocks.claim_run(table, self._expected)
            if claimed is None and self._vectors is not None and not quiet:
                claimed = self._vectors.claim(table, self._expected)
            if claimed is not None:
                n, fragmented, self._expected = claimed
                result.allocated += n
                result.fragmented += fragmented
                mapped = at + (_length(table) << geo.l2_shift)
                result.mapped_end = max(result.mapped_end, mapped)
            else:
                self._read_slice(offset, base, table, at, quiet)
                if result.corruptions >= limit:
                    return

    def _read_slice(self, offset: int, base: int, table: Table, pos: int, quiet: bool) -> None:
        """One block after the other; `pos` is the first guest position of the slice."""
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
            length = _length(block)
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
        self._report(Damage(table, at, index, value, pos, shared, past_end and aligned and not shared))

    def _count_leaks(self) -> None:
        result = self.result
        result.file_clusters = self.use.clusters
        result.end = self.use.last() << self.geometry.l2_shift
        if not result.check_errors:
            used = self.use.count() if self._vectors is None else self._vectors.count()
            result.leaks = self.use.clusters - used
