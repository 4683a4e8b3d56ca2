"""Copying images into new ones or existing ones: QED and raw."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ..backing.names import resolve
from ..engine.cluster_map import FOUND, ZERO
from ..engine.image import QEDImage
from ..errors import CorruptImageError, QEDError, RequestError, StorageError
from ..format.create import replacing
from ..format.geometry import SECTOR, round_up
from ..storage.file_lock import LockedError
from .creation import SAME_FILE, Options, make
from .images import BUFFER, EndPoint, block_status, is_zero
from .locate import Location
from .messages import notice, open_reason
from .open import open_end_point
from .options import sized
from .progress import Progress, RateLimit

_SPARSE = 4096  # bytes: default of -S
_MAX_SPARSE = 16 << 20  # bytes


class Copy:
    """Copies images, one after the other, into a target.

    `fresh`: the target reads as zeros wherever it has no backing file.  `granule` is in bytes: zeros are left out in
    these units; 0 writes them all.
    """

    def __init__(
        self,
        target: EndPoint,
        fresh: bool,
        granule: int,
        based: bool,
        limit: RateLimit,
        salvage: bool,
        quiet: bool,
        progress: Progress,
    ) -> None:
        self._target = target
        self._granule = granule
        self._based = based  # the target has a backing file that stands for what the source's top image lacks
        self._skip_zeros = fresh and target.backing is None
        self._limit = limit
        self._salvage = salvage
        self._quiet = quiet
        self._lost_end = -1  # of what could not be read last, in the source
        self._progress = progress
        self._buffer = bytearray(BUFFER)

    def run(self, source: EndPoint, name: str, base: int, end: int) -> None:
        """Copy [0, end) of the source to [base, base + end) of the target.  Raises QEDError."""
        pos = 0
        self._lost_end = -1
        while pos < end:
            try:
                kind, n = self._status(source, pos, end - pos)
            except CorruptImageError as error:
                if not self._salvage:
                    raise RequestError(f"error while reading block status at offset {pos}: {error}") from error
                kind, n = "lost", _to_next_cluster(source, pos, end)
                self._warn(pos, n, error)
            if kind == "data":
                self._copy_data(source, name, base, pos, n)
            elif kind != "backing":
                self._zero(base + pos, n)
            pos += n
            self._progress.update(base + pos)

    def _copy_data(self, source: EndPoint, name: str, base: int, pos: int, length: int) -> None:
        end = pos + length
        while pos < end:
            n = min(end - pos, BUFFER - (base + pos) % BUFFER)  # whole granules stay whole
            self._read(source, name, pos, n)
            self._write(base + pos, n)
            pos += n
            self._progress.update(base + pos)

    def _status(self, source: EndPoint, pos: int, length: int) -> tuple[str, int]:
        """("data", "zero" or "backing", bytes) of the run at pos."""
        if not self._based or source.backing is None:
            run = block_status(source, pos, length)
            return ("data" if run.data else "zero"), run.length
        # Only what the top image itself has is copied: the target's backing file stands for the rest, as far as
        # it reaches.
        assert isinstance(source, QEDImage) and self._target.backing is not None
        kind, _, n = source.lookup(pos, length)
        if kind is FOUND:
            return "data", n
        if kind is ZERO:
            return "zero", n
        below = self._target.backing.size - pos
        return ("backing", min(n, below)) if below > 0 else ("data", n)

    def _read(self, source: EndPoint, name: str, pos: int, n: int) -> None:
        view = memoryview(self._buffer)
        try:
            source.pread_into(view[:n], pos)
            return
        except QEDError as error:
            if not self._salvage:
                raise RequestError(f"error while reading at byte {pos}: {error}") from error
        for start in range(0, n, SECTOR):
            part = view[start : min(start + SECTOR, n)]
            try:
                source.pread_into(part, pos + start)
            except QEDError as error:
                part[:] = bytes(len(part))
                self._warn(pos + start, len(part), error)

    def _warn(self, pos: int, n: int, error: QEDError) -> None:
        """n bytes at pos of the source cannot be read: a line for each place, however much is lost there."""
        if pos != self._lost_end and not self._quiet:
            notice(f"warning: error while reading offset {pos}: {error}")
        self._lost_end = pos + n

    def _write(self, pos: int, n: int) -> None:
        """Write the first n bytes of the buffer at pos of the target, zeros in whole granules as such."""
        view = memoryview(self._buffer)
        for start, end, zero in self._segments(pos, n):
            if zero:
                self._zero(pos + start, end - start)
            else:
                self._target.pwrite(view[start:end], pos + start)
        self._limit.wait(n)

    def _segments(self, pos: int, n: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, all zeros) of the parts of the buffer, which goes to pos; neighbours of a kind are joined."""
        if not self._granule:
            yield 0, n, False
            return
        begin, start, last = 0, 0, False
        while start < n:
            end = min(n, start + self._granule - (pos + start) % self._granule)
            zero = is_zero(self._buffer, start, end)
            if zero is not last and start:
                yield begin, start, last
                begin = start
            last, start = zero, end
        yield begin, n, last

    def _zero(self, pos: int, n: int) -> None:
        if self._granule:
            if not self._skip_zeros:
                self._target.zero(pos, n)
            return
        zeros = memoryview(bytes(min(n, BUFFER)))
        for start in range(0, n, BUFFER):
            self._target.pwrite(zeros[: n - start], pos + start)


