"""Options and arguments that several sub-commands take."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import RequestError
from ..storage.cache_mode import CACHE_MODES
from ..units import SizeRangeError, parse_qemu_size
from .messages import PROGRAM

_SHARED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "f": (("-f", "--format"), {"dest": "format", "metavar": "FMT", "help": "format of the image (default: probed)"}),
    "q": (("-q", "--quiet"), {"dest": "quiet", "action": "store_true", "help": "print nothing but errors"}),
    "p": (("-p", "--progress"), {"dest": "progress", "action": "store_true", "help": "print progress, in percent"}),
    "U": (
        ("-U", "--force-share"),
        {"dest": "force_share", "action": "store_true", "help": "open the image even if it is in use"},
    ),
    "t": (
        ("-t",),
        {"dest": "cache", "metavar": "CACHE", "help": f"cache mode for writing: {', '.join(CACHE_MODES)}"},
    ),
    "T": (("-T",), {"dest": "source_cache", "metavar": "CACHE", "help": "cache mode for reading"}),
}


def add_shared(parser: argparse.ArgumentParser, letters: str) -> None:
    """Add --object, --image-opts and the options named by `letters`, of f q p U t T.

    They become args.format, quiet, progress, force_share, cache, source_cache and image_opts; those that are not
    in `letters` have their defaults there, too.
    """
    for letter, (names, keywords) in _SHARED.items():
        if letter in letters:
            parser.add_argument(*names, **keywords)
        else:
            parser.set_defaults(**{keywords["dest"]: False if "action" in keywords else None})
    parser.add_argument("--image-opts", action="store_true", help="FILE is driver=qed,file.filename=NAME")
    parser.add_argument("--object", action="append", metavar="DEF", help="for qemu-img, where that does the work")


def _output(text: str) -> str:
    if text not in ("human", "json"):
        raise RequestError("--output must be used with human or json as argument.")
    return text


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=_output,
        default="human",
        metavar="human|json",
        help="for people (the default), or for programs",
    )


def sized(text: str, what: str, largest: int = 2**63 - 1) -> int:
    """A size on the command line in bytes; RequestError, with qemu-img's message, calls it `what`."""
    try:
        size = parse_qemu_size(text)
    except SizeRangeError:
        size = largest + 1
    except RequestError:
        raise RequestError(
            f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for\n"
            f"{PROGRAM}: kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        ) from None
    if size > largest:
        raise RequestError(f"Invalid {what} specified. Must be between 0 and {largest}.")
    return size


def check_cache(name: str | None, what: str = "cache") -> None:
    """Raise RequestError unless `name` is a cache mode; `what` is "cache" or "source cache"."""
    if name is not None and name not in CACHE_MODES:
        raise RequestError(f"Invalid {what} option: {name}")


def only_image(files: list[str]) -> str:
    """The one image name of a command that takes one."""
    if len(files) != 1:
        raise RequestError("Expecting one image file name")
    return files[0]
