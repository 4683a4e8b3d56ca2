"""qed resize"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ...errors import ImageFormatError, RequestError, UnsupportedError
from ...maintenance.resize import resize
from ...units import SizeRangeError, parse_qemu_size
from ..locate import find_format, locate
from ..messages import PROGRAM, notice
from ..open import open_qed
from ..options import add_shared
from ..qemu_img import delegate

EPILOG = """\
SIZE is in bytes or has a suffix k, M, G, T, P or E; +SIZE grows and -SIZE shrinks the image by that much.
Space that an image gains reads as zeros.  Data past a new end is lost, hence --shrink must be given for it.
"""

_PREALLOCATION = ("off", "metadata", "falloc", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{PROGRAM} resize [-f FMT] [--image-opts] [--shrink] [-q] FILE [+|-]SIZE"
    add_shared(parser, "fq")
    parser.add_argument("--shrink", action="store_true", help="allow the image to lose what is past its new end")
    parser.add_argument("--preallocation", default="off", metavar="MODE", help="only off")
    parser.add_argument("--size", help=argparse.SUPPRESS)  # from split()


def split(words: Sequence[str]) -> list[str]:
    """The last word is the size, even if it looks like an option."""
    if len(words) < 2 or "-h" in words or "--help" in words:
        return list(words)
    return [f"--size={words[-1]}", *words[:-1]]


def parse_change(text: str) -> tuple[str, int]:
    """("+", "-" or "", bytes).  Raises RequestError with qemu-img's message."""
    sign = text[:1] if text[:1] in ("+", "-") else ""
    number = text[len(sign) :]
    try:
        return sign, parse_qemu_size(number)
    except SizeRangeError:
        raise RequestError(f"Value '{number}' is out of range for parameter 'size'") from None
    except RequestError:
        raise RequestError(
            "Parameter 'size' expects a non-negative number below 2^64\n"
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            "and exabytes, respectively."
        ) from None


def run(args: argparse.Namespace) -> int:
    if args.preallocation not in _PREALLOCATION:
        raise RequestError(f"Invalid preallocation mode '{args.preallocation}'")
    if args.size is None:
        raise RequestError("Not enough arguments")
    if len(args.files) != 1:
        raise RequestError("Expecting image file name and size")
    sign, size = parse_change(args.size)
    where = locate(args.files[0], args.format, args.image_opts)
    if find_format(where) != "qed":
        return delegate(args, f"resizing a {find_format(where)} image")
    with open_qed(where, writable=True, log=notice) as image:
        wanted = {"+": image.size + size, "-": image.size - size}.get(sign, size)
        if wanted <= 0:
            raise RequestError("New image size must be positive")
        if wanted <= image.size and args.preallocation != "off":
            raise RequestError("Preallocation can only be used for growing images")
        if wanted < image.size and not args.shrink:
            print(f"{PROGRAM}: Use the --shrink option to perform a shrink operation.", file=sys.stderr)
            print(
                f"{PROGRAM}: warning: Shrinking an image will delete all data beyond the shrunken image's end. "
                "Before performing such an operation, make sure there is no important data there.",
                file=sys.stderr,
            )
            return 1
        if args.preallocation != "off":
            raise UnsupportedError(f"Unsupported preallocation mode '{args.preallocation}'")
        try:
            if wanted != image.size or args.shrink:
                resize(image, wanted)
        except (ImageFormatError, UnsupportedError):
            raise RequestError("Invalid image size specified") from None
    if not args.quiet:
        print("Image resized.")
    return 0
