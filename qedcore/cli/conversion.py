"""Conversion: images copied, one after the other, into a target that this program writes itself.

Images in other formats come in here where only a part of them is copied (-B), and through qemu-nbd.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ..engine.cluster_map import FOUND, ZERO
from ..engine.image import QEDImage
from ..engine.source import Source, find_run, layers
from ..errors import CorruptImageError, QEDError, RequestError
from ..format.geometry import SECTOR, round_up
from ..storage.copying import WINDOW, Copy, Piece, Target, read_piece
from ..units import KiB
from .creation import Options, is_device, new_file, plan_image
from .images import EndPoint
from .locate import Location, find_format, is_ours
from .messages import notice
from .open import open_end_point
from .options import sized
from .progress import Progress, RateLimit
from .qemu_img import option_words

if TYPE_CHECKING:
    from .foreign_image import ForeignImage

_MAX_SPARSE = 16 << 20  # bytes
_ZERO_UNIT = 4 * KiB  # bytes: of a raw file


def sparse_size(text: str) -> int:
    """-S in bytes.  Raises RequestError."""
    size = sized(text, "buffer size for sparse output")
    if size % SECTOR or size > _MAX_SPARSE:
        raise RequestError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to "
            f"{_MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    return size


def fixed_kind(where: Location) -> str:
    """What QEMU calls a target that has the size it has, in its messages."""
    return "device files" if where.uri is None else "NBD nodes"


@contextmanager
def new_target(
    prefix: str, where: Location, format: str, size: int, options: Options, cache: str | None
) -> Iterator[tuple[EndPoint, bool]]:
    """A new image, QED or raw, of `size` bytes: (the image, it reads as zeros).  Raises RequestError as new_file().

    Devices and NBD exports are there already, and become raw images.
    """
    if where.path is None or is_device(where.path):
        if format != "raw":
            raise RequestError(f"{prefix}: Cannot resize {fixed_kind(where)}")
        with open_end_point(where._replace(format="raw"), True, cache=cache) as image:
            if image.size < size:
                raise RequestError(f"{prefix}: Cannot grow {fixed_kind(where)}")
            yield image, False
            image.flush()
        return
    empty = plan_image(options, size, quiet=True) if format == "qed" else None
    with new_file(prefix, where, cache=cache) as place:
        if empty is None:
            os.truncate(place, size)
        else:
            empty.write(place)
        # Until it is complete nothing need be durable.
        with open_end_point(Location(where.name, place, format), True, cache="unsafe") as image:
            yield image, True


def refuse_source_as_target(sources: Iterable[Source], target: Location, prefix: str) -> None:
    """Raise RequestError if the target is one of the files that are read."""
    try:
        info = os.stat(target.path or "")
    except OSError:
        return
    for source in sources:
        if any(layer.storage.identity() == (info.st_dev, info.st_ino) for layer in layers(source)):
            raise RequestError(f"{prefix}: the target is the source, or a backing file of it")


def copy_unit(target: EndPoint, smallest: int = 0) -> int:
    """Bytes: in units of what size zeros are left out of a copy, none of them below `smallest`."""
    unit = target.geometry.cluster_size if isinstance(target, QEDImage) else _ZERO_UNIT
    return min(round_up(max(unit, smallest), unit), WINDOW)


class SourceReader:
    """What is to be copied of `source`, to `base` (bytes) of the target, and reading it.

    `edge`, bytes: before it the target's backing file has what the top image of the source lacks.  `salvage`: what
    cannot be read becomes zeros, with a line on standard error for each place unless `quiet`.
    """

    def __init__(self, source: Source, base: int, edge: int, salvage: bool, quiet: bool) -> None:
        self._source = source
        self._base = base
        self._edge = min(edge, source.backing.size) if source.backing is not None else 0
        self._salvage = salvage
        self._quiet = quiet
        self._lost_end = -1  # of what could not be read last, in the source

    def pieces(self) -> Iterator[Piece]:
        """Raises RequestError and StorageError."""
        source, pos = self._source, 0
        while pos < source.size:
            above, end = (source.backing, min(self._edge, source.size)) if pos < self._edge else (None, source.size)
            try:
                kind, storage, offset, n = find_run(source, pos, end - pos, above)
            except CorruptImageError as error:
                if not self._salvage:
                    raise RequestError(f"error while reading block status at offset {pos}: {error}") from error
                kind, storage, offset, n = ZERO, None, 0, self._to_next_cluster(pos)
                self._warn(pos, n, error)
            if kind is FOUND or kind is ZERO:
                yield Piece(self._base + pos, n, storage, offset)
            pos += n

    def _to_next_cluster(self, pos: int) -> int:
        size = self._source.geometry.cluster_size if isinstance(self._source, QEDImage) else SECTOR
        return min(size - pos % size, self._source.size - pos)

    def read(self, piece: Piece, view: memoryview) -> None:
        """See copying.Read.  Raises RequestError."""
        try:
            read_piece(piece, view)
            return
        except QEDError as error:
            if not self._salvage:
                raise RequestError(f"error while reading at byte {piece.pos - self._base}: {error}") from error
        for start in range(0, len(view), SECTOR):
            part = view[start : start + SECTOR]
            try:
                read_piece(piece._replace(offset=piece.offset + start), part)
            except QEDError as error:
                part[:] = bytes(len(part))
                self._warn(piece.pos - self._base + start, len(part), error)

    def _warn(self, pos: int, n: int, error: QEDError) -> None:
        """n bytes at pos of the source cannot be read: a line for each place, however much is lost there."""
        if pos != self._lost_end and not self._quiet:
            notice(f"warning: error while reading offset {pos}: {error}")
        self._lost_end = pos + n


def copier(args: argparse.Namespace, target: Target, fresh: bool, unit: int, progress: Progress) -> Copy:
    """A Copy with the options of convert; `unit`, bytes, is that of the target for zeros."""
    rate = sized(args.rate, "rate limit") if args.rate is not None else 0
    sparse = sparse_size(args.sparse)
    return Copy(
        target,
        fresh=fresh,
        detect=unit if sparse else 0,
        store=not sparse,
        # In order: a place that cannot be read is told of once.
        readers=1 if args.salvage else args.coroutines,
        any_order=args.out_of_order,
        progress=progress.update,
        written=RateLimit(rate).wait,
    )


def _open_source(args: argparse.Namespace, where: Location) -> EndPoint | ForeignImage:
    format = find_format(where)
    if is_ours(where, format):
        return open_end_point(where, cache=args.source_cache, force_share=args.force_share)
    from .foreign_image import open_foreign_image  # here and below, because it is rare, and takes its time

    return open_foreign_image(where, format, args.source_cache, args.force_share)


def convert(args: argparse.Namespace, places: list[Location], target: Location, options: Options) -> None:
    """Copy images into one, with the options of the command.  Raises QEDError, and ToldError."""
    with ExitStack() as stack:
        sources: list[EndPoint | ForeignImage] = []
        for where in places:
            source = _open_source(args, where)
            stack.callback(source.close)
            sources.append(source)
        prefix = f"{target.name}: error while converting {target.format}"
        refuse_source_as_target(sources, target, prefix)
        total = sum(source.size for source in sources)
        image: EndPoint
        edge = 0  # bytes: how far the target's backing file reaches
        if args.existing:
            image, fresh = stack.enter_context(_existing(args, target, total)), args.target_is_zero
        elif target.format in ("qed", "raw"):
            image, fresh = stack.enter_context(new_target(prefix, target, target.format, total, options, args.cache))
        else:
            from .foreign_image import new_foreign_image

            words = option_words(o=",".join(args.options) or None, b=args.backing, F=args.backing_format)
            image, edge = stack.enter_context(new_foreign_image(prefix, target, total, words, args.cache))
            fresh = False
        if image.backing is not None:
            fresh = False
            edge = image.backing.size if args.backing is not None or not args.existing else 0
        progress = stack.enter_context(Progress(args, total))
        copy = copier(args, image, fresh, copy_unit(image, sparse_size(args.sparse)), progress)
        base = 0
        for source in sources:
            reader = SourceReader(source, base, edge, args.salvage, args.quiet)
            copy.run(reader.pieces(), reader.read)
            base += source.size


@contextmanager
def _existing(args: argparse.Namespace, target: Location, size: int) -> Iterator[EndPoint]:
    with open_end_point(target, True, cache=args.cache) as image:
        if image.size < size:
            raise RequestError("output file is smaller than input file")
        yield image
        image.flush()
