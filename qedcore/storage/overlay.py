"""A Storage over another that keeps all changes in memory: what --dry-run repairs.

Only metadata should be written to it: that is all it has memory for.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from . import ReadBuffer, Storage, WriteBuffer
from .file import FAR

_PAGE = 4096  # bytes


class Rehearsal(Storage):
    """See Storage.  The storage below is only read, and not closed."""

    def __init__(self, below: Storage) -> None:
        self.name = below.name
        self.fixed_size = below.fixed_size
        self._below = below
        self._pages: dict[int, bytearray] = {}  # page number -> what was written
        self._numbers: list[int] = []  # the keys, in order
        self._size = self._kept = below.size()  # bytes; of the storage below, bytes that were never cut off

    def size(self) -> int:
        return self._size

    def next_data(self, offset: int) -> int:
        """See FileStorage."""
        below = self._below.next_data(offset)
        at = bisect_left(self._numbers, offset // _PAGE)
        own = max(self._numbers[at] * _PAGE, offset) if at < len(self._numbers) else FAR
        return min(below if below < self._kept else FAR, own)

    def _page(self, number: int) -> bytearray:
        """The page as it is now."""
        page = self._pages.get(number)
        if page is None:
            page = bytearray(_PAGE)
            n = min(self._kept - number * _PAGE, _PAGE)
            if n > 0:
                self._below.pread_into(memoryview(page)[:n], number * _PAGE)
        return page

    def pread_into(self, buf: WriteBuffer, offset: int) -> None:
        view = memoryview(buf).cast("B")
        n = max(min(self._kept - offset, len(view)), 0)
        if n:
            self._below.pread_into(view[:n], offset)
        view[n:] = bytes(len(view) - n)
        for number in range(offset // _PAGE, -(-(offset + len(view)) // _PAGE)) if self._pages else ():
            page = self._pages.get(number)
            if page is not None:
                start, end = max(number * _PAGE, offset), min((number + 1) * _PAGE, offset + len(view))
                view[start - offset : end - offset] = page[start - number * _PAGE : end - number * _PAGE]

    def pwrite(self, buf: ReadBuffer, offset: int) -> None:
        view = memoryview(buf).cast("B")
        self._size = max(self._size, offset + len(view))
        for number in range(offset // _PAGE, -(-(offset + len(view)) // _PAGE)):
            start, end = max(number * _PAGE, offset), min((number + 1) * _PAGE, offset + len(view))
            page = self._page(number)
            if number not in self._pages:
                self._pages[number] = page
                insort(self._numbers, number)
            page[start - number * _PAGE : end - number * _PAGE] = view[start - offset : end - offset]

    def pwritev(self, bufs: Sequence[ReadBuffer], offset: int) -> None:
        self.pwrite(b"".join(bufs), offset)

    def truncate(self, size: int) -> None:
        self._size = size
        self._kept = min(self._kept, size)
        for number in [number for number in self._pages if (number + 1) * _PAGE > size]:
            if number * _PAGE >= size:
                del self._pages[number]
            else:
                self._pages[number][size - number * _PAGE :] = bytes((number + 1) * _PAGE - size)
        del self._numbers[bisect_left(self._numbers, -(-size // _PAGE)) :]

    def punch(self, offset: int, length: int) -> bool:
        return False

    def flush(self) -> None:
        """There is nothing that could be lost."""

    def identity(self) -> object:
        return self._below.identity()

    def close(self) -> None:
        self._pages.clear()
        self._numbers.clear()
