"""Opening an image with everything under it: probing, resolving names, finding loops.

Probing rules.  A backing file is raw, and nothing else, when the image says so (NO_PROBE).  Otherwise its first
bytes decide, as in QEMU: QED, a format that is refused here with advice, or raw.  Guessing is what the image asked
for, and it is a risk: whoever could write the first sector of a raw backing file can make it look like an image.
"""

from __future__ import annotations

import os
import re
import time
from typing import Callable

from .cluster import FOUND, Kind
from .errors import ImageFormatError, StorageError, UnsupportedError
from .header import FEATURE_NO_PROBE
from .image import DEFAULT_L2_CACHE, Parts, QEDImage
from .in_flight import InFlight
from .request import Source
from .storage import Storage
from .storage.file import CacheMode, cache_mode, open_storage
from .storage.lock import LockedError

_PROBE_BYTES = 512

# (offset of the magic in the file, magic, name), for formats that must not be mistaken for raw.
_MAGICS = (
    (0, b"QED\0", "qed"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)


def probe(storage: Storage) -> str:
    """The format of a file by its first bytes: "qed", "raw" or another format's name."""
    data = bytearray(_PROBE_BYTES)
    storage.pread_into(data, 0)
    for offset, magic, name in _MAGICS:
        if data[offset : offset + len(magic)] == magic:
            return name
    return "raw"


def resolve(name: str, overlay: str) -> str:
    """The path of the backing file called `name` in the image at path `overlay`.

    Relative names start from the overlay's directory.  Raises UnsupportedError for names that are not paths.
    """
    if re.match(r"[^/]*:", name):
        protocol, _, rest = name.partition(":")
        if protocol != "file":
            raise UnsupportedError(
                f"backing file {name!r} of {overlay} is not a local file: serve it with nbdkit or qemu-nbd, "
                f"copy it to a raw file, and rebase onto that"
            )
        name = rest
    return os.path.join(os.path.dirname(overlay), name)


class RawSource:
    """A raw file under an image: all of it is data."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.backing: Source | None = None
        self.size = storage.size()  # bytes

    def lookup(self, pos: int, length: int) -> tuple[Kind, int, int]:
        return FOUND, pos, length


class ChainOpener:
    """Opens one image and its backing chain; `seen` holds the files of the chain so far."""

    def __init__(
        self,
        mode: CacheMode,
        l2_cache: int,
        parts: Parts,
        clock: Callable[[], float],
        log: Callable[[str], None],
        opener: Callable[[str, bool, CacheMode], Storage],
        follow: bool,
        write_below: Callable[[str, str], bool],
        in_flight: InFlight | None,
    ) -> None:
        self._mode = mode
        self._l2_cache = l2_cache
        self._parts = parts
        self._clock = clock
        self._log = log
        self._opener = opener
        self._follow = follow  # open the backing files, too
        self._in_flight = in_flight
        self._write_below = write_below  # (name, path of a backing file) -> open it for writing

    def open(self, path: str, writable: bool) -> QEDImage:
        """Open every file of the chain before the first is changed; then start from the bottom up."""
        images: list[QEDImage] = []
        storages: list[Storage] = []
        backing: Source | None = None
        seen: dict[object, str] = {}
        try:
            while True:
                storage = self._open_storage(path, writable, seen, images)
                storages.append(storage)
                if images and self._backing_format(images[-1], storage) == "raw":
                    backing = RawSource(storage)
                    break
                images.append(self._open_image(storage, writable, None if images else self._in_flight))
                name = images[-1].backing_name
                if not name or not self._follow:
                    break
                path = resolve(name, path)
                writable = self._write_below(name, path)
            for image in reversed(images):
                image.start(backing)
                backing = image
            return images[0]
        except BaseException:
            for storage in storages:
                storage.close()
            raise

    def _open_storage(self, path: str, writable: bool, seen: dict[object, str], overlays: list[QEDImage]) -> Storage:
        try:
            storage = self._opener(path, writable, self._mode)
        except StorageError as error:
            if isinstance(error, LockedError):  # perhaps by ourselves, further up
                self._refuse_loop(path, error.identity, seen)
            if not overlays:
                raise
            name = overlays[-1].storage.name
            raise StorageError(f"{name}: its backing file: {error}", code=error.errno) from None
        try:
            self._refuse_loop(path, storage.identity(), seen)
        except UnsupportedError:
            storage.close()
            raise
        seen[storage.identity()] = path
        return storage

    def _refuse_loop(self, path: str, identity: object, seen: dict[object, str]) -> None:
        if identity in seen:
            raise UnsupportedError(
                f"backing files form a loop: {path} is {seen[identity]}, which is above it in the chain"
            )

    def _open_image(self, storage: Storage, writable: bool, in_flight: InFlight | None) -> QEDImage:
        try:
            return QEDImage(
                storage,
                writable,
                writethrough=self._mode.writethrough,
                l2_cache=self._l2_cache,
                parts=self._parts,
                clock=self._clock,
                log=self._log,
                in_flight=in_flight,
            )
        except (ImageFormatError, UnsupportedError) as error:
            raise type(error)(f"{storage.name}: {error}") from None

    def _backing_format(self, overlay: QEDImage, storage: Storage) -> str:
        try:
            found = "raw" if overlay.header.features & FEATURE_NO_PROBE else probe(storage)
            if found not in ("raw", "qed"):
                raise UnsupportedError(
                    f"{storage.name}, the backing file of {overlay.storage.name}, is a {found} image: "
                    f"convert it to raw or QED (qemu-img convert -O raw) and rebase onto the result"
                )
            return found
        except BaseException:
            storage.close()
            raise


def open_image(
    path: str | os.PathLike[str],
    writable: bool = True,
    *,
    cache: str = "writeback",
    l2_cache: int = DEFAULT_L2_CACHE,
    trace: Callable[[str, tuple[object, ...]], None] | None = None,
    trace_dialect: str = "7.2",
    fault: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    log: Callable[[str], None] = lambda line: None,
    opener: Callable[[str, bool, CacheMode], Storage] = open_storage,
    follow: bool = True,
    write_below: Callable[[str, str], bool] = lambda name, path: False,
    in_flight: InFlight | None = None,
) -> QEDImage:
    """Open the image at `path` and its backing chain.  Raises QEDError and its children.

    cache        a name in CACHE_MODES
    l2_cache     bytes, for each image of the chain
    trace        called with the name and the arguments of each trace event, in `trace_dialect` ("7.2" or "2010")
    fault        called with the name of each fault point, where it may raise OSError
    clock        seconds
    log          takes one-line notices
    opener       opens the storages
    follow       False: leave the backing file alone, to describe the image; such an image must not be read
    write_below  asked with the name (as its overlay has it) and the path of each backing file: open it writable?
    in_flight    shared with other openings of the image whose requests may run at the same time
    """
    if writable and not follow:
        raise ValueError("an image without its backing file cannot be written")
    parts = Parts()
    if trace is not None or fault is not None:
        from .instrument import instrumented

        parts = instrumented(trace, fault, trace_dialect)
    chain = ChainOpener(cache_mode(cache), l2_cache, parts, clock, log, opener, follow, write_below, in_flight)
    return chain.open(os.fspath(path), writable)


def open_source(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    cache: str = "writeback",
    opener: Callable[[str, bool, CacheMode], Storage] = open_storage,
) -> Source:
    """Open a raw file or an image with its chain, read-only.  `format` is "raw", "qed" or None to probe.

    close_source() closes it.  Raises QEDError and its children.
    """
    storage = opener(os.fspath(path), False, cache_mode(cache))
    try:
        found = format or probe(storage)
        if found == "raw":
            return RawSource(storage)
        if found != "qed":
            raise UnsupportedError(f"{path} is a {found} image: only raw and QED are read here")
    except BaseException:
        storage.close()
        raise
    storage.close()
    return open_image(path, writable=False, cache=cache, opener=opener)


def close_source(source: Source | None) -> None:
    """Close the files of a chain that was opened read-only."""
    while source is not None:
        source.storage.close()
        source = source.backing
