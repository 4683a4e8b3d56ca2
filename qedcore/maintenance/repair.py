"""What `qed check -r` does: repairs that lose nothing that was intact, in an order that a crash cannot hurt.

    1  a header field that the tables disprove is corrected (header_fit.prove)
    2  entries that cannot be right are cleared, or corrected where one of their low bits is all that is wrong
    3  tables that overlap other tables or data are copied to the end of the file, and linked there
    4  data clusters that are referenced twice are copied likewise: every guest range keeps its bytes
    5  leaks are given back: clusters move down, the file gets shorter (compact.pack)
    6  NEED_CHECK is cleared

I1. What a damaged entry refers to is never written to in place: the cluster may be another's.
I2. All of step 2 is durable before the file grows: an entry that pointed past the end of the file must not come to
    point at a copy.  (Where I1 forbids that, it may, after a crash: the damaged range then reads something else.)
I3. A copy is durable before the entry that leads to it is written, so a crash shows the old cluster or the whole
    copy.  Copies that nothing leads to yet are leaks, which the next repair finds.
I4. NEED_CHECK is cleared last, when everything is durable and a scan has found no damage (QEMU clears it first).
I5. Leaks are given back only when there is no damage left: they may hold what a damaged entry meant.
I6. A leak holds old data of any guest range: what it looks like proves nothing.  So it is not linked for that; but
    while it may be a table, damage to the L1 table is kept, which may hide the table's place, unless `force`d.
I7. What a valid entry leads to is what its range reads, whatever it looks like, so it is kept: as a copy, if it is
    another's as well.

The caller makes sure that nobody else uses the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple

from ..check.cluster_use import DATA, METADATA, SHARED, ClusterUse
from ..check.scan import Damage, Scan, ScanResult
from ..engine.image import Metadata
from ..errors import ImageFormatError
from ..format.geometry import (
    ENTRY,
    SECTOR,
    UNALLOCATED,
    ZERO_CLUSTER,
    Bounds,
    Geometry,
    is_marked,
    mark_dangling,
    round_up,
)
from ..format.header import FEATURE_NEED_CHECK, Header, HeaderUpdater, read_header
from ..format.table import TableIO, table_parts
from ..storage import Storage, read_from_disk
from ..units import MiB
from .compact import pack
from .header_fit import Say, correct_header, correct_invalid_header, prove
from .lost_tables import looks_like_table, orphans

KEPT = 16  # in ClusterUse.map: of a table that stays where it is
_COPY_STEP = 4 * MiB  # bytes copied with one read and one write
_BATCH = 64 * MiB  # bytes copied between flushes
_ROUNDS = 4  # more of the same, at most; one has always been enough
_WRONG_L1_ENTRIES = 8  # so many may be damage, even if fewer are right
_CANDIDATE, _DISPUTED = 32, 64  # in ClusterUse.map: of a cluster that one damaged entry may mean, or several

_NOBODY: Any = None  # in the place of what an open image has


@dataclass
class Outcome:
    """What a repair has found and done."""

    first: ScanResult = field(default_factory=ScanResult)
    last: ScanResult = field(default_factory=ScanResult)
    corruptions_fixed: int = 0
    leaks_fixed: int = 0  # clusters
    need_check_cleared: bool = False


class Shared(NamedTuple):
    """An entry that refers to a cluster which is another's."""

    at: int  # bytes: file offset of the entry
    value: int  # of the entry
    pos: int  # bytes: guest position


class _Unused(Metadata):
    """The metadata of an image that nobody has open: there is nothing to be read again."""

    def reload(self) -> None:
        pass


