"""qed map"""

from __future__ import annotations

import argparse

from ...errors import CorruptImageError, RequestError
from ..foreign_map import rows_of
from ..images import Run, runs
from ..locate import find_format, is_ours, locate
from ..open import open_end_point
from ..options import add_output, add_shared, only_image, sized
from ..progress import silently
from ..qemu_img import delegate

EPILOG = """\
The human format lists data only.  In the JSON format, depth counts backing files from 0, the image itself; present
is false where no file has anything, and such parts, like those with zero, read as zeros.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "fU")
    add_output(parser)
    parser.add_argument("-s", "--start-offset", default="0", metavar="SIZE", help="begin at this position")
    parser.add_argument("-l", "--max-length", metavar="SIZE", help="show no more than this many bytes")


def json_row(pos: int, run: Run) -> str:
    present, zero, data = (str(flag).lower() for flag in (run.present, run.zero, run.data))
    row = f'{{ "start": {pos}, "length": {run.length}, "depth": {run.depth}'
    row += f', "present": {present}, "zero": {zero}, "data": {data}'
    return row + ("}" if run.offset is None else f', "offset": {run.offset}}}')


def run(args: argparse.Namespace) -> int:
    where = locate(only_image(args.files), args.format, args.image_opts)
    format = find_format(where)
    if not is_ours(where, format):
        return delegate(args, f"a map of {where.name} ({format})")
    start = sized(args.start_offset, "start offset")
    with open_end_point(where, force_share=args.force_share) as image:
        end = image.size
        if args.max_length is not None:
            end = min(end, start + sized(args.max_length, "max length"))
        foreign = rows_of(image, args.force_share)
        found_runs = silently(args, runs(image, start, end, foreign), end)
        try:
            if args.output == "json":
                separator = "["
                for pos, found in found_runs:
                    print(separator, json_row(pos, found), sep="", end="")
                    separator = ",\n"
                # qemu-img has a row for an empty range, too
                print("]" if start < end else f"[{json_row(start, Run(0, 0, False, False, False, None, None))}]")
            else:
                print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
                for pos, found in found_runs:
                    if found.data and found.offset is None:
                        raise RequestError("File contains external, encrypted or compressed clusters.")
                    if found.data:
                        print(f"{_hex(pos)}{_hex(found.length)}{_hex(found.offset or 0)}{found.file}")
        except CorruptImageError as error:
            raise RequestError(f"Could not read file metadata: {error}") from error
    return 0


def _hex(value: int) -> str:
    return f"{value:<#16x}" if value else f"{0:<16}"
