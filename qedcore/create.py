"""Making a new image: everything is validated first, and the file appears complete or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress

from .errors import ImageFormatError, RequestError, StorageError
from .geometry import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, SECTOR, Geometry, check_device_size, round_up
from .header import FEATURE_BACKING_FILE, FEATURE_NO_PROBE, HEADER_BYTES, MAX_BACKING_NAME, Header


def create(
    path: str | os.PathLike[str],
    size: int,
    *,
    cluster_size: int = DEFAULT_CLUSTER_SIZE,
    table_size: int = DEFAULT_TABLE_SIZE,
    backing_file: str | None = None,
    backing_fmt: str | None = None,
) -> Header:
    """Make an empty image of `size` bytes (rounded up to 512) at `path`; an existing file is replaced at once.

    `backing_fmt` "raw" is recorded in the image; with anything else readers probe.  The backing file is not opened.
    Raises ImageFormatError and RequestError before anything is touched, else StorageError.
    """
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
    # The L1 table is left a hole: an empty one is all zeros.
    _write_atomically(os.path.realpath(path), header.pack() + name, cluster_size + geometry.table_bytes)
    return header


def _write_atomically(path: str, start: bytes, length: int) -> None:
    """Put a file of `length` bytes, beginning with `start`, in the place of `path`."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise StorageError(f"cannot create {path}: it exists and is not a regular file")
    directory = os.path.dirname(path)
    temporary = os.path.join(directory, f".qed-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(start)
            file.truncate(length)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)  # the name, too
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(f"cannot create {path}", error) from None
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
