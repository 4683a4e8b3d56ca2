"""qed convert"""

from __future__ import annotations

import argparse

from ...engine.image import QEDImage
from ...errors import RequestError, StorageError, UnsupportedError
from ...format.create import replacing
from ..conversion import Conversion, sparse_size, target_options
from ..creation import make, print_options
from ..locate import Location, find_format, is_ours, locate
from ..messages import PROGRAM
from ..nbdkit import URI, serve
from ..open import open_end_point
from ..options import add_shared, check_cache
from ..qemu_img import delegate, foreign_size, option_words

EPILOG = f"""\
From and to QED and raw without help; any other format needs qemu-img, and nbdkit to reach the QED side.  TARGET
appears when it is complete, and replaces an existing file at once.  Several FILEs are put one after the other.

example:  {PROGRAM} convert -p -O qcow2 disk.qed disk.qcow2
"""


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
