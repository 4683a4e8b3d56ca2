"""NbdStorage: an image in an export of an NBD server.

I1-I4 as in the contract.  The size is fixed.  NBD has no locks: only the programs of this machine that reach the
server at the same address keep each other from writing to one export (lock_export).

A lost connection is made again, and then
I5. every write that was answered since the last flush is sent again, in order, before anything else: the server may
    have crashed and lost it.  Writes are kept in memory for that; when there are many, a flush is made.
I6. requests that had no answer are sent again; all of them may be repeated without harm.
I7. While the server stays away, requests fail after a while, but a failed flush is not a lost one: what it was for
    is still kept, so a flush that succeeds after the server has come back tells the truth.
I8. What a failed write has left behind is not undone by sending older ones again, once somebody may have read it.
A server that has no flush is believed: what it has answered counts as durable.

One thing cannot be helped: where the network fails, rather than the server, the server may find and carry out an old
request after a later one of the new connection.
"""

from __future__ import annotations

import errno
import hashlib
import socket
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Callable

from ..errors import NotWritableError, StorageError, UnreachableError
from ..locks import Rank, ranked_condition
from . import ReadBuffer, WriteBuffer
from .file_lock import LockedError, Locking
from .flush import GroupCommit
from .nbd_link import Link, LinkLost, Peer, explained, import_nbd, text_of
from .ranges import BusyRanges

PATIENCE = 30.0  # seconds: how long a request waits for a server that has gone away
KEPT_BYTES = 64 << 20  # of writes that were not flushed
_LARGEST = 32 << 20  # bytes per request: what every server must take
_RETRY_PAUSE = 0.25  # seconds
_HANDSHAKE = 10.0  # seconds, at least, that a server has for it
_OVERHEAD = 200  # bytes that keeping a write takes besides its data
_LOSSES = 5  # connections that one request may lose: it may be what kills the server


class UriPeer:
    """A server at an NBD URI; `trusted`: the URI may name files with keys."""

    def __init__(self, uri: str, trusted: bool) -> None:
        self._uri = uri
        self._trusted = trusted

    def begin(self, handle: Any) -> None:
        handle.set_uri_allow_local_file(self._trusted)
        handle.aio_connect_uri(self._uri)

    def reason(self) -> str | None:
        return None

    def close(self) -> None:
        """There is nothing to close."""


class _Write:
    """A write, kept until it is durable: zeros if `data` is None.  Lengths and offsets in bytes."""

    __slots__ = ("answered", "cost", "data", "length", "offset")

    def __init__(self, offset: int, length: int, data: bytes | None) -> None:
        self.offset = offset
        self.length = length
        self.data = data
        self.cost = len(data or b"") + _OVERHEAD  # bytes
        self.answered = False


def _send(write: _Write, handle: Any, done: Callable[[Any], int]) -> None:
    if write.data is None:
        handle.aio_zero(write.length, write.offset, done)
    else:
        handle.aio_pwrite(write.data, write.offset, done)


def _receive(view: memoryview, offset: int, handle: Any, done: Callable[[Any], int]) -> None:
    handle.aio_pread(view, offset, done)