def _to_next_cluster(source: EndPoint, pos: int, end: int) -> int:
    size = source.geometry.cluster_size if isinstance(source, QEDImage) else SECTOR
    return min(size - pos % size, end - pos)


class Conversion:
    """One run of the command between QED images and raw files."""

    def __init__(self, args: argparse.Namespace, places: list[Location], target: Location) -> None:
        self._args = args
        self._places = places
        self._target = target
        self._sparse = sparse_size(args.sparse)
        self._rate = sized(args.rate, "rate limit") if args.rate is not None else 0

    def run(self) -> None:
        args = self._args
        with ExitStack() as stack:
            sources: list[EndPoint] = []
            for where in self._places:
                source = open_end_point(where, cache=args.source_cache, force_share=args.force_share)
                stack.callback(source.close)
                sources.append(source)
            self._refuse_source_as_target(sources)
            total = sum(source.size for source in sources)
            target, fresh = stack.enter_context(self._open_target(total))
            based = target.backing is not None and (args.backing is not None or not args.existing)
            granule = 0
            if self._sparse:
                unit = target.geometry.cluster_size if isinstance(target, QEDImage) else _SPARSE
                granule = min(round_up(max(unit, self._sparse), unit), BUFFER)
            progress = stack.enter_context(Progress(args, total))
            copy = Copy(target, fresh, granule, based, RateLimit(self._rate), args.salvage, args.quiet, progress)
            base = 0
            for source, where in zip(sources, self._places):
                copy.run(source, where.name, base, source.size)
                base += source.size

    def _refuse_source_as_target(self, sources: list[EndPoint]) -> None:
        try:
            info = os.stat(self._target.path or "")
        except OSError:
            return
        for source in sources:
            layer = source
            while layer is not None:
                if layer.storage.identity() == (info.st_dev, info.st_ino):
                    raise RequestError(
                        f"{self._target.name}: error while converting {self._args.target_format}: "
                        "the target is the source, or a backing file of it"
                    )
                layer = layer.backing  # type: ignore[assignment]

    @contextmanager
    def _open_target(self, size: int) -> Iterator[tuple[EndPoint, bool]]:
        """(the target, reads as zeros).  A new one gets its name when the block has ended well."""
        args, target = self._args, self._target
        assert target.path is not None
        prefix = f"{target.name}: error while converting {args.target_format}"
        if args.existing or _is_device(target.path):
            with self._existing(size) as image:
                yield image, args.target_is_zero
                image.flush()
            return
        if args.target_format == "qed":
            self._check_backing()
        try:
            with replacing(target.path) as temporary:
                self._create(prefix, temporary, size)
                where = Location(target.name, temporary, args.target_format)
                # "unsafe" until it is complete: replacing() makes it durable before it gets its name
                with open_end_point(where, True, cache="unsafe") as image:
                    yield image, True
        except LockedError as error:
            raise RequestError(f"{prefix}: {open_reason(error)}") from error
        except StorageError as error:
            if str(error).startswith("cannot create "):
                raise RequestError(
                    f"{prefix}: Could not create '{target.name}': {os.strerror(error.errno)}"
                ) from error
            raise

    def _create(self, prefix: str, path: str, size: int) -> None:
        if self._args.target_format == "raw":
            os.truncate(path, size)
            return
        options = target_options(self._args, prefix)
        make(prefix, path, options, size, quiet=True)

    def _check_backing(self) -> None:
        backing = target_options(self._args, "").values.get("backing_file")
        if backing is not None and os.path.exists(self._target.path or "") and self._target.path is not None:
            path = resolve(backing, self._target.path)
            if os.path.exists(path) and os.path.samefile(path, self._target.path):
                raise RequestError(SAME_FILE.format(self._target.name))

    @contextmanager
    def _existing(self, size: int) -> Iterator[EndPoint]:
        where = self._target._replace(format=self._target.format or self._args.target_format)
        with open_end_point(where, True, cache=self._args.cache) as image:
            if image.size < size:
                raise RequestError("output file is smaller than input file")
            yield image


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def sparse_size(text: str) -> int:
    """-S in bytes.  Raises RequestError."""
    size = sized(text, "buffer size for sparse output")
    if size % SECTOR or size > _MAX_SPARSE:
        raise RequestError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to "
            f"{_MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    return size


def target_options(args: argparse.Namespace, name: str) -> Options:
    """-o, -B and -F for a QED target; `name` is for messages."""
    try:
        options = Options(name, args.options)
    except RequestError as error:
        raise RequestError(str(error).rpartition(": ")[2]) from None
    if args.backing is not None:
        options.values["backing_file"] = args.backing
    if args.backing_format is not None:
        options.values["backing_fmt"] = args.backing_format
    return options
