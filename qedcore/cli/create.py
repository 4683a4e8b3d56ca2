"""qed create"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from ..chain import probe, resolve
from ..create import create
from ..errors import ImageFormatError, QEDError, RequestError, StorageError, UnsupportedError
from ..geometry import (
    DEFAULT_CLUSTER_SIZE,
    DEFAULT_TABLE_SIZE,
    MAX_CLUSTER_SIZE,
    MAX_DEVICE_SIZE,
    MAX_TABLE_SIZE,
    MIN_CLUSTER_SIZE,
    MIN_TABLE_SIZE,
    SECTOR,
    Geometry,
    round_up,
)
from ..header import HEADER_BYTES, MAX_BACKING_NAME, Header
from ..sizes import parse_qemu_size
from ..storage.file import open_storage
from .common import (
    PROGRAM,
    Location,
    add_shared,
    delegate,
    find_qemu_img,
    locate,
    open_qed,
    open_reason,
    refuse_if_in_use,
    sized,
)

HELP = "make an empty image"
EPILOG = """\
An existing FILE is replaced when everything has been found right, and at once.  Without SIZE a new image is as large
as its backing file.  -o help lists the options of -o.
"""

SAME_FILE = "{}: Error: Trying to create an image with the same filename as the backing file"

_OPTION_HELP = {
    "backing_file": "=<str>     - File name of a base image",
    "backing_fmt": "=<str>      - Image format of the base image",
    "cluster_size": "=<size>    - Cluster size (in bytes)",
    "extent_size_hint": "=<size> - Extent size hint for the image file, 0 to disable",
    "nocow": "=<bool (on/off)>  - Turn off copy-on-write (valid only on btrfs)",
    "preallocation": "=<str>    - Preallocation mode (allowed values: off, falloc, full)",
    "size": "=<size>            - Virtual disk size",
    "table_size": "=<size>      - L1/L2 table size (in clusters)",
}
# Options of the file that QEMU stores an image in: taken, and without effect on an image that is still empty.
_FILE_OPTIONS = ("nocow", "preallocation", "extent_size_hint")
_SIZES = ("cluster_size", "table_size", "size", "extent_size_hint")
_PRINTED = ("size", "backing_file", "backing_fmt", "cluster_size", "table_size", *_FILE_OPTIONS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "fq")
    parser.add_argument("-b", dest="backing", metavar="FILE", help="the image that this one is to be based on")
    parser.add_argument("-F", dest="backing_format", metavar="FMT", help="format of the backing file")
    parser.add_argument("-u", dest="unsafe", action="store_true", help="do not look at the backing file; needs SIZE")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="NAME=VALUE[,...]")
    parser.add_argument("files", metavar="FILE [SIZE]", nargs="*", help="SIZE in bytes, or with k, M, G, T, P or E")


class Options:
    """The options of -o as text, with the messages of qemu-img."""

    def __init__(self, name: str, words: list[str]) -> None:
        self.name = name  # of the image, for messages
        self.values: dict[str, str] = {}
        for text in words:
            self.values.update(self._split(text))

    def _split(self, text: str) -> dict[str, str]:
        found = {}
        for word in text.replace(",,", "\0").split(","):
            key, equals, value = word.replace("\0", ",").partition("=")
            if key not in _OPTION_HELP:
                raise RequestError(f"{self.name}: Invalid parameter '{key}'")
            found[key] = value if equals else "on"
        return found

    def size(self, key: str, default: int) -> int:
        """An option in bytes.  Raises RequestError."""
        try:
            return parse_qemu_size(self.values[key]) if key in self.values else default
        except RequestError:
            raise RequestError(
                f"{self.name}: Parameter '{key}' expects a non-negative number below 2^64\n"
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
                "and exabytes, respectively."
            ) from None

    def line(self, size: int) -> str:
        """What qemu-img prints before it creates an image."""
        words = [f"Formatting '{self.name}', fmt=qed"]
        for key in _PRINTED:
            if key == "size":
                words.append(f"size={size}")
            elif key == "cluster_size":
                words.append(f"cluster_size={self.size(key, DEFAULT_CLUSTER_SIZE)}")
            elif key in _SIZES and key in self.values:
                words.append(f"{key}={self.size(key, 0)}")
            elif key in self.values:
                words.append(f"{key}={self.values[key].replace(',', ',,')}")
        return " ".join(words)


def print_options(for_file: bool) -> None:
    """-o help"""
    print("Supported options:" if for_file else "Supported qed options:")
    for key, text in _OPTION_HELP.items():
        if for_file or key not in _FILE_OPTIONS:
            print(f"  {key}{text}")
    if not for_file:
        print("\nThe protocol level may support further options.")
        print("Specify the target filename to include those options.")


def backing_size(backing: str, format: str, overlay: str) -> int:
    """The device's size in bytes of a backing file, which is opened for it with all that is under it.

    Raises RequestError with qemu-img's message.
    """
    path = ""
    try:
        path = resolve(backing, overlay)
        if format == "qed":
            with open_qed(Location(path, path, "qed")) as image:
                return image.size
        if format == "raw":
            storage = open_storage(path, writable=False)
            try:
                return round_up(storage.size(), SECTOR)
            finally:
                storage.close()
        return _size_by_qemu_img(path, format)
    except QEDError as error:
        cause = error.__cause__ if isinstance(error.__cause__, QEDError) else error
        reason = open_reason(cause, path)
        if cause is not error and "Could not open backing file" in str(error):
            reason = f"Could not open backing file: {reason}"
        raise RequestError(f"{overlay}: {reason}\nCould not open backing image.") from None


def _size_by_qemu_img(path: str, format: str) -> int:
    program = find_qemu_img()
    if program is None:
        raise UnsupportedError(f"Unknown driver '{format}'")
    command = [program, "info", "--output=json", "-f", format, path]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise UnsupportedError(done.stderr.strip().partition(f"'{path}': ")[2] or done.stderr.strip())
    return int(json.loads(done.stdout)["virtual-size"])


def detect(backing: str, overlay: str) -> str:
    """The line that tells which format a backing file has that was named without one."""
    try:
        storage = open_storage(resolve(backing, overlay), writable=False)
    except StorageError as error:
        reason = open_reason(error, "")
        raise RequestError(f"{overlay}: {reason}\nCould not open backing image.") from None
    try:
        return f"Detected format of {probe(storage)}."
    finally:
        storage.close()


def check_geometry(name: str, cluster_size: int, table_size: int, size: int) -> None:
    """Raise RequestError, in qemu-img's words, unless an image of these sizes can exist."""
    try:
        Geometry(cluster_size, MIN_TABLE_SIZE)
    except ImageFormatError:
        raise RequestError(
            f"{name}: QED cluster size must be within range [{MIN_CLUSTER_SIZE}, {MAX_CLUSTER_SIZE}] and power of 2"
        ) from None
    try:
        geometry = Geometry(cluster_size, table_size)
    except ImageFormatError:
        raise RequestError(
            f"{name}: QED table size must be within range [{MIN_TABLE_SIZE}, {MAX_TABLE_SIZE}] and power of 2"
        ) from None
    limit = min(geometry.max_image_size, MAX_DEVICE_SIZE)
    if size > limit:
        raise RequestError(
            f"{name}: QED image size must be a non-zero multiple of cluster size and less than {limit} bytes"
        )


