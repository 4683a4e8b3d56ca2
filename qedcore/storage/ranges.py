"""BusyRanges: keeps writes apart that share a block of which one of them must read the rest first.

RangeSet: ranges that are remembered for good, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..locks import Rank, ranked_condition


class BusyRanges:
    """The block ranges being written; the condition protects them and is not held across I/O."""

    def __init__(self) -> None:
        self._cond = ranked_condition(Rank.STORAGE)
        self._busy: list[tuple[int, int, bool]] = []  # (start, end, reads first), bytes

    @contextmanager
    def hold(self, start: int, end: int, reads: bool) -> Iterator[None]:
        """Wait until no write in [start, end) conflicts, and hold the range."""
        mine = (start, end, reads)
        with self._cond:
            while any(s < end and start < e and (reads or r) for s, e, r in self._busy):
                self._cond.wait()
            self._busy.append(mine)
        try:
            yield
        finally:
            with self._cond:
                self._busy.remove(mine)
                self._cond.notify_all()


class RangeSet:
    """Ranges of bytes.  Not thread-safe: its owner has a lock.

    When there are many it takes what lies between them for members, too.
    """

    LIMIT = 1024  # ranges

    def __init__(self) -> None:
        self._ranges: set[tuple[int, int]] = set()  # (start, end), bytes

    def add(self, start: int, end: int) -> None:
        self._ranges.add((start, end))
        if len(self._ranges) > self.LIMIT:
            self._ranges = {(min(s for s, _ in self._ranges), max(e for _, e in self._ranges))}

    def overlaps(self, start: int, end: int) -> bool:
        return any(s < end and start < e for s, e in self._ranges)
