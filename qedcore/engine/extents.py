"""Block status: which parts of a range are data, and which read as zeros.

What is said of the whole of a large image, again and again, is made here: the runs of slices that have few are known
until anything is linked (ClusterMap, I5), and short runs come many at once, without a step of Python for each.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import CorruptImageError, QEDError
from ..format.geometry import UNALLOCATED
from ..format.table_runs import K_NOTHING, K_ZERO, kinds, runs_of_kinds, runs_of_two
from .cluster_map import FOUND, NO_CLUSTER, NO_TABLE, SHORT, ZERO, ClusterMap, Kind
from .source import Source, find_zeros

_KINDS = (NO_CLUSTER, ZERO, FOUND)  # by their names in table_runs.kinds()
_OTHER = {FOUND: ZERO, ZERO: FOUND}
_FEW = 8  # runs of a slice that are remembered
_MAX_KNOWN = 8192  # slices whose runs are remembered: a megabyte or two


class Extents:
    """The runs of ranges.  Takes no lock, as lookups do (ClusterMap, I1)."""

    def __init__(self, clusters: ClusterMap) -> None:
        self._clusters = clusters
        self._geometry = clusters.geometry

    def find(self, pos: int, length: int, one: bool, backing: Source | None) -> tuple[Kind, list[int]]:
        """(kind, bytes of each run) of a range over `backing`: alternately FOUND and ZERO, from `kind` on.

        With `one`, only the first.  Raises CorruptImageError and StorageError.
        """
        if one or backing is not None:
            pieces = self._pieces_of_chain(pos, length, one, backing)
        else:
            pieces = self.data_and_zeros(pos, length)
        first = last = ZERO  # kinds of the runs in `sizes`
        sizes: list[int] = []
        try:
            for kind, more in pieces:
                if not sizes:
                    first = kind
                elif kind is last:
                    more[0] += sizes.pop()
                sizes += more
                last = kind if len(more) % 2 else _OTHER[kind]
                if one and len(sizes) > 1:
                    break
        except QEDError:
            if not (one and sizes):  # else it is past what was asked for
                raise
        return first, sizes[:1] if one else sizes

    def _pieces_of_chain(
        self, pos: int, length: int, one: bool, backing: Source | None
    ) -> Iterator[tuple[Kind, list[int]]]:
        """As data_and_zeros, with what is below."""
        for kind, n in self.kinds(pos, length, one):
            end = pos + n
            while pos < end:
                here, n = kind, end - pos
                if kind is not FOUND and kind is not ZERO:
                    here, n = find_zeros(backing, pos, n)
                yield here, [n]
                pos += n

    def kinds(self, pos: int, length: int, one: bool) -> Iterator[tuple[Kind, int]]:
        """(kind, bytes) of the runs of a range.  With `one`, the caller wants no more than the first few.

        As ClusterMap.lookup, but data need not be contiguous, and kinds may repeat.
        """
        end = pos + length
        while pos < end:
            run = self._long_run(pos, end - pos)
            if run is None and one:
                kind, _, n = self._clusters.lookup(pos, end - pos)
                run = kind, n
            if run is not None:
                pos += run[1]
                yield run
                continue
            kind, n, names = self._short_runs(pos, end - pos)
            pos += n + (len(names) << self._geometry.l2_shift)
            yield kind, n
            for same in runs_of_kinds(names):
                yield _KINDS[same[0]], len(same) << self._geometry.l2_shift

    def data_and_zeros(self, pos: int, length: int) -> Iterator[tuple[Kind, list[int]]]:
        """The same where nothing is below: (FOUND or ZERO, bytes of runs, alternately of that kind and the other)."""
        end = pos + length
        while pos < end:
            run = self._long_run(pos, end - pos)
            if run is not None:
                pos += run[1]
                yield FOUND if run[0] is FOUND else ZERO, [run[1]]
                continue
            kind, n, names = self._short_runs(pos, end - pos)
            pos += n + (len(names) << self._geometry.l2_shift)
            yield FOUND if kind is FOUND else ZERO, [n]
            if names:
                names = names.replace(K_NOTHING, K_ZERO)
                sizes = map(self._geometry.cluster_size.__mul__, map(len, runs_of_two(names)))
                yield _KINDS[names[0]], list(sizes)

    def _long_run(self, pos: int, length: int) -> tuple[Kind, int] | None:
        """The run at pos, in a gap or a slice of a few runs; None where runs are short."""
        geo = self._geometry
        l1_index = pos >> geo.l1_shift
        if not self._clusters.l1[l1_index] and not self._clusters.doubtful_l1:
            return NO_TABLE, self._gap(pos, length, l1_index)
        known = self._clusters.known_runs  # before the look at the tables: what is linked meanwhile makes a new one
        slice_index = pos >> geo.slice_shift
        runs = known.get(slice_index)
        if runs is None:
            runs = self._few_runs(slice_index << geo.slice_shift)
            if len(known) < _MAX_KNOWN:
                known[slice_index] = runs
        for kind, end in runs:
            if pos < end:
                return kind, min(length, end - pos)
        return None

    def _few_runs(self, start: int) -> tuple[tuple[Kind, int], ...]:
        """(kind, guest position of the end) of the runs of the slice that maps `start` on; none if there are many.

        None either if an entry is wrong: whoever asks for that one is told.
        """
        runs: list[tuple[Kind, int]] = []
        geo = self._geometry
        pos, end = start, min(start + (1 << geo.slice_shift), len(self._clusters.l1) << geo.l1_shift)
        try:
            while pos < end:
                kind, _, n = self._clusters.lookup(pos, end - pos)
                pos += n
                if runs and runs[-1][0] is kind:
                    runs.pop()
                runs.append((kind, pos))
                if len(runs) > _FEW or n < SHORT << geo.l2_shift:
                    return ()
        except CorruptImageError:
            return ()
        return tuple(runs)

    def _short_runs(self, pos: int, length: int) -> tuple[Kind, int, bytes]:
        """(kind, bytes) of the first run at pos, and what table_runs.kinds() calls the whole clusters after it."""
        geo = self._geometry
        kind, _, n = self._clusters.lookup(pos, length)
        table = self._clusters.slice_at(pos)
        index = ((pos + n) >> geo.l2_shift) & geo.slice_mask
        last = min(geo.slice_entries, index + ((length - n) >> geo.l2_shift))
        if table is None or not index or index >= last:  # not index: the slice is over
            return kind, n, b""
        return kind, n, kinds(table[index:last], self._clusters.bounds) or b""  # the next look-ups find what is wrong

    def _gap(self, pos: int, length: int, index: int) -> int:
        """Bytes from pos, where there is no L2 table (L1 index `index`), to the next table; `length` at most."""
        shift, l1 = self._geometry.l1_shift, self._clusters.l1
        last = ((pos + length - 1) >> shift) + 1
        if last - index > SHORT:
            end = self._clusters.runs.end_of_same(l1, index + 1, last, UNALLOCATED)
        elif any(l1[index + 1 : last]):
            end = next(i for i in range(index + 1, last) if l1[i])
        else:
            return length
        return min(length, (end << shift) - pos)
