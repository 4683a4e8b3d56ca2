"""`qed salvage`: the guest's bytes from an image that cannot be opened or repaired, as far as they can be found.

    1  the geometry: the header's, if it is valid and no entry is wrong under it, or few; else one that the file
       proves (header_fit), else the header's fields where they are possible, what the user knows, and the steps
       between the entries of what looks like a table
    2  where each part of the device is: by the L1 table, and where that is damaged, by L2 tables that lie about in
       the file.  Those do not say which part of the device they map, and may be old ones: they are taken in the order
       of the file, for places that have lost theirs, and their ranges are called guessed.
    3  a raw file with what was found, and a list of ranges: good, zero or lost

I1. An image that is whole is read as it is, whatever its leaks look like: they hold old data of any guest range.
I2. What is not certain is called guessed.

An L2 table is known by its shape: entries are aligned, within the file, no two alike, and mostly rising.
The image is only read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

from ..check.cluster_use import DATA, METADATA, ClusterUse
from ..engine.raw import RawImage
from ..errors import ImageFormatError, RequestError
from ..format.geometry import (
    DEFAULT_CLUSTER_SIZE,
    DEFAULT_TABLE_SIZE,
    ENTRY,
    MIN_CLUSTER_SIZE,
    SECTOR,
    ZERO_CLUSTER,
    Bounds,
    Geometry,
)
from ..format.header import FEATURE_BACKING_FILE, KNOWN_FEATURES, MAGIC, Header
from ..format.table import TableIO, table_parts
from ..storage import Storage
from ..storage.copying import Copy, Piece
from ..units import KiB, MiB
from .header_fit import CLUSTER_SIZES, TABLE_SIZES, Fit, fit, l1_shaped, prove, raw_header
from .lost_tables import shape_of

GOOD, ZERO, LOST = "good", "zero", "lost"
GUESSED = "position guessed"
FROM_BACKING = "the backing file's data belongs here"

_DETECT = 4 * KiB  # bytes: zeros are looked for in units of this size


class Range(NamedTuple):
    """A piece of the device."""

    start: int  # bytes
    length: int  # bytes
    state: str  # GOOD, ZERO or LOST
    why: str  # what else is known; often empty


@dataclass
class Found:
    """What a salvage has to go by."""

    geometry: Geometry
    image_size: int  # bytes
    l1_offset: int | None  # bytes; None: no L1 table was found
    has_backing: bool
    tables: dict[int, int] = field(default_factory=dict)  # L1 index -> file offset of the L2 table, bytes
    whole: bool = False  # no entry is wrong
    certain: bool = True  # the L1 table is one, and the image's
    guessed: set[int] = field(default_factory=set)  # L1 indices whose table is not certain
    lost: set[int] = field(default_factory=set)  # L1 indices that had a table, which was not found
    notes: list[str] = field(default_factory=list)  # lines for people


def find_tables(
    storage: Storage, geometry: Geometry, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[int]:
    """File offsets (bytes) of what has the shape of an L2 table, the whole file through, without overlaps."""
    bounds = Bounds(geometry, 1, storage.size())
    offset = geometry.start_of_cluster(storage.next_data(bounds.start))
    while offset < bounds.end:
        progress(offset, bounds.end)
        shape = shape_of(storage, geometry, bounds, offset)
        shaped = shape is not None and shape.is_table
        if shaped:
            yield offset
        offset += geometry.table_bytes if shaped else geometry.cluster_size
        offset = geometry.start_of_cluster(storage.next_data(offset))


def guess_cluster_size(storage: Storage) -> int | None:
    """The commonest step between neighbours in what looks like pieces of tables; None without any."""
    size, page, step = storage.size(), MIN_CLUSTER_SIZE // ENTRY, MiB
    votes: Counter[int] = Counter()
    offset = storage.next_data(0) // MIN_CLUSTER_SIZE * MIN_CLUSTER_SIZE
    while offset < size:
        block = TableIO(storage).read(offset, step // ENTRY)
        for start in range(0, len(block), page):
            entries = [entry for entry in block[start : start + page] if entry > ZERO_CLUSTER]
            if len(entries) > 1 and not any(entry % MIN_CLUSTER_SIZE or entry >= size for entry in entries):
                votes.update(b - a for a, b in zip(entries, entries[1:]) if b - a in CLUSTER_SIZES)
        offset = storage.next_data(offset + step) // MIN_CLUSTER_SIZE * MIN_CLUSTER_SIZE
    return votes.most_common(1)[0][0] if votes else None


class Salvage:
    """A salvage of the image in `storage`; what the user knows is in bytes and clusters, 0 if it is not known.

    Raises ImageFormatError when there is nothing to go by, RequestError and StorageError.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        cluster_size: int = 0,
        table_size: int = 0,
        image_size: int = 0,
        guess: bool = False,  # an L1 table without entries has lost them
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        for name, value, allowed in (
            ("cluster size", cluster_size, CLUSTER_SIZES),
            ("table size", table_size, TABLE_SIZES),
        ):
            if value and value not in allowed:
                raise RequestError(f"{name} {value} is not a power of 2 from {allowed[0]} to {allowed[-1]}")
        if image_size % SECTOR:
            raise RequestError(f"image size {image_size} is not a multiple of {SECTOR}")
        self._storage = storage
        self._progress = progress
        self._cluster_size = cluster_size
        self._table_size = table_size
        self._image_size = image_size
        self._guess = guess

    # -- 1: the geometry -----------------------------------------------------------------------------------------

    def search(self) -> Found:
        """What there is to go by."""
        before = raw_header(self._storage)
        known = before.magic == MAGIC and not before.features & ~KNOWN_FEATURES
        found = self._from_header(before) if known else None
        if not known:
            before = Header(cluster_size=0, table_size=0)
        found = found or self._from_file(before)
        if self._image_size > found.geometry.max_image_size:
            raise RequestError(
                f"image size {self._image_size} is more than an image of these clusters and tables can have, "
                f"{found.geometry.max_image_size}"
            )
        self._find_tables(found)
        if not found.tables and not found.whole:
            raise ImageFormatError("nothing in the file looks like a table of a QED image")
        if not found.tables:
            found.notes.append("the image is whole, and empty")
        elif not found.image_size:
            found.image_size = self._mapped_end(found)
            found.notes.append(
                f"the size of the device is not known: taken as {found.image_size}, where its tables end"
            )
        return found

    def _with_what_is_known(self, header: Header) -> Header:
        return header._replace(
            cluster_size=self._cluster_size or header.cluster_size,
            table_size=self._table_size or header.table_size,
            image_size=self._image_size or header.image_size,
        )

    def _from_header(self, before: Header) -> Found | None:
        """By the header, where the tables agree with it, or with another one but for a field or two."""
        header = self._with_what_is_known(before)
        present = fit(self._storage, header)
        whole = present is not None and not present.found.corruptions
        best = present
        if present is None or not whole:
            best = prove(self._storage, header, present and present.found) or present
        if best is None or not (whole or best.sensible):
            return None
        header = best.header
        return Found(
            Geometry(header.cluster_size, header.table_size),
            header.image_size,
            header.l1_table_offset,
            header.has_backing,
            whole=whole and header == before,
            notes=best.changes(before),
        )

    def _from_file(self, before: Header) -> Found:
        """By the rest of the file; `before` has zeros where nothing is known."""
        header = self._with_what_is_known(before)
        notes = [] if before.cluster_size else ["no header was found: whether there was a backing file is not known"]
        cluster_size, table_size = header.cluster_size, header.table_size
        if cluster_size not in CLUSTER_SIZES:
            cluster_size = guess_cluster_size(self._storage) or DEFAULT_CLUSTER_SIZE
            notes.append(f"cluster_size is not known: taken as {cluster_size}")
        header = header._replace(features=header.features & FEATURE_BACKING_FILE, header_size=1, magic=MAGIC)
        fits = list(
            self._fitting_l1_tables(header, cluster_size, [table_size] if table_size in TABLE_SIZES else TABLE_SIZES)
        )
        if fits:
            found = min(fits, key=lambda found: found.unexplained)
            best = found.header
            notes.append(f"an L1 table is at {best.l1_table_offset:#x}, with table_size {best.table_size}")
            return Found(
                Geometry(cluster_size, best.table_size),
                best.image_size if best.image_size == header.image_size else 0,
                best.l1_table_offset,
                header.has_backing,
                certain=found.unexplained == 0,
                notes=notes,
            )
        if table_size not in TABLE_SIZES:
            table_size = DEFAULT_TABLE_SIZE
            notes.append(f"table_size is not known: taken as {table_size}")
        geometry = Geometry(cluster_size, table_size)
        image_size = header.image_size if header.image_size <= geometry.max_image_size else 0
        bounds = Bounds(geometry, 1, self._storage.size())
        believed = before.cluster_size == cluster_size and bounds.valid_table(header.l1_table_offset)
        place = header.l1_table_offset if believed else None
        return Found(geometry, image_size // SECTOR * SECTOR, place, header.has_backing, notes=notes)

    def _fitting_l1_tables(self, header: Header, cluster_size: int, table_sizes: Sequence[int]) -> Iterator[Fit]:
        """What could be the L1 table, at any table_size."""
        for table_size in table_sizes:
            geometry = Geometry(cluster_size, table_size)
            size = header.image_size if 0 < header.image_size <= geometry.max_image_size else geometry.max_image_size
            bounds = Bounds(geometry, 1, self._storage.size())
            for l1_offset in l1_shaped(self._storage, geometry, bounds):
                found = fit(
                    self._storage,
                    header._replace(
                        cluster_size=cluster_size,
                        table_size=table_size,
                        image_size=size - size % SECTOR,
                        l1_table_offset=l1_offset,
                    ),
                )
                if found is not None and found.sensible:
                    yield found

    # -- 2: the L2 tables ----------------------------------------------------------------------------------------

    def _find_tables(self, found: Found) -> None:
        geo, storage = found.geometry, self._storage
        bounds = Bounds(geo, 1, storage.size())
        if found.l1_offset is not None:
            for base, l1 in table_parts(storage, geo, found.l1_offset):
                for index, offset in enumerate(l1, base):
                    if not offset or (found.image_size and index << geo.l1_shift >= found.image_size):
                        continue
                    shape = shape_of(storage, geo, bounds, offset)
                    if shape is not None and shape.may_be_table:
                        found.tables[index] = offset
                    else:
                        found.lost.add(index)
            found.guessed.update(found.tables if not found.certain else self._overlapping(found))
            if not found.lost and (found.tables or (found.whole and not self._guess)):
                return
        use = ClusterUse(bounds.end >> geo.l2_shift)
        for offset in [*found.tables.values(), found.l1_offset or 0]:
            for part in range(0, geo.table_bytes, geo.cluster_size):
                use.claim((offset + part) >> geo.l2_shift, METADATA)
        for offset in found.tables.values():
            for _, entry in self._data(geo, offset):
                if bounds.valid_cluster(entry):
                    use.claim(entry >> geo.l2_shift, DATA)
        # What is another table's data was written by the guest, whatever it looks like.
        orphans = [
            offset
            for offset in find_tables(storage, geo, self._progress)
            if not any(use.marks(offset >> geo.l2_shift)) and not self._refers_to(geo, offset, use)
        ]
        if found.tables or found.lost:
            places = sorted(found.lost)
        else:
            found.l1_offset = None
            found.notes.append("no L1 table was found: the L2 tables are taken in the order of the file")
            places = list(range(len(orphans)))
        for index, offset in zip(places, orphans):
            found.tables[index] = offset
            found.lost.discard(index)
            found.guessed.add(index)

    def _overlapping(self, found: Found) -> Iterator[int]:
        """L1 indices of tables that overlap: the entry of one of them is wrong."""
        places = sorted([(offset, index) for index, offset in found.tables.items()] + [(found.l1_offset or 0, -1)])
        for (first, index), (second, other) in zip(places, places[1:]):
            if second - first < found.geometry.table_bytes:
                yield from (i for i in (index, other) if i >= 0)

    def _data(self, geometry: Geometry, offset: int) -> Iterator[tuple[int, int]]:
        """(index, entry) of the data clusters of the table at `offset`."""
        for base, table in table_parts(self._storage, geometry, offset):
            for i, entry in enumerate(table, base):
                if entry > ZERO_CLUSTER:
                    yield i, entry

    def _refers_to(self, geometry: Geometry, offset: int, use: ClusterUse) -> bool:
        """Does a table share data with those that are found?  Then it is an old copy, or no table."""
        return any(
            mark & DATA for _, entry in self._data(geometry, offset) for mark in use.marks(entry >> geometry.l2_shift)
        )

    def _mapped_end(self, found: Found) -> int:
        end = 0
        for index, offset in found.tables.items():
            for i, _ in self._data(found.geometry, offset):
                end = max(end, (index << found.geometry.l1_shift) + ((i + 1) << found.geometry.l2_shift))
        return end

    # -- 3: the bytes --------------------------------------------------------------------------------------------

    def ranges(self, found: Found) -> Iterator[tuple[Range, int]]:
        """The whole device in order: (range, offset of its bytes in the file, if it is good)."""
        geo, size = found.geometry, found.image_size
        nothing = FROM_BACKING if found.has_backing else ""
        pos = 0
        for index in sorted({*found.tables, *found.lost}):
            start, end = min(index << geo.l1_shift, size), min((index + 1) << geo.l1_shift, size)
            if pos < start:
                yield Range(pos, start - pos, ZERO, nothing), 0
            pos = end
            if start == end:
                continue
            if index in found.lost:
                yield Range(start, end - start, LOST, "no table"), 0
                continue
            yield from self._table_ranges(found, index, start, end, nothing)
        if pos < size:
            yield Range(pos, size - pos, ZERO, nothing), 0

    def _table_ranges(
        self, found: Found, index: int, start: int, end: int, nothing: str
    ) -> Iterator[tuple[Range, int]]:
        geo, length = found.geometry, self._storage.size()
        bounds = Bounds(geo, 1, length + geo.cluster_size - 1)  # the last cluster may be cut short
        guess = GUESSED if index in found.guessed else ""
        pos = start
        for base, table in table_parts(self._storage, geo, found.tables[index]):
            for i, entry in enumerate(table, base):
                at = start + (i << geo.l2_shift)
                if not entry or at >= end:
                    continue
                if pos < at:
                    yield Range(pos, at - pos, ZERO, nothing), 0
                n = min(geo.cluster_size, end - at)
                pos = at + n
                if entry == ZERO_CLUSTER:
                    yield Range(at, n, ZERO, guess), 0
                elif not bounds.valid_cluster(entry):
                    yield Range(at, n, LOST, f"entry {entry:#x}"), 0
                else:
                    there = min(n, length - entry)
                    yield Range(at, there, GOOD, guess), entry
                    if there < n:
                        yield Range(at + there, n - there, LOST, "past the end of the file"), 0
        if pos < end:
            yield Range(pos, end - pos, ZERO, nothing), 0

    def write(self, found: Found, target: RawImage, fresh: bool = True) -> list[Range]:
        """Write the device to `target`, zeros for what is lost; `fresh`: it is zeros now.  The ranges, joined."""
        joined: list[Range] = []

        def pieces() -> Iterator[Piece]:
            for piece, offset in self.ranges(found):
                yield Piece(piece.start, piece.length, self._storage if piece.state == GOOD else None, offset)
                if joined and joined[-1][2:] == piece[2:]:
                    joined[-1] = joined[-1]._replace(length=joined[-1].length + piece.length)
                else:
                    joined.append(piece)

        copy = Copy(target, fresh=fresh, detect=_DETECT, progress=lambda pos: self._progress(pos, found.image_size))
        copy.run(pieces())
        target.flush()
        return joined
