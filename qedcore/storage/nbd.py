"""NbdStorage: an image in an export of an NBD server.

I1-I4 as in the contract.  The size is fixed.  NBD has no locks: only the programs of this machine that reach the
server at the same address keep each other from writing to one export (lock_export).

A lost connection is made again, and then
I5. what was written and answered since the last flush is sent again, before anything else: the server may have
    crashed and lost it.  The newest version of each byte is kept in memory for that (ReplayLog); when that is much, a
    flush is made.  Older versions are never sent: if this program is killed on the way, a server that has not crashed
    has no value that an answered write had replaced.
I6. Requests that had no answer are sent again; all of them may be repeated without harm.  An answer counts only as
    long as its connection is the present one: the next one may have begun without that write.
I7. While the server stays away, requests fail after a while, but a failed flush is not a lost one: what it was for
    is still kept, so a flush that succeeds after the server has come back tells the truth.
I8. What a failed write has left behind is not undone by sending older ones again, once somebody may have read it.
I9. Of two writes to one place the one that is answered last is the newer one, here and on the server: if they were
    in flight together, it is sent once more, because nobody else can tell in which order they were carried out.
A server that has no flush is believed: what it has answered counts as durable.

One thing cannot be helped: where the network fails, rather than the server, the server may find and carry out an old
request after a later one of the new connection.  The storage remembers where (in_doubt()), so that the allocator does
not put other data there.
"""

from __future__ import annotations

import errno
import hashlib
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Callable

from ..errors import NotWritableError, StorageError, UnreachableError
from ..locks import Rank, ranked_condition
from . import ReadBuffer, Storage, WriteBuffer
from .file_lock import LockedError, Locking
from .flush import GroupCommit
from .nbd_link import LARGEST, Link, LinkLost, Offer, Peer, Request, explained, import_nbd, text_of
from .nbd_requests import Flush, Read, Status, Write
from .nbd_session import Session
from .ranges import BusyRanges, RangeSet
from .replay_log import ReplayLog

PATIENCE = 30.0  # seconds: how long a request waits for a server that has gone away
KEPT_BYTES = 64 << 20  # of writes that were not flushed
_RETRY_PAUSE = 0.25  # seconds
_HANDSHAKE = 10.0  # seconds, at least, that a server has for it
_LOSSES = 5  # connections that one request may lose: it may be what kills the server


class UriPeer:
    """A server at an NBD URI; `trusted`: the URI may name files with keys."""

    several = True

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


