"""Crowd: who is moved to which CPU, and who is not."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qedcore.engine.in_flight import InFlight
from qedcore.server.affinity import SMALL, Crowd, Seat, current_cpu


class Moves:
    """Stands in for the system call; remembers which thread went where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> None:
        self.seen: list[tuple[str, set[int]]] = []
        self.error = error
        monkeypatch.setattr(os, "sched_setaffinity", self.call)

    def call(self, pid: int, cpus: set[int]) -> None:
        assert pid == 0
        if self.error:
            raise self.error
        self.seen.append((threading.current_thread().name, cpus))


class Local(threading.local):
    moved = False


class Server:
    """Requests that do as the callbacks of the plugin do."""

    def __init__(self) -> None:
        self.local = Local()
        self.crowd = Crowd(self.local)
        self.in_flight = InFlight()
        self.seat = Seat()

    @contextmanager
    def request(self, length: int, seat: Seat | None = None) -> Iterator[None]:
        if not self.local.moved and self.in_flight.now:
            self.crowd.meet(length, seat or self.seat)
        with self.in_flight.request():
            yield

    def in_thread(self, length: int, times: int = 1, seat: Seat | None = None) -> None:
        """Requests, one after the other, on another thread."""

        def work() -> None:
            for _ in range(times):
                with self.request(length, seat):
                    pass

        thread = threading.Thread(target=work, name="other")
        thread.start()
        thread.join()


def test_one_at_a_time_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    moves, server = Moves(monkeypatch), Server()
    for _ in range(5):
        with server.request(512):
            pass
        server.in_thread(512)
    assert moves.seen == []


def test_who_meets_another_moves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moves, server = Moves(monkeypatch), Server()
    with server.request(512):
        server.in_thread(SMALL, times=3)
    assert [name for name, _ in moves.seen] == ["other"]
    with server.request(512), server.request(512):  # this thread, now: all go to the same CPU
        pass
    assert len(moves.seen) == 2 and moves.seen[0][1] == moves.seen[1][1]
    assert len(moves.seen[0][1]) == 1 and moves.seen[0][1] <= os.sched_getaffinity(0)


def test_large_requests_of_one_connection_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    moves, server = Moves(monkeypatch), Server()
    with server.request(512):
        server.in_thread(SMALL + 1, times=3)
    assert moves.seen == []


def test_connections_with_large_requests_share_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3})
    moves, server = Moves(monkeypatch), Server()
    one, two, three = Seat(), Seat(), Seat()

    def went(*seats: Seat) -> list[set[int]]:
        del moves.seen[:]
        with server.request(SMALL + 1):
            for seat in seats:
                server.in_thread(SMALL + 1, times=3, seat=seat)
        return [cpus for _, cpus in moves.seen]

    assert went(one) == []  # alone
    assert went(two, one, one, two) == [{5}, {3}, {3}, {5}]
    server.crowd.leave(one)
    assert went(two) == []  # alone again
    assert went(three, three) == [{3}, {3}]
    server.crowd.leave(Seat())  # which never asked for anything


def test_small_requests_of_all_connections_go_to_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    moves, server = Moves(monkeypatch), Server()
    for length in (SMALL + 1, SMALL):
        with server.request(512):
            for seat in (one := Seat(), two := Seat(), one, two):
                server.in_thread(length, seat=seat)
    assert len(moves.seen) == 4 + 2 and len({frozenset(cpus) for _, cpus in moves.seen[2:]}) == 1


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    moves, server = Moves(monkeypatch), Server()
    server.crowd.enabled = False
    with server.request(512):
        server.in_thread(512)
    assert moves.seen == []


def test_forbidden_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Moves(monkeypatch, PermissionError(1, "not here"))
    server = Server()
    with server.request(512):
        server.in_thread(512)
    assert not server.crowd.enabled


def test_forbidden_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int) -> set[int]:
        raise PermissionError(1, "not here")

    monkeypatch.setattr(os, "sched_getaffinity", forbidden)
    moves, server = Moves(monkeypatch), Server()
    with server.request(512):
        server.in_thread(512)
    assert not server.crowd.enabled and moves.seen == []


def test_current_cpu() -> None:
    assert current_cpu() in range(os.cpu_count() or 1)