class Repair:
    """A repair of the image in `storage`.  Raises QEDError; what was done by then stays, and is no worse than before.

    `say` takes one-line notices of what is wrong and what is done about it; `rehearse`: data is not copied, and
    clusters are not moved (for a Rehearsal, which cannot hold them); `force`: tables that nothing proves the place of
    are given up.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        say: Say = lambda line: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        rehearse: bool = False,
        force: bool = False,
        vectors: bool | None = None,
    ) -> None:
        self._storage = storage
        self._tables = TableIO(storage)
        self._say = say
        self._progress = progress
        self._rehearse = rehearse
        self._force = force
        self._kept_lost = False  # that there are lost tables was said
        self._vectors = vectors
        self._shared: list[Shared] = []
        self.outcome = Outcome()

    def run(self, everything: bool) -> Outcome:
        """-r all, or -r leaks."""
        read_from_disk(self._storage)
        headers = correct_invalid_header(self._storage, self._say) if everything else 0
        header, geometry, bounds = read_header(self._storage)
        self._open(header, geometry, bounds)
        if header.l1_table_offset < geometry.cluster_size:
            raise ImageFormatError("the L1 table at 0x0 overlaps the header: such an image cannot be repaired")
        damaged: set[tuple[int, int, int]] = set()
        outcome = self.outcome
        scan = self._scan(lambda damage: self._note(damage, damaged))
        if self._doubt_header(scan, everything):
            headers += 1
            damaged.clear()
            scan = self._scan(lambda damage: self._note(damage, damaged))
        outcome.first = outcome.last = scan.result
        if scan.result.check_errors:
            return outcome
        self._header.clear_unknown_autoclear()
        if scan.result.corruptions and everything:
            self._refuse_wrong_l1_table()
            for _ in range(_ROUNDS):
                if self._keeps_l1(scan.use):
                    break
                scan = self._correct(scan, damaged)
                if not scan.result.corruptions:
                    break
                # A table that another one overlapped may stay where it is once the other was moved; its own damage
                # comes to light only then.
                damaged.clear()
                self._bounds = self._bounds_now()  # with the copies
                scan = self._scan(lambda damage: self._note(damage, damaged))
        if scan.result.corruptions:
            if scan.result.leaks:
                self._say("leaked clusters are left alone: they may hold what a damaged entry meant")
        elif not self._keeps_leaks(scan.use):
            scan = self._reclaim(scan)
        outcome.last = scan.result
        outcome.corruptions_fixed = headers + max(outcome.first.corruptions - outcome.last.corruptions, 0)
        self._settle()
        return outcome

    def _open(self, header: Header, geometry: Geometry, bounds: Bounds) -> None:
        self._header = HeaderUpdater(self._storage, header)
        self._geometry = geometry
        self._bounds = bounds

    def _scan(self, report: Callable[[Damage], None] = lambda damage: None) -> Scan:
        scan = Scan(
            self._storage,
            self._geometry,
            Bounds(self._geometry, self._header.header.header_size, self._storage.size()),
            self._header.header.l1_table_offset,
            report=report,
            progress=self._progress,
            vectors=self._vectors,
        )
        scan.run()
        return scan

    def _settle(self) -> None:
        """Clear NEED_CHECK if the image is sound."""
        self._storage.flush()  # all of the repair, before the flag that asks for it (I4)
        last = self.outcome.last
        if self._header.header.need_check and not last.corruptions and not last.check_errors:
            self._header.set_features(clear=FEATURE_NEED_CHECK)
            self._storage.flush()
            self.outcome.need_check_cleared = True

    # -- 1: the header -------------------------------------------------------------------------------------------

    def _doubt_header(self, scan: Scan, everything: bool) -> bool:
        """Is it the header that is wrong, and not the tables?  Then, for -r all, correct it: True."""
        if not scan.result.corruptions:
            return False
        proven = prove(self._storage, self._header.header, scan.result)
        if proven is None:
            return False
        if not everything:
            raise ImageFormatError(f"{'; '.join(proven.changes(self._header.header))}: use -r all")
        correct_header(self._storage, self._header.header, proven, self._say)
        self._open(*read_header(self._storage))
        return True

    def _refuse_wrong_l1_table(self) -> None:
        """Raise ImageFormatError if the L1 table is mostly garbage: then something else is there."""
        l1_offset, right, wrong = self._header.header.l1_table_offset, 0, 0
        for _, offset in self._l1_entries():
            possible = self._bounds.valid_table(offset) and abs(offset - l1_offset) >= self._geometry.table_bytes
            right, wrong = right + possible, wrong + (not possible)
        if wrong > max(right, _WRONG_L1_ENTRIES):
            raise ImageFormatError(
                f"QED table offset is invalid: {wrong} of {right + wrong} entries at {l1_offset:#x} are impossible, "
                f"so nothing was changed: try qed salvage"
            )

    # -- 2 to 4: entries, tables, data ---------------------------------------------------------------------------

    def _correct(self, scan: Scan, damaged: set[tuple[int, int, int]]) -> Scan:
        if self._correct_l1(scan.use):  # tables come and go
            damaged.clear()
            scan = self._scan(lambda damage: self._note(damage, damaged))
        self._correct_l2(scan.use, damaged)
        self._storage.flush()  # before anything grows (I2)
        self._progress(0, 1)
        scan = self._scan()
        if scan.result.corruptions and self._separate_tables(scan.use):
            scan = self._scan()
        if scan.result.corruptions:
            self._scan(self._share)
            self._copy_shared()
            self._storage.flush()
            scan = self._scan()
        return scan

    def _keeps_l1(self, use: ClusterUse) -> bool:
        """Is there damage to the L1 table that may hide more?  Then say so: the tables stay as they are (I6)."""
        why = "" if self._force else self._reason_to_keep_l1(use)
        if why:
            self._say(f"{why}: the tables are left alone: try qed salvage, or give it up with --force")
        return bool(why)

    def _reason_to_keep_l1(self, use: ClusterUse) -> str:
        l1_offset, table_bytes = self._header.header.l1_table_offset, self._geometry.table_bytes
        damaged = overlapping = False
        for index, offset in self._l1_entries():
            shown = index << self._geometry.l1_shift < self._header.header.image_size
            if not self._bounds.valid_table(offset):
                damaged = True
            elif abs(offset - l1_offset) < table_bytes:
                if shown:
                    return f"L1 entry {index} leads to the L1 table itself"
                damaged = True
            elif any(mark & (DATA | SHARED) for mark in self._table_uses(use, offset)):
                overlapping = overlapping or shown
                damaged = True
        if damaged and any(mark & DATA for mark in self._table_uses(use, l1_offset)):
            return "the L1 table is damaged, and is data of the guest as well"  # a change of it would be one of that
        orphan = next(self._orphans(use), None) if overlapping else None
        if orphan is None:
            return ""
        return f"tables overlap others or data, and what is at {orphan:#x} looks like one that lost its L1 entry"

    def _note(self, damage: Damage, damaged: set[tuple[int, int, int]]) -> None:
        """Add (L1 index, offset of the L2 table, first entry of the part) for a damaged L2 entry."""
        if damage.table == "L2":
            base = damage.index - damage.index % self._geometry.part_entries
            damaged.add((damage.pos >> self._geometry.l1_shift, damage.table_offset, base))

    def _l1_entries(self) -> Iterator[tuple[int, int]]:
        for base, table in table_parts(self._storage, self._geometry, self._header.header.l1_table_offset):
            for index, offset in enumerate(table, base):
                if offset:
                    yield index, offset

    def _table_uses(self, use: ClusterUse, offset: int) -> bytes:
        """The bytes of the map for the clusters of a table."""
        return use.marks(offset >> self._geometry.l2_shift, self._geometry.table_size)

    def _correct_l1(self, use: ClusterUse) -> bool:
        """Clear or correct the entries that cannot lead to a table; True if there were any."""
        changed = False
        l1_offset, geo = self._header.header.l1_table_offset, self._geometry
        low_bits = Counter(
            geo.start_of_cluster(offset) for _, offset in self._l1_entries() if self._one_low_bit(offset)
        )
        for index, offset in self._l1_entries():
            damage = Damage("L1", l1_offset, index, offset, index << geo.l1_shift, False, False)
            if self._bounds.valid_table(offset):
                if abs(offset - l1_offset) < geo.table_bytes:  # it is past the end of the device, or `force`d
                    self._write_entry(damage, UNALLOCATED, "the L1 table itself: cleared")
                    changed = True
                continue
            rounded = geo.start_of_cluster(offset)
            if (
                low_bits[rounded] == 1
                and self._one_low_bit(offset)
                and self._alone_in_sector(l1_offset, index, self._bounds.valid_table)
                and self._bounds.valid_table(rounded)
                and not any(self._table_uses(use, rounded))
                and looks_like_table(self._storage, geo, self._bounds, rounded)
                and use.clusters - use.count() == geo.table_size + self._data_of(rounded)  # no other leaks, as there
            ):
                self._claim_table(use, rounded)
                why = "one bit is wrong, and nothing else refers to the table there: corrected"
                self._write_entry(damage, rounded, why)
                changed = True
        return self._correct_lost(use) or changed

    def _data_of(self, offset: int) -> int:
        """Data clusters that the table at `offset` leads to."""
        parts = table_parts(self._storage, self._geometry, offset)
        return sum(self._bounds.valid_cluster(entry) for _, table in parts for entry in table if entry > ZERO_CLUSTER)

    def _one_low_bit(self, entry: int) -> bool:
        """`entry` is one wrong bit away from an offset, and from one only.

        Not the lowest bit: older versions set that to make an entry invalid for good.
        """
        low = entry & self._geometry.cluster_mask
        return low > 1 and low & (low - 1) == 0

    def _alone_in_sector(self, table_offset: int, index: int, valid: Callable[[int], bool]) -> bool:
        """No other entry in its sector is impossible.  If one is, more than a bit was hit."""
        first = index - index % (SECTOR // ENTRY)
        sector = self._tables.read(table_offset + first * ENTRY, SECTOR // ENTRY)
        return not any(
            entry and not valid(entry) for i, entry in enumerate(sector, first) if i != index and entry > ZERO_CLUSTER
        )

    def _lost(self) -> Iterator[Damage]:
        """L1 entries of which nothing is left that leads to a table."""
        l1_offset = self._header.header.l1_table_offset
        for index, offset in self._l1_entries():
            if not self._bounds.valid_table(offset):
                yield Damage("L1", l1_offset, index, offset, index << self._geometry.l1_shift, False, False)

    def _correct_lost(self, use: ClusterUse) -> bool:
        """Clear the lost entries, if no table of the device can have lost its entry; true if there were any.

        Otherwise they are left alone: not even of one table and one place is it known that they belong together (I6).
        """
        first = next(self._lost(), None)
        if first is None:
            return False
        shown = first.pos < self._header.header.image_size
        orphan = next(self._orphans(use), None) if shown and not self._force else None
        if orphan is None:
            for damage in self._lost():
                self._write_entry(damage, UNALLOCATED, "not a valid offset: cleared")
            return True
        if not self._kept_lost:
            self._kept_lost = True
            self._say(
                f"what is at {orphan:#x} looks like an L2 table, but nothing proves its place: L1 entries that "
                f"lead nowhere are left alone, and so are leaks: try qed salvage, or give it up with --force"
            )
        for damage in self._lost():
            if not damage.value & self._geometry.cluster_mask and damage.value >= self._bounds.start:
                self._write_entry(
                    damage, mark_dangling(damage.value), "must not lead to what the file gets next: made invalid"
                )
        return False

    def _orphans(self, use: ClusterUse) -> Iterator[int]:
        return orphans(self._storage, self._geometry, self._bounds, use)

    def _claim_table(self, use: ClusterUse, offset: int) -> None:
        first = offset >> self._geometry.l2_shift
        for cluster in range(first, first + self._geometry.table_size):
            use.claim(cluster, METADATA)

    def _correct_l2(self, use: ClusterUse, damaged: set[tuple[int, int, int]]) -> None:
        # First which clusters entries with wrong low bits may mean: none is given to one of several.
        for damage in self._impossible(use, damaged):
            cluster = damage.value >> self._geometry.l2_shift
            low = damage.value & self._geometry.cluster_mask
            if low > 1 and not is_marked(damage.value) and cluster < use.mapped:
                use.map[cluster] |= _DISPUTED if use.map[cluster] & _CANDIDATE else _CANDIDATE
        # With other leaks in the file, what is there may be old data of any range (I6).
        explained = use.count() == use.clusters
        sector = 0  # bytes: file offset
        entries: dict[int, int] = {}
        for damage in self._impossible(use, damaged):
            at = damage.table_offset + damage.index * ENTRY
            if at - at % SECTOR != sector:
                self._write_entries(entries)
                sector, entries = at - at % SECTOR, {}
            # All of a sector with one write, because after a crash between two of them the rest would look like less
            # damage than there was.
            entries[at], why = self._instead_of(damage, use, explained)
            self._say_written(damage, entries[at], why)
        self._write_entries(entries)

    def _instead_of(self, damage: Damage, use: ClusterUse, explained: bool) -> tuple[int, str]:
        """(what an impossible L2 entry is replaced with, why); `explained`: there are no leaks but what they mean."""
        if (
            explained
            and self._one_low_bit(damage.value)
            and self._alone_in_sector(damage.table_offset, damage.index, self._bounds.valid_cluster)
        ):
            rounded = self._geometry.start_of_cluster(damage.value)
            cluster = rounded >> self._geometry.l2_shift
            marks = use.marks(cluster)
            if self._bounds.valid_cluster(rounded) and marks == bytes((_CANDIDATE,)):
                use.claim(cluster, DATA)
                return rounded, "one bit is wrong, and nothing else refers to the cluster there: corrected"
            if self._bounds.valid_cluster(rounded) and marks == bytes((_CANDIDATE | _DISPUTED,)):
                # Now two bits are wrong, so that none is corrected if a crash comes before all are cleared, by the
                # next round.
                return damage.value | 1, "another damaged entry may mean the same cluster: not corrected"
        # Not ZERO_CLUSTER, which would be as good without a backing file.  With one, the guest's data is lost either
        # way; what reappears is what was there before it was written, as after any lost write, which journals are
        # made for.  Zeros were never there.  QEMU does the same.
        if is_marked(damage.value):
            return UNALLOCATED, "made invalid, because it pointed past the end of the file: cleared"
        return UNALLOCATED, "not a valid offset: cleared"

    def _impossible(self, use: ClusterUse, damaged: set[tuple[int, int, int]]) -> Iterator[Damage]:
        """The L2 entries that cannot be right, of tables that may be written to.  They may be changed meanwhile."""
        l1_offset, shift = self._header.header.l1_table_offset, self._geometry.l2_shift
        for index, offset, base in sorted(damaged):
            linked = self._tables.read(l1_offset + index * ENTRY, 1)[0] == offset
            # Data may be there as well, which must not be written to (I1): the table is moved away later.
            if not linked or any(mark & DATA for mark in self._table_uses(use, offset)):
                continue
            table = self._tables.read(offset + base * ENTRY, self._geometry.part_entries)
            for i, entry in enumerate(table, base):
                if entry > ZERO_CLUSTER and not self._bounds.valid_cluster(entry):
                    yield Damage(
                        "L2", offset, i, entry, (index << self._geometry.l1_shift) + (i << shift), False, False
                    )

    def _write_entry(self, damage: Damage, value: int, why: str) -> None:
        self._write_entries({damage.table_offset + damage.index * ENTRY: value})
        self._say_written(damage, value, why)

    def _say_written(self, damage: Damage, value: int, why: str) -> None:
        at = damage.table_offset + damage.index * ENTRY
        text = f"{damage.table} entry {damage.index} at {at:#x} points to {damage.value:#x}: {why}"
        reach = self._geometry.l2_table_reach if damage.table == "L1" else self._geometry.cluster_size
        end = min(damage.pos + reach, self._header.header.image_size)
        if value == UNALLOCATED and self._header.header.has_backing and damage.pos < end:
            text += f"; old data of the backing file reappears at guest range {damage.pos:#x}..{end:#x}"
        self._say(text)

    def _write_entries(self, entries: dict[int, int]) -> None:
        """Write entries, given by their file offset (bytes), in whole sectors."""
        sectors: dict[int, list[int]] = {}
        for at in entries:
            sectors.setdefault(at - at % SECTOR, []).append(at)
        for offset in sorted(sectors):
            sector = self._tables.read(offset, SECTOR // ENTRY)
            for at in sectors[offset]:
                sector[(at - offset) // ENTRY] = entries[at]
            self._tables.write_all(offset, sector)

    def _separate_tables(self, use: ClusterUse) -> bool:
        """Give each table clusters of its own; True if something was changed."""
        geo = self._geometry
        l1_offset = self._header.header.l1_table_offset
        changed = False
        for index, offset in self._l1_entries():
            first = offset >> geo.l2_shift
            if not self._bounds.valid_table(offset):
                continue  # left alone
            uses = self._table_uses(use, offset)
            overlaps = any(byte & KEPT for byte in uses)
            if not overlaps and not any(byte & DATA for byte in uses):
                for cluster in range(first, first + geo.table_size):
                    use.map[cluster] |= KEPT
                continue
            changed = True
            damage = Damage("L1", l1_offset, index, offset, index << geo.l1_shift, True, False)
            if overlaps and damage.pos >= self._header.header.image_size:
                self._write_entry(damage, UNALLOCATED, "another's table, and past the end of the device: cleared")
            else:
                target = self._copy_table(offset)
                self._storage.flush()  # the copy, before the entry that leads to it (I3)
                self._write_entry(
                    damage, target, f"clusters that are referenced already: table copied to {target:#x}"
                )
        self._storage.flush()
        return changed

    def _copy_table(self, source: int) -> int:
        """Copy a table, without entries that cannot be right; where it is (bytes)."""
        geo = self._geometry
        target = self._grow(geo.table_size)
        for base, table in table_parts(self._storage, geo, source):
            for i, entry in enumerate(table):
                if entry > ZERO_CLUSTER and not self._bounds.valid_cluster(entry):
                    table[i] = UNALLOCATED
            self._tables.write_all(target + base * ENTRY, table)
        return target

    def _grow(self, n: int) -> int:
        """n clusters at the end of the file (bytes).  They read as zeros."""
        offset = round_up(self._storage.size(), self._geometry.cluster_size)
        self._storage.truncate(offset + n * self._geometry.cluster_size)
        return offset

    def _share(self, damage: Damage) -> None:
        """A scan reports: copy the cluster.  The scan does not come back to this entry, so it may be changed."""
        if damage.table == "L2" and damage.shared:
            at = damage.table_offset + damage.index * ENTRY
            self._shared.append(Shared(at, damage.value, damage.pos))
            if len(self._shared) * self._geometry.cluster_size >= _BATCH:
                self._copy_shared()

    def _copy_shared(self) -> None:
        batch, self._shared = self._shared, []
        entries = {}
        for at, value, pos in batch:
            entries[at] = target = self._grow(1)
            self._copy_cluster(value, target)
            self._say(f"guest position {pos:#x} shared the cluster at {value:#x}: copied to {target:#x}")
        self._storage.flush()  # the copies, before the entries that lead to them (I3)
        self._write_entries(entries)

    def _copy_cluster(self, source: int, target: int) -> None:
        size = self._geometry.cluster_size
        for done in range(0, 0 if self._rehearse else size, _COPY_STEP):
            data = bytearray(min(_COPY_STEP, size - done))
            self._storage.pread_into(data, source + done)
            if data.count(0) != len(data):
                self._storage.pwrite(data, target + done)

    def _keeps_leaks(self, use: ClusterUse) -> bool:
        """A table may have lost its place to the damage that was there before: then say so (I6)."""
        orphan = next(self._orphans(use), None) if self.outcome.first.corruptions and not self._force else None
        if orphan is not None:
            self._say(
                f"what is at {orphan:#x} looks like an L2 table that nothing leads to any more: leaked clusters are "
                f"left alone: -r leaks gives them back"
            )
        return orphan is not None

    # -- 5: leaks ------------------------------------------------------------------------------------------------

    def _reclaim(self, scan: Scan) -> Scan:
        """Give leaks, and what follows the last whole cluster, back to the file system."""
        leaks, size = scan.result.leaks, self._storage.size()
        if not leaks and size <= self._bounds_now().end:
            return scan
        self.outcome.leaks_fixed = leaks
        if self._rehearse:
            used = scan.use.count() << self._geometry.l2_shift
            self._say(f"{leaks} leaked clusters: the file gets {size - used} bytes shorter")
            self._storage.truncate(used)
            scan.result = copy(scan.result)
            scan.result.leaks = 0
            return scan
        self._storage.flush()  # nothing leads to the leaks, durably, before they are overwritten
        pack(_Unused(self._storage, self._geometry, self._bounds_now(), self._header, self._tables, _NOBODY, _NOBODY))
        scan = self._scan()
        self.outcome.leaks_fixed = leaks - scan.result.leaks
        return scan

    def _bounds_now(self) -> Bounds:
        return Bounds(self._geometry, self._header.header.header_size, self._storage.size())
