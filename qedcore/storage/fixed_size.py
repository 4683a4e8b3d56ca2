"""FixedSizeStorage: a device or an export as a file that grows.

    storage:  | the image             | what was there before ...             |
                                      ^ size(): moved by truncate()           ^ the capacity

I1. Where the image ends is not written anywhere: it is found from the tables (check/image_end.py), as the end of the
    last cluster that is referred to.  An image with damage ends with the storage: what it has lost may be anywhere,
    and stays.
I2. Bytes gained are made zeros, durably, before anything can refer to them: unlike a file's growth, theirs cannot
    get lost in a crash, and old contents would show.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from ..errors import StorageError
from . import ReadBuffer, Storage, Wrapper, WriteBuffer, make_zeros


class FixedSizeStorage(Wrapper):
    """See Storage.  It owns `inner`.

    The size is changed by one thread at a time (the allocator's lock, or nobody else has the image).
    """

    def __init__(self, inner: Storage, size: int) -> None:
        super().__init__(inner)
        self.fixed_size = False  # from here on it is a file like others
        self._size = size  # bytes

    def size(self) -> int:
        return self._size

    def pread_into(self, buf: WriteBuffer, offset: int) -> None:
        length = len(buf)
        if offset + length > self._size:
            view = memoryview(buf).cast("B")
            here = max(self._size - offset, 0)
            view[here:] = bytes(length - here)
            buf = view[:here]
        self._inner.pread_into(buf, offset)

    def pwrite(self, buf: ReadBuffer, offset: int) -> None:
        self._reach(offset + len(buf))
        self._inner.pwrite(buf, offset)

    def pwritev(self, bufs: Sequence[ReadBuffer], offset: int) -> None:
        self._reach(offset + sum(map(len, bufs)))
        self._inner.pwritev(bufs, offset)

    def _reach(self, end: int) -> None:
        if end > self._size:
            self.truncate(end)

    def truncate(self, size: int) -> None:
        capacity = self._inner.size()
        if size > capacity:
            raise StorageError(
                f"cannot make the image in {self.name} {size} bytes long: there are {capacity}", code=errno.ENOSPC
            )
        if size > self._size:
            make_zeros(self._inner, self._size, size)
            self._inner.flush()  # before anything refers to it (I2)
        self._size = size
