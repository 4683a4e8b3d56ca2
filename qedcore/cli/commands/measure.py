"""qed measure"""

from __future__ import annotations

import argparse

from ...errors import CorruptImageError, RequestError
from ...format.geometry import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, SECTOR, Geometry, round_up
from ..creation import Options, check_geometry
from ..images import EndPoint, runs
from ..locate import find_format, is_ours, locate
from ..messages import print_json
from ..nbdkit import URI, serve
from ..open import open_end_point
from ..options import add_output, add_shared, sized
from ..progress import silently
from ..qemu_img import delegate, option_words

EPILOG = """\
"required" is enough for the data that the image has now, "fully allocated" for every byte of the device.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [OPTION...] FILE | --size N"
    add_shared(parser, "fU")
    add_output(parser)
    parser.add_argument(
        "-O", dest="target_format", metavar="FMT", default="raw", help="format to make (default: raw)"
    )
    parser.add_argument(
        "-o",
        dest="options",
        action="append",
        default=[],
        metavar="NAME=VALUE[,...]",
        help="options of the format; -o help lists them",
    )
    parser.add_argument("--size", metavar="N", help="measure an empty device of this size instead of FILE")
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="refused: QED has no internal snapshots")


def measure(args: argparse.Namespace, geometry: Geometry, size: int, image: EndPoint | None) -> tuple[int, int]:
    """(required, fully allocated) bytes of a QED file for a device of `size` bytes with the data of `image`.

    Counts whole clusters that hold data, and the L2 tables that reach them.  Raises CorruptImageError, StorageError.
    """
    fixed = geometry.cluster_size + geometry.table_bytes
    clusters = geometry.clusters(size)
    tables = -(-size >> geometry.l1_shift) if size else 0
    full = fixed + tables * geometry.table_bytes + (clusters << geometry.l2_shift)
    used = used_tables = 0
    next_cluster = next_table = 0  # the first that is not counted yet
    for pos, run in () if image is None else silently(args, runs(image, 0, size), size):
        if not run.data:
            continue
        end = pos + run.length
        first, last = max(pos >> geometry.l2_shift, next_cluster), geometry.clusters(end)
        used += max(last - first, 0)
        next_cluster = max(next_cluster, last)
        first, last = max(pos >> geometry.l1_shift, next_table), ((end - 1) >> geometry.l1_shift) + 1
        used_tables += max(last - first, 0)
        next_table = max(next_table, last)
    return fixed + used_tables * geometry.table_bytes + (used << geometry.l2_shift), full


def report(args: argparse.Namespace, required: int, full: int) -> int:
    if args.output == "json":
        print_json({"required": required, "fully-allocated": full})
    else:
        print(f"required size: {required}\nfully allocated size: {full}")
    return 0


def run(args: argparse.Namespace) -> int:
    if (args.size is None) == (not args.files):
        if args.files:
            raise RequestError("--size N cannot be used together with a filename.")
        raise RequestError("Either --size N or one filename must be specified.")
    if len(args.files) > 1:
        raise RequestError("At most one filename argument is allowed.")
    if args.size is not None:
        if args.target_format not in ("qed", "raw"):
            return delegate(args, f"measuring {args.target_format}")
        size = round_up(sized(args.size, "image size"), SECTOR)
        return measured(args, size, None)
    where = locate(args.files[0], args.format, args.image_opts)
    format = find_format(where)
    if not is_ours(where, format):
        if args.target_format == "qed":
            raise RequestError(f"measuring {where.name} ({format}): convert it to QED or raw, or use --size")
        return delegate(args, f"measuring {where.name} ({format})")
    if args.snapshot is not None:
        raise RequestError("Failed to load snapshot: QED has no internal snapshots")
    if args.target_format not in ("qed", "raw"):
        if format == "raw":
            return delegate(args, f"measuring {args.target_format}")
        options = option_words(f="raw", O=args.target_format, o=",".join(args.options) or None)
        words = ["measure", f"--output={args.output}", *options, URI]
        assert where.place is not None
        return serve(where.place, words, f"measuring {args.target_format}", lock=not args.force_share)
    with open_end_point(where, force_share=args.force_share) as image:
        try:
            return measured(args, image.size, image)
        except CorruptImageError as error:
            raise RequestError(f"Could not read file metadata: {error}") from error


def measured(args: argparse.Namespace, size: int, image: EndPoint | None) -> int:
    """Report on a device of `size` bytes for the target format "raw" or "qed"."""
    if args.target_format == "raw":
        Options("", args.options, raw=True)
        return report(args, size, size)
    options = Options("qed", args.options)
    cluster_size = options.size("cluster_size", DEFAULT_CLUSTER_SIZE)
    table_size = options.size("table_size", DEFAULT_TABLE_SIZE)
    check_geometry("qed", cluster_size, table_size, size)
    geometry = Geometry(cluster_size, table_size)
    return report(args, *measure(args, geometry, size, image))
