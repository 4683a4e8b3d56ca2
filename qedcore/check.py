"""One walk over all tables, shared by the repair on open and by `qed check`.

Every table is read once, slice by slice, and nothing is cached, so memory is bounded by the clusters that are
really referenced.  All entries count, also those past the end of the device: they keep their clusters.
The caller makes sure that nobody changes the tables meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .geometry import ENTRY, UNALLOCATED, ZERO_CLUSTER, Bounds, Geometry
from .header import FEATURE_NEED_CHECK, HeaderUpdater
from .storage import Storage
from .table import Table, TableIO, empty

_CHUNK_BITS = 15  # clusters per chunk of a ClusterSet: 4 KiB each


@dataclass(frozen=True)
class Damage:
    """A table entry that cannot be right."""

    table: str  # "L1" or "L2"
    table_offset: int  # bytes: where that table starts in the file
    index: int  # of the entry
    value: int  # of the entry
    pos: int  # bytes: the first guest position that it maps
    shared: bool  # points to clusters that are referenced already
    past_end: bool  # points past the end of the file: what a crash leaves behind

    def __str__(self) -> str:
        where = f"{self.table} entry {self.index} at {self.table_offset + self.index * ENTRY:#x}"
        what = (
            "clusters that are referenced already"
            if self.shared
            else "past the end of the file"
            if self.past_end
            else "not a valid offset"
        )
        return f"{where} (guest position {self.pos:#x}) points to {self.value:#x}: {what}"


@dataclass
class WalkResult:
    """What a walk has found."""

    damage: list[Damage] = field(default_factory=list)
    allocated: int = 0  # data clusters
    fragmented: int = 0  # data clusters that do not follow the one before
    referenced: int = 0  # clusters: header area, tables and data
    end: int = 0  # bytes: first byte after the last referenced cluster

    @property
    def clean(self) -> bool:
        return not self.damage


class ClusterSet:
    """A set of cluster numbers, in bits, taking memory only where there are some."""

    def __init__(self) -> None:
        self._chunks: dict[int, bytearray] = {}

    def add(self, cluster: int) -> bool:
        """Add one; False if it was there already."""
        chunk = self._chunks.get(cluster >> _CHUNK_BITS)
        if chunk is None:
            chunk = self._chunks[cluster >> _CHUNK_BITS] = bytearray(1 << (_CHUNK_BITS - 3))
        byte = (cluster >> 3) & ((1 << (_CHUNK_BITS - 3)) - 1)
        bit = 1 << (cluster & 7)
        if chunk[byte] & bit:
            return False
        chunk[byte] |= bit
        return True


class Walk:
    """A walk over the tables of one image.  Raises StorageError where a table cannot be read."""

    def __init__(self, tables: TableIO, geometry: Geometry, bounds: Bounds, l1_offset: int) -> None:
        self._tables = tables
        self._geometry = geometry
        self._bounds = bounds
        self._l1_offset = l1_offset  # bytes
        self._used = ClusterSet()
        self.result = WalkResult()

    def run(self) -> WalkResult:
        geo, result = self._geometry, self.result
        result.referenced = self._bounds.start // geo.cluster_size
        result.end = self._bounds.start
        self._use_table(self._l1_offset)
        for base, l1 in self._slices(self._l1_offset):
            for i, offset in enumerate(l1, base):
                if offset:
                    self._visit_l2(i, offset)
        return result

    def _slices(self, offset: int) -> Iterator[tuple[int, Table]]:
        """(index of the first entry, slice) for the slices of a table that are not empty."""
        geo = self._geometry
        for base in range(0, geo.table_entries, geo.slice_entries):
            table = self._tables.read(offset + base * ENTRY, geo.slice_entries)
            if table.count(0) != len(table):
                yield base, table

    def _visit_l2(self, index: int, offset: int) -> None:
        geo, result = self._geometry, self.result
        pos = index << geo.l1_shift
        if not self._bounds.valid_table(offset):
            self._report("L1", self._l1_offset, index, offset, pos)
            return
        if not self._use_table(offset):
            self._report("L1", self._l1_offset, index, offset, pos, shared=True)
            return
        expected = 0
        for base, table in self._slices(offset):
            for i, entry in enumerate(table, base):
                if entry <= ZERO_CLUSTER:
                    continue
                result.allocated += 1
                if entry != expected:
                    result.fragmented += expected != 0
                expected = entry + geo.cluster_size
                if not self._bounds.valid_cluster(entry):
                    self._report("L2", offset, i, entry, pos + (i << geo.l2_shift))
                elif not self._use(entry):
                    self._report("L2", offset, i, entry, pos + (i << geo.l2_shift), shared=True)

    def _report(self, table: str, at: int, index: int, value: int, pos: int, shared: bool = False) -> None:
        past_end = value >= self._bounds.end - (self._geometry.table_bytes if table == "L1" else 0)
        aligned = not value & self._geometry.cluster_mask
        self.result.damage.append(Damage(table, at, index, value, pos, shared, past_end and aligned))

    def _use(self, offset: int) -> bool:
        if not self._used.add(offset >> self._geometry.l2_shift):
            return False
        self.result.referenced += 1
        self.result.end = max(self.result.end, offset + self._geometry.cluster_size)
        return True

    def _use_table(self, offset: int) -> bool:
        geo = self._geometry
        free = True
        for part in range(offset, offset + geo.table_bytes, geo.cluster_size):
            free = self._use(part) and free
        return free


def repair_after_crash(
    storage: Storage, header: HeaderUpdater, tables: TableIO, geometry: Geometry, bounds: Bounds
) -> tuple[bool, list[str]]:
    """What a writable open of a NEED_CHECK image does: (whole again, what was found and done).

    Entries that cannot be right are cleared and the unreferenced tail is given back.  NEED_CHECK is cleared only
    when all of that is durable and no cluster is shared.  Raises StorageError; the flag then stays, so that a crash
    or an error in here is met by the same repair at the next open.
    """
    found = Walk(tables, geometry, bounds, header.header.l1_table_offset).run()
    report = []
    none = empty(1)
    assert none[0] == UNALLOCATED
    for damage in found.damage:
        if damage.shared:
            report.append(f"cannot repair: {damage}")
            continue
        sector = damage.index - damage.index % 64
        table = tables.read(damage.table_offset + sector * ENTRY, 64)
        tables.write(damage.table_offset + sector * ENTRY, table, damage.index - sector, none)
        report.append(f"cleared {damage}")
    whole = not any(damage.shared for damage in found.damage)
    if all(damage.past_end for damage in found.damage) and storage.size() > found.end:
        # Only a crash's leftovers are given back; behind any other damage there may be something to salvage.
        report.append(f"truncated {storage.size() - found.end} unreferenced bytes at {found.end:#x}")
        bounds.end = found.end
        storage.truncate(found.end)
    storage.flush()  # the repair, before the flag that asks for it
    if whole:
        header.set_features(clear=FEATURE_NEED_CHECK)
        storage.flush()
    return whole, report
