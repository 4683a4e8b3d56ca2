"""Opening an image with everything under it: formats, names, loops.  What may be opened is for backing to say."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Callable

from ..backing.foreign import FOREIGN_FORMATS, open_foreign
from ..backing.names import BackingName, parse_name
from ..backing.policy import BackingPolicy
from ..backing.probe import probe
from ..check.image_end import as_file
from ..errors import ImageFormatError, NotQEDError, StorageError, UnsupportedError
from ..format.header import FEATURE_NO_PROBE
from ..storage import Storage, close_all
from ..storage.cache_mode import CacheMode, cache_mode
from ..storage.file import FileStorage
from ..storage.file_lock import LockedError
from ..storage.open import is_uri, open_storage
from .image import DEFAULT_L2_CACHE, Parts, QEDImage
from .in_flight import InFlight
from .raw import RawImage
from .source import Source, layers

Opener = Callable[[str, bool, CacheMode], Storage]


class ChainOpener:
    """Opens one image and its backing chain."""

    def __init__(
        self,
        mode: CacheMode,
        l2_cache: int,
        parts: Parts,
        clock: Callable[[], float],
        log: Callable[[str], None],
        opener: Opener,
        follow: bool,
        write_below: Callable[[str, str], bool],
        policy: BackingPolicy,
        in_flight: InFlight | None,
    ) -> None:
        self._mode = mode
        self._l2_cache = l2_cache
        self._parts = parts
        self._clock = clock
        self._log = log
        self._opener = opener
        self._follow = follow  # open the backing files, too
        self._write_below = write_below  # (name, path of a backing file) -> open it for writing
        self._policy = policy
        self._in_flight = in_flight  # of the top image
        self._images: list[QEDImage] = []  # from the top
        self._storages: list[Storage] = []  # all that is open
        self._seen: dict[object, str] = {}  # identities -> paths

    def open(self, path: str, writable: bool) -> QEDImage:
        """Open every file of the chain before the first is changed; then start from the bottom up."""
        backing: Source | None = None
        try:
            self._push_image(self._opened(self._opener(path, writable, self._mode), path), path, writable)
            while self._follow and backing is None:
                name = self._images[-1].backing_name
                if not name:
                    break
                path, backing = self._open_below(name, path)
            for image in reversed(self._images):
                image.start(backing)
                backing = image
            return self._images[0]
        except BaseException:
            with suppress(StorageError):  # the first error is the one to tell
                close_all(self._storages)
            raise

    def _opened(self, storage: Storage, path: str) -> Storage:
        """Enter a storage into the lists.  Raises UnsupportedError if it is in the chain already."""
        self._storages.append(storage)
        self._refuse_loop(path, storage.identity())
        self._seen[storage.identity()] = path
        return storage

    def _refuse_loop(self, path: str, identity: object) -> None:
        above = self._seen.get(identity)
        if above is not None:
            raise UnsupportedError(f"backing files form a loop: {path} is {above}, which is above it in the chain")

    def _push_image(self, storage: Storage, path: str, writable: bool) -> None:
        """Put a QED image under those that are open."""
        if writable:
            storage = as_file(storage, writable=True)
        try:
            image = QEDImage(
                storage,
                writable,
                writethrough=self._mode.writethrough,
                l2_cache=self._l2_cache,
                parts=self._parts,
                clock=self._clock,
                log=self._log,
                in_flight=None if self._images else self._in_flight,
            )
        except NotQEDError as error:
            raise NotQEDError(f"{storage.name}: {error}{_other_format(path)}") from None
        except (ImageFormatError, UnsupportedError) as error:
            raise type(error)(f"{storage.name}: {error}") from None
        self._images.append(image)

    def _open_below(self, name: str, overlay_path: str) -> tuple[str, Source | None]:
        """Open the backing file called `name`: its path or URI, and the source it is unless it was a QED image."""
        overlay = self._images[-1]
        what = f"backing file {name!r} of {overlay.storage.name}"
        where = parse_name(name, overlay_path)
        if where.words is not None and where.format == "qed":  # as raw, its guest data would be taken for an image
            raise UnsupportedError(f"{what}: only QEMU can open it")
        self._policy.check_name(where, what)
        path = where.path or where.uri or name
        real = self._policy.admit(path, what) if where.path is not None else path
        writable = where.path is not None and self._write_below(name, path)
        no_probe = bool(overlay.header.features & FEATURE_NO_PROBE)
        format = "raw" if no_probe else where.format
        try:
            if where.words is not None and format in FOREIGN_FORMATS:
                return path, RawImage(
                    self._opened(open_foreign(path, format, self._mode, path), path), guest_of=(path, format)
                )
            storage = self._opened(self._open_storage(where, real, writable), path)
            self._policy.check_opened(real, storage, what)
        except StorageError as error:
            if isinstance(error, LockedError):  # perhaps by ourselves, further up
                self._refuse_loop(path, error.identity)
            raise StorageError(f"{overlay.storage.name}: its backing file: {error}", code=error.errno) from None
        what = f"{storage.name}, the backing file of {overlay.storage.name}"
        format = format or self._policy.choose_format(storage, what)
        if format == "qed":
            self._push_image(storage, path, writable)
            return path, None
        if format == "raw":
            plain = where.path is not None and not where.offset and where.size is None
            return path, RawImage(storage, offset=where.offset, size=where.size, writable=writable and plain)
        if format not in FOREIGN_FORMATS:
            raise UnsupportedError(f"{what}, is a {format} image, which is not supported")
        self._policy.check_self_contained(storage, format, what)
        identity = storage.identity()
        self._storages.remove(storage)
        storage.close()
        confined = real if self._policy.confines(format) else None
        target = os.path.abspath(path) if where.path else path
        foreign = open_foreign(target, format, self._mode, identity, confined)
        self._storages.append(foreign)
        return path, RawImage(foreign, guest_of=(path, format))

    def _open_storage(self, where: BackingName, path: str, writable: bool) -> Storage:
        """The bytes of a backing file.  Raises StorageError and UnsupportedError."""
        if where.uri is not None:
            from ..storage.nbd import open_uri

            return open_uri(where.uri, False, trusted=False)
        if where.words is not None:
            return open_foreign(where.words, "raw", self._mode, path)
        return self._opener(path, writable, self._mode)


def _other_format(path: str) -> str:
    """What the file at `path` is, which is no QED image, for its message."""
    if is_uri(path):
        return ""
    try:
        storage = FileStorage(path, writable=False)
        try:
            found = probe(storage)
        finally:
            storage.close()
    except StorageError:
        return ""
    return f": it is a {found} image" if found != "raw" else ": it is raw, if it is an image"


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
    opener: Opener = open_storage,
    follow: bool = True,
    write_below: Callable[[str, str], bool] = lambda name, path: False,
    policy: BackingPolicy = BackingPolicy(),
    in_flight: InFlight | None = None,
    tidy: Callable[[QEDImage], object] | None = None,
) -> QEDImage:
    """Open the image at `path`, which may be an NBD URI, and its backing chain.  Raises QEDError and its children.

    cache        a name in CACHE_MODES
    l2_cache     bytes, for each image of the chain
    trace        called with the name and the arguments of each trace event, in `trace_dialect` ("7.2" or "2010")
    fault        called with the name of each fault point, where it may raise OSError
    clock        seconds
    log          takes one-line notices
    opener       opens the storages
    follow       False: leave the backing file alone, to describe the image; such an image must not be read
    write_below  asked with the name (as its overlay has it) and the path of each backing file: open it writable?
    policy       what backing files may be, and how their formats are found
    in_flight    shared with other openings of the image whose requests may run at the same time
    tidy         called with the image before it is closed, if it was opened for writing (maintenance.tidy)
    """
    if writable and not follow:
        raise ValueError("an image without its backing file cannot be written")
    parts = Parts()
    if trace is not None or fault is not None:
        from .traced import instrumented

        parts = instrumented(trace, fault, trace_dialect)
    chain = ChainOpener(
        cache_mode(cache), l2_cache, parts, clock, log, opener, follow, write_below, policy, in_flight
    )
    image = chain.open(os.fspath(path), writable)
    image.tidy = tidy
    return image


def open_source(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    cache: str = "writeback",
    opener: Opener = open_storage,
    policy: BackingPolicy = BackingPolicy(),
) -> Source:
    """Open a raw file or an image with its chain, read-only.  `format` is "raw", "qed", another, or None to probe.

    close_source() closes it.  Raises QEDError and its children.
    """
    path = os.fspath(path)
    storage = opener(path, False, cache_mode(cache))
    try:
        found = format or probe(storage)
        if found == "raw":
            return RawImage(storage)
        if found not in ("qed", *FOREIGN_FORMATS):
            raise UnsupportedError(f"{path} is a {found} image, which is not supported")
        identity = storage.identity()
    except BaseException:
        storage.close()
        raise
    storage.close()
    if found == "qed":
        return open_image(path, writable=False, cache=cache, opener=opener, policy=policy)
    target = path if is_uri(path) else os.path.abspath(path)
    return RawImage(open_foreign(target, found, cache_mode(cache), identity), guest_of=(path, found))


def close_source(source: Source | None) -> None:
    """Close the files of a chain that was opened read-only."""
    close_all(layer.storage for layer in layers(source))
