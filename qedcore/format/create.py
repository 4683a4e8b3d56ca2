"""Making a new image: everything is validated first, and the file appears complete or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

from ..errors import ImageFormatError, RequestError, StorageError
from ..storage.file import FileStorage
from ..storage.file_lock import Use
from .geometry import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, SECTOR, Geometry, check_device_size, round_up
from .header import FEATURE_BACKING_FILE, FEATURE_NO_PROBE, HEADER_BYTES, MAX_BACKING_NAME, Header

# How file systems say that they have no such thing: hard links (FAT, SMB), or fsync of directories.
_UNSUPPORTED = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EXDEV)


def create(
    path: str | os.PathLike[str],
    size: int,
    *,
    cluster_size: int = DEFAULT_CLUSTER_SIZE,
    table_size: int = DEFAULT_TABLE_SIZE,
    backing_file: str | None = None,
    backing_fmt: str | None = None,
    replace: bool = True,
    check: Callable[[str], None] = lambda path: None,
) -> Header:
    """Make an empty image of `size` bytes (rounded up to 512) at `path`; an existing file is replaced at once.

    `backing_fmt` "raw" is recorded in the image; with anything else readers probe.  The backing file is not opened.
    With `replace` False an existing file is left alone, and the StorageError's errno is EEXIST.  `check` is called
    with the path that the complete file has before it gets its name: if it raises, that is removed.
    Raises ImageFormatError and RequestError before anything is touched, else StorageError.
    """
    if size < 0:
        raise RequestError(f"image size {size} is negative")
    geometry = Geometry(cluster_size, table_size)
    image_size = round_up(size, SECTOR)
    geometry.check_image_size(image_size)
    check_device_size(image_size)
    name = os.fsencode(backing_file) if backing_file else b""
    room = min(MAX_BACKING_NAME, cluster_size - HEADER_BYTES)
    if len(name) > room:
        raise ImageFormatError(f"backing filename of {len(name)} bytes is too long: at most {room}")
    features = 0
    if name:
        features = FEATURE_BACKING_FILE | (FEATURE_NO_PROBE if backing_fmt == "raw" else 0)
    header = Header(
        cluster_size=cluster_size,
        table_size=table_size,
        header_size=1,
        features=features,
        l1_table_offset=cluster_size,
        image_size=image_size,
        backing_filename_offset=HEADER_BYTES if name else 0,
        backing_filename_size=len(name),
    )
    with replacing(path, replace) as temporary:
        with open(temporary, "r+b") as file:
            file.write(header.pack() + name)
            file.truncate(cluster_size + geometry.table_bytes)  # the L1 table stays a hole: an empty one is all zeros
        check(temporary)
    return header


@contextmanager
def replacing(path: str | os.PathLike[str], replace: bool = True) -> Iterator[str]:
    """Make a file that appears at `path` complete or not at all, in the place of what is there (if `replace`).

    Gives the name of an empty file in the same directory.  When the block ends, that file is made durable and renamed
    to `path`, keeping the permissions of a file it replaces; when it raises, it is removed.  Raises StorageError,
    LockedError at once when the file to be replaced is in use; until the end, nobody else can use it.  Without
    `replace` a file that is there, or appears meanwhile, is not even locked: its users come first.
    """
    name, path = os.fspath(path), os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        code = errno.EISDIR if os.path.isdir(path) else errno.EEXIST
        raise StorageError(f"cannot create {path}: it exists and is not a regular file", code=code)
    directory = os.path.dirname(path)
    temporary = os.path.join(directory, f".qed-{os.urandom(8).hex()}")
    with _locked(name) if replace else nullcontext():
        try:
            open(temporary, "xb").close()
            with suppress(OSError):
                os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
            yield temporary
            _sync(temporary, os.O_RDWR)
            if replace:
                os.replace(temporary, path)
            else:
                _rename_new(temporary, path)
            _sync_directory(directory)  # the name, too
        except OSError as error:
            raise StorageError(f"cannot create {path}", error) from None
        finally:
            with suppress(OSError):
                os.unlink(temporary)


def _rename_new(temporary: str, path: str) -> None:
    """Give a file its name, which nobody else may have: FileExistsError if somebody was faster."""
    try:
        os.link(temporary, path)
        return
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    # A file system without hard links.  Whoever makes the name owns it, and it is replaced at once: where a crash
    # comes between, an empty file is left, which is no image.
    open(path, "xb").close()
    try:
        os.replace(temporary, path)
    except BaseException:
        os.unlink(path)
        raise


def _sync_directory(path: str) -> None:
    """Make its names durable, where the file system can do that by itself, and the directory may be read."""
    try:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EACCES):
            raise


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Nobody else uses the file at `path`, if there is one, until the block ends."""
    if not os.path.exists(path):
        yield
        return
    storage = FileStorage(path, writable=False)
    try:
        storage.lock(Use.WRITE)
        yield
    finally:
        storage.close()


def _sync(path: str, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
