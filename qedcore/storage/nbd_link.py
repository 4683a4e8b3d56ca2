"""Link: one connection to an NBD server, with any number of requests in flight.

There is no thread of its own, so a link survives the fork of a server that goes to the background.  One of the
threads that wait for an answer waits on the socket, for all of them:

    A submits | polls ................ B's answer: wakes B | its own answer, wakes C and leaves
    B submits | waits .................. leaves
    C submits | waits ........................................................ | polls ...

I1. libnbd's handle is used only under the lock, which is not held while waiting.  A thread that submits while
    another polls wakes it if there is something left to send, and if that has shown the connection to be broken:
    libnbd has closed the socket then, and its number may be another's already.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from contextlib import suppress
from typing import Any, Callable, NamedTuple, Protocol

from ..errors import StorageError, UnsupportedError
from ..locks import Rank, ranked_condition, ranked_lock

LARGEST = 32 << 20  # bytes per request: what every server must take
_LOST = (errno.ENOTCONN, errno.ESHUTDOWN)  # no answer; the server refuses because it is about to end


def import_nbd() -> Any:
    """libnbd's Python module.  Raises UnsupportedError without it."""
    try:
        import nbd
    except ImportError:
        raise UnsupportedError("NBD needs libnbd's Python module (package python3-libnbd)") from None
    return nbd


class Peer(Protocol):
    """The other end."""

    several: bool  # it may be connected to more than once at a time

    def begin(self, handle: Any) -> None:
        """Start to connect a new libnbd handle.  Raises nbd.Error, OSError and StorageError."""
        ...

    def reason(self) -> str | None:
        """Why the last connection failed, if the other end has said so."""
        ...

    def close(self) -> None:
        """There will be no other connection.  A second call does nothing."""
        ...


class LinkLost(Exception):
    """The connection broke before the answer came: the request may or may not have been carried out."""


Submit = Callable[[Any, Callable[[Any], int]], object]  # (handle, completion): call one of libnbd's aio functions


class Offer(NamedTuple):
    """What a server offers for an export."""

    size: int  # bytes
    block: int  # bytes: the unit of requests
    largest: int  # bytes of data per request
    can_write: bool
    can_flush: bool
    can_zero: bool
    can_tell_zeros: bool
    can_share: bool  # multi-conn: a flush on one connection covers what was answered on all

    @classmethod
    def of(cls, handle: Any, nbd: Any) -> Offer:
        return cls(
            handle.get_size(),
            max(handle.get_block_size(nbd.SIZE_MINIMUM), 1),
            min(handle.get_block_size(nbd.SIZE_MAXIMUM) or LARGEST, LARGEST),
            not handle.is_read_only(),
            bool(handle.can_flush()),
            bool(handle.can_zero()),
            bool(handle.can_meta_context("base:allocation")),
            bool(handle.can_multi_conn()),
        )

    def problem(self, old: Offer, writing: bool) -> str | None:
        """Why requests that suited the server when it offered `old` may not suit it now."""
        if self.size != old.size:
            return f"it has {self.size} bytes now, not {old.size}: another export"
        if self.block > old.block or self.largest < old.largest:
            return f"its requests are of {self.block} to {self.largest} bytes now: another export"
        if writing and not self.can_write:
            return "it is read-only now"
        if writing and (self.can_flush < old.can_flush or self.can_zero < old.can_zero):
            return "it cannot flush or write zeros any more: another server"
        return None


class Request(Protocol):
    """What is asked of a server: it may be asked more than once."""

    size: int  # bytes of its data

    def submit(self, handle: Any, done: Callable[[Any], int]) -> object:
        """Call one of libnbd's aio functions, with `done` for its completion."""
        ...

    def run(self, handle: Any) -> object:
        """Call one of libnbd's functions that return when the answer is there.  Raises nbd.Error."""
        ...


class _Pending:
    """A request in flight: `done` once `code` is its errno or 0.  Protected by the link's lock."""

    def __init__(self, lock: Any) -> None:
        self.answered = ranked_condition(Rank.STORAGE, lock)
        self.done = False
        self.code = 0

    def complete(self, code: Any) -> int:
        """libnbd's callback; the lock is held."""
        self.code = code.value
        self.done = True
        self.answered.notify()
        return 1  # nobody asks libnbd for this command again


