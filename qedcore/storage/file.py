"""FileStorage: an image in a local file, through the page cache or past it (O_DIRECT), and locked (file_lock.py).

I1-I4 as in the contract.  Buffered I/O takes no lock; the system orders overlapping calls.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Callable

from ..errors import NotWritableError, StorageError
from . import ReadBuffer, Storage, WriteBuffer
from .cache_mode import CacheMode
from .file_lock import FileLock, Locking, NoLocksError, Use
from .flush import GroupCommit
from .sync_thread import SyncThread

_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE, with FALLOC_FL_KEEP_SIZE as it must be
_ZERO_RANGE = 0x10 | 0x01  # FALLOC_FL_ZERO_RANGE, likewise
FAR = 1 << 63  # bytes: past the end of every file
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_IOV_BYTES = 1 << 30  # one system call moves less than 2 GiB
_READAHEAD_BYTES = 128 * 1024  # Linux prefetches no more per call than a device's window, and this is the usual one


@cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, "fallocate64", None) or libc.fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        return ctypes.get_errno() if function(fd, mode, offset, length) else 0

    return fallocate


def punch_hole(fd: int, offset: int, length: int, mode: int = _PUNCH_HOLE) -> None:
    """fallocate(2), which the os module does not have, for a hole.  Raises OSError."""
    code = errno.EINTR
    while code == errno.EINTR:
        code = _fallocate()(fd, mode, offset, length)
    if code:
        raise OSError(code, os.strerror(code))


class FileStorage(Storage):
    """See Storage.  Regular files and block devices only: a FIFO would hang, a directory makes no sense."""

    open_flags = 0  # for open(2), besides the access mode

    def __init__(self, path: str | os.PathLike[str], writable: bool, mode: CacheMode = CacheMode()) -> None:
        self.name = os.fspath(path)
        self.fd = -1
        self._syncs = SyncThread(self._sync)
        self._writable = writable
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        flags |= self.open_flags
        try:
            if stat.S_ISCHR(os.stat(self.name).st_mode):  # opening one may already do something
                raise self._wrong_kind()
            self.fd = os.open(self.name, flags)
            info = os.fstat(self.fd)  # of what was opened: somebody may have put it there meanwhile
            if not (stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode)):
                raise self._wrong_kind()
        except OSError as error:
            self.close()
            kind = NotWritableError if writable and error.errno in _NOT_WRITABLE else StorageError
            raise kind(f"cannot open {self.name}", error) from None
        except StorageError:
            self.close()
            raise
        self._lock: FileLock | None = None
        self.fixed_size = not stat.S_ISREG(info.st_mode)
        self._identity = (info.st_dev, info.st_ino)
        self._commit = GroupCommit(self._ignore_flush if mode.no_flush else self._syncs.sync)

    def _wrong_kind(self) -> StorageError:
        return StorageError(f"cannot open {self.name}: not a file or block device", code=errno.EINVAL)

    def lock(self, use: Use, locking: Locking = Locking.AUTO) -> None:
        """Lock the file for `use` until it is closed, or as long as `use` is not changed.

        Raises LockedError if somebody else uses the file in a way that excludes this; the locks are as before then.
        """
        lock = self._lock
        if lock is None:
            if locking is Locking.OFF:
                return
            lock = FileLock(self.fd, self.name)
        try:
            lock.change(use)
        except NoLocksError:
            if locking is Locking.ON:
                raise
        else:
            self._lock = lock

    def has_writer(self) -> bool:
        """Whether somebody else has the file open for writing, as far as locks tell.  Raises StorageError."""
        try:
            return FileLock(self.fd, self.name).has_writer()
        except NoLocksError:
            return False

    def share_lock(self, other: FileStorage) -> None:
        """Lock the file as `other`, which is the same one, has it locked: the two do not exclude each other."""
        if other._lock is not None:
            self._lock = FileLock(self.fd, self.name)
            self._lock.copy(other._lock)

    def size(self) -> int:
        try:
            return os.lseek(self.fd, 0, os.SEEK_END)
        except OSError as error:
            raise StorageError(f"cannot find the size of {self.name}", error) from None

    def pread_into(self, buf: WriteBuffer, offset: int) -> None:
        try:
            done = os.preadv(self.fd, (buf,), offset)
            if done != len(buf):
                self._finish_read(memoryview(buf), offset, done)
        except OSError as error:
            raise self._failed("read", len(buf), offset, error) from None

    def _finish_read(self, view: memoryview, offset: int, done: int) -> None:
        while done < len(view):
            n = os.preadv(self.fd, (view[done : done + _IOV_BYTES],), offset + done)
            if n == 0:  # the end of the file (I2)
                view[done:] = bytes(len(view) - done)
                return
            done += n

    def pwrite(self, buf: ReadBuffer, offset: int) -> None:
        try:
            done = os.pwrite(self.fd, buf, offset)
            if done != len(buf):
                self._finish_write(memoryview(buf), offset, done)
        except OSError as error:
            raise self._failed("write", len(buf), offset, error) from None

    def _finish_write(self, view: memoryview, offset: int, done: int) -> None:
        while done < len(view):
            n = os.pwrite(self.fd, view[done : done + _IOV_BYTES], offset + done)
            if n == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done += n

    def pwritev(self, bufs: Sequence[ReadBuffer], offset: int) -> None:
        total = sum(map(len, bufs))
        try:
            done = os.pwritev(self.fd, bufs, offset)
        except OSError as error:
            raise self._failed("write", total, offset, error) from None
        if done != total:
            for buf in bufs:
                rest = memoryview(buf)[done:]
                offset += len(buf)
                done = max(done - len(buf), 0)
                if rest:
                    self.pwrite(rest, offset - len(rest))

    def next_data(self, offset: int) -> int:
        """Where the next data may be (bytes), from `offset` on: before are only zeros.  Raises nothing."""
        try:
            return os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            return FAR if error.errno == errno.ENXIO else offset  # ENXIO: only a hole up to the end

    def data_run(self, offset: int, length: int) -> tuple[bool, int]:
        """See storage.data_run.  A file system that cannot tell has data everywhere.  Raises nothing."""
        try:
            data = os.lseek(self.fd, offset, os.SEEK_DATA)
            if data > offset:
                return False, min(length, data - offset)
            return True, min(length, os.lseek(self.fd, offset, os.SEEK_HOLE) - offset)
        except OSError as error:
            # ENXIO: no data up to the end of the file, or past the end
            return error.errno != errno.ENXIO, length

    def prefetch(self, offset: int, length: int) -> None:
        """Have the system read these bytes into its cache; a hint, which may do nothing.  Raises nothing."""
        with suppress(OSError):
            for start in range(offset, offset + length, _READAHEAD_BYTES):
                n = min(_READAHEAD_BYTES, offset + length - start)
                os.posix_fadvise(self.fd, start, n, os.POSIX_FADV_WILLNEED)

    def drop_cache(self) -> None:
        """Forget what is cached and on disk, as far as the system can: it is read again.  Raises nothing."""
        with suppress(OSError):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def truncate(self, size: int) -> None:
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            if error.errno == errno.EINVAL and self.fixed_size:
                raise StorageError(
                    f"cannot make {self.name} {size} bytes long: it is not a regular file", code=errno.ENOSPC
                ) from None
            raise StorageError(f"cannot make {self.name} {size} bytes long", error) from None
        except OverflowError:  # more than off_t can say
            raise StorageError(f"cannot make {self.name} {size} bytes long", OSError(errno.EFBIG, "")) from None

    def punch(self, offset: int, length: int) -> bool:
        try:
            try:
                punch_hole(self.fd, offset, length)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP or not self.fixed_size:
                    raise
                # A device that gives nothing back: the kernel writes zeros (as BLKZEROOUT), and no data goes there.
                punch_hole(self.fd, offset, length, _ZERO_RANGE)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
                return False
            if error.errno == errno.EINVAL and self.fixed_size:  # a device gives back whole blocks only
                return False
            raise self._failed("punch", length, offset, error) from None
        return True

    def flush(self) -> None:
        self._commit.flush()

    def _sync(self) -> None:
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            if not self._writable and error.errno in (errno.EINVAL, errno.EROFS):
                return  # a read-only file system, where all is durable
            raise StorageError(f"cannot flush {self.name}", error) from None

    def _ignore_flush(self) -> None:
        """cache=unsafe."""

    def identity(self) -> object:
        return self._identity

    def close(self) -> None:
        self._syncs.close()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            try:
                os.close(fd)
            except OSError as error:
                raise StorageError(f"cannot close {self.name}", error) from None

    def _failed(self, verb: str, length: int, offset: int, error: OSError) -> StorageError:
        return StorageError(f"cannot {verb} {length} bytes at {offset:#x} of {self.name}", error)
