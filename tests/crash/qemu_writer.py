"""A writer that behaves like QEMU's driver (7.2), with its hazards: it leaves what this project must bear.

    NEED_CHECK is set without a flush; clusters come from the end of the file, as its length tells; nothing is
    looked at before, so an entry that leads past the end becomes valid when the file grows; existing tables are
    written without a flush, new ones are flushed before they are linked; nothing is ever freed.

It shares no code with the engine.  One request at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from support.qed_image import F_NEED_CHECK, HEADER, ZERO

_SECTOR = 512  # bytes: what is written of a table
_FEATURES = struct.Struct("<Q")
_FEATURES_AT = 16  # bytes


class QemuWriter:
    """`below(pos, length)` is the backing file, if there is one; `storage` has pread_into, pwrite, flush and size."""

    def __init__(self, storage: Any, below: Callable[[int, int], bytes] | None) -> None:
        self._storage = storage
        self._below = below
        header = HEADER.unpack(self._read(0, HEADER.size))
        self._cluster, self._table = header[1], header[1] * header[2]  # bytes
        self._features, self._l1, self.size = header[4], header[7], header[8]
        self._end = -(-storage.size() // _SECTOR) * _SECTOR // self._cluster * self._cluster
        if self._features & F_NEED_CHECK:
            self._repair()

    def _read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self._storage.pread_into(data, offset)
        return bytes(data)

    def _entries(self, offset: int) -> list[int]:
        return list(struct.unpack(f"<{self._table // 8}Q", self._read(offset, self._table)))

    def _valid(self, offset: int, length: int) -> bool:
        return offset % self._cluster == 0 and self._cluster <= offset and offset + length <= self._end

    def _repair(self) -> None:
        """Its check at open: impossible entries are cleared, and so is the bit."""
        tables = self._clear_impossible(self._l1, self._table)
        for offset in filter(None, tables):
            self._clear_impossible(offset, self._cluster)
        self._storage.flush()
        self._set_features(self._features & ~F_NEED_CHECK)
        self._storage.flush()

    def _clear_impossible(self, offset: int, length: int) -> list[int]:
        entries = self._entries(offset)
        right = [entry if entry == ZERO or self._valid(entry, length) else 0 for entry in entries]
        if right != entries:
            self._storage.pwrite(struct.pack(f"<{len(right)}Q", *right), offset)
        return right

    def _set_features(self, features: int) -> None:
        sector = bytearray(self._read(0, _SECTOR))
        sector[_FEATURES_AT : _FEATURES_AT + _FEATURES.size] = _FEATURES.pack(features)
        self._storage.pwrite(bytes(sector), 0)
        self._features = features

    def write(self, pos: int, data: bytes) -> None:
        """Of any length, but whole sectors.  An impossible entry fails the request: the rest of it is not done."""
        while data:
            n = min(len(data), self._cluster - pos % self._cluster)
            # Neighbours in one table that have no cluster are allocated together.
            while n < len(data) and self._missing(pos) and self._missing(pos + n) and self._same_table(pos, pos + n):
                n = min(len(data), n + self._cluster)
            if not self._write_run(pos, data[:n]):
                return
            pos, data = pos + n, data[n:]

    def zero_clusters(self, pos: int, n: int) -> None:
        """n clusters that have no data become zero clusters; the others are written to."""
        for at in range(pos, pos + n * self._cluster, self._cluster):
            if self._missing(at):
                self._begin()
                self._link(at, [ZERO])
            else:
                self.write(at, bytes(self._cluster))

    def flush(self) -> None:
        self._storage.flush()

    def close(self) -> None:
        self._storage.flush()
        if self._features & F_NEED_CHECK:
            self._set_features(self._features & ~F_NEED_CHECK)
            self._storage.flush()

    def _same_table(self, pos: int, other: int) -> bool:
        span = self._table // 8 * self._cluster
        return pos // span == other // span

    def _lookup(self, pos: int) -> tuple[int, int]:
        """(offset of the L2 table or 0, entry)."""
        table, index = divmod(pos // self._cluster, self._table // 8)
        offset = int.from_bytes(self._read(self._l1 + table * 8, 8), "little")
        if not offset:
            return 0, 0
        return offset, int.from_bytes(self._read(offset + index * 8, 8), "little")

    def _missing(self, pos: int) -> bool:
        return self._lookup(pos)[1] in (0, ZERO)

    def _write_run(self, pos: int, data: bytes) -> bool:
        table, entry = self._lookup(pos)
        if table and not self._valid(table, self._table):
            return False
        if entry > ZERO:
            if not self._valid(entry, self._cluster):
                return False
            self._storage.pwrite(data, entry + pos % self._cluster)
            return True
        start = pos - pos % self._cluster
        end = -(-(pos + len(data)) // self._cluster) * self._cluster
        offset, self._end = self._end, self._end + end - start
        self._begin()
        # Also in the place of a zero cluster: the driver fills from the backing file all the same.
        self._fill(offset, start, pos)
        self._fill(offset + pos + len(data) - start, pos + len(data), end)
        self._storage.pwrite(data, offset + pos - start)
        if self._below is not None:
            self._storage.flush()
        self._link(pos, list(range(offset, self._end, self._cluster)))
        return True

    def _begin(self) -> None:
        if self._below is None and not self._features & F_NEED_CHECK:
            self._set_features(self._features | F_NEED_CHECK)  # and no flush

    def _fill(self, offset: int, start: int, end: int) -> None:
        if start < end:
            data = self._below(start, end - start) if self._below is not None else bytes(end - start)
            self._storage.pwrite(data, offset)

    def _link(self, pos: int, entries: list[int]) -> None:
        number, index = divmod(pos // self._cluster, self._table // 8)
        table, _ = self._lookup(pos)
        if table:
            self._write_entries(table, index, entries)
            return
        table, self._end = self._end, self._end + self._table
        content = [0] * (self._table // 8)
        content[index : index + len(entries)] = entries
        self._storage.pwrite(struct.pack(f"<{len(content)}Q", *content), table)
        self._storage.flush()
        self._write_entries(self._l1, number, [table])

    def _write_entries(self, table: int, index: int, entries: list[int]) -> None:
        """The sectors of a table that they are in."""
        start = index * 8 // _SECTOR * _SECTOR
        end = -(-(index + len(entries)) * 8 // _SECTOR) * _SECTOR
        raw = bytearray(self._read(table + start, end - start))
        raw[index * 8 - start : (index + len(entries)) * 8 - start] = struct.pack(f"<{len(entries)}Q", *entries)
        self._storage.pwrite(bytes(raw), table + start)
