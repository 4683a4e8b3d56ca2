"""FileLock: the locks on an open file by which QEMU's programs and these keep out of each other's way.

QEMU knows permissions that a user of a file has, and permissions that it does not share with other users.  Each is a
byte of the file that is locked for reading: 100 + permission for one that is held, 200 + permission for one that is
not shared.  Read locks never exclude each other; what does is the question that follows, whether anybody else has
the byte that contradicts (raw_apply_lock_bytes and raw_check_lock_bytes of block/file-posix.c).  Two programs that
ask at the same time may both be refused, but never both succeed.

The locks belong to the open file description: they last until its last descriptor is closed, in whatever way a
process ends, survive a fork, and also hold between two descriptors of one process.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from contextlib import suppress

from ..errors import RequestError, StorageError

# Linux; not every build of Python's fcntl has them
_GETLK = getattr(fcntl, "F_OFD_GETLK", 36)
_SETLK = getattr(fcntl, "F_OFD_SETLK", 37)
_FLOCK = "hhqqi0q"  # struct flock with 64-bit offsets: type, whence, start, length, pid (0), padding

_HELD = 100
_UNSHARED = 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3
_NAMES = {_CONSISTENT_READ: "consistent read", _WRITE: "write", _RESIZE: "resize"}

# How a file system says that it has no such locks.
_NO_LOCKS = frozenset((errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))


class LockedError(StorageError):
    """The file is in use by somebody who excludes what is wanted; in QEMU's words, so that they are found."""

    def __init__(self, reason: str, name: str, identity: object) -> None:
        super().__init__(f"{reason}. Is another process using the image [{name}]?", code=errno.EAGAIN)
        self.identity = identity  # Storage.identity() of the file


class NoLocksError(StorageError):
    """The file system has no such locks."""


class Use(enum.Enum):
    """What is done to a file: the permissions that are held, and those that are not shared."""

    SHARED = (_CONSISTENT_READ,), ()  # read, whatever others do
    READ = (_CONSISTENT_READ,), (_WRITE, _RESIZE)
    WRITE = (_CONSISTENT_READ, _WRITE, _RESIZE), (_WRITE, _RESIZE)

    def __init__(self, held: tuple[int, ...], unshared: tuple[int, ...]) -> None:
        self.lock_bytes = frozenset([_HELD + i for i in held] + [_UNSHARED + i for i in unshared])
        # (byte that nobody else may have, what cannot be had if so), in the order in which QEMU asks
        self.conflicts = [(_UNSHARED + i, f'Failed to get "{_NAMES[i]}" lock') for i in held]
        self.conflicts += [(_HELD + i, f'Failed to get shared "{_NAMES[i]}" lock') for i in unshared]


class Locking(enum.Enum):
    """Whether files are locked; the names are QEMU's."""

    AUTO = "auto"  # where the file system can
    ON = "on"  # always: an error where it cannot
    OFF = "off"


def locking(name: str, parameter: str = "lock") -> Locking:
    """The Locking called `name`; RequestError for any other name."""
    try:
        return Locking(name)
    except ValueError:
        raise RequestError(f"{parameter}={name} is not one of {', '.join(mode.value for mode in Locking)}") from None


class FileLock:
    """The locks of the open file description behind `fd`, which its user keeps open.

    Nothing here is thread-safe: files are opened by one thread.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._bytes: frozenset[int] = frozenset()  # what is locked

    def change(self, use: Use) -> None:
        """Lock for `use`, and no longer for any other.  Raises LockedError and NoLocksError; then all is as before.

        Bytes that stay locked are never let go in between: nobody slips in when a reader becomes a writer.
        """
        new = use.lock_bytes - self._bytes
        try:
            self._lock(sorted(new))
            for byte, reason in use.conflicts:
                if self._taken(byte):
                    raise self._locked(reason)
        except BaseException:
            self._unlock(new)
            raise
        self._unlock(self._bytes - use.lock_bytes)
        self._bytes = use.lock_bytes

    def copy(self, other: FileLock) -> None:
        """Lock what `other` has locked in the same file.  It has asked, so nobody else contradicts."""
        self._lock(sorted(other._bytes))
        self._bytes = other._bytes

    def _lock(self, lock_bytes: Iterable[int]) -> None:
        for byte in lock_bytes:
            try:
                fcntl.fcntl(self._fd, _SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):  # a write lock, which QEMU never takes
                    raise self._locked(f"Failed to lock byte {byte}") from None
                raise self._failed(error) from None

    def _unlock(self, lock_bytes: Iterable[int]) -> None:
        for byte in lock_bytes:
            with suppress(OSError):  # what the system cannot unlock ends with the descriptor
                fcntl.fcntl(self._fd, _SETLK, struct.pack(_FLOCK, fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))

    def _taken(self, byte: int) -> bool:
        """Whether another open file description has the byte locked."""
        wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        try:
            found = fcntl.fcntl(self._fd, _GETLK, wanted)
        except OSError as error:
            raise self._failed(error) from None
        return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)

    def has_writer(self) -> bool:
        """Whether somebody else has the file open for writing.  Raises StorageError, NoLocksError."""
        return self._taken(_HELD + _WRITE)

    def _failed(self, error: OSError) -> StorageError:
        if error.errno in _NO_LOCKS:
            return NoLocksError(f"cannot lock {self._name}: its file system has no locks", code=errno.ENOTSUP)
        return StorageError(f"cannot lock {self._name}", error)

    def _locked(self, reason: str) -> LockedError:
        info = os.fstat(self._fd)
        return LockedError(reason, self._name, (info.st_dev, info.st_ino))
