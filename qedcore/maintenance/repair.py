"""What `qed check -r` does: repairs that lose nothing that was intact, in an order that a crash cannot hurt.

    1  a header field that the tables disprove is corrected (trial.prove)
    2  entries that cannot be right are cleared, or corrected where only their low bits are wrong
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
I6. A table whose place in the device is not certain is kept, and so is the damage that hides it, unless `force`d.

The caller makes sure that nobody else uses the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Callable, NamedTuple

from ..check.cluster_use import DATA, METADATA, ClusterUse
from ..check.scan import Damage, Scan, ScanResult
from ..engine.image import Metadata
from ..errors import ImageFormatError
from ..format.geometry import ENTRY, SECTOR, UNALLOCATED, ZERO_CLUSTER, Bounds, Geometry, round_up
from ..format.header import FEATURE_NEED_CHECK, Header, HeaderUpdater, read_header
from ..format.table import TableIO, next_data, table_parts
from ..storage import Storage, read_from_disk
from ..units import MiB
from .compact import pack
from .header_fit import Fit, prove, raw_header, shape_of

KEPT = 16  # in ClusterUse.map: of a table that stays where it is
_COPY_STEP = 4 * MiB  # bytes copied with one read and one write
_BATCH = 64 * MiB  # bytes copied between flushes
_ROUNDS = 4  # more of the same, at most; one has always been enough
_WRONG_L1_ENTRIES = 8  # no more may be damage, if none is right

_NOBODY: Any = None  # in the place of what an open image has

Say = Callable[[str], None]


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
            scan = self._correct(scan, damaged)
            for _ in range(_ROUNDS):
                # A table that another one overlapped may stay where it is once the other was moved; its own damage
                # comes to light only then.
                if not scan.result.corruptions:
                    break
                damaged.clear()
                self._bounds = self._bounds_now()  # with the copies
                scan = self._correct(self._scan(lambda damage: self._note(damage, damaged)), damaged)
        if scan.result.corruptions:
            if scan.result.leaks:
                self._say("leaked clusters are left alone: they may hold what a damaged entry meant")
        else:
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
        found = scan.result
        if not found.corruptions and not found.leaks:  # of a wrong size, tables seem to have leaks beside them
            return False
        proven = prove(self._storage)
        if proven is None or proven.header == self._header.header:
            return False
        if 0 < found.corruptions <= proven.found.corruptions:
            # Less is unused then, but no fewer entries are wrong.  The wrong choice would lose half of the image.
            raise ImageFormatError(
                f"{'; '.join(proven.changes(self._header.header))}; but other damage makes that uncertain, "
                f"so nothing was changed: try qed salvage"
            )
        if not everything:
            raise ImageFormatError(f"{'; '.join(proven.changes(self._header.header))}: use -r all")
        correct_header(self._storage, self._header.header, proven, self._say)
        self._open(*read_header(self._storage))
        return True

    def _refuse_wrong_l1_table(self) -> None:
        """Raise ImageFormatError if the L1 table is mostly garbage: then something else is there."""
        right = wrong = 0
        for _, offset in self._l1_entries():
            valid = self._bounds.valid_table(offset)
            right, wrong = right + valid, wrong + (not valid)
        if wrong > (right + SECTOR // ENTRY if right else _WRONG_L1_ENTRIES):  # one sector may be damaged
            raise ImageFormatError(
                f"QED table offset is invalid: {wrong} of {right + wrong} entries at "
                f"{self._header.header.l1_table_offset:#x} are impossible, so nothing was changed: try qed salvage"
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
        l1_offset = self._header.header.l1_table_offset
        for index, offset in self._l1_entries():
            damage = Damage("L1", l1_offset, index, offset, index << self._geometry.l1_shift, False, False)
            rounded = self._geometry.start_of_cluster(offset)
            if not self._bounds.valid_table(offset):
                free = self._bounds.valid_table(rounded) and not any(self._table_uses(use, rounded))
                if free and self._looks_like_table(rounded):
                    self._claim_table(use, rounded)
                    self._write_entry(
                        damage, rounded, "a table is there that nothing else refers to: low bits cleared"
                    )
                elif damage.pos >= self._header.header.image_size:
                    self._write_entry(damage, UNALLOCATED, "not a valid offset: cleared")
                else:
                    continue  # later, when it is known which tables have no entry
            elif abs(offset - l1_offset) < self._geometry.table_bytes:
                self._write_entry(damage, UNALLOCATED, "the L1 table itself: cleared")
            elif self._has_data(use, offset) and not self._looks_like_table(offset):
                self._write_entry(damage, UNALLOCATED, "data of another guest range, not a table: cleared")
            else:
                continue
            changed = True
        return self._correct_lost(use) or changed

    def _lost(self) -> Iterator[Damage]:
        """L1 entries of the device of which nothing is left that leads to a table."""
        l1_offset = self._header.header.l1_table_offset
        for index, offset in self._l1_entries():
            pos = index << self._geometry.l1_shift
            if not self._bounds.valid_table(offset) and pos < self._header.header.image_size:
                yield Damage("L1", l1_offset, index, offset, pos, False, False)

    def _correct_lost(self, use: ClusterUse) -> bool:
        """Clear the lost entries, if no table has lost its entry; true if there were any.

        One table and one place for it belong together.  Of several nobody knows: they are left alone (I6).
        """
        lost = list(islice(self._lost(), 2))
        orphans = list(islice(self._orphans(use), 2)) if lost else []
        if len(lost) == len(orphans) == 1:
            self._write_entry(lost[0], orphans[0], f"the only table without an entry is at {orphans[0]:#x}: that one")
            return True
        if not orphans or self._force:
            for damage in self._lost():
                self._write_entry(damage, UNALLOCATED, "not a valid offset: cleared")
            return bool(lost)
        if not self._kept_lost:
            self._kept_lost = True
            self._say(
                f"what is at {orphans[0]:#x} looks like an L2 table, but nothing proves its place: L1 entries that "
                f"lead nowhere are left alone, and so are leaks: try qed salvage, or give it up with --force"
            )
        for damage in self._lost():
            if not damage.value & self._geometry.cluster_mask and damage.value >= self._bounds.start:
                self._write_entry(damage, damage.value | 1, "must not lead to what the file gets next: made invalid")
        return False

    def _orphans(self, use: ClusterUse) -> Iterator[int]:
        """Offsets of what has the shape of an L2 table, and like its data clusters is used by nothing."""
        geo = self._geometry
        cluster = use.next_free(self._bounds.start >> geo.l2_shift)
        while cluster < use.clusters:
            offset = cluster << geo.l2_shift
            data_at = next_data(self._storage, offset)
            if data_at >= offset + geo.cluster_size:
                cluster = use.next_free(data_at >> geo.l2_shift)
                continue
            shape = shape_of(self._storage, geo, self._bounds, offset)
            if shape is not None and shape.is_table and not any(self._table_uses(use, offset)):
                entries = (entry for _, table in table_parts(self._storage, geo, offset) for entry in table)
                data = (entry for entry in entries if entry > ZERO_CLUSTER and self._bounds.valid_cluster(entry))
                if not any(any(use.marks(entry >> geo.l2_shift)) for entry in data):
                    yield offset
            cluster = use.next_free(cluster + 1)

    def _claim_table(self, use: ClusterUse, offset: int) -> None:
        first = offset >> self._geometry.l2_shift
        for cluster in range(first, first + self._geometry.table_size):
            use.claim(cluster, METADATA)

    def _has_data(self, use: ClusterUse, offset: int) -> bool:
        """A data entry refers to a part of the table at `offset`."""
        return any(uses & DATA for uses in self._table_uses(use, offset))

    def _looks_like_table(self, offset: int) -> bool:
        """Entries of a sector are possible, at least half of them; or all are in the whole table.

        In doubt it is one: it is then copied elsewhere, and what else is there stays.  An empty table is no loss.
        """
        step, filled, impossible = SECTOR // ENTRY, False, False
        for _, table in table_parts(self._storage, self._geometry, offset):
            for start in range(0, len(table), step):
                entries = [entry for entry in table[start : start + step] if entry > ZERO_CLUSTER]
                wrong = sum(not self._bounds.valid_cluster(entry) for entry in entries)
                if entries and 2 * wrong <= len(entries):
                    return True
                impossible = impossible or wrong > 0
            filled = True
        return filled and not impossible

    def _correct_l2(self, use: ClusterUse, damaged: set[tuple[int, int, int]]) -> None:
        l1_offset, shift = self._header.header.l1_table_offset, self._geometry.l2_shift
        for index, offset, base in sorted(damaged):
            linked = self._tables.read(l1_offset + index * ENTRY, 1)[0] == offset
            # Data may be there as well, which must not be written to (I1): the table is moved away later.
            if not linked or self._has_data(use, offset):
                continue
            table = self._tables.read(offset + base * ENTRY, self._geometry.part_entries)
            for i, entry in enumerate(table, base):
                if entry <= ZERO_CLUSTER or self._bounds.valid_cluster(entry):
                    continue
                pos = (index << self._geometry.l1_shift) + (i << shift)
                damage = Damage("L2", offset, i, entry, pos, False, False)
                rounded = self._geometry.start_of_cluster(entry)
                if self._bounds.valid_cluster(rounded) and use.claim_free(rounded >> shift, DATA):
                    self._write_entry(damage, rounded, "nothing else refers to that cluster: low bits cleared")
                else:
                    # Not ZERO_CLUSTER, which would be as good without a backing file.  With one, the guest's data is
                    # lost either way; what reappears is what was there before it was written, as after any lost
                    # write, which journals are made for.  Zeros were never there.  QEMU does the same.
                    self._write_entry(damage, UNALLOCATED, "not a valid offset: cleared")

    def _write_entry(self, damage: Damage, value: int, why: str) -> None:
        at = damage.table_offset + damage.index * ENTRY
        self._write_entries({at: value})
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
