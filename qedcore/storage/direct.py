"""DirectStorage: a local file past the page cache (O_DIRECT).

O_DIRECT wants offset, length and memory aligned to the device's logical block.  Requests go through an aligned
bounce buffer; a write that does not cover whole blocks reads the rest of them first.

I5. Two writes that share a block never overlap in time when one of them reads that block first: the later
    waits (BusyRanges).
I6. The file ends where the last write does, not with that write's last block.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence

from ..errors import StorageError
from . import ReadBuffer, WriteBuffer
from .cache_mode import CacheMode
from .file import FAR, FileStorage
from .ranges import BusyRanges

_BOUNCE_BYTES = 1 << 20  # per thread; larger requests take several rounds
_LOGICAL_BLOCKS = (512, 4096)  # bytes: what devices ask for, smallest first


class DirectStorage(FileStorage):
    """See Storage and FileStorage."""

    open_flags = os.O_DIRECT

    def __init__(self, path: str | os.PathLike[str], writable: bool, mode: CacheMode) -> None:
        super().__init__(path, writable, mode)
        self._local = threading.local()  # .bounce: this thread's buffer
        self._busy = BusyRanges()
        try:
            self.block = self._find_block()  # bytes
        except StorageError:
            self.close()
            raise

    def _find_block(self) -> int:
        # Of a hole, or past the end of the file, anything can be read: that tells nothing of what can be written.
        for block in _LOGICAL_BLOCKS if self.next_data(0) == 0 else _LOGICAL_BLOCKS[-1:]:
            try:
                os.preadv(self.fd, [self._bounce()[:block]], 0)
                return block
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise self._failed("read", block, 0, error) from None
        raise StorageError(f"cannot read {self.name} past the page cache", code=errno.EINVAL)

    def _bounce(self) -> memoryview:
        try:
            view: memoryview = self._local.bounce
        except AttributeError:
            # An anonymous map starts on a page: aligned for every device.
            view = self._local.bounce = memoryview(mmap.mmap(-1, _BOUNCE_BYTES))
        return view

    def _blocks(self, length: int, offset: int) -> Iterator[tuple[int, int, int, int]]:
        """Cut a request into rounds of (block offset, block bytes, start and end of the request's bytes in them)."""
        end = offset + length if length else 0
        start = offset - offset % self.block
        while start < end:
            size = min(-(-(end - start) // self.block) * self.block, _BOUNCE_BYTES)
            yield start, size, max(offset - start, 0), min(end - start, size)
            start += size

    def _read_blocks(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            n = os.preadv(self.fd, (view[done:],), offset + done)
            done += n
            if n == 0 or n % self.block:  # the end of the file
                view[done:] = bytes(len(view) - done)
                return

    def pread_into(self, buf: WriteBuffer, offset: int) -> None:
        view, bounce, done = memoryview(buf), self._bounce(), 0
        try:
            for start, size, first, last in self._blocks(len(buf), offset):
                self._read_blocks(bounce[:size], start)
                view[done : done + last - first] = bounce[first:last]
                done += last - first
        except OSError as error:
            raise self._failed("read", len(buf), offset, error) from None

    def pwrite(self, buf: ReadBuffer, offset: int) -> None:
        view, bounce, done = memoryview(buf), self._bounce(), 0
        try:
            for start, size, first, last in self._blocks(len(buf), offset):
                longer = last < size and not self.fixed_size and start + size > self.size()
                # Who writes further on waits, too: the file is cut after this write (I6).
                with self._busy.hold(start, FAR if longer else start + size, first > 0 or last < size):
                    end = max(self.size(), start + last) if longer else 0
                    if first:
                        self._read_blocks(bounce[: self.block], start)
                    if last < size and (size > self.block or not first):
                        self._read_blocks(bounce[size - self.block : size], start + size - self.block)
                    bounce[first:last] = view[done : done + last - first]
                    self._finish_write(bounce[:size], start, 0)
                    if longer:
                        os.ftruncate(self.fd, end)
                done += last - first
        except OSError as error:
            raise self._failed("write", len(buf), offset, error) from None

    def pwritev(self, bufs: Sequence[ReadBuffer], offset: int) -> None:
        self.pwrite(b"".join(bufs), offset)

    def prefetch(self, offset: int, length: int) -> None:
        """Nothing: reads go past the cache that this would fill."""
