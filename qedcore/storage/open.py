"""Opening the storage that a path or an NBD URI names."""

from __future__ import annotations

import os
import re

from . import Storage
from .cache_mode import CacheMode
from .file import FileStorage
from .file_lock import Locking, Use


def is_uri(name: str | os.PathLike[str]) -> bool:
    """`name` is an NBD URI, not a path."""
    return re.match(r"nbds?(\+unix|\+vsock)?://", os.fspath(name)) is not None


def open_storage(path: str | os.PathLike[str], writable: bool, mode: CacheMode = CacheMode()) -> Storage:
    """The storage at `path`, or at an NBD URI: the default opener of images.  Raises as open_file."""
    if is_uri(path):
        from .nbd import open_uri

        return open_uri(os.fspath(path), writable, no_flush=mode.no_flush)
    return open_file(path, writable, mode)


def open_file(
    path: str | os.PathLike[str],
    writable: bool,
    mode: CacheMode = CacheMode(),
    *,
    locking: Locking = Locking.AUTO,
    share: bool = False,
) -> FileStorage:
    """The storage at `path`, locked.  Raises StorageError, LockedError if it is in use.

    `share`: read it whatever others do to it.
    """
    if mode.direct:
        from .direct import DirectStorage

        storage: FileStorage = DirectStorage(path, writable, mode)
    else:
        storage = FileStorage(path, writable, mode)
    try:
        storage.lock(Use.WRITE if writable else Use.SHARED if share else Use.READ, locking)
    except BaseException:
        storage.close()
        raise
    return storage
