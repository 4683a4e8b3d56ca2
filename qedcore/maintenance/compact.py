"""Moving clusters: pack() fills the holes of a file from its end; compact() also puts everything in guest order.

Units and slots are those of layout.py, and move.py moves them.

    before    | header | B |   | L1 | A | leak | L2 | C |
    pack      | header | B | C | L1 | A | L2 |
    compact   | header | L1 | L2 | A | B | C |

I1. NEED_CHECK is set meanwhile (QEDImage.maintenance).  A crash leaves leaks at most, and the next run continues.
I2. Space is given back before any is needed: first the free tail, then, where holes can be punched, all leaks, and
    with each window what it has left.
I3. The extra space in the file is at most one window and one copy of the L2 tables.  With less, windows get smaller.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import suppress
from typing import Callable

from ..engine.image import Metadata, QEDImage
from ..errors import CorruptImageError
from ..format.geometry import ENTRY, SECTOR, UNALLOCATED, ZERO_CLUSTER, is_marked
from ..format.table import Table, empty, table_parts
from ..units import MiB
from .layout import FREE, Layout, is_table
from .move import COPY_STEP, Move, Mover, NoSpaceError

WINDOW = 32 * MiB  # bytes rewritten between flushes: enough for them not to matter


class Arrangement:
    """Decides what goes where, in windows of some slots."""

    def __init__(
        self, metadata: Metadata, layout: Layout, progress: Callable[[int], None] = lambda done: None
    ) -> None:
        self._metadata = metadata
        self._layout = layout
        self._units = layout.units
        self._mover = Mover(metadata, layout)
        self._progress = progress  # told the bytes of the file that are in order
        self._window = max(1, WINDOW >> metadata.geometry.l2_shift)  # slots
        self._next = layout.used  # slot: from here on, free runs are sought
        self._below = layout.used  # slot: below here, room for tables is sought (pack)
        self._done = 0  # bytes of the file that are in order

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
        end = self._layout.end() << metadata.geometry.l2_shift
        metadata.storage.truncate(end)
        metadata.bounds.end = end
        if metadata.allocator is not None:
            metadata.allocator.restart()
        metadata.storage.flush()

    def give_back(self) -> None:
        """Give back the space of all that is free.  It stays in the file, but for the tail, until something moves."""
        self.cut()
        for slot, n in self._layout.free_runs():
            if not self._mover.punch(slot, n):
                break  # nor the others

    def _with_less_space(self, work: Callable[[], None]) -> None:
        """Do `work`, again with smaller windows while there is no space for these.  Raises NoSpaceError."""
        while True:
            try:
                work()
                return
            except NoSpaceError:
                self.give_back()
                if self._window == 1:
                    raise
                self._window //= 2

    # -- compact -----------------------------------------------------------------------------------------------

    def compact(self) -> None:
        """Put all units in order: clear each window of the file, then fill it.

        Raises NoSpaceError: then the file is sound, as small as it can get, and not in order.
        """
        window = self._window
        self.give_back()
        try:
            self._compact()
            return
        except NoSpaceError:
            pass
        # What lies past the end of a dense file may be in the way there.
        with suppress(NoSpaceError):
            self.pack(tables=False)
        self.give_back()
        self._window = window
        try:
            self._with_less_space(self._compact)
        except NoSpaceError:
            with suppress(NoSpaceError):
                self.pack(tables=False)
            raise

    def _compact(self) -> None:
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
            self._done = max(self._done, end << self._metadata.geometry.l2_shift)  # perhaps it is done again
            self._progress(self._done)

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

    def pack(self, *, tables: bool = True, stop: Callable[[], bool] = lambda: False) -> None:
        """Move what lies past the end of a dense file into the holes before it, from the end on.

        With `tables`, where these lie too close to each other for one to fit, everything is put in order.  `stop` is
        asked between windows whether to leave the rest.  Raises NoSpaceError: the rest is where it was.
        """
        self.cut()
        self._with_less_space(lambda: self._pack(tables, stop))

    def _pack(self, tables: bool, stop: Callable[[], bool]) -> None:
        layout = self._layout
        self._next = layout.used
        n = self._metadata.geometry.table_size
        rooms = [
            slot + at
            for slot, free in layout.free_runs()
            for at in range(0, min(free, layout.used - slot) - n + 1, n)
        ]
        stray = dict.fromkeys(unit for _, unit in layout.strays() if is_table(unit))
        left = list(self._mover.find(stray))
        for _ in range(2):  # what one table has left may be room for another
            self._below = layout.used
            todo, left = left, []
            for unit, slot in todo:
                if stop():
                    return
                target = rooms.pop() if rooms else self._room_for_table()
                if target is not None:
                    self._mover.move([Move(unit, slot, target)])
                elif not self._shift_table(unit, slot):
                    left.append((unit, slot))
        if left and tables:  # start from a clean slate
            self._compact()
            return
        data = [(slot, unit) for slot, unit in layout.strays() if not is_table(unit)]
        holes = (slot for slot in range(layout.first, layout.used) if self._units[slot] == FREE)
        while data and not stop():
            last = data[-self._window :]
            del data[-self._window :]
            self._mover.move([Move(unit, slot, next(holes)) for slot, unit in last])
        if left and not stop():
            self._slide(stop)

    def _slide(self, stop: Callable[[], bool]) -> None:
        """Fill holes that are too small for a table: with the last data, then by moving down the tables above."""
        layout, n = self._layout, self._metadata.geometry.table_size
        used = list(layout.units.items(layout.first))
        data = [(slot, unit) for slot, unit in used if not is_table(unit)]
        holes = [slot for start, length in layout.free_runs() for slot in range(start, start + length)]
        moves = [Move(unit, slot, hole) for hole, (slot, unit) in zip(holes, reversed(data)) if hole < slot]
        while moves and not stop():
            self._mover.move(moves[: self._window])
            del moves[: self._window]
        tables = {unit: slot for slot, unit in reversed(used) if is_table(unit)}  # their first slots, from the end on
        for unit, slot in reversed(list(tables.items())):
            target = slot
            while target > layout.first and self._units[target - 1] == FREE:
                target -= 1
            if target == slot or stop():
                continue
            if slot - target < n:  # its old place and its new one overlap: it goes past the end of the file first
                between = self._free_run(n)
                self._mover.move([Move(unit, slot, between)])
                slot = between
            self._mover.move([Move(unit, slot, target)])

    def _shift_table(self, unit: int, slot: int) -> bool:
        """Move a table at the end of a dense file down, so that it ends there: False if other tables prevent it.

        Its old place and its new one overlap, so it goes past the end of the file first.
        """
        n = self._layout.size_of(unit)
        target = self._layout.used - n
        if slot >= self._layout.used or any(is_table(self._units[at]) for at in range(target, slot)):
            return False
        between = self._free_run(n)
        self._mover.move([Move(unit, slot, between)])
        away = [(self._units[at], at) for at in range(target, slot) if self._units[at] != FREE]
        self._mover.move([Move(data, at, self._free_run(1)) for data, at in away])
        self._mover.move([Move(unit, between, target)])
        return True

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
        if offset and not is_marked(offset):
            if not metadata.bounds.valid_table(offset):
                raise CorruptImageError(f"L1 entry {index} points to {offset:#x}, not a table: repair it first")
            found = _clear_entries(metadata, offset, entry, only_look)
        index += 1
    return _clear_entries(metadata, l1_offset, index, only_look) or found


def _clear_entries(metadata: Metadata, offset: int, first: int, only_look: bool) -> bool:
    """Clear the entries of the table at `offset` from number `first` on, or `only_look`; True if there were any."""
    geo = metadata.geometry
    found = False
    for base, table in table_parts(metadata.storage, geo, offset):
        start = max(first - base, 0)
        if start >= geo.part_entries:
            continue
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
        for base, table in table_parts(metadata.storage, geo, offset):
            if zeros:
                for i, entry in enumerate(table):
                    if entry > ZERO_CLUSTER and not is_marked(entry) and _is_zero(metadata, entry):
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
        if metadata.storage.next_data(at) >= at + step:
            continue
        metadata.storage.pread_into(data, at)
        if data != zeros:
            return False
    return True


def pack(metadata: Metadata) -> None:
    """End the file right after as many clusters as are in use, with few moves.  What was unlinked is durable.

    For maintenance that frees clusters.  Without space to move anything, some stay free inside the file.  Raises
    CorruptImageError before anything is moved, and StorageError.
    """
    arrangement = Arrangement(metadata, Layout(metadata))
    with suppress(NoSpaceError):
        arrangement.pack()
    arrangement.cut()
    metadata.reload()


def compact(image: QEDImage, *, zeros: bool = False, progress: Callable[[int], None] = lambda done: None) -> bool:
    """Rewrite an image in place: dense, in guest order, without leaks.  No request may be in flight.

    With `zeros`, data clusters full of zeros are dropped; entries past the end of the device and empty tables always
    are.  `progress` is told the bytes of the file that are done.  It may be interrupted at any time: the image stays
    as it was for its guest, and the next run continues.  False: all that was free is given back, but there was no
    space to put the rest in order.  Raises CorruptImageError before anything is changed, and StorageError.
    """
    layout = Layout(image.metadata())  # before anything is marked as changed: this is where most errors come
    with image.maintenance() as metadata:
        dropped = clear_past_end(metadata, image.size)
        if _drop_useless(metadata, layout, zeros) or dropped:
            metadata.storage.flush()  # nothing leads to what was dropped: from here on it may be overwritten
            layout = Layout(metadata)
        arrangement = Arrangement(metadata, layout, progress)
        in_order = True
        try:
            arrangement.compact()
        except NoSpaceError:
            in_order = False
        arrangement.cut()
        metadata.reload()
    return in_order
