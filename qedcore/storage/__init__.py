"""The contract between the engine and the bytes of an image, and who fulfils it.

I1. I/O is positional and full-length: short reads and writes are finished here or raised, nowhere else.
I2. Bytes past the end of the file read as zeros.
I3. flush() returns only when everything written before the call is on stable storage; callers that
    arrive together share one sync.
I4. A failed sync is never forgotten: the system may have dropped the pages, so every later flush fails too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import StorageError
from ..units import KiB, MiB

ZEROS = memoryview(bytes(MiB))  # what zeros are copied and written from: making them takes as long as copying

# bytes, bytearray, memoryview, mmap: whatever the os module takes (typing.Buffer exists from 3.12 on)
ReadBuffer = Any
WriteBuffer = Any


class Storage:
    """A file of bytes, and its capabilities.  Every method raises StorageError with the operating system's errno.

    What not every storage can do has a default here, which is right for those that cannot.
    """

    name: str  # for messages
    fixed_size: bool = False  # a device or an export: truncate() cannot change its size (see FixedSizeStorage)

    def size(self) -> int:
        """Length of the file, bytes."""
        raise NotImplementedError

    def pread_into(self, buf: WriteBuffer, offset: int) -> None:
        raise NotImplementedError

    def pwrite(self, buf: ReadBuffer, offset: int) -> None:
        raise NotImplementedError

    def pwritev(self, bufs: Sequence[ReadBuffer], offset: int) -> None:
        self.pwrite(b"".join(bufs), offset)

    def truncate(self, size: int) -> None:
        """Make the file `size` bytes long; bytes gained read as zeros.  ENOSPC where the size is fixed."""
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError

    def identity(self) -> object:
        """Equal for two storages of one file (finds loops in chains)."""
        raise NotImplementedError

    def close(self) -> None:
        """Release the file; does not flush.  A second call does nothing."""
        raise NotImplementedError

    # -- capabilities --------------------------------------------------------------------------------------------

    def punch(self, offset: int, length: int) -> bool:
        """Give back the space of a range inside the file, which then reads as zeros; False if that cannot be done."""
        return False

    def next_data(self, offset: int) -> int:
        """A file offset (bytes) from `offset` on before which there are only zeros: where the next data may be."""
        return offset

    def data_run(self, offset: int, length: int) -> tuple[bool, int]:
        """(it may have data, bytes) of the run at `offset`; what has none reads as zeros."""
        hole = self.next_data(offset) - offset
        return (False, min(length, hole)) if hole > 0 else (True, length)

    def prefetch(self, offset: int, length: int) -> None:
        """Have the system read a range ahead, without waiting for it.  A hint."""

    def drop_cache(self) -> None:
        """What is read from here on comes from the disk, as far as the storage has a cache that can be dropped."""

    def in_doubt(self, offset: int, length: int) -> bool:
        """Whether a write somewhere in this range ended without an answer and may still be carried out, at any time.

        Only a server can do that, after the connection to it was lost.  Such a place is used for nothing else.
        """
        return False


class Wrapper(Storage):
    """A storage over another one, whose methods it has, but for those that its class defines itself.

    They are the inner storage's own bound methods: no call goes through this class.
    """

    def __init__(self, inner: Storage) -> None:
        self._inner = inner
        self.name = inner.name
        self.fixed_size = inner.fixed_size
        own = {name for base in type(self).__mro__ if base not in Storage.__mro__ for name in vars(base)}
        for name in _METHODS - own:
            setattr(self, name, getattr(inner, name))


_METHODS = {name for name, value in vars(Storage).items() if callable(value) and not name.startswith("_")}


def read_from_disk(storage: Storage) -> None:
    """Before any repair: what is read from here on is on stable storage.

    What a killed program has written may not be: a crash could bring entries back that lead to what was cut off, or
    used again.  And when a flush has failed, Linux may go on showing what it could not write, as if it had.
    """
    storage.flush()
    storage.drop_cache()


_BLOCK = 4 * KiB  # bytes: devices and servers zero whole blocks only, and few have larger ones


def make_zeros(storage: Storage, start: int, end: int) -> None:
    """Make bytes [start, end), which are inside the file, read as zeros; their space is given back if possible.

    Where it is not, zeros are written, but only over data.  Raises StorageError.
    """
    if start == end or storage.punch(start, end - start):
        return
    first, last = -(-start // _BLOCK) * _BLOCK, end - end % _BLOCK
    whole = first < last and (first, last) != (start, end) and storage.punch(first, last - first)
    for at, stop in ((start, first), (last, end)) if whole else ((start, end),):
        while at < stop:
            has_data, n = storage.data_run(at, stop - at)
            if has_data:
                n = min(n, len(ZEROS))
                storage.pwrite(ZEROS[:n], at)
            at += n


def close_all(storages: Iterable[Storage]) -> None:
    """Close each of them, whatever happens to the others.  Raises the first error."""
    failure: StorageError | None = None
    for storage in storages:
        try:
            storage.close()
        except StorageError as error:
            failure = failure or error
    if failure is not None:
        raise failure
