"""Committing an image: what its guest sees goes into a backing file, and the image is emptied.

I1. The content is durable in the base, and the base is clean, before anything of the image is dropped.  So whenever
    a crash comes, the guest of the image reads the same.
I2. Guests of the layers between, if there are any, do not: their base changes under them.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Callable

from ..engine.cluster_map import FOUND, ZERO, Kind
from ..engine.image import Metadata, QEDImage
from ..engine.raw import RawSource
from ..engine.source import Source
from ..errors import CorruptImageError, QEDError, UnsupportedError
from ..format.geometry import ENTRY, UNALLOCATED
from ..format.table import empty
from ..storage import Storage
from ..units import MiB
from .compact import pack
from .resize import resize

COPY_STEP = 1 * MiB  # bytes copied at once
_ZEROS = bytes(COPY_STEP)


def commit(
    image: QEDImage,
    base: Source,
    *,
    keep: bool = False,
    progress: Callable[[int], None] = lambda pos: None,
    written: Callable[[int], None] = lambda length: None,
) -> None:
    """Write what `image` has above `base`, a layer of its chain, into it; then empty the image, unless `keep`.

    Both were opened for writing (open_image, write_below) and so repaired if need be; no other request may be in
    flight.  A base that is smaller grows.  The base is closed then.  `progress` is told guest positions,
    `written` how many bytes of data each write had.
    Raises CorruptImageError when damage is left in one of them, before anything is changed; else QEDError.
    """
    for layer in (image, base):
        if isinstance(layer, QEDImage) and layer.header.need_check:
            raise CorruptImageError(f"{layer.storage.name} is damaged: repair it first (check -r all)")
    target = _RawTarget(base) if isinstance(base, RawSource) and base.writable else base
    if not isinstance(target, (QEDImage, _RawTarget)):
        raise UnsupportedError(f"cannot commit into {base.storage.name}")
    try:
        if base.size < image.size:
            if isinstance(target, QEDImage):
                resize(target, image.size)
            else:
                target.grow(image.size)
        _copy(image, base, target, progress, written)
        target.flush()
    except BaseException:
        with suppress(QEDError):  # the first error is the one to tell
            target.close()
        raise
    target.close()  # clean on disk, and any error known, before the image is emptied (I1)
    if not keep:
        with image.maintenance() as metadata:
            _empty(metadata)


def _copy(
    image: QEDImage,
    base: Source,
    target: QEDImage | _RawTarget,
    progress: Callable[[int], None],
    written: Callable[[int], None],
) -> None:
    """Write all that hides the base into it."""
    pos = 0
    while pos < image.size:
        progress(pos)
        storage, offset, kind, n = _find_above(image, base, pos, image.size - pos)
        if kind is FOUND and storage is not None:
            for done in range(0, n, COPY_STEP):
                data = bytearray(min(COPY_STEP, n - done))
                storage.pread_into(data, offset + done)
                target.pwrite(data, pos + done)
                progress(pos + done + len(data))
                written(len(data))
        elif kind is ZERO:
            target.zero(pos, n)
        pos += n


def _find_above(image: Source, base: Source, pos: int, length: int) -> tuple[Storage | None, int, Kind | None, int]:
    """What hides the base at pos: (storage, offset in it, FOUND or ZERO, bytes); None as kind if nothing does."""
    layer: Source | None = image
    while layer is not None and layer is not base:
        if pos >= layer.size:
            return None, 0, ZERO, length  # a shorter layer in between: zeros past its end
        kind, offset, length = layer.lookup(pos, min(length, layer.size - pos))
        if kind is FOUND or kind is ZERO:
            return layer.storage, offset, kind, length
        layer = layer.backing
    return None, 0, None, length


def _empty(metadata: Metadata) -> None:
    """Drop all that the image has.  In any order: its base has the same."""
    geo, offset = metadata.geometry, metadata.header.header.l1_table_offset
    nothing = empty(geo.part_entries)
    for at in range(offset, offset + geo.table_entries * ENTRY, geo.part_bytes):
        table = metadata.tables.read(at, geo.part_entries)
        if table.count(UNALLOCATED) != len(table):
            metadata.tables.write_all(at, nothing)
    metadata.storage.flush()  # the L1 table, before the clusters are given back
    pack(metadata)


class _RawTarget:
    """A raw base, as far as commit needs an image."""

    def __init__(self, source: RawSource) -> None:
        self._source = source
        self._storage = source.storage

    def grow(self, size: int) -> None:
        self._storage.truncate(size)
        self._source.size = size

    def pwrite(self, data: bytearray, pos: int) -> None:
        self._storage.pwrite(data, pos)

    def zero(self, pos: int, length: int) -> None:
        """Write zeros where there are none yet, so that holes stay."""
        for at in range(pos, pos + length, COPY_STEP):
            data = bytearray(min(COPY_STEP, pos + length - at))
            self._storage.pread_into(data, at)
            if data != _ZEROS[: len(data)]:
                self._storage.pwrite(bytes(len(data)), at)

    def flush(self) -> None:
        self._storage.flush()

    def close(self) -> None:
        self._storage.close()
