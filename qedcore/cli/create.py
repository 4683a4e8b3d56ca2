"""qed create"""

from __future__ import annotations

import argparse
import sys

from ..create import create
from ..errors import RequestError
from ..sizes import parse_size

HELP = "make an empty image"

_OPTIONS = ("cluster_size", "table_size", "backing_file", "backing_fmt", "size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options = ", ".join(f"{name}=" for name in _OPTIONS)
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="NAME=VALUE[,...]", help=options)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("size", metavar="SIZE", nargs="?", help="bytes, or with a suffix k, M, G, T, P, E")


def parse_options(text: str) -> dict[str, str]:
    """NAME=VALUE[,NAME=VALUE...]; a doubled comma stands for one, as in QEMU."""
    options = {}
    for word in text.replace(",,", "\0").split(","):
        name, equals, value = word.replace("\0", ",").partition("=")
        if name not in _OPTIONS or not equals:
            raise RequestError(f"invalid option {word!r}: use {'=, '.join(_OPTIONS)}=")
        options[name] = value
    return options


def run(args: argparse.Namespace) -> int:
    options: dict[str, str] = {}
    for text in args.options:
        options.update(parse_options(text))
    size_text = args.size if args.size is not None else options.get("size")
    if size_text is None:
        raise RequestError("image creation needs a size")
    sizes = {name: parse_size(options[name], name) for name in ("cluster_size", "table_size") if name in options}
    backing, backing_fmt = options.get("backing_file"), options.get("backing_fmt")
    header = create(args.file, parse_size(size_text), backing_file=backing, backing_fmt=backing_fmt, **sizes)
    if header.table_size == 1:
        print("qed: warning: QEMU cannot open images with table_size=1", file=sys.stderr)
    words = [f"Formatting '{args.file}', fmt=qed size={header.image_size}"]
    if backing:
        words.append(f"backing_file={backing}")
        if backing_fmt:
            words.append(f"backing_fmt={backing_fmt}")
    words.append(f"cluster_size={header.cluster_size}")
    if "table_size" in options:
        words.append(f"table_size={header.table_size}")
    print(" ".join(words))
    return 0
