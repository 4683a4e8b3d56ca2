"""nbdkit plugin: nbdkit python qed.py file=IMAGE.qed [cache=MODE] [l2_cache=SIZE] [affinity=auto|off] [trace=EVENTS]

Only the callbacks, the log and the mapping of errors; the engine is the package qedcore beside this directory.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import syslog
import traceback
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NoReturn

import nbdkit

# nbdkit runs this file with exec: __file__ is there only now, may be relative, and its directory is not searched.
SCRIPT = os.path.realpath(__file__)
sys.path.insert(0, os.path.dirname(os.path.dirname(SCRIPT)))

from qedcore import __version__  # noqa: E402
from qedcore.cluster import ZERO  # noqa: E402
from qedcore.errors import QEDError, StorageError  # noqa: E402
from qedcore.shared import SharedImage  # noqa: E402
from qedcore.storage.file import is_uri  # noqa: E402
from qedcore.thread_state import ThreadStates  # noqa: E402

API_VERSION = 2

# What NBD can say; nbdkit would turn any other errno into EINVAL, which blames the client.
_CLIENT_ERRNOS = frozenset(
    (
        errno.EPERM, errno.EROFS, errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
        errno.EINVAL, errno.ENOTSUP, errno.ESHUTDOWN,
    )
)  # fmt: skip

threads = ThreadStates()
this_thread = threads.this_thread


def log(line: str) -> None:
    """A notice for the operator: to standard error, or to syslog when nbdkit has put that away."""
    line = printable(line)
    with suppress(OSError, ValueError):  # nobody listens: no reason to fail a request
        if stat.S_ISCHR(os.fstat(2).st_mode) and os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev:
            syslog.syslog(line)
        else:
            print(f"qed: {line}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """One line of valid UTF-8, whatever bytes a file name has: nbdkit 1.32 crashes on anything that is not."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


shared = SharedImage(log, lambda line: nbdkit.debug(printable(line)))
enter, leave = shared.crowd.enter, shared.crowd.leave


_format_traceback = traceback.format_exception


def _format_exception(*args: Any, **kwargs: Any) -> list[str]:
    """What nbdkit logs of an exception: expected errors are one line, a traceback is for bugs."""
    error = args[1] if len(args) > 1 else args[0]
    if not isinstance(error, QEDError):
        lines = _format_traceback(*args, **kwargs)
        return [line.encode("utf-8", "backslashreplace").decode() for line in lines]
    # nbdkit 1.32 never frees the exception: at least do not keep the request's buffers with it.
    traceback.clear_frames(args[2] if len(args) > 2 else None)
    return [printable(str(error))]


traceback.format_exception = _format_exception


def fail(error: BaseException) -> NoReturn:
    """Answer the request with the error's errno."""
    code = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    if isinstance(error, StorageError) and code == errno.EINVAL:
        code = errno.EIO  # not the client's fault
    nbdkit.set_error(code if code in _CLIENT_ERRNOS else errno.EIO)
    raise error


def config(key: str, value: str) -> None:
    # nbdkit changes directory before the image is opened.
    shared.configure(key, os.path.abspath(value) if key == "file" and value and not is_uri(value) else value)


def config_complete() -> None:
    shared.configured()


def get_ready() -> None:
    shared.check()


def after_fork() -> None:
    threads.enable()


def cleanup() -> None:
    try:
        shared.close()
    finally:
        threads.drain()


def dump_plugin() -> None:
    print(f"qed_version={__version__}\nqed_path={SCRIPT}", flush=True)


def thread_model() -> int:
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly: bool) -> SharedImage:
    try:
        shared.open(readonly)
    except BaseException as error:
        fail(error)
    return shared


def get_size(h: SharedImage) -> int:
    return h.image.size


def can_write(h: SharedImage) -> bool:
    return h.image.writable


def can_flush(h: SharedImage) -> bool:
    return True


def can_fua(h: SharedImage) -> int:
    return nbdkit.FUA_NATIVE


def can_multi_conn(h: SharedImage) -> bool:
    return True


def can_zero(h: SharedImage) -> bool:
    return True


def can_extents(h: SharedImage) -> bool:
    return True


def pread(h: SharedImage, buf: memoryview, pos: int, flags: int) -> None:
    this_thread.kept
    enter(len(buf))
    try:
        h.image.pread_into(buf, pos)
    except BaseException as error:
        fail(error)
    finally:
        leave()


def pwrite(h: SharedImage, buf: memoryview, pos: int, flags: int) -> None:
    this_thread.kept
    enter(len(buf))
    try:
        h.image.pwrite(buf, pos, bool(flags & nbdkit.FLAG_FUA))
    except BaseException as error:
        fail(error)
    finally:
        leave()


def flush(h: SharedImage, flags: int) -> None:
    this_thread.kept
    try:
        h.image.flush()
    except BaseException as error:
        fail(error)


def zero(h: SharedImage, length: int, pos: int, flags: int) -> None:
    this_thread.kept
    try:
        h.image.zero(pos, length, bool(flags & nbdkit.FLAG_FUA))
    except BaseException as error:
        fail(error)


def extents(h: SharedImage, length: int, pos: int, flags: int) -> Iterable[tuple[int, int, int]]:
    this_thread.kept
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    found = []
    try:
        for n, kind in h.image.extents(pos, length, bool(flags & nbdkit.FLAG_REQ_ONE)):
            found.append((pos, n, hole if kind is ZERO else 0))
            pos += n
    except BaseException as error:
        fail(error)
    return found
