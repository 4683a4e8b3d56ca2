"""Where everything in the file of a sound image is.

A unit is what moves: the L1 table, an L2 table (table_size clusters each), or a data cluster.  A slot is a cluster
of the file, by its number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable

from ..engine.image import Metadata
from ..errors import CorruptImageError, UnsupportedError
from ..format.geometry import DANGLING, ENTRY, RESERVED_BITS, SECTOR, UNALLOCATED, ZERO_CLUSTER, is_marked
from ..format.table import SMALL, Table, empty
from ..storage.file import FAR

_CHUNK_BITS = 10  # slots per chunk of a SlotMap: 8 KiB each
_IN_CHUNK = (1 << _CHUNK_BITS) - 1

FREE = 0
L1_TABLE = 1  # the L1 table's unit number; L2 tables have even ones, data clusters odd ones


def l2_unit(index: int) -> int:
    """The unit number of the L2 table of an L1 entry."""
    return 2 * index + 2


def data_unit(cluster: int) -> int:
    """The unit number of a guest cluster's data."""
    return 2 * cluster + 3


def is_table(unit: int) -> bool:
    return unit == L1_TABLE or (unit != FREE and unit % 2 == 0)


class LimitError(UnsupportedError):
    """The image has more tables or clusters than its caller wants to look at."""


class SlotMap:
    """Which unit is in each slot, taking memory only where there are units."""

    def __init__(self) -> None:
        self._chunks: dict[int, Table] = {}

    def __getitem__(self, slot: int) -> int:
        chunk = self._chunks.get(slot >> _CHUNK_BITS)
        return chunk[slot & _IN_CHUNK] if chunk is not None else FREE

    def put(self, slot: int, n: int, unit: int) -> None:
        """`unit`, or FREE, is in the n slots from `slot` on."""
        for at in range(slot, slot + n):
            chunk = self._chunks.get(at >> _CHUNK_BITS)
            if chunk is None:
                chunk = self._chunks[at >> _CHUNK_BITS] = empty(1 << _CHUNK_BITS)
            chunk[at & _IN_CHUNK] = unit

    def claim(self, slot: int, unit: int) -> bool:
        """put() for one free slot; False if it is not free."""
        chunk = self._chunks.get(slot >> _CHUNK_BITS)
        if chunk is None:
            chunk = self._chunks[slot >> _CHUNK_BITS] = empty(1 << _CHUNK_BITS)
        if chunk[slot & _IN_CHUNK] != FREE:
            return False
        chunk[slot & _IN_CHUNK] = unit
        return True

    def items(self, first: int) -> Iterator[tuple[int, int]]:
        """(slot, unit) of the slots in use from `first` on, in order."""
        for number in sorted(self._chunks):
            if number >= first >> _CHUNK_BITS:
                for slot, unit in enumerate(self._chunks[number], number << _CHUNK_BITS):
                    if unit != FREE and slot >= first:
                        yield slot, unit

    def end(self) -> int:
        """The slot after the last one in use; 0 if none is."""
        for number in sorted(self._chunks, reverse=True):
            chunk = self._chunks[number]
            for at in range(_IN_CHUNK, -1, -1):
                if chunk[at] != FREE:
                    return (number << _CHUNK_BITS) + at + 1
        return 0


