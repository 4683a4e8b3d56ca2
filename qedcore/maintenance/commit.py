"""Committing an image: what its guest sees goes into a backing file, and the image is emptied.

I1. The content is durable in the base, and the base is clean, before anything of the image is dropped.  So whenever
    a crash comes, the guest of the image reads the same.
I2. Guests of the layers between, if there are any, do not: their base changes under them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Callable

from ..engine.cluster_map import FOUND, ZERO
from ..engine.image import Metadata, QEDImage
from ..engine.raw import RawImage
from ..engine.source import Source, find_run
from ..errors import CorruptImageError, QEDError, UnsupportedError
from ..format.geometry import ENTRY, UNALLOCATED
from ..format.table import empty
from ..storage.copying import Copy, Piece
from .compact import pack
from .resize import resize


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
    target = base
    if not isinstance(target, (QEDImage, RawImage)) or not target.writable:
        raise UnsupportedError(f"cannot commit into {base.storage.name}")
    try:
        if base.size < image.size:
            if isinstance(target, QEDImage):
                resize(target, image.size)
            else:
                target.grow(image.size)
        Copy(target, progress=progress, written=written).run(_hiding(image, base))
        target.flush()
    except BaseException:
        with suppress(QEDError):  # the first error is the one to tell
            target.close()
        raise
    target.close()  # clean on disk, and any error known, before the image is emptied (I1)
    if not keep:
        with image.maintenance() as metadata:
            _empty(metadata)


def _hiding(image: QEDImage, base: Source) -> Iterator[Piece]:
    """All that hides the base."""
    pos = 0
    while pos < image.size:
        kind, storage, offset, n = find_run(image, pos, image.size - pos, base)
        if kind is FOUND or kind is ZERO:
            yield Piece(pos, n, storage, offset)
        pos += n


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
