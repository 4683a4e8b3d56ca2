"""ReplayLog: what a server may lose if it crashes now, the newest version of each byte only.

    writes, oldest first:      |aaaaaaaaaaaaaaaa|          |bbbb|
                                     |cccccc|
    the log:                   |aaaaa|cccccc|aaaa|         |bbbb|

So whoever sends the log again, and is killed in the middle, has left no older value where a newer one was.

I1. Pieces do not overlap.
I2. A piece has at most PIECE_BYTES of data of its own: what is kept of a write costs no more than its length, and to
    cut a piece in two copies no more than that.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from ..units import KiB

PIECE_BYTES = 256 * KiB
_OVERHEAD = 200  # bytes that a piece takes besides its data


class Piece(NamedTuple):
    """Bytes that were written: zeros if `data` is None."""

    offset: int  # bytes
    length: int  # bytes
    data: bytes | None
    epoch: int  # flushes that began before it was written

    @property
    def end(self) -> int:
        return self.offset + self.length

    def part(self, start: int, end: int) -> Piece:
        """Its bytes at offsets [start, end)."""
        data = None if self.data is None else self.data[start - self.offset : end - self.offset]
        return Piece(start, end - start, data, self.epoch)


class ReplayLog:
    """Not thread-safe: its owner has a lock."""

    def __init__(self) -> None:
        self._starts: list[int] = []  # offsets of the pieces, in order
        self._pieces: dict[int, Piece] = {}  # by offset
        self._epoch = 0
        self.cost = 0  # bytes of memory

    def __iter__(self) -> Iterator[Piece]:
        return (self._pieces[start] for start in self._starts)

    def add(self, offset: int, length: int, data: bytes | None) -> None:
        """A write was answered: zeros if `data` is None."""
        end = offset + length
        first, last = self._touched(offset, end)
        if first == last and (data is None or length <= PIECE_BYTES):  # as below, in fewer steps: nothing is cut
            self._starts.insert(first, offset)
            self._pieces[offset] = piece = Piece(offset, length, data, self._epoch)
            self.cost += _cost(piece)
            return
        old = [self._pieces.pop(start) for start in self._starts[first:last]]
        whole = Piece(offset, length, data, self._epoch)
        new = [piece.part(piece.offset, offset) for piece in old[:1] if piece.offset < offset]
        if data is None or length <= PIECE_BYTES:
            new.append(whole)
        else:
            new += [whole.part(at, min(at + PIECE_BYTES, end)) for at in range(offset, end, PIECE_BYTES)]
        new += [piece.part(end, piece.end) for piece in old[-1:] if piece.end > end]
        self._starts[first:last] = [piece.offset for piece in new]
        for piece in new:
            self._pieces[piece.offset] = piece
        self.cost += sum(map(_cost, new)) - sum(map(_cost, old))

    def overlaps(self, offset: int, length: int) -> bool:
        first, last = self._touched(offset, offset + length)
        return first < last

    def _touched(self, start: int, end: int) -> tuple[int, int]:
        """The numbers [first, last) of the pieces with bytes in [start, end)."""
        first = bisect_right(self._starts, start)
        if first:
            before = self._pieces[self._starts[first - 1]]
            first -= before.end > start
        return first, bisect_left(self._starts, end, first)

    def begin_flush(self) -> int:
        """A flush is about to be sent: what flushed() takes when it has succeeded."""
        self._epoch += 1
        return self._epoch

    def flushed(self, epoch: int) -> None:
        """What was here when that flush began is durable."""
        kept = [piece for piece in self if piece.epoch >= epoch]
        self._starts = [piece.offset for piece in kept]
        self._pieces = {piece.offset: piece for piece in kept}
        self.cost = sum(map(_cost, kept))


def _cost(piece: Piece) -> int:
    return _OVERHEAD + (0 if piece.data is None else piece.length)
