"""A quick look with numpy, in two threads, at the L2 tables of a large image: is it sound?  Most are.

An entry is looked at as one of many, so what is wrong is not known afterwards, only that something is: two uses of
one cluster count twice, but make one byte of the map.  numpy lets the other thread run meanwhile.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any, Callable, NamedTuple

from ..errors import StorageError
from ..format.geometry import ENTRY, ZERO_CLUSTER, Bounds, Geometry
from ..format.table import SMALL, Table, empty, length_of, table_parts
from ..storage import Storage
from .cluster_use import DATA, ClusterUse

# Of small L2 tables that numpy gets at once: each call must take longer than it takes to hand over the interpreter,
# and what a thread works on must stay in its processor's cache.
_BATCH_ENTRIES = 1 << 17


class Vectors:
    """Claims a part of sound entries at once, or leaves it alone.  For one thread.

    Two uses of one cluster are not noticed, unless `strict`.  Raises ImportError without numpy.
    """

    def __init__(self, geometry: Geometry, bounds: Bounds, use: ClusterUse, strict: bool) -> None:
        import numpy

        self._np: Any = numpy
        self._geometry = geometry
        self._start = bounds.start  # bytes
        self._map = numpy.frombuffer(use.map, dtype=numpy.uint8)[: use.mapped]
        size = max(geometry.part_entries, _BATCH_ENTRIES)
        self._numbers = numpy.empty(size, numpy.uint64)
        self._jumps: Any = numpy.empty(size, numpy.bool_)
        self._strict = strict

    def claim(self, table: Table | memoryview, expected: int = 0, tables: int = 1) -> tuple[int, int, int] | None:
        """(data clusters, how many are fragmented, next offset expected), or None: look at the entries one by one.

        `table` may be several whole `tables`, one after the other.
        """
        np, geo = self._np, self._geometry
        entries = np.frombuffer(table, dtype=np.uint64)
        size = len(entries) // tables
        ends = slice(size, None, size)  # where the second table starts, the third ...
        lowest = int(entries.min())
        if lowest <= ZERO_CLUSTER:
            data = entries > ZERO_CLUSTER
            entries = entries[data]
            if len(entries) == 0:
                return 0, 0, expected
            ends = np.add.reduce(data.reshape(tables, size), axis=1, dtype=np.int64).cumsum()[:-1]
            ends = ends[(0 < ends) & (ends < len(entries))]
            lowest = int(entries.min())
        n = len(entries)
        first, last = int(entries[0]), int(entries[-1])
        jumps = np.subtract(entries[1:], entries[:-1], out=self._numbers[1:n])
        jumps = np.not_equal(jumps, geo.cluster_size, out=self._jumps[1:n])
        self._jumps[0] = expected not in (0, first)
        if tables > 1:
            self._jumps[:n][ends] = False  # the first cluster of a table follows none
        fragmented = int(np.count_nonzero(self._jumps[:n]))
        if lowest < self._start or int(np.bitwise_or.reduce(entries)) & geo.cluster_mask:
            return None
        numbers = np.right_shift(entries, np.uint64(geo.l2_shift), out=self._numbers[:n]).view(np.int64)
        try:
            if self._strict and (self._map[numbers].any() or len(np.unique(numbers)) != n):
                return None
            # Wrong where a table is, but then the sum is wrong, too.
            self._map[numbers] = DATA
        except IndexError:  # past the end; none was claimed
            return None
        return n, fragmented, last + geo.cluster_size


class Sums(NamedTuple):
    """What the tables have together."""

    allocated: int = 0  # data clusters
    fragmented: int = 0  # data clusters that do not follow the one before
    mapped_end: int = 0  # bytes: guest position after the last cluster that is mapped


class _Half:
    """Every other batch of the tables, for one thread."""

    def __init__(
        self, storage: Storage, geometry: Geometry, tables: Iterator[tuple[int, int]], part: int, vectors: Vectors
    ) -> None:
        self._storage = storage
        self._geometry = geometry
        self._tables = tables  # (L1 index, file offset in bytes) of all of them
        self._part = part  # 0 or 1
        self._vectors = vectors
        self.wanted = True  # False: nobody waits for the result any more
        self.sound = False
        self.sums = Sums()

    def run(self, progress: Callable[[int], None]) -> None:
        entries = self._geometry.table_entries
        batch = max(1, _BATCH_ENTRIES // entries)  # tables
        buffer = empty(min(batch * entries, _BATCH_ENTRIES))
        look = self._look_at_tables if entries <= _BATCH_ENTRIES else self._look_at_parts
        done = 0
        try:
            for part in cycle((0, 1)):
                some = list(islice(self._tables, batch))
                if not some:
                    break
                if part == self._part and not (self.wanted and look(some, buffer)):
                    return
                done += len(some)
                progress(done)
        except StorageError:
            return  # the scan will meet it, too, and says what it is
        self.sound = True

    def _look_at_parts(self, tables: list[tuple[int, int]], buffer: Table) -> bool:
        """Claim what one table refers to; False if an entry is wrong."""
        ((index, offset),) = tables
        geo, pos, expected = self._geometry, index << self._geometry.l1_shift, 0
        for base, table in table_parts(self._storage, geo, offset, buffer):
            claimed = self._vectors.claim(table, expected)
            if claimed is None:
                return False
            expected = claimed[2]
            self._add(claimed, pos + ((base + length_of(table)) << geo.l2_shift))
        return True

    def _look_at_tables(self, tables: list[tuple[int, int]], buffer: Table) -> bool:
        """The same for several tables of one part each, `buffer` full at most."""
        storage, geo = self._storage, self._geometry
        end = 0  # bytes
        indexes = []
        with memoryview(buffer) as entries, entries.cast("B") as content:
            for index, offset in tables:
                if geo.table_bytes <= SMALL or storage.next_data(offset) < offset + geo.table_bytes:
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
            length = length_of(buffer[number * geo.table_entries : (number + 1) * geo.table_entries])
            if length:
                mapped_end = (indexes[number] << geo.l1_shift) + (length << geo.l2_shift)
                break
        self._add(claimed, mapped_end)
        return True

    def _add(self, claimed: tuple[int, int, int], mapped_end: int) -> None:
        sums = self.sums
        self.sums = Sums(sums.allocated + claimed[0], sums.fragmented + claimed[1], max(sums.mapped_end, mapped_end))


def look_at_all(
    storage: Storage,
    geometry: Geometry,
    vectors: tuple[Vectors, Vectors],  # not strict, and with one map
    tables: Callable[[], Iterator[tuple[int, int]]],  # (L1 index, file offset in bytes) of all L2 tables
    progress: Callable[[int], None],  # takes a number of tables
) -> Sums | None:
    """Claim all that the L2 tables refer to.  None if an entry is wrong, or this cannot be done.

    If there are fewer bytes in the map than claims, then some cluster was claimed twice.
    """
    first, second = (_Half(storage, geometry, tables(), part, vectors[part]) for part in (0, 1))
    other = threading.Thread(target=second.run, args=(lambda done: None,), daemon=True)
    try:
        other.start()
    except RuntimeError:  # no more threads: the scan needs none
        return None
    try:
        first.run(progress)
    finally:
        second.wanted = first.sound
        other.join()
    if not (first.sound and second.sound):
        return None
    mapped_end = max(first.sums.mapped_end, second.sums.mapped_end)
    allocated, fragmented = (first.sums[i] + second.sums[i] for i in (0, 1))
    return Sums(allocated, fragmented, mapped_end)
