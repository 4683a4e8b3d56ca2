"""The error tree: one class per kind of failure, each with the errno that a client sees.

Three kinds are kept apart: the image is wrong (ImageFormatError, CorruptImageError), the request is wrong
(RequestError and its children), the storage failed (StorageError).  The text is one line, lower case,
with the value that was found first and the limit after it.
"""

from __future__ import annotations

import errno
import os


class QEDError(Exception):
    """Base of every expected failure: a one-line message, and `errno` for the client."""

    errno: int = errno.EIO


class ImageFormatError(QEDError):
    """The file cannot be opened as a QED image: its header is wrong."""

    errno = errno.EINVAL


class NotQEDError(ImageFormatError):
    """The file does not begin as QED images do."""


class UnsupportedError(QEDError):
    """The image asks for something that this version does not do."""

    errno = errno.ENOTSUP


class CorruptImageError(QEDError):
    """A table of an open image holds an impossible value; other requests are not affected."""

    errno = errno.EIO


class RequestError(QEDError):
    """The request or parameter is wrong: outside the device, or malformed."""

    errno = errno.EINVAL


class ReadOnlyError(RequestError):
    """A write to an image that was opened read-only."""

    errno = errno.EROFS


class ShutdownError(RequestError):
    """A request to an image that was closed."""

    errno = errno.ESHUTDOWN


class StorageError(QEDError):
    """The storage under the image failed; `errno` is the operating system's."""

    def __init__(self, message: str, error: OSError | None = None, code: int = errno.EIO) -> None:
        if error is not None:
            code = error.errno or errno.EIO
            message = f"{message}: {os.strerror(code) if error.errno else error}"
        super().__init__(message)
        self.errno = code


class UnreachableError(StorageError):
    """The server that has the storage cannot be reached now.  Nothing is lost: later requests may work again."""


class NotWritableError(StorageError):
    """The storage may only be read: so says its medium, its permissions, or its server."""


class ForeignWriterError(StorageError):
    """Another program has written to an image that is open for writing here."""
