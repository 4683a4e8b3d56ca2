"""Making a file that appears under its name complete or not at all, in the place of one that may be there.

    1  everything that can be refused is refused, before anything is made
    2  an empty file beside the target gets the owner, the permissions and the extended attributes of what it will
       replace, and the caller fills it
    3  it is made durable and renamed to the target

Some targets cannot be replaced by a rename: a file that is a mount point of its own, one in a directory that may not
be written to, one whose owner we may not give away.  Those are emptied and written in place, as qemu-img does it with
all of them; a failure then leaves half of the new content there.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from ..errors import StorageError
from .file import FileStorage
from .file_lock import Use

# What other programs compute from the content of a file.
_OF_CONTENT = ("security.ima", "security.evm")
# How file systems say that they have no such thing: hard links (FAT, SMB), or fsync of directories.
_UNSUPPORTED = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EXDEV)


class CreateError(StorageError):
    """The file cannot be created at all; `errno` says why."""

    def __init__(self, path: str, error: OSError) -> None:
        super().__init__(f"cannot create {path}", error)


@contextmanager
def replacing(
    path: str | os.PathLike[str], replace: bool = True, *, sync: bool | None = True, apart: bool = False
) -> Iterator[str]:
    """Make the file at `path`.  Gives the name of an empty file to fill, which becomes it when the block ends.

    When the block raises, what is at `path` stays, unless it has to be written in place.  `sync`: make it durable
    before it gets its name; None: if it replaces something.  With `apart` the empty file has its own name already, in
    a directory of its own, and what else is made there comes along.  Raises CreateError, and LockedError at once when
    the file to be replaced is in use; until the end, nobody else can use it.  Without `replace` a file that is there,
    or appears meanwhile, is not even locked: its users come first.
    """
    given, path = os.fspath(path), os.path.realpath(path)
    try:
        before = _replaceable(path) if replace else None
        sync = before is not None if sync is None else sync
        place = _Place(path, before, apart)
    except OSError as error:
        raise CreateError(given, error) from None
    try:
        if place.in_place:
            with _locked(given):
                pass  # whoever opens it next locks it
            os.truncate(path, 0)
            yield path
            if sync:
                _sync(path, os.O_RDWR)
            return
        with _locked(given) if before is not None else nullcontext():
            yield place.temporary
            place.finish(replace, sync)
    except OSError as error:
        raise CreateError(given, error) from None
    finally:
        place.remove()


def _replaceable(path: str) -> os.stat_result | None:
    """What is at `path`, which may be replaced; None if nothing is.  Raises OSError."""
    try:
        found = os.stat(path)  # not only what realpath() makes of a loop of links
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EEXIST
        raise OSError(code, os.strerror(code))
    if not os.access(path, os.W_OK):
        code = errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(code, os.strerror(code))
    return found


class _Place:
    """Where the file is made: `temporary`, or at `path` itself if `in_place`.  Raises OSError."""

    def __init__(self, path: str, before: os.stat_result | None, apart: bool) -> None:
        self._path = path
        self._directory = os.path.dirname(path)
        self._own = os.path.join(self._directory, f".qed-{os.urandom(8).hex()}")  # the file, or its directory
        self._apart = apart
        self.temporary = os.path.join(self._own, os.path.basename(path)) if apart else self._own
        self.in_place = before is not None and _cannot_be_renamed_over(path, before)
        if self.in_place:
            return
        try:
            if apart:
                os.mkdir(self._own, 0o700)
            open(self.temporary, "xb").close()
            if before is not None:
                _take_over(self.temporary, path, before)
        except OSError as error:
            self.remove()
            if before is None or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            self.in_place = True
        except BaseException:
            self.remove()
            raise

    def finish(self, replace: bool, sync: bool) -> None:
        """Give the file its name.  Raises OSError."""
        others = (
            [name for name in os.listdir(self._own) if name != os.path.basename(self._path)] if self._apart else []
        )
        for name in others:
            made = os.path.join(self._own, name)
            if sync:
                _sync(made, os.O_RDWR)
            os.replace(made, os.path.join(self._directory, name))
        if sync:
            _sync(self.temporary, os.O_RDWR)
        if replace:
            os.replace(self.temporary, self._path)
        else:
            _rename_new(self.temporary, self._path)
        if sync:
            _sync_directory(self._directory)  # the name, too

    def remove(self) -> None:
        """Remove what is left.  Raises nothing."""
        if self._apart:
            shutil.rmtree(self._own, ignore_errors=True)
        else:
            with suppress(OSError):
                os.unlink(self._own)


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


def _cannot_be_renamed_over(path: str, before: os.stat_result) -> bool:
    """Whether rename() would fail, as far as that can be known.  Raises OSError."""
    directory = os.path.dirname(path)
    above = os.stat(directory)
    sticky = above.st_mode & stat.S_ISVTX and os.geteuid() not in (0, above.st_uid, before.st_uid)
    return bool(sticky) or _mount(path) != _mount(directory)


def _mount(path: str) -> str | None:
    """Identifies the mount that `path` is on; None where the system does not tell."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}") as info:
            return next((line for line in info if line.startswith("mnt_id:")), None)
    except OSError:
        return None
    finally:
        os.close(fd)


def _take_over(temporary: str, path: str, before: os.stat_result) -> None:
    """Give a new file the owner, permissions, ACLs and extended attributes of the one at `path`.  Raises OSError."""
    mine = os.stat(temporary)
    if (mine.st_uid, mine.st_gid) != (before.st_uid, before.st_gid):
        os.chown(temporary, before.st_uid, before.st_gid)
    os.chmod(temporary, stat.S_IMODE(before.st_mode))  # after chown(), which may clear bits
    try:
        names = os.listxattr(path)
    except OSError:
        return  # a file system without
    for name in names:
        value = os.getxattr(path, name)
        with suppress(OSError):
            if os.getxattr(temporary, name) == value:
                continue
        if name not in _OF_CONTENT:
            os.setxattr(temporary, name, value)
    for name in set(os.listxattr(temporary)) - {*names}:
        os.removexattr(temporary, name)  # an ACL that new files in this directory get


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Nobody else uses the file at `path` until the block ends."""
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
