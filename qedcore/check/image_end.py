"""Where an image ends in a storage whose size is fixed: that is not written anywhere, but its tables tell."""

from __future__ import annotations

from ..errors import ImageFormatError, UnsupportedError
from ..format.header import read_header
from ..storage import Storage, read_from_disk
from ..storage.fixed_size import FixedSizeStorage
from .scan import Damage, Scan


def end_of_image(storage: Storage, writable: bool = False) -> int:
    """Where the image in `storage` ends (bytes), from all of its tables; the capacity if it is none, or damaged.

    Of a `writable` one everything after the end will be overwritten.  Raises StorageError.
    """
    lost = False  # some entry does not lead where it should

    def report(damage: Damage) -> None:
        nonlocal lost
        lost = lost or not (damage.past_end or damage.shared or damage.marked)

    try:
        header, geometry, bounds = read_header(storage)
    except (ImageFormatError, UnsupportedError):
        return storage.size()  # opening it will tell
    if writable and header.need_check:
        read_from_disk(storage)
    found = Scan(storage, geometry, bounds, header.l1_table_offset, report=report).run()
    if found.error is not None:
        raise found.error
    return storage.size() if lost else found.end


def as_file(storage: Storage, writable: bool) -> Storage:
    """`storage`; where its size is fixed, as a file that ends where the image does.  Raises StorageError."""
    if not storage.fixed_size:
        return storage
    return FixedSizeStorage(storage, end_of_image(storage, writable))
