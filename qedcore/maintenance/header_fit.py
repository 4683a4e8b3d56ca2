"""What a damaged header field was: found by trial, and believed only where the file allows no other reading.

A candidate differs from the header in the file in one field, or in both sizes if both are impossible.  It is proven
if every cluster of the file has exactly one use under it: each other reading leaves clusters that nothing explains.

I1. A header that is valid, and under which no entry is wrong, is right.  Leaks, holes and zeros say nothing: a sound
    file may have them anywhere, and old tables among them.
I2. Tables that are blank in their second halves could as well be half as long.  Such a table_size is proven only if
    that makes no difference to what is mapped.
I3. image_size is not known to the tables.  If it is impossible, and one wrong bit explains that, then no other one
    bit does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Callable, NamedTuple

from ..check.scan import Damage, Scan, ScanResult
from ..errors import ImageFormatError, QEDError
from ..format.geometry import (
    ENTRY,
    MAX_CLUSTER_SIZE,
    MAX_TABLE_SIZE,
    MIN_CLUSTER_SIZE,
    MIN_TABLE_SIZE,
    SECTOR,
    Bounds,
    Geometry,
    round_up,
)
from ..format.header import HEADER_BYTES, KNOWN_FEATURES, MAGIC, MAX_BACKING_NAME, Header, read_header
from ..format.table import TableIO, table_parts
from ..storage import Storage
from ..units import MiB

_TOLERATED = 1 << 16  # corruptions: besides the header, there may be other damage
_FIELDS = ("magic", "cluster_size", "table_size", "header_size", "l1_table_offset", "image_size")

Say = Callable[[str], None]  # takes one line for people

CLUSTER_SIZES = tuple(1 << n for n in range(MIN_CLUSTER_SIZE.bit_length() - 1, MAX_CLUSTER_SIZE.bit_length()))
TABLE_SIZES = tuple(1 << n for n in range(MIN_TABLE_SIZE.bit_length() - 1, MAX_TABLE_SIZE.bit_length()))


class Fit(NamedTuple):
    """A header that agrees with the tables."""

    header: Header
    unexplained: int  # bytes: clusters that nothing refers to, or more than one entry; entries that are impossible
    found: ScanResult

    @property
    def sensible(self) -> bool:
        """Most is right."""
        return self.found.allocated > 2 * self.found.corruptions

    def changes(self, before: Header) -> list[str]:
        """What is different, for people."""
        return [
            f"header field {name} is {getattr(before, name)}, but only {getattr(self.header, name)} fits the tables"
            for name in _FIELDS
            if getattr(before, name) != getattr(self.header, name)
        ]


def raw_header(storage: Storage) -> Header:
    """The header as it is, valid or not.  Raises StorageError."""
    data = bytearray(HEADER_BYTES)
    storage.pread_into(data, 0)
    return Header.unpack(bytes(data))


def fit(storage: Storage, header: Header, limit: int = _TOLERATED) -> Fit | None:
    """What is found under `header`, by `limit` corruptions; None if it is not possible, or tables cannot be read.

    The tables may map more than the device has, which is legal.
    """
    wrong = 0

    def report(damage: Damage) -> None:
        nonlocal wrong
        in_header = 0 < damage.value < bounds.start and not damage.value & geometry.cluster_mask
        wrong += not damage.shared and not in_header  # those two are about whole clusters

    try:
        geometry = Geometry(header.cluster_size, header.table_size)
        geometry.check_image_size(header.image_size)
        bounds = Bounds(geometry, header.header_size, storage.size())
        if header.l1_table_offset == 0 or not bounds.valid_table(header.l1_table_offset) or not _names_fit(header):
            return None
        scan = Scan(storage, geometry, bounds, header.l1_table_offset, report=report)
        found = scan.run(limit=limit)
    except QEDError:
        return None
    if found.check_errors:
        return None
    unused = scan.use.clusters - scan.use.count()
    return Fit(header, (unused + found.corruptions - wrong) * geometry.cluster_size + wrong * ENTRY, found)


def _names_fit(header: Header) -> bool:
    end = header.backing_filename_offset + header.backing_filename_size
    return not header.has_backing or (
        end <= header.header_bytes < 1 << 32 and header.backing_filename_size <= MAX_BACKING_NAME
    )


def prove(storage: Storage, header: Header | None = None, found: ScanResult | None = None) -> Fit | None:
    """The one header that the file proves to be right, instead of the one that it has; None if it proves none.

    `header`: instead of the one in the file; `found`: under it, if it is valid.  Then it is wrong only if another one
    is proven.  Raises StorageError.
    """
    before = header = header or raw_header(storage)
    if header.features & ~KNOWN_FEATURES:
        return None  # of another version, whose tables nobody knows
    if found is None:
        header = _with_one_bit_of_size(header._replace(magic=MAGIC))  # there is one right magic (I3)
        present = fit(storage, header, limit=1)
        if present is not None:
            sound = present.found.allocated and not present.found.corruptions and _maps_device_only(present)
            return present if sound and header != before else None
    proven = [
        candidate
        for candidate in (fit(storage, candidate, limit=1) for candidate in set(_candidates(storage, header, found)))
        if candidate is not None and _explains_all(candidate) and candidate.header != header
    ]
    return proven[0] if len(proven) == 1 and _certain_table_size(storage, proven[0].header, header) else None


def _explains_all(candidate: Fit) -> bool:
    found = candidate.found
    return found.clean and found.allocated > 0 and _maps_device_only(candidate)


def _maps_device_only(found: Fit) -> bool:
    """More is legal, but unlikely: no reason to doubt a header, but none to invent it."""
    return found.found.mapped_end <= round_up(found.header.image_size, found.header.cluster_size)


def _with_one_bit_of_size(header: Header) -> Header:
    """`header` with an image_size that is possible, if one wrong bit can have made it impossible."""
    try:
        geometry = Geometry(header.cluster_size, header.table_size)
    except ImageFormatError:
        return header
    size, largest = header.image_size, geometry.max_image_size
    if size % SECTOR == 0 and size <= largest:
        return header
    possible = [size ^ 1 << bit for bit in range(64)]
    possible = [other for other in possible if other % SECTOR == 0 and other <= largest]
    return header._replace(image_size=possible[0]) if len(possible) == 1 else header


def _certain_table_size(storage: Storage, header: Header, before: Header) -> bool:
    """Tables of `header` that were half as long would map something else (I2)."""
    if header.table_size in (before.table_size, MIN_TABLE_SIZE):
        return True
    geometry = Geometry(header.cluster_size, header.table_size)
    shorter = Geometry(header.cluster_size, header.table_size // 2)
    half = shorter.table_entries
    tables = [header.l1_table_offset]
    only_first = True  # nothing is mapped but by the first half of the first table
    for base, l1 in table_parts(storage, geometry, header.l1_table_offset):
        for index, offset in enumerate(l1, base):
            if offset:
                tables.append(offset)
                only_first = only_first and index == 0
    for offset in tables:
        for base, table in table_parts(storage, geometry, offset):
            if any(table[max(half - base, 0) :]):
                return True
    return only_first


def _candidates(storage: Storage, header: Header, found: ScanResult | None) -> Iterator[Header]:
    for cluster_size in CLUSTER_SIZES:
        yield header._replace(cluster_size=cluster_size)
    for table_size in TABLE_SIZES:
        yield header._replace(table_size=table_size)
        if header.cluster_size not in CLUSTER_SIZES and header.table_size not in TABLE_SIZES:
            for cluster_size in CLUSTER_SIZES:
                yield header._replace(cluster_size=cluster_size, table_size=table_size)
    try:
        geometry = Geometry(header.cluster_size, header.table_size)
    except ImageFormatError:
        return
    size = storage.size()
    if Bounds(geometry, header.header_size, size).valid_table(header.l1_table_offset):
        if found is not None and not Fit(header, 0, found).sensible:
            yield from _other_l1_tables(storage, header, geometry)
    elif Bounds(geometry, 1, size).valid_table(header.l1_table_offset):
        yield from _header_sizes(storage, header, geometry)
    else:
        yield from _other_l1_tables(storage, header, geometry)


def _other_l1_tables(storage: Storage, header: Header, geometry: Geometry) -> Iterator[Header]:
    """The costly ones: all of the file is read."""
    bounds = Bounds(geometry, max(header.header_size, 1), storage.size())
    for offset in l1_shaped(storage, geometry, bounds):
        yield header._replace(l1_table_offset=offset)


def _header_sizes(storage: Storage, header: Header, geometry: Geometry) -> Iterator[Header]:
    """All before the first cluster in use is header area."""
    try:
        scan = Scan(storage, geometry, Bounds(geometry, 1, storage.size()), header.l1_table_offset)
        scan.run()
    except QEDError:
        return
    first = scan.use.next_used(1)
    if first < scan.use.clusters:
        yield header._replace(header_size=first)


def correct_invalid_header(storage: Storage, say: Say) -> int:
    """Correct the header in the file, durably, if it is invalid and the tables prove what is right: 1 if it was.

    Raises ImageFormatError if they do not, UnsupportedError and StorageError.
    """
    try:
        read_header(storage)
        return 0
    except ImageFormatError as error:
        found = prove(storage)
        if found is None:
            say(f"{error}; the rest of the file does not prove what is right: try qed salvage")
            raise
        correct_header(storage, raw_header(storage), found, say)
        return 1


def correct_header(storage: Storage, before: Header, found: Fit, say: Say) -> None:
    storage.pwrite(found.header.pack(), 0)  # within one sector: all of it or nothing
    storage.flush()  # before any repair that depends on it
    for line in found.changes(before):
        say(f"{line}: corrected")


def l1_shaped(storage: Storage, geometry: Geometry, bounds: Bounds) -> Iterator[int]:
    """File offsets (bytes) where an L1 table may be: it has entries, and all of them could be tables."""

    @lru_cache(maxsize=2 * MAX_TABLE_SIZE)
    def entries_at(offset: int) -> int | None:
        return _l1_entries(storage, geometry, bounds, offset)

    cs, last = geometry.cluster_size, 0
    offset = geometry.start_of_cluster(storage.next_data(bounds.start))
    while offset < bounds.end:
        if entries_at(offset):
            first = max(bounds.start, offset - geometry.table_bytes + cs, last + cs)
            for last in range(first, offset + cs, cs):
                parts = range(last, last + geometry.table_bytes, cs)
                if bounds.valid_table(last) and all(entries_at(part) is not None for part in parts):
                    yield last
        offset = geometry.start_of_cluster(storage.next_data(offset + cs))


def _l1_entries(storage: Storage, geometry: Geometry, bounds: Bounds, offset: int) -> int | None:
    """Entries of the cluster at `offset`, read as a part of an L1 table; None if one is impossible."""
    n = 0
    step = min(geometry.cluster_size, MiB)
    data = storage.next_data(offset)
    for at in range(offset, offset + geometry.cluster_size, step):
        if data >= at + step:
            continue  # large clusters are mostly holes
        data = storage.next_data(at + step)
        part = TableIO(storage).read(at, step // ENTRY)
        if part.tobytes() == bytes(step):
            continue
        for entry in part:
            if entry:
                if not bounds.valid_table(entry):
                    return None
                n += 1
    return n
