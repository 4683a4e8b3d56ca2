"""Targets: the options of -o for QED, what they may be, and making new images."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ImageFormatError, RequestError
from ..format.create import NewImage, plan, qemu_cannot_open
from ..format.geometry import (
    DEFAULT_CLUSTER_SIZE,
    DEFAULT_TABLE_SIZE,
    MAX_CLUSTER_SIZE,
    MAX_DEVICE_SIZE,
    MAX_TABLE_SIZE,
    MIN_CLUSTER_SIZE,
    MIN_TABLE_SIZE,
    Geometry,
)
from ..format.header import HEADER_BYTES, MAX_BACKING_NAME
from ..storage.file_lock import LockedError
from ..storage.replacing import CreateError, replacing
from ..units import SizeRangeError, parse_qemu_size
from .locate import Location, locate
from .messages import did_you_mean, notice, open_reason

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
SIZES = ("cluster_size", "table_size", "size", "extent_size_hint")
_PRINTED = ("size", "backing_file", "backing_fmt", "cluster_size", "table_size", *_FILE_OPTIONS)


class Options:
    """The options of -o as text, with the messages of qemu-img."""

    def __init__(self, name: str, words: list[str], raw: bool = False) -> None:
        self.name = name  # of the image, for messages
        self._known = ("size", *_FILE_OPTIONS) if raw else tuple(_OPTION_HELP)
        self.values: dict[str, str] = {}
        for text in words:
            self.values.update(self._split(text))

    def _split(self, text: str) -> dict[str, str]:
        found = {}
        for word in text.replace(",,", "\0").split(","):
            key, equals, value = word.replace("\0", ",").partition("=")
            if key not in self._known:
                prefix = f"{self.name}: " if self.name else ""
                raise RequestError(f"{prefix}Invalid parameter '{key}'{did_you_mean(key, self._known)}")
            found[key] = value if equals else "on"
        return found

    def size(self, key: str, default: int) -> int:
        """An option in bytes.  Raises RequestError."""
        try:
            return parse_qemu_size(self.values[key]) if key in self.values else default
        except SizeRangeError:
            text = self.values[key]
            raise RequestError(f"{self.name}: Value '{text}' is out of range for parameter '{key}'") from None
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
            elif key in SIZES and key in self.values:
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


def plan_image(options: Options, size: int, quiet: bool) -> NewImage:
    """Say what is to be made.  Raises RequestError, in qemu-img's words, unless such an image can be made."""
    name = options.name
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
    image = plan(
        size,
        cluster_size=cluster_size,
        table_size=table_size,
        backing_file=backing,
        backing_fmt=options.values.get("backing_fmt"),
    )
    warning = qemu_cannot_open(image.header)
    if warning is not None:
        notice(f"warning: {warning}")
    return image


@contextmanager
def new_file(prefix: str, where: Location, *, cache: str | None = None, apart: bool = False) -> Iterator[str]:
    """The empty file that becomes the target when the block has ended well (replacing()).

    Like qemu-img, this program makes a new file durable only if it is asked to, by a cache mode; but always one that
    replaces another, unless the cache mode is "unsafe".  Raises RequestError, with `prefix` and qemu-img's message.
    """
    assert where.path is not None
    sync = None if cache is None else cache != "unsafe"
    try:
        with replacing(where.path, sync=sync, apart=apart) as place:
            yield place
    except LockedError as error:
        raise RequestError(f"{prefix}: {open_reason(error)}") from error
    except CreateError as error:
        raise RequestError(f"{prefix}: Could not create '{where.name}': {os.strerror(error.errno)}") from error


def locate_new(name: str) -> Location:
    """Where a new image called `name` is to be.  Raises RequestError."""
    if name.startswith("json:"):
        raise RequestError("Unknown protocol 'json'")
    return locate(name)


def is_device(path: str) -> bool:
    """There is a block device at `path`."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False