def make(name: str, path: str, options: Options, size: int, quiet: bool) -> Header:
    """Say what is made, then make it at `path`; `name` is for messages.  Raises QEDError; then nothing is made."""
    cluster_size = options.size("cluster_size", DEFAULT_CLUSTER_SIZE)
    table_size = options.size("table_size", DEFAULT_TABLE_SIZE)
    if not quiet:
        print(options.line(size))
    check_geometry(name, cluster_size, table_size, size)
    if options.values.get("preallocation", "off") not in ("off", "falloc", "full"):
        raise RequestError(f"{name}: invalid parameter value: {options.values['preallocation']}")
    backing = options.values.get("backing_file")
    room = min(MAX_BACKING_NAME, cluster_size - HEADER_BYTES)
    if backing and len(os.fsencode(backing)) > room:
        raise RequestError(f"{name}: Backing file name is too long: at most {room} bytes fit into the header")
    refuse_if_in_use(path, writable=True)
    try:
        header = create(
            path,
            size,
            cluster_size=cluster_size,
            table_size=table_size,
            backing_file=backing,
            backing_fmt=options.values.get("backing_fmt"),
        )
    except StorageError as error:
        raise RequestError(f"{name}: Could not create '{name}': {os.strerror(error.errno)}") from error
    if table_size == 1:
        print(f"{PROGRAM}: warning: QEMU cannot open images with table_size=1", file=sys.stderr)
    return header


def check_backing(options: Options, backing: str, unsafe: bool) -> int | None:
    """The size (bytes) of the backing file; None if it was not looked at.  Raises RequestError."""
    name = options.name
    if not backing:
        raise RequestError(f"{name}: Expected backing file name, got empty string")
    if backing == name:
        raise RequestError(SAME_FILE.format(name))
    format = options.values.get("backing_fmt")
    size = None
    if not unsafe:
        size = backing_size(backing, format, name) if format is not None else None
        if format is not None and os.path.exists(name) and os.path.samefile(resolve(backing, name), name):
            raise RequestError(SAME_FILE.format(name))
    if format is None:
        hint = "" if unsafe else f"\n{detect(backing, name)}"
        raise RequestError(f"{name}: Backing file specified without backing format{hint}")
    return size


def run(args: argparse.Namespace) -> int:
    wants_help = any(word in ("help", "?") for text in args.options for word in text.split(","))
    if args.format not in (None, "qed"):
        return delegate(args, f"creating a {args.format} image")
    if wants_help:
        print_options(for_file=bool(args.files))
        return 0
    if not args.files:
        raise RequestError("Expecting image file name")
    if len(args.files) > 2:
        raise RequestError(f"Unexpected argument: {args.files[2]}")
    name = args.files[0]
    given = None if len(args.files) == 1 else image_size(args.files[1])
    options = Options(name, args.options)
    for key in _SIZES:
        options.size(key, 0)
    if options.values.get("nocow", "off") not in ("on", "off"):
        raise RequestError(f"{name}: Parameter 'nocow' expects 'on' or 'off'")
    if args.backing is not None:
        options.values["backing_file"] = args.backing
    if args.backing_format is not None:
        options.values["backing_fmt"] = args.backing_format
    if given is not None and "size" in options.values:
        raise RequestError(f"{name}: The image size must be specified only once")
    size = options.size("size", 0) if "size" in options.values else given
    backing = options.values.get("backing_file")
    found = None if backing is None else check_backing(options, backing, args.unsafe)
    size = found if size is None else size
    if size is None:
        raise RequestError(f"{name}: Image creation needs a size parameter")
    path = locate(name).path
    if path is None:
        return delegate(args, f"creating {name}")
    make(name, path, options, size, args.quiet)
    return 0


def image_size(text: str) -> int:
    """SIZE in bytes.  Raises RequestError with qemu-img's message."""
    size = sized(text, "image size")
    if size >= 2**63:
        raise RequestError(f"Invalid image size specified. Must be between 0 and {2**63 - 1}.")
    return size
