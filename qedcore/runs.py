"""Long runs in tables, found by comparing memory with memory: a nanosecond per entry.

The entries of a run are those of a template, but for their high bytes, which are the same until the low bytes are
used up: there the window ends, and the template starts again.

    entry:      | the same in a window | number of the cluster in its window | 0 ... 0 |
    template:   | 0                    | 0, 1, 2 ...                         | 0 ... 0 |
                64                     8 * low bytes                         l2_shift  0

Immutable, so threads share it without a lock.
"""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Callable

from .geometry import ENTRY, UNALLOCATED, ZERO_CLUSTER
from .table import Table, contiguous, empty

_MIN_WINDOW_BITS = 11  # of a cluster's number in its window
_STEP = 64  # entries: what is compared first,
_MAX_STEP = 16384  # and at most, at once: more does not fit into the fast caches
_BLANK = bytearray(_MAX_STEP * ENTRY)  # never changed; only a bytearray compares itself with anything as memory


def _end_of_equal(table: Table, index: int, last: int, expected: Callable[[int, int], bytearray]) -> int:
    """The first index in [index, last) whose entry is not the expected one, or `last`.

    `expected(i, n)` gives the n entries that there should be from index i on.
    """
    step = _STEP
    with memoryview(table) as entries:
        while index < last:
            n = min(step, last - index)
            want = expected(index, n)
            if want != entries[index : index + n]:
                return index + _difference(want, entries[index : index + n])
            index += n
            step = min(8 * step, _MAX_STEP)
    return last


def _difference(want: bytearray, entries: memoryview) -> int:
    """The index of the first entry that is not as in `want`; there is one."""
    start, end = 0, len(entries)
    while end - start > 1:
        middle = (start + end) // 2
        if want[start * ENTRY : middle * ENTRY] == entries[start:middle]:
            start = middle
        else:
            end = middle
    return start


class Runs:
    """Runs in tables of images with this cluster size (bytes)."""

    def __init__(self, cluster_size: int) -> None:
        self._cluster_size = cluster_size
        shift = cluster_size.bit_length() - 1
        self._low_bytes = -(-(shift + _MIN_WINDOW_BITS) // 8)
        self._mask = (1 << 8 * self._low_bytes) - 1
        self._window = 1 << (8 * self._low_bytes - shift)  # entries

    @cached_property
    def _template(self) -> bytes:
        return contiguous(0, self._window, self._cluster_size).tobytes()

    @cached_property
    def _zero_clusters(self) -> bytearray:
        one = empty(1)
        one[0] = ZERO_CLUSTER
        return bytearray((one * _MAX_STEP).tobytes())

    def _run(self, value: int, n: int) -> bytearray:
        """The n entries of a run from `value` on, a multiple of the cluster size."""
        low = (value & self._mask) // self._cluster_size
        here = min(n, self._window - low)
        run = bytearray(self._template[low * ENTRY : (low + here) * ENTRY])
        high, byte = value >> 8 * self._low_bytes, self._low_bytes
        while high:
            if high & 0xFF:
                run[byte if sys.byteorder == "little" else ENTRY - 1 - byte :: ENTRY] = bytes((high & 0xFF,)) * here
            high >>= 8
            byte += 1
        return run if here == n else run + self._run(value + here * self._cluster_size, n - here)

    def is_run(self, table: Table, start: int, end: int, value: int) -> bool:
        """table[start:end] is a run from `value` on, a multiple of the cluster size."""
        return self.end_of_run(table, start, end, value) == end

    def end_of_run(self, table: Table, index: int, last: int, value: int) -> int:
        """Where the run that should go on with `value` at `index` ends; `last` at most."""
        return _end_of_equal(
            table, index, last, lambda at, n: self._run(value + (at - index) * self._cluster_size, n)
        )

    def end_of_same(self, table: Table, index: int, last: int, value: int) -> int:
        """Where the entries that are all `value` (UNALLOCATED or ZERO_CLUSTER) end, from `index` on."""
        same = _BLANK if value == UNALLOCATED else self._zero_clusters
        return _end_of_equal(table, index, last, lambda at, n: same if n == _MAX_STEP else same[: n * ENTRY])
