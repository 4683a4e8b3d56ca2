"""qed convert"""

from __future__ import annotations

import argparse
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ...backing.names import resolve
from ...engine.cluster_map import FOUND, ZERO
from ...engine.image import QEDImage
from ...errors import CorruptImageError, QEDError, RequestError, StorageError, UnsupportedError
from ...format.create import replacing
from ...format.geometry import SECTOR, round_up
from ...storage.file_lock import LockedError
from ..common import (
    PROGRAM,
    Location,
    Progress,
    RateLimit,
    add_shared,
    check_cache,
    delegate,
    find_format,
    find_qemu_img,
    is_ours,
    locate,
    notice,
    open_end_point,
    open_reason,
    sized,
)
from ..creation import SAME_FILE, Options, make, print_options
from ..images import BUFFER, EndPoint, block_status, is_zero
from ..qemu_img import URI, option_words, serve

EPILOG = f"""\
From and to QED and raw without help; any other format needs qemu-img, and nbdkit to reach the QED side.  TARGET
appears when it is complete, and replaces an existing file at once.  Several FILEs are put one after the other.

example:  {PROGRAM} convert -p -O qcow2 disk.qed disk.qcow2
"""

_SPARSE = 4096  # bytes: default of -S
_MAX_SPARSE = 16 << 20  # bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [OPTION...] FILE... TARGET"
    add_shared(parser, "fpqUtT")
    parser.add_argument(
        "-O", dest="target_format", metavar="FMT", default="raw", help="format to make (default: raw)"
    )
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="NAME=VALUE[,...]")
    parser.add_argument("-B", "-b", dest="backing", metavar="FILE", help="the target keeps only what FILE lacks")
    parser.add_argument("-F", dest="backing_format", metavar="FMT", help="format of the backing file")
    parser.add_argument("-n", dest="existing", action="store_true", help="write into TARGET, which exists")
    parser.add_argument("--target-is-zero", action="store_true", help="with -n: TARGET reads as zeros already")
    parser.add_argument("--target-image-opts", action="store_true", help="TARGET is driver=...; needs -n")
    parser.add_argument(
        "-S", dest="sparse", metavar="SIZE", default="4k", help="leave out zeros from SIZE on; 0: none"
    )
    parser.add_argument("-r", dest="rate", metavar="RATE", help="bytes per second at most")
    parser.add_argument("--salvage", action="store_true", help="zeros for what cannot be read, instead of giving up")
    parser.add_argument("-c", dest="compress", action="store_true", help="refused for QED and raw")
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="refused: QED has no internal snapshots")
    parser.add_argument("--bitmaps", action="store_true", help="refused: QED has no bitmaps")
    parser.add_argument("--skip-broken-bitmaps", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-m", dest="coroutines", metavar="N", type=int, default=8, help="accepted")
    parser.add_argument("-W", dest="out_of_order", action="store_true", help="accepted")
    parser.add_argument("-C", dest="copy_offload", action="store_true", help="accepted")
    parser.add_argument("files", metavar="FILE", nargs="*")


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


def check_arguments(args: argparse.Namespace) -> None:
    """Raise RequestError for options that do not go together, in qemu-img's words."""
    check_cache(args.cache)
    check_cache(args.source_cache, "source cache")
    if not 1 <= args.coroutines <= 16:
        raise RequestError("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16")
    if args.existing and args.options:
        raise RequestError("-o has no effect when skipping image creation")
    if args.target_is_zero and not args.existing:
        raise RequestError("--target-is-zero requires use of -n flag")
    if args.target_image_opts and not args.existing:
        raise RequestError("--target-image-opts requires use of -n flag")
    if len(args.files) < 2:
        raise RequestError("Must specify image file name")
    if args.target_format not in ("qed", "raw"):
        return
    if args.compress:
        raise RequestError("Compression not supported for this file format")
    sparse_size(args.sparse)
    if args.target_format == "qed":
        options = target_options(args, args.files[-1])
        if "backing_file" in options.values:
            if "backing_fmt" not in options.values:
                raise RequestError("Use of backing file requires explicit backing format")
            if len(args.files) > 2:
                raise RequestError(
                    "Having a backing file for the target makes no sense when concatenating multiple input images"
                )
    elif args.backing is not None:
        raise RequestError("Backing file not supported for file format 'raw'")


def run(args: argparse.Namespace) -> int:
    if any(word in ("help", "?") for text in args.options for word in text.split(",")):
        if args.target_format != "qed":
            return delegate(args, f"options of {args.target_format}")
        print_options(for_file=True)
        return 0
    check_arguments(args)
    places = [locate(name, args.format, args.image_opts) for name in args.files[:-1]]
    formats = [find_format(where) for where in places]
    if args.target_image_opts:
        target = locate(args.files[-1], None, True)
    else:
        target = locate(args.files[-1])._replace(format=args.target_format)
    if args.snapshot is not None and "qed" in formats:
        raise RequestError("Failed to load snapshot: QED has no internal snapshots")
    if args.bitmaps and "qed" in formats:
        raise RequestError("Source lacks bitmap support")
    ours = all(map(is_ours, places, formats))
    if target.path is not None and target.format in ("qed", "raw") and ours:
        Conversion(args, places, target).run()
        return 0
    if "qed" not in formats and target.format != "qed":
        return delegate(args, f"converting {formats[0]} to {args.target_format}")
    source = places[0]
    if len(places) > 1 or target.path is None or (source.place is None and formats[0] == "qed"):
        raise UnsupportedError("QED and another format: one local source and one local target at a time, please")
    if target.format == "qed":
        return from_foreign(args, source, formats[0], target)
    assert source.place is not None
    return to_foreign(args, source.place, target)


class ToldError(Exception):
    """qemu-img failed, and has said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def _must_succeed(exit_code: int) -> None:
    if exit_code:
        raise ToldError(exit_code)


def _passed(args: argparse.Namespace) -> dict[str, object]:
    """Options that qemu-img is to take over."""
    return {
        "p": args.progress, "q": args.quiet, "r": args.rate, "m": args.coroutines, "W": args.out_of_order,
        "-salvage": args.salvage,
    }  # fmt: skip


def to_foreign(args: argparse.Namespace, source: str, target: Location) -> int:
    """A QED image into a format that only qemu-img writes."""
    assert target.path is not None
    options = option_words(
        **_passed(args), f="raw", O=args.target_format, n=args.existing, c=args.compress, S=args.sparse, t=args.cache,
        B=args.backing, F=args.backing_format, o=",".join(args.options) or None,
    )  # fmt: skip
    what, lock = f"converting to {args.target_format}", not args.force_share
    if args.existing:
        return serve(source, ["convert", *options, URI, target.path], what, lock=lock)
    try:
        with replacing(target.path) as temporary:
            _must_succeed(serve(source, ["convert", *options, URI, temporary], what, lock=lock))
    except ToldError as error:
        return error.exit_code
    return 0


def from_foreign(args: argparse.Namespace, source: Location, format: str, target: Location) -> int:
    """An image in a format that only qemu-img reads into a QED image."""
    assert target.path is not None
    what = f"converting {source.name} ({format})"
    given = ["--image-opts"] if args.image_opts else option_words(f=args.format)
    options = [*given, *option_words(**_passed(args), O="raw", n=True, T=args.source_cache, S=args.sparse)]
    if args.existing:
        return serve(target.path, ["convert", *options, source.name, URI], what, writable=True)
    name = f"{target.name}: error while converting qed"
    qed_options = target_options(args, name)
    if "backing_file" not in qed_options.values:
        options.append("--target-is-zero")
    size = foreign_size(source, given, what)
    try:
        with replacing(target.path) as temporary:
            make(name, temporary, qed_options, size, quiet=True)
            _must_succeed(serve(temporary, ["convert", *options, source.name, URI], what, writable=True))
            with open_end_point(Location(target.name, temporary, "qed")) as image:
                assert isinstance(image, QEDImage)
                if image.header.need_check:  # the server could not close it
                    raise StorageError(f"{target.name}: the server did not finish writing")
    except ToldError as error:
        return error.exit_code
    return 0


def foreign_size(source: Location, given: list[str], what: str) -> int:
    """The size in bytes of the device in an image that qemu-img reads, with the options `given`."""
    program = find_qemu_img()
    if program is None:
        raise UnsupportedError(f"{what} needs qemu-img, which cannot be found")
    command = [program, "info", "--output=json", *given, source.name]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RequestError(done.stderr.strip().partition(": ")[2])
    return int(json.loads(done.stdout)["virtual-size"])
