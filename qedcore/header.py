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
from dataclasses import astuple, dataclass, replace

from .errors import ImageFormatError, StorageError, UnsupportedError
from .geometry import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, Bounds, Geometry, check_device_size
from .locks import Rank, ranked_lock
from .storage import Storage

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


@dataclass(frozen=True)
class Header:
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
        return HEADER.pack(*astuple(self))

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
    """Read and validate, in the order of QEMU's driver (behaviour: bdrv_qed_open).

    Raises ImageFormatError, UnsupportedError or StorageError.  Bytes that a short file lacks count as zero.
    """
    data = bytearray(HEADER_BYTES)
    storage.pread_into(data, 0)
    header = Header.unpack(bytes(data))
    if header.magic != MAGIC:
        raise ImageFormatError(f"image not in QED format: magic is {header.magic:#010x}, not {MAGIC:#010x}")
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


class HeaderUpdater:
    """Owns the header of an open image; its lock serialises updates.

    The header lies within one sector, so that a torn write cannot mix two versions.
    """

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self._lock = ranked_lock(Rank.HEADER)
        self.header = header  # replaced under the lock; read freely

    def set_features(self, clear: int = 0, set: int = 0) -> None:
        """Change feature bits on disk, then in memory.  Does not flush."""
        with self._lock:
            features = self.header.features & ~clear | set
            self._write(replace(self.header, features=features))

    def clear_unknown_autoclear(self) -> bool:
        """Drop autoclear bits that this version does not know, durably.  True when there were any."""
        with self._lock:
            known = self.header.autoclear_features & KNOWN_AUTOCLEAR
            if known == self.header.autoclear_features:
                return False
            self._write(replace(self.header, autoclear_features=known))
            # Before any other change: what the bits vouched for is about to become stale.
            self._storage.flush()
            return True

    def _write(self, header: Header) -> None:
        try:
            self._storage.pwrite(header.pack(), 0)
        except StorageError as error:
            raise StorageError(f"failed to update header: {error}", code=error.errno or errno.EIO) from None
        self.header = header
