"""An NBD server in this process, which crashes, stalls and fails when a test says so.

Writes are in `now`; a flush makes them `durable`, and a crash loses what is not.  Its hook is asked before each
request is carried out, in the thread of the connection, and says what to do.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

READ, WRITE, DISC, FLUSH, ZERO = 0, 1, 2, 3, 6
HAS_FLAGS, READ_ONLY, CAN_FLUSH, CAN_FUA, CAN_ZERO, CAN_MULTI_CONN = 1, 2, 4, 8, 64, 256
_REQUEST = struct.Struct(">IHHQQI")


class Request(NamedTuple):
    kind: int
    offset: int  # bytes
    length: int  # bytes
    data: bytes = b""


class Crash(Exception):
    """Raised by the hook: the server is gone, before it has done anything about the request."""


class Disconnect(Exception):
    """Raised by the hook: the connections are lost before the answer, but the server is not: it carries this out."""


class HangUp(Exception):
    """Raised by the hook: the connection is lost, and others are not; the server carries this out."""


class CrashAfter(Exception):
    """Raised by the hook: the server is gone when it has carried out the request, but not answered."""


class Fail(Exception):
    """Raised by the hook with an errno: the answer."""


class FailAfter(Exception):
    """Raised by the hook with an errno: the answer to a request that was carried out."""


class FakeServer:
    """Listens at `path` from start() on.  start() after a crash brings it back, with what was durable."""

    def __init__(self, path: Path, content: bytes, hook: Callable[[Request], object] = lambda request: None) -> None:
        self.path = path
        self.hook = hook
        self.after: Callable[[Request], object] = lambda request: None  # asked when it was carried out
        self.durable = bytes(content)
        self.now = bytearray(content)
        self.block = 1  # bytes: the unit of requests
        self.largest = 32 << 20  # bytes per request
        self.most = 1000  # connections; others are accepted, and wait for ever
        self.flags = HAS_FLAGS | CAN_FLUSH | CAN_FUA | CAN_ZERO
        self.connections = 0
        self.log: list[Request] = []
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self._crashes = 0

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def start(self) -> FakeServer:
        with self._lock:
            self.now = bytearray(self.durable)
            self.path.unlink(missing_ok=True)
            listener = self._listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.path))
            listener.listen(8)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return self

    def crash(self) -> None:
        with self._lock:
            self.path.unlink(missing_ok=True)
            self._crashes += 1
            if self._listener is not None:
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
            self._listener = None
            self._cut(self._open)

    def disconnect(self) -> None:
        """The network fails: the server has lost nothing, and carries out what it has been asked."""
        with self._lock:
            self._cut(self._open)

    def _cut(self, connections: list[socket.socket]) -> None:
        for broken in connections:
            with suppress(OSError):  # the client may have left
                broken.shutdown(socket.SHUT_RDWR)
        self._open = [connection for connection in self._open if connection not in connections]

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                listener.close()
                return
            with self._lock:
                if listener is not self._listener:  # it has crashed meanwhile
                    connection.close()
                    continue
                self._open.append(connection)
                self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as stream:
                if self.connections > self.most:
                    stream.read(1)
                self._handshake(connection, stream.read)
                lock = threading.Lock()  # one answer at a time
                while True:
                    _, _, kind, handle, offset, length = _REQUEST.unpack(stream.read(_REQUEST.size))
                    if kind == DISC:
                        return
                    request = Request(kind, offset, length, stream.read(length) if kind == WRITE else b"")
                    answer = (connection, lock, handle, request, self._crashes)
                    threading.Thread(target=self._answer, args=answer, daemon=True).start()
        except (OSError, struct.error, ValueError):
            pass
        finally:
            with self._lock:
                if connection in self._open:
                    self._open.remove(connection)

    def _handshake(self, connection: socket.socket, read: Callable[[int], bytes]) -> None:
        connection.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        read(4)
        while True:
            _, option, length = struct.unpack(">8sII", read(16))
            read(length)

            def reply(kind: int, data: bytes = b"") -> None:
                head = struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data))  # noqa: B023
                connection.sendall(head + data)

            if option == 7:  # GO
                reply(3, struct.pack(">HQH", 0, len(self.now), self.flags))
                reply(3, struct.pack(">HIII", 3, self.block, 4096, self.largest))
                reply(1)
                return
            reply(0x80000001)  # not supported

    def _answer(
        self, connection: socket.socket, lock: threading.Lock, handle: int, request: Request, crashes: int
    ) -> None:
        code, data, after, refused = 0, b"", False, False
        try:
            self.hook(request)
        except Fail as error:
            code, refused = error.args[0], True
        except FailAfter as error:
            code = error.args[0]
        except Crash:
            self.crash()
            return
        except CrashAfter:
            after = True
        except Disconnect:
            self.disconnect()
        except HangUp:
            with self._lock:
                self._cut([connection])
        with self._lock:
            if crashes != self._crashes:
                return
            if not refused:
                self.log.append(request)
                data = self._carry_out(request)
                data = b"" if code else data
        if after:
            self.crash()
            return
        self.after(request)
        with lock:
            try:
                connection.sendall(struct.pack(">IIQ", 0x67446698, code, handle) + data)
            except OSError:
                pass

    def _carry_out(self, request: Request) -> bytes:
        end = request.offset + request.length
        if request.kind == READ:
            return bytes(self.now[request.offset : end])
        if request.kind == FLUSH:
            self.durable = bytes(self.now)
        else:
            self.now[request.offset : end] = request.data or bytes(request.length)
        return b""