class NbdStorage:
    """See Storage.  `clock` counts seconds, and `pause` waits for some.

    Raises StorageError when the server cannot be reached or refuses; UnsupportedError without libnbd.
    """

    fixed_size = True

    def __init__(
        self,
        name: str,
        peer: Peer,
        writable: bool = False,
        *,
        no_flush: bool = False,
        identity: object = None,
        locking: Locking = Locking.AUTO,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self._peer = peer
        self._identity = ("nbd", name) if identity is None else identity
        self._patience = patience
        self._clock = clock
        self._pause = pause
        self._busy = BusyRanges()
        self._cond = ranked_condition(Rank.STORAGE)  # protects everything below; not held across I/O
        self._connecting = False
        self._closed = False
        self._kept: dict[_Write, None] = {}  # in order
        self._kept_bytes = 0
        self._link: Link | None = None
        self._failures = 0  # attempts to connect again that were given up
        self._failure = ""
        self._size: int | None = None
        try:
            self._nbd = import_nbd()
            self._link = link = self._connect(_HANDSHAKE)
        except BaseException as error:
            peer.close()
            if isinstance(error, LinkLost):
                raise StorageError(f"cannot open {name}: {error}") from None
            raise
        handle = link.handle
        largest = handle.get_block_size(self._nbd.SIZE_MAXIMUM) or _LARGEST
        self._block = max(handle.get_block_size(self._nbd.SIZE_MINIMUM), 1)  # bytes: the unit of requests
        self._largest = max(min(largest, _LARGEST) // self._block, 1) * self._block  # bytes of data per request
        self._can_flush = bool(handle.can_flush()) and not no_flush
        self._can_zero = bool(handle.can_zero())
        self._can_tell_zeros = bool(handle.can_meta_context("base:allocation"))
        self._commit = GroupCommit(self._sync)
        self._read_only = bool(handle.is_read_only())
        self._export = link.peer  # now: there may be no link when somebody wants to write
        self._lock: socket.socket | None = None
        if writable:
            try:
                self.allow_writing(locking)
            except BaseException:
                self.close()
                raise

    def allow_writing(self, locking: Locking) -> None:
        """It will be written to, too, and by nobody else on this machine.  Raises StorageError and LockedError."""
        if self._read_only:
            raise NotWritableError(
                f"cannot open {self.name} for writing: the server has it read-only", code=errno.EROFS
            )
        if self._lock is None and locking is not Locking.OFF and self._export is not None:
            self._lock = lock_export(self._export, self.name, self._identity)

    def unlock(self) -> None:
        """It will not be written to after all.  A second call does nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    # -- the connection ----------------------------------------------------------------------------------------

    def _connect(self, seconds: float) -> Link:
        """Raises LinkLost, after `seconds` if the server does not answer."""
        link = Link(self._peer, seconds)
        size = link.handle.get_size()
        if self._size is not None and self._size != size:
            link.close()
            raise LinkLost(f"it has {size} bytes now, not {self._size}: another export")
        self._size = size
        try:
            link.keep_alive(self._patience)
        except OSError as error:
            link.close()
            raise LinkLost(text_of(error)) from None
        return link

    def _call(self, submit: Callable[[Any, Callable[[Any], int]], object]) -> None:
        """Carry out a request, on as many connections as it takes.  Raises OSError and UnreachableError."""
        for _ in range(_LOSSES):
            link = self._connected()
            try:
                return link.call(submit)
            except LinkLost:
                with self._cond:
                    if self._link is link:
                        self._link = None
                link.close()
        raise UnreachableError(f"{self.name}: the connection was lost {_LOSSES} times during one request")

    def _connected(self) -> Link:
        """The link; the first who finds it lost makes it again, and the others wait.  Raises UnreachableError."""
        with self._cond:
            failures = self._failures
            while self._link is None:
                if self._closed:
                    raise StorageError(f"{self.name} was closed", code=errno.ESHUTDOWN)
                if self._failures > failures:
                    raise UnreachableError(f"cannot reach {self.name}: {self._failure}")
                if not self._connecting:
                    break
                self._cond.wait()
            else:
                return self._link
            self._connecting = True
            # Whoever comes after others have waited in vain makes one attempt.
            patience = 0.0 if failures else self._patience
        link, failure = None, ""
        try:
            link = self._connect_again(patience)
        except LinkLost as error:
            failure = str(error)
            raise UnreachableError(f"cannot reach {self.name}: {failure}") from None
        finally:
            with self._cond:
                self._connecting = False
                self._link = link
                self._failures = 0 if link else self._failures + 1
                self._failure = failure
                self._cond.notify_all()
        return link

    def _connect_again(self, patience: float) -> Link:
        deadline = self._clock() + patience
        while True:
            try:
                link = self._connect(max(self._patience, _HANDSHAKE))
                try:
                    self._replay(link)
                    return link
                except BaseException:
                    link.close()
                    raise
            except LinkLost:
                if self._clock() >= deadline:
                    raise
                self._pause(_RETRY_PAUSE)

    def _replay(self, link: Link) -> None:
        """Send what was written since the last flush (I5).  Raises LinkLost."""
        with self._cond:
            kept = list(self._kept)
        for write in kept:
            try:
                link.call(partial(_send, write))
            except OSError as error:
                raise LinkLost(f"a write that it may have lost failed: {error.strerror}") from None

    # -- requests ----------------------------------------------------------------------------------------------

    def size(self) -> int:
        assert self._size is not None
        return self._size

    def pread_into(self, buf: WriteBuffer, offset: int) -> None:
        view = memoryview(buf).cast("B")
        here = max(min(len(view), self.size() - offset), 0)
        if here < len(view):
            view[here:] = bytes(len(view) - here)  # past the end (I2)
            view = view[:here]
        start, end = self._blocks(offset, here)
        target = view
        if (start, end) != (offset, offset + here):
            target = memoryview(bytearray(end - start))
        try:
            for at, n in self._pieces(start, end - start):
                part = target[at - start : at - start + n]
                self._call(partial(_receive, part, at))
        except OSError as error:
            raise explained(f"cannot read {here} bytes at {offset:#x} of {self.name}", error) from None
        if target is not view:
            view[:] = target[offset - start : offset - start + here]

    def pwrite(self, buf: ReadBuffer, offset: int) -> None:
        view = memoryview(buf).cast("B")
        what = f"cannot write {len(view)} bytes at {offset:#x} of {self.name}"
        if offset + len(view) > self.size():
            raise StorageError(f"{what}: it has {self.size()} bytes", code=errno.ENOSPC)
        start, end = self._blocks(offset, len(view))
        uneven = (start, end) != (offset, offset + len(view))
        with self._busy.hold(start, end, uneven):
            if uneven:
                view = self._filled(view, offset, start, end)
            try:
                for at, n in self._pieces(start, end - start):
                    self._write(_Write(at, n, bytes(view[at - start : at - start + n])))
            except OSError as error:
                raise explained(what, error) from None

    def _filled(self, view: memoryview, offset: int, start: int, end: int) -> memoryview:
        """The whole blocks [start, end) with `view` at `offset` in them."""
        data = memoryview(bytearray(end - start))
        for at in {start, end - self._block}:
            self.pread_into(data[at - start : at - start + self._block], at)
        data[offset - start : offset - start + len(view)] = view
        return data

    def pwritev(self, bufs: Sequence[ReadBuffer], offset: int) -> None:
        self.pwrite(b"".join(bufs), offset)

    def punch(self, offset: int, length: int) -> bool:
        """Zeros in a range of whole blocks, whose space the server may give back; False where it cannot."""
        if not self._can_zero or offset % self._block or length % self._block:
            return False
        try:
            with self._busy.hold(offset, offset + length, False):
                step = max(_LARGEST // self._block, 1) * self._block  # the limit of the server is for data
                for at in range(offset, offset + length, step):
                    self._write(_Write(at, min(step, offset + length - at), None))
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
                return False
            raise explained(f"cannot zero {length} bytes at {offset:#x} of {self.name}", error) from None
        return True

    def _write(self, write: _Write) -> None:
        if self._can_flush:
            if self._kept_bytes > KEPT_BYTES:
                self.flush()
            with self._cond:
                # Before it is sent: a link that is lost after the answer must find it here (I5).
                self._kept[write] = None
                self._kept_bytes += write.cost
        try:
            self._call(partial(_send, write))
        except BaseException as error:
            self._forget([write])
            if not isinstance(error, UnreachableError):
                self._settle(write)
            raise
        write.answered = True

    def _settle(self, failed: _Write) -> None:
        """The server has refused a write, and may have carried out some of it: what is there now must stay (I8)."""
        end = failed.offset + failed.length
        with self._cond:
            older = any(w.offset < end and failed.offset < w.offset + w.length for w in self._kept)
        if older:
            try:
                self.flush()
            except StorageError:
                pass  # either no flush succeeds any more, or the next link begins with sending again

    def truncate(self, size: int) -> None:
        raise StorageError(f"cannot make {self.name} {size} bytes long: it has {self.size()}", code=errno.ENOSPC)

    def flush(self) -> None:
        if self._can_flush:
            self._commit.flush()

    def _sync(self) -> None:
        with self._cond:
            covered = [write for write in self._kept if write.answered]
        try:
            self._call(lambda handle, done: handle.aio_flush(done))
        except OSError as error:
            raise explained(f"cannot flush {self.name}", error) from None
        self._forget(covered)

    def _forget(self, writes: list[_Write]) -> None:
        with self._cond:
            for write in writes:
                if write in self._kept:
                    del self._kept[write]
                    self._kept_bytes -= write.cost

    def data_run(self, offset: int, length: int) -> tuple[bool, int]:
        """(has data, bytes) of the run at `offset`; data everywhere if the server cannot tell."""
        if not self._can_tell_zeros or offset + length > self.size():
            return True, length
        found: list[int] = []

        def take(context: str, at: int, entries: list[int], error: Any) -> int:
            found[:] = entries[:2]
            return 0

        start, end = self._blocks(offset, min(length, _LARGEST))
        try:
            self._call(lambda handle, done: handle.aio_block_status(end - start, start, take, done))
        except OSError:
            found.clear()
        if not found:
            return True, length
        n, flags = found[0] - (offset - start), found[1]
        if n <= 0:  # a server that tells less than a block
            return True, length
        return not flags & self._nbd.STATE_ZERO, min(n, length)

    def _blocks(self, offset: int, length: int) -> tuple[int, int]:
        """The whole blocks around a range: (start, end), bytes."""
        return offset - offset % self._block, -(-(offset + length) // self._block) * self._block

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of the requests for a range."""
        for at in range(offset, offset + length, self._largest):
            yield at, min(self._largest, offset + length - at)

    def identity(self) -> object:
        return self._identity

    def close(self) -> None:
        with self._cond:
            self._closed = True
            link, self._link = self._link, None
        if link is not None:
            link.close()
        self.unlock()
        self._peer.close()


def lock_export(peer: str, name: str, identity: object) -> socket.socket:
    """The right of this machine's programs to write to the export `peer`, until it is closed or the process ends.

    It is the name of a socket, which only one of them can have.  Raises LockedError and StorageError.
    """
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind("\0qed-writer-" + hashlib.sha256(peer.encode("utf-8", "surrogateescape")).hexdigest())
    except OSError as error:
        lock.close()
        if error.errno == errno.EADDRINUSE:
            raise LockedError('Failed to get "write" lock', name, identity) from None
        raise StorageError(f"cannot lock {name}", error) from None
    return lock


def open_uri(
    uri: str, writable: bool, *, no_flush: bool = False, trusted: bool = True, locking: Locking = Locking.AUTO
) -> NbdStorage:
    """The export at an NBD URI.  `trusted`: the URI is not out of an image, and may name files with keys."""
    return NbdStorage(uri, UriPeer(uri, trusted), writable, no_flush=no_flush, locking=locking)
