"""Clients that do what libnbd refuses to: the server answers or hangs up, lives on, and serves the others."""

from __future__ import annotations

import errno
import random
import signal
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built, assert_sound
from support.server import Nbdkit, disconnect
from support.tools import TIMEOUT

Serve = Callable[..., Nbdkit]
CS = 64 * KiB
SIZE = 4 * MiB + 512
LAYOUT = "DZD-" * 10

REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, position, length
REPLY = struct.Struct(">IIQ")  # magic, error, cookie
READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, ZERO, STATUS = range(8)
FAST_ZERO = 1 << 4
LARGEST = 2**32 - 1  # bytes that a request can name
HANGUP_ABORT = "raw_send_socket: Assertion"  # see test_lifecycle.py


class RawClient:
    """NBD without a library: fixed newstyle, simple replies."""

    def __init__(self, server: Nbdkit) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(str(server.socket))
        assert self.receive(18).startswith(b"NBDMAGICIHAVEOPT")

    def go(self) -> RawClient:
        """Through the handshake: NBD_OPT_EXPORT_NAME, without the 124 zeros."""
        self.socket.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, 0))
        assert struct.unpack(">QH", self.receive(10))[0] == SIZE
        return self

    def receive(self, n: int) -> bytes:
        """n bytes, or EOFError."""
        data = b""
        while len(data) < n:
            part = self.socket.recv(n - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def send(self, command: int, pos: int, length: int, data: bytes = b"", flags: int = 0, cookie: int = 7) -> None:
        self.socket.sendall(REQUEST.pack(0x25609513, flags, command, cookie, pos, length) + data)

    def answer(self) -> int:
        """The NBD error of the next reply, which has no data."""
        magic, error, cookie = REPLY.unpack(self.receive(REPLY.size))
        assert (magic, cookie) == (0x67446698, 7)
        return int(error)

    def hung_up_on(self) -> bool:
        """The server closes the connection, perhaps after some answers."""
        try:
            while self.socket.recv(MiB):
                pass
        except ConnectionError:
            pass
        return True

    def leave(self) -> None:
        """Disconnect, and wait until the server has closed the connection."""
        self.send(DISCONNECT, 0, 0)
        # Where nbdkit is newer than 1.32, the other threads of the connection still wait for requests then.
        self.socket.shutdown(socket.SHUT_WR)
        assert self.hung_up_on()

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def server(image: Callable[..., Built], serve: Serve) -> Iterator[Nbdkit]:
    """A server that still serves somebody else afterwards, and leaves a sound image with the same data."""
    built = image(size=SIZE, layout=LAYOUT)
    running = serve(built.path)
    other = running.connect()
    yield running
    assert_same(bytes(other.pread(SIZE, 0)), built.read(0, SIZE))
    other.pwrite(stamp(9, 3 * CS, 512), 3 * CS)
    disconnect(other)
    running.stop()
    assert_sound(built.path)


BEYOND = {
    "at the end": (SIZE, 512),
    "across the end": (SIZE - 1, 2),
    "across the end, all lengths": (SIZE - 512, LARGEST),
    "far away": (1 << 40, 4096),
    "past 2**63": ((1 << 63) + 512, 512),
    "wraps around 2**64": (2**64 - 512, 1024),
    "all of it and more": (0, LARGEST),
    "unaligned, near 4 GiB": (511, LARGEST - 1),
}


@pytest.mark.parametrize("command", [READ, TRIM, CACHE, ZERO], ids=["read", "trim", "cache", "zero"])
def test_beyond_the_end(server: Nbdkit, command: int) -> None:
    client = RawClient(server).go()
    for name, (pos, length) in BEYOND.items():
        client.send(command, pos, length)
        assert client.answer() in (errno.EINVAL, errno.ENOSPC, errno.ENOMEM), name
    client.send(FLUSH, 0, 0)  # and the connection goes on
    assert client.answer() == 0
    client.close()


def test_writes_beyond_the_end(server: Nbdkit) -> None:
    """Their data is skipped, not taken for the next request."""
    client = RawClient(server).go()
    for pos in (SIZE, SIZE - 511, (1 << 63) + 512, 2**64 - 256):
        client.send(WRITE, pos, 512, b"\xaa" * 512)
        assert client.answer() in (errno.EINVAL, errno.ENOSPC), pos
        client.send(FLUSH, 0, 0)
        assert client.answer() == 0
    client.close()


def test_nothing_at_all(server: Nbdkit) -> None:
    """0 bytes: done or refused (nbdkit's choice), and nothing changes."""
    client = RawClient(server).go()
    for command in (READ, WRITE, TRIM, CACHE, ZERO):
        for pos in (0, 5, SIZE, 1 << 62):
            client.send(command, pos, 0)
            assert client.answer() in (0, errno.EINVAL, errno.ENOSPC), (command, pos)
    client.send(FLUSH, 0, 0)
    assert client.answer() == 0
    client.close()


def test_unaligned(server: Nbdkit) -> None:
    client = RawClient(server).go()
    pos = 4 * CS + 3
    for length in (1, 511, CS + 1, 3 * CS - 2):
        client.send(READ, pos, length)
        assert client.answer() == 0
        before = client.receive(length)
        client.send(WRITE, pos, length, bytes(length))
        assert client.answer() == 0
        client.send(ZERO, pos, length, flags=FAST_ZERO)  # not for parts of clusters with data
        assert client.answer() in (0, errno.EOPNOTSUPP)
        client.send(TRIM, pos, length)
        assert client.answer() == 0
        client.send(READ, pos, length)
        assert client.answer() == 0
        assert client.receive(length) == bytes(length)
        client.send(WRITE, pos, length, before)
        assert client.answer() == 0
    client.close()


def test_a_write_too_long_to_be_received(server: Nbdkit) -> None:
    """nbdkit takes 64 MiB at most, and cannot skip 4 GiB: it may hang up, and nothing is written."""
    client = RawClient(server).go()
    client.send(WRITE, 0, LARGEST)
    try:
        assert client.answer() in (errno.EINVAL, errno.ENOSPC, errno.ENOMEM)
    except (EOFError, ConnectionError):
        pass
    client.close()


def test_commands_and_flags_that_do_not_exist(server: Nbdkit) -> None:
    client = RawClient(server).go()
    for command, flags in ((STATUS, 0), (8, 0), (100, 0), (0xFFFF, 0), (READ, 0xFFFF)):  # STATUS was not negotiated
        client.send(command, 0, 512, flags=flags)
        assert client.answer() == errno.EINVAL, command
    client.close()


def test_garbage(server: Nbdkit, rng: random.Random) -> None:
    for when in ("greeting", "options", "requests") * 12:
        client = RawClient(server)
        garbage = rng.randbytes(rng.randrange(32, 4096))
        if when == "options":
            client.socket.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", rng.randrange(12), 16))
        elif when == "requests":
            client.go()
        try:
            client.socket.sendall(garbage)
            client.socket.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass  # it hung up already
        assert client.hung_up_on()
        client.close()


def test_half_a_write(server: Nbdkit) -> None:
    """The client is gone before its data is complete: nothing of it is written."""
    for sent in (0, 1, 511):
        client = RawClient(server).go()
        client.send(WRITE, 0, 512, b"\xaa" * sent)
        client.close()


def test_200_connections(image: Callable[..., Built], serve: Serve) -> None:
    built = image(size=SIZE, layout=LAYOUT)
    server = serve(built.path, threads=2)
    clients = [RawClient(server).go() for _ in range(200)]
    for n, client in enumerate(clients):  # all at once
        pos = n * 20 * KiB + n
        client.send(WRITE, pos, 512, stamp(n % 127 + 1, pos, 512))
    for client in clients:
        assert client.answer() == 0
    for n, client in enumerate(clients):
        pos = n * 20 * KiB + n
        client.send(READ, pos, 512)
        assert client.answer() == 0
        assert client.receive(512) == stamp(n % 127 + 1, pos, 512)
    for client in clients:
        client.leave()
        client.close()
    server.stop()
    assert_sound(built.path)


def test_a_client_that_does_not_read(server: Nbdkit) -> None:
    """Its answers fill the socket and its threads; everybody else is served meanwhile."""
    slow = RawClient(server).go()
    for _ in range(64):
        slow.send(READ, 0, 4 * MiB)
    others = [RawClient(server).go() for _ in range(3)]
    for _ in range(20):
        for other in others:
            other.send(READ, 0, CS)
            assert other.answer() == 0
            other.receive(CS)
    for other in others:
        other.leave()
    for _ in range(64):  # late, but complete
        assert slow.answer() == 0
        slow.receive(4 * MiB)
    slow.leave()


def test_clients_that_vanish_while_they_are_answered(image: Callable[..., Built], serve: Serve) -> None:
    """nbdkit 1.32 itself may abort then: to us that is a kill, and what was answered is there."""
    built = image(size=SIZE, layout=LAYOUT)
    server = serve(built.path)
    stays = server.connect()
    stays.pwrite(stamp(5, 3 * CS, 512), 3 * CS)
    try:
        for _ in range(10):
            client = RawClient(server).go()
            for _ in range(16):
                client.send(READ, 0, MiB)
            client.close()
    except (OSError, EOFError):
        assert server.wait() == -signal.SIGABRT
    disconnect(stays)
    if server.running():
        server.send_signal(signal.SIGTERM)
    assert server.wait() == 0 or HANGUP_ABORT in server.log()
    again = serve(built.path)
    client = again.connect()
    assert_same(bytes(client.pread(512, 3 * CS)), stamp(5, 3 * CS, 512))
    disconnect(client)
    again.stop()
    assert_sound(built.path, leaks=None)


def test_a_client_in_the_handshake_holds_up_nobody(server: Nbdkit) -> None:
    idle = [RawClient(server) for _ in range(20)]
    client = RawClient(server).go()
    client.send(READ, 0, 512)
    assert client.answer() == 0
    client.receive(512)
    client.close()
    for waiting in idle:
        waiting.close()
