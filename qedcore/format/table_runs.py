"""Long runs in tables, found by comparing memory with memory: a nanosecond per entry.

The entries of a run are those of a template, but for their high bytes, which are the same until the low bytes are
used up: there the window ends, and the template starts again.

    entry:      | the same in a window | number of the cluster in its window | 0 ... 0 |
    template:   | 0                    | 0, 1, 2 ...                         | 0 ... 0 |
                64                     8 * low bytes                         l2_shift  0

Immutable, so threads share it without a lock.
"""

from __future__ import annotations

import re
import sys
from array import array
from functools import cached_property
from typing import Callable

from .geometry import ENTRY, UNALLOCATED, ZERO_CLUSTER, Bounds, Geometry
from .table import Table, empty

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


def _place(byte: int) -> int:
    """Where in an entry in memory its byte of value 256 ** byte is."""
    return byte if sys.byteorder == "little" else ENTRY - 1 - byte


# What kinds() calls the entries.
K_NOTHING, K_ZERO, K_DATA = b"\0", b"\1", b"\2"
_SAME_KIND = re.compile(b"\0+|\1+|\2+")
_DATA_IF_SET = K_NOTHING + K_DATA * 255
_BYTES = bytes(range(256))


def kinds(table: Table, bounds: Bounds) -> bytes | None:
    """What each entry of an L2 table is, a byte each; None if an entry is wrong (Bounds.valid_cluster).

    The bytes of equal place in all entries, a lane, are looked at at once.
    """
    mask, last = bounds.geometry.cluster_mask, bounds.end - 1
    if bounds.start > mask + 1:
        return None  # or clusters that are small numbers are wrong: a header area of several clusters is rare
    content, n = table.tobytes(), len(table)
    zero = blank = bytes(n)
    used = 0
    for byte in range(ENTRY):
        lane = content[_place(byte) :: ENTRY]
        if lane == blank:
            continue
        limit = last >> 8 * byte
        # Multiples of the cluster size up to the limit, or ZERO_CLUSTER.
        allowed = _BYTES[: limit + 1 : (mask >> 8 * byte & 0xFF) + 1] if byte else K_NOTHING + K_ZERO
        if lane.translate(None, allowed) or (0 < limit < 256 and limit in lane and max(table) > last):
            return None
        if byte:
            used |= int.from_bytes(lane, "big")
        else:
            zero = lane
    found = used.to_bytes(n, "big").translate(_DATA_IF_SET)
    if zero == blank:
        return found
    found = (int.from_bytes(found, "big") | int.from_bytes(zero, "big")).to_bytes(n, "big")
    return None if found.translate(None, K_NOTHING + K_ZERO + K_DATA) else found


def cluster_numbers(table: Table, geometry: Geometry) -> Table:
    """The number of the cluster that each entry leads to, 0 for ZERO_CLUSTER.  Below 2**32, and the entries valid."""
    content, n = table.tobytes(), len(table)
    byte, bits = divmod(geometry.l2_shift, 8)
    if bits:  # what moves into the next entry are zeros, or the bit of ZERO_CLUSTER, which is cut off
        content = (int.from_bytes(content, sys.byteorder) >> bits).to_bytes(len(content), sys.byteorder)
    numbers = bytearray(4 * n)
    for lane in range(4):
        numbers[lane if sys.byteorder == "little" else 3 - lane :: 4] = content[_place(byte + lane) :: ENTRY]
    return array("I", bytes(numbers))


def runs_of_kinds(found: bytes) -> list[bytes]:
    """What kinds() has found, cut where the kind changes."""
    return _SAME_KIND.findall(found)


def runs_of_two(found: bytes) -> list[bytes]:
    """The same, faster, of K_ZERO and K_DATA only."""
    cut = K_ZERO + K_NOTHING + K_DATA, K_DATA + K_NOTHING + K_ZERO
    return found.replace(K_ZERO + K_DATA, cut[0]).replace(K_DATA + K_ZERO, cut[1]).split(K_NOTHING)


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
        run = bytearray(ENTRY)
        bit = self._cluster_size.bit_length() - 1
        while len(run) < self._window * ENTRY:  # twice as long, and the second half has this bit
            half = run[:]
            lane = slice(_place(bit // 8), None, ENTRY)
            half[lane] = half[lane].translate(bytes((byte | 1 << bit % 8) & 0xFF for byte in range(256)))
            run += half
            bit += 1
        return bytes(run)

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
                run[_place(byte) :: ENTRY] = bytes((high & 0xFF,)) * here
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


class FollowingRuns(Runs):
    """The same for one thread and many tables: it keeps a window, whose high bytes mostly are what they were."""

    def __init__(self, cluster_size: int) -> None:
        super().__init__(cluster_size)
        self._high = 0  # what is above the low bytes of every entry in self._entries
        self._entries = bytearray()  # the window, made when needed

    def is_run(self, table: Table, start: int, end: int, value: int) -> bool:
        with memoryview(table) as entries, entries.cast("B") as content:
            while start < end:
                low = (value & self._mask) // self._cluster_size
                n = min(end - start, self._window - low)
                self._set_high(value >> 8 * self._low_bytes)
                # Compares in place.
                if not self._entries.startswith(content[start * ENTRY : (start + n) * ENTRY], low * ENTRY):
                    return False
                start += n
                value += n * self._cluster_size
        return True

    def _set_high(self, high: int) -> None:
        if not self._entries:
            self._entries = bytearray(self._template)
        byte, before, self._high = self._low_bytes, self._high, high
        while before != high:
            if (before ^ high) & 0xFF:
                self._entries[_place(byte) :: ENTRY] = bytes((high & 0xFF,)) * self._window
            before, high, byte = before >> 8, high >> 8, byte + 1
