"""The error tree: every class has its errno, and storage errors keep the operating system's."""

from __future__ import annotations

import errno

import pytest

from qedcore import errors

CODES = {
    "QEDError": errno.EIO,
    "ImageFormatError": errno.EINVAL,
    "NotQEDError": errno.EINVAL,
    "UnsupportedError": errno.ENOTSUP,
    "CorruptImageError": errno.EIO,
    "RequestError": errno.EINVAL,
    "ReadOnlyError": errno.EROFS,
    "ShutdownError": errno.ESHUTDOWN,
    "StorageError": errno.EIO,
    "UnreachableError": errno.EIO,
    "NotWritableError": errno.EIO,
    "ForeignWriterError": errno.EIO,
}


def test_every_class_is_listed() -> None:
    classes = {name for name, item in vars(errors).items() if isinstance(item, type) and name.endswith("Error")}
    assert classes == set(CODES)


@pytest.mark.parametrize("name", CODES)
def test_errno(name: str) -> None:
    error = getattr(errors, name)("words")
    assert isinstance(error, errors.QEDError)
    assert not isinstance(error, OSError)  # else an OSError handler would take it for the system's
    assert (error.errno, str(error)) == (CODES[name], "words")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EAGAIN, errno.EFBIG])
def test_storage_error_keeps_the_systems_errno(code: int) -> None:
    error = errors.StorageError("cannot write", OSError(code, "other words"))
    assert error.errno == code
    assert str(error) == f"cannot write: {errors.os.strerror(code)}"


def test_storage_error_without_errno() -> None:
    error = errors.StorageError("cannot read", OSError("connection lost"))
    assert (error.errno, str(error)) == (errno.EIO, "cannot read: connection lost")
