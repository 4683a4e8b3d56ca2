"""qed dd"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from ...engine.source import find_run
from ...errors import RequestError, UnsupportedError
from ...format.geometry import SECTOR, round_up
from ...storage.copying import Copy, Piece
from ..conversion import copy_unit, new_target, refuse_source_as_target
from ..creation import Options, locate_new
from ..images import EndPoint
from ..locate import Location, find_format, locate
from ..messages import PROGRAM
from ..open import open_end_point
from ..options import add_shared, sized
from ..progress import Progress
from ..qemu_img import delegate

EPILOG = f"""\
Operands are if=FILE and of=TARGET, and bs=SIZE (512), count=N and skip=N, in blocks.  Blocks are counted from the
beginning of the image: skip=2 count=5 copies three, from the third to the fifth.  Zeros take no space in TARGET.

example:  {PROGRAM} dd -f qed -O raw bs=64k count=1 if=disk.qed of=first.raw
"""

_OPERANDS = ("bs", "count", "if", "of", "skip")
_MAX_BLOCK = 2**31 - 1  # bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [OPTION...] [bs=SIZE] [count=N] [skip=N] if=FILE of=TARGET"
    add_shared(parser, "fU")
    parser.add_argument(
        "-O", dest="target_format", metavar="FMT", default="raw", help="format to make (default: raw)"
    )


def operands(words: list[str]) -> dict[str, str]:
    """The operands by name.  Raises RequestError."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in _OPERANDS:
            raise RequestError(f"unrecognized operand {name if equals else word}")
        found[name] = value
        if name == "bs":
            block_size(value)
        elif name in ("count", "skip"):
            sized(value, name)
    if "if" not in found or "of" not in found:
        raise RequestError("Must specify both input and output files")
    return found


def block_size(text: str) -> int:
    """bs in bytes.  Raises RequestError."""
    size = sized(text, "bs")
    if not 1 <= size <= _MAX_BLOCK:
        raise RequestError(f"Invalid bs specified. Must be between 1 and {_MAX_BLOCK}.")
    return size


def copy(args: argparse.Namespace, image: EndPoint, start: int, end: int, target: Location, format: str) -> None:
    """Bytes [start, end) of the image become a new one, which gets its name when it is complete.  Raises QEDError."""
    prefix = f"{target.name}: error while creating output image"

    def pieces() -> Iterator[Piece]:
        pos = start
        while pos < end:
            _, storage, offset, n = find_run(image, pos, end - pos)
            yield Piece(pos - start, n, storage, offset)
            pos += n

    size = round_up(end - start, SECTOR)
    with new_target(prefix, target, format, size, Options(prefix, []), None) as (out, fresh):
        with Progress(args, end - start) as progress:
            Copy(out, fresh=fresh, detect=copy_unit(out), progress=progress.update).run(pieces())


def run(args: argparse.Namespace) -> int:
    given = operands(args.files)
    source, target = locate(given["if"], args.format, args.image_opts), locate_new(given["of"])
    formats = (find_format(source), args.target_format)
    if None in (source.place, target.place) or not {*formats} <= {"qed", "raw"}:
        if "qed" in formats:
            raise UnsupportedError(f"dd from {formats[0]} to {formats[1]} is not done here: use convert")
        return delegate(args, f"dd from {formats[0]} to {formats[1]}")
    unit = block_size(given.get("bs", "512"))
    with open_end_point(source, force_share=args.force_share) as image:
        refuse_source_as_target([image], target, f"{target.name}: error while creating output image")
        end = min(image.size, sized(given["count"], "count") * unit) if "count" in given else image.size
        start = sized(given.get("skip", "0"), "skip") * unit
        if start > end:
            print(f"{PROGRAM}: {source.name}: cannot skip to specified offset", file=sys.stderr)
        copy(args, image, min(start, end), end, target, args.target_format)
    return 0
