"""Moving units (layout.py) from slot to slot, so that a crash at any time loses nothing.

I1. A unit is copied to free slots and made durable there, then linked there and that made durable, and only then
    are its old slots free.  So whenever a crash comes, every link leads to a whole copy.
I2. Holes stay holes.  The target slots become holes before the copy, where the storage can make any, and then only
    data are written there; the source slots become holes when they are free.  Blocks of zeros are not written either.
I3. When there is no space for a copy, nothing has changed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from ..engine.image import Metadata
from ..errors import StorageError
from ..format.geometry import ENTRY, SECTOR
from ..format.table import Table
from ..units import KiB, MiB
from .layout import FREE, L1_TABLE, Layout, is_table

COPY_STEP = 1 * MiB  # bytes copied with one read and one write; larger buffers cost more in page faults
_BLANK = bytes(4 * KiB)  # the least that is left out: what file systems allocate, and the smallest cluster
_NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class NoSpaceError(StorageError):
    """There is no space for a copy: nothing has changed."""


class Move(NamedTuple):
    """One unit's way; slots."""

    unit: int
    source: int
    target: int


class Mover:
    """Moves units (I1); `layout` follows."""

    def __init__(self, metadata: Metadata, layout: Layout) -> None:
        self._metadata = metadata
        self._storage = metadata.storage
        self._shift = metadata.geometry.l2_shift
        self._entries = metadata.geometry.table_entries
        self.layout = layout

    def move(self, moves: list[Move]) -> None:
        """Move units to free slots.  Tables first: links are written to where a table is.

        Raises NoSpaceError, after which some have been moved and the others are where they were, and StorageError.
        """
        try:
            for batch in (
                [move for move in moves if move.unit == L1_TABLE],
                [move for move in moves if move.unit != L1_TABLE and is_table(move.unit)],
                [move for move in moves if not is_table(move.unit)],
            ):
                if batch:
                    self._move(batch)
        except NoSpaceError:
            units = self.layout.units
            for unit, source, target in moves:
                if units[source] == units[target] == unit:  # not moved, and the target was reserved
                    units.put(target, self.layout.size_of(unit), FREE)
            raise

    def _move(self, batch: list[Move]) -> None:
        n = self.layout.size_of(batch[0].unit)
        runs = _runs(batch, n)
        try:
            for source, target, length in runs:
                self._copy(source << self._shift, target << self._shift, length << self._shift)
        except StorageError as error:
            if error.errno not in _NO_SPACE:
                raise
            for _, target, length in runs:
                self.punch(target, length)
            raise NoSpaceError(str(error), code=error.errno) from None
        self._storage.flush()  # the copies, before anything leads to them
        self._link(batch)
        self._storage.flush()  # the links: from here on nothing leads to the old places
        for move in batch:
            self.layout.units.put(move.source, n, FREE)
            self.layout.units.put(move.target, n, move.unit)
            if move.unit != L1_TABLE and is_table(move.unit):
                self.layout.l2_offsets[move.unit // 2 - 1] = move.target << self._shift
        for source, _, length in runs:
            self.punch(source, length)

    def punch(self, slot: int, n: int) -> bool:
        """Give back the space of free slots, to which nothing leads, durably; True if they read as zeros now."""
        start = slot << self._shift
        end = min((slot + n) << self._shift, self._storage.size())  # past the end of the file are zeros anyway
        if start >= end:
            return True
        with suppress(StorageError):
            return self._storage.punch(start, end - start)
        return False

    def _copy(self, source: int, target: int, length: int) -> None:
        """Copy `length` bytes between two file offsets; the target is free (I2)."""
        blank = self.punch(target >> self._shift, length >> self._shift)
        if self._storage.size() < target + length:
            self._storage.truncate(target + length)  # the file covers each cluster, also one that ends with zeros
        done = 0
        while done < length:
            if blank:
                done = self._storage.next_data(source + done) - source
                done -= done % len(_BLANK)
                if done >= length:
                    return
            data = bytearray(min(COPY_STEP, length - done))
            self._storage.pread_into(data, source + done)
            for start, end in _data_parts(data) if blank else ((0, len(data)),):
                self._storage.pwrite(memoryview(data)[start:end], target + done + start)
            done += len(data)

    def _link(self, batch: list[Move]) -> None:
        if batch[0].unit == L1_TABLE:
            self._metadata.header.set_l1_table_offset(batch[0].target << self._shift)
            return
        sectors: dict[int, Table] = {}
        for move in batch:
            at = self._entry_of(move.unit)
            sector = self._sector(at, sectors)
            sector[at % SECTOR // ENTRY] = move.target << self._shift
        for offset in sorted(sectors):
            self._metadata.tables.write_all(offset, sectors[offset])

    def find(self, units: Iterable[int]) -> Iterator[tuple[int, int]]:
        """(unit, slot) for each of `units`."""
        sectors: dict[int, Table] = {}
        for unit in units:
            if unit == L1_TABLE:
                yield unit, self._metadata.header.header.l1_table_offset >> self._shift
            else:
                at = self._entry_of(unit)
                yield unit, self._sector(at, sectors)[at % SECTOR // ENTRY] >> self._shift

    def _entry_of(self, unit: int) -> int:
        """File offset (bytes) of the entry that leads to a unit, not the L1 table."""
        if is_table(unit):
            return self._metadata.header.header.l1_table_offset + (unit // 2 - 1) * ENTRY
        index, entry = divmod((unit - 3) // 2, self._entries)
        return self.layout.l2_offsets[index] + entry * ENTRY

    def _sector(self, at: int, sectors: dict[int, Table]) -> Table:
        """The sector of a table with the entry at file offset `at`, read once."""
        offset = at - at % SECTOR
        if offset not in sectors:
            sectors[offset] = self._metadata.tables.read(offset, SECTOR // ENTRY)
        return sectors[offset]


def _runs(batch: list[Move], n: int) -> list[tuple[int, int, int]]:
    """(source, target, slots) of units of n slots; those that stay side by side go together."""
    runs: list[tuple[int, int, int]] = []
    for _, source, target in sorted(batch, key=lambda move: move.source):
        if runs:
            first, to, length = runs[-1]
            if (source, target) == (first + length, to + length):
                runs[-1] = first, to, length + n
                continue
        runs.append((source, target, n))
    return runs


def _data_parts(data: bytearray) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of `data`, in whole blocks, that are not zeros."""
    start = 0
    for at in range(0, len(data), len(_BLANK)):
        if data.startswith(_BLANK, at):
            if start < at:
                yield start, at
            start = at + len(_BLANK)
    if start < len(data):
        yield start, len(data)
