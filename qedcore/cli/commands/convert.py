"""qed convert"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext

from ...backing.names import resolve
from ...engine.image import QEDImage
from ...errors import RequestError, StorageError, UnsupportedError
from ..conversion import convert, fixed_kind, sparse_size
from ..creation import SAME_FILE, Options, is_device, locate_new, new_file, plan_image, print_options
from ..locate import Location, find_format, is_ours, locate
from ..messages import PROGRAM, not_local
from ..nbdkit import URI, serve
from ..open import open_end_point
from ..options import add_shared, check_cache
from ..qemu_img import ToldError, delegate, must_succeed, option_words, virtual_size

EPILOG = f"""\
From and to QED and raw without help; any other format needs qemu-img, and nbdkit to reach the QED side.  TARGET
appears when it is complete, and replaces an existing file at once.  Several FILEs are put one after the other.

example:  {PROGRAM} convert -p -O qcow2 disk.qed disk.qcow2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [OPTION...] FILE... TARGET"
    add_shared(parser, "fpqUtT")
    parser.add_argument("-O", dest="target_format", metavar="FMT", help="format to make (default: raw)")
    parser.add_argument(
        "-o",
        dest="options",
        action="append",
        default=[],
        metavar="NAME=VALUE[,...]",
        help="options of the format; -o help lists them",
    )
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
    parser.add_argument(
        "-m", dest="coroutines", metavar="N", type=int, default=8, help="threads that read ahead (default: 8)"
    )
    parser.add_argument("-W", dest="out_of_order", action="store_true", help="they may write in any order")
    parser.add_argument("-C", dest="copy_offload", action="store_true", help="accepted")


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


def check_format(args: argparse.Namespace, format: str) -> None:
    """Raise RequestError for options that the target's format does not have."""
    if format not in ("qed", "raw"):
        return
    if args.compress:
        raise RequestError("Compression not supported for this file format")
    sparse_size(args.sparse)
    if format == "qed":
        options = target_options(args, args.files[-1])
        if "backing_file" in options.values:
            if "backing_fmt" not in options.values:
                raise RequestError("Use of backing file requires explicit backing format")
            if len(args.files) > 2:
                raise RequestError(
                    "Having a backing file for the target makes no sense when concatenating multiple input images"
                )
        return
    Options("", args.options, raw=True)
    if args.backing is not None:
        raise RequestError("Backing file not supported for file format 'raw'")


def target_of(args: argparse.Namespace) -> Location:
    """Where the target is, with its format: what its own options say, else -O.  Raises RequestError.

    Only with --target-image-opts it may be found out, and then never to be raw: what is not known for certain is not
    overwritten.
    """
    name = args.files[-1]
    if not args.existing:
        return locate_new(name)._replace(format=args.target_format or "raw")
    target = locate(name, args.target_format if args.target_image_opts else None, args.target_image_opts)
    if target.format is None and args.target_image_opts:
        target = target._replace(format=find_format(target))
        if target.format == "raw":
            raise RequestError(f"Could not open '{name}': nothing tells its format: say driver=raw if it is raw")
    return target._replace(format=target.format or args.target_format or "raw")


def run(args: argparse.Namespace) -> int:
    if any(word in ("help", "?") for text in args.options for word in text.split(",")):
        if args.target_format != "qed":
            return delegate(args, f"options of {args.target_format}")
        print_options(for_file=True)
        return 0
    check_arguments(args)
    if not args.target_image_opts:
        check_format(args, args.target_format or "raw")
    places = [locate(name, args.format, args.image_opts) for name in args.files[:-1]]
    formats = [find_format(where) for where in places]
    target = target_of(args)
    assert target.format is not None
    if target.format != (args.target_format or "raw"):
        check_format(args, target.format)
    if args.snapshot is not None and "qed" in formats:
        raise RequestError("Failed to load snapshot: QED has no internal snapshots")
    if args.bitmaps and "qed" in formats:
        raise RequestError("Source lacks bitmap support")
    ours = all(map(is_ours, places, formats)) and target.format in ("qed", "raw")
    if not ours and "qed" not in (*formats, target.format):
        return delegate(args, f"converting {formats[0]} to {target.format}")
    try:
        if (ours and target.place is not None) or (len(places) == 1 and copies_a_part(args, target)):
            convert_here(args, places, target)
        elif len(places) > 1 or (places[0].place is None and formats[0] == "qed"):
            raise UnsupportedError("QED and another format: one local source and one local target at a time, please")
        elif target.format == "qed":
            from_foreign(args, places[0], formats[0], target)
        else:
            to_foreign(args, places[0], target)
    except ToldError as error:
        return error.exit_code
    return 0


