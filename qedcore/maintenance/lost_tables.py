"""What may be an L2 table that nothing leads to: known by its shape only, and by what else uses its data.

That proves neither that it is one nor which part of the device it maps: guest data can be any bytes, and leaks hold
old tables.  So it is a reason to keep it, and for qed salvage to say what it would be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..check.cluster_use import ClusterUse
from ..format.geometry import ENTRY, SECTOR, ZERO_CLUSTER, Bounds, Geometry
from ..format.table import table_parts
from ..storage import Storage

_IMPOSSIBLE = 8  # one in so many entries of a table may be damaged


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

    @property
    def may_be_lost_table(self) -> bool:
        """Nothing speaks against it: it is better kept, in whatever order its entries are."""
        return self.possible > 0 and self.may_be_table


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


def orphans(storage: Storage, geometry: Geometry, bounds: Bounds, use: ClusterUse) -> Iterator[int]:
    """File offsets (bytes) of leaks that may be an L2 table with data of its own: some is used by nothing else."""
    cluster = use.next_free(bounds.start >> geometry.l2_shift)
    while cluster < use.clusters:
        offset = cluster << geometry.l2_shift
        data_at = storage.next_data(offset)
        if data_at >= offset + geometry.cluster_size:
            cluster = use.next_free(data_at >> geometry.l2_shift)
            continue
        shape = shape_of(storage, geometry, bounds, offset)
        if shape is not None and shape.may_be_lost_table:
            entries = (entry for _, table in table_parts(storage, geometry, offset) for entry in table)
            data = (entry for entry in entries if entry > ZERO_CLUSTER and bounds.valid_cluster(entry))
            if not all(any(use.marks(entry >> geometry.l2_shift)) for entry in data):
                yield offset
        cluster = use.next_free(cluster + 1)


def looks_like_table(storage: Storage, geometry: Geometry, bounds: Bounds, offset: int) -> bool:
    """Entries of a sector at `offset` (bytes) are possible, at least half of them; or all are in the whole table."""
    step, filled, impossible = SECTOR // ENTRY, False, False
    for _, table in table_parts(storage, geometry, offset):
        for start in range(0, len(table), step):
            entries = [entry for entry in table[start : start + step] if entry > ZERO_CLUSTER]
            wrong = sum(not bounds.valid_cluster(entry) for entry in entries)
            if entries and 2 * wrong <= len(entries):
                return True
            impossible = impossible or wrong > 0
        filled = True
    return filled and not impossible
