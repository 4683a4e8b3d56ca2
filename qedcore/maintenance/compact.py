"""Moving clusters: pack() fills the holes of a file from its end; compact() also puts everything in guest order.

A unit is what moves: the L1 table, an L2 table (table_size clusters each), or a data cluster.  A slot is a cluster
of the file, by its number.

    before    | header | B |   | L1 | A | leak | L2 | C |
    pack      | header | B | C | L1 | A | L2 |
    compact   | header | L1 | L2 | A | B | C |

I1. A unit is copied to free slots and made durable there, then linked there and that made durable, and only then
    are its old slots free.  So whenever a crash comes, every link leads to a whole copy.
I2. NEED_CHECK is set meanwhile (QEDImage.maintenance).  A crash leaves leaks at most, and the next run continues.
I3. The extra space in the file is at most one window and one copy of the L2 tables.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Callable, NamedTuple

from ..engine.image import Metadata, QEDImage
from ..errors import CorruptImageError
from ..format.geometry import ENTRY, SECTOR, UNALLOCATED, ZERO_CLUSTER
from ..format.table import Table, empty
from ..units import MiB

WINDOW = 32 * MiB  # bytes rewritten between flushes: enough for them not to matter
COPY_STEP = 1 * MiB  # bytes copied with one read and one write; larger buffers cost more in page faults
TIDY_BYTES = 256 * MiB  # moved at most when an image is closed: a second or two
TIDY_CLUSTERS = 1 << 20  # of a file whose layout is looked at for that
_CHUNK_BITS = 10  # slots per chunk of a SlotMap: 8 KiB each

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


class SlotMap:
    """Which unit is in each slot, taking memory only where there are units."""

    def __init__(self) -> None:
        self._chunks: dict[int, Table] = {}

    def __getitem__(self, slot: int) -> int:
        chunk = self._chunks.get(slot >> _CHUNK_BITS)
        return chunk[slot & ((1 << _CHUNK_BITS) - 1)] if chunk is not None else FREE

    def put(self, slot: int, n: int, unit: int) -> None:
        """`unit`, or FREE, is in the n slots from `slot` on."""
        for at in range(slot, slot + n):
            chunk = self._chunks.get(at >> _CHUNK_BITS)
            if chunk is None:
                chunk = self._chunks[at >> _CHUNK_BITS] = empty(1 << _CHUNK_BITS)
            chunk[at & ((1 << _CHUNK_BITS) - 1)] = unit

    def items(self, first: int) -> Iterator[tuple[int, int]]:
        """(slot, unit) of the slots in use from `first` on, in order."""
        for number in sorted(self._chunks):
            for slot, unit in enumerate(self._chunks[number], number << _CHUNK_BITS):
                if unit != FREE and slot >= first:
                    yield slot, unit


class Move(NamedTuple):
    """One unit's way; slots."""

    unit: int
    source: int
    target: int


class Layout:
    """Where every unit of a sound image is.  Raises CorruptImageError if the image is damaged, and StorageError."""

    def __init__(self, metadata: Metadata) -> None:
        self._tables = metadata.tables
        self._geometry = geo = metadata.geometry
        self._bounds = metadata.bounds
        self.first = max(1, metadata.bounds.start >> geo.l2_shift)  # slot: the first after the header area
        self.used = self.first  # slots in use, with the header area: the length of a dense file
        self.units = SlotMap()
        self.l2_offsets: dict[int, int] = {}  # L1 index -> bytes
        self._place(L1_TABLE, metadata.header.header.l1_table_offset)
        for base, l1 in self._parts(lambda: metadata.header.header.l1_table_offset):
            for index, offset in enumerate(l1, base):
                if offset:
                    self._place(l2_unit(index), offset)
                    self.l2_offsets[index] = offset
        for index in self.l2_offsets:
            for unit, offset in self.data_units(index):
                self._place(unit, offset)

    def size_of(self, unit: int) -> int:
        """Slots."""
        return self._geometry.table_size if is_table(unit) else 1

    def data_units(self, index: int) -> Iterator[tuple[int, int]]:
        """(unit, file offset) of the data clusters of one L2 table, in guest order.

        The table may move meanwhile; the offsets are then those from before.
        """
        first = index * self._geometry.table_entries
        for base, table in self._parts(lambda: self.l2_offsets[index]):
            for cluster, entry in enumerate(table, first + base):
                if entry > ZERO_CLUSTER:
                    yield data_unit(cluster), entry

    def in_order(self) -> Iterator[int]:
        """All units, in the order of a compact file."""
        yield L1_TABLE
        for index in sorted(self.l2_offsets):
            yield l2_unit(index)
            for unit, _ in self.data_units(index):
                yield unit

    def _parts(self, offset: Callable[[], int]) -> Iterator[tuple[int, Table]]:
        """(index of the first entry, part) of the parts of a table that are not empty."""
        geo = self._geometry
        for base in range(0, geo.table_entries, geo.part_entries):
            table = self._tables.read(offset() + base * ENTRY, geo.part_entries)
            if table.count(UNALLOCATED) != len(table):
                yield base, table

    def _place(self, unit: int, offset: int) -> None:
        n = self.size_of(unit)
        slot = offset >> self._geometry.l2_shift
        valid = self._bounds.valid_table(offset) if is_table(unit) else self._bounds.valid_cluster(offset)
        if not valid or any(self.units[at] != FREE for at in range(slot, slot + n)):
            found = "refers twice to clusters" if valid else "has an invalid entry for clusters"
            raise CorruptImageError(f"damaged image: it {found} at {offset:#x}: repair it first (check -r all)")
        self.units.put(slot, n, unit)
        self.used += n