class Link:
    """A connection, ready after construction.

    Raises LinkLost when the connection cannot be made within `seconds`, with the cause as its text.
    """

    def __init__(self, peer: Peer, seconds: float) -> None:
        self._nbd = nbd = import_nbd()
        self._lock = ranked_lock(Rank.STORAGE)  # protects everything below
        self._pending: dict[_Pending, None] = {}
        self._polling = False
        self._closing = False
        self.lost = False
        self.handle: Any = None
        self._socket: Any = None  # the connection's
        try:
            self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise LinkLost(text_of(error)) from None
        try:
            self.handle = nbd.NBD()
            self.handle.set_pread_initialize(False)
            self.handle.add_meta_context("base:allocation")
            peer.begin(self.handle)
            self._wait_until_ready(time.monotonic() + seconds)
            self.offer = Offer.of(self.handle, nbd)
            self._socket = socket.socket(fileno=os.dup(self.handle.aio_get_fd()))  # our own: libnbd may close its one
            self.peer = self._name_peer()  # the export, named alike by all clients on this machine, if it can be
        except (nbd.Error, OSError) as error:
            self.close()
            raise LinkLost(peer.reason() or text_of(error)) from None
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self, deadline: float) -> None:
        handle = self.handle
        while not handle.aio_is_ready():
            if handle.aio_is_dead() or handle.aio_is_closed():
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise OSError(errno.ETIMEDOUT, "no answer: perhaps it takes no more clients")
            self._notify(self._poll(self._wanted(), remaining))

    def keep_alive(self, seconds: float) -> None:
        """Notice a peer that has vanished without a word within about this time."""
        sock = self._socket
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            interval = max(int(seconds / 4), 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(int(seconds * 1000), 1))

    def _name_peer(self) -> str | None:
        sock = self._socket
        address, export = sock.getpeername(), self.handle.get_export_name()
        if sock.family == socket.AF_UNIX and not os.path.isabs(address):
            return None  # a private one, or relative to the directory of its server
        return f"{sock.family.name} {address} {export}"

    def call(self, submit: Submit) -> None:
        """Carry out one request: submit(handle, completion) calls one of libnbd's aio functions.

        Raises OSError with the server's errno, or LinkLost.
        """
        with self._lock:
            request = _Pending(self._lock)
            if self.lost:
                raise LinkLost
            try:
                submit(self.handle, request.complete)
            except self._nbd.Error as error:
                if self._is_lost():
                    self._wake()
                    raise LinkLost from None
                raise OSError(error.errnum or errno.EIO, text_of(error)) from None
            self._pending[request] = None
            if self._polling and self.handle.aio_get_direction() != self._nbd.AIO_DIRECTION_READ:
                self._wake()
            try:
                while not request.done:
                    if self._polling:
                        request.answered.wait()
                    else:
                        self._serve_all()
            finally:
                del self._pending[request]
                if not self._polling and self._pending:
                    next(iter(self._pending)).answered.notify()
                if self._closing and not self._pending:
                    self._release()
            if request.code in _LOST:
                self.lost = True
                raise LinkLost
        if request.code:
            raise OSError(request.code, os.strerror(request.code))

    def run(self, work: Callable[[Any], object]) -> None:
        """Carry out one request, alone: work(handle) calls a function of libnbd that waits.  Raises as call().

        Such a function lets go of the interpreter until it has the answer.
        """
        if self.lost:
            raise LinkLost
        try:
            work(self.handle)
        except self._nbd.Error as error:
            if self._is_lost() or error.errnum in _LOST:
                self.lost = True
                raise LinkLost from None
            raise OSError(error.errnum or errno.EIO, text_of(error)) from None

    def cut(self) -> None:
        """Break the connection, under a request that waits."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _serve_all(self) -> None:
        """Wait for something to happen on the socket, and let libnbd see to it.  Lock held, but not while waiting."""
        self._polling = True
        try:
            wanted = self._wanted()
            self._lock.release()
            try:
                events = self._poll(wanted, None)
            finally:
                self._lock.acquire()
            try:
                self._notify(events)
            except self._nbd.Error:
                pass  # the handle is dead, as seen below
        finally:
            self._polling = False
        if self._is_lost():
            for request in self._pending:
                if not request.done:
                    request.code, request.done = errno.ENOTCONN, True
                    request.answered.notify()

    def _is_lost(self) -> bool:
        self.lost = self.lost or self.handle.aio_is_dead() or self.handle.aio_is_closed()
        return self.lost

    def _wanted(self) -> tuple[int, int]:
        """The socket, and the events that libnbd waits for."""
        direction = self.handle.aio_get_direction()
        events = select.POLLIN if direction & self._nbd.AIO_DIRECTION_READ else 0
        events |= select.POLLOUT if direction & self._nbd.AIO_DIRECTION_WRITE else 0
        return self.handle.aio_get_fd(), events

    def _poll(self, wanted: tuple[int, int], seconds: float | None) -> int:
        """Events on the socket, 0 if there are none but another request was submitted, or after `seconds`."""
        fd, events = wanted
        poll = select.poll()
        poll.register(fd, events)
        poll.register(self._wake_read, select.POLLIN)
        found = dict(poll.poll(None if seconds is None else max(seconds, 0) * 1000))
        if self._wake_read in found:
            os.read(self._wake_read, 64)
        return found.get(fd, 0)

    def _notify(self, events: int) -> None:
        direction = self.handle.aio_get_direction()
        if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and direction & self._nbd.AIO_DIRECTION_READ:
            self.handle.aio_notify_read()
        elif events and direction & self._nbd.AIO_DIRECTION_WRITE:
            self.handle.aio_notify_write()

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"w")
        except BlockingIOError:
            pass  # enough of them are there already

    def close(self) -> None:
        """Leave the server, once the requests in flight are answered.  A second call does nothing."""
        with self._lock:
            if not self._closing:
                self._closing = self.lost = True
                if not self._pending:
                    self._release()

    def _release(self) -> None:
        try:
            if self.handle is not None and self.handle.aio_is_ready():
                self.handle.aio_disconnect()
        except self._nbd.Error:
            pass
        self.handle = None  # libnbd closes it
        os.close(self._wake_read)
        os.close(self._wake_write)
        if self._socket is not None:
            self._socket.close()


def text_of(error: Any) -> str:
    """The message of nbd.Error, without the name of libnbd's function, or of OSError."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text: str = error.string
    return text.partition(": ")[2] or text


def explained(what: str, error: OSError) -> StorageError:
    """A StorageError for an OSError of call(), whose text may be libnbd's."""
    return StorageError(f"{what}: {error.strerror}", code=error.errno or errno.EIO)
