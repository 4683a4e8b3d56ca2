#!/usr/bin/env -S nbdkit python
"""nbdkit plugin: nbdkit python qed.py file=IMAGE.qed | dir=DIRECTORY [PARAMETER=VALUE...]

Only the callbacks, the log and the mapping of errors; the engine is the package qedcore beside this directory.
nbdkit-qed-plugin.pod tells the parameters.
"""

from __future__ import annotations

import builtins
import errno
import os
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import accumulate, cycle
from typing import Any, NoReturn

import nbdkit

# nbdkit runs this file with exec: __file__ is there only now, may be relative, and its directory is not searched.
SCRIPT = os.path.realpath(__file__)
sys.path.insert(0, os.path.dirname(os.path.dirname(SCRIPT)))

from qedcore import __version__  # noqa: E402
from qedcore.backing.names import from_json_name, json_name  # noqa: E402
from qedcore.engine.cluster_map import ZERO  # noqa: E402
from qedcore.engine.prefetch import prefetch  # noqa: E402
from qedcore.errors import QEDError, StorageError  # noqa: E402
from qedcore.server.affinity import Crowd, Seat  # noqa: E402
from qedcore.server.exports import Exports, describe, make_exports  # noqa: E402
from qedcore.server.nbdkit_version import require_nbdkit  # noqa: E402
from qedcore.server.parameters import Parameters  # noqa: E402
from qedcore.server.shared_image import SharedImage  # noqa: E402
from qedcore.server.thread_state import ThreadStates  # noqa: E402
from qedcore.storage.open import is_uri  # noqa: E402
from qedcore.units import MiB  # noqa: E402

API_VERSION = 2
FLAG_FUA = nbdkit.FLAG_FUA
DATA, HOLE = 0, nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO

# What NBD can say; nbdkit would turn any other errno into EINVAL, which blames the client.
_CLIENT_ERRNOS = frozenset(
    (
        errno.EPERM, errno.EROFS, errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
        errno.EINVAL, errno.ENOTSUP, errno.ESHUTDOWN,
    )
)  # fmt: skip

# What NBD allows everybody to send.
MAX_REQUEST = 32 * MiB
# Advice, bytes: copiers keep dozens of requests of the preferred size in flight, so not the largest clusters.
MAX_PREFERRED = 2 * MiB

threads = ThreadStates()
this_thread = threads.this_thread