class NbdStorage(Storage):
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
        self._log = ReplayLog()
        self._writing: dict[Write, None] = {}  # in flight; each step of the interpreter on it is atomic
        self._doubts = RangeSet()  # where a write had no answer
        self._session: Session | None = None
        self._old: Session | None = None  # the last one, which may still have requests on their way
        self._failures = 0  # attempts to connect again that were given up
        self._failure = ""
        self._writable = False
        try:
            self._nbd = import_nbd()
            link = self._connect(_HANDSHAKE, None)
            self._session = self._begin_session(link)
        except BaseException as error:
            peer.close()
            if isinstance(error, LinkLost):
                raise StorageError(f"cannot open {name}: {error}") from None
            raise
        self._offer = offer = link.offer  # later connections may not offer less
        self._size = offer.size
        self._block = offer.block
        self._largest = max(offer.largest // self._block, 1) * self._block  # bytes of data per request
        self._can_flush = offer.can_flush and not no_flush
        self._commit = GroupCommit(self._sync)
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
        if not self._offer.can_write:
            raise NotWritableError(
                f"cannot open {self.name} for writing: the server has it read-only", code=errno.EROFS
            )
        if self._lock is None and locking is not Locking.OFF and self._export is not None:
            self._lock = lock_export(self._export, self.name, self._identity)
        self._writable = True

    def unlock(self) -> None:
        """It will not be written to after all.  A second call does nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    # -- the connection ----------------------------------------------------------------------------------------

    def _connect(self, seconds: float, before: Offer | None) -> Link:
        """Raises LinkLost, after `seconds` if the server does not answer."""
        link = Link(self._peer, seconds)
        try:
            problem = before and link.offer.problem(before, self._writable)
            if problem:
                raise LinkLost(problem)
            link.keep_alive(self._patience)
        except OSError as error:
            link.close()
            raise LinkLost(text_of(error)) from None
        except BaseException:
            link.close()
            raise
        return link

    def _begin_session(self, link: Link) -> Session:
        shared = self._peer.several and link.offer.can_share
        return Session(link, (lambda seconds: self._connect(seconds, link.offer)) if shared else None)

    def _call(self, request: Request, write: Write | None = None) -> None:
        """Carry out a request, on as many connections as it takes.  Raises OSError and UnreachableError.

        A `write` is noted in the log when it is answered.
        """
        losses = 0
        while losses < _LOSSES:
            session = self._session or self._connected()
            try:
                session.call(request)
            except LinkLost:
                losses += 1
                self._doubt(write)
                self._lose(session)
            except OSError:  # the answer
                raise
            except BaseException:  # a signal's: the request is on its way
                self._doubt(write)
                raise
            else:
                if write is None or self._note(write, session):
                    return
        raise UnreachableError(f"{self.name}: the connection was lost {_LOSSES} times during one request")

    def _lose(self, session: Session) -> None:
        with self._cond:
            if self._session is session:
                self._session = None
                self._old = session
        session.close()

    def _note(self, write: Write, session: Session) -> bool:
        """The write was answered in this session: it need not be sent again, unless False."""
        if not self._can_flush:
            return True  # it counts as durable
        with self._cond:
            if self._session is not session and not self._closed:
                return False  # the next one may have been given the log already, without this write (I6)
            if write.overtaken:
                write.overtaken = False
                return False  # the server may have it before or after the other one (I9)
            self._log.add(write.offset, write.end - write.offset, write.data)
            for other in list(self._writing):  # one step; those that come later are sent later, and newer
                if other.offset < write.end and write.offset < other.end and other is not write:
                    other.overtaken = True
        return True

    def _doubt(self, write: Write | None) -> None:
        """The write has no answer: the server may carry it out at any time, even if it is sent again."""
        if write is not None:
            with self._cond:
                self._doubts.add(write.offset, write.end)

    def in_doubt(self, offset: int, length: int) -> bool:
        """Whether a server may still carry out a write there that it has never answered (see storage.in_doubt)."""
        with self._cond:
            return self._doubts.overlaps(offset, offset + length)

    def _connected(self) -> Session:
        """The session; the first who finds it lost begins another, and the others wait.  Raises UnreachableError."""
        with self._cond:
            failures = self._failures
            while self._session is None:
                if self._closed:
                    raise StorageError(f"{self.name} was closed", code=errno.ESHUTDOWN)
                if self._failures > failures:
                    raise UnreachableError(f"cannot reach {self.name}: {self._failure}")
                if not self._connecting:
                    break
                self._cond.wait()
            else:
                return self._session
            self._connecting = True
            old, self._old = self._old, None
            # Whoever comes after others have waited in vain makes one attempt.
            patience = 0.0 if failures else self._patience
        session, failure = None, ""
        try:
            if old is not None:
                old.drain(self._patience)
            session = self._connect_again(patience)
        except LinkLost as error:
            failure = str(error)
            raise UnreachableError(f"cannot reach {self.name}: {failure}") from None
        finally:
            with self._cond:
                self._connecting = False
                self._session = session
                self._failures = 0 if session else self._failures + 1
                self._failure = failure
                self._cond.notify_all()
        return session

    def _connect_again(self, patience: float) -> Session:
        deadline = self._clock() + patience
        while True:
            try:
                link = self._connect(max(self._patience, _HANDSHAKE), self._offer)
                try:
                    self._replay(link)
                    return self._begin_session(link)
                except BaseException:
                    link.close()
                    raise
            except LinkLost:
                if self._clock() >= deadline:
                    raise
                self._pause(_RETRY_PAUSE)

    def _replay(self, link: Link) -> None:
        """Send what was written since the last flush (I5).  Raises LinkLost.

        Nothing is added to the log meanwhile, because there is no link.  A crash of this program anywhere here leaves
        each byte as the server has it or as the newest answered write made it.  If this link is lost, too, all of it
        is sent again on the next one: nothing leaves the log before a flush is answered.
        """
        with self._cond:
            pieces = list(self._log)
        for piece in pieces:
            try:
                link.call(Write(*piece[:3]).submit)
            except OSError as error:
                raise LinkLost(f"a write that it may have lost failed: {error.strerror}") from None

    # -- requests ----------------------------------------------------------------------------------------------

    def size(self) -> int:
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
                self._call(Read(part, at))
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
        with self._busy.hold(start, end, uneven) if self._block > 1 else nullcontext():
            if uneven:
                view = self._filled(view, offset, start, end)
            try:
                for at, n in self._pieces(start, end - start):
                    self._write(Write(at, n, bytes(view[at - start : at - start + n])))
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
        if not self._offer.can_zero or offset % self._block or length % self._block:
            return False
        try:
            with self._busy.hold(offset, offset + length, False):
                step = max(LARGEST // self._block, 1) * self._block  # the limit of the server is for data
                for at in range(offset, offset + length, step):
                    self._write(Write(at, min(step, offset + length - at), None))
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
                return False
            raise explained(f"cannot zero {length} bytes at {offset:#x} of {self.name}", error) from None
        return True

    def _write(self, write: Write) -> None:
        if self._log.cost > KEPT_BYTES:
            self.flush()
        self._writing[write] = None  # without the lock: one step, before it is sent
        try:
            self._call(write, write)
        except BaseException as error:
            if not isinstance(error, UnreachableError):
                self._settle(write)
            raise
        finally:
            del self._writing[write]

    def _settle(self, failed: Write) -> None:
        """The server has refused a write, and may have carried out some of it: what is there now must stay (I8)."""
        with self._cond:
            older = self._log.overlaps(failed.offset, failed.end - failed.offset)
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
            epoch = self._log.begin_flush()
        try:
            self._call(Flush())
        except OSError as error:
            raise explained(f"cannot flush {self.name}", error) from None
        # Only now: a server that has crashed before it answered needs all of it again.
        with self._cond:
            self._log.flushed(epoch)

    def data_run(self, offset: int, length: int) -> tuple[bool, int]:
        """(has data, bytes) of the run at `offset`; data everywhere if the server cannot tell."""
        if not self._offer.can_tell_zeros or offset + length > self.size():
            return True, length
        start, end = self._blocks(offset, min(length, LARGEST))
        status = Status(end - start, start)
        try:
            self._call(status)
        except OSError:
            return True, length
        found = status.found
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
            session, self._session = self._session, None
        if session is not None:
            session.close()
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
