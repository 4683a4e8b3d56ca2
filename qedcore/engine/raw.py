"""Raw files in a chain, and images in other formats: all of it is data but the holes that the file system tells."""

from __future__ import annotations

import errno
import os

from ..errors import UnsupportedError
from ..storage import Storage
from ..storage.file import FileStorage
from .cluster_map import FOUND, Kind
from .source import Source


def file_run(storage: Storage, pos: int, length: int) -> tuple[bool, int]:
    """(has data, bytes) of the run at pos of a plain file; a file system that cannot tell has data everywhere."""
    if not isinstance(storage, FileStorage):
        from ..storage.nbd import NbdStorage  # here, because most images are files

        return storage.data_run(pos, length) if isinstance(storage, NbdStorage) else (True, length)
    try:
        data = os.lseek(storage.fd, pos, os.SEEK_DATA)
        if data > pos:
            return False, min(length, data - pos)
        return True, min(length, os.lseek(storage.fd, pos, os.SEEK_HOLE) - pos)
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data up to the end of the file, or past the end
            return False, length
        return True, length


class RawSource:
    """A raw file under an image, or a part of one: all of it is read.

    Also an image in another format, whose guest's view is the storage.  `writable`: commit may write to the storage.
    """

    def __init__(self, storage: Storage, offset: int = 0, size: int | None = None, writable: bool = False) -> None:
        self.storage = storage
        self.backing: Source | None = None
        self.writable = writable
        self._offset = offset  # bytes
        there = storage.size() - offset
        if offset < 0 or there < 0 or (size is not None and not 0 <= size <= there):
            raise UnsupportedError(
                f"{storage.name} has {storage.size()} bytes: the part at {offset} of {size} bytes is not in it"
            )
        self.size = there if size is None else size  # bytes

    def lookup(self, pos: int, length: int) -> tuple[Kind, int, int]:
        return FOUND, self._offset + pos, length

    def data_run(self, pos: int, length: int) -> tuple[bool, int]:
        return file_run(self.storage, self._offset + pos, length)