class Layout:
    """Where every unit of a sound image is.

    Reads each byte of a table once, and none of the holes in large ones.  Entries that were made invalid for good
    lead to no unit.  Raises CorruptImageError if the image is damaged, StorageError, and LimitError when more than
    `max_bytes` of tables would have to be read, or when more than `max_units` clusters are in use.
    """

    def __init__(self, metadata: Metadata, *, max_bytes: int = FAR, max_units: int = FAR) -> None:
        self._storage = metadata.storage
        self._tables = metadata.tables
        self._geometry = geo = metadata.geometry
        self._bounds = metadata.bounds
        self._header = metadata.header
        self._max_bytes = max_bytes
        self._max_units = max_units
        self.first = max(1, metadata.bounds.start >> geo.l2_shift)  # slot: the first after the header area
        self.used = self.first  # slots in use, with the header area: the length of a dense file
        self.units = SlotMap()
        self.l2_offsets: dict[int, int] = {}  # L1 index -> bytes
        self._place(L1_TABLE, self._l1_offset())
        for base, l1 in self._parts(self._l1_offset):
            for index, offset in enumerate(l1, base):
                if offset and not is_marked(offset):
                    self._place(l2_unit(index), offset)
                    self.l2_offsets[index] = offset
        for index in self.l2_offsets:
            for unit, offset in self.data_units(index):
                if not self._bounds.valid_cluster(offset) or not self.units.claim(offset >> geo.l2_shift, unit):
                    self._place(unit, offset)  # which tells what is wrong
                self.used += 1
                if self.used > max_units:
                    raise LimitError("the image has too many clusters")
        self._max_bytes = FAR  # of the first look

    def _l1_offset(self) -> int:
        return self._header.header.l1_table_offset

    def size_of(self, unit: int) -> int:
        """Slots."""
        return self._geometry.table_size if is_table(unit) else 1

    def end(self) -> int:
        """The slot after the last one in use."""
        return max(self.first, self.units.end())

    def strays(self) -> list[tuple[int, int]]:
        """(slot, unit) of the slots in use past the end of a dense file, in order."""
        return list(self.units.items(self.used))

    def free_runs(self) -> Iterator[tuple[int, int]]:
        """(first slot, slots) of the free runs before the last slot in use, in order.

        Only free slots may be put to use while this is read.
        """
        at = self.first
        for slot, _ in self.units.items(self.first):
            if slot > at:
                yield at, slot - at
            at = slot + 1

    def data_units(self, index: int) -> Iterator[tuple[int, int]]:
        """(unit, file offset) of the data clusters of one L2 table, in guest order.

        The table may move meanwhile; the offsets are then those from before.
        """
        first = index * self._geometry.table_entries
        for base, table in self._parts(lambda: self.l2_offsets[index]):
            for cluster, entry in enumerate(table, first + base):
                if entry > ZERO_CLUSTER and entry & RESERVED_BITS != DANGLING:  # inlined from is_marked
                    yield data_unit(cluster), entry

    def in_order(self) -> Iterator[int]:
        """All units, in the order of a compact file."""
        yield L1_TABLE
        for index in sorted(self.l2_offsets):
            yield l2_unit(index)
            for unit, _ in self.data_units(index):
                yield unit

    def _parts(self, offset: Callable[[], int]) -> Iterator[tuple[int, Table]]:
        """(index of the first entry, part) of the parts of a table that are not empty.

        `offset` tells where the table is now: it may move between two parts.
        """
        geo = self._geometry
        base = 0
        while base < geo.table_entries:
            n = min(geo.part_entries, geo.table_entries - base)
            if geo.table_bytes > SMALL:
                has_data, length = self._storage.data_run(offset() + base * ENTRY, (geo.table_entries - base) * ENTRY)
                if not has_data:
                    base += max(length // SECTOR, 1) * SECTOR // ENTRY
                    continue
                n = min(n, -(-length // SECTOR) * SECTOR // ENTRY)
            self._max_bytes -= n * ENTRY
            if self._max_bytes < 0:
                raise LimitError("the image has too many tables")
            table = self._tables.read(offset() + base * ENTRY, n)
            if table.count(UNALLOCATED) != len(table):
                yield base, table
            base += n

    def _place(self, unit: int, offset: int) -> None:
        slot = offset >> self._geometry.l2_shift
        n = self.size_of(unit)
        valid = self._bounds.valid_table(offset) if is_table(unit) else self._bounds.valid_cluster(offset)
        if not valid or not all(self.units.claim(slot + i, unit) for i in range(n)):
            found = "refers twice to clusters" if valid else "has an invalid entry for clusters"
            raise CorruptImageError(f"damaged image: it {found} at {offset:#x}: repair it first (check -r all)")
        self.used += n
        if self.used > self._max_units:
            raise LimitError("the image has too many clusters")
