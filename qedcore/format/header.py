"""The header: its fields, their limits, and updates (disk first, memory second).

0  magic            16 features              48 image_size
4  cluster_size     24 compat_features       56 backing_filename_offset
8  table_size       32 autoclear_features    60 backing_filename_size
12 header_size      40 l1_table_offset       64 (usually) the backing file's name
"""

from __future__ import annotations

import errno
import os
import struct
from typing import NamedTuple

from ..errors import ForeignWriterError, ImageFormatError, NotQEDError, RequestError, StorageError, UnsupportedError
from ..locks import Rank, ranked_lock
from ..storage import Storage
from .geometry import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, SECTOR, Bounds, Geometry, check_device_size

MAGIC = 0x00444551  # "QED\0", little-endian
HEADER = struct.Struct("<4I5Q2I")
HEADER_BYTES = 64

FEATURE_BACKING_FILE = 1
FEATURE_NEED_CHECK = 2
FEATURE_NO_PROBE = 4  # the backing file is raw: never guess its format
FEATURE_NAMES = {
    FEATURE_BACKING_FILE: "backing_file",
    FEATURE_NEED_CHECK: "need_check",
    FEATURE_NO_PROBE: "backing_format_no_probe",
}
KNOWN_FEATURES = FEATURE_BACKING_FILE | FEATURE_NEED_CHECK | FEATURE_NO_PROBE
KNOWN_AUTOCLEAR = 0

MAX_BACKING_NAME = 4095  # bytes: QEMU's PATH_MAX without the NUL
_MAX_HEADER_AREA = 2**32 - 1  # bytes


class Header(NamedTuple):
    """The 64 bytes at the start of the file, as numbers."""

    magic: int = MAGIC
    cluster_size: int = DEFAULT_CLUSTER_SIZE  # bytes
    table_size: int = DEFAULT_TABLE_SIZE  # clusters
    header_size: int = 1  # clusters
    features: int = 0
    compat_features: int = 0
    autoclear_features: int = 0
    l1_table_offset: int = DEFAULT_CLUSTER_SIZE  # bytes
    image_size: int = 0  # bytes, of the guest device
    backing_filename_offset: int = 0  # bytes
    backing_filename_size: int = 0  # bytes

    def pack(self) -> bytes:
        return HEADER.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        return cls(*HEADER.unpack(data))

    @property
    def need_check(self) -> bool:
        return bool(self.features & FEATURE_NEED_CHECK)

    @property
    def has_backing(self) -> bool:
        return bool(self.features & FEATURE_BACKING_FILE) and self.backing_filename_size > 0

    @property
    def header_bytes(self) -> int:
        """Length of the header area, where clusters may not be."""
        return self.header_size * self.cluster_size


def read_header(storage: Storage) -> tuple[Header, Geometry, Bounds]:
    """Read and validate, in the order of QEMU's driver (bdrv_qed_open).

    Raises ImageFormatError, UnsupportedError or StorageError.  Bytes that a short file lacks count as zero.
    """
    data = bytearray(HEADER_BYTES)
    storage.pread_into(data, 0)
    header = Header.unpack(bytes(data))
    if header.magic != MAGIC:
        raise NotQEDError(f"image not in QED format: magic is {header.magic:#010x}, not {MAGIC:#010x}")
    unknown = header.features & ~KNOWN_FEATURES
    if unknown:
        raise UnsupportedError(f"unsupported QED features: {unknown:x} (known: {KNOWN_FEATURES:x})")
    geometry = Geometry(header.cluster_size, header.table_size)
    geometry.check_image_size(header.image_size)
    bounds = Bounds(geometry, header.header_size, storage.size())
    if not bounds.valid_table(header.l1_table_offset):
        raise ImageFormatError(
            f"QED table offset is invalid: the L1 table of {geometry.table_bytes} bytes at "
            f"{header.l1_table_offset:#x} is not on clusters from {bounds.start:#x} to {bounds.end:#x}"
        )
    if header.header_bytes > _MAX_HEADER_AREA:
        raise ImageFormatError(
            f"QED header size is too large: {header.header_size} clusters, at most "
            f"{_MAX_HEADER_AREA // header.cluster_size}"
        )
    if header.features & FEATURE_BACKING_FILE:
        end = header.backing_filename_offset + header.backing_filename_size
        if end > header.header_bytes:
            raise ImageFormatError(
                f"QED backing filename offset is invalid: the name ends at {end:#x}, "
                f"the header area at {header.header_bytes:#x}"
            )
        if header.backing_filename_size > MAX_BACKING_NAME:
            raise ImageFormatError(
                f"backing filename of {header.backing_filename_size} bytes is too long: at most {MAX_BACKING_NAME}"
            )
    check_device_size(header.image_size)
    return header, geometry, bounds


