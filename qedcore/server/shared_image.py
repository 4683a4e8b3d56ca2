"""SharedImage: one image that any number of connections use.

I1. It is open from the first enter() to the last leave(), which closes it cleanly.
I2. While it is opened or closed, nobody enters or leaves: a reopening waits until the image is on disk.  Requests
    never wait for that; only connections in use have any.  Tidying is cut short when somebody waits.
I3. It is reopened at most once while in use: for writing, when it was opened for readers only and a writer comes.
    Requests may still be in flight in the read-only one, which is therefore closed with the other.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Callable

from ..engine.image import QEDImage
from ..engine.in_flight import InFlight
from ..errors import NotWritableError, QEDError, StorageError
from ..locks import Rank, ranked_lock
from ..storage import Storage, Wrapper
from ..storage.cache_mode import CacheMode
from ..storage.file import FileStorage
from ..storage.file_lock import Locking, Use
from ..storage.open import is_uri, open_file

if TYPE_CHECKING:
    from ..storage.nbd import NbdStorage


class _Borrowed(Wrapper):
    """A storage that somebody else closes, and later."""

    def close(self) -> None:
        """Its owner does."""


class Opener:
    """Opens the files of one image, which is read at first and may be written later.

    Its lock is then raised on the descriptor that has it, and only then shared with the new one: no other program can
    have written to the file since it was first read.  An export has one connection for both: some servers take no
    more, and the reader's image is closed after the writer's.
    """

    def __init__(self, locking: Locking) -> None:
        self._locking = locking
        self._reader: FileStorage | None = None  # the image itself, opened read-only
        self._export: NbdStorage | None = None  # the same, on a server

    def __call__(self, path: str, writable: bool, mode: CacheMode) -> Storage:
        if is_uri(path):
            return self._open_export(path, writable, mode)
        if not writable or self._reader is None:
            storage = open_file(path, writable, mode, locking=self._locking)
            self._reader = self._reader or storage
            return storage
        self._reader.lock(Use.WRITE, self._locking)
        storage = open_file(path, writable, mode, locking=Locking.OFF)
        try:
            if storage.identity() != self._reader.identity():
                raise StorageError(
                    f"cannot open {path} for writing: it was replaced since it was first opened", code=errno.ESTALE
                )
            storage.share_lock(self._reader)
        except BaseException:
            storage.close()
            raise
        return storage

    def _open_export(self, uri: str, writable: bool, mode: CacheMode) -> Storage:
        from ..storage.nbd import open_uri

        if writable and self._export is not None:
            self._export.allow_writing(self._locking)
            return _Borrowed(self._export)
        storage = open_uri(uri, writable, no_flush=mode.no_flush, locking=self._locking)
        self._export = self._export or storage
        return storage

    def read_only(self) -> None:
        """It could not be opened for writing: others may read it, too."""
        if self._reader is not None:
            self._reader.lock(Use.READ, self._locking)
        if self._export is not None:
            self._export.unlock()


class SharedImage:
    """`open_image(writable, opener, in_flight)` opens the image, or raises QEDError; `log` takes one-line notices."""

    image: QEDImage  # for those who have entered

    def __init__(
        self,
        open_image: Callable[[bool, Opener, InFlight], QEDImage],
        log: Callable[[str], None],
        locking: Locking = Locking.AUTO,
    ) -> None:
        self._open_image = open_image
        self._log = log
        self._locking = locking
        self._lock = ranked_lock(Rank.SHARED)  # protects all below; held while the image is opened or closed
        self._users = 0
        # An item for each connection that waits for the lock; needs none, because each step is one call.
        self._waiting: list[None] = []
        self.in_flight = InFlight()  # requests in both (I3)
        self._opener = Opener(locking)
        self._retired: QEDImage | None = None  # the read-only one (I3)
        self.told = (
            False  # the operator knows that the image may only be read; nobody else sets it once it is entered
        )

    def enter(self, readonly: bool) -> None:
        """A connection begins; leave() ends it.  Raises QEDError.

        Only with `readonly` allowed before a fork: it may start a thread otherwise.
        """
        self._waiting.append(None)
        with self._lock:
            self._waiting.pop()
            if not self._users:
                self._opener = Opener(self._locking)
                self.image = (None if readonly else self._open_writable()) or self._open(False)
            elif not (readonly or self.image.writable):
                writable = self._open_writable()
                if writable is not None:
                    writable.succeed(self.image)
                    self._retired, self.image = self.image, writable
            self._users += 1

    def _open_writable(self) -> QEDImage | None:
        """None where the image may only be read: writers are served as readers then."""
        try:
            return self._open(True)
        except BaseException as error:
            if self._users:
                self._opener.read_only()
            if not isinstance(error, NotWritableError):
                raise
            if not self.told:
                self._log(f"{error}: served read-only, as with -r")
            self.told = True
            return None

    def _open(self, writable: bool) -> QEDImage:
        image = self._open_image(writable, self._opener, self.in_flight)
        try:
            image.start_timer()
        except BaseException:
            image.close()
            raise
        return image

    def leave(self) -> None:
        """A connection ends; it has no requests in flight.  The last one closes the image.  Raises QEDError."""
        with self._lock:
            if self._users:
                self._users -= 1
                if not self._users:
                    self._close()

    def close(self) -> None:
        """Close the image cleanly, whoever uses it: the server ends.  No requests are in flight.  Raises QEDError."""
        with self._lock:
            if self._users:
                self._users = 0
                self._close()

    def _close(self) -> None:
        retired, self._retired = self._retired, None
        notice = None
        try:
            if self.image.writable:
                notice = self._tidy(self.image)
        finally:
            try:
                self.image.close()
            finally:
                if retired is not None:
                    retired.close()
        if notice is not None:
            self._log(notice)

    def _tidy(self, image: QEDImage) -> str | None:
        """What is left undone.  If the storage has failed, closing it tells."""
        from ..maintenance.tidy import tidy

        try:
            holes = tidy(image, lambda: bool(self._waiting))
        except QEDError as error:
            return str(error)
        except MemoryError:
            return f"{image.storage.name}: clusters inside the file may stay free: out of memory"
        if not holes:
            return None
        advice = "give them back with qed check -r leaks"
        return f"{image.storage.name}: {holes} clusters inside the file are free: {advice}"
