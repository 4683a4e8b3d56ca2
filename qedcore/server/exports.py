"""What a server offers: one image under any name (file=), or the images of a directory by their names (dir=)."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from typing import Callable, Protocol

from ..backing.names import resolve
from ..engine.chain import close_source, open_source
from ..engine.image import QEDImage
from ..engine.in_flight import InFlight
from ..errors import ImageFormatError, QEDError, RequestError, StorageError
from ..format.create import create, qemu_cannot_open
from ..format.geometry import SECTOR, Geometry, round_up
from ..format.header import HEADER_BYTES, MAGIC, Header
from ..locks import Rank, ranked_lock
from ..storage import Storage
from ..storage.cache_mode import CacheMode
from ..storage.open import open_storage
from ..units import format_size
from .parameters import NewImage, Parameters
from .shared_image import Opener, SharedImage

MAX_LISTED = 10_000  # exports: nbdkit's limit, beyond which it lists none


def describe(header: Header) -> str:
    """An image for people.  No name of any file: clients have no business with those."""
    size, cluster_size = format_size(header.image_size), format_size(header.cluster_size)
    return f"QED image, {size}, {cluster_size} clusters" + (", with a backing file" if header.has_backing else "")


class Exports(Protocol):
    """All methods raise QEDError.  Any number of threads may open and close exports at once."""

    def prepare(self) -> None:
        """Before the server forks: report what cannot work."""
        ...

    def names(self) -> list[tuple[str, str]]:
        """(name, description) of all exports."""
        ...

    def default(self) -> str:
        """The name that a client means who names none."""
        ...

    def open(self, name: str, readonly: bool) -> SharedImage:
        """A connection begins.  `name` comes from the client, `readonly` from the operator."""
        ...

    def close(self, image: SharedImage) -> None:
        """A connection ends, without requests in flight."""
        ...

    def close_all(self) -> None:
        """The server ends."""
        ...


class OneImage:
    """The image of file=.

    It is opened read-only at first, so that a bad image is reported before the server forks and nothing is changed
    as long as only readers come, and stays open until the server ends.
    """

    def __init__(self, parameters: Parameters, path: str) -> None:
        self._parameters = parameters
        self._path = path
        self._shared = SharedImage(partial(parameters.open_image, path), parameters.log, parameters.locking)

    def prepare(self) -> None:
        new = self._parameters.new
        made = new is not None and not os.path.exists(self._path) and self._create(new)
        self._shared.enter(readonly=True)
        if new is not None and not made:
            self._compare(new)

    def _create(self, new: NewImage) -> bool:
        """False if somebody else made the image meanwhile."""
        size = new.size
        if new.backing_file is not None:
            source = open_source(resolve(new.backing_file, self._path), new.backing_fmt)
            size = size if size is not None else round_up(source.size, SECTOR)
            close_source(source)
        assert size is not None
        try:
            header = create(
                self._path,
                size,
                cluster_size=new.cluster_size,
                table_size=new.table_size,
                backing_file=new.backing_file,
                backing_fmt=new.backing_fmt,
                replace=False,
                check=self._check_new,
            )
        except StorageError as error:
            if error.errno == errno.EEXIST:
                return False
            raise
        self._parameters.log(f"{self._path}: created: {describe(header)}")
        warning = qemu_cannot_open(header)
        if warning is not None:
            self._parameters.log(f"{self._path}: warning: {warning}")
        return True

    def _check_new(self, path: str) -> None:
        """The new image, at `path` still, opens as the parameters allow.  Raises QEDError."""
        try:
            self._parameters.open_image(path, False, open_storage, InFlight()).close()
        except QEDError as error:
            raise RequestError(str(error).replace(path, self._path)) from None

    def _compare(self, new: NewImage) -> None:
        """Tell where an image that was there is another than the one asked for."""
        image = self._shared.image
        header = image.header
        pairs = [
            ("size", header.image_size, None if new.size is None else round_up(new.size, SECTOR)),
            ("cluster_size", header.cluster_size, new.cluster_size),
            ("table_size", header.table_size, new.table_size),
            ("backing_file", image.backing_name, new.backing_file),
        ]
        found = [
            f"{name}={there} instead of {wanted}"
            for name, there, wanted in pairs
            if self._parameters.given(name) and there != wanted
        ]
        if found:
            self._parameters.log(f"{self._path}: exists, and is served as it is: {', '.join(found)}")

    def names(self) -> list[tuple[str, str]]:
        return [("", describe(self._shared.image.header))]

    def default(self) -> str:
        return ""

    def open(self, name: str, readonly: bool) -> SharedImage:
        self._shared.enter(readonly)
        return self._shared

    def close(self, image: SharedImage) -> None:
        image.leave()

    def close_all(self) -> None:
        self._shared.close()


class _FileImage(SharedImage):
    """`open_image` is called with this image first."""

    def __init__(
        self,
        identity: object,
        path: str,
        open_image: Callable[[_FileImage, bool, Opener, InFlight], QEDImage],
        parameters: Parameters,
    ) -> None:
        super().__init__(partial(open_image, self), parameters.log, parameters.locking)
        self.identity = identity
        self.path = path  # where it was found last: a file may be renamed; protected by the directory's lock
        self.wanted = 0  # connections that use it or wait for it; protected by the directory's lock


class ImageDirectory:
    """The images of dir=, each open while it has clients.

    An export is a regular file with QED's magic, in the directory itself, whose name is UTF-8 and does not start
    with a dot (create() makes such files for a moment).  Symbolic links are no exports, wherever they lead.

    I1. An image is known by its file, not its name: two names of one file share one image, and a file that was
        replaced is another image, while clients of the old one keep that.
    I2. A path is looked at before it is opened, and what was opened is compared: what somebody puts there between
        the two is closed again, unused.
    I3. The lock protects what is known of images.  No export waits for another one that is being opened or closed.
    """

    def __init__(self, parameters: Parameters, directory: str) -> None:
        self._parameters = parameters
        self._directory = directory
        self._lock = ranked_lock(Rank.CACHE)  # protects both of these, and `wanted` in the images
        self._images: dict[object, _FileImage] = {}  # by identity
        self._told: set[object] = set()  # identities of images that were closed, of which the log told `told`

    def prepare(self) -> None:
        self.names()

    def names(self) -> list[tuple[str, str]]:
        """Damaged images are listed, too: who looks for one should learn why it does not open."""
        found = []
        try:
            with os.scandir(self._directory) as entries:
                for entry in entries:
                    name = _export_name(entry.name)
                    description = self._look(entry) if name is not None else None
                    if name is not None and description is not None:
                        found.append((name, description))
        except OSError as error:
            raise StorageError(f"cannot list {self._directory}", error) from None
        found.sort()
        if len(found) > MAX_LISTED:
            self._parameters.log(f"{self._directory}: {len(found)} images: the first {MAX_LISTED} are listed")
        return found[:MAX_LISTED]

    def _look(self, entry: os.DirEntry[str]) -> str | None:
        """The description of an image; None if it is none, or cannot be read."""
        try:
            if not entry.is_file(follow_symlinks=False):
                return None
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(os.path.join(self._directory, entry.name), flags)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):  # it was replaced meanwhile
                    return None
                data = os.pread(fd, HEADER_BYTES, 0)
            finally:
                os.close(fd)
        except OSError:
            return None
        header = Header.unpack(data.ljust(HEADER_BYTES, b"\0"))
        if header.magic != MAGIC:
            return None
        try:
            Geometry(header.cluster_size, header.table_size)
        except ImageFormatError:
            return "QED image, damaged"
        return describe(header)

    def default(self) -> str:
        """The only image there is, if it is the only one."""
        try:
            names = self.names()
        except StorageError:  # open() will tell
            names = []
        return names[0][0] if len(names) == 1 else ""

    def open(self, name: str, readonly: bool) -> SharedImage:
        path, identity = self._find(name)
        with self._lock:
            image = self._images.get(identity)
            if image is None:
                image = self._images[identity] = _FileImage(identity, path, self._open_file, self._parameters)
                image.told = identity in self._told
            image.path = path
            image.wanted += 1
        try:
            image.enter(readonly)
        except BaseException:
            self._forget(image)
            raise
        return image

    def _find(self, name: str) -> tuple[str, tuple[int, int]]:
        """Path and identity of the file that a client names.  Raises RequestError and StorageError."""
        if not name:
            raise RequestError(f"no export is named, and {self._directory} does not have just one image: name one")
        file_name = _file_name(name)
        if file_name is None:
            raise RequestError(f"export {name!r} cannot be the name of an image in {self._directory}")
        path = os.path.join(self._directory, file_name)
        try:
            info = os.stat(path, follow_symlinks=False)
        except OSError as error:
            raise StorageError(f"export {name!r}: cannot find {path}", error) from None
        if not stat.S_ISREG(info.st_mode):
            raise RequestError(f"export {name!r}: {path} is not a regular file")
        return path, (info.st_dev, info.st_ino)

    def _open_file(self, image: _FileImage, writable: bool, opener: Opener, in_flight: InFlight) -> QEDImage:
        path = image.path

        def checked(name: str, writable: bool, mode: CacheMode) -> Storage:
            storage = opener(name, writable, mode)
            if name == path and storage.identity() != image.identity:  # I2
                storage.close()
                raise StorageError(f"cannot open {path}: it was replaced meanwhile", code=errno.ESTALE)
            return storage

        return self._parameters.open_image(path, writable, checked, in_flight)

    def close(self, image: SharedImage) -> None:
        assert isinstance(image, _FileImage)
        try:
            image.leave()
        finally:
            self._forget(image)

    def _forget(self, image: _FileImage) -> None:
        with self._lock:
            image.wanted -= 1
            if not image.wanted:
                del self._images[image.identity]
                if image.told:
                    self._told.add(image.identity)

    def close_all(self) -> None:
        """Close what is left.  The first error is raised, the others are logged."""
        with self._lock:
            images = list(self._images.values())
        failure: QEDError | None = None
        for image in images:
            try:
                image.close()
            except QEDError as error:
                if failure is not None:
                    self._parameters.log(str(error))
                failure = failure or error
        if failure is not None:
            raise failure


def _export_name(file_name: str) -> str | None:
    """The name under which a file is exported; None if it is not."""
    if file_name.startswith("."):
        return None
    try:
        return os.fsencode(file_name).decode()  # NBD has UTF-8 names, whatever this system's locale
    except UnicodeDecodeError:
        return None


def _file_name(name: str) -> str | None:
    """The file of an export; None if there cannot be one.  The client may have sent anything."""
    if name.startswith(".") or "/" in name or "\0" in name:
        return None
    try:
        return os.fsdecode(name.encode())
    except UnicodeEncodeError:
        return None


def make_exports(parameters: Parameters) -> Exports:
    """What complete parameters ask for."""
    if parameters.file is not None:
        return OneImage(parameters, parameters.file)
    return ImageDirectory(parameters, parameters.directory)