def read_backing_name(storage: Storage, header: Header) -> str | None:
    """The backing file's name as written in the image; None without one.  A NUL byte ends it."""
    if not header.has_backing:
        return None
    data = bytearray(header.backing_filename_size)
    storage.pread_into(data, header.backing_filename_offset)
    return os.fsdecode(bytes(data).split(b"\0", 1)[0]) or None


def place_for_name(header: Header, size: int) -> int:
    """File offset (bytes) for a backing file's name of `size` bytes, not over the present one unless that is safe.

    Raises RequestError when there is no room, and UnsupportedError when another program's compat_features may
    depend on there being no such name (QEMU's rule).
    """
    if header.compat_features:
        raise UnsupportedError(f"the image has compatible features of another program: {header.compat_features:x}")
    end = header.header_bytes  # of the header area
    room = min(MAX_BACKING_NAME, end - HEADER_BYTES)
    if size > room:
        raise RequestError(f"no space left in the file header: the name has {size} bytes, at most {room}")
    old = header.backing_filename_offset
    # In the header's own sector both change at once; elsewhere the old name must survive until the header changes.
    if HEADER_BYTES + size <= SECTOR or not header.has_backing or HEADER_BYTES + size <= old:
        return HEADER_BYTES
    if old + header.backing_filename_size + size <= end:
        return old + header.backing_filename_size
    raise RequestError("no space left in the file header: not for both names at once: rebase to a short one first")


class HeaderUpdater:
    """Owns the header of an open image; its lock serialises updates.

    The header lies within one sector, so that a torn write cannot mix two versions.
    """

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self._lock = ranked_lock(Rank.HEADER)
        self.header = header  # replaced under the lock; read freely
        self._certain = True  # it is what is on disk; under the lock

    def refuse_others(self, mark: bool) -> None:
        """Raises ForeignWriterError if somebody else has written the header since it was read or written here.

        With `mark` the image is then marked as to be checked: two have changed its tables.
        """
        with self._lock:
            data = bytearray(HEADER_BYTES)
            self._storage.pread_into(data, 0)
            if not self._certain or data == self.header.pack():
                return
            there = Header.unpack(bytes(data))
            if mark and there.magic == MAGIC and not there.need_check:
                self._storage.pwrite(there._replace(features=there.features | FEATURE_NEED_CHECK).pack(), 0)
        raise ForeignWriterError(
            f"{self._storage.name}: another program writes to it: no clusters are allocated any more: check the image"
        )

    def set_features(self, clear: int = 0, set: int = 0) -> None:
        """Change feature bits on disk, then in memory.  Does not flush."""
        with self._lock:
            features = self.header.features & ~clear | set
            self._write(self.header._replace(features=features))

    def clear_unknown_autoclear(self) -> bool:
        """Drop autoclear bits that this version does not know, durably.  True when there were any."""
        with self._lock:
            known = self.header.autoclear_features & KNOWN_AUTOCLEAR
            if known == self.header.autoclear_features:
                return False
            self._write(self.header._replace(autoclear_features=known))
            # Before any other change: what the bits vouched for is about to become stale.
            self._storage.flush()
            return True

    def set_image_size(self, image_size: int) -> None:
        """Change the size of the guest device (bytes) on disk, then in memory.  Does not flush."""
        with self._lock:
            self._write(self.header._replace(image_size=image_size))

    def set_l1_table_offset(self, offset: int) -> None:
        """Use the L1 table at `offset` (bytes), which is durable, from now on.  Does not flush."""
        with self._lock:
            self._write(self.header._replace(l1_table_offset=offset))

    def set_backing(self, name: str | None, raw: bool = False) -> None:
        """Name another backing file, or none, durably; a crash leaves the old name or the new one.

        `raw` records that its format must never be guessed.  Raises as place_for_name, and StorageError.
        """
        data = os.fsencode(name or "")
        with self._lock:
            offset = place_for_name(self.header, len(data)) if data else 0
            features = self.header.features & ~(FEATURE_BACKING_FILE | FEATURE_NO_PROBE)
            if data:
                features |= FEATURE_BACKING_FILE | (FEATURE_NO_PROBE if raw else 0)
            header = self.header._replace(
                features=features, backing_filename_offset=offset, backing_filename_size=len(data)
            )
            if offset + len(data) <= SECTOR:
                self._write(header, data)  # one sector: all of it or nothing
            else:
                self._storage.flush()  # the present header: an older one may still have its name there
                self._storage.pwrite(data, offset)
                self._storage.flush()  # the name before the header that points at it
                self._write(header)
            self._storage.flush()

    def _write(self, header: Header, name: bytes = b"") -> None:
        """Write the header, with the name that follows it, if any."""
        self._certain = False
        try:
            self._storage.pwrite(header.pack() + name, 0)
        except StorageError as error:
            raise type(error)(f"failed to update header: {error}", code=error.errno or errno.EIO) from None
        self.header = header
        self._certain = True
