"""What is asked of an NBD server: each may be sent more than once, in one of two ways (nbd_link.Request)."""

from __future__ import annotations

from typing import Any, Callable


class Write:
    """A write in flight: zeros if `data` is None."""

    __slots__ = ("data", "end", "offset", "overtaken")
    size = 0  # bytes to be copied when it is answered

    def __init__(self, offset: int, length: int, data: bytes | None) -> None:
        self.offset = offset  # bytes
        self.end = offset + length  # bytes
        self.data = data
        self.overtaken = False  # another one to the same place was answered meanwhile (I9)

    def submit(self, handle: Any, done: Callable[[Any], int]) -> None:
        if self.data is None:
            handle.aio_zero(self.end - self.offset, self.offset, done)
        else:
            handle.aio_pwrite(self.data, self.offset, done)

    def run(self, handle: Any) -> None:
        if self.data is None:
            handle.zero(self.end - self.offset, self.offset)
        else:
            handle.pwrite(self.data, self.offset)


class Read:
    """A read into `view`."""

    __slots__ = ("offset", "size", "view")

    def __init__(self, view: memoryview, offset: int) -> None:
        self.view = view
        self.size = len(view)  # bytes
        self.offset = offset  # bytes

    def submit(self, handle: Any, done: Callable[[Any], int]) -> None:
        handle.aio_pread(self.view, self.offset, done)

    def run(self, handle: Any) -> None:
        self.view[:] = handle.pread(self.size, self.offset)


class Flush:
    size = 0

    def submit(self, handle: Any, done: Callable[[Any], int]) -> None:
        handle.aio_flush(done)

    def run(self, handle: Any) -> None:
        handle.flush()


class Status:
    """What is data and what is zeros in a range: `found` is (bytes, flags) of the first run, if the server told."""

    size = 0

    def __init__(self, length: int, offset: int) -> None:
        self._length = length  # bytes
        self._offset = offset  # bytes
        self.found: list[int] = []

    def _take(self, context: str, at: int, entries: list[int], error: Any) -> int:
        self.found = entries[:2]
        return 0

    def submit(self, handle: Any, done: Callable[[Any], int]) -> None:
        handle.aio_block_status(self._length, self._offset, self._take, done)

    def run(self, handle: Any) -> None:
        handle.block_status(self._length, self._offset, self._take)
