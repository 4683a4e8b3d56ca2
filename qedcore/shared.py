"""SharedImage: one image that any number of connections use.

I1. It is open from the first enter() to the last leave(), which closes it cleanly.
I2. While it is opened or closed, nobody enters or leaves: a reopening waits until the image is on disk.  Requests
    never wait for that; only connections in use have any.
I3. It is reopened at most once while in use: for writing, when it was opened for readers only and a writer comes.
    Requests may still be in flight in the read-only one, which is therefore closed with the other.
"""

from __future__ import annotations

from typing import Callable

from .image import QEDImage
from .locks import Rank, ranked_lock


class SharedImage:
    """`open_image(writable)` opens the image, and raises QEDError."""

    image: QEDImage  # for those who have entered

    def __init__(self, open_image: Callable[[bool], QEDImage]) -> None:
        self._open_image = open_image
        self._lock = ranked_lock(Rank.SHARED)  # protects all below; held while the image is opened or closed
        self._users = 0
        self._retired: QEDImage | None = None  # the read-only one (I3)

    def enter(self, readonly: bool) -> None:
        """A connection begins; leave() ends it.  Raises QEDError.

        Only with `readonly` allowed before a fork: it may start a thread otherwise.
        """
        with self._lock:
            if not self._users:
                self.image = self._open(not readonly)
            elif not (readonly or self.image.writable):
                self._retired, self.image = self.image, self._open(True)
            self._users += 1

    def _open(self, writable: bool) -> QEDImage:
        image = self._open_image(writable)
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
        try:
            self.image.close()
        finally:
            if retired is not None:
                retired.close()
