"""Names of images on the command line: what they mean, and which format is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ..backing.names import from_options, json_options, parse_name
from ..backing.probe import probe
from ..errors import RequestError, StorageError, UnsupportedError
from ..storage import Storage
from ..storage.file import FileStorage
from ..storage.file_lock import Locking
from ..storage.open import open_storage
from .messages import open_reason

# What may stand before a colon in a name, for QEMU.
_PROTOCOLS = frozenset(
    "file host_device host_cdrom nbd http https ftp ftps tftp ssh iscsi iser rbd nfs gluster gluster+tcp "
    "gluster+unix gluster+rdma nvme fat vxhs sheepdog sheepdog+tcp sheepdog+unix blkdebug blkverify blkreplay "
    "blklogwrites null-co null-aio quorum io_uring nvme-io_uring virtio-blk-vfio-pci virtio-blk-vhost-user "
    "virtio-blk-vhost-vdpa".split()
)


class Location(NamedTuple):
    """Where an image is, from its name on the command line."""

    name: str  # as given, for messages
    path: str | None  # of a local file
    format: str | None  # "qed", "raw" or another; None: to be probed
    locking: Locking = Locking.AUTO  # of the file itself, not of its backing files
    uri: str | None = None  # of an NBD export

    @property
    def place(self) -> str | None:
        """The path or the URI; None when only QEMU knows how to get there."""
        return self.path if self.uri is None else self.uri


def _options_of(text: str) -> dict[str, str]:
    """KEY=VALUE[,KEY=VALUE...] with doubled commas for commas."""
    options = {}
    for word in text.replace(",,", "\0").split(","):
        key, _, value = word.replace("\0", ",").partition("=")
        options[key] = value
    return options


def locate(name: str, format: str | None = None, image_opts: bool = False) -> Location:
    """What `name` means: a path, file:PATH, an NBD URI, json:{...}, or with image_opts driver=...,file.filename=...

    Raises RequestError when it cannot be read.
    """
    if image_opts:
        if format is not None:
            raise RequestError("--image-opts and --format are mutually exclusive")
        options: dict[str, str] = _options_of(name)
    elif name.startswith("json:"):
        try:
            options = json_options(name[len("json:") :])
        except ValueError as error:
            raise RequestError(f"Could not open '{name}': Could not parse the JSON options: {error}") from None
    elif re.match(r"nbds?[+:]", name):
        return Location(name, None, format, uri=parse_name(name, "").uri)
    elif re.match(r"[^/]*:", name):
        protocol, _, rest = name.partition(":")
        _check_protocol(protocol, f"Could not open '{name}': ")
        if re.match(r"[^/]*:", rest):
            rest = f"./{rest}"  # so that nobody takes its beginning for another protocol
        return Location(name, rest if protocol == "file" else None, format)
    else:
        return Location(name, name, format)
    if options.get("file.driver") == "nbd" and options.get("driver", "qed") == "qed":
        return Location(name, None, options.get("driver") or format, uri=from_options(options, name, "").uri)
    driver = options.pop("driver", None)
    if driver == "file":  # a protocol by itself: its bytes are the image
        return Location(name, options.get("filename"), format or "raw", _locking(name, options.get("locking")))
    format = driver or format
    path = options.pop("file.filename", None)
    plain = options.pop("file.driver", "file") == "file"
    file_locking = _locking(name, options.pop("file.locking", None))
    if format == "qed" and plain and path is not None and options:
        raise UnsupportedError(
            f"Could not open '{name}': Block format 'qed' does not support the option '{min(options)}'"
        )
    return Location(name, path if plain and not options else None, format, file_locking)


def _locking(name: str, value: str | None) -> Locking:
    """The option `locking` of an image's file."""
    try:
        return Locking("auto" if value is None else value)
    except ValueError:
        raise RequestError(f"Could not open '{name}': invalid parameter value: {value}") from None


def _check_protocol(protocol: str, prefix: str = "") -> None:
    if protocol not in _PROTOCOLS:
        raise RequestError(f"{prefix}Unknown protocol '{protocol}'")


def locate_backing(name: str, overlay: str, format: str | None = None) -> Location:
    """Where the backing file called `name` in the image at `overlay` is: as for those who open the image.

    Raises RequestError and UnsupportedError when it cannot be read.
    """
    where = parse_name(name, overlay)
    if where.words is not None and not name.startswith("json:"):
        _check_protocol(name.partition(":")[0])
    format = format or where.format
    whole = not where.offset and where.size is None
    return Location(where.path or name, where.path if whole else None, format, uri=where.uri)


def backing_path(name: str, overlay: str) -> str | None:
    """The path of locate_backing(); None when only QEMU knows the way."""
    return locate_backing(name, overlay).path


def find_format(where: Location) -> str:
    """The format of the image at `where`: as given, or probed.  Raises RequestError if it cannot be opened."""
    if where.format is not None or where.place is None:
        return where.format or "unknown"
    try:
        with look(where) as storage:
            return probe(storage)
    except StorageError as error:
        raise RequestError(f"Could not open '{where.name}': {open_reason(error, where.place)}") from None


@contextmanager
def look(where: Location) -> Iterator[Storage]:
    """The file or export, to read a little of it: in use or not, that does no harm.  Raises StorageError."""
    assert where.place is not None
    storage: Storage = FileStorage(where.path, False) if where.path is not None else open_storage(where.place, False)
    try:
        yield storage
    finally:
        storage.close()


def is_ours(where: Location, format: str) -> bool:
    """An image in this format is read without qemu-img."""
    return where.place is not None and format in ("qed", "raw")
