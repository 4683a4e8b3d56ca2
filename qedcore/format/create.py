"""Making a new image: everything is validated first, and the file appears complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from ..errors import ImageFormatError, RequestError
from ..storage.replacing import replacing
from .geometry import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, SECTOR, Geometry, check_device_size, round_up
from .header import FEATURE_BACKING_FILE, FEATURE_NO_PROBE, HEADER_BYTES, MAX_BACKING_NAME, Header


class NewImage(NamedTuple):
    """An empty image that is still to be written."""

    header: Header
    backing_name: bytes

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it into the empty file at `path`.  Raises OSError."""
        header = self.header
        with open(path, "r+b") as file:
            file.write(header.pack() + self.backing_name)
            # The L1 table stays a hole: an empty one is all zeros.
            file.truncate(header.l1_table_offset + header.table_size * header.cluster_size)


def qemu_cannot_open(header: Header) -> str | None:
    """The line that says why QEMU does not open an image with this header, although it is valid; None if it does."""
    if header.table_size == 1:
        return "QEMU cannot open images with table_size=1"
    # QEMU computes the largest size of a device in 64 bits, and nothing is left of it where that is 2^64.
    limit = Geometry(header.cluster_size, header.table_size).max_image_size % 2**64
    if header.image_size <= limit:
        return None
    sizes = f"cluster_size={header.cluster_size} and table_size={header.table_size}"
    return f"QEMU cannot open images of more than {limit} bytes with {sizes}"


def plan(
    size: int,
    *,
    cluster_size: int = DEFAULT_CLUSTER_SIZE,
    table_size: int = DEFAULT_TABLE_SIZE,
    backing_file: str | None = None,
    backing_fmt: str | None = None,
) -> NewImage:
    """What create() makes.  Raises ImageFormatError and RequestError."""
    if size < 0:
        raise RequestError(f"image size {size} is negative")
    geometry = Geometry(cluster_size, table_size)
    image_size = round_up(size, SECTOR)
    geometry.check_image_size(image_size)
    check_device_size(image_size)
    name = os.fsencode(backing_file) if backing_file else b""
    room = min(MAX_BACKING_NAME, cluster_size - HEADER_BYTES)
    if len(name) > room:
        raise ImageFormatError(f"backing filename of {len(name)} bytes is too long: at most {room}")
    features = 0
    if name:
        features = FEATURE_BACKING_FILE | (FEATURE_NO_PROBE if backing_fmt == "raw" else 0)
    header = Header(
        cluster_size=cluster_size,
        table_size=table_size,
        header_size=1,
        features=features,
        l1_table_offset=cluster_size,
        image_size=image_size,
        backing_filename_offset=HEADER_BYTES if name else 0,
        backing_filename_size=len(name),
    )
    return NewImage(header, name)


def create(
    path: str | os.PathLike[str],
    size: int,
    *,
    cluster_size: int = DEFAULT_CLUSTER_SIZE,
    table_size: int = DEFAULT_TABLE_SIZE,
    backing_file: str | None = None,
    backing_fmt: str | None = None,
    replace: bool = True,
    check: Callable[[str], None] = lambda path: None,
) -> Header:
    """Make an empty image of `size` bytes (rounded up to 512) at `path`; an existing file is replaced at once.

    `backing_fmt` "raw" is recorded in the image; with anything else readers probe.  The backing file is not opened.
    With `replace` False an existing file is left alone, and the StorageError's errno is EEXIST.  `check` is called
    with the path that the complete file has before it gets its name: if it raises, that is removed.
    Raises ImageFormatError and RequestError before anything is touched, else StorageError.
    """
    image = plan(
        size, cluster_size=cluster_size, table_size=table_size, backing_file=backing_file, backing_fmt=backing_fmt
    )
    with replacing(path, replace) as temporary:
        image.write(temporary)
        check(temporary)
    return image.header
