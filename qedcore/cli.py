"""The `qed` command: create and info."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from .chain import open_image, resolve
from .create import create
from .errors import QEDError, RequestError, UnsupportedError
from .header import FEATURE_NAMES, FEATURE_NO_PROBE
from .image import QEDImage
from .sizes import format_size, parse_size

EXIT_OK = 0
EXIT_FAILURE = 1


def _create_options(text: str) -> dict[str, str]:
    """-o NAME=VALUE[,NAME=VALUE...]; a doubled comma stands for one, as in QEMU."""
    options = {}
    for word in text.replace(",,", "\0").split(","):
        name, equals, value = word.replace("\0", ",").partition("=")
        if name not in ("cluster_size", "table_size", "backing_file", "backing_fmt", "size") or not equals:
            raise RequestError(
                f"invalid option {word!r}: use cluster_size=, table_size=, size=, backing_file=, backing_fmt="
            )
        options[name] = value
    return options


def _create(args: argparse.Namespace) -> None:
    options: dict[str, str] = {}
    for text in args.options:
        options.update(_create_options(text))
    size_text = args.size if args.size is not None else options.get("size")
    if size_text is None:
        raise RequestError("image creation needs a size")
    kwargs = {name: parse_size(options[name], name) for name in ("cluster_size", "table_size") if name in options}
    backing = options.get("backing_file")
    header = create(
        args.file, parse_size(size_text), backing_file=backing, backing_fmt=options.get("backing_fmt"), **kwargs
    )
    if header.table_size == 1:
        print("qed: warning: QEMU cannot open images with table_size=1", file=sys.stderr)
    line = f"Formatting '{args.file}', fmt=qed size={header.image_size}"
    if backing:
        line += f" backing_file={backing}"
        if "backing_fmt" in options:
            line += f" backing_fmt={options['backing_fmt']}"
    line += f" cluster_size={header.cluster_size}"
    if "table_size" in options:
        line += f" table_size={header.table_size}"
    print(line)


def _describe(path: str, image: QEDImage) -> dict[str, object]:
    """What info prints, under qemu-img's JSON names; those with an underscore are ours."""
    header = image.header
    facts: dict[str, object] = {
        "virtual-size": header.image_size,
        "filename": path,
        "cluster-size": header.cluster_size,
        "table-size": header.table_size,
        "format": "qed",
        "actual-size": os.stat(path).st_blocks * 512,
        "features": [name for bit, name in FEATURE_NAMES.items() if header.features & bit],
        "dirty-flag": header.need_check,
    }
    if image.backing_name is not None:
        facts["backing-filename"] = image.backing_name
        try:
            facts["full-backing-filename"] = resolve(image.backing_name, path)
        except UnsupportedError:
            facts["full-backing-filename"] = image.backing_name
        if header.features & FEATURE_NO_PROBE:
            facts["backing-filename-format"] = "raw"
    return facts


def _info(args: argparse.Namespace) -> None:
    with open_image(args.file, writable=False, follow=False) as image:
        facts = _describe(args.file, image)
    if args.output == "json":
        print(json.dumps(facts, indent=4))
        return
    size = facts["virtual-size"]
    assert isinstance(size, int)
    actual = facts["actual-size"]
    assert isinstance(actual, int)
    print(f"image: {args.file}")
    print("file format: qed")
    print(f"virtual size: {format_size(size)} ({size} bytes)")
    print(f"disk size: {format_size(actual)}")
    print(f"cluster_size: {facts['cluster-size']}")
    print(f"table_size: {facts['table-size']}")
    if "backing-filename" in facts:
        line = f"backing file: {facts['backing-filename']}"
        if facts["full-backing-filename"] != facts["backing-filename"]:
            line += f" (actual path: {facts['full-backing-filename']})"
        print(line)
    if "backing-filename-format" in facts:
        print(f"backing file format: {facts['backing-filename-format']}")
    if facts["dirty-flag"]:
        print("dirty: not closed cleanly; opening it for writing checks and repairs it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qed", description="Work with QED (QEMU Enhanced Disk) images.")
    parser.add_argument("--debug", action="store_true", help="show a traceback with errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("create", help="make an empty image")
    command.add_argument("-o", dest="options", action="append", default=[], metavar="NAME=VALUE[,...]",
                         help="cluster_size=, table_size=, backing_file=, backing_fmt=, size=")  # fmt: skip
    command.add_argument("file", metavar="FILE")
    command.add_argument("size", metavar="SIZE", nargs="?", help="bytes, or with a suffix k, M, G, T, P, E")
    command.set_defaults(run=_create)

    command = commands.add_parser("info", help="describe an image")
    command.add_argument("--output", choices=("human", "json"), default="human")
    command.add_argument("file", metavar="FILE")
    command.set_defaults(run=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except QEDError as error:
        if args.debug:
            raise
        print(f"qed: {error}", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_OK
