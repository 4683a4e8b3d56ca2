"""The cache of L2 tables, in slices (geometry.MAX_SLICE_SIZE): bounded in bytes, least recently used goes first.

I1. `slices` maps slice index (pos >> slice_shift) to a table; reading it takes no lock.  Entries are changed
    only by whoever holds the L2 table's lock, and only after they are on disk.
I2. There is one array per slice: while anybody still uses one that was evicted, a miss finds that one again,
    so a table in use is never dropped, and no two requests ever see different copies.
I3. However many threads miss one slice at once, it is read once.

The lock protects the dictionaries; it is never held across I/O.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakValueDictionary

from ..format.table import Table, TableIO
from ..locks import Rank, ranked_lock

MIN_SLICES = 2  # whatever the bound: the one in use and the next


class L2Cache:
    """`limit` is in bytes; a slice has `slice_entries` entries."""

    def __init__(self, tables: TableIO, slice_entries: int, limit: int) -> None:
        self._tables = tables
        self._slice_entries = slice_entries
        self._capacity = max(MIN_SLICES, limit // (slice_entries * 8))  # slices
        self._lock = ranked_lock(Rank.CACHE)
        self.slices: OrderedDict[int, Table] = OrderedDict()  # oldest use first
        self._alive: WeakValueDictionary[int, Table] = WeakValueDictionary()  # every slice that anybody holds (I2)
        self._loading: dict[int, threading.Event] = {}  # slice index -> set when its load is over

    def touch(self, index: int) -> None:
        """Note a use, for the order of eviction.  Takes no lock: one C call, atomic under the GIL."""
        try:
            self.slices.move_to_end(index)
        except KeyError:  # evicted since it was looked up
            pass

    def load(self, index: int, offset: int) -> Table:
        """The slice, from the cache or from file offset `offset`.  Raises StorageError."""
        while True:
            with self._lock:
                table = self.slices.get(index) or self._alive.get(index)
                if table is not None:
                    self._insert(index, table)
                    return table
                loading = self._loading.get(index)
                if loading is None:
                    mine = self._loading[index] = threading.Event()
                    break
            loading.wait()  # if that load fails, try ourselves: its error is the other request's
        try:
            table = self.read(index, offset)
            with self._lock:
                self._insert(index, table)
            return table
        finally:
            with self._lock:
                del self._loading[index]
            mine.set()

    def read(self, index: int, offset: int) -> Table:
        return self._tables.read(offset, self._slice_entries)

    def add(self, index: int, table: Table) -> None:
        """Put in a slice that was just written.  The caller holds its table's lock."""
        with self._lock:
            self._insert(index, table)

    def discard(self, index: int) -> None:
        """Forget a slice whose state on disk is unknown: its next use reads it again.  Table lock held."""
        with self._lock:
            self.slices.pop(index, None)
            self._alive.pop(index, None)

    def change_all(self, change: Callable[[Table], None]) -> None:
        """Change every slice that anybody has, as the tables on disk were changed already."""
        with self._lock:
            loading = list(self._loading.values())
        for load in loading:  # perhaps it has read what was there before; later ones have not
            load.wait()
        with self._lock:
            for table in self._alive.values():
                change(table)

    def clear(self) -> None:
        with self._lock:
            self.slices.clear()
            self._alive.clear()

    def _insert(self, index: int, table: Table) -> None:
        self.slices[index] = table
        self.slices.move_to_end(index)
        self._alive[index] = table
        while len(self.slices) > self._capacity:
            self.slices.popitem(last=False)