class Mover:
    """Moves units (I1); `layout` follows."""

    def __init__(self, metadata: Metadata, layout: Layout) -> None:
        self._metadata = metadata
        self._storage = metadata.storage
        self._shift = metadata.geometry.l2_shift
        self._entries = metadata.geometry.table_entries
        self.layout = layout

    def move(self, moves: list[Move]) -> None:
        """Move units to free slots.  Tables first: links are written to where a table is."""
        for batch in (
            [move for move in moves if move.unit == L1_TABLE],
            [move for move in moves if move.unit != L1_TABLE and is_table(move.unit)],
            [move for move in moves if not is_table(move.unit)],
        ):
            if batch:
                self._move(batch)

    def _move(self, batch: list[Move]) -> None:
        n = self.layout.size_of(batch[0].unit)
        self._copy(batch, n)
        self._storage.flush()  # the copies, before anything leads to them
        self._link(batch)
        self._storage.flush()  # the links: from here on nothing leads to the old places
        for move in batch:
            self.layout.units.put(move.source, n, FREE)
            self.layout.units.put(move.target, n, move.unit)
            if move.unit != L1_TABLE and is_table(move.unit):
                self.layout.l2_offsets[move.unit // 2 - 1] = move.target << self._shift

    def _copy(self, batch: list[Move], n: int) -> None:
        """Copy units of n slots; those that stay side by side go together."""
        runs: list[list[int]] = []  # source, target, length: slots
        for _, source, target in sorted(batch, key=lambda move: move.source):
            if runs and (source, target) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
                runs[-1][2] += n
            else:
                runs.append([source, target, n])
        for run in runs:
            source, target, length = (slots << self._shift for slots in run)
            for done in range(0, length, COPY_STEP):
                data = bytearray(min(COPY_STEP, length - done))
                self._storage.pread_into(data, source + done)
                self._storage.pwrite(data, target + done)

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


class Arrangement:
    """Decides what goes where, in windows of some slots."""

    def __init__(self, metadata: Metadata, layout: Layout, progress: Callable[[int], None]) -> None:
        self._metadata = metadata
        self._layout = layout
        self._units = layout.units
        self._mover = Mover(metadata, layout)
        self._progress = progress  # told the bytes of the file that are in order
        self._window = max(1, WINDOW >> metadata.geometry.l2_shift)  # slots
        self._next = layout.used  # slot: from here on, free runs are sought
        self._below = layout.used  # slot: below here, room for tables is sought (pack)

    def _free_run(self, n: int) -> int:
        """n free slots in a row, past the end of the dense file; each is given out once."""
        run = 0
        while run < n:
            run = run + 1 if self._units[self._next] == FREE else 0
            self._next += 1
        return self._next - n

    def cut(self) -> None:
        """Give back what follows the last unit.  All links are durable and nothing leads there any more."""
        metadata = self._metadata
        end = self._layout.used << metadata.geometry.l2_shift
        metadata.storage.truncate(end)
        metadata.bounds.end = end
        if metadata.allocator is not None:
            metadata.allocator.restart()
        metadata.storage.flush()

    # -- compact -----------------------------------------------------------------------------------------------

    def compact(self) -> None:
        """Put all units in order: clear each window of the file, then fill it."""
        layout = self._layout
        spare_end = layout.used + self._window
        # Free slots for what is in the way, to be taken from the end: first past the dense file, then high holes.
        spare = array("Q", (slot for slot in range(layout.first, spare_end) if self._units[slot] == FREE))
        self._next = spare_end
        start = layout.first
        for places in self._windows(start):
            end = start + sum(map(layout.size_of, places))
            away = self._clear(start, end, places, spare)
            self._mover.move(away)
            fill = [Move(unit, slot, places[unit]) for unit, slot in self._mover.find(places) if slot != places[unit]]
            self._mover.move(fill)
            for unit, source, _ in away + fill:
                spare.extend(range(max(source, end), source + layout.size_of(unit)))
            start = end
            self._progress(end << self._metadata.geometry.l2_shift)

    def _windows(self, slot: int) -> Iterator[dict[int, int]]:
        """Unit -> slot where it belongs, for one window after the other from `slot` on."""
        places: dict[int, int] = {}
        start = slot
        for unit in self._layout.in_order():
            places[unit] = slot
            slot += self._layout.size_of(unit)
            if slot - start >= self._window:
                yield places
                places, start = {}, slot
        if places:
            yield places

    def _clear(self, start: int, end: int, places: dict[int, int], spare: Table) -> list[Move]:
        """The moves that free [start, end) of units that belong elsewhere."""
        moves = []
        slot = start
        while slot < end:
            unit = self._units[slot]
            n = self._layout.size_of(unit)  # 1 for a free slot
            if unit != FREE and places.get(unit) != slot:
                target = self._free_run(n) if n > 1 or is_table(unit) else self._spare_slot(end, spare)
                self._units.put(target, n, unit)
                moves.append(Move(unit, slot, target))
            slot += n
        return moves

    def _spare_slot(self, end: int, spare: Table) -> int:
        """A free slot past `end`."""
        while spare:
            slot = spare.pop()
            if slot >= end and self._units[slot] == FREE:
                return slot
        return self._free_run(1)

    # -- pack --------------------------------------------------------------------------------------------------

    def pack(self) -> None:
        """Move what lies past the end of a dense file into the holes before it."""
        layout = self._layout
        stray = [unit for slot, unit in self._units.items(layout.used) if is_table(unit)]
        for unit, slot in list(self._mover.find(dict.fromkeys(stray))):
            target = self._room_for_table()
            if target is None:  # tables lie too close to each other: start from a clean slate
                self.compact()
                return
            self._mover.move([Move(unit, slot, target)])
        holes = (slot for slot in range(layout.first, layout.used) if self._units[slot] == FREE)
        moves: list[Move] = []
        # A list: the map changes with each batch.
        for slot, unit in list(self._units.items(layout.used)):
            moves.append(Move(unit, slot, next(holes)))
            if len(moves) == self._window:
                self._mover.move(moves)
                moves = []
        self._mover.move(moves)

    def _room_for_table(self) -> int | None:
        """A run of slots before the end of a dense file, whose data was moved away; None where tables prevent it."""
        n = self._metadata.geometry.table_size
        run, slot = 0, self._below
        while run < n:
            if slot == self._layout.first:
                return None
            slot -= 1
            run = 0 if is_table(self._units[slot]) else run + 1
        self._below = slot
        away = []
        for at in range(slot, slot + n):
            if self._units[at] != FREE:
                away.append(Move(self._units[at], at, self._free_run(1)))
        self._mover.move(away)
        return slot


def clear_past_end(metadata: Metadata, size: int, only_look: bool = False) -> bool:
    """Clear all entries for clusters past a device of `size` bytes; True if there were any.  Does not flush.

    Their clusters become leaks.  With `only_look` nothing is changed.  Raises CorruptImageError and StorageError.
    """
    geo = metadata.geometry
    index, entry = divmod(geo.clusters(size), geo.table_entries)
    l1_offset = metadata.header.header.l1_table_offset
    found = False
    if entry and index < geo.table_entries:
        offset = metadata.tables.read(l1_offset + index * ENTRY, 1)[0]
        if offset:
            if not metadata.bounds.valid_table(offset):
                raise CorruptImageError(f"L1 entry {index} points to {offset:#x}, not a table: repair it first")
            found = _clear_entries(metadata, offset, entry, only_look)
        index += 1
    return _clear_entries(metadata, l1_offset, index, only_look) or found


def _clear_entries(metadata: Metadata, offset: int, first: int, only_look: bool) -> bool:
    """Clear the entries of the table at `offset` from number `first` on, or `only_look`; True if there were any."""
    geo = metadata.geometry
    found = False
    for base in range(0, geo.table_entries, geo.part_entries):
        start = max(first - base, 0)
        if start >= geo.part_entries:
            continue
        table = metadata.tables.read(offset + base * ENTRY, geo.part_entries)
        rest = table[start:]
        if rest.count(UNALLOCATED) != len(rest):
            found = True
            if not only_look:
                metadata.tables.write(offset + base * ENTRY, table, start, empty(len(rest)))
    return found


def _drop_useless(metadata: Metadata, layout: Layout, zeros: bool) -> bool:
    """Unlink empty L2 tables and, with `zeros`, data clusters full of zeros; True if there were any.

    Does not flush.  What is unlinked reads the same before and after.
    """
    geo, tables, found = metadata.geometry, metadata.tables, False
    nothing, zero = empty(1), empty(1)
    if metadata.requests.backing is not None:
        zero[0] = ZERO_CLUSTER  # hides what is below
    for index, offset in layout.l2_offsets.items():
        used = False
        for base in range(0, geo.table_entries, geo.part_entries):
            table = tables.read(offset + base * ENTRY, geo.part_entries)
            if zeros:
                for i, entry in enumerate(table):
                    if entry > ZERO_CLUSTER and _is_zero(metadata, entry):
                        table[i] = zero[0]
                        tables.write(offset + base * ENTRY, table, i, zero)
                        found = True
            used = used or table.count(UNALLOCATED) != len(table)
        if not used:
            at = metadata.header.header.l1_table_offset + index * ENTRY
            sector = tables.read(at - at % SECTOR, SECTOR // ENTRY)
            tables.write(at - at % SECTOR, sector, at % SECTOR // ENTRY, nothing)
            found = True
    return found


def _is_zero(metadata: Metadata, offset: int) -> bool:
    size = metadata.geometry.cluster_size
    step = min(size, COPY_STEP)
    data, zeros = bytearray(step), bytes(step)
    for at in range(offset, offset + size, step):
        metadata.storage.pread_into(data, at)
        if data != zeros:
            return False
    return True


def pack(metadata: Metadata) -> None:
    """End the file right after as many clusters as are in use, with few moves.  What was unlinked is durable.

    For maintenance that frees clusters.  Raises CorruptImageError before anything is moved, and StorageError.
    """
    arrangement = Arrangement(metadata, Layout(metadata), lambda done: None)
    arrangement.pack()
    arrangement.cut()
    metadata.reload()


def tidy(image: QEDImage) -> int:
    """Before closing: fill the holes that freeing has left in the file, from its end, if that is little work.

    Returns the clusters that stay free inside the file, leaks to the next who opens it.  No request may be in
    flight.  Raises as pack.
    """
    shift = image.geometry.l2_shift
    small = image.storage.size() >> shift <= TIDY_CLUSTERS
    holes = image.holes(search=small)
    if not holes or not small or holes << shift > TIDY_BYTES:
        return holes
    with image.maintenance() as metadata:
        pack(metadata)
    return 0


def compact(image: QEDImage, *, zeros: bool = False, progress: Callable[[int], None] = lambda done: None) -> None:
    """Rewrite an image in place: dense, in guest order, without leaks.  No request may be in flight.

    With `zeros`, data clusters full of zeros are dropped; entries past the end of the device and empty tables always
    are.  `progress` is told the bytes of the file that are done.  It may be interrupted at any time: the image stays
    as it was for its guest, and the next run continues.  Raises CorruptImageError before anything is changed,
    and StorageError.
    """
    with image.maintenance() as metadata:
        layout = Layout(metadata)
        dropped = clear_past_end(metadata, image.size)
        if _drop_useless(metadata, layout, zeros) or dropped:
            metadata.storage.flush()  # nothing leads to what was dropped: from here on it may be overwritten
            layout = Layout(metadata)
        arrangement = Arrangement(metadata, layout, progress)
        arrangement.compact()
        arrangement.cut()
        metadata.reload()
