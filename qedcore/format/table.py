"""L1 and L2 tables on disk: little-endian 64-bit entries, read in runs, written in whole sectors.

In memory a table (or a slice of one) is an array('Q') in the machine's byte order.  No state, no locks:
who writes an entry holds the lock of its table, because a sector carries its neighbours along.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..storage import Storage
from ..units import KiB
from .geometry import ENTRY, MAX_PART_SIZE, SECTOR, Geometry, round_up

if TYPE_CHECKING:
    Table = array[int]
else:
    Table = array

_PER_SECTOR = SECTOR // ENTRY  # entries; a power of 2
_SWAP = sys.byteorder == "big"
_BLANK = bytes(MAX_PART_SIZE)
_BLOCK = 4 * KiB  # bytes: clusters are multiples of it, so it is a unit for what is read of tables
SMALL = 64 * KiB  # bytes: reading this is no slower than asking whether it is a hole


_NOTHING: Table = array("Q", (0,))


def empty(entries: int) -> Table:
    return _NOTHING * entries  # no temporary of its size: that costs ten times as much for large ones


def contiguous(offset: int, n: int, cluster_size: int) -> Table:
    """Entries for n clusters one after the other from `offset` (bytes)."""
    if n == 1:
        return array("Q", (offset,))
    return array("Q", range(offset, offset + n * cluster_size, cluster_size))


class TableIO:
    """Reads and writes parts of tables."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def read(self, offset: int, entries: int) -> Table:
        """`entries` entries from file offset `offset`.  Raises StorageError."""
        table = empty(entries)
        self.storage.pread_into(memoryview(table).cast("B"), offset)
        if _SWAP:
            table.byteswap()
        return table

    def write(self, offset: int, table: Table, index: int, entries: Table) -> None:
        """Write `table`, which lies at `offset`, as it will be with `entries` at `index`: the touched sectors.

        `table` itself is left alone; the caller publishes the entries when this has succeeded.
        """
        first, end = index & -_PER_SECTOR, index + len(entries)
        sectors = table[first : end + (-end & (_PER_SECTOR - 1))]
        sectors[index - first : end - first] = entries
        if _SWAP:
            sectors.byteswap()
        self.storage.pwrite(sectors.tobytes(), offset + first * ENTRY)

    def write_all(self, offset: int, table: Table) -> None:
        """Write a whole run of entries to file offset `offset` (a multiple of a sector)."""
        if _SWAP:
            table = table[:]
            table.byteswap()
        self.storage.pwrite(memoryview(table).cast("B"), offset)


def table_parts(
    storage: Storage, geometry: Geometry, offset: int, buffer: Table | None = None
) -> Iterator[tuple[int, Table]]:
    """(index of the first entry, part) for the parts of the table at `offset` that are not empty.

    Each is valid until the next is asked for: they share `buffer`, a part that the caller may lend.
    """
    for at, part in parts_between(storage, geometry, [(offset, offset + geometry.table_bytes)], buffer):
        yield (at - offset) // ENTRY, part


def parts_between(
    storage: Storage, geometry: Geometry, spans: Iterable[tuple[int, int]], buffer: Table | None = None
) -> Iterator[tuple[int, Table]]:
    """(file offset, part) for the parts of tables that are not empty, in `spans` of the file (bytes, whole clusters).

    Holes are not read.  Where the spans are in the order of the file, the storage is asked once about each hole.
    `buffer` as in table_parts.
    """
    if buffer is None:
        buffer = empty(geometry.part_entries)
    data = hole = range(0)  # bytes: what is known of the file
    size = storage.size()
    for at, end in spans:
        while at < end:
            if at not in data and at not in hole:
                has_data, n = storage.data_run(at, size - at) if at < size else (False, end - at)
                if has_data or n < _BLOCK:
                    data = range(at, at + min(round_up(max(n, 1), _BLOCK), geometry.part_bytes))
                else:
                    hole = range(at, (at + n) // _BLOCK * _BLOCK)
            if at in hole:
                at = hole.stop
                continue
            stop = min(end, data.stop, at + geometry.part_bytes)
            part = buffer if stop - at == geometry.part_bytes else empty((stop - at) // ENTRY)
            content = memoryview(part).cast("B")
            storage.pread_into(content, at)
            if _SWAP:
                part.byteswap()
            if part[0] or not _BLANK.startswith(content):  # which copies nothing
                yield at, part
            at = stop


def length_of(table: Table) -> int:
    """Entries up to the last one that is not 0."""
    return len(table) if table[-1] else -(-len(table.tobytes().rstrip(b"\0")) // ENTRY)
