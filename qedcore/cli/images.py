"""End points of map, compare, convert and measure: QED images and raw files, seen in the same way.

Both are read with pread_into() and block_status(); both are written with pwrite() and zero().  The status of a run is
what QEMU's block layer says of it, through the whole backing chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable, NamedTuple, Union

from ..engine.cluster_map import FOUND, ZERO
from ..engine.image import QEDImage
from ..engine.raw import RawImage
from ..engine.source import Source
from ..format.geometry import SECTOR, round_up
from ..storage import ZEROS


class Run(NamedTuple):
    """A run of guest bytes in one state."""

    length: int  # bytes
    depth: int  # of the image in the chain that decides: 0 is the top one
    present: bool  # some image of the chain has it
    zero: bool  # reads as zeros
    data: bool  # is stored somewhere
    offset: int | None  # bytes, in `file`
    file: str | None  # the name of the file that has the data
    short: bool = False  # zeros because a backing file ends before it
    end: bool = False  # nothing there, up to the end of the lowest image


EndPoint = Union[QEDImage, RawImage]


Rows = Callable[[int, int], Run]  # block_status() of an image in another format


def block_status(image: EndPoint, pos: int, length: int, foreign: Rows | None = None) -> Run:
    """The run at pos, as far as `length` and the images of the chain agree; length > 0, inside the device.

    `foreign` tells of the image in another format that the chain may end with: without it, there is no telling where
    in which file its data are.  Raises CorruptImageError and StorageError.
    """
    layer: Source | EndPoint | None = image
    depth = size = 0
    while layer is not None:
        size = round_up(layer.size, SECTOR)
        if pos >= size:  # the image above is longer: zeros of its own
            return Run(length, depth - 1, False, True, False, None, None, short=True)
        length = min(length, size - pos)
        if isinstance(layer, RawImage):
            if layer.guest_of is not None and foreign is not None:
                run = foreign(pos, length)
                return run._replace(depth=depth + run.depth)
            offset = layer.lookup(pos, length)[1]
            data, length = layer.data_run(pos, length)
            if layer.guest_of is not None:
                return Run(length, depth, data, not data, data, None, None)
            return Run(length, depth, True, not data, data, offset, layer.storage.name)
        kind, offset, length = layer.lookup(pos, length)
        if kind is FOUND:
            return Run(length, depth, True, False, True, offset, layer.storage.name)
        if kind is ZERO:
            return Run(length, depth, True, True, False, None, None)
        layer = layer.backing
        depth += 1
    return Run(length, depth - 1, False, True, False, None, None, end=pos + length == size)


def runs(image: EndPoint, pos: int, end: int, foreign: Rows | None = None) -> Iterator[tuple[int, Run]]:
    """(position, run) of all runs in [pos, end); neighbours in one state, and contiguous, are joined."""
    waiting: tuple[int, Run] | None = None
    while pos < end:
        run = block_status(image, pos, end - pos, foreign)
        if waiting is not None and _continues(waiting[1], run):
            waiting = (waiting[0], waiting[1]._replace(length=waiting[1].length + run.length))
        else:
            if waiting is not None:
                yield waiting
            waiting = (pos, run)
        pos += run.length
    if waiting is not None:
        yield waiting


def _continues(before: Run, run: Run) -> bool:
    if before.offset is not None and before.offset + before.length != run.offset:
        return False
    return before[1:5] == run[1:5] and before.file == run.file and (before.offset is None) == (run.offset is None)


def first_nonzero(buf: bytearray, length: int) -> int | None:
    """Position of the first sector that is not all zeros in the first `length` bytes; None without one."""
    if buf.startswith(ZEROS[:length]):
        return None
    for pos in range(0, length, SECTOR):
        if not buf.startswith(ZEROS[: min(SECTOR, length - pos)], pos):
            return pos
    return None