def has_backing(args: argparse.Namespace) -> bool:
    """The target is to have a backing file."""
    return args.backing is not None or any("backing_file=" in text for text in args.options)


def copies_a_part(args: argparse.Namespace, target: Location) -> bool:
    """Only what the top image of the source has is to be copied, which qemu-img could not tell through NBD."""
    return has_backing(args) and target.path is not None and not args.existing and not args.compress


def convert_here(args: argparse.Namespace, places: list[Location], target: Location) -> None:
    """Copy without qemu-img.  Raises QEDError and ToldError."""
    name = f"{target.name}: error while converting qed"
    options = target_options(args, name) if target.format == "qed" else Options(name, [])
    backing = options.values.get("backing_file")
    if backing is not None and target.path is not None and os.path.exists(target.path) and not args.existing:
        path = resolve(backing, target.path)
        if os.path.exists(path) and os.path.samefile(path, target.path):
            raise RequestError(SAME_FILE.format(target.name))
    convert(args, places, target, options)


def _passed(args: argparse.Namespace) -> dict[str, object]:
    """Options that qemu-img is to take over."""
    return {
        "q": args.quiet, "r": args.rate, "m": args.coroutines, "W": args.out_of_order,
        "-salvage": args.salvage,
    }  # fmt: skip


def to_foreign(args: argparse.Namespace, source: Location, target: Location) -> None:
    """A QED image into a format that only qemu-img writes.  Raises QEDError and ToldError."""
    format = None if args.target_image_opts else target.format
    options = option_words(
        **_passed(args), f="raw", O=format, n=args.existing, c=args.compress, S=args.sparse, t=args.cache,
        B=args.backing, F=args.backing_format, o=",".join(args.options) or None,
    )  # fmt: skip
    options += ["--target-is-zero"] if args.target_is_zero else []
    options += ["--target-image-opts"] if args.target_image_opts else []
    in_place = args.existing or target.path is None or is_device(target.path)
    prefix = f"{target.name}: error while converting {target.format}"
    # A format may record the name of its file, or make more of them, called after it; but the name of a backing file
    # counts from where the target is.
    made = (
        nullcontext(target.name)
        if in_place
        else new_file(prefix, target, cache=args.cache, apart=not has_backing(args))
    )
    assert source.place is not None
    with made as place:
        what, lock = f"converting to {target.format}", not args.force_share
        must_succeed(serve(source.place, ["convert", *options, URI, place], what, args, lock=lock))


def from_foreign(args: argparse.Namespace, source: Location, format: str, target: Location) -> None:
    """An image in a format that only qemu-img reads into a QED image.  Raises QEDError and ToldError."""
    what = f"converting {source.name} ({format})"
    given = ["--image-opts"] if args.image_opts else option_words(f=args.format)
    options = [*given, *option_words(**_passed(args), O="raw", n=True, T=args.source_cache, S=args.sparse)]
    if args.existing:
        options += ["--target-is-zero"] if args.target_is_zero else []
        if target.place is None:
            raise not_local(target.name)
        must_succeed(serve(target.place, ["convert", *options, source.name, URI], what, args, writable=True))
        return
    name = f"{target.name}: error while converting qed"
    size = virtual_size([*given, source.name], what)
    image = plan_image(target_options(args, name), size, quiet=True)
    if not image.backing_name:
        options.append("--target-is-zero")
    if target.path is None or is_device(target.path):
        raise RequestError(f"{name}: Cannot resize {fixed_kind(target)}")
    with new_file(name, target, cache=args.cache) as place:
        image.write(place)
        must_succeed(serve(place, ["convert", *options, source.name, URI], what, args, writable=True))
        with open_end_point(Location(target.name, place, "qed")) as made:
            assert isinstance(made, QEDImage)
            if made.header.need_check:  # the server could not close it
                raise StorageError(f"{target.name}: the server did not finish writing")
