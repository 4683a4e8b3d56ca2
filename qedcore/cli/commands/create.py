"""qed create"""

from __future__ import annotations

import argparse
import os

from ...backing.probe import probe
from ...errors import QEDError, RequestError, StorageError, UnsupportedError
from ...format.geometry import SECTOR, round_up
from ...storage.file import FileStorage
from ..creation import SAME_FILE, SIZES, Options, is_device, new_file, plan_image, print_options
from ..locate import Location, backing_path, locate
from ..messages import PROGRAM, open_reason
from ..open import open_qed
from ..options import add_shared, sized
from ..qemu_img import delegate, find_qemu_img, virtual_size

DEFAULT_FORMAT = "raw" if PROGRAM == "qemu-img" else "qed"  # who calls it qemu-img expects qemu-img's
EPILOG = """\
An existing FILE is replaced when everything has been found right, and at once.  Without SIZE a new image is as large
as its backing file.  -o help lists the options of -o.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [OPTION...] FILE [SIZE]"
    add_shared(parser, "q")
    parser.add_argument(
        "-f",
        "--format",
        metavar="FMT",
        help=f"format to make (default: {DEFAULT_FORMAT}); only qemu-img makes others",
    )
    parser.add_argument("-b", dest="backing", metavar="FILE", help="the image that this one is to be based on")
    parser.add_argument("-F", dest="backing_format", metavar="FMT", help="format of the backing file")
    parser.add_argument("-u", dest="unsafe", action="store_true", help="do not look at the backing file; needs SIZE")
    parser.add_argument(
        "-o",
        dest="options",
        action="append",
        default=[],
        metavar="NAME=VALUE[,...]",
        help="options of the format; -o help lists them",
    )


def backing_size(backing: str, format: str, overlay: str) -> int:
    """The device's size in bytes of a backing file, which is opened for it with all that is under it.

    Raises RequestError with qemu-img's message.
    """
    path = ""
    try:
        where = backing_path(backing, overlay)
        if where is None:
            return _size_by_qemu_img(backing, format)
        path = where
        if format == "qed":
            with open_qed(Location(path, path, "qed"), force_share=True, advise=False) as image:
                return image.size
        if format == "raw":
            storage = FileStorage(path, writable=False)
            try:
                return round_up(storage.size(), SECTOR)
            finally:
                storage.close()
        return _size_by_qemu_img(path, format)
    except QEDError as error:
        reason = open_reason(error, path)
        if format == "qed":
            reason = reason.replace(f"Could not open '{path}': ", "", 1)
        raise RequestError(f"{overlay}: {reason}\nCould not open backing image.") from None


def _size_by_qemu_img(path: str, format: str) -> int:
    program = find_qemu_img()
    if program is None:
        raise UnsupportedError(
            f"a backing file called {path} (format {format}) needs qemu-img, which is not installed"
        )
    try:
        return virtual_size(["-U", "-f", format, "--", path], "a backing file")
    except RequestError as error:
        raise UnsupportedError(str(error).partition(f"'{path}': ")[2] or str(error)) from None


def detect(backing: str, overlay: str) -> str:
    """The line that tells which format a backing file has that was named without one."""
    path = backing_path(backing, overlay)
    if path is None:
        return f"Its name is not that of a file, so its format has to be given: {backing}"
    try:
        storage = FileStorage(path, writable=False)
    except StorageError as error:
        reason = open_reason(error, "")
        raise RequestError(f"{overlay}: {reason}\nCould not open backing image.") from None
    try:
        return f"Detected format of {probe(storage)}."
    finally:
        storage.close()


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
        path = backing_path(backing, name)
        if path is not None and format is not None and os.path.exists(name) and os.path.samefile(path, name):
            raise RequestError(SAME_FILE.format(name))
    if format is None:
        hint = "" if unsafe else f"\n{detect(backing, name)}"
        raise RequestError(f"{name}: Backing file specified without backing format{hint}")
    return size


def run(args: argparse.Namespace) -> int:
    wants_help = any(word in ("help", "?") for text in args.options for word in text.split(","))
    format = args.format or DEFAULT_FORMAT
    if format != "qed":
        return delegate(args, f"creating a {format} image")
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
    for key in SIZES:
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
    where = locate(name)
    if where.uri is not None:  # qemu-img would wipe what is there before it finds that it cannot be resized
        raise UnsupportedError(f"{name}: an image is made in a file; nbdcopy takes it to a server")
    if where.path is None:
        if args.format is None:
            args.argv[1:1] = ["-f", format]
        return delegate(args, f"creating {name}")
    image = plan_image(options, size, args.quiet)
    if is_device(where.path):  # as qemu-img; an image gets there by being copied
        raise RequestError(f"{name}: Cannot resize device files")
    with new_file(name, where) as place:
        image.write(place)
    return 0


def image_size(text: str) -> int:
    """SIZE in bytes.  Raises RequestError with qemu-img's message."""
    return sized(text, "image size")
