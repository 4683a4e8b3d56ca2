"""Which CPUs the threads of a real server may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patterns import KiB, MiB
from support.qed_image import Built
from support.server import Nbdkit, wait_for

ALL = frozenset(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(ALL) < 2, reason="there is one CPU only")

Serve = Callable[..., Nbdkit]
SIZE = 4 * MiB


def masks(server: Nbdkit) -> set[frozenset[int]]:
    """The CPUs of each thread."""
    return {frozenset(os.sched_getaffinity(int(task.name))) for task in Path(f"/proc/{server.pid}/task").iterdir()}


def read(clients: list[Any], length: int) -> None:
    """Several requests of each client at once."""
    reads = [(client, bytearray(length), n * length) for n in range(SIZE // length) for client in clients]
    pending = [(client, client.aio_pread(buffer, pos), buffer) for client, buffer, pos in reads]
    for client, cookie, _ in pending:
        while not client.aio_command_completed(cookie):
            client.poll(-1)


@pytest.fixture
def built(image: Callable[..., Built]) -> Built:
    return image(size=SIZE, layout="D" * (SIZE // (64 * KiB)))


def test_small_requests(built: Built, serve: Serve) -> None:
    """Two connections, one CPU."""
    server = serve(built.path)
    clients = [server.connect(), server.connect()]

    def all_moved() -> bool:
        read(clients, 4 * KiB)
        return len(masks(server)) == 2

    wait_for(all_moved, "threads on one CPU", 20)
    one, several = sorted(masks(server), key=len)
    assert len(one) == 1 and several == ALL


def test_large_requests(built: Built, serve: Serve) -> None:
    """One connection has all CPUs, two have one each."""
    server = serve(built.path)
    clients = [server.connect()]
    for _ in range(20):
        read(clients, 256 * KiB)
    assert masks(server) == {ALL}
    clients.append(server.connect())

    def all_moved() -> bool:
        read(clients, 256 * KiB)
        return len(masks(server)) == 3

    wait_for(all_moved, "two CPUs", 20)
    assert sorted(map(len, masks(server))) == [1, 1, len(ALL)]


def test_off(built: Built, serve: Serve) -> None:
    server = serve(built.path, affinity="off")
    clients = [server.connect(), server.connect()]
    for length in (4 * KiB, 256 * KiB) * 5:
        read(clients, length)
    assert masks(server) == {ALL}


def test_flushes(built: Built, serve: Serve) -> None:
    """A thread that was moved has another one sync, which has all CPUs and ends with the image."""
    server = serve(built.path)

    def serve_clients(flushes: bool) -> None:
        clients = [server.connect(), server.connect()]

        def all_moved() -> bool:
            read(clients, 4 * KiB)
            return len(masks(server)) == 2

        wait_for(all_moved, "threads on one CPU", 20)
        for _ in range(50):
            read(clients, 4 * KiB)
            if flushes:
                clients[0].flush()
        for client in clients:
            client.shutdown()

    def wait_for_threads(n: int) -> None:
        wait_for(lambda: len(os.listdir(f"/proc/{server.pid}/task")) == n, f"{n} threads", 20)
        assert masks(server) == {ALL}

    serve_clients(flushes=False)
    wait_for_threads(2)  # the first, and the timer
    for _ in range(2):
        serve_clients(flushes=True)
        wait_for_threads(3)
    server.stop()
