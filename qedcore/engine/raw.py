"""RawImage: a raw file, or a part of one, seen like an image: as a layer of a chain, and as what is copied."""

from __future__ import annotations

from ..errors import UnsupportedError
from ..storage import ReadBuffer, Storage, WriteBuffer, make_zeros
from .cluster_map import FOUND, Kind
from .source import Source


class RawImage:
    """See Source.  All of it is data in the file's own place; holes are told by data_run().

    Without `size` (bytes) it goes to the end of the file.  With `guest_of`, (name, format), the storage is what a
    guest sees of that image in another format, so that positions in it are not places in a file.  Raises
    UnsupportedError for a part that the file does not have.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        offset: int = 0,
        size: int | None = None,
        writable: bool = False,
        guest_of: tuple[str, str] | None = None,
    ) -> None:
        self.storage = storage
        self.backing: Source | None = None
        self.writable = writable
        self.guest_of = guest_of
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
        return self.storage.data_run(self._offset + pos, length)

    def pread_into(self, buf: WriteBuffer, pos: int) -> None:
        self.storage.pread_into(buf, self._offset + pos)

    def pwrite(self, buf: ReadBuffer, pos: int) -> None:
        self.storage.pwrite(buf, self._offset + pos)

    def clear(self, pos: int, length: int) -> None:
        """Make a range read as zeros, without space of its own where that can be.  Raises StorageError."""
        start = self._offset + pos
        make_zeros(self.storage, start, start + length)

    def grow(self, size: int) -> None:
        """Make it `size` bytes long.  Raises StorageError."""
        self.storage.truncate(size)
        self.size = size

    def flush(self) -> None:
        self.storage.flush()

    def close(self) -> None:
        self.storage.close()

    def __enter__(self) -> RawImage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
