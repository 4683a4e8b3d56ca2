"""Which header do the tables of a file belong to: found by trial.

A candidate is a header that differs from the one in the file in one field, or in two if both are impossible.  It
fits if something is mapped, and nothing past the end of the device is.  Entries may be wrong, as there may be other
damage; and where none is, that proves little: with clusters of half the size all entries are valid, too, but half
of the file then belongs to nobody.  So what a candidate cannot explain is counted in bytes, and the one that leaves
by far the least is taken, if there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from ..check.scan import Damage, Scan, ScanResult
from ..errors import ImageFormatError, QEDError
from ..format.geometry import (
    ENTRY,
    MAX_CLUSTER_SIZE,
    MAX_TABLE_SIZE,
    MIN_CLUSTER_SIZE,
    MIN_TABLE_SIZE,
    SECTOR,
    ZERO_CLUSTER,
    Bounds,
    Geometry,
    round_up,
)
from ..format.header import HEADER_BYTES, KNOWN_FEATURES, MAGIC, MAX_BACKING_NAME, Header
from ..format.table import TableIO, next_data, table_parts
from ..storage import Storage
from ..units import MiB

_CLEARLY = 4  # the best candidate leaves this many times less unexplained than any other
_IMPOSSIBLE = 8  # one in so many entries of a table may be damaged
_SEVERAL = 2  # entries into the header area
_TOLERATED = 1 << 16  # corruptions: besides the header, there may be other damage
_FIELDS = ("magic", "cluster_size", "table_size", "header_size", "l1_table_offset", "image_size")

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


def fit(storage: Storage, header: Header, present: bool = False) -> Fit | None:
    """`header` with what it leaves unexplained, if it agrees with the tables; `present`: the file has this one."""
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
        found = scan.run(limit=_TOLERATED)
    except QEDError:
        return None
    if found.check_errors or not found.allocated:
        return None
    # Legal, but unlikely: no reason to doubt a header, but none to invent it.
    if not present and found.mapped_end > round_up(header.image_size, header.cluster_size):
        return None
    unused = scan.use.clusters - scan.use.count()
    return Fit(header, (unused + found.corruptions - wrong) * geometry.cluster_size + wrong * ENTRY, found)


def _names_fit(header: Header) -> bool:
    end = header.backing_filename_offset + header.backing_filename_size
    return not header.has_backing or (
        end <= header.header_bytes < 1 << 32 and header.backing_filename_size <= MAX_BACKING_NAME
    )


def prove(storage: Storage) -> Fit | None:
    """The one header that the file proves, as above; None if there is none, or if several fit.

    The header in the file is a candidate, too.  Raises StorageError.
    """
    header = raw_header(storage)
    if header.features & ~KNOWN_FEATURES:
        return None  # of another version, whose tables nobody knows
    return best_fit(storage, header)


def best_fit(storage: Storage, header: Header) -> Fit | None:
    """The one header like `header` that the file proves."""
    header = header._replace(magic=MAGIC)
    fits = _fitting(storage, header, _candidates(storage, header))
    if not any(found.sensible for found in fits):
        fits = sorted(fits + _fitting(storage, header, _other_l1_tables(storage, header)), key=_cost)
    if len(fits) > 1 and fits[1].unexplained < max(fits[0].unexplained * _CLEARLY, 1):
        return None
    if not fits or (fits[0].header != header and not fits[0].sensible):
        return None
    return fits[0]


def _fitting(storage: Storage, header: Header, candidates: Iterator[Header]) -> list[Fit]:
    """Those that fit, the best one first."""
    tried = (fit(storage, candidate, candidate == header) for candidate in set(candidates))
    fits = [found for found in tried if found is not None]
    return sorted(fits, key=_cost)


def _cost(found: Fit) -> int:
    return found.unexplained


def _candidates(storage: Storage, header: Header) -> Iterator[Header]:
    yield header
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
    # Bits that cannot be right are cleared: the other bytes of the number may have survived.
    image_size = header.image_size & (geometry.max_image_size - 1) & ~(SECTOR - 1)
    yield header._replace(image_size=image_size)
    if Bounds(geometry, 1, storage.size()).valid_table(header.l1_table_offset):
        yield from _header_sizes(storage, header, geometry)


def _other_l1_tables(storage: Storage, header: Header) -> Iterator[Header]:
    """The costly ones: all of the file is read."""
    try:
        geometry = Geometry(header.cluster_size, header.table_size)
    except ImageFormatError:
        return
    bounds = Bounds(geometry, max(header.header_size, 1), storage.size())
    for offset in l1_shaped(storage, geometry, bounds):
        yield header._replace(l1_table_offset=offset)


def _header_sizes(storage: Storage, header: Header, geometry: Geometry) -> Iterator[Header]:
    """All before the first cluster in use is header area.

    One L2 entry that points into the header area is wrong itself; more are not wrong in the same way by accident.
    """
    inside = 0
    size = storage.size()
    start = Bounds(geometry, header.header_size, size).start

    def report(damage: Damage) -> None:
        nonlocal inside
        if 0 < damage.value < start and not damage.value & geometry.cluster_mask:
            inside += 1 if damage.table == "L2" else _SEVERAL

    try:
        if Bounds(geometry, header.header_size, size).valid_table(header.l1_table_offset):
            present = Bounds(geometry, header.header_size, size)
            Scan(storage, geometry, present, header.l1_table_offset, report=report).run()
            if inside < _SEVERAL:
                return
        scan = Scan(storage, geometry, Bounds(geometry, 1, size), header.l1_table_offset)
        scan.run()
    except QEDError:
        return
    first = scan.use.next_used(1)
    if first < scan.use.clusters:
        yield header._replace(header_size=first)


def l1_shaped(storage: Storage, geometry: Geometry, bounds: Bounds) -> Iterator[int]:
    """File offsets (bytes) where an L1 table may be: it has entries, and all of them could be tables."""

    @lru_cache(maxsize=2 * MAX_TABLE_SIZE)
    def entries_at(offset: int) -> int | None:
        return _l1_entries(storage, geometry, bounds, offset)

    cs, last = geometry.cluster_size, 0
    offset = geometry.start_of_cluster(next_data(storage, bounds.start))
    while offset < bounds.end:
        if entries_at(offset):
            first = max(bounds.start, offset - geometry.table_bytes + cs, last + cs)
            for last in range(first, offset + cs, cs):
                parts = range(last, last + geometry.table_bytes, cs)
                if bounds.valid_table(last) and all(entries_at(part) is not None for part in parts):
                    yield last
        offset = geometry.start_of_cluster(next_data(storage, offset + cs))


def _l1_entries(storage: Storage, geometry: Geometry, bounds: Bounds, offset: int) -> int | None:
    """Entries of the cluster at `offset`, read as a part of an L1 table; None if one is impossible."""
    n = 0
    step = min(geometry.cluster_size, MiB)
    data = next_data(storage, offset)
    for at in range(offset, offset + geometry.cluster_size, step):
        if data >= at + step:
            continue  # large clusters are mostly holes
        data = next_data(storage, at + step)
        part = TableIO(storage).read(at, step // ENTRY)
        if part.tobytes() == bytes(step):
            continue
        for entry in part:
            if entry:
                if not bounds.valid_table(entry):
                    return None
                n += 1
    return n


class Shape(NamedTuple):
    """What the data entries of a possible table look like."""

    possible: int  # aligned, within the file, each for the first time
    past_end: int  # aligned, but past the end of the file, which may have been cut
    wrong: int  # none of that
    rising: int  # of the possible ones: greater than the one before

    @property
    def is_table(self) -> bool:
        """Nothing but its shape speaks for it: few entries may be damaged, and most must rise."""
        return self.possible > 0 and self.wrong * _IMPOSSIBLE <= self.possible and 2 * self.rising > self.possible

    @property
    def may_be_table(self) -> bool:
        """An L1 entry speaks for it, too."""
        return self.possible + self.past_end >= self.wrong


def shape_of(storage: Storage, geometry: Geometry, bounds: Bounds, offset: int) -> Shape | None:
    """The shape of what is at `offset`, looked at until it cannot be a table; None where none can be."""
    if not bounds.valid_table(offset):
        return None
    possible = past_end = wrong = rising = before = 0
    seen: set[int] = set()
    for _, table in table_parts(storage, geometry, offset):
        for entry in table:
            if entry <= ZERO_CLUSTER:
                continue
            if bounds.valid_cluster(entry) and entry not in seen:
                seen.add(entry)
                possible += 1
                rising += entry > before
                before = entry
            elif entry >= bounds.end and not entry & geometry.cluster_mask:
                past_end += 1
            else:
                wrong += 1
                if wrong > _IMPOSSIBLE + possible + past_end:
                    break
    return Shape(possible, past_end, wrong, rising)
