"""Entries that pointed past the end of the file when it was opened, although NEED_CHECK was clear.

QEMU can leave them after a power loss.  The next allocations take just the place they point to, and then two guest
clusters would share one cluster of the file.

I1. When a table is first read from a writable image, such entries are made invalid for good: their lowest bit is set,
    durably, which keeps what they were for whoever repairs the image.  Their clusters stay unreadable, as before.
I2. Tables are screened as they are read, not all at open, which would take time with the size of the image.  One that
    is read only after the file has grown is screened against the end that the file had.
I3. What was linked since the image was opened is right: such slices and tables are not screened.  They are noted
    before the first write to them.  The others may be screened again, which finds nothing new and takes time: it is
    remembered of a bounded number of slices that they were.
"""

from __future__ import annotations

from collections.abc import Callable

from ..format.geometry import Bounds, Geometry
from ..format.table import Table, TableIO

_MAX_REMEMBERED = 1 << 22  # slices, a byte each: all of a device of 512 TiB with clusters of 64 KiB


class PastEnd:
    """Screens the tables of one image.  Raises StorageError where an entry cannot be made invalid.

    A slice is read by one thread at a time, and nobody changes it before it was read (L2Cache): no lock is needed.
    """

    def __init__(self, tables: TableIO, geometry: Geometry, bounds: Bounds, log: Callable[[str], None]) -> None:
        self._tables = tables
        self._geometry = geometry
        self._end = bounds.end  # bytes: the end of the file before it grew
        self._log = log
        self._screened = bytearray()  # by slice index: 1 if it was; made by screen_l1()
        self.linked: set[int] = set()  # indexes of the slices that were changed since the image was opened
        self.own: set[int] = set()  # L1 indexes of the tables that were made since then

    def screen_l1(self, l1: Table, l1_offset: int) -> None:
        self._screened = bytearray(min(len(l1) * self._geometry.slices_per_table, _MAX_REMEMBERED))
        self._screen(l1, l1_offset, self._end - self._geometry.table_bytes + 1)

    def screen_slice(self, index: int, table: Table, offset: int, l1_index: int) -> None:
        """Screen the slice with this index, just read from `offset`, of the L2 table with this L1 index."""
        remembered = index < len(self._screened)
        if (remembered and self._screened[index]) or l1_index in self.own or index in self.linked:
            return
        self._screen(table, offset, self._end)
        if remembered:
            self._screened[index] = 1

    def _screen(self, table: Table, offset: int, limit: int) -> None:
        if max(table) < limit:
            return
        mask = self._geometry.cluster_mask
        wrong = [index for index, entry in enumerate(table) if entry >= limit and not entry & mask]
        if not wrong:
            return
        for index in wrong:
            table[index] |= 1
        self._tables.write_all(offset, table)
        self._tables.storage.flush()  # before anything can be linked to where they pointed
        name = self._tables.storage.name
        self._log(f"{name}: entries that pointed past the end in the table at {offset:#x}: {len(wrong)}")