def log(line: str) -> None:
    """A notice for the operator: to standard error, or to syslog when nbdkit has put that away."""
    line = printable(line)
    with suppress(OSError, ValueError):  # nobody listens: no reason to fail a request
        if stat.S_ISCHR(os.fstat(2).st_mode) and os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev:
            import syslog

            syslog.syslog(line)
        else:
            print(f"qed: {line}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """One line of valid UTF-8, whatever bytes a file name has: nbdkit 1.32 crashes on anything that is not."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


parameters = Parameters(log, lambda line: nbdkit.debug(printable(line)))
exports: Exports  # made by config_complete()
crowd = Crowd(this_thread)


_original: dict[str, Callable[..., list[str]]] = {}  # "format_exception"


def tell_in_one_line() -> None:
    """Have nbdkit log expected errors as one line.

    At the first error, because the server starts faster without the module that nbdkit then uses.
    """
    import traceback

    _original.setdefault("format_exception", traceback.format_exception)
    traceback.format_exception = _format_exception


def _format_exception(*args: Any, **kwargs: Any) -> list[str]:
    """A traceback is for bugs."""
    from traceback import clear_frames

    error = args[1] if len(args) > 1 else args[0]
    if not isinstance(error, QEDError):
        lines = _original["format_exception"](*args, **kwargs)
        return [line.encode("utf-8", "backslashreplace").decode() for line in lines]
    # nbdkit 1.32 never frees the exception: at least do not keep the request's buffers with it.
    clear_frames(args[2] if len(args) > 2 else None)
    return [printable(str(error))]


def one_line_errors(callback: Callable[..., Any]) -> Callable[..., Any]:
    """For callbacks whose errors are no client's."""

    def call(*args: Any) -> Any:
        try:
            return callback(*args)
        except BaseException:
            tell_in_one_line()
            raise

    return call


def fail(error: BaseException) -> NoReturn:
    """Answer the request with the error's errno."""
    tell_in_one_line()
    code = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    if isinstance(error, StorageError) and code == errno.EINVAL:
        code = errno.EIO  # not the client's fault
    nbdkit.set_error(code if code in _CLIENT_ERRNOS else errno.EIO)
    raise error


def refuse_other_bytes() -> None:
    """nbdkit would refuse them, too, but not say what to do."""
    advice = {b"file": "write file='{}'", b"dir": "start nbdkit in that directory, with dir=."}
    with suppress(OSError), builtins.open("/proc/self/cmdline", "rb") as file:
        for word in file.read().split(b"\0"):
            key, _, value = word.partition(b"=")
            try:
                value.decode()
            except UnicodeDecodeError:
                if key in advice:
                    do = advice[key].format(json_name(os.fsdecode(value)))
                    # An exception would be shown with a traceback here.
                    sys.exit(f"qed: {word!r} is not UTF-8, which nbdkit needs: {do}")


refuse_other_bytes()


@one_line_errors
def config(key: str, value: str) -> None:
    if key in ("file", "dir", "backing_file"):
        value = os.fsdecode(value.encode())  # nbdkit takes it for UTF-8, whatever this system's locale
        if key == "file" and value.startswith("json:"):
            value = from_json_name(value)
        if key != "backing_file" and value and not is_uri(value):
            value = os.path.abspath(value)  # nbdkit changes directory before anything is opened
    parameters.take(key, value)


@one_line_errors
def config_complete() -> None:
    global exports
    require_nbdkit(nbdkit)
    parameters.complete()
    crowd.enabled = crowd.enabled and parameters.affinity
    exports = make_exports(parameters)


@one_line_errors
def get_ready() -> None:
    exports.prepare()


def after_fork() -> None:
    threads.enable()


@one_line_errors
def cleanup() -> None:
    try:
        exports.close_all()
    finally:
        threads.drain()


def dump_plugin() -> None:
    print(f"qed_version={__version__}\nqed_path={SCRIPT}", flush=True)


def thread_model() -> int:
    return nbdkit.THREAD_MODEL_PARALLEL


@one_line_errors
def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    return exports.names()


@one_line_errors
def default_export(readonly: bool, is_tls: bool) -> str:
    return exports.default()


class Connection:
    """What nbdkit hands to every callback of a connection."""

    __slots__ = ("in_flight", "seat", "shared")

    def __init__(self, shared: SharedImage) -> None:
        self.shared = shared
        self.in_flight = shared.in_flight
        self.seat = Seat()


def open(readonly: bool) -> Connection:
    try:
        return Connection(exports.open(export_name(), readonly))
    except BaseException as error:
        fail(error)


def export_name() -> str:
    try:
        return nbdkit.export_name()
    except UnicodeDecodeError as error:
        return error.object.decode(errors="surrogateescape")  # no name of ours


@one_line_errors
def close(h: Connection) -> None:
    crowd.leave(h.seat)
    exports.close(h.shared)


def export_description(h: Connection) -> str:
    return describe(h.shared.image.header)


def get_size(h: Connection) -> int:
    return h.shared.image.size


def block_size(h: Connection) -> tuple[int, int, int]:
    return 1, min(h.shared.image.geometry.cluster_size, MAX_PREFERRED), MAX_REQUEST


def can_write(h: Connection) -> bool:
    return h.shared.image.writable


def can_flush(h: Connection) -> bool:
    return True


def can_fua(h: Connection) -> int:
    return nbdkit.FUA_NATIVE


def can_multi_conn(h: Connection) -> bool:
    return True


def can_zero(h: Connection) -> bool:
    return True


def can_fast_zero(h: Connection) -> bool:
    return True


def can_trim(h: Connection) -> bool:
    return True


def can_extents(h: Connection) -> bool:
    return True


def pread(h: Connection, buf: memoryview, pos: int, flags: int) -> None:
    if not this_thread.moved and h.in_flight.now:
        crowd.meet(len(buf), h.seat)
    try:
        h.shared.image.pread_into(buf, pos)
    except BaseException as error:
        fail(error)


def pwrite(h: Connection, buf: memoryview, pos: int, flags: int) -> None:
    if not this_thread.moved and h.in_flight.now:
        crowd.meet(len(buf), h.seat)
    try:
        h.shared.image.pwrite(buf, pos, bool(flags & FLAG_FUA))
    except BaseException as error:
        fail(error)


def flush(h: Connection, flags: int) -> None:
    this_thread.kept
    try:
        h.shared.image.flush()
    except BaseException as error:
        fail(error)


def zero(h: Connection, length: int, pos: int, flags: int) -> None:
    this_thread.kept
    try:
        h.shared.image.zero(
            pos,
            length,
            bool(flags & FLAG_FUA),
            may_trim=bool(flags & nbdkit.FLAG_MAY_TRIM),
            only_fast=bool(flags & nbdkit.FLAG_FAST_ZERO),
        )
    except BaseException as error:
        fail(error)


def trim(h: Connection, length: int, pos: int, flags: int) -> None:
    this_thread.kept
    try:
        h.shared.image.trim(pos, length, bool(flags & FLAG_FUA))
    except BaseException as error:
        fail(error)


def cache(h: Connection, length: int, pos: int, flags: int) -> None:
    this_thread.kept
    try:
        prefetch(h.shared.image, pos, length)
    except BaseException as error:
        fail(error)


def extents(h: Connection, length: int, pos: int, flags: int) -> Iterable[tuple[int, int, int]]:
    this_thread.kept
    try:
        first, sizes = h.shared.image.extents(pos, length, bool(flags & nbdkit.FLAG_REQ_ONE))
    except BaseException as error:
        fail(error)
    # There may be many: no step of Python for each.
    return zip(accumulate(sizes, initial=pos), sizes, cycle((HOLE, DATA) if first is ZERO else (DATA, HOLE)))
