"""What a writable open of a NEED_CHECK image does: the repair after a crash.

I1. Entries that point past the end of the file are cleared: what they were meant to refer to never reached the file.
    No crash explains other damage.  It is left alone, and reported: what is there may be salvaged.
I2. A table that shares its clusters with data of the guest is not written to: it may be no table.
I3. The unreferenced tail is given back, and clusters that nothing refers to are used again (Recovery.use), if all
    damage is what a crash leaves behind.  Behind any other damage there may be something to salvage.
I4. NEED_CHECK is cleared when all of that is durable and nothing is left.  A crash or an error in here is met by the
    same repair at the next open.
I5. Memory has a limit, whatever the image: the map (MAP_LIMIT), 8 bytes per table with damage, one part of a table.

The caller makes sure that nobody changes the tables meanwhile.
"""

from __future__ import annotations

from ..format.geometry import ENTRY, UNALLOCATED, Bounds, Geometry
from ..format.header import FEATURE_NEED_CHECK, HeaderUpdater
from ..format.table import Table, TableIO, empty, table_parts
from ..storage import Storage, read_from_disk
from .cluster_use import DATA, ClusterUse
from .scan import Damage, Scan

# Clusters, and bytes of memory: 8 TiB at the default geometry.  What is behind cannot be compared with the rest.
MAP_LIMIT = 1 << 27
_MAX_LINES = 20  # of one kind, in the log


class Recovery:
    """What a repair after a crash has found and done."""

    def __init__(self, findings: int) -> None:
        self.findings = findings  # damaged entries, and a tail that was given back
        self.lines: list[str] = []  # about them, for people: not all, if there are many
        self.whole = False  # nothing is left: NEED_CHECK is cleared
        self.use: ClusterUse | None = None  # of an image without damage: who uses which cluster


class _Damages:
    """Takes the reports of a scan, and keeps what the repair needs of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[Damage] = []
        self.shared = False  # there are shared clusters
        self.only_past_end = True
        self.tables = empty(0)  # bytes: file offsets of tables with entries that cannot be right

    def report(self, damage: Damage) -> None:
        if damage.marked:  # known, and harmless
            return
        self.count += 1
        if len(self.first) < _MAX_LINES:
            self.first.append(damage)
        self.only_past_end = self.only_past_end and damage.past_end
        self.shared = self.shared or damage.shared
        if damage.past_end and (not self.tables or self.tables[-1] != damage.table_offset):
            self.tables.append(damage.table_offset)


def repair_after_crash(
    storage: Storage, header: HeaderUpdater, tables: TableIO, geometry: Geometry, bounds: Bounds
) -> Recovery:
    """Repair the image, and move bounds.end if the file gets shorter.  Raises StorageError; NEED_CHECK then stays."""
    read_from_disk(storage)
    l1_offset = header.header.l1_table_offset
    found = _Damages()
    scan = Scan(
        storage,
        geometry,
        bounds,
        l1_offset,
        report=found.report,
        vectors=False,
        map_limit=MAP_LIMIT,
        go_on=False,
    )
    result = scan.run()
    if result.error is not None:
        raise result.error

    def writable(table: int) -> bool:
        """Surely no data of the guest is where this table is."""
        marks = scan.use.marks(table >> geometry.l2_shift, geometry.table_size)
        return not result.unmapped and not any(mark & DATA for mark in marks)

    screened = True  # nothing that points past the end is left
    for offset in found.tables:
        if not writable(offset):
            screened = False
            continue
        # Where an L1 entry points to, a whole table must follow.
        limit = bounds.end - (geometry.table_bytes - geometry.cluster_size if offset == l1_offset else 0)
        for base, table in table_parts(storage, geometry, offset):
            wrong = [i for i, entry in enumerate(table) if entry >= limit and not entry & geometry.cluster_mask]
            if wrong:
                _clear(tables, offset + base * ENTRY, table, wrong)
    done = Recovery(found.count)
    for damage in found.first:
        cleared = damage.past_end and writable(damage.table_offset)
        done.lines.append(f"{'cleared' if cleared else 'cannot repair:'} {damage}")
    if found.count > len(found.first):
        done.lines.append(f"and {found.count - len(found.first)} more damaged entries")
    if result.unmapped:
        done.lines.append(f"nothing was changed: {result.unmapped} references lead too far to be compared")
    done.whole = not found.shared and not result.unmapped and screened
    if done.whole and found.only_past_end:
        done.use = scan.use
    if found.only_past_end and not result.unmapped and storage.size() > result.end:
        done.findings += 1
        done.lines.append(f"truncated {storage.size() - result.end} unreferenced bytes at {result.end:#x}")
        bounds.end = result.end
        storage.truncate(result.end)
    storage.flush()  # the repair, before the flag that asks for it
    if done.whole:
        header.set_features(clear=FEATURE_NEED_CHECK)
        storage.flush()
    return done


def _clear(tables: TableIO, offset: int, table: Table, wrong: list[int]) -> None:
    """Clear these entries of the part at `offset` with one write."""
    repaired = table[:]
    for i in wrong:
        repaired[i] = UNALLOCATED
    tables.write(offset, table, wrong[0], repaired[wrong[0] : wrong[-1] + 1])
